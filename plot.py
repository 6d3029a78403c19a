"""Figures and a table of all runs in a folder; an unfinished run is drawn as far as it is.

    python plot.py runs/course        # writes reinforce.png, dpo.png and summary.txt beside the runs

reinforce.png: reward and KL of each batch against the step. dpo.png: training loss of each batch, test loss
after each epoch, and ln 2, where every DPO run starts. Faint: each step. Strong: mean over 25 steps, or fewer
in a short run. summary.txt: the finished runs' results, and the same prompts continued by every policy.
"""

import argparse
import contextlib
import json
import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

import runs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
WINDOW = 25  # steps in the running mean
PROMPTS = 3  # in summary.txt


def running_mean(steps, values, window=WINDOW):
    """Mean over each full window, with the step in the window's middle; short runs have a shorter window."""
    window = max(1, min(window, len(values) // 4))
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.convolve(steps, np.ones(window) / window, mode="valid"), means


def draw(axes, rows, key, colour, label):
    """One metric of one run against the step."""
    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(*running_mean(steps, values), color=colour, linewidth=1.8, label=label)


def reinforce_figure(found):
    """{run's name: rows} -> a figure of reward and KL, all runs in both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, rows), colour in zip(found.items(), COLOURS * len(found), strict=False):
        draw(left, rows, "reward", colour, name)
        draw(right, rows, "kl", colour, name)
    left.set(xlabel="step", ylabel="reward, P(positive), mean of the batch", ylim=(0, 1))
    right.set_yscale("symlog", linthresh=1)  # even up to 1 nat, logarithmic above: a collapse is 100 nats away
    right.set(xlabel="step", ylabel="KL to the original, nats per completion", ylim=(0, None))
    right.yaxis.set_major_formatter("{x:g}")
    left.legend(loc="lower right")
    return figure


def dpo_figure(found):
    """{run's name: rows} -> a figure of training and test loss, one panel a run, all to the same scale."""
    size = {"figsize": (5 * len(found), 3.8), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(found), squeeze=False, sharey=True, **size)
    for (name, rows), axes, colour in zip(found.items(), panels[0], COLOURS * len(found), strict=False):
        trained = [row for row in rows if "step" in row]
        if trained:
            draw(axes, trained, "loss", colour, "training (faint: each batch)")
        done = [sum("step" in before for before in rows[:i]) for i, row in enumerate(rows) if "epoch" in row]
        tested = [row["test_loss"] for row in rows if "epoch" in row]
        axes.plot(done, tested, "o", color="black", label="test, after each epoch")
        axes.axhline(math.log(2), color="grey", linestyle="--", linewidth=1, label="ln 2: policy = reference")
        axes.set(xlabel="step", ylabel="DPO loss", title=name)
        axes.legend(loc="lower left")
    return figure


def finished_runs(folder):
    """-> {run's name: its flags and its results} of the runs with an eval.json: baseline, REINFORCE, DPO."""
    found = {}
    for path in folder.glob("*/eval.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a folder that is no run's
            config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
            found[path.parent.name] = config["flags"] | json.loads(path.read_text(encoding="utf-8"))

    def place(item):
        flags = item[1]
        return "beta" in flags, flags.get("beta", flags.get("alpha", -1)), item[0]

    return dict(sorted(found.items(), key=place))


def method(flags):
    """A run's flags -> what was done, in words."""
    if "beta" in flags:
        return "DPO"
    if "alpha" in flags:
        return "REINFORCE, leave-one-out" if flags["advantage"] == "loo" else "REINFORCE"
    original = flags["reference"] or runs.COURSE["policy"]
    return "untouched" if flags["policy"] == original else "evaluated"


def table(found):
    """{run's name: flags and results} -> lines of text with the columns aligned."""
    rows = [("run", "method", "test reward", "n", "KL, nats", "distinct-2", "test loss")]
    for name, run in found.items():
        reward = f"{run['reward']:.3f}" + (f" ± {run['reward_se']:.3f}" if run["reward_se"] is not None else "")
        numbers = [f"{run[key]:.{digits}f}" if run.get(key) is not None else "" for key, digits in
                   (("kl", 2), ("distinct_2", 3), ("test_loss", 3))]
        rows.append((name, method(run), reward, str(run["n"]), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def side_by_side(found, width=110):
    """The first test prompts, each continued by every policy of `found`: lines of text."""
    control = {code: " " for code in (*range(32), *range(127, 160))}  # a terminal would obey these characters
    prompts = [sample["prompt"] for sample in next(iter(found.values()))["samples"][:PROMPTS]]
    indent = max(map(len, found))
    lines = []
    for prompt in prompts:
        lines += ["", f'"{prompt.translate(control)}" ...']
        for name, run in found.items():
            for sample in run["samples"]:
                if sample["prompt"] == prompt:
                    start = f"  {name:{indent}}  {sample['reward']:.2f}  "
                    text = start + sample["completion"].translate(control).strip()
                    lines += textwrap.wrap(text, width, subsequent_indent=" " * len(start))
    return lines


def main(argv=None):
    flags = runs.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path, help="the folder that holds the runs")
    folder = flags.parse_args(argv).folder
    if not folder.is_dir():
        raise runs.UserError(f"there is no folder {folder}")
    logs = {path.parent.name: runs.read_rows(path) for path in sorted(folder.glob("*/metrics.jsonl"))}
    having = {key: {name: rows for name, rows in logs.items() if rows and key in rows[0]} for key in ("kl", "epoch")}
    kinds = {"reinforce.png": (reinforce_figure, having["kl"]), "dpo.png": (dpo_figure, having["epoch"])}
    found = finished_runs(folder)
    if not found and not any(some for _, some in kinds.values()):
        raise runs.UserError(f"{folder} has no run: no folder in it holds an eval.json or a metrics.jsonl with rows")
    for name, (figure_of, some) in kinds.items():
        if some:
            figure_of(some).savefig(folder / name, dpi=150)
            print(f"{folder / name}: {', '.join(some)}")
    if found:
        summary = "\n".join([*table(found), *side_by_side(found)]) + "\n"
        runs.write_whole(folder / "summary.txt", summary)
        print(f"{folder / 'summary.txt'}:\n\n{summary}", end="")


if __name__ == "__main__":
    runs.launch(main)
