"""Whole runs through the scripts' command lines, in a world that toy.py makes in seconds."""

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import common
import dpo
import fast
import files
import grammar
import inputs
import reinforce
import report
import reward
import runs
import toy

SCRIPTS = {"reward": reward, "reinforce": reinforce, "dpo": dpo}
TINY = toy.Size(reviews=80, test_reviews=20, pairs=20, test_pairs=7, policy_width=32, classifier_width=32, layers=2,
                batch_size=16, epochs=4)


def labelled(texts):
    return [{"text": text, "label": int(i >= len(texts) / 2)} for i, text in enumerate(texts)]


def pair(n):
    words = {"positive_completion": f" is a joy, scene {n}.", "negative_completion": f" is a bore, scene {n}."}
    return {"prompt": f"Film {n}", **words}


@pytest.fixture(scope="session")
def reviews(world):
    """The texts of the world's training reviews."""
    return [row["text"] for row in files.read_rows(world / "prompts" / "train.jsonl")]


def save_classifier(folder, reviews, labels):
    """A classifier with random weights and these label names."""
    tokenizer = toy.scorer_tokenizer(reviews)
    toy.save_model(folder, toy.new_classifier(tokenizer, TINY, labels), tokenizer)


def flags(world, script, out, *more, **replaced):
    """The command line of a small run: names in `replaced` take the place of the world's folders."""
    folders = {name: world / name for name in ("policy", "reward_model", "prompts", "pairs")} | replaced
    given = {"--out": out, "--policy": folders["policy"], "--prompts": folders["prompts"]}
    given |= {"--reward-model": folders["reward_model"], "--device": "cpu", "--precision": "fp32"}
    if script == "reward":
        given["--reference"] = given["--policy"]
    if script == "dpo":
        given["--pairs"] = folders["pairs"]
    return [str(part) for item in given.items() for part in item] + [str(part) for part in more]


def call(script, *argv):
    SCRIPTS[script].main(list(map(str, argv)))


def change(path, **values):
    """Puts values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


rows_of = files.read_rows


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """One small run of each script, as a user would start them, and their eval.json."""
    folder = tmp_path_factory.mktemp("finished")
    call("reward", *flags(world, "reward", folder / "baseline"))
    call("reinforce", *flags(world, "reinforce", folder / "alpha-0.1", "--alpha", 0.1, "--lr", 1e-3))
    call("dpo", *flags(world, "dpo", folder / "beta-0.1", "--batch-size", 8, "--lr", 3e-3))
    return folder


# ---- what a run leaves behind ------------------------------------------------------------------------------

EVALUATED = {"reward", "reward_se", "n", "kl", "kl_se", "distinct_2", "distinct_2_texts", "mean_length"}
EVALUATED |= {"seconds", "samples"}


def test_the_baseline_run_folder(finished):
    folder = finished / "baseline"
    assert {path.name for path in folder.iterdir()} == {"config.json", "completions.jsonl", "eval.json"}
    result = json.loads((folder / "eval.json").read_text())
    assert set(result) == EVALUATED
    assert result["n"] == 20  # 21 test reviews, one of them too short
    assert result["kl"] == 0 and 0 <= result["reward"] <= 1 and len(result["samples"]) == 5
    rows = rows_of(folder / "completions.jsonl")
    assert [row["number"] for row in rows] == list(range(20))
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    assert result["reward"] == pytest.approx(rewards.mean().item())
    assert result["reward_se"] == pytest.approx(rewards.std().item() / math.sqrt(20))
    assert all(row["logp"] == row["reference_logp"] < 0 for row in rows)
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "reward.py" and config["flags"]["seed"] == 0 and config["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__


def test_the_reinforce_run_folder(finished):
    folder = finished / "alpha-0.1"
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "completions.jsonl", "eval.json", "model"}
    assert {path.name for path in folder.iterdir()} == names
    metrics = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]  # 80 prompts: 32 + 32 + 16, the ragged batch is used
    keys = ["step", "loss", "reward", "kl", "grad_norm", "tokens_per_second", "seconds"]
    assert all(list(row) == keys for row in metrics)
    assert metrics[0]["kl"] < 1e-5 and metrics[-1]["kl"] > metrics[0]["kl"]
    assert json.loads((folder / "eval.json").read_text())["kl"] > 0
    assert [row["step"] for row in rows_of(folder / "samples.jsonl")] == [0] * 5 + [3] * 5


def test_the_dpo_run_folder(finished):
    folder = finished / "beta-0.1"
    metrics = rows_of(folder / "metrics.jsonl")
    tests, steps = [row for row in metrics if "epoch" in row], [row for row in metrics if "step" in row]
    assert [row["epoch"] for row in tests] == [0, 1, 2] and "epoch" in metrics[0] and "epoch" in metrics[-1]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]  # 20 pairs: 8 + 8 + 4, twice
    keys = ["step", "loss", "accuracy", "margin", "chosen_logp", "rejected_logp", "chosen_logratio"]
    assert all(list(row) == [*keys, "rejected_logratio", "grad_norm", "seconds"] for row in steps)
    for row in steps:  # beta is 0.1; at the start nothing has moved
        assert row["margin"] == pytest.approx(0.1 * (row["chosen_logratio"] - row["rejected_logratio"]), abs=1e-5)
    assert steps[0]["chosen_logratio"] == pytest.approx(0, abs=1e-4) != steps[3]["chosen_logratio"]
    assert tests[0]["test_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # The second time through its pairs it knows them: 0.33 to 0.60 for six seeds. Seven test pairs show nothing.
    assert all(row["loss"] < 0.65 for row in steps[3:])
    result = json.loads((folder / "eval.json").read_text())
    assert set(result) == EVALUATED | {"test_loss", "test_accuracy", "test_margin"}
    assert result["test_loss"] == tests[2]["test_loss"]


@pytest.mark.parametrize("name", ["alpha-0.1", "beta-0.1"])
def test_the_trained_folder_loads_and_evaluates_to_the_runs_own_numbers(world, finished, tmp_path, name):
    folder = finished / name
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model")("the film")["input_ids"]
    before = AutoModelForCausalLM.from_pretrained(world / "policy")
    assert (model.transformer.wte.weight - before.transformer.wte.weight).abs().max() > 1e-4
    more = ["--policy", folder / "model", "--reference", world / "policy"]
    call("reward", *flags(world, "reward", tmp_path / "again"), *more)
    again, first = (json.loads((path / "eval.json").read_text()) for path in (tmp_path / "again", folder))
    assert {key: again[key] for key in EVALUATED - {"seconds"}} == {key: first[key] for key in EVALUATED - {"seconds"}}


def test_kl_of_the_evaluation_is_that_of_policy_to_reference(world, finished):
    """The evaluation's sampling, done again with the saved model; KL, log-probs and lengths row by row."""
    device = torch.device("cpu")
    policy, tokenizer = common.load_policy(str(finished / "beta-0.1" / "model"), device)
    reference, _ = common.load_policy(str(world / "policy"), device)
    order = common.seeded(0, "test order")
    prompts = common.load_prompts(str(world / "prompts"), "test", tokenizer, 10, order)
    tokens = common.sample(policy, prompts, 20, common.seeded(0, "evaluation"))
    mask = common.completion_mask(tokens[:, 10:], policy.config.eos_token_id)
    with torch.no_grad():
        p, q = (model(tokens).logits[:, 9:-1].log_softmax(-1) for model in (policy, reference))
    picked = [logps.gather(2, tokens[:, 10:, None])[..., 0] for logps in (p, q)]
    expected = {"kl": (p.exp() * (p - q)).sum(-1), "logp": picked[0], "reference_logp": picked[1], "length": 1 * mask}
    rows = rows_of(finished / "beta-0.1" / "completions.jsonl")
    assert [row["text"] for row in rows] == common.decode(tokenizer, tokens)
    for key, values in expected.items():
        assert [row[key] for row in rows] == pytest.approx((values * mask).sum(-1).tolist(), abs=1e-3), key
    assert json.loads((finished / "beta-0.1" / "eval.json").read_text())["kl"] > 0.01


