"""Disks that are full, short memory, numbers that are not finite, and what randomness depends on."""

import io
import os
import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import reinforce
import reward
from support import checkpoint, command, errors, progress, runs
from tests.helpers import SMALL, call, finish, flags, log_of, outcome, refusal, rows_of, small

# ---- faults ------------------------------------------------------------------------------------------------


def largest_file(size):
    """As on a disk that is full: no file of the process can become larger than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = [("reinforce", 300), ("reinforce", 100_000), ("dpo", 1000), ("dpo", 100_000)]


@pytest.mark.parametrize(("script", "size"), FULL)
def test_a_full_disk_stops_the_run_in_a_line_and_the_same_command_goes_on(world, whole, tmp_path, script, size):
    """300 bytes: no config.json; 1000: the log; 100,000: no checkpoint."""
    folder = tmp_path / "run"
    argv = small(world, script, folder)
    assert finish(script, argv, folder, (largest_file, size)) == 1
    said = log_of(folder)
    assert f"{script}.py: error: --out {folder} cannot be written: File too large" in said.splitlines()[-1]
    assert "Traceback" not in said and not (folder / "eval.json").exists()
    assert finish(script, argv, folder) == 0, log_of(folder)
    assert outcome(folder) == whole[script][0]


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_pytorch_says_of_a_write_that_failed_is_not_the_cause(tmp_path, monkeypatch, cause):
    def failing(content, file):
        try:
            raise cause
        except BaseException:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4672 vs 4566")  # noqa: B904

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(cause)) as found:
        checkpoint.save_checkpoint(tmp_path, {})
    assert found.value is cause and not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_checkpoint_before(world, whole, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "reinforce", folder)
    assert finish("reinforce", argv, folder, (full_from_step, 7)) == 1
    assert "cannot be written: File too large" in log_of(folder).splitlines()[-1]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6
    assert finish("reinforce", argv, folder) == 0
    assert "goes on after step 6" in log_of(folder) and outcome(folder) == whole["reinforce"][0]


def full_from_step(step):
    save = torch.save

    def saving(content, file):
        if content["step"] >= step:
            largest_file(100_000)
        save(content, file)

    torch.save = saving


def test_a_disk_that_fails_while_the_model_is_saved(world, whole, tmp_path):
    folder = tmp_path / "run"
    argv = small(world, "dpo", folder)
    assert finish("dpo", argv, folder, (full_before_the_model,)) == 1
    assert "cannot be written: " in log_of(folder).splitlines()[-1] and not (folder / "model").exists()
    assert finish("dpo", argv, folder) == 0
    assert "goes on after step 12" in log_of(folder) and outcome(folder) == whole["dpo"][0]


def full_before_the_model():
    save = runs.Run.save_model

    def saving(*args):
        largest_file(50_000)
        save(*args)

    runs.Run.save_model = saving


def test_a_disk_that_fails_while_the_tokenizer_is_saved(world, tmp_path, capsys, monkeypatch):
    """The tokenizers library knows only Exception."""
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    said = refusal("reinforce", *small(world, "reinforce", tmp_path / "run"), capsys=capsys)
    assert "cannot be written: No space left on device (os error 28); what is there is kept" in said


def test_a_folder_without_permission_is_refused_before_anything_is_loaded(world, tmp_path, capsys, monkeypatch):
    """As for any user but root, whom a test may run as: no one may write there."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    said = refusal("reinforce", *small(world, "reinforce", tmp_path / "a" / "b"), "--policy", "/nowhere", capsys=capsys)
    assert f"--out {tmp_path}/a/b cannot be written: no permission in {tmp_path}" in said


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 8"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), MemoryError(), MemoryError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    RuntimeError("could not create a primitive"),
])
def test_out_of_memory_says_which_flag_helps(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command.launch(main)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "out of memory; try a smaller --eval-batch-size, in dpo.py --micro-batch; a training run goes on w" in said


def test_numbers_that_are_not_finite_end_in_a_line(capsys):
    def main():
        raise FloatingPointError("step 7: loss is nan; try\na lower --lr")

    with pytest.raises(SystemExit) as stopped:
        command.launch(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.endswith(": error: step 7: loss is nan; try a lower --lr\n")


def test_errors_of_the_code_itself_keep_their_traceback():
    for error in (NotImplementedError(), RuntimeError("mat1 and mat2 cannot be multiplied"), OSError("no number")):
        with pytest.raises(type(error)):
            command.launch(lambda error=error: (_ for _ in ()).throw(error))


# ---- what a long loop shows --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds", [-1, 60])
def test_without_a_terminal_there_is_no_bar_but_a_line_a_minute(capsys, monkeypatch, seconds):
    monkeypatch.setattr(progress, "MINUTE", seconds)  # each step takes longer than -1, none takes 60
    bar = progress.Bar(["a", "b"], "epoch 2", "step", before=3)
    for _ in bar:
        bar.show(reward=0.123456, kl=12)
    said = capsys.readouterr()
    lines = ["epoch 2: 4 of 5, reward 0.1235, kl 12; 0 minutes left",
             "epoch 2: 5 of 5, reward 0.1235, kl 12; 0 minutes left"]
    assert said.err == "" and said.out.splitlines() == (lines if seconds < 0 else [])


def test_the_minutes_left_are_those_that_as_many_steps_took(capsys, monkeypatch):
    """Two steps of 90 s each are done, four are left: 6 minutes. Between two lines lies more than a minute."""
    clock = iter([0, 90, 180, 200, 220, 250, 270])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert list(progress.Bar(range(6), "epoch 1")) == list(range(6))
    assert [line.partition(";")[2] for line in capsys.readouterr().out.splitlines()] == [
        " 8 minutes left", " 6 minutes left", " 1 minutes left"]  # 5 * 90 s = 7.5, 4 * 90 s, 1 * 250 s / 5 = 0.8


@pytest.mark.parametrize("script", SMALL)
def test_on_a_terminal_a_run_shows_a_bar_with_its_first_two_metrics(world, tmp_path, capsys, monkeypatch, script):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "MINUTE", -1)  # the lines are for others
    call(script, *small(world, script, tmp_path / "run"))
    said = terminal.getvalue()
    assert "epoch 1: 100%" in said and "evaluate: 100%" in said and "minutes left" not in capsys.readouterr().out
    for name in {"reinforce": ("reward", "kl"), "dpo": ("accuracy", "loss")}[script]:
        assert f", {name}=" in said


def test_an_error_does_not_stand_behind_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.Bar([1, 2], "epoch 1")
    with pytest.raises(errors.UserError):
        for _ in bar:
            raise errors.UserError("cut off")
    assert "0/2" in sys.stderr.getvalue() and sys.stderr.getvalue().endswith("\n")


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SMALL)
def test_a_number_that_is_not_finite_keeps_the_checkpoint_before(world, whole, tmp_path, capsys, monkeypatch, script):
    """The gradient of step 5 becomes nan: no weight moves, and once it is mended the run goes on from 3 (DPO: 4)."""
    folder = tmp_path / "run"
    module, argv = sys.modules[script], small(world, script, folder)
    update = module.update

    def breaking(policy, optimizer, step, *args, **more):
        if step == 5:
            next(policy.parameters()).grad[0, 0] = torch.nan
            before = [weight.detach().clone() for weight in policy.parameters()]
        try:
            return update(policy, optimizer, step, *args, **more)
        finally:
            assert step != 5 or all(map(torch.equal, before, policy.parameters()))

    monkeypatch.setattr(module, "update", breaking)
    said = refusal(script, *argv, capsys=capsys)
    assert "error: step 5: grad_norm is nan; the weights were not touched; try a lower --lr or --max-" in said
    kept = {"reinforce": 3, "dpo": 4}[script]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == kept
    monkeypatch.undo()
    call(script, *argv)
    assert f"goes on after step {kept}" in capsys.readouterr().out and outcome(folder) == whole[script][0]


