"""No network for the tests, and the toy world, smaller still, that whole runs are tested in."""

import json
import os
import shutil
import tempfile
import time

import pytest

# Before any test file imports the hub's libraries: nothing is read from the user's cache or left in it.
CACHE = tempfile.TemporaryDirectory()
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=CACHE.name)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with policy/, reward_model/, prompts/ and pairs/, as the demo has them, only smaller."""
    import demo.world
    from tests.helpers import TINY

    folder = tmp_path_factory.mktemp("world")
    (folder / "world.json").write_text(json.dumps(demo.world.make_world(folder, TINY)))
    with (folder / "prompts" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "Short.", "label": 1}) + "\n")
    return folder


@pytest.fixture(scope="session")
def reviews(world):
    """The texts of the world's training reviews."""
    from support.files import read_rows

    return [row["text"] for row in read_rows(world / "prompts" / "train.jsonl")]


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """script -> what an uninterrupted run leaves, and the seconds that it took."""
    from tests.helpers import SMALL, finish, log_of, outcome, small

    found = {}
    for script in SMALL:
        folder = tmp_path_factory.mktemp("whole") / script
        for _ in range(2):  # the first one starts the server, too
            shutil.rmtree(folder, ignore_errors=True)
            begun = time.perf_counter()
            assert finish(script, small(world, script, folder), folder) == 0, log_of(folder)
            seconds = time.perf_counter() - begun
        found[script] = outcome(folder), seconds
        assert "checkpoint.pt" not in found[script][0]
    return found
