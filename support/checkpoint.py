"""Checkpoints: a run that was cut off goes on, and ends with the numbers that it would have had.

A checkpoint holds all that the rest of a run depends on: weights, the optimizer's averages, the sampling generator's
state, the number of steps done, and how long metrics.jsonl and samples.jsonl were. The order of the data follows from
the seed, so it is made again. Only tensors and plain values are in it, and it is read with weights_only=True: a
checkpoint cannot run code. How the training loops use it: progress.Progress.
"""

import os
import sys
import zipfile

import torch

from support.errors import UserError, out_of_memory
from support.files import flush, plain

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"


def save_checkpoint(folder, content):
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
            return path, load_checkpoint(path)
        except Exception as problem:  # whatever it is: half a file, changed bytes, something else altogether
            if isinstance(problem, OSError) or out_of_memory(problem):
                raise  # this says nothing about the checkpoint
            reason = " ".join(str(problem).split())[:100]
            print(plain(f"{path} is broken and left out ({reason})"), file=sys.stderr)
    return (there or [None])[0], {}


def load_checkpoint(path):
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
