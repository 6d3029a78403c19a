"""Run folders and command lines: what keeps results safe, out of the lessons' way.

A run is a folder of plain text: config.json first, a line of metrics.jsonl for each step, eval.json last.
Whoever finds an eval.json finds a finished run. Plain Python: importing this file loads no torch.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

COURSE = {  # the names that the course uses on the model hub
    "policy": "distilgpt2",
    "reward_model": "omidroshani/imdb-sentiment-analysis",
    "prompts": "stanfordnlp/imdb",
    "pairs": "hallisky/synthetic-imdb-movie-reviews-parallel",
}
SUMMARY = ("reward", "reward_se", "n", "kl", "distinct_2", "test_loss", "test_accuracy")  # said at a run's end


class UserError(Exception):
    """Something that the caller can put right. Its message is one line: what is wrong and what to do."""


def launch(main):
    """Runs a script's main(); a UserError or Ctrl-C becomes one line on stderr and a non-zero exit code."""
    keep_memory()
    name = Path(sys.argv[0]).name
    try:
        return main()
    except UserError as error:
        message, code = f"{name}: error: {error}", 1
    except KeyboardInterrupt:
        message, code = f"\n{name}: interrupted; finished runs are kept, the same command does the rest", 130
    print(message, file=sys.stderr)  # out here the progress bar is gone and has ended its line
    sys.exit(code)


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
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low, above=False):
    """A parser of finite numbers from `low` up (`above`: greater than `low`)."""

    def parse(text):
        value = kind(text)  # argparse reports a ValueError as "invalid ... value"
        if not (low < value if above else low <= value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number {f'above {low}' if above else f'from {low} up'}")
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
    add("--overwrite", action="store_true", help="replace a finished run in --out")
    add("--seed", type=number(int, 0), default=0, help="whole number that all random draws come from (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="where to compute (the first of these that is there)")
    precisions = ("auto", "fp32", "bf16")
    add("--precision", choices=precisions, default="auto", help="auto: bf16 where it is fast (%(default)s)")
    add("--policy", default=COURSE["policy"], help="language model: hub name or local folder (%(default)s)")
    add("--reference", help="original model for the KL (reward.py: the course's; training: --policy)")
    add("--reward-model", default=COURSE["reward_model"], help="classifier: name or folder (%(default)s)")
    add("--positive-label", help="the classifier's name for positive (found by itself)")
    add("--prompts", default=COURSE["prompts"], help="reviews: hub name or local folder (%(default)s)")
    add("--prompt-len", type=count, default=10, metavar="P", help="prompt tokens (%(default)s)")
    add("--completion-len", type=count, default=20, metavar="N", help="sampled tokens (%(default)s)")
    add("--limit", type=count, metavar="n", help="train on n rows, chosen by --seed; reward.py trains on none (all)")
    add("--eval-limit", type=count, metavar="n", help="test on the first n prompts, and pairs (all)")
    add("--samples-per-prompt", type=count, default=1, metavar="k", help="completions of a test prompt (%(default)s)")
    add("--eval-batch-size", type=count, metavar="B", help="prompts a batch of the evaluation (256 on cuda, else 64)")
    return flags


def training_flags(flags, batch_size, lr, epochs):
    """The flags of the two training scripts, with their defaults."""
    add = flags.add_argument
    add("--batch-size", type=count, default=batch_size, metavar="B", help="rows a step (%(default)s)")
    add("--micro-batch", type=count, metavar="B", help="rows or pairs in memory at a time (the whole batch)")
    add("--lr", type=positive, default=lr, help="AdamW's learning rate (%(default)s)")
    add("--epochs", type=count, default=epochs, help="times through the training rows (%(default)s)")
    return flags


# ---- the run folder ----------------------------------------------------------------------------------------


class Run:
    """One run's folder. Making a Run writes nothing: it only refuses a folder that must be left alone."""

    def __init__(self, args, script):
        self.args, self.script, self.folder = args, script, args.out
        try:
            self.check()
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be read: {error.strerror}") from None

    def check(self):
        """UserError if starting this run would harm what is in the folder."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a folder")
        if not folder.is_dir() or all(path.name.endswith(".unfinished") for path in folder.iterdir()):
            return
        try:
            script = json.loads((folder / "config.json").read_text(encoding="utf-8"))["script"]
        except (FileNotFoundError, ValueError, KeyError):
            raise UserError(f"--out {folder} is not empty and no run's folder; give another one") from None
        if script != self.script:
            raise UserError(f"--out {folder} holds a run of {script}; give another folder")
        if (folder / "eval.json").exists() and not self.args.overwrite:
            raise UserError(f"--out {folder} holds a finished run; give another folder or --overwrite")
        inputs = [value for name, value in vars(self.args).items() if name in (*COURSE, "reference") and value]
        if any(Path(value).resolve().is_relative_to(folder.resolve()) for value in inputs):
            raise UserError(f"--out {folder} holds what this run reads; give another folder")

    def start(self, device, precision):
        """Called when everything is loaded: clears what an earlier run left and writes config.json."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("eval.json", "metrics.jsonl", "samples.jsonl", "completions.jsonl"):
                (self.folder / name).unlink(missing_ok=True)  # eval.json first: now it is unfinished
            for path in (self.folder / "model", *self.folder.glob("*.unfinished")):
                shutil.rmtree(path, ignore_errors=True)
            flags = {**vars(self.args), "out": str(self.folder)}
            versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")}
            versions["python"] = platform.python_version()
            about = {"script": self.script, "flags": flags, "versions": versions}
            about |= {"device": device, "precision": precision, "commit": commit()}
            write_whole(self.folder / "config.json", to_json(about, indent=2))
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be written: {error.strerror}") from None

    def log(self, **row):
        """A line of metrics.jsonl, on disk at once."""
        append(self.folder / "metrics.jsonl", row)

    def sample(self, **row):
        """A line of samples.jsonl."""
        append(self.folder / "samples.jsonl", row)

    def completions(self, rows):
        write_whole(self.folder / "completions.jsonl", "".join(to_json(row) + "\n" for row in rows))

    def save_model(self, policy, tokenizer):
        """Whole or not at all: `model` appears by a rename."""
        unfinished = self.folder / "model.unfinished"
        policy.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, self.folder / "model")

    def finish(self, **results):
        write_whole(self.folder / "eval.json", to_json(results, indent=2))
        shown = [f"{name} {results[name]:.5g}" for name in SUMMARY if results.get(name) is not None]
        print(f"{self.folder}: {', '.join(shown)}")


def to_json(value, **options):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)  # nan is no JSON


