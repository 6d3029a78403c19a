"""The report: measures by hand, the limit against exact enumeration, and a report of whatever is or is not there."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import common
import plot
from report import measures, report, tables
from support import runs


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    """Nobody looks at these, and pixels take time."""
    monkeypatch.setattr(report, "DPI", 20)


@pytest.fixture
def text_only(monkeypatch):
    monkeypatch.setattr(report, "figures", lambda found: [])


# ---- measures of text --------------------------------------------------------------------------------------


def test_distinct_is_the_share_of_different_ngrams_within_completions():
    # a b, b a, a b | a b: 4 bigrams, 2 different ones. Pairs across completions (b a) don't count.
    assert measures.distinct(["a b a b", "a  b\n"], 2) == 2 / 4
    assert measures.distinct(["a b a b", "a  b\n"], 1) == 2 / 6
    assert measures.distinct(["one", ""], 2) is None and measures.distinct(["one", ""], 1) == 1


def test_repeated_counts_every_text_that_has_a_twin():
    assert measures.repeated(["a", "b", "a", "c", "a"]) == 3 / 5  # three times a
    assert measures.repeated(["a", "b"]) == 0


def scored(values, length=2):
    return [{"reference_logp": value * length, "length": length} for value in values]


def test_log_prob_a_token_weighs_completions_by_their_length():
    rows = [{"reference_logp": -4.0, "length": 1}, {"reference_logp": -2.0, "length": 3}]
    assert measures.logp_a_token(rows) == -6 / 4  # not the mean of -4 and -2/3


def test_natural_is_the_share_within_the_middle_of_the_originals_own():
    # The original's completions: -0.00, -0.01 .. -1.00 nats a token. Its middle 95 % is -0.975 to -0.025.
    originals = scored([-i / 100 for i in range(101)])
    assert measures.natural(scored([-0.5, -0.97, -0.03, -0.98]), originals) == 3 / 4
    # A word over and over that the original finds too easy is as unnatural as noise.
    assert measures.natural(scored([-0.01, -8.0]), originals) == 0
    assert measures.natural(originals, originals) == pytest.approx(95 / 101)


# ---- what is possible --------------------------------------------------------------------------------------


def test_best_of_n_by_hand():
    # Of 0, 1/4, 1/2, 1 there are 6 ways to take two: maximum 1/4 in one of them, 1/2 in two, 1 in three.
    rewards = np.array([[0.5, 0.0, 1.0, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert measures.best_of(rewards, 2) == pytest.approx([(0.25 + 2 * 0.5 + 3 * 1) / 6, 0.25])
    assert measures.best_of(rewards, 1) == pytest.approx([0.4375, 0.25])
    assert measures.best_of(rewards, 4) == pytest.approx([1, 0.25])
    assert measures.counts(32) == [1, 2, 4, 8, 16, 32] and measures.counts(6) == [1, 2, 4]


def test_best_of_n_is_right_on_average_over_everything_that_can_be_sampled():
    """Three completions of probability 1/2, 1/4, 1/4 and reward 0, 1/2, 1. The best of two is worth, exactly,
    1/2 * (P(<= 1/2)^2 - P(<= 0)^2) + 1 * (1 - P(<= 1/2)^2) = 1/2 * (9/16 - 1/4) + 7/16 = 19/32."""
    p, reward = [0.5, 0.25, 0.25], [0.0, 0.5, 1.0]
    mean = 0.0
    for drawn in itertools.product(range(3), repeat=4):  # all 81 ways to sample four
        mean += math.prod(p[i] for i in drawn) * measures.best_of(np.array([[reward[i] for i in drawn]]), 2)[0]
    assert mean == pytest.approx(19 / 32)


def test_the_kl_of_best_of_n_is_at_most_the_bound():
    # n = 4: ln 4 - 3/4 = 0.636294. For m equally likely completions of different reward the best of 4 is the i-th
    # with probability (i^4 - (i-1)^4) / m^4; its KL comes close to the bound from below as m grows.
    assert measures.best_of_kl(4) == pytest.approx(0.636294, abs=1e-6) and measures.best_of_kl(1) == 0
    kls = []
    for m in (4, 64, 1024):
        chances = [(i**4 - (i - 1) ** 4) / m**4 for i in range(1, m + 1)]
        kls.append(sum(chance * math.log(chance * m) for chance in chances))
    assert kls[0] < kls[1] < kls[2] < measures.best_of_kl(4) < kls[2] + 0.01


def test_the_limit_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8, as 8 samples, rewards 0, 1, 2, 3, alpha 1 / ln 2, so exp(r / alpha) = 2^r.

    Z = 1/2 + 2/4 + 4/8 + 8/8 = 5/2; pi* = 1/5, 1/5, 1/5, 2/5; reward 9/5; KL = 9/5 ln 2 - ln 5/2. The weights are
    1/20 four times, 2/20 twice, 4/20, 8/20: effective samples 400 / (4 + 8 + 16 + 64).
    """
    rewards = np.array([[0, 0, 0, 0, 1, 1, 2, 3], [1.0] * 8])
    reward, kl, effective = measures.tilted(rewards, 1 / math.log(2))
    assert reward == pytest.approx([1.8, 1]) and effective == pytest.approx([400 / 92, 8])
    assert kl == pytest.approx([1.8 * math.log(2) - math.log(2.5), 0])
    reward, kl, effective = measures.tilted(rewards, 1e-4)  # what was not sampled cannot be found
    assert (reward[0], kl[0], effective[0]) == pytest.approx((3, math.log(8), 1))


