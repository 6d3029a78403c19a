"""How much memory a run of reinforce.py or dpo.py needs, part by part, and whether that is so.

An estimate for the GPT-2 family, instantly, from sizes and lengths alone; with --measure the same models with random
weights take two real steps and an evaluation in a process of their own, and its peak stands beside the estimate.
Each moment of a run holds other parts; the largest moment counts. Left out: what CUDA itself takes (half a GB or so),
gaps between tensors, and for other models than GPT-2 the activations differ.

    python memory.py --policy gpt2-xl --device cuda                        # both scripts, fp32 and bf16
    python memory.py --policy gpt2 --script dpo --micro-batch 4 --measure
"""

import argparse
import ctypes
import multiprocessing
import os
import sys
import traceback
from typing import NamedTuple

from lab import bench
from support import runs

SIZES = {  # layers, width, heads
    "distilgpt2": (6, 768, 12), "gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
WORDS, CLASSIFIER = bench.FULL["words"], 66_955_010  # parameters of the DistilBERT
ROWS = {"reinforce": 32, "dpo": 16}  # the scripts' own --batch-size
GB = 1e9


class Work(NamedTuple):
    script: str
    policy: str
    precision: str
    device: str
    batch: int  # prompts or pairs a step
    micro: int  # of them in memory at a time
    prompt: int  # tokens
    completion: int  # tokens that the evaluation samples, and reinforce.py trains on
    longest: int  # tokens of prompt and completion in dpo.py: every pair is taken to be so long
    tested: int  # prompts a batch of the evaluation


def shape(policy):
    """A size's name -> what GPT2Config calls its layers, width and heads."""
    return dict(zip(("n_layer", "n_embd", "n_head"), SIZES[policy], strict=True))


def parameters(policy):
    """A size's name -> how many numbers the model has, counted on a device that holds none of them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return sum(weight.numel() for weight in GPT2LMHeadModel(GPT2Config(**shape(policy))).parameters())


def layer(work, rows, fed):
    """Bytes that a layer keeps for its backward: `rows` sequences of `fed` tokens.

    In units of the width, each token: two inputs of layer norms (fp32 in any case), and as inputs of matrix products
    2 norms, query, key and value, the attention's mixture, and 4 before and 4 after the activation: 14.
    """
    _, width, heads = SIZES[work.policy]
    half = work.precision == "bf16"
    kept = 2 * 4 * width + 14 * (2 if half else 4) * width
    if work.device == "cpu":  # plain attention keeps each head's probabilities; bf16 products take a rounded copy
        kept += (6 if half else 4) * heads * fed
    return rows * fed * kept


def moments(work, count):
    """A Work and its policy's number of parameters -> {moment: {part: bytes}} of what is in memory at once."""
    layers, width, _ = SIZES[work.policy]
    half, both, on_cpu = work.precision == "bf16", work.script == "reinforce", work.device == "cpu"
    size = 2 if half else 4  # bytes of a number that a matrix product yields
    # Autocast keeps copies of the policy's weights, not of the reference's: those cannot have a gradient.
    weights, copies = 4 * count, 2 * count if half else 0
    head = 4 * WORDS * width  # the last layer's, which is the embedding too: their two gradients meet at the very end
    grown = weights if work.micro < work.batch else 0  # gradients that are there when the last part begins
    # The loss of REINFORCE needs the reference's logits, too, and its loop holds both to the end of the part.
    rows, scored, ours = (work.micro, work.completion, 2) if both else (2 * work.micro, work.longest - work.prompt, 1)
    fed = work.prompt + scored - 1
    one, logits = layer(work, rows, fed), rows * scored * WORDS * size
    graph = {"activations": layers * one + 4 * width * rows * fed}
    tested = work.tested * work.completion * WORDS * size

    def pieces(bytes_of_logits, models):
        """What fast.LogpsAndKL computes at a time, in fp32: log p, log p - log q, and log q if there are two models."""
        return 4 * (1 + models) * min(bytes_of_logits // size, 2**20 if on_cpu else 2**26)

    def sampling(rows, logits=0):
        """A layer's keys and values are there twice as one is added; a draw takes two tensors of fp32."""
        return {"bf16 copies": copies, "logits": logits + 2 * 4 * rows * WORDS,
                "cache": rows * (work.prompt + work.completion) * 2 * width * size * (layers + 1)}

    held = {"weights": weights, "classifier": 4 * CLASSIFIER, "AdamW": 2 * weights}
    if both or on_cpu:  # dpo.py takes it off a GPU while it trains
        held["reference"] = weights
    found = {}
    if both:  # fast.CentredHead subtracts in fp32 (a head) before it rounds (half of one): here, the reference's
        found["sampling"] = {**held, **sampling(work.batch)}
        found["forward"] = {**held, "gradients": grown, "bf16 copies": copies + half * head * 3 // 2,
                            "activations": graph["activations"] + one, "logits": logits}
    else:  # here the policy's, whose rounded weights are among the copies
        found["forward"] = {**held, "gradients": grown, "bf16 copies": copies + half * head, **graph}
    found["loss's gradient"] = {**held, "gradients": grown, "bf16 copies": copies, **graph,
                                "logits": (1 + ours) * logits + pieces(logits, ours)}
    found["last layer's"] = {**held, "gradients": grown + head, "bf16 copies": copies, **graph,
                             "logits": (1 + 2 * both) * logits}
    found["first layer's"] = {**held, "gradients": weights + (2 if grown else 1) * head, "logits": 2 * both * logits}
    held = {**held, "AdamW": 0, "reference": weights}  # the evaluation: the logits of the batch before go one by one
    found["test samples"] = {**held, **sampling(work.tested, 2 * tested)}
    found["test forward"] = {**held, "activations": layer(work, work.tested, work.prompt + work.completion - 1),
                             "logits": 2 * tested}
    found["test KL"] = {**held, "bf16 copies": half * head // 2, "logits": 2 * tested + max(tested, pieces(tested, 2))}
    return found


# ---- the same, measured ------------------------------------------------------------------------------------


def measure(work, keep):
    """-> (bytes of training, bytes of the evaluation), peaks above what lay there before any model did.

    On a GPU: of PyTorch's tensors. On a CPU: of the process; keep: freed memory is kept for later tensors, as the
    scripts do, with the gaps between them; otherwise it goes at once, so what is measured is nearly the tensors alone.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, work, keep), daemon=True)
    process.start()
    theirs.close()
    peaks = bench.receive(pipe, f"{work.script} {work.policy}")
    process.join()
    return peaks


def child(pipe, work, keep):
    if keep:
        runs.keep_memory()
    elif sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: a tensor's memory goes with it, there are no gaps
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    try:
        pipe.send(peaks(work))
    except Exception:
        pipe.send(traceback.format_exc())


def peaks(work):
    """What measure() returns: two steps of the script's train(), and two batches of evaluate()."""
    import torch

    import dpo
    import reinforce
    import reward

    meter = bench.Turn(None, work.device)
    floor = meter.resident()
    run = bench.Stub(lambda: None, alpha=0.02, beta=0.1, advantage="reward", lr=1e-5,
                     batch_size=work.batch, micro_batch=work.micro)
    run.args.epochs, run.args.completion_len, run.args.eval_batch_size = 1, work.completion, work.tested
    policy, reference, *scorers = bench.ours({**bench.FULL, "policy": shape(work.policy)}, work.device, work.precision)
    tests = torch.randint(WORDS - 1, (2 * work.tested, work.prompt))
    if work.script == "reinforce":
        prompts = torch.randint(WORDS - 1, (2 * work.batch, work.prompt))
        reinforce.train(policy, reference, *scorers, prompts, tests, run)
    else:
        side = [1] * (work.longest - work.prompt)
        pairs = {"train": [dpo.Pair([1] * work.prompt, side, side)] * (2 * work.batch)}
        pairs["test"] = pairs["train"][: work.micro]
        logps = dpo.all_logps(reference, pairs["test"], work.micro, "reference")
        logps = {split: logps[:1].expand(len(rows), 2) for split, rows in pairs.items()}  # they are all the same
        reference.cpu()  # as the script does
        dpo.train(policy, logps, *scorers, pairs, tests, run)
    trained = meter.peak()
    meter.resident()  # the peak starts anew
    reward.evaluate(policy, reference.to(work.device), *scorers, tests, run)
    return trained - floor, meter.peak() - floor


# ---- the table ---------------------------------------------------------------------------------------------

PARTS = ("weights", "reference", "classifier", "gradients", "AdamW", "bf16 copies", "activations", "logits", "cache")


def report(work, count, measured=None):
    """-> lines: a table of the moments, what the run needs in all, and what was measured."""
    found = moments(work, count)
    lengths = f"pairs of {work.longest}" if work.script == "dpo" else f"{work.prompt} + {work.completion}"
    rows = f"batch {work.batch}, {work.micro} at a time, {lengths} tokens"
    lines = [f"{work.script}.py, {work.policy}, {count:,} parameters, {work.precision} on {work.device}, {rows}; GB",
             "", f"| moment | {' | '.join(PARTS)} | all |", "|---" * (len(PARTS) + 2) + "|"]
    for moment, parts in found.items():
        cells = " | ".join(f"{parts.get(part, 0) / GB:.2f}" for part in PARTS)
        lines.append(f"| {moment} | {cells} | {sum(parts.values()) / GB:.2f} |")
    totals = {moment: sum(parts.values()) for moment, parts in found.items()}
    tests = {moment: totals.pop(moment) for moment in ("test samples", "test forward", "test KL")}
    largest = {"training": max(totals, key=totals.get), "evaluation": max(tests, key=tests.get)}
    totals |= tests
    said = (f"{name} {totals[moment] / GB:.2f} ({moment})" for name, moment in largest.items())
    lines.append(f"\n{', '.join(said)}; on disk two checkpoints of {12 * count / GB:.2f} and the model's "
                 f"{4 * count / GB:.2f}")
    if measured:
        lines += [f"measured, {name}: {real / GB:.2f}; the estimate is {totals[moment] / real:.2f} of it"
                  for (name, moment), real in zip(largest.items(), measured, strict=True)]
    return lines


def main(argv=None):
    flags = runs.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--policy", choices=SIZES, default="distilgpt2", help="whose size (%(default)s)")
    add("--script", choices=ROWS, help="only this one (both)")
    add("--precision", choices=("fp32", "bf16"), help="only this one (both)")
    add("--device", choices=("cuda", "cpu"), default="cpu", help="where it would run (%(default)s)")
    add("--batch-size", type=runs.count, metavar="B", help="rows or pairs a step (32; DPO 16)")
    add("--micro-batch", type=runs.count, metavar="B", help="rows or pairs in memory at a time (the whole batch)")
    add("--prompt-len", type=runs.count, default=10, metavar="P", help="prompt tokens (%(default)s)")
    add("--completion-len", type=runs.count, default=20, metavar="N", help="sampled tokens (%(default)s)")
    add("--max-len", type=runs.count, default=128, help="tokens of each side of a pair (%(default)s)")
    tested = "prompts a batch of the evaluation (256 on cuda, else 64)"
    add("--eval-batch-size", type=runs.count, metavar="B", help=tested)
    add("--measure", choices=("run", "tensors"), nargs="?", const="run",
        help="take two steps, too, and tell the peak (run); tensors: on a CPU, without the gaps of kept memory")
    args = flags.parse_args(argv)
    if args.max_len <= args.prompt_len:
        raise runs.UserError(f"--max-len {args.max_len} leaves no token after --prompt-len {args.prompt_len}")
    count = parameters(args.policy)
    for script in [args.script] if args.script else ROWS:
        batch = args.batch_size or ROWS[script]
        for precision in [args.precision] if args.precision else ("fp32", "bf16"):
            work = Work(script, args.policy, precision, args.device, batch, min(args.micro_batch or batch, batch),
                        args.prompt_len, args.completion_len, args.max_len,
                        args.eval_batch_size or (256 if args.device == "cuda" else 64))
            measured = measure(work, args.measure == "run") if args.measure else None
            print("\n".join(report(work, count, measured)), end="\n\n", flush=True)


if __name__ == "__main__":
    runs.launch(main)