@pytest.mark.parametrize("script", ["reinforce", "dpo"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, tmp_path, script):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        more = ["--seed", seed, "--eval-limit", 4, "--limit", 16, "--batch-size", 8, "--lr", 1e-3]
        call(script, *flags(world, script, tmp_path / name, *more))
        rows = without_times(rows_of(tmp_path / name / "metrics.jsonl"))
        found.append((rows, rows_of(tmp_path / name / "completions.jsonl")))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    prompts = [[row["prompt"] for row in completions] for _, completions in found]
    assert prompts[0] == prompts[2]  # the test prompts are the same whatever the seed


@pytest.mark.parametrize("advantage", ["reward", "loo"])
def test_reinforce_learns_to_be_rewarded_and_the_kl_holds_it_back(world, tmp_path, monkeypatch, advantage):
    def share_of_e(scorer, texts):  # a reward that is plain to learn in seconds
        return torch.tensor([text.count("e") / max(len(text), 1) for text in texts])

    monkeypatch.setattr(reinforce, "positivity", share_of_e)
    more = ["--advantage", advantage, "--lr", 1e-2, "--epochs", 20, "--batch-size", 16, "--eval-limit", 2]
    ends = {}
    for alpha in (0, 100):
        call("reinforce", *flags(world, "reinforce", tmp_path / str(alpha), "--alpha", alpha, *more))
        rows = rows_of(tmp_path / str(alpha) / "metrics.jsonl")
        ends[alpha] = [sum(row[key] for row in rows[-10:]) / 10 for key in ("reward", "kl")]
    start = rows[0]["reward"]
    gain = {"reward": 1.25, "loo": 2}[advantage]  # less noise, faster: seen here 1.56 and over 2
    assert ends[0][0] > gain * start and ends[100][0] < 1.2 * start, (start, ends)
    assert ends[0][1] > 10 * ends[100][1], ends
    assert [row["step"] for row in rows_of(tmp_path / "0" / "samples.jsonl")] == [0, 0, 50, 50, 100, 100]


def test_limits_take_that_many_rows(world, tmp_path):
    more = ["--limit", 5, "--eval-limit", 3, "--batch-size", 2, "--epochs", 1]
    call("dpo", *flags(world, "dpo", tmp_path / "run", *more))
    assert sum("step" in row for row in rows_of(tmp_path / "run" / "metrics.jsonl")) == 3
    assert len(rows_of(tmp_path / "run" / "completions.jsonl")) == 3


def test_bf16_runs_and_starts_close_to_the_reference(world, tmp_path):
    more = ["--limit", 8, "--batch-size", 4, "--epochs", 1, "--eval-limit", 4, "--lr", 1e-3]
    for script, key, start, tolerance in (("dpo", "loss", math.log(2), 0.005), ("reinforce", "kl", 0, 0.01)):
        for precision in ("bf16", "fp32"):
            call(script, *flags(world, script, tmp_path / precision / script, *more, "--precision", precision))
        low, high = (rows_of(tmp_path / name / script / "metrics.jsonl") for name in ("bf16", "fp32"))
        steps = [row for row in low if "step" in row]
        assert steps[0][key] == pytest.approx(start, abs=tolerance)
        assert without_times(low) != without_times(high)  # the flag is not ignored
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / script / "model")
        assert model.dtype == torch.float32


