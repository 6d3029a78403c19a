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
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from support import errors, files, precision, ranks, runs
from tests.helpers import finish, finish_ranks, flags, log_of, outcome, rows_of, small

# 20 steps at an lr that moves things. Batches of 7 rows or 6 pairs, the last one of an epoch of 3 rows or 2 pairs: some
# of four ranks have none. DPO's micro-batches have 2 pairs.
LONG = {"reinforce": ["--limit", 66, "--batch-size", 7, "--epochs", 2, "--alpha", 0.1, "--advantage", "loo"],
        "dpo": ["--limit", 20, "--batch-size", 6, "--epochs", 5, "--micro-batch", 2]}
LONG = {script: [*more, "--lr", 1e-3, "--eval-limit", 17, "--eval-batch-size", 7] for script, more in LONG.items()}
# The loss's derivative with respect to a row's log-prob, at most: an advantage of 1 of 7 rows, beta / 2 of 6 pairs.
STEEPEST = {"reinforce": 1 / 7, "dpo": 0.1 / 2 / 6}
# A completion's log-prob is up to 256 nats here, where fp32 rounds by 7.6e-6; each of its 20 tokens brings ten such
# roundings: 20 * 10 * 7.6e-6 = 1.5e-3. All other numbers are smaller.
NATS = 2e-3


def note_gradients(folder, script):
    """Saves the first step's gradient, and the sum of the norms of what each row's log-prob adds to it.

    Of each rank: the weights that it has in the end.
    """
    module, norms = sys.modules[script], []
    load, masked_sum, step = module.loading.load_policy, module.masked_sum, torch.optim.AdamW.step

    def loaded(*args):
        policy, tokenizer = load(*args)
        note_gradients.weights = list(policy.parameters())
        return policy, tokenizer

    def summed(values, mask):
        sums, path = masked_sum(values, mask), folder.with_suffix(".gradients")
        if sums.requires_grad and (sums < 0).all() and not path.exists():  # log-probs, no KL
            for row in sums:
                gradients = torch.autograd.grad(row, note_gradients.weights, retain_graph=True)
                norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        return sums

    def stepped(optimizer, *args, **more):
        path = folder.with_suffix(".gradients")
        if ranks.rank() == 0 and not path.exists():
            gradient = torch.cat([weight.grad.flatten() for weight in note_gradients.weights])
            torch.save({"gradient": gradient, "norms": sum(norms)}, path)
        return step(optimizer, *args, **more)

    def gathered(rows):  # at the end of the evaluation
        torch.save(note_gradients.weights, folder.with_suffix(f".rank-{ranks.rank()}"))
        return ranks.all_gather_lists(rows)

    module.loading.load_policy, module.masked_sum, torch.optim.AdamW.step = loaded, summed, stepped
    sys.modules["support.runs"].all_gather_lists = gathered
    # The small classifier finds all texts alike: a reward less the mean of the others would be rounding errors. This
    # one varies, and has the same bits in any batch.
    sys.modules["reinforce"].positivity = lambda scorer, texts: torch.tensor([len(text) % 16 / 16 for text in texts])


