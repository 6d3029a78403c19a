"""Says what is right and what is wrong in solutions of the course, function by function.

    make check SOLUTION=A3.ipynb                        or a folder: a table, a row a file
    python -m course.check folder/ --feedback pages/    and a page for each

The functions are found by the course's names and called on cases known on paper (the files judge_*.py). A
wrong answer is compared with what each usual mistake would give (explain.py), and named after it. A file is not run
as a whole (parse.py), but its functions are: a stranger's code runs with your rights, in a child process for each
function, with a time limit (judging.py). That stops accidents, not malice.
Exit code 1: a function is wrong or raises, or one of many files cannot be read; 2: nothing can be read.
"""

import ast
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from course import judging, loop_signs, pages, parse
from support import command, files

JUDGED = tuple(pages.HEADINGS)
NOT_JUDGED = ("evaluate", "train", "get_log_probs", "train_DPO")
LIMIT = 10  # seconds: ten times what a function takes


class Checked(NamedTuple):
    path: Path
    found: dict  # name of a function -> verdict: a dict of status, mistake, expected, got, line, cell, notes
    unread: list  # parse.Unread: text with a syntax error
    error: str | None  # why the file cannot be read; nothing is found then


class Opened(NamedTuple):
    """A file that is being checked."""

    path: Path
    read: parse.Solution | None
    error: str | None
    answers: dict  # name of a function -> what child.judged() says
    waiting: set  # names of functions that are still to be judged


# ---- verdicts ----------------------------------------------------------------------------------------------


def checked(paths, limit=LIMIT):
    """Yields a Checked for each path, in this order. limit: seconds that a function may take."""
    opened = [opened_solution(path) for path in paths]
    jobs = [(file, name) for file in opened for name in JUDGED if name in file.waiting]
    with contextlib.closing(judging.judge_all(jobs, limit)) as results:
        for file in opened:
            new = bool(file.waiting)
            while file.waiting:
                (other, name), answer = next(results)
                other.waiting.remove(name)
                other.answers[name] = answer
            if new:
                judging.keep(file.read, file.path, file.answers)
            found = verdicts(file.read, file.answers) if file.read else {}
            yield Checked(file.path, found, file.read.unread if file.read else [], file.error)


def opened_solution(path):
    """-> Opened. Nothing of it is executed yet."""
    try:
        read = parse.read_solution(path)
        answers = judging.known(read, path)
        return Opened(path, read, None, answers, written(read) - answers.keys())
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        return Opened(path, None, getattr(error, "strerror", None) or str(error) or "nested too deeply", {}, set())


def written(read):
    """-> set of names of the functions that can be judged: there, and with a body."""
    return {name for name in JUDGED if name in read.functions and not has_no_body(read.functions[name])}


def has_no_body(function):
    """True for a body of nothing but a docstring, pass, ... or NotImplementedError."""
    body = [node for node in function.node.body
            if not isinstance(node, ast.Pass) and not isinstance(getattr(node, "value", None), ast.Constant)]
    return all(isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node) for node in body)


def verdicts(read, answers):
    """Solution, {name: what child.judged() says} -> {name: verdict} for all of the course's functions."""
    signs = loop_signs.of({name: function.node for name, function in read.functions.items()}, read.statements)
    return {name: verdict_on(name, read, answers.get(name, {}), signs) for name in (*JUDGED, *NOT_JUDGED)}


