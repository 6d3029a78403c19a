"""Lays a solution of the course beside the reference, function by function, with check's verdict over each.

    make diff SOLUTION=A3.ipynb                            # or A3.py; of a folder, a table
    python -m course.compare --html page.html A3.ipynb     # a page to send; of a folder, a folder of pages

Classes and settings that both files have are compared as well. A stranger's code runs: check calls the functions.
"""

import ast
import html
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from course import check, pages, parse
from support import command, errors, files

REFERENCE = parse.HERE / "course" / "A3.py"
ASIDE = ("Set aside are comments, docstrings, annotations, formatting and the order of definitions. A difference is no "
         "mistake by itself: wrong is what check finds when it calls the functions.")
TOP_LEVEL = "at the top level"
NAMES = (*check.JUDGED, *check.NOT_JUDGED)


class Part(NamedTuple):
    """A function, or something else of the top level that both files have and that differs."""

    name: str
    said: str  # its place in the solution, the verdict, and how many lines differ, or which file alone has it
    cell: str  # the same for a table, in a few letters
    wrong: bool
    remarks: list  # the verdict in sentences
    differ: int  # how many rows, if both files have it
    rows: list  # as rows_of() has them


# ---- a file to lines ---------------------------------------------------------------------------------------


def bared(tree):
    """The tree less annotations, docstrings, and whatever else is only a constant. Changes it."""
    for part in ast.walk(tree):
        if isinstance(part, ast.arg):
            part.annotation = None
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            part.returns = None
        if isinstance(getattr(part, "body", None), list):
            part.body = [ast.Assign([each.target], each.value, lineno=each.lineno)
                         if isinstance(each, ast.AnnAssign) and each.value else each for each in part.body
                         if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            part.body = part.body or [ast.Pass(lineno=None)]
    return tree


def lines_of(node, text="(nested too deeply to be shown)"):
    """-> pairs, a number and a line, one for each statement; of the text as it stands if the node cannot be written."""
    try:
        tree = bared(ast.Module([node], []))
        written = ast.unparse(tree)
        old, new = ([part for part in ast.walk(each) if isinstance(part, ast.stmt)]
                    for each in (tree, ast.parse(written)))
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # too deep, or an f-string that 3.11 cannot write
        return [(None, line) for line in text.expandtabs(4).split("\n")]
    numbers = {after.lineno: before.lineno for before, after in zip(old, new, strict=False)}
    return [(numbers.get(i), line) for i, line in enumerate(written.split("\n"), 1)]


def definitions_of(path):
    """-> {name: (place, lines)} of functions, and of classes and assignments of the top level."""
    read, found = parse.read_solution(path), {}
    for node in read.statements:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.ClassDef)):
            lines = lines_of(node)
            name = getattr(node, "name", None) or lines[0][1].partition(" = ")[0]
            found[name] = TOP_LEVEL, lines
    return found | {name: (pages.place({"cell": cell, "line": node.lineno}), lines_of(node, text))
                    for name, (node, text, cell) in read.functions.items()}


# ---- two texts, side by side -------------------------------------------------------------------------------


def alike(left, right):
    """True if two lines share half of their words."""
    left, right = set(re.findall(r"\w+", left)), set(re.findall(r"\w+", right))
    return 4 * len(left & right) >= len(left) + len(right)


def line_pairs(theirs, reference):
    """Yields pairs of numbered lines, in order: equal ones, like ones, the rest as it comes; None if there is none."""
    texts, others = ([line for _, line in lines] for lines in (theirs, reference))
    for tag, a, b, c, d in SequenceMatcher(None, texts, others).get_opcodes():
        for i in range(a, b) if tag == "replace" else ():
            j = next((j for j in range(c, min(c + 10, d)) if alike(texts[i], others[j])), None)
            if j is not None:
                yield from itertools.zip_longest(theirs[a:i], reference[c:j])
                yield theirs[i], reference[j]
                a, c = i + 1, j + 1
        yield from itertools.zip_longest(theirs[a:b], reference[c:d])


def marked(left, right):
    """-> for each of two lines its pieces, with True for what the other line, if it is much alike, has otherwise."""
    if not alike(left, right) or len(left + right) > 1000:  # it takes the square of their lengths
        return [(left, False)], [(right, False)]
    left, right = (re.findall(r"\w+| +|.", line) for line in (left, right))
    codes = SequenceMatcher(str.isspace, left, right).get_opcodes()
    return ([("".join(left[a:b]), tag != "equal") for tag, a, b, _, _ in codes if a < b],
            [("".join(right[c:d]), tag != "equal") for tag, _, _, c, d in codes if c < d])