@pytest.fixture(scope="module", params=LONG)
def alone(request, world, tmp_path_factory):
    """script, its folder: a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    argv = flags(world, request.param, folder, *LONG[request.param])
    assert finish(request.param, argv, folder, (note_gradients, folder, request.param)) == 0, log_of(folder)
    return request.param, folder


def weights_of(folder):
    """All but the attention's biases: those of the keys add the same number to all scores of a row, which no softmax
    sees. Their gradients are rounding errors, and AdamW's steps are as long for those as for any."""
    weights = sorted(load_file(folder / "model.safetensors").items())
    return torch.cat([weight.flatten() for name, weight in weights if not name.endswith("c_attn.bias")])


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
    assert finish_ranks(count, script, argv, folder, (note_gradients, folder, script)) == [0] * count, log_of(folder)

    # The gradient is a sum of rows' gradients, rounded before they cancel. Behind each number of it stands a chain of
    # sums: some 420 summands in each of two layers (over 32 or 128 units and 30 tokens), 700 in the head (over 32 units
    # and 623 words), forwards and backwards, and a sum over the tokens: less than 4000, each with eps / 2 of its size.
    expected, found = torch.load(one.with_suffix(".gradients")), torch.load(folder.with_suffix(".gradients"))
    tolerance = 4000 * torch.finfo().eps / 2 * STEEPEST[script] * expected["norms"]
    assert tolerance < 1e-2 * expected["gradient"].norm()  # a row more or less would be more than that
    assert (found["gradient"] - expected["gradient"]).norm() < tolerance
    start, trained = weights_of(world / "policy"), weights_of(one / "model")
    moved = (trained - start).norm()
    assert moved > 0.1 and (weights_of(folder / "model") - trained).norm() < 1e-2 * moved  # as for one gradient
    of_ranks = [torch.load(folder.with_suffix(f".rank-{rank}")) for rank in range(count)]
    for weights in of_ranks[1:]:  # the same bits
        assert all(map(torch.equal, weights, of_ranks[0]))

    expected, found = outcome(one), outcome(folder)
    assert found.keys() == expected.keys() and "checkpoint.pt" not in found
    for row in (found["metrics.jsonl"][0:2] + expected["metrics.jsonl"][0:2]):
        row.pop("accuracy", None)  # of step 1, where margins are 0 up to rounding
    assert near(found["metrics.jsonl"], expected["metrics.jsonl"], NATS)
    assert near(found["eval.json"], expected["eval.json"], NATS)
    for name in ("samples.jsonl", "completions.jsonl"):
        assert near(rows_of(folder / name), rows_of(one / name), NATS)
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
        if ranks.rank() == rank and row.get("step") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **row)

    setattr(runs.Run, method, dying)


def come_late():
    """Rank 0 is there first, and must not take what rank 1 left behind for its address."""
    time.sleep(int(os.environ["RANK"]) / 2)


@pytest.mark.parametrize(("killed", "where", "done"), [
    (0, ("log", 5), 3), (1, ("log", 5), 3), (1, ("deal",), 10)])  # deal: the evaluation's, where it begins
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
    if os.environ["RANK"] == "1":
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


def give_nan():
    sys.modules["reinforce"].positivity = lambda scorer, texts: torch.full((len(texts),), torch.nan)


@pytest.mark.parametrize(("more", "hook", "code", "message"), [
    (["--alpha", "x"], None, 2, "error: argument --alpha: invalid number value: 'x'"),
    (["--policy", "./none"], None, 1, "error: --policy ./none: there is no such folder"),
    ([], (full_disk,), 1, "cannot be written: No space left on device"),
    ([], (give_nan,), 1, "step 1: reward is nan; the weights were not touched"),
])
def test_what_is_wrong_is_said_once(world, tmp_path, more, hook, code, message):
    folder = tmp_path / "run"
    argv = [*small(world, "reinforce", folder), *map(str, more)]
    assert set(finish_ranks(2, "reinforce", argv, folder, hook)) <= {code, 1}
    said = [line for line in log_of(folder).splitlines() if "error" in line]
    assert len(said) == 1 and said[0].startswith("reinforce.py: ") and message in said[0]
    assert "Traceback" not in log_of(folder)


def divide_by_zero():
    """A mistake in the code, which rank 1 runs into."""
    if os.environ["RANK"] == "1":
        sys.modules["reinforce"].reinforce_loss = lambda *_: 1 / 0


