"""Several processes, one batch: what torchrun starts must train as one process does. gloo, on CPUs.

The ranks are children, in an environment as torchrun makes it; one test calls torchrun itself.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from support import fast, ranks, runs
from tests.helpers import finish, finish_ranks, flags, log_of, outcome, rows_of, small

# 20 steps at an lr that moves things. Batches of 7, the last one of an epoch of 3 rows or 2 pairs: some of four ranks
# have none. Micro-batches of 2.
LONG = {"reinforce": ["--limit", 66, "--batch-size", 7, "--epochs", 2, "--alpha", 0.1, "--advantage", "loo"],
        "dpo": ["--limit", 20, "--batch-size", 6, "--epochs", 5]}
LONG = {script: [*more, "--lr", 1e-3, "--micro-batch", 2, "--eval-limit", 17, "--eval-batch-size", 7]
        for script, more in LONG.items()}


def note_gradients(folder):
    """Saves the gradients of the first step, and the weights that each rank has in the end."""
    step, last = torch.optim.AdamW.step, ranks.everyone

    def noting(optimizer, *args, **more):
        path = folder.with_suffix(".gradients")
        weights = optimizer.param_groups[0]["params"]
        if runs.rank() == 0 and not path.exists():
            torch.save(torch.cat([weight.grad.flatten() for weight in weights]), path)
        note_gradients.weights = weights
        return step(optimizer, *args, **more)

    def at_the_end(rows):  # of the evaluation
        torch.save(note_gradients.weights, folder.with_suffix(f".rank-{runs.rank()}"))
        return last(rows)

    torch.optim.AdamW.step = noting
    sys.modules["reward"].everyone = at_the_end


@pytest.fixture(scope="module", params=LONG)
def alone(request, world, tmp_path_factory):
    """script, its folder: a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    argv = flags(world, request.param, folder, *LONG[request.param])
    assert finish(request.param, argv, folder, (note_gradients, folder)) == 0, log_of(folder)
    return request.param, folder


def weights_of(folder):
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / "model.safetensors").items())])


def near(found, expected, tolerance):
    """Numbers, and lists and dicts of them; texts must be the same."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(near(*pair, tolerance) for pair in zip(found, expected, strict=True))
    return found == (pytest.approx(expected, abs=tolerance) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_train_as_one_process_does(alone, world, tmp_path, count):
    script, one = alone
    folder = tmp_path / "run"
    argv = flags(world, script, folder, *LONG[script])
    assert finish_ranks(count, script, argv, folder, (note_gradients, folder)) == [0] * count, log_of(folder)

    expected, found = torch.load(one.with_suffix(".gradients")), torch.load(folder.with_suffix(".gradients"))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    start, trained = weights_of(world / "policy"), weights_of(one / "model")
    moved = (trained - start).norm()
    assert moved > 0.1 and (weights_of(folder / "model") - trained).norm() < 0.01 * moved
    of_ranks = [torch.load(folder.with_suffix(f".rank-{rank}")) for rank in range(count)]
    for weights in of_ranks[1:]:  # the same bits
        assert all(map(torch.equal, weights, of_ranks[0]))

    expected, found = outcome(one), outcome(folder)
    assert found.keys() == expected.keys() and "checkpoint.pt" not in found
    for row in (found["metrics.jsonl"][0:2] + expected["metrics.jsonl"][0:2]):
        row.pop("accuracy", None)  # of step 1, where margins are 0 up to rounding
    assert near(found["metrics.jsonl"], expected["metrics.jsonl"], 2e-3)
    assert near(found["eval.json"], expected["eval.json"], 2e-3)
    for name in ("samples.jsonl", "completions.jsonl"):
        assert near(rows_of(folder / name), rows_of(one / name), 2e-3)
    about = json.loads((folder / "config.json").read_text())
    assert about["hardware"].startswith(f"{count} ranks, each ")
    said = log_of(folder)
    assert said.count("train prompts") == log_of(one).count("train prompts")  # once
    assert said.count("step 0, reward") == 1 and said.count(f"{folder}: reward") == 1


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """What two ranks leave when nothing happens to them."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert finish_ranks(2, "reinforce", small(world, "reinforce", folder), folder) == [0, 0], log_of(folder)
    return outcome(folder)


def die(rank, method, step=None):
    """Kills a rank where it calls a method of Run, in a step; the others are where they are."""
    function = getattr(runs.Run, method)

    def dying(*args, **row):
        if runs.rank() == rank and row.get("step") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **row)

    setattr(runs.Run, method, dying)


def come_late():
    """Rank 0 is there first, and must not take what rank 1 left behind for its address."""
    time.sleep(runs.rank() / 2)


@pytest.mark.parametrize(("killed", "where", "done"), [
    (0, ("log", 5), 3), (1, ("log", 5), 3), (1, ("save_model",), 10)])  # before its evaluation: the other is in it
def test_a_killed_rank_ends_the_run_in_a_line_and_it_goes_on(world, two, tmp_path, killed, where, done):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    codes = finish_ranks(2, "reinforce", argv, folder, (die, killed, *where))
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    said = log_of(folder)
    assert "Traceback" not in said
    line = "\nreinforce.py: error: another rank has ended, killed or out of memory"  # not behind a progress bar
    assert said.count(line) == 1
    again = "call it again: what is finished is kept, training goes on from its checkpoint"
    assert said.rstrip().endswith(again)
    codes = finish_ranks(2, "reinforce", argv, folder, (come_late,), 1)  # as --max-restarts does
    assert codes == [0, 0], log_of(folder)
    assert f"goes on after step {done}\n" in log_of(folder) and outcome(folder) == two


