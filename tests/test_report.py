"""The report: what it says of whatever runs are or are not there."""

import json
import re
import shutil
from pathlib import Path

import pytest

import plot
from lab import fill_in
from report import report, run_folders, tables
from support.command import launch
from tests.written_runs import steps, write_course, write_run


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    """Nobody looks at these, and pixels take time."""
    monkeypatch.setattr(plot, "DPI", 20)


@pytest.fixture
def text_only(monkeypatch):
    monkeypatch.setattr(plot, "save_figures", lambda found, folder: [])


@pytest.fixture
def folder(tmp_path):
    return write_course(tmp_path / "course")


def section(folder, title):
    """A section of results.md, less its title."""
    text = (folder / "results.md").read_text()
    return re.search(rf"## {re.escape(title)}[^\n]*\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]


def write_rewards(folder, rewards):
    """Gives a run's completions these rewards, in turns."""
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    rows = [json.dumps(row | {"reward": rewards[i % len(rewards)]}) for i, row in enumerate(rows)]
    (folder / "completions.jsonl").write_text("\n".join(rows) + "\n")


def cells(text, start):
    """The row of a Markdown table that begins so: {column: cell}."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    place = next(i for i, line in enumerate(lines) if line[0] == start)
    heading = max(i for i in range(place) if set(lines[i + 1][0]) == {"-"})
    return dict(zip(lines[heading], lines[place], strict=True))


def test_the_whole_report(folder, capsys):
    report.main([str(folder)])
    names = ("reinforce.png", "dpo.png", "dpo-margins.png", "frontier.png")
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "results.md").read_text()
    assert all(f"({name})" in text for name in names) and "Not here" not in text and "Not answered" not in text
    assert all(f"({run}/curves.png)" in section(folder, "Q3.2") for run in ("alpha-2", "alpha-9", "loo-0.02"))
    assert "(dpo.png)" in section(folder, "Q4.4") and (folder / "loo-0.02" / "curves.png").exists()
    made = cells(section(folder, "Q2.1"), "here, `alpha-0`")
    assert (made["method"], made["policy"], made["lr"]) == ("REINFORCE", "distilgpt2", "1e-4")
    above = cells(section(folder, "Q4.2"), "`alpha-0`")["above `baseline`, prompt by prompt"]
    assert above == "+0.000 ± 0.000"  # the completions' rewards are alike
    for question in ("1.1", "1.2", "2.1", "2.2", "3.1", "3.2", "4.1", "4.2", "4.3", "4.4"):
        assert f"## Q{question}: " in text
    row = cells(section(folder, "All runs"), "`alpha-0`")
    assert (row["reward"], row["KL, nats"], row["n"]) == ("0.950 ± 0.010", "99.00 ± 0.02", "20")
    # "big big 0" .. "big big 6": 8 different words of 60, bigrams big big and 7 others of 40; none is there once.
    assert (row["distinct-1"], row["distinct-2"], row["repeated"]) == ("0.133", "0.200", "1.000")
    assert (row["log-prob a token"], row["natural"]) == ("-8.99", "0.00")
    assert cells(section(folder, "All runs"), "`alpha-0.02`")["natural"] == "0.90"  # its own middle: 18 of 20
    assert "samples-16" not in section(folder, "All runs")
    assert cells(section(folder, "Q1.1"), "here, `baseline`")["test reward"] == "0.5000 ± 0.0100"
    assert "0.6231" in section(folder, "Q1.1") and "0.7939" in section(folder, "Q2.1")
    assert cells(section(folder, "Q2.1"), "the assignment's target")["test reward"] == "at least 0.75"
    assert "I saw 4 [...] big big" in section(folder, "Q2.2") and "I saw 4 [...] it is" in section(folder, "Q1.2")
    assert cells(section(folder, "Q3.1"), "8")["KL, nats"] == "7.00"
    assert "0.5968" in section(folder, "Q4.1") and "`beta-0.1`" in section(folder, "Q4.3")
    regimes = section(folder, "Q3.2")
    assert cells(regimes, "`alpha-0.02`")["reward - alpha KL"] == "0.650"  # 0.9 - 0.02 * 12.5
    assert cells(regimes, "high alpha")["here"] == "`alpha-2`"
    assert cells(regimes, "low alpha")["here"] == "`alpha-9`"  # poor text, with a penalty
    assert cells(regimes, "in between")["here"] == "`loo-0.02`, `alpha-0.02`"  # by KL
    together = section(folder, "The same prompts")
    assert together.count("    alpha-0 ") == 5
    assert "    alpha-0    0.38  big big 3\n" in together.split("**I saw 3**")[1]
    said = capsys.readouterr()
    assert "`alpha-0`" in said.out and "**I saw 0** ..." in said.out and "<!--" not in said.out and not said.err


@pytest.mark.usefixtures("text_only")
def test_betas_are_compared_by_what_compares(folder):
    report.main([str(folder)])
    betas = section(folder, "Q4.4")
    row = cells(betas, "`beta-0.25`")
    assert (row["margin / beta, nats"], row["a student's (theirs)"], row["accuracy"]) == ("0.80", "0.6207", "0.900")
    # The completions' rewards are alike, so nothing tells them apart, whatever the standard errors of each.
    assert ("highest reward is that of `beta-0.1` (prompt by prompt +0.000 ± 0.000 over `beta-0.25`, +0.000 ± 0.000 "
            "over `beta-0.4`; not told apart from `beta-0.25`, `beta-0.4`: within two standard errors)") in betas
    assert "the lowest test loss, that of `beta-0.4`, does not choose" in betas
    about = json.loads((folder / "beta-0.1" / "config.json").read_text())
    about["flags"]["lr"] = 5e-5  # at another learning rate there is no number of the student's, and no contest
    (folder / "beta-0.1" / "config.json").write_text(json.dumps(about))
    report.main([str(folder)])
    betas = section(folder, "Q4.4")
    assert cells(betas, "`beta-0.1`")["a student's (theirs)"] == ""
    assert "At lr 5e-7 the highest reward is that of `beta-0.25` (prompt" in betas and "At lr 5e-5" not in betas
    assert (cells(betas, "`beta-0.1`")["lr"], cells(betas, "`beta-0.25`")["lr"]) == ("5e-5", "5e-7")


def test_rewards_are_compared_prompt_by_prompt_where_they_can_be(folder):
    best, other = (run for run in run_folders.load_runs(folder) if run.name in ("beta-0.25", "beta-0.4"))
    assert report.difference(best, other) == (0, 0)
    for row in other.completions:
        row["reward"] -= 0.02 + 0.01 * (row["number"] % 2)  # each worse, by 0.025 ± 0.001: far less than they vary
    other.completions.reverse()
    # 0.02 and 0.03, ten times each: their standard deviation is 0.005 * sqrt(20 / 19), over sqrt(20).
    assert report.difference(best, other) == pytest.approx((0.025, 0.005 / 19**0.5))
    assert report.difference(other, best) == pytest.approx((-0.025, 0.005 / 19**0.5))
    for row in other.completions:
        row["prompt"] = "another"
    run_folders.samples_by_prompt.cache_clear()
    assert report.difference(best, other) == pytest.approx((0.59 - 0.5, 0.01 * 2**0.5))  # the results', as independent


@pytest.mark.usefixtures("text_only")
def test_the_frontiers_tables(folder):
    write_rewards(folder / "beta-0.1", [0.5, 0.7])
    report.main([str(folder)])
    text = section(folder, "The frontier")
    # Rewards 0, 1/8 .. 7/8, each twice a prompt: 20 prompts alike, so no error.
    assert cells(text, "1")["reward"] == "0.438 ± 0.000" and cells(text, "16")["reward"] == "0.875 ± 0.000"
    assert cells(text, "8")["KL at most, nats"] == "1.20"  # ln 8 - 7/8
    # beta-0.1 has rewards 0.5 and 0.7, 0.6 ± 0.1 / sqrt(19), at a KL of 0.1. If these 16 were all texts there are, the
    # limit would have 0.6 where mean(r e^(r/alpha)) = 0.6 mean(e^(r/alpha)): at alpha 0.46985, with KL 0.6 / 0.46985 -
    # ln mean(e^(r/alpha)) = 0.1667; and 0.1 nats at alpha 0.62035, with 0.5643. As 16 samples they are corrected by
    # alpha / 32 times the relative variance of e^(r/alpha), 0.346 and 0.206: 0.5643 + 0.0040, 0.1667 - 0.0108.
    row = cells(text, "`beta-0.1`")
    assert (row["the limit's reward for this KL"], row["the limit's KL for this reward"]) == ("0.568", "0.16")
    assert (row["reward"], row["KL, nats"], row["prompts"]) == ("0.600 ± 0.023", "0.10 ± 0.00", "20")
    assert row["more by"] == "-0.032 ± 0.023"  # better than possible, by chance
    # 0.1 / 0.156 = 0.64, with the error of 0.64 times (reward / 0.47) over 0.156: 0.64 * 0.0488 / 0.156 = 0.20.
    assert row["KL / the limit's KL"] == "0.6 ± 0.2"
    row = cells(text, "`alpha-0`")
    assert row["the limit's KL for this reward"] == "0.00" and row["KL / the limit's KL"] == "-"  # less than all
    assert row["the limit's reward for this KL"] == row["more by"] == "-"  # beyond what is drawn


@pytest.mark.usefixtures("text_only")
def test_a_limit_of_too_few_samples_is_not_drawn(folder):
    shutil.rmtree(folder / "samples-16")
    write_run(folder / "samples-3", 0.5, 0, "it is", {"samples_per_prompt": 3})
    report.main([str(folder)])
    said = section(folder, "The frontier")
    assert "is not drawn: for no alpha is it so that for 90% of the prompts at least 4 of 3 samples" in said


@pytest.mark.usefixtures("text_only")
def test_of_several_sample_runs_the_largest_is_taken_and_of_a_cut_one_the_whole_prompts(folder):
    write_run(folder / "samples-4", 0.5, 0, "it is", {"samples_per_prompt": 4})
    completions = folder / "samples-16" / "completions.jsonl"
    completions.write_text(completions.read_text()[:-700])  # some of the last prompt's 16 rows
    report.main([str(folder)])
    assert "(19 prompts, 16 samples each)" in section(folder, "The frontier")
    completions.unlink()
    report.main([str(folder)])
    assert "(20 prompts, 4 samples each)" in section(folder, "The frontier")


@pytest.mark.usefixtures("text_only")
def test_a_report_without_any_one_of_its_runs(folder, capsys):
    names = sorted(path.name for path in folder.iterdir())
    for name in names[::3]:
        shutil.move(folder / name, folder.parent / name)
        report.main([str(folder), "--expect", *names])
        said = capsys.readouterr()
        assert f"not here: `{name}`\n" in said.out and not said.err
        shutil.move(folder.parent / name, folder / name)
    for number, name in enumerate(names):  # and one after the other, down to none
        shutil.rmtree(folder / name)
        if number % 3 == 1 and any(folder.glob("*/config.json")):
            report.main([str(folder), "--expect", *names])
            assert f"`{name}`" in capsys.readouterr().out.split("not here: ")[1]


@pytest.mark.parametrize(
    ("name", "title", "said"),
    [
        ("baseline", "Q1.1", "*Not here: the untouched policy. `make baseline RUNS=HERE` makes it.*"),
        ("baseline", "Q3.2", "completions of the untouched policy, to tell natural text by. `make baseline RUNS=HERE`"),
        ("alpha-0", "Q2.2", "*Not here: a finished run with alpha 0. `make reinforce RUNS=HERE` makes it.*"),
        ("alpha-0", "Q3.1", "*Not here: the curve of a run with alpha 0. `make reinforce RUNS=HERE` makes it.*"),
        ("alpha-[29]", "Q3.2", "*Not here: three alphas. `make sweep RUNS=HERE` makes it.*"),
        ("alpha-9", "Q3.2", "*Not here: a run of each regime; more alphas. `make sweep RUNS=HERE` makes it.*"),
        ("beta-0.4", "Q4.4", "*Not here: three betas. `make sweep RUNS=HERE` makes it.*"),
        ("beta-*", "Q4.1", "*Not here: a finished DPO run. `make dpo RUNS=HERE` makes it.*"),
        ("samples-16", "The frontier", "for best-of-n and the limit. `make samples RUNS=HERE` makes it.*"),
    ],
)
@pytest.mark.usefixtures("text_only")
def test_a_section_says_what_it_lacks(folder, name, title, said):
    for path in folder.glob(name):
        shutil.rmtree(path)
    report.main([str(folder)])
    assert said.replace("HERE", str(folder)) in section(folder, title)
    first = (folder / "results.md").read_text().splitlines()[2]
    assert not title.startswith("Q") or re.search(rf"Not answered yet: .*{title}\b.*make sweep RUNS=", first)


@pytest.mark.usefixtures("text_only")
def test_in_the_demos_world_everything_is_made_by_make_demo(folder, tmp_path, monkeypatch):
    for path in folder.glob("*/config.json"):  # the world: a policy with a world.json beside its folder
        about = json.loads(path.read_text())
        about["flags"] |= dict.fromkeys(("policy", "reference"), str(tmp_path / "world" / "policy"))
        path.write_text(json.dumps(about))
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "world.json").touch()
    for name in ("alpha-0", "beta-0.4"):
        shutil.rmtree(folder / name)
    (tmp_path / "runs").mkdir()
    shutil.move(folder, tmp_path / "runs" / "toy")
    monkeypatch.chdir(tmp_path)
    report.main(["runs/toy"])
    assert "a finished run with alpha 0. `make demo-reinforce` makes it" in section(Path("runs/toy"), "Q2.2")
    assert "three betas. `make demo-sweep` makes it" in section(Path("runs/toy"), "Q4.4")


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({}, "make baseline RUNS=HERE"),
        ({"limit": None, "eval_limit": 500, "seed": 1}, 'make baseline RUNS=HERE FLAGS="--eval-limit 500 --seed 1"'),
        ({"policy": "mine", "reference": "mine", "pairs": "some"}, "make baseline RUNS=HERE POLICY=mine PAIRS=some"),
        ({"policy": "build/toy/policy", "reference": "build/toy/policy"}, "make demo-baseline RUNS=HERE"),  # gone
    ],
)
def test_the_command_for_what_is_missing_has_the_flags_of_what_is_there(tmp_path, flags, command):
    write_run(tmp_path / "beta-0.1", 0.5, 1, "x", {"beta": 0.1, "lr": 5e-7, "eval_limit": None, **flags},
              test_loss=0.6, test_accuracy=0.9, test_margin=0.1)
    write_run(tmp_path / "samples-4", 0.5, 0, "x", {"samples_per_prompt": 4, "eval_limit": 7, "seed": 5})
    report.main([str(tmp_path)])
    assert f"the untouched policy. `{command.replace('HERE', str(tmp_path))}` makes it" in section(tmp_path, "Q1.1")


@pytest.mark.usefixtures("text_only")
def test_settings_are_said(folder):
    report.main([str(folder)])
    row = cells(section(folder, "How they were made"), "`loo-0.02`")
    found = [row[key] for key in ("advantage", "lr", "steps", "seed", "precision")]
    assert found == ["loo", "0.0001", "8", "0", "fp32"]
    assert "Made with EPYC, 2 threads, fp32, torch 2, transformers 5." in section(folder, "How they were made")


def test_what_is_broken_or_unfinished_is_said(folder, capsys):
    with (folder / "alpha-0" / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 9, "rew')
    (folder / "alpha-2" / "eval.json").unlink()
    (folder / "loo-0.02" / "completions.jsonl").unlink()
    (folder / "beta-0.1" / "eval.json").write_text('{"reward": 0.5')
    (folder / "beta-0.25" / "config.json").write_text("[]")
    (folder / "beta-0.4" / "eval.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "alpha-0.02" / "metrics.jsonl").unlink()
    (folder / "reinforce.png").write_text("old")
    report.main([str(folder)])
    said = capsys.readouterr()
    assert f"{folder}/alpha-0/metrics.jsonl, line 9 is cut off or broken: left out" in said.err
    assert f"{folder}/alpha-0/metrics.jsonl, line 10 is cut off or broken: left out" in said.err
    assert "- `alpha-2` is not finished: it is drawn as far as it is" in said.out
    assert "- `alpha-0.02` has no metrics.jsonl, so no curve: remove its folder to have it made again" in said.out
    assert "- `loo-0.02` has no completions.jsonl, so no measures of its text: remove its folder to have" in said.out
    for name in ("beta-0.1", "beta-0.25", "beta-0.4"):
        assert f"{folder / name} is left out: not a run's files, or broken" in said.err
    assert "notes" not in said.out and (folder / "reinforce.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("text_only")
def test_one_run_for_each_learning_rate_is_quoted_of_the_courses_beta(folder):
    for beta in ("0.02", "0.1"):
        flags = {"beta": float(beta), "lr": 5e-5}
        write_run(folder / f"beta-{beta}-lr-5e-5", 0.9, 2, "so", flags, test_loss=0.6, test_accuracy=1, test_margin=0.1)
    report.main([str(folder)])
    assert re.findall("`(beta.*)`: P", section(folder, "Q4.3")) == ["beta-0.1", "beta-0.1-lr-5e-5"]


@pytest.mark.filterwarnings("error")  # matplotlib's, of a legend with nothing in it
def test_curves_that_are_not_there_yet(folder, capsys):
    for run in ("alpha-0", "alpha-0.02", "alpha-2", "alpha-9", "loo-0.02"):
        (folder / run / "metrics.jsonl").unlink()
    for run in folder.glob("beta-*/metrics.jsonl"):
        run.write_text('{"epoch": 0, "test_loss": 0.693, "test_accuracy": 0.5, "test_margin": 0.0}\n')
    report.main([str(folder)])
    assert "(reinforce.png)" not in (folder / "results.md").read_text() and not (folder / "reinforce.png").exists()
    assert (folder / "dpo-margins.png").exists() and not capsys.readouterr().err


def test_only_an_unfinished_run(tmp_path, capsys):
    flags = {"alpha": 0.0, "advantage": "reward"}
    write_run(tmp_path / "alpha-0", 0.5, 1, "x", flags, metrics=steps(1, reward=1, kl=1))
    (tmp_path / "alpha-0" / "eval.json").unlink()
    report.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "None is finished." in said and (tmp_path / "reinforce.png").exists()
    assert f"- to make one of these: `make {tmp_path}/NAME/eval.json RUNS={tmp_path}`; all of the sweep: `make" in said
    assert cells(section(tmp_path, "Q3.1"), "1")["KL, nats"] == "0.00" and "Not here" in section(tmp_path, "Q2.1")


def test_runs_are_in_the_courses_order(tmp_path):
    reinforce = {"advantage": "reward", "lr": 1}
    for name, flags in {"beta-0.1": {"beta": 0.1, "lr": 5e-5}, "beta-0.4": {"beta": 0.4, "lr": 5e-7},
                        "alpha-10": {"alpha": 10.0, **reinforce}, "alpha-2": {"alpha": 2.0, **reinforce},
                        "loo-2": {"alpha": 2.0, **reinforce, "advantage": "loo"}, "mine": {"policy": "a"},
                        "old": {"samples_per_prompt": 2}, "baseline": {}}.items():
        write_run(tmp_path / name, 0.5, 0, "x", flags, test_loss=0.5, test_accuracy=1, test_margin=0)
    found = run_folders.load_runs(tmp_path)
    names = ["baseline", "alpha-2", "alpha-10", "loo-2", "beta-0.4", "beta-0.1", "mine", "old"]
    assert [run.name for run in found] == names
    assert found[6].method == "evaluated"
    config = json.loads((tmp_path / "baseline" / "config.json").read_text())
    del config["flags"]["samples_per_prompt"]  # a run from before there was this flag
    (tmp_path / "baseline" / "config.json").write_text(json.dumps(config))
    assert run_folders.load_runs(tmp_path)[0].method == "untouched"


@pytest.mark.usefixtures("text_only")
def test_seeds_are_put_together(folder):
    for seed, reward in ((1, 0.8), (2, 1.0)):
        flags = {"alpha": 0.02, "advantage": "reward", "seed": seed}
        write_run(folder / f"seed-{seed}" / "alpha-0.02", reward, 10.5 + seed, "x", flags)
    write_run(folder / "seed-3" / "alpha-0.02", 0.1, 10.5, "x", flags)  # seed 2 once more: not another seed
    report.main([str(folder)])
    row = cells(section(folder, "Other seeds"), "`alpha-0.02`")
    assert row["seeds"] == "0, 1, 2" and row["test reward"] == "0.900 (0.800 to 1.000)"
    assert row["KL, nats"] == "12.17 (11.50 to 12.50)"
    assert "`alpha-2`" not in section(folder, "Other seeds")


@pytest.mark.usefixtures("text_only")
def test_text_is_shown_harmlessly(folder):
    odd = "it\x1b[31m\n| zwei\u202e\u2028<b>*x*</b> `y` \x9b \n\n## Q9 "
    change = json.loads((folder / "baseline" / "eval.json").read_text())
    change["samples"][0] |= {"prompt": odd, "completion": odd}
    (folder / "baseline" / "eval.json").write_text(json.dumps(change))
    report.main([str(folder)])
    text = (folder / "results.md").read_text()
    assert not set(text) & set("\x1b\x9b\u202e\u2028") and "\n## Q9" not in text
    escaped = "**it \\[31m \\| zwei \\<b\\>\\*x\\*\\</b\\> \\`y\\` \\#\\# Q9** ..."
    lines = [" ".join(line.split()) for line in text.splitlines() if "zwei" in line and not line.startswith("    ")]
    assert lines == [escaped]  # all others are indented blocks, in which nothing is obeyed


def test_a_table_is_aligned_and_leaves_out_empty_columns():
    rows = [{"run": "a|b", "note": "", "": "x"}, {"run": "c", "KL": "1.50", "note": ""}]
    assert tables.table(rows) == ["", "| run  |     | KL   |", "| ---- | --- | ---- |", "| a\\|b | x   |      |",
                                  "| c    |     | 1.50 |", ""]
    assert tables.table(rows, "some")[1] == "<!-- some -->" and tables.table(rows, "some")[-2] == "<!-- end -->"


def test_an_error_shows_at_least_one_digit():
    assert tables.plus_minus(0.98804, 0.00086, 3) == "0.9880 ± 0.0009"
    assert tables.plus_minus(0.5, 0.01, 3) == "0.500 ± 0.010"
    assert tables.plus_minus(0.5, 1e-18, 2) == "0.50 ± 0.00" and tables.plus_minus(0.5, None, 2, "+") == "+0.50"
    assert tables.plus_minus(2, 3e-7, 2) == "2.0000 ± 0.0000"  # four will do
    assert [tables.short(number) for number in (5e-7, 1e-4, 0.02, 3.5e-5, 0)] == ["5e-7", "1e-4", "0.02", "3.5e-5", "0"]


@pytest.fixture
def pages(tmp_path):
    """A README.md, docs/ and docs/figures/ to fill, and what a run of the report has drawn."""
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "README.md").write_text("one\n")
    (tmp_path / "docs" / "results.md").write_text("two\n")
    (tmp_path / "course").mkdir(exist_ok=True)
    (tmp_path / "course" / "frontier.png").write_text("drawn")
    (tmp_path / "course" / "dpo.png").write_text("drawn, too")
    return tmp_path


@pytest.mark.usefixtures("text_only")
def test_readme_and_docs_get_their_tables_and_figures_by_a_command(folder, pages):
    readme, page = pages / "README.md", pages / "docs" / "results.md"
    readme.write_text("one\n<!-- betas of course -->\nold\n<!-- end -->\ntwo\n<!-- runs of toy -->\nkept\n"
                      "<!-- end -->\n![](docs/figures/course-frontier.png) ![](docs/figures/toy-dpo.png)\n")
    page.write_text("A place: <!-- runs of course -->\n<!-- runs of course -->\n<!-- end -->\n"
                    "![](figures/course-dpo.png)\n<!-- betas of course -->\nold\n<!-- end -->\n")
    report.main([str(folder)])  # not asked to
    assert "\nold\n" in readme.read_text()
    fill_in.fill_in(folder, pages)
    once = readme.read_text(), page.read_text()
    marked = r"one\n<!-- betas of course -->\n\n\| run .*`beta-0.4`.*\|\n\n<!-- end -->\ntwo\n"
    assert re.search(marked, once[0], re.DOTALL) and "<!-- runs of toy -->\nkept\n" in once[0]
    assert "`alpha-0.02`" in once[1] and "A place: <!-- runs of course -->\n<!-- runs of course -->\n\n| run" in once[1]
    assert all("old" not in text and "`beta-0.4`" in text for text in once)
    copied = {path.name: path.read_text() for path in (pages / "docs" / "figures").iterdir()}
    assert copied == {"course-frontier.png": "drawn", "course-dpo.png": "drawn, too"}
    fill_in.fill_in(folder, pages)
    assert (readme.read_text(), page.read_text()) == once


@pytest.mark.parametrize(("place", "message"), [
    ("![](figures/course-none.png)\n", "shows a figure none.png, for which"),
    ("<!-- gammas of course -->\n<!-- end -->", "has a place for a table gammas, which"),
    ("<!-- runs of course -->\nold\n", "has a place for a table runs, but no <!-- end --> after it"),
    ("<!-- runs of course -->\n<!-- betas of course -->\n<!-- end -->", "table runs, but no <!-- end --> after it"),
])
@pytest.mark.usefixtures("text_only")
def test_a_place_that_cannot_be_filled_is_said_and_nothing_is_written(folder, pages, capsys, place, message):
    (pages / "README.md").write_text("<!-- runs of course -->\nold\n<!-- end -->\n(docs/figures/course-dpo.png)\n")
    (pages / "docs" / "results.md").write_text(place)
    report.main([str(folder)])
    with pytest.raises(SystemExit):
        launch(lambda: fill_in.fill_in(folder, pages))
    said = capsys.readouterr().err
    assert f"{pages}/docs/results.md " in said and message in said
    assert "\nold\n" in (pages / "README.md").read_text() and (pages / "docs" / "results.md").read_text() == place
    assert not any((pages / "docs" / "figures").iterdir())
