"""No network for the tests, and the small world that whole runs are tested in."""

import json
import os
import tempfile

import pytest

# Before any test file imports the hub's libraries: nothing is read from the user's cache or left in it.
CACHE = tempfile.TemporaryDirectory()
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=CACHE.name)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with policy/, reward_model/, prompts/ and pairs/, as the demo has them, only smaller."""
    import toy
    from test_runs import TINY

    folder = tmp_path_factory.mktemp("world")
    (folder / "world.json").write_text(json.dumps(toy.make_world(folder, TINY)))
    with (folder / "prompts" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "Short.", "label": 1}) + "\n")
    return folder