def rows_of(theirs, reference):
    """Yields a mark (that of `diff -y`: one of "|<> "), then for theirs and the reference's a number and pieces."""
    for here, there in line_pairs(theirs, reference):
        (number, left), (other, right) = here or (None, ""), there or (None, "")
        mark = ">" if not here else "<" if not there else " " if left == right else "|"
        left, right = marked(pages.escaped(left), pages.escaped(right))
        yield mark, (number, left), (other, right)


def compared(path, reference, verdicts):
    """-> Parts, in the order of `reference`, as of definitions_of(). verdicts: {name: check's verdict}."""
    parts, solution = [], definitions_of(path)
    for name in dict.fromkeys((*reference, *solution)):
        (place, theirs), (kind, ours) = solution.get(name, ("", [])), reference.get(name, ("", []))
        rows = list(rows_of(theirs, ours))
        count = sum(mark != " " for mark, *_ in rows)
        differ = count if theirs and ours else 0
        if TOP_LEVEL in (place, kind) and not differ:
            continue
        verdict = verdicts.get(name, {"status": "", "notes": []})
        wrong, kinds = verdict["status"] in ("wrong", "raises"), " + ".join(pages.kinds(verdict))
        extent = f"{count} line{'s differ' if count > 1 else ' differs'}" if count else "the same"
        if count > differ:
            extent = f"only in the {'solution' if theirs else 'reference'}"
        said = [place, f"{verdict['status']}: {kinds}".strip(": "), extent]
        cell = f"{f'±{differ}' if differ else 'missing' if count else 'same'} {kinds}".strip()
        remarks = [pages.sentence(name, verdict).removeprefix(f"{name}: ")] if wrong else []
        parts.append(Part(name, ", ".join(filter(None, said)), cell, wrong, remarks + verdict["notes"], differ, rows))
    return parts


# ---- on a terminal, and in a browser -----------------------------------------------------------------------


def in_colour(text, *codes):
    """Bold is 1, underlined 4, yellow 33, magenta 35, cyan 36."""
    return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if codes else text


def wrapped(side, width, *colour):
    """-> lines of `width` columns of a numbered side; what differs is underlined."""
    number, pieces = side
    marks = iter([differs for piece, differs in pieces for _ in piece])
    lines = []
    for text in textwrap.wrap("".join(piece for piece, _ in pieces), width - 5, drop_whitespace=False) or [""]:
        runs = itertools.groupby(zip(text, marks, strict=False), lambda pair: pair[1])
        painted = [in_colour("".join(mark for mark, _ in run), *colour, *[1, 4] * differs) for differs, run in runs]
        lines.append(f"{number or '':>4} {''.join(painted)}" + " " * (width - 5 - len(text)))
        number = None
    return lines


def text_of(parts, width):
    """Yields the lines of a comparison, in colour: side by side, on a narrow terminal one below the other."""
    column = (width - 3) // 2 if width >= 100 else width - 1
    for part in parts:
        yield f"{in_colour(pages.escaped(part.name), 1, *[35] * part.wrong)}: {pages.escaped(part.said)}"
        yield from (f"  {pages.escaped(remark)}" for remark in part.remarks)
        for mark, theirs, reference in part.rows if part.differ else ():
            left = wrapped(theirs, column, *[33] * (mark != " "))
            right = wrapped(reference, column, *[36] * (mark != " "))
            if width >= 100:
                pairs = itertools.zip_longest(left, right, fillvalue=" " * column)
                yield from (f"{one} {mark} {other}" for one, other in pairs)
            else:
                yield from (f"{' ' if mark == ' ' else '-'}{line}" for line in left if mark != ">")
                yield from (f"+{line}" for line in right if mark in "|>")
        yield from [""] * bool(part.differ or part.remarks)


def table_of(results):
    """{path: Parts, or why it cannot be read} -> lists of texts: heads, then a file and a cell for each function."""
    table = [["", *(pages.HEADINGS.get(name, name) for name in NAMES)]]
    for path, parts in results.items():
        cells = {} if isinstance(parts, str) else {part.name: part.cell for part in parts}
        table.append([path, *(cells.get(name, "") for name in NAMES)] if cells else [path, f"cannot be read: {parts}"])
    return table


STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em } summary { margin-top: .6em }
.wrong { font-weight: bold; color: #a3260b } table { border-collapse: collapse } th, td { padding: .2em .5em }
.code { width: 100%; table-layout: fixed; border: 1px solid #ccc; font: 13px/1.4 monospace }
.code td { padding: 0 .5em; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
.code td:not(.theirs, .reference) { width: 2em; color: #666 }
.differs .theirs { background: #fdeed9 } .theirs mark { background: #f7c98b }
.differs .reference { background: #e3eefb } .reference mark { background: #a9cdf5 }
"""


def quoted(text):
    return html.escape(pages.escaped(text))


def page(title, body):
    return (f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{quoted(title)}</title>\n'
            f"<style>{STYLE}</style>\n<h1>{quoted(title)}</h1>\n<p>{ASIDE}</p>\n{body}\n</html>\n")


def page_of(path, parts):
    """-> the page of one solution, whole in itself and without scripts; what is wrong comes first."""
    body = ""
    for part in sorted(parts, key=lambda part: not part.wrong):
        said = f'<span{" class=wrong" * part.wrong}>{quoted(part.name)}: {quoted(part.said)}</span>'
        body += f"<details{' open' * bool(part.differ or part.remarks)}><summary>{said}</summary>\n"
        body += "".join(f"<p>{quoted(remark)}</p>\n" for remark in part.remarks) + "<table class=code>\n"
        body += "<tr><td></td><th>the solution</th><td></td><th>the reference</th></tr>\n" * bool(part.differ)
        for mark, *sides in part.rows:
            body += f"<tr{' class=differs' * (mark != ' ')}>"
            for kind, (number, pieces) in zip(("theirs", "reference"), sides, strict=True):
                text = "".join("<mark>" * differs + quoted(piece) + "</mark>" * differs for piece, differs in pieces)
                body += f"<td>{number or ''}</td><td class={kind}>{text}</td>"
            body += "</tr>\n"
        body += "</table></details>\n"
    return page(f"{Path(path).name} beside the reference", body)


def index_of(table):
    """-> the page of a table, in which the names lead to each file's page."""
    body = "<table>\n"
    for path, *cells in table:
        name = quoted(path)
        if path and len(cells) > 1:
            name = f'<a href="{quote(os.fsencode(path))}.html">{name}</a>'
        span = f" colspan={len(table[0]) - 1}" * (len(cells) == 1)  # why it cannot be read
        body += f"<tr><td>{name}</td>" + "".join(f"<td{span}>{quoted(text)}</td>" for text in cells) + "</tr>\n"
    return page("Solutions beside the reference", f"<p>±4: four lines differ.</p>\n{body}</table>")


# ---- the command -------------------------------------------------------------------------------------------


def main(argv=None):
    parser = command.bare_flags(__doc__)
    parser.add_argument("solution", type=Path, help="a .py, the .ipynb itself, or a folder of them")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="the file to lay beside it (course/A3.py)")
    parser.add_argument("--html", type=Path, help="write a page instead; of a folder, pages in a folder, and a table")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # for ± where the terminal has none
    many, results, written = args.solution.is_dir(), {}, {}
    subject = args.reference  # what an error is about
    try:
        reference = definitions_of(subject)
        subject = args.solution
        for row in list(check.checked([Path(path).absolute() for path in check.search(subject)])):
            name = os.path.relpath(row.path, subject) if many else str(subject)
            results[name] = row.error or compared(row.path, reference, row.found)
            if row.error and not many:
                raise ValueError(row.error)
        subject = args.html
        if subject:
            written = {subject / f"{path}.html" if many else subject: page_of(path, parts)
                       for path, parts in results.items() if not isinstance(parts, str)}
            written |= {subject / "index.html": index_of(table_of(results))} if many else {}
        for path, text in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, text)
    except (OSError, ValueError) as error:
        said = str(getattr(error, "strerror", None) or error).removeprefix(f"{subject}: ")
        raise errors.UserError(f"{subject}: {said}") from None
    if many:
        print(*pages.aligned(table_of(results), 1000), sep="\n")
    elif not written:
        ((name, parts),) = results.items()
        print(pages.escaped(f"{name} beside the reference. {ASIDE}"), end="\n\n")
        lines = text_of(parts, shutil.get_terminal_size().columns)
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            lines = (re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in lines)
        print(*lines, sep="\n")
    if written:
        print("written:", pages.escaped(args.html / "index.html" if many else args.html))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    command.launch(main)
