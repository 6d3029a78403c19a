"""Judges the functions of many solutions: a process for each function, several at a time. For check.py.

PyTorch is loaded once, by this process, and each child is a fork of it: 10 ms, where a start takes seconds. What
was judged before is not judged again: answers are kept in build/check/, by what they depend on.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing.connection
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from course import parse
from support import command, files

FORK = multiprocessing.get_context("fork")
KEPT = parse.HERE / "build" / "check"
LAST = "compute_reward_for_mini_batch"  # needs models of transformers: the others are judged while these load

# ---- what is known -----------------------------------------------------------------------------------------


def place_of(read, path):
    """-> the file in which the answers on a solution are kept. Its name is a hash of all that they depend on."""
    parts = read.pieces, modules_beside(Path(path).parent, read.statements), tools()
    return KEPT / f"{hashlib.sha256(repr(parts).encode(errors='replace')).hexdigest()}.json"


def modules_beside(folder, statements):
    """-> list of (path, bytes): modules in a folder that these statements import, and those that these import."""
    found, left = {}, list(statements)
    while left:
        parts = list(ast.walk(left.pop()))
        names = {alias.name for part in parts if isinstance(part, ast.Import) for alias in part.names}
        names |= {part.module for part in parts if isinstance(part, ast.ImportFrom) and part.module}
        for name in {name.partition(".")[0] for name in names}:
            for path in {folder / f"{name}.py", *(folder / name).rglob("*.py")} - found.keys():
                with contextlib.suppress(OSError, SyntaxError, ValueError):  # then it cannot be imported either
                    found[path] = path.read_bytes()
                    left.append(ast.parse(found[path]))
    return sorted((str(path.relative_to(folder)), content) for path, content in found.items())


@functools.cache
def tools():
    """What an answer depends on besides the solution: the code of this project, and the versions of all packages."""
    sources = [path.read_bytes() for pattern in ("*.py", "course/*.py", "demo/*.py", "support/*.py")
               for path in sorted(parse.HERE.glob(pattern))]
    packages = sorted(path.name for folder in sys.path for path in Path(folder).glob("*.dist-info"))
    return hashlib.sha256(repr((sys.version, packages, sources)).encode()).hexdigest()


def known(read, path):
    """-> {name: answer} that was kept; {} if nothing was, or what was is broken."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(place_of(read, path).read_text(encoding="utf-8")))
    return {}


def keep(read, path, answers):
    """Keeps {name: answer} of a solution, where that can be; where a child gave none, it is asked again next time."""
    with contextlib.suppress(OSError):
        KEPT.mkdir(parents=True, exist_ok=True)
        given = {name: answer for name, answer in answers.items() if "notes" in answer}
        files.write_whole(place_of(read, path), json.dumps(given))


# ---- what is not -------------------------------------------------------------------------------------------


class Running(NamedTuple):
    job: tuple
    process: multiprocessing.Process
    end: float  # of its time


def judge_all(jobs, limit):
    """Yields job, answer as they come: what child.judged() says, or a status and a reason, where a child says nothing.

    jobs: list of (check.Opened, name of a function). limit: seconds for each. However it ends, no child goes on.
    """
    if not jobs:
        return
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}  # before PyTorch is loaded
    command.keep_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    running = {}  # connection -> Running
    gc.disable()  # while loading it takes a fifth of the time, and finds nothing
    try:
        from course import child, tiny_models  # they load PyTorch

        tiny_models.given("compute_DPO_loss")  # loads what all need of transformers
        first = [job for job in jobs[:6] if job[1] != LAST]
        for job in first:
            start(child.work, job, limit, running)
        if any(name == LAST for _, name in jobs):
            tiny_models.given(LAST)  # loads its models
        gc.freeze()
        gc.enable()
        left = [job for job in reversed(jobs) if job not in first]
        while left or running:
            while left and len(running) < cores + 2:  # those that hang, or wait, are no work for a core
                start(child.work, left.pop(), limit, running)
            yield from gathered(running, limit)
    finally:
        gc.enable()
        for each in running.values():
            stop(each.process)


def start(work, job, limit, running):
    """Forks a child. A signal waits until it is noted, and is the child's own."""
    file, name = job
    receives, sends = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(file.read, name, file.path, sends), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    process.start()
    running[receives] = Running(job, process, time.monotonic() + limit)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sends.close()


def stop(process):
    """Ends a child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not a group of its own yet, or is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def gathered(running, limit):
    """Waits for children. Takes those that have answered, ended or used up their time; yields as judge_all() does."""
    first = min(each.end for each in running.values())
    ready = multiprocessing.connection.wait(list(running), max(0, first - time.monotonic()))
    late = [receives for receives, each in running.items() if each.end <= time.monotonic()]
    for receives in dict.fromkeys([*ready, *late]):
        job, process, _ = running[receives]
        answer = {"status": "raises", "got": f"no answer within {limit:g} seconds"}
        if receives in ready:
            try:
                answer = json.loads(receives.recv_bytes())
            except (EOFError, OSError):  # OSError: in the middle of it
                process.join(1)
                answer["got"] = f"its process ended without an answer (exit code {process.exitcode})"
        stop(process)
        receives.close()
        del running[receives]
        yield job, answer
