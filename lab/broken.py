"""Training runs with something wrong in them, drawn beside the healthy one: to know a disease when you see it.

    make broken     # makes the runs, in the toy world, then the figures and this table

The runs in `broken/` are named for what is wrong; alpha-0.1 and beta-0.1 beside it are the healthy ones. What a
broken run says of itself may be wrong, too, so in `broken-measured/` its policy is evaluated again without the mistake.
Plain Python, loads no torch.
"""

import io
import itertools
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import plot
from report.tables import digits, table, with_error
from support.command import launch
from support.errors import UserError
from report.run_folders import load_runs

HEALTHY = {"alpha": "alpha-0.1", "beta": "beta-0.1"}  # the flag that tells the methods apart -> the healthy run
KL_FREE = "alpha-0"  # the demo has it already: no price for the KL
FIGURES = {"alpha": "reinforce", "beta": "dpo"}
LABELS = {KL_FREE: "no KL (alpha 0)", "lr-5e-3": "lr ten times too high"}  # others: the name without its dashes
REINFORCE_PANELS = (("reward", "reward of the batch"), ("kl", "KL as logged, nats"), ("grad_norm", "gradient's norm"))
COLOURS, GREY = plot.COLOURS[:7], plot.COLOURS[7]  # grey, and broad, is the healthy run
LOGRATIOS = (("chosen_logratio", "-"), ("rejected_logratio", "--"))


def coloured(healthy, broken):
    """Yields each run with its colour and label; the healthy one first, so that it lies below."""
    yield healthy, GREY, f"healthy ({healthy.name})"
    for run, colour in zip(broken, itertools.cycle(COLOURS), strict=False):
        yield run, colour, LABELS.get(run.name, run.name.removeprefix("dpo-").replace("-", " "))


def broad_if_healthy(axes, run, key, colour, label=None, style="-"):
    plot.curve(axes, run, key, colour, label, faint=False, style=style)
    if colour == GREY:
        axes.lines[-1].set(linewidth=6, alpha=0.6)


def broken_reinforce(healthy, broken):
    """Reward, KL and the gradient's norm against the step."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for run, colour, label in coloured(healthy, broken):
        for axes, (key, name) in zip(panels, REINFORCE_PANELS, strict=True):
            broad_if_healthy(axes, run, key, colour, label)
            axes.set(xlabel="step", ylabel=name)
    panels[0].set_ylim(0, 1)
    panels[1].set_yscale("symlog", linthresh=1)  # even from -1 to 1 nat, logarithmic outside
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_formatter("{x:g}")
    return figure


def broken_dpo(healthy, broken, measured):
    """Loss, accuracy and log-ratios against the step, and what no log of DPO's has: the reward on the test prompts."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 4)
    for place, (run, colour, label) in enumerate(coloured(healthy, broken)):
        broad_if_healthy(panels[0], run, "loss", colour, label)
        broad_if_healthy(panels[1], run, "accuracy", colour)
        for key, style in LOGRATIOS:
            broad_if_healthy(panels[2], run, key, colour, style=style)
        result = measured.get(run.name, run).result
        panels[3].errorbar(result["reward"], -place, xerr=2 * result["reward_se"], fmt="o", color=colour, capsize=3)
        panels[3].annotate(digits(result["reward"], 2), (result["reward"], -place), (0, 6), ha="center",
                           textcoords="offset points", fontsize=9)
    panels[0].axhline(math.log(2), color="grey", linestyle=":", linewidth=1)
    panels[0].set(xlabel="step", ylabel="loss as logged (dotted: ln 2)")
    panels[1].set(xlabel="step", ylabel="accuracy as logged", ylim=(0.4, 1.02))
    panels[2].set(xlabel="step", ylabel="log-prob less the original's, nats")
    panels[2].set_title("solid: chosen, dashed: rejected", fontsize=10)
    panels[3].set(xlabel="test reward, ± 2 standard errors", yticks=[], xlim=(0, 1), ylim=(0.6 - len(broken) - 1, 0.6))
    return figure


def save(figure, path):
    """With its legend, as a PNG of 128 colours, a quarter of the size."""
    title, named = f"mean of up to {plot.WINDOW} steps", figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, title=title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def run_rows(found, measured):
    """A row of the table for each run. Logged: the mean of the last steps, by the run itself."""
    for run in found:
        result = measured.get(run.name, run).result
        last = [row for row in run.metrics if "step" in row][-plot.WINDOW :]
        logged = {f"{key}, logged": digits(sum(row[key] for row in last) / len(last), 2)
                  for key in ("reward", "kl", "accuracy", "margin") if key in last[0]}
        yield {"run": f"`{run.name}`", **logged, "test loss, its own": digits(run.result.get("test_loss"), 3),
               "reward": with_error(result, "reward", 3), "KL, nats": with_error(result, "kl", 2),
               "n": f"{result['n']:,}", "distinct-2": digits(result["distinct_2"], 3)}


def main(folder="runs/toy"):
    folder = Path(folder)
    healthy, broken = {run.name: run for run in load_runs(folder)}, load_runs(folder / "broken")
    broken = [healthy[KL_FREE], *broken] if KL_FREE in healthy else broken
    measured = {run.name: run for run in load_runs(folder / "broken-measured") if run.result}
    for flag, name in HEALTHY.items():
        own, some = healthy.get(name), [run for run in broken if flag in run.flags]
        if broken and not some:  # with BROKEN_DPO= there are none of that kind
            continue
        if not own or not some or not all(run.result for run in (own, *some)):
            raise UserError(f"{folder} lacks {name}, or finished runs in broken/: make broken makes them")
        figure = broken_reinforce(own, some) if flag == "alpha" else broken_dpo(own, some, measured)
        save(figure, folder / f"broken-{FIGURES[flag]}.png")
        print("\n".join(table(list(run_rows([own, *some], measured)))))
    print(f"{folder}/broken-*.png are the figures")


if __name__ == "__main__":
    launch(lambda: main(*sys.argv[1:]))
