"""Command lines: the flags of the scripts, and what a user sees when something is wrong. Loads no torch by itself."""

import argparse
import contextlib
import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

from support.errors import AGAIN, UserError, out_of_memory
from support.files import plain

COURSE = {  # the names that the course uses on the model hub
    "policy": "distilgpt2",
    "reward_model": "omidroshani/imdb-sentiment-analysis",
    "prompts": "stanfordnlp/imdb",
    "pairs": "hallisky/synthetic-imdb-movie-reviews-parallel",
}

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


def bare_flags(description):
    """A parser without flags, that shows a module's docstring as it stands."""
    return OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def flags(description):
    """The flags that every script has; each script adds its own."""
    parser = bare_flags(description)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="the run's folder (required)")
    add("--overwrite", action="store_true", help="replace a run in --out that is finished or has other settings")
    add("--seed", type=number(int, 0), default=0, help="whole number that all random draws come from (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="where to compute (the first of these that is there)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 if it is fast (%(default)s)")
    add("--policy", default=COURSE["policy"], help="language model: hub name or local folder (%(default)s)")
    add("--reference", help="original model for the KL (reward.py: the course's; training: --policy)")
    add("--reward-model", default=COURSE["reward_model"], help="classifier: name or folder (%(default)s)")
    add("--positive-label", help="the classifier's name for positive (found by itself)")
    add("--prompts", default=COURSE["prompts"], help="reviews: hub name or local folder (%(default)s)")
    add("--prompt-len", type=count, default=10, metavar="P", help="prompt tokens, besides a bos (%(default)s)")
    add("--completion-len", type=count, default=20, metavar="N", help="sampled tokens (%(default)s)")
    add("--limit", type=count, metavar="n", help="train on n rows, chosen by --seed (all)")
    add("--eval-limit", type=count, metavar="n", help="test on the first n prompts, and pairs (all)")
    add("--samples-per-prompt", type=count, default=1, metavar="k", help="completions of a prompt (%(default)s)")
    add("--eval-batch-size", type=count, metavar="B", help="prompts a batch of the evaluation (256 on cuda, else 64)")
    return parser


def training_flags(description, batch_size, lr, epochs):
    """Those of the two training scripts, with their defaults."""
    parser = flags(description)
    add = parser.add_argument
    add("--batch-size", type=count, default=batch_size, metavar="B", help="rows a step, of all ranks (%(default)s)")
    add("--lr", type=positive, default=lr, help="AdamW's learning rate (%(default)s)")
    add("--epochs", type=count, default=epochs, help="times through the training rows (%(default)s)")
    add("--max-grad-norm", type=positive, metavar="G", help="shorten a longer gradient to this norm (never)")
    add("--save-every", type=count, default=200, metavar="n", help="steps from checkpoint to checkpoint (%(default)s)")
    return parser


def open_run(parser, argv, script):
    """-> the Run that the command line asks for; nothing is written yet."""
    return importlib.import_module("support.runs").Run(parser.parse_args(argv), script)  # it loads torch


# ---- running a script --------------------------------------------------------------------------------------


def launch(main):
    """Runs a script's main(). What a user can cause becomes one line on stderr and a non-zero exit code."""
    keep_memory()
    name = Path(sys.argv[0]).name
    ranks = None
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        ranks = importlib.import_module("support.ranks")  # it loads torch
    try:
        with ranks.joined() if ranks else contextlib.nullcontext():
            signal.signal(signal.SIGTERM, terminate)
            main()
        if ranks:  # at the interpreter's end a library's thread aborts now and then, and torchrun ends all ranks
            sys.stdout.flush()
            os._exit(0)
        return
    except (UserError, FloatingPointError) as error:
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
        advice = "try a smaller --eval-batch-size, in dpo.py --micro-batch; a training run goes on with these"
        message, code = f"{name}: error: out of memory; {advice}, from its checkpoint", 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until all is said
    if not ranks or ranks.first_to_fail():
        end = "\n" * bool(ranks and ranks.rank())  # rank 0's bar may be there; one's own is gone and has ended its line
        print(end + plain(message), file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)


def terminate(number, frame):
    raise KeyboardInterrupt(number)


def keep_memory():
    """Tells the C library (glibc's, on Linux) to keep freed memory for the next tensor.

    By default each tensor above some MB is new memory, which the kernel clears page by page: a tenth of a REINFORCE
    step. The tensors of a step are those of the last, so what is kept is used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor lies outside the heap ...
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... which gives no less than 2 GB back
