"""Files that are whole or not there, and what a run notes of where it was made. Plain Python, loads no torch."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent


def to_json(value, **options):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)  # nan is no JSON


def write_whole(path, text):
    """A reader finds the old file or the new one, never half of it; after a power cut, too."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def flush(path):
    """Returns when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def save_rows(folder, **splits):
    """Writes a new folder's train.jsonl and test.jsonl: an object a line, as load_dataset(folder) reads them."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        write_whole(folder / f"{split}.jsonl", "".join(to_json(row) + "\n" for row in rows))


def plain(text):
    """The text less what a terminal or a page would obey: control characters, line ends, changes of direction."""
    return "".join(" " if unicodedata.category(mark) in ("Cc", "Cf", "Zl", "Zp") else mark for mark in text).strip()


# ---- where and from what a run was made --------------------------------------------------------------------


def versions():
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")}
    return {**found, "python": platform.python_version()}


def hardware(device):
    """The processor's or GPU's name, and how many threads PyTorch uses: sums depend on both in their last digits."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return f"{known.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads"


def commit():
    """The commit that this code is at, with -dirty if it was changed since; None where git can't tell."""
    command = ["git", "-C", str(HOME), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def fingerprint(value):
    """A number that tells whether a model's weights, a tensor, bytes, or lists of numbers are the same as before."""
    if isinstance(value, bytes):
        return zlib.crc32(value)
    if hasattr(value, "state_dict"):
        return zlib.crc32(repr([fingerprint(weight) for weight in value.parameters()]).encode())
    return zlib.crc32(value.detach().cpu().numpy().tobytes() if hasattr(value, "detach") else repr(value).encode())
