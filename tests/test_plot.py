"""The figures: their lines are the runs' numbers, and whoever draws them is told what there is to see."""

import itertools
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import plot
from lab import broken
from report import measures, report, run_folders
from support.command import launch
from support.files import HOME
from tests.written_runs import steps, write_course, write_run


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    """Nobody looks at these, and pixels take time."""
    monkeypatch.setattr(plot, "DPI", 20)


def test_running_mean_stands_in_the_middle_of_its_window():
    found, means = plot.running_mean([1, 2, 3, 4, 5, 6, 7, 8], [0.0, 1, 2, 6, 0, 0, 4, 0], window=2)
    assert found.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5] and means.tolist() == [0.5, 1.5, 4, 3, 0, 2, 2]
    assert plot.running_mean([1, 2], [3.0, 4.0])[1].tolist() == [3, 4]  # a short run: no mean, but a line


@pytest.fixture
def found(tmp_path):
    return run_folders.load_runs(write_course(tmp_path))


def test_reinforce_curves(found):
    left, right = plot.reinforce_figure([run for run in found if "alpha" in run.flags]).axes
    assert [line.get_label() for line in left.lines] == ["alpha-0", "alpha-0.02", "alpha-2", "alpha-9", "loo-0.02"]
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", "-", "-", "--"]
    assert left.lines[1].get_color() == left.lines[4].get_color() != left.lines[0].get_color()  # a colour an alpha
    # KL 0, 1 .. 7 in 8 steps: means of windows of 8 // 4 steps.
    assert right.lines[0].get_ydata() == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5])
    assert list(right.get_yticks()) == [0, 0.5, 1, 2, 5] and right.get_ylim()[0] == 0


def test_dpo_curves(found):
    dpo = [run for run in found if "beta" in run.flags]
    panel = plot.dpo_figure(dpo).axes[0]
    dots, start = panel.lines[2], panel.lines[3]
    assert dots.get_xydata().tolist() == [[0, 0.693], [8, 0.6]] and start.get_ydata()[0] == math.log(2)
    left, middle, right = plot.dpo_margins_figure(dpo).axes
    assert middle.lines[1].get_ydata() == pytest.approx([0, 0.2 / 0.1])  # nats, so without beta
    assert middle.lines[0].get_ydata()[-1] == pytest.approx(0.65 / 0.1)  # it ends in 0.6, 0.7
    assert left.lines[1].get_ydata().tolist() == [0.5, 0.9]
    chosen, rejected = right.lines[:2]  # they end in -6, -7 and -12, -14
    assert chosen.get_ydata()[-1] == -6.5 and rejected.get_ydata()[-1] == -13 and rejected.get_linestyle() == "--"


