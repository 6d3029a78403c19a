"""Run folders and command lines: what keeps results safe, out of the lessons' way.

A run is a folder of plain text: config.json first, a line of metrics.jsonl for each step, eval.json last.
Whoever finds an eval.json finds a finished run; in an unfinished one checkpoint.py's files say where it goes on.
Plain Python: importing this file loads no torch.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from support.files import commit, fingerprint, flush, hardware, plain, to_json, versions, write_whole

COURSE = {  # the names that the course uses on the model hub
    "policy": "distilgpt2",
    "reward_model": "omidroshani/imdb-sentiment-analysis",
    "prompts": "stanfordnlp/imdb",
    "pairs": "hallisky/synthetic-imdb-movie-reviews-parallel",
}
HOME = Path(__file__).resolve().parent.parent
LOGS = ("metrics.jsonl", "samples.jsonl")  # they grow during training; all other files are written whole
# What training depends on, besides the script.
CODE = ("common.py", "reward.py", "support/families.py", "support/fast.py", "support/ranks.py")
FREE = ("out", "overwrite", "save_every", "micro_batch", "eval_batch_size")  # flags that may change when a run goes on
AGAIN = "call it again: what is finished is kept, training goes on from its checkpoint"
SUMMARY = ("reward", "reward_se", "n", "kl", "distinct_2", "test_loss", "test_accuracy")  # said at a run's end


class UserError(Exception):
    """Something that the caller can put right. Its message is one line: what is wrong and what to do."""


def launch(main):
    """Runs a script's main(). What a user can cause becomes one line on stderr and a non-zero exit code."""
    keep_memory()
    name = Path(sys.argv[0]).name
    ranks = importlib.import_module("support.ranks") if torchrun() else None  # it loads torch
    try:
        with ranks.joined() if ranks else contextlib.nullcontext():
            signal.signal(signal.SIGTERM, terminate)
            return main()
    except UserError as error:
        message, code = f"{name}: error: {error}", 1
    except KeyboardInterrupt as error:
        code = 128 + (error.args[0] if error.args else signal.SIGINT)
        why = ", by you or because another rank has ended" if ranks else ""  # torchrun stops the others with SIGTERM
        message = f"{name}: interrupted{why}; {AGAIN}"
    except OSError as error:
        if not error.strerror:
            raise
        message, code = f"{name}: error: {error.filename or 'a file'}: {error.strerror}", 1
    except Exception as error:
        if not out_of_memory(error):
            raise
        advice = "in training try a smaller --micro-batch, in the evaluation a smaller --eval-batch-size"
        message, code = f"{name}: error: out of memory; {advice}; a training run goes on from its checkpoint", 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until all is said
    if not ranks or ranks.first_to_fail():
        end = "\n" * bool(rank())  # rank 0's progress bar may be there; one's own is gone and has ended its line
        print(end + plain(message), file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)


def torchrun():
    """True in the processes that torchrun has started (ranks.py)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    """This process's number; without torchrun 0."""
    return int(os.environ["RANK"]) if torchrun() else 0


def by_rank_0(method):
    """A method that writes: on the other ranks nothing happens."""

    @functools.wraps(method)
    def instead(*args, **more):
        return method(*args, **more) if rank() == 0 else None

    return instead


def terminate(number, frame):
    raise KeyboardInterrupt(number)


def out_of_memory(error):
    """True if that is what it says, in the words of Python, PyTorch, CUDA or oneDNN."""
    said = "out of memory|n[o']t (allocate|enough) memory|bad_alloc|ALLOC_FAILED|create a primitive"
    return isinstance(error, MemoryError) or bool(re.search(said, str(error), re.IGNORECASE))


