"""memory.py: its counts and parts against known and hand-computed ones, and its activations against PyTorch's."""

import pytest
import torch
from transformers import GPT2LMHeadModel

import common
import dpo
import reinforce
import reward
from lab import bench, memory
from support import fast, runs

TINY = bench.TINY["policy"]


def work(script="dpo", **other):
    values = {"policy": "gpt2", "precision": "fp32", "device": "cpu", "batch": 16, "micro": 16, "prompt": 28}
    return memory.Work(script, **{**values, "completion": 20, "longest": 128, "tested": 64, **other})


@pytest.mark.parametrize("policy, count", [
    ("distilgpt2", 81_912_576), ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200),
])
def test_sizes_are_those_of_the_published_models(policy, count):
    assert memory.parameters(policy) == count


def test_parts_of_dpo_are_those_done_by_hand():
    parts = memory.moments(work(micro=1), 124_439_808)["last layer's"]
    assert parts["weights"] == parts["reference"] == 497_759_232  # 4 bytes a number
    assert parts["AdamW"] == 995_518_464  # two averages
    # A pair is 2 rows, so the logits are 2 * 100 * 50,257 * 4 bytes, and here only their gradient is left.
    assert parts["logits"] == 40_205_600
    # 2 * 127 tokens are fed. 64 bytes * 768 wide + 4 * 12 heads * 127 each; 12 layers; and the last norm's input.
    assert parts["activations"] == 12 * 254 * (49_152 + 6_096) + 254 * 768 * 4
    # All gradients, since this is not the first part, and the last layer's once more: 50,257 * 768 * 4 bytes.
    assert parts["gradients"] == 497_759_232 + 154_389_504


def test_a_gpu_holds_no_reference_while_dpo_trains():
    for script, device, held in (("dpo", "cuda", 0), ("dpo", "cpu", 497_759_232), ("reinforce", "cuda", 497_759_232)):
        found = memory.moments(work(script, device=device), 124_439_808)
        there = {moment: parts.get("reference", 0) for moment, parts in found.items()}
        assert there.pop("test samples") == there.pop("test forward") == there.pop("test KL") == 497_759_232
        assert set(there.values()) == {held}, (script, device)


def test_parts_of_reinforce_in_bf16_are_those_done_by_hand():
    found = memory.moments(work("reinforce", precision="bf16", batch=32, micro=32), 124_439_808)
    assert "gradients" not in found["sampling"]
    assert found["sampling"]["bf16 copies"] == 248_879_616  # 2 bytes a number, of the policy only
    assert found["sampling"]["cache"] == 32 * 48 * 2 * 768 * 2 * 13  # keys and values of 12 layers, one of them twice
    assert found["forward"]["gradients"] == 0  # the batch is one part
    # The reference's last layer: 50,257 * 768 numbers, in fp32 and rounded; the policy's logits, 2 bytes each.
    assert found["forward"]["bf16 copies"] == 248_879_616 + 231_584_256
    assert found["forward"]["logits"] == 64_328_960
    assert found["loss's gradient"]["logits"] == 3 * 64_328_960 + 3 * 4 * 2**20  # and pieces of 4 MB


def test_parts_of_the_evaluation_are_those_done_by_hand():
    """64 rows' logits are 64 * 20 * 50,257 * 4 bytes; of the batch before, the reference's are there to the end."""
    found = memory.moments(work(), 124_439_808)
    logits = 257_315_840
    assert found["test samples"]["logits"] == 2 * logits + 2 * 64 * 50_257 * 4  # and what a draw takes
    assert found["test KL"]["logits"] == 3 * logits
    for moment in ("test samples", "test forward", "test KL"):
        assert "gradients" not in found[moment] and not found[moment]["AdamW"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_keeps_what_pytorch_saves_for_its_backward(device, precision, monkeypatch):
    """"cuda" is the fused attention, as transformers has it by default: here on the CPU. bf16's weights are not its."""
    monkeypatch.setitem(memory.SIZES, "gpt2", (1, 64, 2))
    size = {**bench.TINY, "policy": {**TINY, "n_embd": 64}}
    policy, saved = fast.prepare(bench.new_models(size)[0], precision), {}
    if device == "cuda":
        policy.set_attn_implementation("sdpa")
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    shapes = {weight.shape for weight in policy.parameters() if weight.dim() == 2}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes and tensor.shape[::-1] not in shapes:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = common.completion_logits(policy, torch.randint(999, (8, 41)), 2)
    assert logits.shape == (8, 2, 1000)
    here = work(device=device, precision=precision)
    assert memory.layer(here, 8, 40) + 4 * 64 * 8 * 40 == pytest.approx(sum(saved.values()), rel=0.03)


@pytest.mark.parametrize("script", memory.ROWS)
def test_two_steps_and_an_evaluation_are_measured(script, monkeypatch):
    """And what the estimate says of gradients and of the reference is so."""
    monkeypatch.setattr(bench, "FULL", bench.TINY)
    monkeypatch.setattr(memory, "WORDS", bench.TINY["words"])
    monkeypatch.setattr(memory, "shape", lambda policy: TINY)
    seen = []

    def watch(where, name, note):
        function = getattr(where, name)

        def watched(*args, **more):
            seen.append((name, note(args)))
            return function(*args, **more)

        monkeypatch.setattr(where, name, watched)

    def gradients(args):
        return any(weight.grad is not None for weight in args[0].parameters())

    watch(reinforce, "sample", gradients)
    watch(reward, "evaluate", gradients)
    watch(dpo, "train", gradients)
    watch(GPT2LMHeadModel, "cpu", lambda args: any(weight.requires_grad for weight in args[0].parameters()))
    here = work(script, batch=4, micro=2, prompt=4, completion=5, longest=12, tested=3)
    trained, tested = memory.peaks(here)
    assert trained > 0 and tested > 0
    before = [("sample", False)] * 2 if script == "reinforce" else [("cpu", False), ("train", False)]
    assert seen == [*before, ("evaluate", False)]


def test_the_table_says_what_was_measured_beside_it(monkeypatch, capsys):
    monkeypatch.setattr(memory, "measure", lambda work, keep: (2 * memory.GB, memory.GB if keep else 0.5 * memory.GB))
    memory.main(["--script", "dpo", "--precision", "bf16", "--measure"])
    said = capsys.readouterr().out
    assert said.startswith("dpo.py, distilgpt2, 81,912,576 parameters, bf16 on cpu, batch 16, 16 at a time")
    assert "measured, training: 2.00; the estimate is 1.71 of it" in said
    assert "measured, evaluation: 1.00" in said


@pytest.mark.parametrize("flags, message", [
    (["--policy", "gpt3"], "invalid choice: 'gpt3'"),
    (["--micro-batch", "0"], "0 is not a number from 1 up"),
    (["--max-len", "10"], "--max-len 10 leaves no token after --prompt-len 10"),
])
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        runs.launch(lambda: memory.main(flags))
    said = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and message in said and said.count("\n") == 1