@pytest.fixture(scope="module")
def exact():
    """A tiny policy, 2 prompts: probability and reward of each completion of 2 tokens, and 4,000 sampled rewards."""
    torch.manual_seed(0)
    size = {"vocab_size": 6, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform
    prompts = torch.tensor([[1, 2], [3, 4]])
    ways = [way for way in itertools.product(range(6), repeat=2) if way[0] != 0 or way[1] == 0]  # after eos only eos
    worth = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    chances = np.zeros((2, len(ways)))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for j, way in enumerate(ways):
                logps = model(torch.tensor([[*prompt, *way]])).logits[0, 1:3].log_softmax(-1)
                chances[i, j] = math.exp(logps[0, way[0]] + (logps[1, way[1]] if way[0] else 0))
    reward = np.array([float(worth[way]) for way in ways])
    tokens = common.sample(model, prompts.repeat_interleave(4000, dim=0), 2, torch.Generator().manual_seed(2))
    sampled = worth[tokens[:, 2], tokens[:, 3]].view(2, 4000).double().numpy()
    return chances, reward, sampled


def test_the_tiny_policys_completions_are_all_there(exact):
    chances, reward, sampled = exact
    assert chances.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert sampled.mean(axis=1) == pytest.approx(chances @ reward, abs=0.03)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1])
def test_the_limit_is_that_of_exact_enumeration(exact, alpha):
    chances, reward, sampled = exact
    best = chances * np.exp(reward / alpha)
    best /= best.sum(axis=1, keepdims=True)
    exact_kl = (best * np.log(best / chances)).sum(axis=1)
    found, kl, effective = measures.tilted(sampled, alpha)
    assert found == pytest.approx(best @ reward, abs=0.02) and kl == pytest.approx(exact_kl, abs=0.05)
    assert effective == pytest.approx(4000 / (best**2 / chances).sum(axis=1), rel=0.1)
    for other in (chances, chances[::-1], np.full_like(chances, 1 / len(reward)), 0.5 * (best + chances)):  # all worse
        value = other @ reward - alpha * (other * np.log(other / chances)).sum(axis=1)
        assert (value <= best @ reward - alpha * exact_kl + 1e-9).all()


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_best_of_n_is_that_of_exact_enumeration(exact, n):
    chances, reward, sampled = exact
    order = reward.argsort()
    below = chances[:, order].cumsum(axis=1)  # P(reward <= that of each completion)
    expected = (np.diff(below**n, axis=1, prepend=0) * reward[order]).sum(axis=1)
    assert measures.best_of(sampled, n) == pytest.approx(expected, abs=0.03)


