"""The report's figures, each of a list of tables.Run: training curves, and the reward-KL frontier.

Faint: each step. Strong: the mean of 25 steps, or of fewer in a short run. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; markers and dashes say the same again. `python report.py` draws them.
"""

import itertools
import math

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

from report import measures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = {  # of the frontier: colour and marker of each method
    "REINFORCE": ("#0072B2", "o"),
    "REINFORCE, leave-one-out": ("#009E73", "s"),
    "DPO": ("#D55E00", "D"),
    "evaluated": ("#CC79A7", "v"),
}
WINDOW = 25  # steps in the running mean


def running_mean(steps, values, window=WINDOW):
    """Mean over each full window, with the step in the window's middle; short runs have a shorter window."""
    window = max(1, min(window, len(values) // 4))
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.convolve(steps, np.ones(window) / window, mode="valid"), means


def draw(axes, run, key, colour, label=None, faint=True, scale=1.0, style="-"):
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = {run: run.name.replace("loo-", "alpha-") for run in runs}
    colours = dict(zip(dict.fromkeys(names.values()), itertools.cycle(COLOURS), strict=False))
    mixed = len({run.method for run in runs}) > 1
    for run in runs:
        style = "--" if mixed and "leave" in run.method else "-"
        for axes, key in ((left, "reward"), (right, "kl")):
            draw(axes, run, key, colours[names[run]], run.name, len(runs) < 4, style=style)
    left.set(xlabel="step", ylabel="reward, P(positive), mean of the batch", ylim=(0, 1))
    right.set_yscale("symlog", linthresh=1)  # even up to 1 nat, logarithmic above: a collapse is 100 nats away
    right.set(xlabel="step", ylabel="KL to the original, nats per completion", ylim=(0, None))
    right.yaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", title=f"mean of up to {WINDOW} steps")
    return figure


def dpo_figure(runs):
    """Training and test loss, a panel for each run. Losses of different betas do not compare, so each has its scale."""
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    size = {"figsize": (max(4 * columns, 7.5), 3.4 * lines), "layout": "constrained"}
    figure, panels = plt.subplots(lines, columns, squeeze=False, **size)
    for axes in panels.flat[len(runs) :]:
        axes.set_axis_off()
    for run, axes, colour in zip(runs, panels.flat, itertools.cycle(COLOURS), strict=False):
        draw(axes, run, "loss", colour, f"training, mean of up to {WINDOW} steps (faint: each)")
        axes.plot(*tested(run, "test_loss"), "o", color="black", label="test, after each epoch")
        axes.axhline(math.log(2), color="grey", linestyle="--", linewidth=1, label="ln 2: policy = reference")
        axes.set(xlabel="step", ylabel="DPO loss", title=run.name)
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def dpo_margins_figure(runs):
    """Accuracy, margin in nats, and how far both log-probs have moved: a line of panels for each learning rate."""
    rates = sorted({run.flags["lr"] for run in runs})
    size = {"figsize": (11, 3.4 * len(rates)), "layout": "constrained"}
    figure, panels = plt.subplots(len(rates), 3, squeeze=False, **size)
    for lr, (left, middle, right) in zip(rates, panels, strict=True):
        some = [run for run in runs if run.flags["lr"] == lr]
        for run, colour in zip(some, itertools.cycle(COLOURS), strict=False):
            nats = 1 / run.flags["beta"]
            draw(left, run, "accuracy", colour, run.name, faint=False)
            draw(middle, run, "margin", colour, faint=False, scale=nats)
            left.plot(*tested(run, "test_accuracy"), "o", color=colour)
            middle.plot(*tested(run, "test_margin", nats), "o", color=colour)
            draw(right, run, "chosen_logratio", colour, faint=False)
            draw(right, run, "rejected_logratio", colour, faint=False, style="--")
        left.set(xlabel="step", ylabel=f"accuracy (lr {lr:g})", ylim=(0.4, 1.02))
        middle.set(xlabel="step", ylabel="margin / beta, nats")
        right.set(xlabel="step", ylabel="log-prob less the original's, nats")
        right.set_title("solid: chosen, dashed: rejected", fontsize=10)
        right.axhline(0, color="grey", linewidth=0.8)
        if left.get_legend_handles_labels()[0]:  # none before the first step
            left.legend(title=f"mean of up to {WINDOW} steps\n(dots: test pairs)", loc="lower right")
    return figure


def frontier_figure(runs, rewards):
    """Test reward against KL to the original: every finished run, best-of-n, and the limit.

    `rewards`: (prompts, k), k samples of the original policy for each of some prompts, or None.
    """
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set_xscale("log")
    low = min([run.result["kl"] for run in runs if run.result["kl"] > 0] + [0.1]) / 3
    if rewards is not None:
        limit = [point for point in measures.limit(rewards) if point[2] > low]
        axes.plot([kl for *_, kl in limit], [reward for _, reward, _ in limit], color="black", linewidth=2,
                  label="the limit: the best reward for its KL")
        counts = measures.counts(rewards.shape[1])[1:]
        best = [measures.best_of(rewards, n).mean() for n in counts]
        axes.plot([measures.best_of_kl(n) for n in counts], best, ":", marker="<", color="#E69F00", markersize=7,
                  label=f"best of {', '.join(map(str, counts))} samples: KL at most this")
    texts = []
    for run in runs:
        reward, kl = run.result["reward"], run.result["kl"]
        if run.method == "untouched":
            axes.axhline(reward, color="grey", linestyle="--", linewidth=1, label=f"{run.name}: untouched, KL 0")
            continue
        colour, marker = MARKS[run.method]
        errors = {"yerr": run.result["reward_se"], "xerr": run.result["kl_se"]}
        axes.errorbar(max(kl, low), reward, **errors, fmt=marker, color=colour, markersize=7, capsize=3)
        texts.append((max(kl, low), reward, run.name, colour))
    for method in dict.fromkeys(run.method for run in runs if run.method in MARKS):
        axes.plot([], [], MARKS[method][1], color=MARKS[method][0], label=method)
    axes.set(xlabel="KL to the original, nats per completion", ylabel="test reward, P(positive)", ylim=(None, 1.03))
    axes.set_xlim(low, None)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right", fontsize=9)
    figure.canvas.draw()  # the layout is final, so texts can be placed
    place(axes, texts)
    return figure


def place(axes, texts):
    """Writes each (x, y, text, colour) beside its point, at the first of some places where it covers nothing."""
    taken = [axes.get_legend().get_window_extent()]
    points = [axes.transData.transform((x, y)) for x, y, *_ in texts]
    for line in axes.lines:
        if len(line.get_xdata()) > 2:  # a curve: points along it, so close that no text fits between two
            ends = axes.transData.transform(line.get_xydata())
            at, every = np.arange(len(ends)), np.linspace(0, len(ends) - 1, 2000)
            points += list(zip(np.interp(every, at, ends[:, 0]), np.interp(every, at, ends[:, 1]), strict=True))
    for x, y, text, colour in texts:
        others = [point for point, other in zip(points, texts, strict=False) if other[2] != text]
        for dx, dy in ((8, 5), (8, -13), (-8, 5), (-8, -13), (8, 18), (-8, 18), (8, -26), (-8, -26), (8, 31), (8, -39)):
            side = {"textcoords": "offset points", "ha": "left" if dx > 0 else "right"}
            note = axes.annotate(text, (x, y), (dx, dy), color=colour, fontsize=9, **side)
            box = note.get_window_extent().padded(1)
            wide = box.padded(12)  # beside another run's point it would be read as that one's
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            covers = any(box.contains(*point) for point in points) or any(wide.contains(*point) for point in others)
            if inside and not covers and not any(map(box.overlaps, taken)):
                break
            note.remove()
        else:
            note = axes.annotate(text, (x, y), (8, 5), color=colour, fontsize=9, **side)
        if abs(dy) > 13:  # far away: a line shows whose text it is
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
            axes.annotate("", (x, y), (dx, dy + 4), arrowprops=line, **side)
        taken.append(note.get_window_extent())
