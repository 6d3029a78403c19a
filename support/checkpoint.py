"""Checkpoints: a run that was cut off goes on, and ends with the numbers that it would have had.

A checkpoint holds all that the rest of a run depends on: weights, the optimizer's averages, the sampling generator's
state, the number of steps done, and how long metrics.jsonl and samples.jsonl were. The order of the data follows from
the seed, so it is made again. Only tensors and plain values are in it, and it is read with weights_only=True: a
checkpoint cannot run code. How the training loops use it: Progress.
"""

import contextlib
import os
import signal
import sys
import zipfile

import torch
from tqdm import tqdm

from support.files import flush, plain
from support.ranks import anyone
from support.runs import UserError, out_of_memory, rank

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"


class Progress:
    """The steps of a training run, and the checkpoints between them.

    parts: what a checkpoint has to hold, by name: a model, an optimizer, a torch.Generator, or tensors as they are
    (in lists and dicts). If the run goes on from a checkpoint (run.saved), the first three get their state back here.
    step: the number of steps done.
    """

    def __init__(self, run, **parts):
        self.run, self.parts = run, parts
        self.step = run.saved.get("step", 0)
        self.end = 0  # the last step of the epoch that the loop is in
        for name, part in parts.items() if self.step else ():
            if isinstance(part, torch.Generator):
                part.set_state(run.saved["parts"][name])
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(run.saved["parts"][name])
        run.saved = {}  # a gigabyte for DistilGPT2

    def steps(self, batches, desc):
        """Yields (step, batch) of an epoch's batches, those after the checkpoint only, under a progress bar.

        When the loop comes back for the next one the step is done: every --save-every steps and at the epoch's end a
        checkpoint is written. So it is after Ctrl-C or SIGTERM, before KeyboardInterrupt is raised.
        """
        begin, self.end = self.end, self.end + len(batches)
        done = min(max(self.step - begin, 0), len(batches))
        self.bar = tqdm(batches[done:], desc, len(batches), initial=done, unit="step", dynamic_ncols=True,
                        disable=done == len(batches))
        with stop_signals() as stop:
            for batch in self.bar:
                self.step += 1
                yield self.step, batch
                stopping = anyone(max(stop, default=0))  # a signal may reach the ranks in different steps
                if stopping or self.step == self.end or self.step % self.run.args.save_every == 0:
                    self.save()
                if stopping:
                    raise KeyboardInterrupt(stopping)
            if stop:  # at the very end; the checkpoint is there
                raise KeyboardInterrupt(*stop)

    def show(self, **values):
        """Beside the progress bar."""
        with contextlib.suppress(OSError):  # as when the terminal is gone
            self.bar.set_postfix(values)

    def save(self):
        self.run.checkpoint(step=self.step, parts={name: state(part) for name, part in self.parts.items()})


def state(part):
    """What a checkpoint holds of a model, an optimizer, a Generator; anything else is its own state."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict() if hasattr(part, "state_dict") else part


@contextlib.contextmanager
def stop_signals():
    """Within it the first Ctrl-C or SIGTERM only fills the list that this yields; a second one acts as before."""
    noted, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        restore()
        with contextlib.suppress(OSError):  # os.write, since print is not safe within a handler
            rank() or os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


def write(folder, content):
    """A kill at any moment leaves a whole checkpoint; afterwards there is the one before, too."""
    unfinished = folder / (NEWEST + ".unfinished")
    (folder / BEFORE).unlink(missing_ok=True)  # never three of them: each has three times the model's size
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
        flush(unfinished)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)  # a full disk has room again
        if isinstance(error.__context__, OSError | KeyboardInterrupt):  # the cause, as PyTorch hides it
            raise error.__context__ from None
        raise
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / BEFORE)
    os.replace(unfinished, folder / NEWEST)
    flush(folder)


def newest(folder):
    """-> path and content of the newest checkpoint that is whole; what is broken is said.

    None, {} if there is no checkpoint, and some path, {} if none is whole.
    """
    there = [folder / name for name in (NEWEST, BEFORE) if (folder / name).exists()]
    for path in there:
        try:
            return path, read(path)
        except Exception as problem:  # whatever it is: half a file, changed bytes, something else altogether
            if isinstance(problem, OSError) or out_of_memory(problem):
                raise  # this says nothing about the checkpoint
            reason = " ".join(str(problem).split())[:100]
            print(plain(f"{path} is broken and left out ({reason})"), file=sys.stderr)
    return (there or [None])[0], {}


def read(path):
    """-> its content; an exception if it is not as it was written, or the logs beside it have become shorter."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        if changed := archive.testzip():
            raise ValueError(f"{changed} in it has changed")
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name, length in content["lengths"].items():
        log = path.parent / name
        if not log.exists() or log.stat().st_size < length:
            raise ValueError(f"{name} is shorter than when it was written")
    return {key: content[key] for key in ("step", "settings", "lengths", "parts")}


def choose(folder, settings, overwrite):
    """-> the checkpoint to go on from, {} to begin anew; UserError if there is one, but not of these settings."""
    path, content = newest(folder)
    if path is None:
        return {}
    if content and content["settings"] == settings:
        os.replace(path, folder / NEWEST)  # if it is the one before, a broken one has to go
        return content
    if overwrite:
        remove(folder)
        return {}
    problem = "and none of its checkpoints is whole"
    if content:
        other = differences(content["settings"], settings)
        problem = f"at step {content['step']}, but now {other}. To go on, undo that"
    anew = "to begin anew, give --overwrite or another folder (to make: FLAGS=--overwrite, RUNS=FOLDER)"
    raise UserError(f"--out {folder}: its run was cut off {problem}; {anew}")


def differences(saved, now):
    """Two dicts of settings -> what is not the same, in words."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} is {now.get(name)}, was {saved.get(name)}" if name.startswith("--") else
                     f"{name} has changed" for name in names)


def remove(folder):
    for name in (BEFORE, NEWEST):
        (folder / name).unlink(missing_ok=True)
