"""What check.py found, in words: the report on a file, the table of many, as CSV and as JSON. Plain Python."""

import csv
import io
import json
import shutil
from collections import Counter

from course.wording import MEANING

HEADINGS = {"compute_reward_for_mini_batch": "reward", "compute_reinforce_loss": "reinforce",
            "compute_kl_divergence": "KL", "compute_DPO_loss": "DPO", "_get_batch_logps": "batch_logps",
            "create_labels_from_attention_mask": "labels"}  # of the judged ones; the loops are one column
NARROWEST = 100  # columns of the table, at least


def escaped(text):
    """The text with everything escaped that a terminal would obey: names and texts of solutions are strangers'."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in str(text))


def counted(number, word):
    return f"{number} {word}{'s' * (number != 1)}"


# ---- a file ------------------------------------------------------------------------------------------------


def sentence(name, verdict):
    """What is wrong, in words; None if nothing is."""
    if verdict["status"] not in ("wrong", "raises"):
        return None
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
        place = next((i for i, both in enumerate(zip(*values, strict=False)) if both[0] != both[1]), 0)
        first = max(0, place - 2)
        parts = [", ".join(f"{x:+.3f}" if isinstance(x, float) else str(x) for x in value[first : first + 8])
                 for value in values]
        return [f"[{'..., ' * (first > 0)}{part}{', ...' * (len(values[0]) > first + 8)}]" for part in parts]
    return [f"{value:+.3f}" if isinstance(value, float) else str(value) for value in values]


def report(row):
    """Checked -> lines on one file."""
    yield row.path
    yield ""
    if row.error:
        yield f"It cannot be read: {row.error}"
        return
    width = max(map(len, row.found))
    for name, verdict in row.found.items():
        said = verdict["mistake"] or ""
        if verdict["status"] == "not judged" and verdict["notes"]:
            said = "see below" if name in HEADINGS else f"look: {counted(len(verdict['notes']), 'sign')} of trouble"
        yield f"  {name:<{width}}  {verdict['status']:<10}  {said}".rstrip()
    for name, verdict in row.found.items():
        said = sentence(name, verdict)
        if said or verdict["notes"]:
            yield from ("", said or f"{name}: {verdict['status']}")
        yield from (f"    - {note}" for note in verdict["notes"])
    for part in (part for part in row.unread if not part.functions):
        yield ""
        yield f"{place(part._asdict())}: cannot be read, the rest was: {part.message}: {part.text}"
    counts = Counter(verdict["status"] for verdict in row.found.values())
    yield ""
    yield ", ".join(f"{count} {status}" for status, count in counts.items())
    if counts["missing"] == len(row.found):
        yield "None of the course's functions is there: is this the right file?"


# ---- many files --------------------------------------------------------------------------------------------


def kinds(verdict):
    """-> list of what a verdict counts as: its mistakes, the kind of its error, the signs to look at."""
    if verdict["status"] == "wrong":
        return (verdict["mistake"] or "none of the usual mistakes").split(" + ")
    if verdict["status"] == "raises":
        return [verdict["mistake"] or verdict["got"].partition(":")[0]]
    notes = verdict["notes"] if verdict["status"] == "not judged" else ()
    return list(dict.fromkeys(f"look: {note.partition(':')[0]}" for note in notes))


def in_cell(verdict):
    """What stands in a table: the mistakes, or the status, with a star where there are notes on what is right."""
    star = "*" if verdict["status"] == "right" and verdict["notes"] else ""
    return " + ".join(kinds(verdict)) or verdict["status"] + star


def mistakes(rows):
    """-> list of {"mistake", "function", "files"}: what went wrong in which files, the most frequent first."""
    found = {}
    for row in rows:
        for function, verdict in row.found.items():
            for kind in kinds(verdict):
                found.setdefault((kind, function), []).append(row.path)
    frequent = sorted(found.items(), key=lambda each: -len(each[1]))
    return [{"mistake": kind, "function": function, "files": paths} for (kind, function), paths in frequent]


def overview(rows):
    """List of Checked -> lines: a row a file, a column a function, and what went wrong in how many."""
    lines = [["", *HEADINGS.values(), "loops"]]
    for row in rows:
        signs = sum(len(verdict["notes"]) for name, verdict in row.found.items() if name not in HEADINGS)
        cells = [*(in_cell(row.found[name]) for name in HEADINGS if row.found), counted(signs, "sign") if signs else ""]
        lines.append([row.path, row.error] if row.error else [row.path, *cells])
    yield from aligned(lines, max(NARROWEST, shutil.get_terminal_size((1000, 0)).columns))  # in a file as it is
    yield ""
    if any(cell == "right*" for line in lines for cell in line):
        yield "right*: right, with a note, which the report on that file alone has, and its page of --feedback"
        yield ""
    for each in mistakes(rows):
        where = f"{counted(len(each['files']), 'file')}: {', '.join(each['files'])}"
        yield f"{each['mistake']} in {each['function']}: {where}"


def aligned(rows, width):
    """Rows of texts -> lines in columns, of that width at most. A row that is shorter than the first is not cut."""
    rows = [[escaped(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) == len(rows[0])), strict=True)]
    widths[0] = min(max(len(row[0]) for row in rows), 36)
    while sum(widths) + 2 * len(widths) > width:
        widths[widths.index(max(widths[1:]), 1)] -= 1  # the widest column gives way
    for row in rows:
        limits = widths if len(row) == len(widths) else [widths[0], *map(len, row[1:])]
        cells = [f"{text if len(text) <= room else text[: room - 1] + '…':<{room}}"
                 for text, room in zip(row, limits, strict=True)]
        yield "  ".join(cells).rstrip()


def as_csv(rows):
    """List of Checked -> text as in RFC 4180. A cell that a spreadsheet would take for a formula gets a ' in front."""
    functions = next((list(row.found) for row in rows if row.found), [])
    lines = [["file", *functions, "error"]]
    for row in rows:
        lines.append([row.path, *(in_cell(row.found[name]) if row.found else "" for name in functions), row.error])
    text = io.StringIO()
    for line in lines:
        cells = [escaped(each or "") for each in line]
        csv.writer(text).writerow(["'" * cell.startswith(("=", "+", "-", "@")) + cell for cell in cells])
    return text.getvalue()


def as_json(rows, many):
    """List of Checked -> text: {"functions": ...} of one file, {"files": ..., "mistakes": ...} of many."""
    held = {}
    for row in rows:
        functions = {name: verdict | {"sentence": sentence(name, verdict)} for name, verdict in row.found.items()}
        held[row.path] = {"error": row.error} if row.error else {"functions": functions}
    return json.dumps({"files": held, "mistakes": mistakes(rows)} if many else held[rows[0].path], indent=1)