def test_the_frontiers_dots_are_the_results_and_their_names_cover_nothing(found):
    finished = run_folders.comparable(found)
    rewards = np.array([*run_folders.sample_rewards(found).values()])
    axes = plot.frontier_figure(finished, rewards).axes[0]
    best, *dots = (box.lines[0].get_xydata() for box in axes.containers)
    assert best.tolist() == [[measures.best_of_kl(n), measures.best_of(rewards, n).mean()] for n in (2, 4, 8, 16)]
    dots = [tuple(dot[0]) for dot in dots]
    assert dots == [(run.result["kl"], run.result["reward"]) for run in finished[1:]]  # the first is the baseline
    notes = [note for note in axes.texts if note.get_text()]
    assert [note.get_text() for note in notes] == [run.name for run in finished[1:]]
    boxes = [note.get_window_extent() for note in notes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    limit = next(line for line in axes.lines if line.get_label().startswith("the limit"))
    covered = axes.transData.transform([*dots, *limit.get_xydata()])
    assert not any(box.count_contains(covered) for box in boxes)
    assert all(axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 for box in boxes)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_nothing_of_a_figure_lies_outside_its_canvas(tmp_path, count):
    """Whatever can be seen of texts, legends and axes, at the size that is saved."""
    course, reinforce = write_course(tmp_path / "course"), {"advantage": "loo", "lr": 1e-4}
    tested = {"test_loss": 0.6, "test_accuracy": 0.9, "test_margin": 0.2}
    rows = steps(loss=0.1, accuracy=0.1, margin=0.1, chosen_logratio=-1, rejected_logratio=-2)
    rows += [{"epoch": 1, **tested}]
    for i in range(count):
        alpha, beta = {**reinforce, "alpha": float(i)}, {"beta": 0.1 + i, "lr": 5e-7 * (1 + i % 2)}
        write_run(tmp_path / f"alpha-{i}", 0.9, 10.0**i, "x", alpha, metrics=steps(reward=0.1, kl=1.0))
        write_run(tmp_path / f"beta-{0.1 + i}-lr-5e-{i}", 0.1 * i, 0.1, "x", beta, metrics=rows, **tested)
    shutil.copytree(course / "samples-16", tmp_path / "samples-16")
    found = run_folders.load_runs(tmp_path)
    reinforced, preferred = ([run for run in found if key in run.flags] for key in ("alpha", "beta"))
    healthy = reinforced[0] if count == 1 else reinforced[-1]
    for run in found:
        run.metrics = [row | {"grad_norm": 1.0} for row in run.metrics]
    rewards = np.array([*run_folders.sample_rewards(found).values()])
    figures = [plot.reinforce_figure(reinforced), plot.dpo_figure(preferred), plot.dpo_margins_figure(preferred),
               plot.frontier_figure(run_folders.comparable(found), rewards),
               broken.broken_reinforce(healthy, reinforced), broken.broken_dpo(preferred[0], preferred, {})]
    for figure in figures[-2:]:
        broken.save(figure, tmp_path / "figure.png")
    for number, figure in enumerate(figures):
        FigureCanvasAgg(figure).draw()
        boxes = [axes.get_tightbbox() for axes in figure.axes]  # with their names and legends
        for box in [*boxes, *(legend.get_window_extent() for legend in figure.legends)]:
            inside = min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, (number, box, figure.bbox)


def test_plot_draws_what_there_is_and_says_where(tmp_path, capsys):
    write_run(tmp_path / "baseline", 0.5, 0, "x", {})
    write_run(tmp_path / "beta-1", 0.5, 0.1, "x", {"beta": 1.0, "lr": 1}, metrics=steps(1, loss=1.0, accuracy=1))
    (tmp_path / "beta-1" / "eval.json").unlink()  # it is still being trained
    (tmp_path / "reinforce.png").write_text("of a run that is gone")
    plot.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/dpo.png\n{tmp_path}/dpo-margins.png\n"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["dpo-margins.png", "dpo.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


@pytest.fixture
def axes():
    """Numbers are pixels: 0.9 of 6 x 100 by 0.9 of 4 x 100."""
    figure = Figure(figsize=(6, 4), dpi=100)
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axes.set(xlim=(0, 540), ylim=(0, 360))
    FigureCanvasAgg(figure).draw()
    return axes


def test_names_of_neighbours_do_not_overlap(axes):
    # Each dot 13 pixels above the last and 23 to its right: up and right of each, the first place, is the next name.
    plot.write_beside(axes, [(150 + 23 * i, 100 + 13 * i, f"a longer name {i}", "black") for i in range(5)])
    boxes = [note.get_window_extent() for note in axes.texts if note.get_text()]
    assert len(boxes) == 5 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_no_name_stands_across_the_baseline(axes):
    axes.axhline(110)  # the first place's name would stand at 100 + 5 points and up
    plot.write_beside(axes, [(200, 100, "mine", "black")])
    box, = (note.get_window_extent() for note in axes.texts if note.get_text())
    assert not box.y0 < axes.transData.transform((0, 110))[1] < box.y1


def test_no_name_stands_where_it_would_be_read_as_the_neighbours(axes):
    plot.write_beside(axes, [(200, 200, "mine", "black"), (230, 200, "other", "black")])
    assert [note.get_ha() for note in axes.texts] == ["right", "left"]  # neither over the other's dot


@pytest.mark.parametrize(("main", "name", "message"), [
    (plot.main, "nowhere", "there is no folder {}; give the one that holds the runs"),
    (report.main, "nowhere", "there is no folder {}; give the one that holds the runs"),
    (plot.main, "empty", "{} has no run: no folder in it holds a run's config.json"),
    (report.main, "empty", "{} has no run: no folder in it holds a run's config.json"),
    (plot.main, "untrained", "{} has nothing to draw yet: no run in it has trained a step"),
])
def test_a_folder_without_runs_is_said_in_one_line(tmp_path, capsys, main, name, message):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "untrained" / "baseline", 0.5, 0, "x", {})
    with pytest.raises(SystemExit) as stopped:
        launch(lambda: main([str(tmp_path / name)]))
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.err.count("\n") == 1 and not said.out
    assert message.format(tmp_path / name) in said.err


def test_figures_and_report_load_no_torch(tmp_path):
    write_run(tmp_path / "alpha-1", 0.5, 1, "x", {"alpha": 1.0, "advantage": "loo"}, metrics=steps(1, reward=1, kl=1))
    light = ("import runpy, sys; runpy.run_path('plot.py', run_name='__main__'); from report import report; "
             "report.main(sys.argv[1:]); sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))")
    done = subprocess.run([sys.executable, "-c", light, str(tmp_path)], cwd=HOME, capture_output=True, text=True)
    assert done.returncode == 0 and f"{tmp_path}/reinforce.png\n{tmp_path}/frontier.png\n" in done.stdout, done.stderr