def stop_one_rank():
    """SIGTERM reaches rank 1 in the middle of its fifth step, rank 0 never."""
    if runs.rank() == 1:
        log = runs.Run.log
        me = os.getpid()
        runs.Run.log = lambda run, **row: (row.get("step") == 5 and os.kill(me, signal.SIGTERM), log(run, **row))


def test_all_ranks_stop_after_the_same_step(world, two, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish_ranks(2, "reinforce", argv, folder, (stop_one_rank,)) == [128 + signal.SIGTERM] * 2
    assert log_of(folder).count("interrupted, by you or because another rank has ended; call it again") == 1
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert finish_ranks(2, "reinforce", argv, folder) == [0, 0] and outcome(folder) == two


def full_disk():
    def write(*args):
        raise OSError(28, "No space left on device")

    sys.modules["support.runs"].write_whole = write


@pytest.mark.parametrize(("more", "hook", "code", "message"), [
    (["--alpha", "x"], None, 2, "error: argument --alpha: invalid number value: 'x'"),
    (["--policy", "./none"], None, 1, "error: --policy ./none: there is no such folder"),
    (["--device", "cpu"], (full_disk,), 1, "cannot be written: No space left on device"),
])
def test_what_is_wrong_is_said_once(world, tmp_path, more, hook, code, message):
    folder = tmp_path / "run"
    argv = [*small(world, "reinforce", folder), *map(str, more)]
    assert set(finish_ranks(2, "reinforce", argv, folder, hook)) <= {code, 1}
    said = [line for line in log_of(folder).splitlines() if "error" in line]
    assert len(said) == 1 and said[0].startswith("reinforce.py: ") and message in said[0]
    assert "Traceback" not in log_of(folder)


def other_weights():
    """As on a second machine with another file of the same name."""
    if runs.rank() == 1:
        fingerprint = runs.fingerprint
        runs.fingerprint = lambda value: fingerprint(value) + hasattr(value, "lm_head")


def test_ranks_with_other_weights_are_refused(world, tmp_path):
    folder = tmp_path / "run"
    assert finish_ranks(2, "reinforce", small(world, "reinforce", folder), folder, (other_weights,)) == [1, 1]
    assert log_of(folder).count("error: rank ") == 1 and "has another policy, reference than rank" in log_of(folder)
    assert not folder.exists()


def test_a_finished_run_is_refused_by_every_rank(world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(world / "policy", folder / "model")
    (folder / "eval.json").write_text("{}")
    (folder / "config.json").write_text('{"script": "reinforce.py"}')
    assert finish_ranks(2, "reinforce", small(world, "reinforce", folder), folder) == [1, 1]
    assert log_of(folder).count("holds a finished run") == 1


def test_torchrun_itself(world, tmp_path):
    """The evaluation, shared out and gathered, is that of one process, also where two batches share a prompt."""
    here = runs.HOME
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = ["--samples-per-prompt", 3, "--eval-batch-size", 7]
    argv = flags(world, "reward", tmp_path / "two", *more)
    done = subprocess.run([*torchrun, "reward.py", *argv], cwd=here, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test prompts") == 1
    one = tmp_path / "one"
    argv = flags(world, "reward", one, *more)
    assert finish("reward", argv, one) == 0
    found, expected = outcome_of_reward(tmp_path / "two"), outcome_of_reward(one)
    assert [row["number"] for row in found[0]] == [n for n in range(20) for _ in range(3)]
    assert near(list(found), list(expected), 1e-4)


def outcome_of_reward(folder):
    result = json.loads((folder / "eval.json").read_text())
    return rows_of(folder / "completions.jsonl"), {key: result[key] for key in result if key != "seconds"}


# ---- the pieces --------------------------------------------------------------------------------------------


@pytest.fixture
def rank_of(monkeypatch):
    """Makes this process think that it is one of so many ranks."""

    def pretend(rank, count):
        monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(ranks.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(ranks.dist, "get_world_size", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


@pytest.mark.parametrize(("rows", "count", "shares"), [
    (8, 2, [(0, 4), (4, 8)]), (7, 4, [(0, 1), (1, 3), (3, 5), (5, 7)]), (2, 4, [(0, 0), (0, 1), (1, 1), (1, 2)])])
def test_every_row_is_one_ranks(rank_of, rows, count, shares):
    for rank, (first, end) in enumerate(shares):
        rank_of(rank, count)
        assert ranks.mine(rows) == slice(first, end)


def test_without_torchrun_all_rows_are_mine_and_nothing_is_changed():
    values = torch.ones(3)
    assert ranks.mine(7) == slice(0, 7) and ranks.turns() == slice(None)
    assert ranks.summed(values) is values and ranks.gathered(values, 3) is values and ranks.everyone([1]) == [1]
    assert ranks.anyone(15) == 15 and ranks.once(int, "7") == 7


def test_each_rank_takes_the_gpu_of_its_number_and_there_must_be_one(rank_of, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    rank_of(1, 4)
    ranks.claim(torch.device("cuda"))
    ranks.claim(torch.device("cpu"))
    assert taken == [1]
    rank_of(2, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(runs.UserError, match=r"GPUs on this machine: 2; give --nproc-per-node=2, or --device cpu"):
        fast.pick_device("cuda", "fp32")
    with pytest.raises(runs.UserError, match="--device mps: there is one such device"):
        ranks.claim(torch.device("mps"))
