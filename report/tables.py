"""The lines of Markdown that report.py makes of runs: numbers, tables, what is missing, texts. Loads no torch."""

import math
import re
import textwrap
from pathlib import Path

import numpy as np

from support.command import COURSE
from support.files import plain

# ---- numbers -----------------------------------------------------------------------------------------------


def digits(value, places):
    return "" if value is None else f"{value:.{places}f}"


def short(number):
    """0.02 and 5e-7, as one writes them."""
    return np.format_float_scientific(number, trim="-", exp_digits=1) if 0 < number < 1e-3 else f"{number:g}"


def plus_minus(mean, error, places, sign=""):
    """A mean with its standard error, where there is one, of which at least one digit is to be seen."""
    if error is None:
        return f"{mean:{sign}.{places}f}"
    places = max(places, min(4, math.ceil(-math.log10(error))) if error > 1e-9 else 0)  # below: rounding, all are equal
    return f"{mean:{sign}.{places}f} ± {error:.{places}f}"


def with_error(result, key, places):
    return plus_minus(result[key], result.get(key + "_se"), places)


def spread(values, places):
    """Mean (lowest to highest)."""
    low, high = min(values), max(values)
    return f"{sum(values) / len(values):.{places}f} ({low:.{places}f} to {high:.{places}f})"


def table(rows, name=None):
    """List of dicts -> lines of a Markdown table, aligned so that it can be read as it stands.

    A column is there if any row has something in it. Under a `name`, README can have the same table.
    """
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    cells = [columns, *([row.get(key, "").replace("|", "\\|") for key in columns] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return ["", *([f"<!-- {name} -->", *lines, "<!-- end -->"] if name else lines), ""]


def make_command(found, folder):
    """-> make(target), the command for more runs like those in this folder; make(name, one=True): for one run."""
    policies = {Path(run.flags["policy"]) for run in found if run.method != "evaluated"}
    toy = any((path.parent / "world.json").exists() or path == Path("build/toy/policy") for path in policies)
    settings = "" if folder == Path("runs/toy" if toy else "runs/course") else f" RUNS={folder}"

    def shared(key, usual):
        values = {run.flags[key] for run in found if key in run.flags and run.k == 1}
        return values.pop() if len(values) == 1 and values != {usual} else None

    inputs = {} if toy else {key.upper(): shared(key, usual) for key, usual in COURSE.items()}
    settings += "".join(f" {name}={value}" for name, value in inputs.items() if value)
    more = {key: shared(key, usual) for key, usual in (("limit", None), ("eval_limit", None), ("seed", 0))}
    more = [f"--{key.replace('_', '-')} {value}" for key, value in more.items() if value is not None]
    settings += f' FLAGS="{" ".join(more)}"' if more else ""

    def make(target, one=False):
        goal = f"{folder}/{target}/eval.json" if one else target
        if toy:
            goal = f"demo MORE={target}" if one else f"demo-{target}"
        return f"make {goal}{settings}"

    return make


def brief(run, **more):
    """The start of a run's row in a table."""
    return {"run": f"`{run.name}`", **more, "reward": with_error(run.result, "reward", 3),
            "KL, nats": with_error(run.result, "kl", 2)}


def beside(name, own, target="", student=""):
    """The assignment's target, the student's number and ours, one below the other."""
    rows = [{"": "the assignment's target", name: target}] if target else []
    rows += [{"": "a student's report (DistilGPT2; theirs)", name: student}] if student else []
    rows += [{"": f"here, `{run.name}`", name: value, "method": run.method, "policy": inline(run.flags["policy"]),
              "lr": short(run.flags["lr"]) if run.flags.get("lr") else ""} for run, value in own]
    return table(rows)


def what_lacks(found, expected, make):
    """What is not there, or not finished: a line each, and how to make it."""
    names = [run.name for run in found]
    missing = ", ".join(f"`{name}`" for name in dict.fromkeys(expected) if name not in names)
    lines = [f"`{run.name}` is not finished: it is drawn as far as it is" for run in found if not run.result]
    for run in found:
        lacks = [] if run.completions or not run.result else ["completions.jsonl, so no measures of its text"]
        lacks += [] if run.metrics or not {"alpha", "beta"} & set(run.flags) else ["metrics.jsonl, so no curve"]
        lines += [f"`{run.name}` has no {file}: remove its folder to have it made again" for file in lacks]
    lines += [f"not here: {missing}"] if missing else []
    if missing or not all(run.result for run in found):
        lines += [f"to make one of these: `{make('NAME', one=True)}`; all of the sweep: `{make('sweep')}`"]
    return [f"- {line}" for line in lines]


def made_with(found):
    """Hardware, precisions, versions and commits of the runs, each once."""
    things = {(0, run.about.get("hardware") or run.about.get("device")) for run in found}
    things |= {(1, run.about.get("precision")) for run in found}
    for name in ("torch", "transformers"):
        things |= {(2, f"{name} {run.about['versions'][name]}") for run in found if "versions" in run.about}
    commits = [re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}", r"\1", run.about.get("commit") or "") for run in found]
    things |= {(3, f"commit {commit}") for commit in commits if commit}
    return "Made with " + ", ".join(thing for _, thing in sorted(pair for pair in things if pair[1])) + "."


# ---- texts that came out of a model ------------------------------------------------------------------------


def inline(text):
    """The text as Markdown shows it within a line, obeying nothing in it."""
    return re.sub(r"([^\w\s.,;:?'\"/])", r"\\\1", plain(text))


def block(found, width=116):
    """List of (start of a line, text) -> an indented block, in which Markdown obeys nothing."""
    indent = max(len(start) for start, _ in found)
    lines = [""]
    for start, text in found:
        line = f"    {start:{indent}}  {plain(text)}"
        lines += textwrap.wrap(line, width, subsequent_indent=" " * (6 + indent), break_on_hyphens=False)
    return [*lines, ""]


def generations(run):
    """The completions of the first few test prompts by one run."""
    found = [(digits(sample["reward"], 2), f"{plain(sample['prompt'])} [...] {plain(sample['completion'])}")
             for sample in run.result["samples"]]
    return ["", f"`{run.name}`: P(positive) and text; what follows [...] is the policy's:", *block(found)]


def side_by_side(finished, prompts=None):
    """The same prompts (the first few of them), each continued by every run's policy."""
    lines, width = [], max((len(run.name) for run in finished), default=0)
    for first in finished[0].result["samples"][:prompts] if finished else ():
        rows = [(f"{run.name:{width}} {sample['reward']:.2f}", sample["completion"]) for run in finished
                for sample in run.result["samples"] if sample["prompt"] == first["prompt"]]
        lines += ["", f"**{inline(first['prompt'])}** ...", *block(rows)]
    return lines
