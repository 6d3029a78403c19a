"""The figures, from run folders: training curves, and test reward against its price in KL.

    python plot.py runs/course    # reinforce.png, dpo.png, dpo-margins.png and frontier.png, beside the runs

Faint: each step; strong: a mean of up to 25. Unfinished runs are drawn as far as they are. Colours: Okabe and Ito's.
"""

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot, which looks for a screen

from report import measures
from report.run_folders import comparable, require_runs, sample_rewards
from report.tables import short
from support.command import bare_flags, launch
from support.errors import UserError
from support.statistics import mean_and_error

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = {"REINFORCE": ("#0072B2", "o"), "REINFORCE, leave-one-out": ("#009E73", "s"), "DPO": ("#D55E00", "D"),
         "evaluated": ("#CC79A7", "v")}  # of the frontier: colour and marker of each method
WINDOW = 25  # steps in the running mean
DPI = 150
BESIDE = ((8, 5), (8, -13), (-8, 5), (-8, -13), (8, 18), (-8, 18), (8, -26), (-8, -26), (8, 31), (8, -39))


def running_mean(steps, values, window=WINDOW):
    """Mean over each full window, with the step in the window's middle; short runs have a shorter window."""
    window = max(1, min(window, len(values) // 4))
    return [np.convolve(row, np.ones(window) / window, mode="valid") for row in (steps, values)]


def curve(axes, run, key, colour, label=None, faint=True, scale=1.0, style="-"):
    """One metric of one run against the step."""
    rows = [row for row in run.metrics if "step" in row and row.get(key) is not None]
    if rows:
        steps, values = [row["step"] for row in rows], [scale * row[key] for row in rows]
        if faint:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(*running_mean(steps, values), style, color=colour, linewidth=1.8, label=label)


def tested(run, key, scale=1.0):
    """A DPO run's test numbers -> the steps that were done when each was measured, and the numbers."""
    done, values, step = [], [], 0
    for row in run.metrics:
        step = row.get("step", step)
        if key in row:
            done.append(step)
            values.append(scale * row[key])
    return done, values


def reinforce_figure(runs):
    """Reward and KL, all runs in both panels; loo-0.02 in alpha-0.02's colour, but dashed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {run: run.name.replace("loo-", "alpha-") for run in runs}
    colours = dict(zip(dict.fromkeys(names.values()), itertools.cycle(COLOURS), strict=False))
    mixed = len({run.method for run in runs}) > 1
    for run in runs:
        style = "--" if mixed and "leave" in run.method else "-"
        for axes, key in ((left, "reward"), (right, "kl")):
            curve(axes, run, key, colours[names[run]], run.name, len(runs) < 4, style=style)
    left.set(xlabel="step", ylabel="reward, P(positive), mean of the batch", ylim=(0, 1))
    right.set_yscale("symlog", linthresh=1)  # even up to 1 nat, logarithmic above: a collapse is 100 away
    right.set(xlabel="step", ylabel="KL to the original, nats (linear to 1, then log)", ylim=(0, None))
    top = right.get_ylim()[1]
    right.set_yticks([tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if tick <= top])
    right.yaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", title=f"mean of up to {WINDOW} steps")
    return figure


def dpo_figure(runs):
    """Training and test loss, a panel for each run: losses of different betas do not compare."""
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(max(4 * columns, 7.5), 3.4 * lines), layout="constrained")
    for place, (run, colour) in enumerate(zip(runs, itertools.cycle(COLOURS), strict=False), start=1):
        axes = figure.add_subplot(lines, columns, place)
        curve(axes, run, "loss", colour, f"training, mean of up to {WINDOW} steps (faint: each)")
        axes.plot(*tested(run, "test_loss"), "o", color="black", label="test, after each epoch")
        axes.axhline(math.log(2), color="grey", linestyle="--", linewidth=1, label="ln 2: policy = reference")
        axes.set(xlabel="step", ylabel="DPO loss", title=run.name)
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3 if columns > 2 else 2)
    return figure


def dpo_margins_figure(runs):
    """Accuracy, margin in nats, how far both log-probs moved: a line of panels for each learning rate."""
    rates = sorted({run.flags["lr"] for run in runs})
    figure = Figure(figsize=(11, 3.4 * len(rates)), layout="constrained")
    panels = figure.subplots(len(rates), 3, squeeze=False)
    for lr, (left, middle, right) in zip(rates, panels, strict=True):
        some = [run for run in runs if run.flags["lr"] == lr]
        for run, colour in zip(some, itertools.cycle(COLOURS), strict=False):
            nats = 1 / run.flags["beta"]
            curve(left, run, "accuracy", colour, run.name, faint=False)
            curve(middle, run, "margin", colour, faint=False, scale=nats)
            left.plot(*tested(run, "test_accuracy"), "o", color=colour)
            middle.plot(*tested(run, "test_margin", nats), "o", color=colour)
            curve(right, run, "chosen_logratio", colour, faint=False)
            curve(right, run, "rejected_logratio", colour, faint=False, style="--")
        left.set(xlabel="step", ylabel=f"accuracy (lr {short(lr)})", ylim=(0.4, 1.02))
        middle.set(xlabel="step", ylabel="margin / beta, nats")
        right.set(xlabel="step", ylabel="log-prob less the original's, nats", title="solid: chosen, dashed: rejected")
        right.axhline(0, color="grey", linewidth=0.8)
        if left.get_legend_handles_labels()[0]:  # none before the first step
            left.legend(title=f"mean of up to {WINDOW} steps\n(dots: test pairs)", loc="lower right")
    return figure


def frontier_figure(runs, rewards):
    """Test reward against KL to the original: finished runs and, of rewards (prompts, k) if any, what is possible."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    low = min([run.result["kl"] for run in runs if run.result["kl"] > 0] + [0.1]) / 3
    if len(rewards):
        if limit := measures.limit_curve(rewards, low):
            kl, reward, error = np.array(limit, dtype=float).T
            axes.plot(kl, reward, "k", linewidth=1.5, label="the limit, an estimate (± 1 standard error)")
            axes.fill_between(kl, reward - error, reward + error, color="black", alpha=0.2, linewidth=0)
        counts = measures.counts(rewards.shape[1])[1:]
        best, errors = zip(*(mean_and_error(measures.best_of(rewards, n)) for n in counts), strict=True)
        label = f"best of {', '.join(map(str, counts))} samples: KL at most this"
        axes.errorbar(list(map(measures.best_of_kl, counts)), best, errors, fmt="<:", color="#E69F00", label=label)
    texts = []
    for run in runs:
        reward, kl = run.result["reward"], max(run.result["kl"], low)
        if run.method == "untouched":
            axes.axhline(reward, color="grey", linestyle="--", linewidth=1, label=f"{run.name}, at KL 0")
            continue
        colour, mark = MARKS[run.method]
        axes.errorbar(kl, reward, run.result["reward_se"], run.result["kl_se"], mark, color=colour, capsize=3)
        texts.append((kl, reward, run.name, colour))
    for method in dict.fromkeys(run.method for run in runs if run.method in MARKS):
        axes.plot([], [], MARKS[method][1], color=MARKS[method][0], label=method)
    axes.set(xscale="log", xlim=(low, None), xlabel="KL to the original, nats per completion")
    axes.set(ylim=(None, 1.03), ylabel="test reward, P(positive)")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    FigureCanvasAgg(figure).draw()  # the layout is final, so texts can be placed
    write_beside(axes, texts)
    return figure


def write_beside(axes, texts):
    """Writes each (x, y, text, colour) beside its point, at the first place where it covers nothing."""
    dots = axes.transData.transform([(x, y) for x, y, *_ in texts])
    curves = [line for line in axes.lines if len(line.get_xdata()) > 1]
    between = [line.get_path().transformed(line.get_transform()).interpolated(100).vertices for line in curves]
    points, taken = np.concatenate([dots, *between]), []
    for place, (x, y, text, colour) in enumerate(texts):
        note = axes.annotate(text, (x, y), (8, 5), textcoords="offset points", color=colour, fontsize=9)
        for dx, dy in (*BESIDE, BESIDE[0]):  # in points; the first after all if no place is free
            note.set(position=(dx, dy), ha="left" if dx > 0 else "right")
            box = note.get_window_extent().padded(1)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            near = box.padded(12).count_contains(np.delete(dots, place, axis=0))  # it would be read as theirs
            if inside and not near + box.count_contains(points) + box.count_overlaps(taken):
                break
        if abs(dy) > 13:  # far away: a line shows whose text it is
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
            axes.annotate("", (x, y), (dx, dy + 4), textcoords="offset points", arrowprops=line)
        taken.append(box)


def save_figures(found, folder):
    """Draws the runs into their folder -> the files written. Figures of runs that are gone are removed."""
    reinforced = [run for run in found if "alpha" in run.flags and run.metrics]
    preferred = [run for run in found if "beta" in run.flags and run.metrics]
    finished = comparable(found)
    trained = any(run.method != "untouched" for run in finished)
    figures = {
        "reinforce.png": reinforce_figure(reinforced) if reinforced else None,
        "dpo.png": dpo_figure(preferred) if preferred else None,
        "dpo-margins.png": dpo_margins_figure(preferred) if preferred else None,
        "frontier.png": frontier_figure(finished, np.array([*sample_rewards(found).values()])) if trained else None,
        **{f"{run.name}/curves.png": reinforce_figure([run]) for run in reinforced},
    }
    for name, figure in figures.items():
        (folder / name).unlink(missing_ok=True)
        if figure:
            figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name, figure in figures.items() if figure]


def main(argv=None):
    flags = bare_flags(__doc__)
    flags.add_argument("folder", type=Path, help="the folder that holds the runs")
    folder = flags.parse_args(argv).folder
    written = save_figures(require_runs(folder), folder)
    if not written:
        raise UserError(f"{folder} has nothing to draw yet: no run in it has trained a step")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    launch(main)