def keep_memory():
    """Tells the C library (glibc's, on Linux) to keep freed memory for the next tensor.

    By default each tensor above some MB is new memory, which the kernel clears page by page, and which is handed back:
    a tenth of a REINFORCE step. The tensors of a step are those of the last, so what is kept is used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor lies outside the heap ...
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... which gives no less than 2 GB back


# ---- flags -------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, plain(f"{self.prog}: error: {message} (--help lists the flags)") + "\n")


def number(kind, low, above=False):
    """A parser of numbers from `low` up (`above`: greater than `low`)."""

    def parse(text):
        value = kind(text)  # argparse reports a ValueError as "invalid ... value"
        if not (low < value if above else low <= value):
            raise argparse.ArgumentTypeError(f"{text} is not a number {f'above {low}' if above else f'from {low} up'}")
        if value > (2**31 if kind is int else 1e30):  # what PyTorch's integers and fp32 can hold, and sense
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


count = number(int, 1)
positive = number(float, 0, above=True)
not_negative = number(float, 0)


def parser(description):
    """The flags that every script has; each script adds its own."""
    flags = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--out", required=True, type=Path, help="the run's folder (required)")
    add("--overwrite", action="store_true", help="replace a run in --out that is finished or has other settings")
    add("--seed", type=number(int, 0), default=0, help="whole number that all random draws come from (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="where to compute (the first of these that is there)")
    precisions = ("auto", "fp32", "bf16")
    add("--precision", choices=precisions, default="auto", help="auto: bf16 where it is fast (%(default)s)")
    add("--policy", default=COURSE["policy"], help="language model: hub name or local folder (%(default)s)")
    add("--reference", help="original model for the KL (reward.py: the course's; training: --policy)")
    add("--reward-model", default=COURSE["reward_model"], help="classifier: name or folder (%(default)s)")
    add("--positive-label", help="the classifier's name for positive (found by itself)")
    add("--prompts", default=COURSE["prompts"], help="reviews: hub name or local folder (%(default)s)")
    add("--prompt-len", type=count, default=10, metavar="P", help="prompt tokens, besides a bos (%(default)s)")
    add("--completion-len", type=count, default=20, metavar="N", help="sampled tokens (%(default)s)")
    add("--limit", type=count, metavar="n", help="train on n rows, chosen by --seed; reward.py trains on none (all)")
    add("--eval-limit", type=count, metavar="n", help="test on the first n prompts, and pairs (all)")
    add("--samples-per-prompt", type=count, default=1, metavar="k", help="completions of a test prompt (%(default)s)")
    add("--eval-batch-size", type=count, metavar="B", help="prompts a batch of the evaluation (256 on cuda, else 64)")
    return flags


def training_flags(flags, batch_size, lr, epochs):
    """The flags of the two training scripts, with their defaults."""
    add = flags.add_argument
    add("--batch-size", type=count, default=batch_size, metavar="B", help="rows a step, of all ranks (%(default)s)")
    add("--micro-batch", type=count, metavar="B", help="rows or pairs in memory at a time (the whole batch)")
    add("--lr", type=positive, default=lr, help="AdamW's learning rate (%(default)s)")
    add("--epochs", type=count, default=epochs, help="times through the training rows (%(default)s)")
    add("--max-grad-norm", type=positive, metavar="G", help="shorten a longer gradient to this norm (never)")
    add("--save-every", type=count, default=200, metavar="n", help="steps from checkpoint to checkpoint (%(default)s)")
    return flags


# ---- the run folder ----------------------------------------------------------------------------------------


class Run:
    """One run's folder. Making a Run only refuses a folder that must be left alone.

    saved: the checkpoint that the run goes on from; {} for a new run.
    """

    def __init__(self, args, script):
        self.args, self.script, self.folder, self.saved = args, script, args.out, {}
        from support import ranks  # here, because it loads torch

        with self.writing():
            ranks.once(self.check)

    @contextlib.contextmanager
    def writing(self):
        """Around what reads or writes the folder: a disk that is full, or closed to us, becomes one line."""
        try:
            yield
        except Exception as error:
            rust = type(error) is Exception or type(error).__name__ == "SafetensorError"  # of save_pretrained
            if not isinstance(error, OSError) and not rust:
                raise
            reason = getattr(error, "strerror", None) or error
            kept = "; what is there is kept, call it again once that is mended" if self.folder.is_dir() else ""
            raise UserError(f"--out {self.folder} cannot be written: {reason}{kept}") from error

    def check(self):
        """UserError if starting this run would harm what is in the folder."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a folder")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"--out {folder} cannot be written: no permission in {there}")
        if not folder.is_dir():
            return
        lock(folder)
        if all(path.name.endswith(".unfinished") for path in folder.iterdir()):
            return
        try:
            script = json.loads((folder / "config.json").read_text(encoding="utf-8"))["script"]
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            raise UserError(f"--out {folder} is not empty and no run's folder; give another one") from None
        if script != self.script:
            raise UserError(f"--out {folder} holds a run of {script}; give another folder")
        if (folder / "eval.json").exists():
            from support import checkpoint  # here, because it loads torch

            checkpoint.remove(folder)  # left by a kill at the very end
            if not self.args.overwrite:
                raise UserError(f"--out {folder} holds a finished run; give another folder or --overwrite")
        inputs = [value for name, value in vars(self.args).items() if name in (*COURSE, "reference") and value]
        if any(Path(value).resolve().is_relative_to(folder.resolve()) for value in inputs):
            raise UserError(f"--out {folder} holds what this run reads; give another folder")

    def start(self, device, precision, **loaded):
        """Called when everything is loaded: finds the checkpoint to go on from, or clears what an earlier run left.

        loaded: by name, the models and data that the training depends on; a run goes on only with the same.
        """
        from support import (
            checkpoint,  # here, because they load torch
            ranks,
        )

        flags = {**vars(self.args), "out": str(self.folder)}
        about = {"script": self.script, "flags": flags, "versions": versions(), "device": device}
        about |= {"hardware": ranks.each(hardware(device)), "precision": precision, "commit": commit()}
        sources = {name: (HOME / name).read_bytes() for name in (*CODE, self.script)}
        self.settings = {name: fingerprint(value) for name, value in {**sources, **loaded}.items()}
        self.settings |= {f"--{name.replace('_', '-')}": flags[name] for name in flags if name not in FREE}
        self.settings |= {"--device": device, "--precision": precision}
        ranks.agree(self.settings)
        with self.writing():
            if ranks.once(self.begin, about) and not self.saved:  # on another rank than 0
                self.saved = checkpoint.read(self.folder / checkpoint.NEWEST)

    def begin(self, about):
        """Makes the folder ready -> True if there is a checkpoint to go on from."""
        from support import checkpoint

        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()  # again: another process may have been faster
        self.saved = checkpoint.choose(self.folder, self.settings, self.args.overwrite)
        self.clear()
        if self.saved:
            about = self.continued(about)
        write_whole(self.folder / "config.json", to_json(about, indent=2))
        return bool(self.saved)

    def continued(self, about):
        """config.json of a run that goes on: how it was begun and, in `continued`, each time that it went on."""
        begun = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        before = begun.get("continued", [])
        now = {"step": self.saved["step"], **{key: about[key] for key in ("versions", "hardware", "commit")}}
        last = before[-1] if before else begun
        other = " and ".join(key for key in ("hardware", "versions") if now[key] != last.get(key))
        note = f", with other {other} than before: last digits may differ" if other else ""
        print(f"{self.folder}: goes on after step {now['step']}{note}")
        return {**begun, "flags": about["flags"], "continued": [*before, now]}

    def clear(self):
        """Leaves in the folder what was there when the checkpoint was written; nothing without one."""
        for name in ("eval.json", "completions.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        for path in (self.folder / "model", self.folder / "model.unfinished"):
            if path.exists():
                shutil.rmtree(path)
        for name in LOGS:  # what was logged after the checkpoint will be logged again
            if length := self.saved.get("lengths", {}).get(name):
                os.truncate(self.folder / name, length)
            else:
                (self.folder / name).unlink(missing_ok=True)

    def log(self, **row):
        """A line of metrics.jsonl."""
        self.append("metrics.jsonl", row)

    def sample(self, **row):
        """A line of samples.jsonl."""
        self.append("samples.jsonl", row)

    @by_rank_0
    def append(self, name, row):
        """A run whose numbers are not finite stops here at the latest, so none of them is ever written."""
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                at = f"step {row['step']}" if "step" in row else f"epoch {row['epoch']}"
                advice = "try a lower --lr" if row.get("step", row.get("epoch")) else "what was loaded is broken"
                raise UserError(f"{at}: {key} is {value}; {advice}")
        with self.writing(), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")

    @by_rank_0
    def checkpoint(self, **content):
        """Writes a checkpoint, with these settings and the length of the logs (checkpoint.Progress calls it)."""
        from support import checkpoint

        with self.writing():
            logs = [self.folder / name for name in LOGS if (self.folder / name).exists()]
            for path in logs:
                flush(path)  # a checkpoint never knows of lines that a power cut could take
            lengths = {path.name: path.stat().st_size for path in logs}
            checkpoint.write(self.folder, {"settings": self.settings, "lengths": lengths, **content})

    @by_rank_0
    def completions(self, rows):
        with self.writing():
            write_whole(self.folder / "completions.jsonl", "".join(to_json(row) + "\n" for row in rows))

    @by_rank_0
    def save_model(self, policy, tokenizer):
        """Whole or not at all: `model` appears by a rename."""
        unfinished = self.folder / "model.unfinished"
        with self.writing():
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            for path in (*unfinished.iterdir(), unfinished):
                flush(path)
            os.replace(unfinished, self.folder / "model")
            flush(self.folder)

    @by_rank_0
    def finish(self, **results):
        """eval.json, the last file; from then on the run is finished and needs no checkpoint."""
        from support import checkpoint

        with self.writing():
            write_whole(self.folder / "eval.json", to_json(results, indent=2))
            checkpoint.remove(self.folder)
        unlock(self.folder)
        shown = [f"{name} {results[name]:.5g}" for name in SUMMARY if results.get(name) is not None]
        print(f"{self.folder}: {', '.join(shown)}")


LOCKS = {}  # folder -> its open descriptor, for as long as this process is at work in it


def lock(folder):
    """UserError if another process is at work in the folder. The lock ends with its process, even a killed one."""
    if folder.resolve() in LOCKS:
        return
    with contextlib.suppress(ImportError, OSError):  # a system or a file system without such locks
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"--out {folder}: another process is at work in it; wait, or give another folder") from None
        LOCKS[folder.resolve()] = descriptor


def unlock(folder):
    if folder.resolve() in LOCKS:
        os.close(LOCKS.pop(folder.resolve()))
