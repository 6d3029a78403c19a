"""Disks that are full, short memory, numbers that are not finite, and what randomness depends on."""

import os
import resource
import sys
import time

import pytest
import torch

import reinforce
import reward
from support import checkpoint, runs
from tests.helpers import SMALL, call, finish, log_of, outcome, refusal, rows_of, small

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
        checkpoint.write(tmp_path, {})
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
        runs.launch(main)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "out of memory; in training try a smaller --micro-batch, in the evaluation a smaller --eval-batch-s" in said


def test_errors_of_the_code_itself_keep_their_traceback():
    for error in (NotImplementedError(), RuntimeError("mat1 and mat2 cannot be multiplied"), OSError("no number")):
        with pytest.raises(type(error)):
            runs.launch(lambda error=error: (_ for _ in ()).throw(error))


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SMALL)
def test_a_number_that_is_not_finite_keeps_the_checkpoint_before(world, whole, tmp_path, capsys, monkeypatch, script):
    """The gradient of step 5 becomes nan: no weight moves, and once it is mended the run goes on from 3 (DPO: 4)."""
    folder = tmp_path / "run"
    module, argv = sys.modules[script], small(world, script, folder)
    check = module.checked_grad_norm

    def breaking(step, values, policy, max_norm):
        if step == 5:
            next(policy.parameters()).grad[0, 0] = torch.nan
            before = [weight.detach().clone() for weight in policy.parameters()]
        try:
            return check(step, values, policy, max_norm)
        finally:
            assert step != 5 or all(map(torch.equal, before, policy.parameters()))

    monkeypatch.setattr(module, "checked_grad_norm", breaking)
    said = refusal(script, *argv, capsys=capsys)
    assert "step 5: the gradient's norm is nan; the weights were not touched" in said
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
    assert "step 1: the reward is nan; the weights were not touched; what was loaded, or a flag, is at fault" in said


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
    def disturbed(*args):
        torch.manual_seed(time.time_ns())
        return sample(*args)

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
        states = drawn[lr] = []
        monkeypatch.setattr(reinforce, "sample", lambda *args, states=states, **more: (
            states.append(args[3].get_state()), sample(*args, **more))[1])
        call("reinforce", *small(world, "reinforce", tmp_path / lr, "--lr", lr))
    assert len(drawn["1e-2"]) == 10 and all(map(torch.equal, *drawn.values()))
