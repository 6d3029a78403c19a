"""Runs that are cut off, and what must be there afterwards: the same metrics and weights, bit for bit.

KILLS=20 pytest -n 2 test_resume.py -k killed is the long version of the kill tests, three minutes.
"""

import copy
import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import dpo
from support import errors, files, runs
from tests.helpers import SMALL, call, change, finish, log_of, outcome, refusal, rows_of, small, start

KILLS = int(os.environ.get("KILLS", 2))  # of each algorithm
# ---- killed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SMALL)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(world, whole, tmp_path, script):
    expected, seconds = whole[script]
    moments = random.Random(script)
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        process = start(script, small(world, script, folder), folder)
        time.sleep(moments.uniform(0.1, seconds))
        process.kill()
        process.join()
        go_on(script, small(world, script, folder), folder)
        assert outcome(folder) == expected, kill


def die_at(number):
    """Kills the process at its number-th write, of whatever kind, and in the middle of those that have a middle."""
    left = [number]

    def dying(function, half=None):
        def instead(*args, **more):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return instead

    def half_a_checkpoint(content, file):
        save(content, file)
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)

    def half_a_line(run, name, row):
        with (run.folder / name).open("a") as file:
            file.write(files.to_json(row)[:20])

    def half_a_model(run, policy, tokenizer):
        policy.save_pretrained(run.folder / "model.unfinished")

    save = torch.save
    torch.save = dying(save, half_a_checkpoint)
    runs.Run.append = dying(runs.Run.append, half_a_line)
    runs.Run.save_model = dying(runs.Run.save_model, half_a_model)
    for name in ("replace", "fsync", "truncate", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("script", SMALL)
def test_killed_at_any_write_a_run_ends_as_if_it_had_not_been(world, whole, tmp_path, script):
    """Each write of a run is a moment of its own: KILLS of them, spread over all, or with KILLS=20 every one."""
    writes = random.Random(script).sample(range(1, 100), 3 * KILLS) if KILLS < 20 else range(1, 1000)
    killed = 0
    for number in writes:
        folder = tmp_path / str(number)
        code = finish(script, small(world, script, folder), folder, (die_at, number))
        if code == 0:  # there are not so many
            assert number > 60 and outcome(folder) == whole[script][0]
            if KILLS >= 20:
                break
            continue
        assert code == -signal.SIGKILL
        killed += 1
        go_on(script, small(world, script, folder), folder)
        assert outcome(folder) == whole[script][0], number
    assert killed >= KILLS


def go_on(script, argv, folder):
    """The same command again; after a kill between the result and the removal of its checkpoints, only the latter."""
    finished = (folder / "eval.json").exists()
    assert finish(script, argv, folder) == finished, log_of(folder)


@pytest.mark.parametrize("script", SMALL)
def test_killed_after_it_fell_back_a_run_falls_back_again_or_goes_on(world, whole, cut_off, script):
    """The broken checkpoint must not be what is left when the next one is being written, or be taken later."""
    for number in range(1, 40, 13 if KILLS < 20 else 1):
        folder, argv = cut_off(script, 8)
        content = (folder / "checkpoint.pt").read_bytes()
        (folder / "checkpoint.pt").write_bytes(content[:-1000])
        assert finish(script, argv, folder, (die_at, number)) == -signal.SIGKILL
        assert (folder / "checkpoint.pt").exists() or (folder / "checkpoint-before.pt").exists()
        assert finish(script, argv, folder) == 0
        assert log_of(folder).count("goes on after step") >= 1 and outcome(folder) == whole[script][0], number
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink()


def test_a_log_that_was_cut_shorter_is_never_cut_within_a_line(whole, cut_off, monkeypatch):
    """The newest checkpoint does not fit the log, the one before is taken, and then the log grows long again."""
    folder, argv = cut_off("reinforce", 8)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    monkeypatch.setitem(SMALL, "reinforce", [*SMALL["reinforce"], "--save-every", 1000])
    cut_off("reinforce", 8)
    call("reinforce", *argv)
    assert outcome(folder) == whole["reinforce"][0]


def test_everything_is_on_the_disk_before_it_gets_its_name(world, tmp_path, monkeypatch):
    """What a power cut could take: a file is flushed before its rename, the folder after it, and logs before all."""
    done = []
    for name in ("replace", "fsync"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, function=function: (done.append(noted(*args)), function(*args))[1])

    def noted(first, second=None):
        if second is None:
            first = os.readlink(f"/proc/self/fd/{first}")
        return tuple(os.path.basename(path) for path in (first, second) if path)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no way to tell a descriptor's file")
    call("reinforce", *small(world, "reinforce", tmp_path / "run"))
    renames = [i for i, names in enumerate(done) if len(names) == 2]
    assert {done[i][1] for i in renames} >= {"config.json", "checkpoint.pt", "model", "completions.jsonl", "eval.json"}
    for i in renames:
        source, target = done[i]
        if target != "checkpoint-before.pt" and source != target:
            assert (source,) in done[:i] and done[i + 1] == ("run",), target
        if source == "checkpoint.pt.unfinished":
            assert ("metrics.jsonl",) in done[i - 5 : i] and ("samples.jsonl",) in done[i - 5 : i]
    before = done[: done.index(("model.unfinished", "model"))]
    assert ("model.safetensors",) in before and ("tokenizer.json",) in before


INTERRUPTED = "interrupted; call it again: what is finished is kept, training goes on from its checkpoint"

# ---- stopped -----------------------------------------------------------------------------------------------


def stop_in_step(step, number, times=1):
    """Sends the process a signal in the middle of a step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    log = runs.Run.log

    def stopping(run, **row):
        if row.get("step") == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        log(run, **row)

    runs.Run.log = stopping


@pytest.mark.parametrize(("script", "number"), [("reinforce", signal.SIGINT), ("dpo", signal.SIGTERM)])
def test_stopped_by_ctrl_c_or_sigterm_a_run_finishes_its_step_and_goes_on(world, whole, tmp_path, script, number):
    folder = tmp_path / "run"
    argv = small(world, script, folder)
    assert finish(script, argv, folder, (stop_in_step, 5, number)) == 128 + number
    said = log_of(folder)
    assert "stopping after this step" in said and said.count("Traceback") == 0
    assert said.splitlines()[-1] == f"{script}.py: {INTERRUPTED}"
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl") if "step" in row] == [1, 2, 3, 4, 5]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert finish(script, argv, folder) == 0
    assert f"{folder}: goes on after step 5" in log_of(folder)
    assert outcome(folder) == whole[script][0]
    about = json.loads((folder / "config.json").read_text())
    assert [again["step"] for again in about["continued"]] == [5]


def test_a_run_that_goes_on_with_other_hardware_or_versions_says_so(cut_off, capsys, monkeypatch):
    folder, argv = cut_off("reinforce", 8)
    cut_off("reinforce", 8)
    assert "goes on after step 6\n" in capsys.readouterr().out
    monkeypatch.setattr(runs, "hardware", lambda device: "abacus, 10 threads")
    call("reinforce", *argv)
    expected = "goes on after step 6, with other hardware than before: last digits may differ\n"
    assert expected in capsys.readouterr().out
    continued = json.loads((folder / "config.json").read_text())["continued"]
    assert [again["hardware"] == "abacus, 10 threads" for again in continued] == [False, True]


def test_a_second_ctrl_c_stops_at_once(world, whole, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish("reinforce", argv, folder, (stop_in_step, 5, signal.SIGINT, 2)) == 130
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3  # of --save-every 3
    assert finish("reinforce", argv, folder) == 0
    assert outcome(folder) == whole["reinforce"][0]


def test_a_second_ctrl_c_while_the_checkpoint_is_written(world, whole, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish("reinforce", argv, folder, (stop_in_write, 5)) == 130
    assert "Traceback" not in log_of(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    assert finish("reinforce", argv, folder) == 0
    assert outcome(folder) == whole["reinforce"][0]


def stop_in_write(step):
    """Ctrl-C in a step, and again in the middle of the write that follows."""
    stop_in_step(step, signal.SIGINT)
    save = torch.save

    def saving(content, file):
        if content["step"] == step:
            write = file.write
            file = SimpleNamespace(write=lambda data: (os.kill(os.getpid(), signal.SIGINT), write(data))[1])
        save(content, file)

    torch.save = saving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_its_evaluation_a_run_says_so_and_goes_on(world, whole, tmp_path, number):
    folder = tmp_path / "run"
    argv = small(world, "dpo", folder)
    assert finish("dpo", argv, folder, (stop_in_evaluation, number)) == 128 + number
    assert log_of(folder).splitlines()[-1] == f"dpo.py: {INTERRUPTED}"
    assert finish("dpo", argv, folder) == 0
    assert "goes on after step 12" in log_of(folder) and outcome(folder) == whole["dpo"][0]


def stop_in_evaluation(number):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs.Run.completions = lambda run, rows: os.kill(os.getpid(), number)


def test_a_signal_after_the_last_step_is_not_lost(world, whole, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "dpo", folder)
    assert finish("dpo", argv, folder, (stop_after_the_epoch,)) == 143
    assert finish("dpo", argv, folder) == 0
    assert outcome(folder) == whole["dpo"][0]


def stop_after_the_epoch():
    write = runs.Run.checkpoint

    def writing(run, step, parts):
        write(run, step, parts)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    runs.Run.checkpoint = writing


def test_ctrl_c_when_the_terminal_is_gone_still_writes_a_checkpoint(world, tmp_path):
    """As in `python ... 2>&1 | tee log`, where tee dies of the same Ctrl-C."""
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish("reinforce", argv, folder, (stop_without_terminal, 5)) != 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5


def stop_without_terminal(step):
    stop_in_step(step, signal.SIGINT)
    log = runs.Run.log

    def logging(run, **row):
        if row.get("step") == step:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
        log(run, **row)

    runs.Run.log = logging


@pytest.fixture
def cut_off(world, tmp_path, monkeypatch):
    """A function: script, step -> the folder of a run that failed in that step, and its command line."""

    def cut(script, step, folder=tmp_path / "run"):
        def failing(run, **row):
            if row.get("step") == step:
                raise errors.UserError("cut off")
            log(run, **row)

        log, argv = runs.Run.log, small(world, script, folder)
        with monkeypatch.context() as patch, pytest.raises(errors.UserError, match="cut off"):
            patch.setattr(runs.Run, "log", failing)
            call(script, *argv)
        runs.unlock(folder)  # as if this process had ended
        return folder, argv

    return cut


@pytest.mark.parametrize("script", SMALL)
def test_in_bf16_a_run_goes_on_as_exactly(world, cut_off, tmp_path, monkeypatch, script):
    call(script, *small(world, script, tmp_path / "whole", "--precision", "bf16"))
    monkeypatch.setitem(SMALL, script, [*SMALL[script], "--precision", "bf16"])
    folder, argv = cut_off(script, 5)
    call(script, *argv)
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("damage", ["cut", "changed", "the log"])
def test_a_broken_checkpoint_is_left_out_aloud_and_the_one_before_taken(whole, cut_off, capsys, script, damage):
    folder, argv = cut_off(script, 8)  # checkpoints of steps 3 and 6; DPO: 3, 4 (its epoch's end) and 6
    paths = [folder / "checkpoint.pt", folder / "checkpoint-before.pt"]
    if damage == "the log":  # shorter than it was for the newest
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    else:
        content = bytearray(paths[0].read_bytes())
        content[len(content) // 2] ^= 1
        paths[0].write_bytes(content[: len(content) // 3] if damage == "cut" else content)
    capsys.readouterr()
    call(script, *argv)
    said = capsys.readouterr()
    assert [f"{path} is broken and left out" in said.err for path in paths] == [True, False]
    before = {"reinforce": 3, "dpo": 4}[script]
    assert f"goes on after step {before}" in said.out
    assert outcome(folder) == whole[script][0]


def test_without_a_whole_checkpoint_nothing_is_removed_unasked(whole, cut_off, capsys, monkeypatch):
    folder, argv = cut_off("reinforce", 8)
    with monkeypatch.context() as patch:  # short memory says nothing about a checkpoint
        patch.setattr(torch, "load", lambda *_, **__: bytearray(2**62))
        assert "out of memory; try a smaller --eval-batch-size" in refusal("reinforce", *argv, capsys=capsys)
    for path in folder.glob("*.pt"):
        path.write_bytes(b"not a checkpoint")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    said = refusal("reinforce", *argv, capsys=capsys)
    assert "its run was cut off and none of its checkpoints is whole; to begin anew, give --overwrite or" in said
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    call("reinforce", *argv, "--overwrite")
    assert "goes on" not in capsys.readouterr().out and outcome(folder) == whole["reinforce"][0]


def test_a_checkpoint_cannot_run_code(cut_off, tmp_path, capsys):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    folder, argv = cut_off("reinforce", 8)
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**content, "parts": Malice()}, folder / "checkpoint.pt")
    call("reinforce", *argv)
    assert "checkpoint.pt is broken and left out (Weights only load failed" in capsys.readouterr().err
    assert not (tmp_path / "was here").exists()


def test_other_settings_do_not_go_on(world, cut_off, tmp_path, capsys, monkeypatch):
    folder, argv = cut_off("reinforce", 5)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    said = refusal("reinforce", *argv, "--alpha", 0.2, "--lr", 0.5, capsys=capsys)
    assert "its run was cut off at step 3, but now --" in said and "To go on, undo that; to begin anew, give" in said
    assert "--lr is 0.5, was 0.01" in said and "--alpha is 0.2, was 0.1" in said and "--seed" not in said
    monkeypatch.setattr(runs, "CODE", tuple(name for name in runs.CODE if name != "reward.py"))
    assert "reward.py has changed" in refusal("reinforce", *argv, capsys=capsys)
    monkeypatch.undo()
    monkeypatch.setattr(runs, "pick_device", lambda *_: (torch.device("cpu"), "bf16"))
    assert "--precision is bf16, was fp32" in refusal("reinforce", *argv, capsys=capsys)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in folder.iterdir()}  # all this has touched nothing
    call("reinforce", *argv, "--alpha", 0.2, "--overwrite")
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == list(range(1, 11))
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["alpha"] == 0.2 and "continued" not in config


def test_flags_that_change_no_number_of_the_training_may_change_on_the_way(whole, cut_off, capsys):
    folder, argv = cut_off("dpo", 6)
    call("dpo", *argv, "--save-every", 1000, "--eval-batch-size", 3, "--overwrite")  # nothing finished is overwritten
    assert "goes on after step 4" in capsys.readouterr().out
    found, expected = outcome(folder), whole["dpo"][0]
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    assert found["model/model.safetensors"] == expected["model/model.safetensors"]


@pytest.mark.parametrize(("script", "data"), [("reinforce", "prompts"), ("dpo", "pairs")])
def test_other_inputs_under_the_same_name_do_not_go_on(world, cut_off, tmp_path, capsys, monkeypatch, script, data):
    other = tmp_path / "world"
    shutil.copytree(world, other)
    names = ["--policy", other / "policy", "--reference", world / "policy", f"--{data}", other / data]
    monkeypatch.setitem(SMALL, script, [*SMALL[script], *names])
    folder, argv = cut_off(script, 5)
    text = (other / data / "train.jsonl").read_text()
    (other / data / "train.jsonl").write_text(text.replace("the", "The"))
    change(other / "policy" / "config.json", n_layer=1)
    said = refusal(script, *argv, capsys=capsys)
    assert f"but now policy has changed, {data} has changed. To go on, undo that; to begin" in said
    call(script, *argv, "--overwrite")
    assert "goes on" not in capsys.readouterr().out and (folder / "eval.json").exists()


def test_fingerprints_tell_apart_what_differs():
    weights = [torch.nn.Linear(2, 2) for _ in range(2)]
    pairs = [[dpo.Pair([1], [2], [3])], [dpo.Pair([1], [2, 3], [])]]
    values = [b"a", b"b", torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), *weights, *pairs]
    assert len({files.fingerprint(value) for value in values}) == len(values)
    assert files.fingerprint(weights[0]) == files.fingerprint(copy.deepcopy(weights[0]))


def test_a_finished_run_is_not_gone_on_from(whole, cut_off, capsys):
    """Killed after eval.json and before its checkpoint was removed: finished, and --overwrite begins anew."""
    folder, argv = cut_off("reinforce", 5)
    kept = (folder / "checkpoint.pt").read_bytes()
    call("reinforce", *argv)
    (folder / "checkpoint.pt").write_bytes(kept)
    assert "holds a finished run" in refusal("reinforce", *argv, capsys=capsys)
    assert not (folder / "checkpoint.pt").exists()
    (folder / "checkpoint.pt").write_bytes(kept)
    call("reinforce", *argv, "--overwrite")
    assert "goes on" not in capsys.readouterr().out and outcome(folder) == whole["reinforce"][0]


OLD_FILES = ("common.py", "families.py", "fast.py", "ranks.py", "reward.py", "reinforce.py")


def test_a_checkpoint_of_the_code_as_it_was_before_files_moved_is_refused_in_a_line(whole, cut_off, capsys):
    folder, argv = cut_off("reinforce", 5)
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {name: value for name, value in content["settings"].items() if not name.endswith(".py")}
    content["settings"] = {**{name: 1234 for name in OLD_FILES}, **kept}
    torch.save(content, folder / "checkpoint.pt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    said = refusal("reinforce", *argv, capsys=capsys)
    assert "its run was cut off at step 3, but now common.py has changed, families.py has changed, fast.py has" in said
    assert "support/loading.py has changed, " in said
    assert " has changed. To go on, undo that; to begin anew, give --overwrite or another folder" in said
    assert "--" not in said.partition("but now")[2].partition(". To go on")[0]  # all flags are the same
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    call("reinforce", *argv, "--overwrite")
    assert "goes on" not in capsys.readouterr().out and outcome(folder) == whole["reinforce"][0]


def test_a_finished_run_of_the_code_as_it_was_before_files_moved_is_only_replaced_if_asked(
        world, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    about = {"script": "reinforce.py", "flags": {"out": str(folder), "micro_batch": None, "alpha": 0.1},
             "versions": {"torch": "2.9.0"}, "device": "cpu", "hardware": "abacus, 2 threads", "precision": "fp32",
             "commit": None}
    rows = [{"step": 1, "loss": 1.0, "reward": 0.5, "kl": 0.0, "grad_norm": 1.0, "tokens_per_second": 9.0}]
    shutil.copytree(world / "policy", folder / "model")
    for name, text in (("config.json", about), ("metrics.jsonl", rows[0]), ("eval.json", {"reward": 0.5})):
        (folder / name).write_text(json.dumps(text))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = refusal("reinforce", *argv, capsys=capsys)
    assert f"--out {folder} holds a finished run; give another folder or --overwrite" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    call("reinforce", *argv, "--overwrite")
    assert outcome(folder) == whole["reinforce"][0]


def test_two_processes_do_not_write_into_one_folder(world, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    process = start("reinforce", argv, folder, (wait_in_step, 2))
    while not (folder / "metrics.jsonl").exists():
        assert process.is_alive(), log_of(folder)
        time.sleep(0.02)
    said = refusal("reinforce", *argv, capsys=capsys)
    assert f"--out {folder}: another process is at work in it; wait, or give another folder" in said
    process.kill()
    process.join()
    call("reinforce", *argv)  # the lock went with its process


def wait_in_step(step):
    log = runs.Run.log

    def waiting(run, **row):
        if row.get("step") == step:
            time.sleep(60)
        log(run, **row)

    runs.Run.log = waiting