def test_a_classifier_that_gives_nan_is_named(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward, "positivity", lambda scorer, texts: torch.full((len(texts),), torch.nan))
    said = refusal("dpo", *small(world, "dpo", tmp_path / "run"), capsys=capsys)
    assert "step 0: reward is nan; what was loaded is broken" in said
    monkeypatch.undo()
    monkeypatch.setattr(reinforce, "positivity", lambda scorer, texts: torch.full((len(texts),), torch.nan))
    said = refusal("reinforce", *small(world, "reinforce", tmp_path / "other"), capsys=capsys)
    assert "error: step 1: reward is nan; the weights were not touched; look at the flags and the models" in said


def test_an_evaluation_that_gives_nan_ends_in_a_line_and_writes_no_nan(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward, "positivity", lambda scorer, texts: torch.full((len(texts),), torch.nan))
    said = refusal("reward", *flags(world, "reward", tmp_path / "run"), capsys=capsys)
    assert said.endswith("error: the test reward is nan, the KL 0.0: the policy is broken; try a lower --lr")
    assert not (tmp_path / "run" / "completions.jsonl").exists() and not (tmp_path / "run" / "eval.json").exists()


@pytest.mark.parametrize("script", SMALL)
def test_max_grad_norm_is_used_and_the_norm_is_logged_as_it_was(world, whole, tmp_path, script):
    argv = small(world, script, tmp_path / "run", "--max-grad-norm", 1e-3)
    call(script, *argv)
    plain, shortened = ([row for row in rows if "step" in row] for rows in
                        (whole[script][0]["metrics.jsonl"], rows_of(tmp_path / "run" / "metrics.jsonl")))
    assert shortened[0]["grad_norm"] == plain[0]["grad_norm"] > 1e-3
    assert shortened[-1]["loss"] != plain[-1]["loss"]


# ---- randomness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SMALL)
def test_training_depends_on_seed_and_step_and_on_nothing_drawn_elsewhere(world, whole, tmp_path, monkeypatch, script):
    """Looks at samples after every step, tests fewer prompts, and draws from PyTorch's own generator in between."""
    def disturbed(*args, **more):
        torch.manual_seed(time.time_ns())
        return sample(*args, **more)

    sample = reward.sample
    monkeypatch.setattr(sys.modules[script], "SAMPLE_EVERY", 1)
    monkeypatch.setattr(reward, "sample", disturbed)  # of the evaluation and of the looks
    call(script, *small(world, script, tmp_path / "run", "--eval-batch-size", 2))
    assert len(rows_of(tmp_path / "run" / "samples.jsonl")) > 50
    found, expected = outcome(tmp_path / "run"), whole[script][0]
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    assert found["model/model.safetensors"] == expected["model/model.safetensors"]


def test_the_same_noise_at_the_same_step_whatever_was_sampled_before(world, tmp_path, monkeypatch):
    """A policy that moves and one that does not draw their texts from the same numbers in every step."""
    drawn, sample = {}, reinforce.sample
    for lr in ("1e-2", "1e-30"):
        numbers = drawn[lr] = []
        monkeypatch.setattr(reinforce, "sample", lambda policy, prompts, uniform, numbers=numbers: (
            numbers.append(uniform), sample(policy, prompts, uniform))[1])
        call("reinforce", *small(world, "reinforce", tmp_path / lr, "--lr", lr))
    assert len(drawn["1e-2"]) == 10 and all(map(torch.equal, *drawn.values()))