def test_a_mistake_in_the_code_keeps_its_traceback_whichever_rank_runs_into_it(world, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish_ranks(2, "reinforce", argv, folder, (divide_by_zero,)) == [1, 1]
    said = log_of(folder)
    assert said.count("Traceback") == 1 and "ZeroDivisionError: division by zero\n" in said
    assert said.count("reinforce.py: error: another rank has ended") == 1


def other_weights():
    """As on a second machine with another file of the same name."""
    if os.environ["RANK"] == "1":
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
    here = files.HOME
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
    assert near(list(found), list(expected), NATS)


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


@pytest.mark.parametrize(("rows", "count", "parts"), [
    (8, 2, [(0, 4, 4 / 8), (4, 8, 4 / 8)]),
    (7, 4, [(0, 1, 1 / 7), (1, 3, 2 / 7), (3, 5, 2 / 7), (5, 7, 2 / 7)]),
    (2, 4, [(0, 1, 0), (0, 1, 1 / 2), (1, 2, 0), (1, 2, 1 / 2)])])
def test_every_row_counts_for_one_rank_and_a_rank_without_rows_goes_through_one_for_nothing(
        rank_of, rows, count, parts):
    for rank, (first, stop, weight) in enumerate(parts):
        rank_of(rank, count)
        assert ranks.rank_slice(rows) == (slice(first, stop), weight)


@pytest.mark.parametrize(("rank", "count", "rows", "size", "parts"), [
    (0, 1, 7, None, [(0, 7, 1)]),
    (0, 1, 5, 2, [(0, 2, 2 / 5), (2, 4, 2 / 5), (4, 5, 1 / 5)]),
    (1, 2, 7, 3, [(3, 6, 3 / 7), (6, 7, 1 / 7)]),
    (1, 2, 7, 9, [(3, 7, 4 / 7)]),
    (2, 4, 2, 3, [(1, 2, 0)])])
def test_micro_batches_are_of_the_ranks_own_rows_and_weigh_what_they_are_of_the_batch(
        rank_of, rank, count, rows, size, parts):
    rank_of(rank, count)
    assert list(ranks.micro_batches(rows, size)) == [(slice(first, stop), weight) for first, stop, weight in parts]


def test_ranks_take_turns_with_batches(rank_of):
    rank_of(1, 3)
    assert ranks.rank_batches(list("abcdefg")) == ["b", "e"]


def test_what_a_rank_gives_to_all_is_only_rows_that_count(rank_of, monkeypatch):
    """Rank 1 of 4 has row 0 of 2; rank 0 goes through the same row for nothing, and added twice it would be doubled."""
    monkeypatch.setattr(ranks, "all_reduce", lambda *tensors: None)  # the others would be added
    for rank, whole in ((1, [5.0, 0.0]), (0, [0.0, 0.0])):
        rank_of(rank, 4)
        assert ranks.all_gather(torch.tensor([5.0]), 2).tolist() == whole


def test_before_gpus_add_up_a_rank_that_has_ended_is_looked_for_between_cpus(rank_of, monkeypatch):
    called = []
    work = SimpleNamespace(wait=lambda: called.append("waited"))
    monkeypatch.setattr(ranks, "all_reduce_max", called.append)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda tensor, async_op: (called.append(tensor), work)[1])
    rank_of(0, 2)
    ranks.all_reduce("loss", "gradient")
    assert called == [0, "loss", "gradient", "waited", "waited"]


def test_without_torchrun_all_rows_are_ones_own_and_nothing_is_changed():
    values = torch.ones(3)
    assert ranks.rank_slice(7) == (slice(0, 7), 1) and ranks.rank_batches([1, 2]) == [1, 2]
    ranks.all_reduce(values)
    assert values.tolist() == ranks.all_gather(values, 3).tolist() == [1, 1, 1]
    assert ranks.all_gather_lists([1]) == [1] and ranks.all_reduce_max(15) == 15 and ranks.broadcast(int, "7") == 7


CLOSED = ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:80. "
          "This means that there was an error")


@pytest.mark.parametrize(("error", "reason"), [
    (RuntimeError(CLOSED), r"\(Connection closed by peer \[127.0.0.1\]:80\); call it again"),
    (torch.distributed.DistBackendError("NCCL communicator was aborted. Advice"), r"\(NCCL communicator was aborted\)"),
    (RuntimeError("[/pytorch/third_party/gloo/gloo/allreduce.cc:9] std::bad_alloc"), None),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    (errors.UserError("--lr: gloomy"), None)])
def test_only_errors_between_ranks_mean_that_another_has_ended(monkeypatch, error, reason):
    monkeypatch.setattr(ranks, "STORE", None)
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 1)]))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(ranks.dist, name, lambda *args, **more: None)
    with pytest.raises(errors.UserError if reason else type(error), match=reason) as found, ranks.joined():
        raise error
    assert (found.value is error) == (reason is None)


def test_each_rank_takes_the_gpu_of_its_number_and_there_must_be_one(rank_of, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    rank_of(1, 4)
    precision.claim(torch.device("cuda"))
    precision.claim(torch.device("cpu"))
    assert taken == [1]
    rank_of(2, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(errors.UserError, match=r"GPUs on this machine: 2; give --nproc-per-node=2, or --device cpu"):
        precision.pick_device("cuda", "fp32")
    with pytest.raises(errors.UserError, match="--device mps: there is one such device"):
        precision.claim(torch.device("mps"))