@pytest.mark.parametrize(("script", "more"), [("reinforce", ["--alpha", 0.1]), ("dpo", [])])
def test_micro_batches_change_nothing(world, tmp_path, monkeypatch, script, more):
    # Batches of 8 in parts of 3, 3 and 2: the parts' means count by their rows, or the numbers would differ.
    # Rewards 1/B, 2/B .. 1, where the tiny classifier's are all alike: each row must meet its own.
    monkeypatch.setattr(reinforce, "positivity", lambda scorer, texts: torch.arange(1, len(texts) + 1) / len(texts))
    more += ["--limit", 16, "--batch-size", 8, "--epochs", 1, "--eval-limit", 4, "--lr", 1e-3]
    call(script, *flags(world, script, tmp_path / "whole", *more))
    call(script, *flags(world, script, tmp_path / "parts", *more, "--micro-batch", 3))
    whole, parts = (without_times(rows_of(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert len(whole) == len(parts) >= 2
    for row, same in zip(whole, parts, strict=True):
        # an accuracy counts the signs of margins, which at the start are 0 but for rounding
        assert {**row, "accuracy": 0} == pytest.approx({**same, "accuracy": 0}, rel=1e-4, abs=1e-5)
    assert whole != parts  # they were summed in another order: the flag is not ignored


def test_the_precision_that_auto_found_is_written_down(world, tmp_path):
    call("reward", *flags(world, "reward", tmp_path / "run", "--precision", "auto", "--eval-limit", 2))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (about["precision"], about["device"]) == (fast.pick_device("cpu", "auto")[1], "cpu")


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "bench.py", "--tiny", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=Path(runs.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for work in ("REINFORCE", "DPO", "evaluation"):
        lines = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith(f"| {work}")]
        assert "ours, fp32" in lines and "the course's way, fp32" in lines


def test_the_report_of_real_runs(world, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs")
    more = ["--samples-per-prompt", 16, "--eval-limit", 4]
    call("reward", *flags(world, "reward", tmp_path / "runs" / "samples-16", *more))
    capsys.readouterr()
    report.main([str(tmp_path / "runs")])
    text = (tmp_path / "runs" / "results.md").read_text()
    for name in ("reinforce.png", "dpo.png", "dpo-margins.png", "frontier.png"):
        assert (tmp_path / "runs" / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    assert "4 prompts, 16 samples each" in text and not capsys.readouterr().err


def test_samples_per_prompt(world, tmp_path):
    found = []
    for name, more in (("once", []), ("thrice", ["--samples-per-prompt", 3])):
        call("reward", *flags(world, "reward", tmp_path / name, "--eval-limit", 4, *more))
        result = json.loads((tmp_path / name / "eval.json").read_text())
        found.append((result, rows_of(tmp_path / name / "completions.jsonl")))
    (once, single), (thrice, rows) = found
    assert [row["number"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [row["prompt"] for row in rows[::3]] == [row["prompt"] for row in single]
    assert all(len({row["completion"] for row in rows[i : i + 3]}) > 1 for i in (0, 3, 6, 9))
    assert thrice["n"] == once["n"] == 4
    means = torch.tensor([row["reward"] for row in rows], dtype=torch.float64).view(4, 3).mean(dim=1)
    assert (thrice["reward"], thrice["reward_se"]) == pytest.approx((means.mean().item(), means.std().item() / 2))
    assert [sample["completion"] for sample in thrice["samples"]] == [row["completion"] for row in rows[::3]]
    assert thrice["distinct_2_texts"] == 4


# ---- texts, tokens, rewards --------------------------------------------------------------------------------


def test_prompt_ids_are_those_of_the_whole_text(reviews):
    texts = [*reviews, "x" * 500 + " the film", "the film" + " " * 300 + "was good", "é" * 90, "", "is" * 400]
    texts += ["the film <|endoftext|> was good and our hero is a joy" * 9, "don't " * 60, "🎬 " * 50, "a\nb\t c"]
    # A text is cut after 16 characters for each token: here inside a word, inside spaces, at a contraction.
    texts += [" unforgettableness of it all", " the" + " " * 40 + "film", " the           film's", " \n \t \n    film"]
    texts += ["!" * 14 + "\x1f the film", "x" * 14 + "\u2003 the film"]  # white space for Python only, and for all
    texts += ["é" * 15 + " film" * 9, " " * 40 + "film", "film\u00a0was \u2003good  indeed" * 9]
    tokenizer = toy.policy_tokenizer(texts)  # so runs of spaces and the long words are one token each
    for length in (1, 2, 3, 10):
        whole = [common.encode(tokenizer, [text])[0][:length] for text in texts]
        assert common.first_tokens(tokenizer, texts, length) == whole


def test_an_end_mark_inside_a_text_stays_text(world):
    tokenizer = common.load_tokenizer("--policy", str(world / "policy"))
    (ids,) = common.encode(tokenizer, ["good <|endoftext|> bad"])
    assert tokenizer.eos_token_id not in ids
    assert common.decode(tokenizer, torch.tensor([ids])) == ["good <|endoftext|> bad"]
    assert common.decode(tokenizer, torch.tensor([[*ids, tokenizer.eos_token_id]])) == ["good <|endoftext|> bad"]


def test_test_prompts_are_shuffled_and_the_first_n_stay_the_first_n(world, reviews):
    tokenizer = common.load_tokenizer("--policy", str(world / "policy"))
    loaded = [
        common.load_prompts(str(world / "prompts"), "train", tokenizer, 12, common.seeded(0, "test order"), limit)
        for limit in (None, 7)
    ]
    assert loaded[0].shape == (80, 12) and loaded[0][:7].tolist() == loaded[1].tolist()
    whole = [common.encode(tokenizer, [text])[0][:12] for text in reviews]
    assert sorted(loaded[0].tolist()) == sorted(whole) and loaded[0].tolist() != whole


def test_positivity_is_the_softmax_of_the_positive_label_row_by_row(world, tmp_path):
    texts = ["the script is superb", "the pace is a mess " * 40, "", "go and see it"]  # one far over 128 positions
    scorer = reward.load_scorer(str(world / "reward_model"), torch.device("cpu"))
    scorer.tokenizer.model_max_length = 1000  # more than the model has positions
    found = reward.positivity(scorer, texts)
    assert found.shape == (4,) and found.requires_grad is False
    for text, score in zip(texts, found, strict=True):
        inputs = scorer.tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        logits = scorer.model(**inputs).logits[0]
        assert score.item() == pytest.approx((logits[1].exp() / logits.exp().sum()).item(), abs=1e-5)
    shutil.copytree(world / "reward_model", tmp_path / "swapped")
    change(tmp_path / "swapped" / "config.json", id2label={0: "POSITIVE", 1: "NEGATIVE"})
    swapped = reward.load_scorer(str(tmp_path / "swapped"), torch.device("cpu"))
    torch.testing.assert_close(reward.positivity(swapped, texts), 1 - found, atol=1e-4, rtol=0)


def test_pairs_are_cut_counted_and_encoded_apart(world, tmp_path, capsys):
    tokenizer = common.load_tokenizer("--policy", str(world / "policy"))
    rows = [pair(0), {**pair(1), "prompt": "the film " * 40}, {**pair(2), "negative_completion": ""}]
    toy.save_rows(tmp_path / "pairs", train=rows, test=rows[:1])
    pairs = dpo.load_pairs(str(tmp_path / "pairs"), tokenizer, tokenizer.eos_token_id, 32)
    said = capsys.readouterr().out
    assert "as they stand" in said and "train pairs: 1 of 3; 2 left out (an empty text, another layout" in said
    expected = [common.encode(tokenizer, [rows[0][column]])[0] for column in dpo.COLUMNS]
    eos = [tokenizer.eos_token_id]
    assert pairs["train"] == [(expected[0], expected[1] + eos, expected[2] + eos)]


# ---- hostile input: taken as it is, or refused by row and column -------------------------------------------

HOSTILE = [
    "nul \x00 and bell \x07 and escape \x1b[2J\x1b[31m in a film that our hero is a joy to see in",
    "the film " * 110_000,  # a megabyte
    "x" * 1_000_000,  # and without a space
    "🎬 👩‍👩‍👧 🏳️‍🌈 é e\u0301 in a film that our hero is a joy to see in this year",
    "\u202eשלום עולם\u2066 ومرحبا\u2029 in a film that our hero is a joy to see in this year",
    "<|endoftext|> a film [SEP] with <|endoftext|> inside <|endoftext|>, our hero is a joy to see",
    "| a | table | **bold** <script>alert(1)</script> `code` # title in a film to see in this year",
]


def test_hostile_texts_are_trained_on_as_texts_and_shown_harmlessly(world, tmp_path, capsys):
    here = tmp_path / "wörld with spaces"
    shutil.copytree(world, here)
    shutil.rmtree(here / "prompts")
    shutil.rmtree(here / "pairs")
    hostile = labelled([*HOSTILE, "", " \n "])
    toy.save_rows(here / "prompts", train=hostile, test=hostile)
    rows = [{"prompt": "A film:", "positive_completion": f" {text}", "negative_completion": f" not {text}"}
            for text in HOSTILE]
    rows += [{**rows[0], "prompt": HOSTILE[1]}, {**rows[0], "positive_completion": ""}]
    toy.save_rows(here / "pairs", train=rows, test=rows[:1])
    out = tmp_path / "runs ü"
    call("reward", *flags(here, "reward", out / "baseline"))
    call("reinforce", *flags(here, "reinforce", out / "alpha-0.1", "--alpha", 0.1, "--batch-size", 3))
    call("dpo", *flags(here, "dpo", out / "beta-0.1", "--batch-size", 3, "--epochs", 1))
    said = capsys.readouterr()
    assert "train prompts: 7 of 9 reviews; 2 have fewer than 10 tokens" in said.out
    assert "column text: 1 of 9 texts, the first in row 0, hold control characters" in said.out
    assert "train pairs: 7 of 9; 2 left out" in said.out
    report.main([str(out)])
    results = (out / "results.md").read_text()
    shown = said.out + said.err + capsys.readouterr().out + results
    assert not set(shown) & set("\x00\x07\x1b\u202e\u2066\u2029") and "table" in results
    assert not re.search(r"^(?!    ).*<script>", results, re.MULTILINE)  # in indented blocks only
    tokenizer = common.load_tokenizer("--policy", str(here / "policy"))
    prompts = common.load_prompts(str(here / "prompts"), "train", tokenizer, 10, common.seeded(0, "test order"))
    assert tokenizer.eos_token_id not in prompts
    starts = common.decode(tokenizer, prompts)
    assert sum(any(text.startswith(start) for start in starts) for text in HOSTILE) >= 5  # a cut emoji is no text
    pairs = dpo.load_pairs(str(here / "pairs"), tokenizer, tokenizer.eos_token_id, 128)
    assert all(len(pair.prompt) + len(side) <= 128 for pair in pairs["train"] for side in (pair.chosen, pair.rejected))
    assert all(tokenizer.eos_token_id not in side[:-1] for pair in pairs["train"] for side in pair[1:])


NO_TEXTS = [  # what stands in row 2 of a column, and how it is named
    (None, "None"), (7, "7"), (1.5, "1.5"), (True, "True"), (["a"], "['a']"), ({"a": "b"}, "{'a': 'b'}"),
]


@pytest.mark.parametrize(("value", "shown"), NO_TEXTS)
@pytest.mark.parametrize("script", ["reward", "dpo"])
def test_what_is_no_text_is_refused_by_row_and_column(world, tmp_path, capsys, script, value, shown):
    """In the test split, too, after a train split whose texts make the library turn numbers into texts."""
    kind, column = {"reward": ("prompts", "text"), "dpo": ("pairs", "negative_completion")}[script]
    texts = [pair(n) | {"text": f"Film {n}"} for n in range(4)]
    rows = [*texts[:2], texts[2] | {column: value}, texts[3]]
    if script == "dpo":
        texts, rows = rows, texts
    toy.save_rows(tmp_path / "data", train=texts, test=rows)
    said = refusal(script, *flags(world, script, tmp_path / "run", **{kind: tmp_path / "data"}), capsys=capsys)
    split = {"reward": "test", "dpo": "train"}[script]
    assert f"--{kind} {tmp_path}/data, split {split}, row 2, column {column}: {shown} is not a text" in said
    assert not (tmp_path / "run").exists()


BROKEN_FILES = [  # content of test.jsonl or test.csv, and what the one line must say of it
    ("jsonl", b'{"text": "a"}\n{"text": "b\n', "Invalid encoding in string. in row 1"),
    ("jsonl", b'{"text": "a\\ud800"}\n', "surrogate pair in string is invalid. in row 0"),
    ("jsonl", b'{"text": "a\xff"}\n', "as a data set: save its files as UTF-8 ('utf-8' codec can't decode"),
    ("csv", b'text,label\n"a,1\nb,2\n', "EOF inside string starting at row 1"),
]


@pytest.mark.parametrize(("ending", "content", "reason"), BROKEN_FILES)
def test_a_broken_data_file_is_refused_with_its_row(world, tmp_path, capsys, ending, content, reason):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"test.{ending}").write_bytes(content)
    said = refusal("reward", *flags(world, "reward", tmp_path / "run", prompts=tmp_path / "data"), capsys=capsys)
    assert f"--prompts {tmp_path}/data cannot be loaded as a data set" in said and reason in said


def test_an_empty_cell_of_a_csv_file_is_named(world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.csv").write_text("text,label\na film,1\n,0\n")
    said = refusal("reward", *flags(world, "reward", tmp_path / "run", prompts=tmp_path / "data"), capsys=capsys)
    assert "row 1, column text: None is not a text, but missing (so is an empty cell of a csv file); rows count" in said


def test_json_rows_are_those_of_the_file_however_it_is_written(tmp_path):
    rows = [{"text": "a\u2028b"}, {"text": "c"}]
    for name, text in (("a", "\n".join(map(json.dumps, rows))), ("b", json.dumps(rows)),
                       ("c", "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(text, encoding="utf-8")
        assert inputs.json_rows(str(tmp_path / name), "test") == rows
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "test.csv").write_text("text\na\n")
    assert inputs.json_rows(str(tmp_path / "d"), "test") == inputs.json_rows("stanfordnlp/imdb", "test") == []


def test_control_characters_in_a_message_do_not_reach_the_terminal(world, tmp_path, capsys):
    toy.save_rows(tmp_path / "data", test=[{"te\x1b[31mxt": "a"}])
    said = refusal("reward", *flags(world, "reward", tmp_path / "run", prompts=tmp_path / "data"), capsys=capsys)
    assert "has no column 'text'; it has te [31mxt" in said
    said = refusal("reward", "--out", "x", "--seed", "a\x1bb", capsys=capsys)
    assert "argument --seed: invalid whole number value: 'a\\x1bb'" in said
    said = refusal("reward", "--out", "x", "--a\x1bb", capsys=capsys)
    assert "unrecognized arguments: --a b" in said


# ---- the offline world -------------------------------------------------------------------------------------


def test_the_probability_of_a_review_is_exact(monkeypatch):
    """Two openings, two words of praise, one of complaint; shares 1/4 and 3/4.

    "x good bad": 1/2 (x) * 1/2 (good) * the mean of 1/4 * 3/4 and 3/4 * 1/4 = 3/64. And all 18 reviews together: 1.
    """
    small = {"review": ["{a} {b} {b}"], "a": ["x", "y"], "b+": ["good", "fine"], "b-": ["bad"]}
    monkeypatch.setattr(grammar, "GRAMMAR", small)
    monkeypatch.setattr(grammar, "SHARES", (0.25, 0.75))
    rng, tallies, counts = random.Random(0), {}, Counter()
    for n in range(20_000):
        tally = Counter()
        text = grammar.write("review", grammar.SHARES[n % 2], rng, tally)
        tallies[text] = tally
        counts[text] += 1
    exact = {text: math.exp(grammar.log_probability(tally)) for text, tally in tallies.items()}
    assert exact["x good bad"] == pytest.approx(3 / 64) and exact["y bad bad"] == pytest.approx(5 / 32)
    assert len(exact) == 18 and sum(exact.values()) == pytest.approx(1)
    for text, p in exact.items():  # and they are drawn that often
        assert counts[text] / 20_000 == pytest.approx(p, abs=5 * math.sqrt(p / 20_000))
    # Praise twice: (9/16) / (9/16 + 1/16) for the share of 3/4.
    assert grammar.positive(tallies["x good fine"]) == pytest.approx(0.9)


def test_no_review_and_no_pair_is_written_twice(monkeypatch):
    """Of 24 possible reviews 11 are for the test and 11 for training: without care some would be in both."""
    small = {"review": ["{opening} {rest}"], "opening": ["x", "y"], "rest": ["{b} {b}", "{b}"]}
    monkeypatch.setattr(grammar, "GRAMMAR", small | {"b+": ["good", "fine"], "b-": ["bad"]})
    rng, seen = random.Random(0), set()
    splits = [grammar.write_reviews(11, rng, seen)[0] for _ in range(2)]
    assert len({row["text"] for rows in splits for row in rows}) == 22
    assert all([row["label"] for row in rows] == [0] * 6 + [1] * 5 for rows in splits)
    splits = [grammar.write_pairs(40, rng, seen) for _ in range(2)]
    assert len({tuple(row.values()) for rows in splits for row in rows}) == 80
    praise = [sum(row[column].count("good") + row[column].count("fine") for row in splits[0] + splits[1])
              for column in ("positive_completion", "negative_completion")]
    assert praise[0] > 2 * praise[1] > 0


def test_no_two_ways_lead_to_the_same_review(monkeypatch):
    """Else its probability would be larger than that of the way that was taken. All sentences, in all ways."""
    assert all(len(set(options)) == len(options) for options in grammar.GRAMMAR.values())
    words = [name for name, options in grammar.GRAMMAR.items() if not any("{" in option for option in options)]
    kept = {"story": 2, "craft": 2}  # judgements whole; of nouns, names and places one will do
    short = {name: grammar.GRAMMAR[name][: kept.get(name, 1)] for name in words if not name.endswith(("+", "-"))}
    monkeypatch.setattr(grammar, "GRAMMAR", grammar.GRAMMAR | short)

    def ways(name):
        names = [name] if name in grammar.GRAMMAR else [name + "+", name + "-"]
        for option in (option for name in names for option in grammar.GRAMMAR[name]):
            parts = re.split(r"\{(.+?)\}", option)  # text, name, text, name, ..., text
            choices = [[part] if i % 2 == 0 else list(ways(part)) for i, part in enumerate(parts)]
            yield from map("".join, itertools.product(*choices))

    for name, least in (("opening", 12), ("body", 1000), ("closing", 10)):
        texts = list(ways(name))
        assert len(texts) >= least and len(set(texts)) == len(texts), name


def test_the_worlds_files_are_like_the_courses(world):
    rows = {path.stem: rows_of(path) for path in (world / "prompts").iterdir()}
    assert [row["label"] for row in rows["train"]] == [0] * 40 + [1] * 40  # sorted by label, as the real ones
    assert not {row["text"] for row in rows["train"]} & {row["text"] for row in rows["test"]}
    assert len({row["text"] for row in rows["train"]}) == 80
    pairs = [rows_of(world / "pairs" / f"{split}.jsonl") for split in ("train", "test")]
    assert [len(split) for split in pairs] == [20, 7] and all(tuple(row) == dpo.COLUMNS for row in pairs[0] + pairs[1])
    assert not {str(row) for row in pairs[0]} & {str(row) for row in pairs[1]}
    scorer = reward.load_scorer(str(world / "reward_model"), torch.device("cpu"))
    assert scorer.model.config.model_type == "distilbert" and scorer.positive == 1


def test_the_worlds_tokenizers_read_anything(world):
    policy = common.load_tokenizer("--policy", str(world / "policy"))
    texts = ["The script is superb.", "An unseen wörd 🎬\n<br />!", ""]
    assert [policy.decode(ids) for ids in common.encode(policy, texts)] == texts
    assert len(common.encode(policy, texts)[0]) == 5  # four words and a full stop
    scorer = common.load_tokenizer("--reward-model", str(world / "reward_model"))
    assert scorer.tokenize("The script qux") == ["the", "script", "q", "##u", "##x"]


def test_both_models_learn(tmp_path):
    """In a world of 400 reviews, a few seconds. A policy that knows nothing has the vocabulary as perplexity."""
    size = TINY._replace(reviews=400, test_reviews=100, policy_width=64)
    found = toy.make_world(tmp_path / "world", size)
    assert 1 < found["grammars_perplexity"] < 3 and found["grammars_perplexity"] < found["perplexity"] < 100, found
    assert 0.5 < found["accuracy_of_cuts"] <= 1 and found["accuracy"] > 0.6 < found["best_accuracy"], found
    again = toy.make_world(tmp_path / "again", size)
    assert again == found
    for name in ("prompts/test.jsonl", "pairs/train.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "world" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_another_seed_makes_another_world(world, tmp_path):
    toy.make_world(tmp_path / "other", TINY, seed=1)
    for name in ("prompts/test.jsonl", "pairs/train.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_perplexities_of_a_policy_that_knows_nothing():
    """Equal logits: the vocabulary's size. The grammar: 1/4 for each text, of which 1/2 for its first word leaves 1/2
    for the rest, twice, for 3 and 2 tokens with the ends: 2^(2/5)."""
    tokenizer = toy.policy_tokenizer(["is it fun?"])
    policy = toy.new_policy(tokenizer, TINY)
    torch.nn.init.zeros_(policy.transformer.wte.weight)
    tally = Counter(nats=math.log(4))  # no judgement
    firsts = Counter([tokenizer("is")["input_ids"][0]] * 3 + [5] * 3)
    found = toy.perplexities(policy.eval(), tokenizer, ["is it?", "is?"], [tally, tally], firsts)
    assert found == pytest.approx((len(tokenizer), 2 ** (2 / 5)), rel=1e-4)


def test_a_world_is_there_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    out = tmp_path / "worlds" / "one"

    def make(folder, seed):
        (folder / "prompts").mkdir()  # fails where something is left over
        calls.append(seed)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    calls, found = [], dict.fromkeys(("perplexity", "grammars_perplexity", "accuracy", "best_accuracy"), 0.5)
    found |= {"policy_parameters": 1, "reward_model_parameters": 1, "accuracy_of_cuts": 0.5}
    monkeypatch.setattr(toy, "make_world", make)
    with pytest.raises(SystemExit) as stopped:
        runs.launch(lambda: toy.main(["--out", str(out)]))
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err and not out.exists()
    toy.main(["--out", str(out)])
    assert sorted(path.name for path in out.parent.iterdir()) == ["one"]
    assert {path.name for path in out.iterdir()} == {"prompts", "world.json"}
    for again, message in ((out, "is there already; remove it (rm -r"), (out / "world.json" / "x", "cannot be")):
        with pytest.raises(SystemExit):
            runs.launch(lambda again=again: toy.main(["--out", str(again)]))
        assert message in capsys.readouterr().err


def test_make_demo_runs_what_is_missing_and_nothing_else(world, tmp_path):
    """The whole demo as a user calls it, in the tiny world; then with everything there, then with a run missing; and
    what the sweep and other seeds would add."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    folder = tmp_path / "toy"

    def make(*more, python=sys.executable):
        flags = "--eval-limit 6 --limit 16 --device cpu"
        given = [f"RUNS={folder}", f"WORLD={world}", f"PYTHON={python}", f"FLAGS={flags}", "DPO_FLAGS=--epochs 1"]
        command = ["make", "--no-print-directory", "demo", *given, *more]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=Path(__file__).parent)

    first = make()
    assert first.returncode == 0, first.stderr
    runs_made = ["alpha-0", "alpha-0.1", "baseline", "beta-0.1", "samples-32"]
    assert sorted(path.parent.name for path in folder.glob("*/eval.json")) == runs_made
    for name in ("results.md", "reinforce.png", "dpo.png", "dpo-margins.png", "frontier.png"):
        assert (folder / name).exists(), name
    table = [line.split("`")[1] for line in first.stdout.splitlines() if line.startswith("| `")]
    assert table == ["baseline", "alpha-0", "alpha-0.1", "beta-0.1"] and "not here" not in first.stdout
    config = json.loads((folder / "alpha-0" / "config.json").read_text())["flags"]
    assert (config["prompt_len"], config["completion_len"], config["advantage"]) == (10, 20, "loo")
    assert json.loads((folder / "beta-0.1" / "config.json").read_text())["flags"]["lr"] == 5e-5
    config = json.loads((folder / "samples-32" / "config.json").read_text())["flags"]
    assert (config["samples_per_prompt"], config["eval_limit"]) == (32, 500)  # not the 6 of FLAGS

    def planned(*more):
        return [line for line in make("-n", *more).stdout.replace("\\\n", "").splitlines() if ".py" in line]

    assert [line.split()[1:3] for line in planned()] == [["report.py", str(folder)]]  # nothing is run again
    (folder / "alpha-0" / "eval.json").unlink()  # as if it had been cut off in its evaluation
    again = planned()
    assert len(again) == 2 and "reinforce.py" in again[0] and "--alpha 0 " in again[0] and "report.py" in again[1]
    assert [line.split()[1:3] for line in planned("report")] == [["report.py", str(folder)]]  # and only that
    more = "\n".join(planned("MORE=loo-0.3 beta-0.5-lr-1e-3"))
    assert "--advantage loo --alpha 0.3" in more and "--beta 0.5 --lr 1e-3" in more
    sweep = planned("sweep", "ALPHAS=0 7", "BETAS=0.1 3")
    assert [re.search(r"--(alpha|beta) (\S+)", line)[2] for line in sweep[:-1]] == ["0", "7", "3"]
    assert "report.py" in sweep[-1] and "alpha-7" in sweep[-1]
    seeds = [line for line in planned("seeds", "SEEDS=5") if "report.py" not in line]
    assert all("seed-5" in line and "--seed 5" in line for line in seeds[1:]) and len(seeds) == 5  # alpha-0, and four
    together = make("baseline")
    assert together.returncode != 0 and "in the small world there are only" in together.stderr


# ---- bad input: one clear line, exit code not 0, nothing half-written --------------------------------------


def refusal(script, *argv, capsys):
    """Runs a script as its last line does -> what it said on stderr. It must have stopped with a non-zero code."""
    with pytest.raises(SystemExit) as stopped:
        runs.launch(lambda: call(script, *argv))
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]  # after progress bars, if any


@pytest.fixture(scope="session")
def odd(world, reviews, tmp_path_factory):
    """Folders that are not what the flags want."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(world / "policy", folder / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    save_classifier(folder / "stars", reviews, ["1 star", "5 stars"])
    shutil.copytree(world / "policy", folder / "cut-short")
    weights = (folder / "cut-short" / "model.safetensors").read_bytes()
    (folder / "cut-short" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    ignore = shutil.ignore_patterns("tokenizer*", "vocab*")
    shutil.copytree(world / "reward_model", folder / "mute-classifier", ignore=ignore)
    shutil.copytree(world / "policy", folder / "endless")
    change(folder / "endless" / "config.json", eos_token_id=[0, 1])
    (folder / "no-rows").mkdir()
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(folder / "no-rows" / "test.parquet")
    toy.save_rows(folder / "no-train", test=labelled(reviews))
    toy.save_rows(folder / "numbers", train=[{**pair(0), "prompt": 7}], test=[{**pair(0), "prompt": 7}])
    (folder / "empty").mkdir()
    toy.save_rows(folder / "no-test", train=labelled(reviews))
    toy.save_rows(folder / "no-test-pairs", train=[pair(0)])
    toy.save_rows(folder / "no-text", test=[{"review": "fine", "stars": 3}])
    toy.save_rows(folder / "short", test=labelled(["Short.", "Too."]))
    toy.save_rows(folder / "missing", test=labelled([*reviews[:3], None]))
    toy.save_rows(folder / "no-rejected", train=[{"prompt": "a", "positive_completion": "b"}])
    toy.save_rows(folder / "empty-pairs", train=[pair(0)], test=[{**pair(1), "positive_completion": ""}])
    return folder


BAD_FOLDERS = [  # script, flag, folder below `odd`, what the one line must say
    ("reward", "--policy", "nowhere", "--policy {}: there is no such folder"),
    ("reward", "--policy", "empty", "--policy {} cannot be loaded as a language model"),
    ("reward", "--policy", "no-tokenizer", "--policy {} has no tokenizer: put its files beside the model"),
    ("reward", "--policy", "cut-short", "as a language model: model.safetensors is cut off or broken, copy or"),
    ("reward", "--policy", "../reward_model", "--policy {} cannot be loaded as a language model"),
    ("reward", "--reward-model", "../policy", "{} is not a classifier: its checkpoint has no score.weight"),
    ("reward", "--reward-model", "nowhere", "--reward-model {}: there is no such folder"),
    ("reward", "--reward-model", "mute-classifier", "--reward-model {} has no tokenizer"),
    ("reward", "--policy", "endless", "--policy {}: config.json needs one number as eos_token_id"),
    ("reward", "--prompts", "no-rows", "--prompts {} cannot be loaded as a data set"),
    ("reinforce", "--prompts", "no-train", "--prompts {} has no split 'train'; it has test"),
    ("dpo", "--pairs", "nowhere", "--pairs {}: there is no such folder"),
    ("dpo", "--pairs", "numbers", "--pairs {}, split train, row 0, column prompt: 7 is not a text"),
    ("reward", "--reward-model", "stars", "cannot tell which of the labels 1 star, 5 stars is positive; name one with"),
    ("reward", "--prompts", "nowhere", "--prompts {}: there is no such folder"),
    ("reward", "--prompts", "empty", "--prompts {} cannot be loaded as a data set"),
    ("reward", "--prompts", "no-test", "--prompts {} has no split 'test'; it has train"),
    ("reward", "--prompts", "no-text", "split test, has no column 'text'; it has review, stars"),
    ("reward", "--prompts", "short", "no test review has 10 tokens; lower --prompt-len"),
    ("reward", "--prompts", "missing", "split test, row 3, column text: None is not a text"),
    ("reinforce", "--reference", "../other-vocabulary", "has a vocabulary of 11 words, the policy"),
    ("dpo", "--pairs", "no-rejected", "no column 'negative_completion'; it has prompt, positive_completion"),
    ("dpo", "--pairs", "no-test-pairs", "--pairs {} has no split 'test'; it has train"),
    ("dpo", "--pairs", "empty-pairs", "no test pair is left"),
]


@pytest.mark.parametrize(("script", "flag", "folder", "message"), BAD_FOLDERS)
def test_bad_folders(world, odd, tmp_path, capsys, script, flag, folder, message):
    path = world / folder[3:] if folder.startswith("../") else odd / folder
    if folder == "../other-vocabulary" and not path.exists():
        GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1)).save_pretrained(path)
    said = refusal(script, *flags(world, script, tmp_path / "run"), flag, path, capsys=capsys)
    assert message.replace("{}", str(path)) in said
    assert "error: " in said
    assert not (tmp_path / "run").exists()


BAD_FLAGS = [
    ("reward", ["--eval-limit", 0], "argument --eval-limit: 0 is not a number from 1 up"),
    ("reinforce", ["--limit", 0], "argument --limit: 0 is not a number from 1 up"),
    ("reinforce", ["--alpha", -0.1], "argument --alpha: -0.1 is not a number from 0 up"),
    ("reinforce", ["--alpha", "nan"], "argument --alpha: nan is not a number from 0 up"),
    ("reinforce", ["--alpha", "much"], "argument --alpha: invalid number value: 'much'"),
    ("reinforce", ["--lr", 0], "argument --lr: 0 is not a number above 0"),
    ("reinforce", ["--advantage", "critic"], "argument --advantage: invalid choice: 'critic'"),
    ("dpo", ["--beta", -1], "argument --beta: -1 is not a number above 0"),
    ("dpo", ["--beta", 0], "argument --beta: 0 is not a number above 0"),
    ("dpo", ["--batch-size", 1.5], "argument --batch-size: invalid whole number value: '1.5'"),
    ("dpo", ["--max-len", 129], "--max-len = 129 tokens, but the policy has 128 positions"),
    ("reward", ["--completion-len", 119], "--completion-len = 129 tokens, but the policy has 128 positions"),
    ("reward", ["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
    ("reward", ["--positive-label", "good"], "cannot tell which of the labels LABEL_0, LABEL_1 is good"),
    ("dpo", ["--beta", 1e39], "argument --beta: 1e+39 is too large"),
    ("reinforce", ["--lr", "inf"], "argument --lr: inf is too large"),
    ("dpo", ["--batch-size", 10**20], "argument --batch-size: 100000000000000000000 is too large"),
    ("reward", ["--speed", 3], "unrecognized arguments: --speed 3"),
]


@pytest.mark.parametrize(("script", "more", "message"), BAD_FLAGS)
def test_bad_flags(world, tmp_path, capsys, script, more, message):
    said = refusal(script, *flags(world, script, tmp_path / "run"), *more, capsys=capsys)
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["reward", "reinforce", "dpo"])
def test_a_hub_name_that_is_not_in_the_cache_without_network(world, tmp_path, capsys, script):
    argv = flags(world, script, tmp_path / "run", policy="distilgpt2")
    said = refusal(script, *argv, capsys=capsys)
    assert "--policy distilgpt2 cannot be loaded" in said and "or give a local folder" in said
    for flag, name in (("--reward-model", "nobody/classifier"), ("--prompts", "stanfordnlp/imdb")):
        said = refusal(script, *flags(world, script, tmp_path / "run"), flag, name, capsys=capsys)
        assert f"{flag} {name} cannot be loaded" in said and "or give a local folder" in said
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone_unless_overwrite(world, finished, tmp_path, capsys):
    folder = tmp_path / "baseline"
    shutil.copytree(finished / "baseline", folder)
    before = (folder / "eval.json").read_bytes()
    argv = flags(world, "reward", folder, "--eval-limit", 3)
    assert "holds a finished run" in refusal("reward", *argv, capsys=capsys)
    assert (folder / "eval.json").read_bytes() == before
    # With --overwrite, a run that fails before it starts leaves the old result too.
    assert "no such folder" in refusal("reward", *argv, "--overwrite", "--prompts", "./nowhere", capsys=capsys)
    assert (folder / "eval.json").read_bytes() == before
    call("reward", *argv, "--overwrite")
    assert json.loads((folder / "eval.json").read_text())["n"] == 3


def test_out_must_be_a_runs_folder_that_can_be_written(world, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert "is a file; give a folder" in refusal("reward", *flags(world, "reward", tmp_path / "file"), capsys=capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("precious")
    assert "is not empty" in refusal("reward", *flags(world, "reward", tmp_path / "other"), capsys=capsys)
    below = tmp_path / "file" / "run"
    assert "cannot be written" in refusal("reward", *flags(world, "reward", below), capsys=capsys)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_unfinished_run_starts_anew(world, finished, tmp_path):
    folder = tmp_path / "run with spaces ü"
    shutil.copytree(finished / "alpha-0.1", folder)
    (folder / "eval.json").unlink()
    (folder / "model" / "old").touch()
    call("reinforce", *flags(world, "reinforce", folder, "--limit", 4, "--eval-limit", 2))
    assert len(rows_of(folder / "metrics.jsonl")) == 1 and not (folder / "model" / "old").exists()
    assert json.loads((folder / "eval.json").read_text())["n"] == 2


def test_a_run_is_not_replaced_by_another_scripts_or_by_one_that_reads_it(world, finished, tmp_path, capsys):
    folder = tmp_path / "alpha-0.1"
    shutil.copytree(finished / "alpha-0.1", folder)
    argv = flags(world, "reward", folder, "--overwrite", policy=folder / "model")
    assert "holds a run of reinforce.py; give another" in refusal("reward", *argv, capsys=capsys)
    argv = flags(world, "reinforce", folder, "--overwrite", policy=folder / "model")
    assert "holds what this run reads; give another folder" in refusal("reinforce", *argv, capsys=capsys)
    argv = flags(world, "reward", world / "policy", "--overwrite")  # a model's folder has a config.json too
    assert "no run's folder" in refusal("reward", *argv, capsys=capsys)
    assert (folder / "eval.json").exists() and (folder / "model" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_logged(world, tmp_path, capsys):
    more = ["--lr", 1e30, "--batch-size", 16]
    said = refusal("reinforce", *flags(world, "reinforce", tmp_path / "run"), *more, capsys=capsys)
    assert "step 2: the KL is nan; the weights were not touched; try a lower --lr" in said
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert not (tmp_path / "run" / "eval.json").exists() and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("script", "message"), [("reinforce", "the test reward is"), ("dpo", "test pairs: a log-prob is not finite")]
)
def test_a_policy_that_its_last_step_broke_is_no_finished_run(world, tmp_path, capsys, script, message):
    more = ["--lr", 1e30, "--batch-size", 64, "--limit", 16, "--epochs", 1]
    assert message in refusal(script, *flags(world, script, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run" / "eval.json").exists()


def test_the_command_line_itself(world, tmp_path):
    """As a child process: exit code, one line on stderr, no traceback; and --help loads and ends well."""
    here = Path(__file__).parent
    argv = [sys.executable, here / "reward.py", *flags(world, "reward", tmp_path / "run", policy=tmp_path / "none")]
    found = subprocess.run(list(map(str, argv)), capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("reward.py: error: --policy") and not (tmp_path / "run").exists()
    for script in ("reward.py", "reinforce.py", "dpo.py", "report.py"):
        helped = subprocess.run([sys.executable, here / script, "--help"], capture_output=True, text=True)
        assert helped.returncode == 0 and "usage:" in helped.stdout