def verdict_on(name, read, answer, signs):
    """-> the verdict on one function. signs: {name: [(line, sign)]} of those that are not judged."""
    verdict = dict.fromkeys(("mistake", "expected", "got", "line", "cell")) | {"status": "missing", "notes": []}
    function, unread = read.functions.get(name), [part for part in read.unread if name in part.functions]
    if function:
        verdict |= {"line": function.node.lineno, "cell": function.cell}
        if has_no_body(function):
            verdict["notes"] = ["still TODO: it has no body"]
        elif name in JUDGED:
            verdict |= {key: value for key, value in answer.items() if value is not None}
        else:
            notes = [f"{sign} ({pages.place(verdict | {'line': line})})" for line, sign in signs[name]]
            verdict |= {"status": "not judged", "notes": notes}
    elif unread:
        part = unread[0]
        verdict |= {"line": part.line, "cell": part.cell}
        if "TODO" in part.piece and re.search("TODO|=$|= *#|^def|^$", part.text):
            verdict["notes"] = [f"still TODO: {part.text}".strip(": ")]
        elif name in JUDGED:
            verdict |= {"status": "raises", "got": f"SyntaxError: {part.message}: {part.text}"}
        else:
            verdict |= {"status": "not judged", "notes": [f"it cannot be read: {part.message}: {part.text}"]}
    return verdict


# ---- the command -------------------------------------------------------------------------------------------


def search(path):
    """A file or folder -> paths of the .py and .ipynb files there, without hidden ones; those in subfolders last."""
    os.stat(path)  # is it there?
    if not os.path.isdir(path):
        return [path]
    found = [file for file in Path(path).rglob("*") if file.suffix.lower() in (".py", ".ipynb")
             and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)]
    if not found:
        raise ValueError(f"{path}: there is no .py and no .ipynb in it")
    return [str(file) for file in sorted(found, key=lambda file: (len(file.parts), file))]


def write_feedback(folder, name, row):
    """A page with the sentences on one file."""
    page = folder / f"{name}.txt"
    page.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(page, "\n".join([*map(pages.escaped, pages.report(row)), ""]))


def main(argv=None):
    parser = command.bare_flags(__doc__)
    parser.add_argument("solution", nargs="+", type=Path, help="a .py export of the course's notebook, the .ipynb "
                        "itself, or a folder with any number of them")
    parser.add_argument("--feedback", type=Path, metavar="DIR", help="write a page for each file there")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--csv", action="store_true", help="print a table for a spreadsheet; what would be a formula "
                        "there gets a ' in front")
    either.add_argument("--json", action="store_true", help="print the verdicts as one JSON object")
    parser.add_argument("--limit", type=command.positive, default=LIMIT, metavar="S",
                        help="seconds that a function may take (%(default)s)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are stopped
    sys.stdout.reconfigure(errors="replace")  # for ‖ where the terminal has none
    given = [os.path.abspath(path) for path in args.solution]
    many = len(given) > 1 or os.path.isdir(given[0])
    try:
        paths = [Path(path) for path in dict.fromkeys(found for path in given for found in search(path))]
        base = os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in given])
        if args.feedback:
            args.feedback.mkdir(parents=True, exist_ok=True)
        rows = []
        with contextlib.closing(checked(paths, args.limit)) as results:
            for row in results:
                name = os.path.relpath(row.path, base)
                rows.append(row._replace(path=name if many else str(args.solution[0])))
                if many and sys.stderr.isatty():
                    print(f"\r{len(rows)} of {len(paths)} files", end="\n" * (len(rows) == len(paths)), file=sys.stderr)
                if args.feedback:
                    write_feedback(args.feedback, name, rows[-1])
        if rows[0].error and not many:
            raise ValueError(f"{rows[0].path}: {rows[0].error}")
    except (OSError, ValueError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"check.py: error: {pages.escaped(said)}", file=sys.stderr)
        return 2
    if args.json:
        print(pages.as_json(rows, many))
    elif args.csv:
        print(pages.as_csv(rows), end="")
    else:
        print(*map(pages.escaped, pages.overview(rows) if many else pages.report(rows[0])), sep="\n")
    statuses = {verdict["status"] for row in rows for verdict in row.found.values()}
    return int(bool(statuses & {"wrong", "raises"}) or any(row.error for row in rows))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("check.py: interrupted", file=sys.stderr)
        sys.exit(130)