def append(path, row):
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


def write_whole(path, text):
    """A reader finds the old file or the new one, never half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_rows(path):
    """The rows of a .jsonl file. A line that is no JSON object, as the last of a run cut off, is left out, aloud."""
    rows = []
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            with contextlib.suppress(ValueError, TypeError):
                rows.append(dict(json.loads(line)))
                continue
            print(f"{path}, line {number} is cut off or broken: left out", file=sys.stderr)
    return rows


def commit():
    """The commit that this code is at, with -dirty if it was changed since; None where git can't tell."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stdout.strip() or None


# ---- what comes from outside -------------------------------------------------------------------------------


@contextlib.contextmanager
def loading(flag, name, kind):
    """Around a library's loading call: checks a local path first; whatever goes wrong becomes one line."""
    import huggingface_hub  # here, so that importing this file stays cheap
    import transformers

    folder = Path(name).is_dir()
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} {name}: there is no such folder")
    transformers.utils.logging.disable_progress_bar()  # a bar for each weight read from disk
    huggingface_hub.utils.enable_progress_bars()  # but downloads show theirs
    logging.disable(logging.CRITICAL)  # the libraries' own warnings: what matters becomes the error below
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:300] or type(error).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        advice = f": no such folder here; check the name and the network{offline}, or give a local folder"
        advice = advice if isinstance(error, OSError) and not folder else ""  # other errors: it was found, but is wrong
        raise UserError(f"{flag} {name} cannot be loaded as {kind}{advice} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)


def load_columns(flag, name, split, columns):
    """The named text columns of a data set's split (hub name or local folder): lists of str."""
    import datasets

    with loading(flag, name, "a data set"):
        splits = datasets.load_dataset(name)
    if split not in splits:
        raise UserError(f"{flag} {name} has no split {split!r}; it has {', '.join(splits)}")
    for column in columns:
        if column not in splits[split].column_names:
            has = ", ".join(splits[split].column_names)
            raise UserError(f"{flag} {name}, split {split}, has no column {column!r}; it has {has}")
    texts = [splits[split][column][:] for column in columns]
    for column, values in zip(columns, texts, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                where = f"split {split}, row {row}, column {column}"
                raise UserError(f"{flag} {name}, {where}: {repr(value)[:80]} is not a text")
    return texts
