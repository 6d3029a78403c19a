"""Run folders: what keeps results safe, out of the lesson's way.

A run is a folder of plain text: config.json first, a line of metrics.jsonl for each step, eval.json last.
Whoever finds an eval.json finds a finished run; in an unfinished one checkpoint.py's files say where it goes on.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import time
from pathlib import Path

from support import checkpoint
from support.errors import UserError
from support.files import HOME, commit, fingerprint, flush, hardware, to_json, versions, write_whole
from support.precision import pick_device
from support.progress import Bar, Progress
from support.ranks import all_gather_lists, broadcast, distributed, rank, rank_batches, world_size

LOGS = ("metrics.jsonl", "samples.jsonl")  # they grow during training; all other files are written whole
# What training depends on, besides the script, and on which flags it does not.
CODE = ("common.py", "reward.py", *(f"support/{name}.py" for name in ("encoding", "families", "loading", "ranks")))
FREE = ("out", "overwrite", "save_every", "micro_batch", "eval_batch_size")
READ = ("policy", "reference", "reward_model", "prompts", "pairs")  # flags that may name folders
SUMMARY = ("reward", "reward_se", "n", "kl", "distinct_2", "test_loss", "test_accuracy")  # said at a run's end


def by_rank_0(method):
    """A method that writes: on the other ranks nothing happens."""

    @functools.wraps(method)
    def instead(*args, **more):
        return method(*args, **more) if rank() == 0 else None

    return instead


class Run:
    """One run's folder. Making a Run only refuses a folder that must be left alone.

    saved: the checkpoint that the run goes on from; {} for a new run.
    """

    def __init__(self, args, script):
        self.args, self.script, self.folder, self.saved = args, script, args.out, {}
        self.looked = 0.0  # when the samples were last looked at, which is no part of a step's seconds
        with self.writing():
            broadcast(self.check)
        self.device, self.precision = pick_device(args.device, args.precision)
        self.bf16 = self.precision == "bf16"

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
            checkpoint.remove(folder)  # left by a kill at the very end
            if not self.args.overwrite:
                raise UserError(f"--out {folder} holds a finished run; give another folder or --overwrite")
        inputs = [value for name, value in vars(self.args).items() if name in READ and value]
        if any(Path(value).resolve().is_relative_to(folder.resolve()) for value in inputs):
            raise UserError(f"--out {folder} holds what this run reads; give another folder")

    def start(self, **loaded):
        """Called when everything is loaded: finds the checkpoint to go on from, or clears what an earlier run left.

        loaded: by name, the models and data that the training depends on; a run goes on only with the same.
        """
        flags, device = {**vars(self.args), "out": str(self.folder)}, str(self.device)
        about = {"script": self.script, "flags": flags, "versions": versions(), "device": device}
        ours = f"{world_size()} ranks, each " * distributed() + hardware(device)
        about |= {"hardware": ours, "precision": self.precision, "commit": commit()}
        sources = {name: (HOME / name).read_bytes() for name in (*CODE, self.script)}
        self.settings = {name: fingerprint(value) for name, value in {**sources, **loaded}.items()}
        self.settings |= {f"--{name.replace('_', '-')}": flags[name] for name in flags if name not in FREE}
        self.settings |= {"--device": device, "--precision": self.precision}
        self.agree()
        with self.writing():
            if broadcast(self.begin, about) and not self.saved:  # on another rank than 0
                self.saved = checkpoint.load_checkpoint(self.folder / checkpoint.NEWEST)

    def agree(self):
        """UserError unless all ranks have the same settings: other files on another machine, say."""
        for number, other in enumerate(all_gather_lists([self.settings])):
            names = [name for name in {**self.settings, **other} if self.settings.get(name) != other.get(name)]
            if names:
                raise UserError(f"rank {number} has another {', '.join(names)} than rank {rank()}")

    def begin(self, about):
        """Makes the folder ready -> True if there is a checkpoint to go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()  # again: another process may have been faster
        self.saved = checkpoint.choose(self.folder, self.settings, self.args.overwrite)
        self.clear()
        about = self.continued(about) if self.saved else about
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

    def resume(self, **parts):
        """-> Progress; a model, an optimizer and a Generator are put back to where the run was cut off, if it was."""
        return Progress(self, parts)

    def deal(self, batches, desc):
        """Goes, under a bar, through those of the batches that are this rank's: all, but with torchrun."""
        return Bar(rank_batches(batches), desc)

    def gather(self, rows):
        """List -> the lists of all ranks, one behind the other, on every rank."""
        return all_gather_lists(rows)

    def log(self, **row):
        """A line of metrics.jsonl."""
        self.append("metrics.jsonl", row)

    def sample(self, **row):
        """A line of samples.jsonl."""
        self.append("samples.jsonl", row)
        self.looked = time.perf_counter()

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
    def checkpoint(self, step, parts):
        """Writes one, with these settings and the length of the logs (progress.Progress calls it)."""
        with self.writing():
            logs = [self.folder / name for name in LOGS if (self.folder / name).exists()]
            for path in logs:
                flush(path)  # a checkpoint never knows of lines that a power cut could take
            lengths = {path.name: path.stat().st_size for path in logs}
            content = {"settings": self.settings, "lengths": lengths, "step": step, "parts": parts}
            checkpoint.save_checkpoint(self.folder, content)

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
