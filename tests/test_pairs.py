"""Pairs from samples, by hand: which sample is chosen, which rejected, and which prompt is in no pair."""

import json

import pytest

from report import pairs
from support.command import launch
from support.loading import load_columns, split_completions
from tests.helpers import call, change, flags, rows_of
from tests.written_runs import write_run

# Rewards are eighths: their differences are exact. Each line: number, prompt, what follows it, reward.
TEST = [(0, "A film", " x", 0.5), (0, "A film", " y", 0.25), (0, "A film", " z", 0.375)]
TRAIN = [
    (0, "It is", " good", 0.75), (0, "It is", " bad", 0.125), (0, "It is", " so", 0.5),
    (1, "It was", "n't", 0.5), (1, "It was", " one", 0.625), (1, "It was", " two", 0.5),  # an eighth apart
    (2, "I saw", " it", 0.25), (2, "I saw", " that", 0.5), (2, "I saw", "n it", 0.375),  # a quarter
    (3, "A film ", " u", 1.0), (3, "A film ", " v", 0.0), (3, "A film ", " w", 0.5),  # there in the test, too
    (4, "He", " He", 0.75), (4, "He", " is", 0.5), (4, "He", " ran", 0.25),  # begins as its prompt does
    (5, "Why", " so", 0.5), (5, "Why", " so", 0.5), (5, "Why", "\n", 1.0),  # two equal texts, and one that is none
]


def write_samples(folder, split, lines, **more):
    """A run folder of three samples a prompt."""
    settings = {"split": split, "samples_per_prompt": 3, "prompt_len": 10, "completion_len": 20}
    settings |= {"reward_model": "judge", "prompts": "reviews", **more}
    write_run(folder, 0.5, 0, "", settings, n=len({line[0] for line in lines}))
    rows = [{"number": number, "prompt": prompt, "completion": text, "text": prompt + text, "reward": reward,
             "kl": 0.0, "reference_logp": -1.0, "length": 2} for number, prompt, text, reward in lines]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(folder / "config.json", script="reward.py")
    return folder


@pytest.fixture
def sampled(tmp_path):
    """-> the flags that name both runs and a new folder, and that folder."""
    train, test = write_samples(tmp_path / "t", "train", TRAIN), write_samples(tmp_path / "s", "test", TEST)
    return ["--train", str(train), "--test", str(test), "--out", str(tmp_path / "pairs")], tmp_path / "pairs"


def row(prompt, best, worst):
    return {"prompt": prompt, "positive_completion": prompt + best, "negative_completion": prompt + worst}


def test_the_best_sample_is_chosen_and_the_worst_rejected(sampled, capsys):
    pairs.main(sampled[0])
    assert rows_of(sampled[1] / "test.jsonl") == [row("A film", " x", " y")]
    expected = [row("It is", " good", " bad"), row("I saw", " that", " it"), row("He", " He", " ran")]
    assert rows_of(sampled[1] / "train.jsonl") == expected
    said = capsys.readouterr().out
    # Chosen (3/4 + 1/2 + 3/4) / 3 = 2/3, rejected (1/8 + 1/4 + 1/4) / 3 = 5/24.
    assert ("train: 3 pairs of 6 reviews; left out: 2 without two texts 0.25 apart, 1 with a prompt of a test pair; "
            "mean reward of the chosen 0.667, of the rejected 0.208\n") in said
    assert "--policy distilgpt2 --reward-model judge --prompts reviews --pairs" in said and "--max-len 30" in said


def test_the_gap_is_the_least_difference(sampled):
    pairs.main([*sampled[0], "--gap", "0.125"])
    assert row("It was", " one", "n't") in rows_of(sampled[1] / "train.jsonl")  # of two equal ones the first
    assert len(rows_of(sampled[1] / "train.jsonl")) == 4


def test_what_dpo_reads_is_what_was_sampled(sampled):
    pairs.main(sampled[0])
    columns = load_columns("--pairs", str(sampled[1]), "train", list(row("", "", "")))
    prompts, chosen, rejected, _ = split_completions(*columns, "pairs")
    assert (prompts, chosen, rejected) == (["It is", "I saw", "He"], [" good", " that", " He"], [" bad", " it", " ran"])


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda given, train, test: given.__setitem__(1, str(test)), "reward.py, test prompts"),
    (lambda given, train, test: given.__setitem__(3, "nowhere"), "nowhere: no run's folder"),
    (lambda given, train, test: given.__setitem__(3, str(test / "config.json")), "no run's folder"),
    (lambda given, train, test: (train / "config.json").write_text("{}"), "its files are broken (KeyError"),
    (lambda given, train, test: (train / "eval.json").unlink(), "not finished"),
    (lambda given, train, test: (train / "completions.jsonl").unlink(), "is not whole"),
    (lambda given, train, test: given.extend(["--gap", "0.9"]), "lower --gap"),
    (lambda given, train, test: (test.parent / "pairs").mkdir(), "is there already"),
    (lambda given, train, test: change(train / "config.json", script="dpo.py"), "a run of dpo.py"),
    (lambda given, train, test: write_samples(test.parent / "o", "test", TEST, reward_model="x")
     and given.__setitem__(3, str(test.parent / "o")), "--reward-model is judge in"),
])
def test_what_cannot_be_paired_is_said_and_nothing_written(sampled, tmp_path, spoil, said, capsys):
    given, out = sampled
    spoil(given, tmp_path / "t", tmp_path / "s")
    with pytest.raises(SystemExit):
        launch(lambda: pairs.main(given))
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not out.with_name("pairs.unfinished").exists() and not (out.exists() and list(out.iterdir()))


def test_from_samples_to_dpo(world, tmp_path, capsys):
    for split in ("train", "test"):
        more = ["--split", split, "--limit", 12, "--eval-limit", 12, "--samples-per-prompt", 3]
        call("reward", *flags(world, "reward", tmp_path / split, *more))
    prompts = {split: [one["prompt"] for one in rows_of(tmp_path / split / "completions.jsonl")]
               for split in ("train", "test")}
    assert len(prompts["train"]) == len(prompts["test"]) == 36 and prompts["train"][:3] == prompts["train"][:1] * 3
    for split in ("train", "test"):
        reviews = [one["text"] for one in rows_of(world / "prompts" / f"{split}.jsonl")]
        assert all(any(text.startswith(prompt) for text in reviews) for prompt in prompts[split])
    pairs.main(["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--gap", "0",
                "--out", str(tmp_path / "pairs")])
    call("dpo", *flags(world, "dpo", tmp_path / "dpo", "--epochs", 1, "--batch-size", 4, "--eval-limit", 4,
                       "--max-len", 30, pairs=tmp_path / "pairs"))
    assert (tmp_path / "dpo" / "eval.json").exists()
    assert "repeat their prompt" in capsys.readouterr().out
