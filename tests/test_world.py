"""The toy world and the demo that runs in it."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

import demo.world
from demo import grammar
from support import command, encoding, files, loading
from tests.helpers import TINY, arguments, pair, rows_of


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
        text = grammar.expand("review", grammar.SHARES[n % 2], rng, tally)
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
    assert [len(split) for split in pairs] == [20, 7]
    assert all(tuple(row) == tuple(pair(0)) for row in pairs[0] + pairs[1])
    assert not {str(row) for row in pairs[0]} & {str(row) for row in pairs[1]}
    scorer = loading.load_scorer(arguments(reward_model=world / "reward_model"), torch.device("cpu"))
    assert scorer.model.config.model_type == "distilbert" and scorer.positive == 1


def test_the_worlds_tokenizers_read_anything(world):
    policy = loading.load_tokenizer("--policy", str(world / "policy"))
    texts = ["The script is superb.", "An unseen wörd 🎬\n<br />!", ""]
    assert [policy.decode(ids) for ids in encoding.encode(policy, texts)] == texts
    assert len(encoding.encode(policy, texts)[0]) == 5  # four words and a full stop
    scorer = loading.load_tokenizer("--reward-model", str(world / "reward_model"))
    assert scorer.tokenize("The script qux") == ["the", "script", "q", "##u", "##x"]


def test_both_models_learn_and_draw_no_bar_where_there_is_no_terminal(tmp_path, capsys):
    """In a world of 400 reviews, a few seconds. A policy that knows nothing has the vocabulary as perplexity."""
    size = TINY._replace(reviews=400, test_reviews=100, policy_width=64)
    found = demo.world.make_world(tmp_path / "world", size)
    assert 1 < found["grammars_perplexity"] < 3 and found["grammars_perplexity"] < found["perplexity"] < 100, found
    assert 0.5 < found["accuracy_of_cuts"] <= 1 and found["accuracy"] > 0.6 < found["best_accuracy"], found
    again = demo.world.make_world(tmp_path / "again", size)
    assert again == found and not capsys.readouterr().err
    for name in ("prompts/test.jsonl", "pairs/train.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "world" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_another_seed_makes_another_world(world, tmp_path):
    demo.world.make_world(tmp_path / "other", TINY, seed=1)
    for name in ("prompts/test.jsonl", "pairs/train.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_perplexities_of_a_policy_that_knows_nothing():
    """Equal logits: the vocabulary's size. The grammar: 1/4 for each text, of which 1/2 for its first word leaves 1/2
    for the rest, twice, for 3 and 2 tokens with the ends: 2^(2/5)."""
    tokenizer = demo.world.policy_tokenizer(["is it fun?"])
    policy = demo.world.new_policy(tokenizer, TINY)
    torch.nn.init.zeros_(policy.transformer.wte.weight)
    tally = Counter(nats=math.log(4))  # no judgement
    firsts = Counter([tokenizer("is")["input_ids"][0]] * 3 + [5] * 3)
    found = demo.world.perplexities(policy.eval(), tokenizer, ["is it?", "is?"], [tally, tally], firsts)
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
    monkeypatch.setattr(demo.world, "make_world", make)
    with pytest.raises(SystemExit) as stopped:
        command.launch(lambda: demo.world.main(["--out", str(out)]))
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err and not out.exists()
    demo.world.main(["--out", str(out)])
    assert sorted(path.name for path in out.parent.iterdir()) == ["one"]
    assert {path.name for path in out.iterdir()} == {"prompts", "world.json"}
    for again, message in ((out, "is there already; remove it (rm -r"), (out / "world.json" / "x", "cannot be")):
        with pytest.raises(SystemExit):
            command.launch(lambda again=again: demo.world.main(["--out", str(again)]))
        assert message in capsys.readouterr().err


def test_make_demo_runs_what_is_missing_and_nothing_else(world, tmp_path):
    """The whole demo as a user calls it, in the tiny world; then with everything there, then with a run missing; and
    what the sweep and other seeds would add."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    folder = tmp_path / "toy"

    def make(*more, goal="demo"):
        flags = "--eval-limit 6 --limit 16 --device cpu"
        given = [f"RUNS={folder}", f"WORLD={world}", f"PYTHON={sys.executable}", f"FLAGS={flags}"]
        command = ["make", "--no-print-directory", goal, *given, "DPO_FLAGS=--epochs 1", *more]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=files.HOME)

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

    def planned(*more, goal="demo"):
        lines = make("-n", *more, goal=goal).stdout.replace("\\\n", "").splitlines()
        return [line for line in lines if line.startswith(sys.executable)]

    assert [line.split()[2:4] for line in planned()] == [["report.report", str(folder)]]  # nothing is run again
    (folder / "alpha-0" / "eval.json").unlink()  # as if it had been cut off in its evaluation
    again = planned()
    assert len(again) == 2 and "report.report" in again[1]
    assert "reinforce.py" in again[0] and "--alpha 0 " in again[0]
    assert [line.split()[2:4] for line in planned(goal="demo-report")] == [["report.report", str(folder)]]
    more = "\n".join(planned("MORE=loo-0.3 beta-0.5-lr-1e-3"))
    assert "--alpha 0.3 --advantage loo" in more and "--beta 0.5 --lr 1e-3" in more
    sweep = planned("ALPHAS=0 7", "BETAS=0.1 3", goal="demo-sweep")
    assert [re.search(r"--(alpha|beta) (\S+)", line)[2] for line in sweep[:-1]] == ["0", "7", "3"]
    assert "report.report" in sweep[-1] and "alpha-7" in sweep[-1]
    seeds = [line for line in planned("SEEDS=5", goal="demo-seeds") if "report.report" not in line]
    assert all("seed-5" in line and "--seed 5" in line for line in seeds[1:]) and len(seeds) == 5  # alpha-0, and four
    assert len([line for line in first.stdout.splitlines() if line.startswith(f"{folder}/") and " " not in line]) == 5
    assert "--alpha" not in first.stdout  # a run's folder and not its command
    together = make("sweep")  # of the toy world? of the course?
    assert together.returncode != 0 and "demo goes alone; there are demo-sweep" in together.stderr