def test_the_limit_ends_where_too_few_samples_are_effective(exact):
    rewards = exact[2][:, :32]
    points = measures.limit(rewards)
    alphas, gained, kls = zip(*points, strict=True)
    assert list(gained) == sorted(gained) and list(kls) == sorted(kls) and list(alphas) == sorted(alphas, reverse=True)
    effective = [measures.tilted(rewards, alpha)[2].mean() for alpha in (alphas[-1], alphas[-1] ** 2 / alphas[-2])]
    assert effective[1] < measures.ENOUGH <= effective[0]
    assert measures.between(2, [1, 3], [10, 30]) == 20 and measures.between(4, [1, 3], [10, 30]) is None


# ---- a folder of runs --------------------------------------------------------------------------------------


def write_run(folder, reward, kl, text, flags, logp=-2.0, metrics=(), **results):
    """A finished run: 20 completions that end in `text`, whose log-prob a token is `logp` and a little around it."""
    folder.mkdir(parents=True)
    given = {"policy": "distilgpt2", "reference": "distilgpt2", "seed": 0, "samples_per_prompt": 1, **flags}
    about = {"flags": given, "device": "cpu", "hardware": "EPYC, 2 threads", "precision": "fp32"}
    about["versions"] = {"torch": "2", "transformers": "5"}
    (folder / "config.json").write_text(json.dumps(about))
    k = given["samples_per_prompt"]
    rows = [{"number": i // k, "prompt": f"I saw {i // k}", "completion": f" {text} {i % 7}", "reward": (i % 8) / 8,
             "reference_logp": 5 * (logp + i / 1000), "length": 5} for i in range(20 * k)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    shown = [{key: row[key] for key in ("prompt", "completion", "reward")} for row in rows[::k][:5]]
    result = {"reward": reward, "reward_se": 0.01, "kl": kl, "kl_se": 0.02, "n": 20, "distinct_2": 0.5}
    (folder / "eval.json").write_text(json.dumps(result | {"samples": shown} | results))


def steps(count=8, **values):
    return [{"step": i + 1, **{key: value * i for key, value in values.items()}} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """The runs of a sweep, written by hand."""
    folder, rows = tmp_path / "course", steps(reward=0.1, kl=1.0)
    write_run(folder / "baseline", 0.5, 0, "it is", {})
    write_run(folder / "samples-16", 0.5, 0, "it is", {"samples_per_prompt": 16})
    reinforce = {"advantage": "reward", "lr": 1e-4}
    write_run(folder / "alpha-0", 0.95, 99, "big big", {**reinforce, "alpha": 0.0}, logp=-9, metrics=rows)
    write_run(folder / "alpha-0.02", 0.9, 12.5, "it was", {**reinforce, "alpha": 0.02}, metrics=rows)
    write_run(folder / "alpha-2", 0.55, 0.25, "it is", {**reinforce, "alpha": 2.0}, metrics=rows)
    write_run(folder / "alpha-9", 0.45, 50, "& %", {**reinforce, "alpha": 9.0}, logp=-9, metrics=rows)  # fell apart
    write_run(folder / "loo-0.02", 0.88, 5, "it was", {**reinforce, "alpha": 0.02, "advantage": "loo"}, metrics=rows)
    for beta, reward in ((0.1, 0.6), (0.25, 0.59), (0.4, 0.5)):
        trained = [{"epoch": 0, "test_loss": 0.693, "test_accuracy": 0.5, "test_margin": 0.0}]
        trained += steps(loss=0.1, accuracy=0.1, margin=0.1, chosen_logratio=-1.0, rejected_logratio=-2.0)
        trained += [{"epoch": 1, "test_loss": 0.6, "test_accuracy": 0.9, "test_margin": 0.2}]
        tested = {"test_loss": 0.7 - beta / 2, "test_accuracy": 0.9, "test_margin": 0.2}
        write_run(folder / f"beta-{beta}", reward, 0.1, "so", {"beta": beta, "lr": 5e-7}, metrics=trained, **tested)
    return folder


def section(folder, title):
    """A section of results.md, less its title."""
    text = (folder / "results.md").read_text()
    return re.search(rf"## {re.escape(title)}[^\n]*\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]


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
    assert all(f"({name})" in text for name in names) and "Not here" not in text
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
    assert "highest reward is that of `beta-0.1` (not told apart from `beta-0.25`, `beta-0.4`: within two" in betas
    assert "the lowest test loss, that of `beta-0.4`, does not choose" in betas
    about = json.loads((folder / "beta-0.1" / "config.json").read_text())
    about["flags"]["lr"] = 5e-5  # at another learning rate there is no number of the student's, and no contest
    (folder / "beta-0.1" / "config.json").write_text(json.dumps(about))
    report.main([str(folder)])
    betas = section(folder, "Q4.4")
    assert cells(betas, "`beta-0.1`")["a student's (theirs)"] == ""
    assert "At lr 5e-07 the highest reward is that of `beta-0.25` (not" in betas and "At lr 5e-05" not in betas


def test_rewards_are_compared_prompt_by_prompt_where_they_can_be(folder):
    best, other = (run for run in tables.load(folder) if run.name in ("beta-0.25", "beta-0.4"))
    assert not report.better(best, other)
    for row in other.completions:
        row["reward"] -= 0.02 + 0.01 * (row["number"] % 2)  # each worse, by 0.025 ± 0.001: far less than they vary
    assert report.better(best, other) and not report.better(other, best)
    other.completions.reverse()
    assert report.better(best, other)
    other.completions.pop()  # other prompts: 0.59 and 0.50, each ± 0.01, differ by 0.09 ± 0.014
    assert report.better(best, other)
    other.result["reward"] = 0.57  # 0.02 ± 0.014
    assert not report.better(best, other)


@pytest.mark.usefixtures("text_only")
def test_the_frontiers_tables(folder):
    report.main([str(folder)])
    text = section(folder, "The frontier")
    # Rewards 0, 1/8 .. 7/8, each twice a prompt: 20 prompts alike, so no error.
    assert cells(text, "1")["reward"] == "0.438 ± 0.000" and cells(text, "16")["reward"] == "0.875 ± 0.000"
    assert cells(text, "8")["KL at most, nats"] == "1.20"  # ln 8 - 7/8
    # beta-0.1 has reward 0.6 at a KL of 0.1. The limit has 0.6 where mean(r e^(r/alpha)) = 0.6 mean(e^(r/alpha)): at
    # alpha 0.46985, with KL 0.6 / 0.46985 - ln mean(e^(r/alpha)) = 0.1667; and 0.1 nats at alpha 0.62035, with 0.5643.
    row = cells(text, "`beta-0.1`")
    assert (row["the limit's reward for this KL"], row["the limit's KL for this reward"]) == ("0.564", "0.17")
    assert cells(text, "`alpha-0`")["the limit's KL for this reward"] == "-"  # beyond what is drawn


def test_a_limit_of_too_few_samples_is_not_drawn(folder):
    shutil.rmtree(folder / "samples-16")
    write_run(folder / "samples-4", 0.5, 0, "it is", {"samples_per_prompt": 4})
    report.main([str(folder)])
    assert "is not drawn: for no alpha at least 8 of the 4 samples" in section(folder, "The frontier")


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


def test_a_report_without_any_one_of_its_runs(folder, capsys):
    names = sorted(path.name for path in folder.iterdir())
    for name in names[::2]:
        shutil.move(folder / name, folder.parent / name)
        report.main([str(folder), "--expect", *names])
        said = capsys.readouterr()
        assert f"not here: `{name}`\n" in said.out and not said.err
        shutil.move(folder.parent / name, folder / name)
    for number, name in enumerate(names):  # and one after the other, down to none
        shutil.rmtree(folder / name)
        if number % 2 and any(folder.glob("*/config.json")):
            report.main([str(folder), "--expect", *names])
            assert f"`{name}`" in capsys.readouterr().out.split("not here: ")[1]


@pytest.mark.parametrize(
    ("name", "title", "said"),
    [
        ("baseline", "Q1.1", "*Not here: the untouched policy. `make RUNS=HERE baseline` makes it.*"),
        ("baseline", "Q3.2", "completions of the untouched policy, to tell natural text by. `make RUNS=HERE baseline`"),
        ("alpha-0", "Q2.2", "*Not here: a finished run with alpha 0. `make RUNS=HERE reinforce` makes it.*"),
        ("alpha-0", "Q3.1", "*Not here: the curve of a run with alpha 0. `make RUNS=HERE reinforce` makes it.*"),
        ("alpha-[29]", "Q3.2", "*Not here: three alphas. `make RUNS=HERE sweep` makes it.*"),
        ("beta-0.4", "Q4.4", "*Not here: three betas. `make RUNS=HERE sweep` makes it.*"),
        ("beta-*", "Q4.1", "*Not here: a finished DPO run. `make RUNS=HERE dpo` makes it.*"),
        ("samples-16", "The frontier", "for best-of-n and the limit. `make RUNS=HERE samples` makes it.*"),
    ],
)
@pytest.mark.usefixtures("text_only")
def test_a_section_says_what_it_lacks(folder, name, title, said):
    for path in folder.glob(name):
        shutil.rmtree(path)
    report.main([str(folder)])
    assert said.replace("HERE", str(folder)) in section(folder, title)


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
    assert "a finished run with alpha 0. `make demo` makes it" in section(Path("runs/toy"), "Q2.2")
    assert "three betas. `make demo sweep` makes it" in section(Path("runs/toy"), "Q4.4")


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({}, "make RUNS=HERE baseline"),
        ({"limit": None, "eval_limit": 500, "seed": 1}, 'make RUNS=HERE FLAGS="--eval-limit 500 --seed 1" baseline'),
        ({"policy": "mine", "reference": "mine", "pairs": "some"}, "make RUNS=HERE POLICY=mine PAIRS=some baseline"),
        ({"policy": "build/toy/policy", "reference": "build/toy/policy"}, "make demo RUNS=HERE"),  # not there any more
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
    assert f"- to make one of these: `make RUNS={tmp_path} {tmp_path}/NAME/eval.json`; all of the sweep: `make" in said
    assert cells(section(tmp_path, "Q3.1"), "1")["KL, nats"] == "0.00" and "Not here" in section(tmp_path, "Q2.1")


def test_the_report_says_what_it_misses(tmp_path, capsys):
    for folder, message in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "has no run")):
        with pytest.raises(SystemExit):
            runs.launch(lambda folder=folder: report.main([str(folder)]))
        assert message in capsys.readouterr().err


def test_runs_are_in_the_courses_order(tmp_path):
    reinforce = {"advantage": "reward", "lr": 1}
    for name, flags in {"beta-0.1": {"beta": 0.1, "lr": 5e-5}, "beta-0.4": {"beta": 0.4, "lr": 5e-7},
                        "alpha-10": {"alpha": 10.0, **reinforce}, "alpha-2": {"alpha": 2.0, **reinforce},
                        "loo-2": {"alpha": 2.0, **reinforce, "advantage": "loo"}, "mine": {"policy": "a"},
                        "old": {"samples_per_prompt": 2}, "baseline": {}}.items():
        write_run(tmp_path / name, 0.5, 0, "x", flags, test_loss=0.5, test_accuracy=1, test_margin=0)
    found = tables.load(tmp_path)
    names = ["baseline", "alpha-2", "alpha-10", "loo-2", "beta-0.4", "beta-0.1", "mine", "old"]
    assert [run.name for run in found] == names
    assert found[6].method == "evaluated"
    config = json.loads((tmp_path / "baseline" / "config.json").read_text())
    del config["flags"]["samples_per_prompt"]  # a run from before there was this flag
    (tmp_path / "baseline" / "config.json").write_text(json.dumps(config))
    assert tables.load(tmp_path)[0].method == "untouched"


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


def test_readme_gets_its_tables_and_figures_by_a_command(folder, tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("one\n<!-- betas of course -->\nold\n<!-- end -->\ntwo\n<!-- runs of toy -->\nkept\n"
                      "<!-- end -->\n![](figures/course-frontier.png) ![](figures/toy-dpo.png)\n")
    report.main([str(folder), "--readme", str(readme)])
    once = readme.read_text()
    marked = r"one\n<!-- betas of course -->\n\n\| run .*`beta-0.4`.*\|\n\n<!-- end -->\ntwo\n"
    assert re.search(marked, once, re.DOTALL)
    assert "old" not in once and "<!-- runs of toy -->\nkept\n" in once
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["course-frontier.png"]
    report.main([str(folder), "--readme", str(readme)])
    assert readme.read_text() == once
    for place, message in (("![](figures/course-none.png)\n", "shows a figure none.png, for which"),
                           ("<!-- gammas of course -->\n<!-- end -->", "has a place for a table gammas, which")):
        readme.write_text(place)
        with pytest.raises(SystemExit):
            runs.launch(lambda: report.main([str(folder), "--readme", str(readme)]))
        assert f"README.md {message}" in capsys.readouterr().err and readme.read_text() == place


# ---- figures -----------------------------------------------------------------------------------------------


def test_running_mean_stands_in_the_middle_of_its_window():
    found, means = plot.running_mean([1, 2, 3, 4, 5, 6, 7, 8], [0.0, 1, 2, 6, 0, 0, 4, 0], window=2)
    assert found.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5] and means.tolist() == [0.5, 1.5, 4, 3, 0, 2, 2]
    assert plot.running_mean([1, 2], [3.0, 4.0])[1].tolist() == [3, 4]  # a short run: no mean, but a line


def test_a_figures_lines_are_the_runs_numbers(folder):
    found = report.Report(tables.load(folder))
    left, right = plot.reinforce_figure(found.reinforce).axes
    assert [line.get_label() for line in left.lines] == ["alpha-0", "alpha-0.02", "alpha-2", "alpha-9", "loo-0.02"]
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", "-", "-", "--"]
    assert left.lines[1].get_color() == left.lines[4].get_color() != left.lines[0].get_color()  # a colour an alpha
    assert right.lines[0].get_ydata() == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5])  # windows of 2 steps
    panel = plot.dpo_figure(found.dpo).axes[0]
    dots, start = panel.lines[2], panel.lines[3]
    assert dots.get_xydata().tolist() == [[0, 0.693], [8, 0.6]] and start.get_ydata()[0] == math.log(2)
    left, middle, right = plot.dpo_margins_figure(found.dpo).axes
    assert middle.lines[1].get_ydata() == pytest.approx([0, 0.2 / 0.1])  # nats, so without beta
    assert left.lines[1].get_ydata().tolist() == [0.5, 0.9]
    chosen, rejected = right.lines[:2]
    assert chosen.get_ydata()[-1] == -6.5 and rejected.get_ydata()[-1] == -13 and rejected.get_linestyle() == "--"
    axes = plot.frontier_figure(found.compared, found.rewards).axes[0]
    dots = [tuple(box.lines[0].get_xydata()[0]) for box in axes.containers]
    assert dots == [(run.result["kl"], run.result["reward"]) for run in found.compared[1:]]
    notes = [note for note in axes.texts if note.get_text()]
    assert sorted(note.get_text() for note in notes) == sorted(run.name for run in found.compared[1:])
    boxes = [note.get_window_extent() for note in notes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_report_loads_no_torch():
    light = "import sys, report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], cwd=runs.HOME).returncode == 0
