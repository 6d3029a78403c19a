"""Says what is right and what is wrong in somebody's solution of the course, function by function.

    make check SOLUTION=A3.py
    python -m course.check A3.ipynb --json

The functions are found by the course's names and called on cases known on paper (judge_losses.py, judge_data.py). A
wrong answer is compared with what each usual mistake would give (explain.py), and named after it. The file is not run
as a whole (parse.py), but its functions are: a stranger's code runs with your rights, in a child process for each
function, with a time limit. That stops accidents, not malice.
Exit code 1: a judged function is wrong or raises; 2: the file cannot be read.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

from course import loop_signs, parse
from course.wording import MEANING

JUDGED = ("compute_reward_for_mini_batch", "compute_reinforce_loss", "compute_kl_divergence", "compute_DPO_loss",
          "_get_batch_logps", "create_labels_from_attention_mask")
NOT_JUDGED = ("evaluate", "train", "get_log_probs", "train_DPO")


def work_in_child(*arguments):
    """What a child does."""
    from course import child  # loads torch, which this process does without

    child.work(*arguments)


def failure(said):
    return {"status": "raises", "got": said, "notes": []}


def in_child(context, path, name, limit):
    """child.judged(), in a child process that is stopped after `limit` seconds."""
    receives, sends = context.Pipe(duplex=False)
    child = context.Process(target=work_in_child, args=(path, name, sends), daemon=True)
    child.start()
    sends.close()
    try:
        return receives.recv() if receives.poll(limit) else failure(f"no answer within {limit:g} seconds")
    except EOFError:
        child.join()
        return failure(f"its process ended without an answer (exit code {child.exitcode})")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def has_no_body(function):
    """True for a body of nothing but a docstring, pass, ... or NotImplementedError."""
    body = [node for node in function.node.body
            if not isinstance(node, ast.Pass) and not isinstance(getattr(node, "value", None), ast.Constant)]
    return all(isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node) for node in body)


def check(path, limit=60, judge=None):
    """-> {name: verdict} for all of the course's functions. judge(name) -> verdict; by default in a child process."""
    read = parse.read_solution(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["course.child", "datasets", "matplotlib.pyplot"])
    if not judge:  # Ctrl-C is for this process, which stops the others
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, interrupt)
    judge = judge or (lambda name: in_child(context, path, name, limit))
    trouble = loop_signs.of({name: function.node for name, function in read.functions.items()})
    found = {}
    for name in (*JUDGED, *NOT_JUDGED):
        answer = dict.fromkeys(("mistake", "expected", "got", "line", "cell")) | {"status": "missing", "notes": []}
        unread = next((part for part in read.unread if name in part.functions), None)
        if name in read.functions:
            answer["line"] = read.functions[name].node.lineno
            if has_no_body(read.functions[name]):
                answer["notes"] = ["still TODO: it has no body"]
            elif name in JUDGED:
                answer |= {key: value for key, value in judge(name).items() if value is not None}
            else:
                answer |= {"status": "not judged", "notes": [f"{sign} (line {line})" for line, sign in trouble[name]]}
            answer["cell"] = read.functions[name].cell
        elif unread and name in NOT_JUDGED:
            answer |= {"status": "not judged", "line": unread.line, "cell": unread.cell,
                       "notes": [f"it cannot be read: {unread.message}: {unread.text}"]}
        elif unread:
            answer |= {"status": "raises", "line": unread.line}
            answer["got"] = f"SyntaxError: {unread.message}: {unread.text}"
            if "TODO" in unread.piece and re.search("TODO|=$|= *#|^def|^$", unread.text):
                answer |= {"status": "missing", "got": None, "notes": [f"still TODO: {unread.text}".strip(": ")]}
            answer["cell"] = unread.cell
        else:
            inner = [node for statement in read.statements for node in ast.walk(statement)
                     if isinstance(node, ast.FunctionDef) and node.name == name]
            answer["notes"] = [f"there is one inside of another definition (line {node.lineno})" for node in inner]
        found[name] = answer
    return found, read.unread


def sentence(name, verdict):
    """What is wrong, in words."""
    said = verdict["got"]
    if verdict["status"] == "wrong":
        mistakes = (verdict["mistake"] or "").split(" + ")
        said = "; ".join(MEANING.get(f"{name}: {mistake}", MEANING.get(mistake, mistake)) for mistake in mistakes)
        said = said or "it equals none of the usual mistakes"
        said += ". Expected {}, got {}".format(*shown(verdict["expected"], verdict["got"]))
    return f"{name}: {said} ({place(verdict)})"


def place(verdict):
    """Where a function stands. Lines of a notebook are counted in each code cell, and code cells from 1."""
    return f"code cell {verdict['cell']}, line {verdict['line']}" if verdict["cell"] else f"line {verdict['line']}"


def shown(*values):
    """-> each value as text; of lists what stands around the first place in which they differ."""
    if all(isinstance(value, list) for value in values):
        place = next((i for i, both in enumerate(zip(*values, strict=True)) if both[0] != both[1]), 0)
        first = max(0, place - 2)
        parts = [", ".join(f"{x:+.3f}" if isinstance(x, float) else str(x) for x in value[first : first + 8])
                 for value in values]
        return [f"[{'..., ' * (first > 0)}{part}{', ...' * (len(values[0]) > first + 8)}]" for part in parts]
    return [f"{value:+.3f}" if isinstance(value, float) else str(value) for value in values]


def report(path, found, unread):
    """-> lines of text."""
    width = max(map(len, found))
    yield f"{path}"
    yield ""
    for name, verdict in found.items():
        signs_seen = f"look: {len(verdict['notes'])} sign(s) of trouble"
        said = signs_seen if verdict["status"] == "not judged" and verdict["notes"] else verdict["mistake"] or ""
        yield f"  {name:<{width}}  {verdict['status']:<10}  {said}".rstrip()
    for name, verdict in found.items():
        if verdict["status"] in ("wrong", "raises"):
            yield ""
            yield sentence(name, verdict)
        elif verdict["notes"]:
            yield ""
            yield f"{name}: {verdict['status']}"
        yield from (f"    - {note}" for note in verdict["notes"])
    for part in (part for part in unread if not part.functions):
        yield ""
        yield f"{place(part._asdict())}: cannot be read, the rest was: {part.message}: {part.text}"
    counts = Counter(verdict["status"] for verdict in found.values())
    yield ""
    yield ", ".join(f"{count} {status}" for status, count in counts.items())
    if counts["missing"] == len(found):
        yield "None of the course's functions is there: is this the right file?"


def main(argv=None):
    description, _, more = __doc__.partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=more, formatter_class=style)
    parser.add_argument("solution", type=Path, help="a .py export of the course's notebook, or the .ipynb itself")
    parser.add_argument("--json", action="store_true", help="print the verdicts as one JSON object")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a function may take (%(default)s)")
    args = parser.parse_args(argv)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(parse.HERE)}  # for the children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that they are stopped
    sys.stdout.reconfigure(errors="replace")  # for ‖ where the terminal has none
    try:
        found, unread = check(args.solution, args.limit)
    except (OSError, ValueError) as error:
        print(f"check.py: error: {args.solution}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    if args.json:
        for verdict in found.values():
            verdict["notes"] += [place(verdict)] * bool(verdict["cell"])
            del verdict["cell"]
        print(json.dumps({"functions": found}, indent=1))
    else:
        print(*report(args.solution, found, unread), sep="\n")
    return int(any(verdict["status"] in ("wrong", "raises") for verdict in found.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("check.py: interrupted")
    except BrokenPipeError:  # | head
        os._exit(1)
