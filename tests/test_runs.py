"""Whole runs through the scripts' command lines, in a toy world that is made in seconds."""

import functools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import demo.world
import dpo
import reinforce
import reward
from report import report
from support import encoding, files, loading, precision
from tests.helpers import arguments, call, change, flags, pair, refusal, rows_of, without_times


CPU = torch.device("cpu")
# An fp32 log-prob of up to 16 in size has steps of 2^-20, and some ten roundings of that size lie on the way: sums
# of a few dozen terms, two layers. So 1e-5 a token, and for the difference of two completions of 20 tokens:
ROUNDED = 2 * 20 * 1e-5


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
    # Both in fp64: 20 roundings of 1e-16, and the errors' squares of rewards that are alike to three digits.
    assert result["reward"] == pytest.approx(rewards.mean().item(), rel=1e-14)
    assert result["reward_se"] == pytest.approx(rewards.std().item() / math.sqrt(20), rel=1e-9)
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
    keys = ["step", "reward", "kl", "loss", "mean_length", "grad_norm", "seconds"]
    assert all(list(row) == keys for row in metrics)
    assert all(1 <= row["mean_length"] <= 20 for row in metrics)
    assert abs(metrics[0]["kl"]) < ROUNDED < 5 * ROUNDED < metrics[-1]["kl"]
    assert json.loads((folder / "eval.json").read_text())["kl"] > 0
    assert [row["step"] for row in rows_of(folder / "samples.jsonl")] == [0] * 5 + [3] * 5


def test_the_dpo_run_folder(finished):
    folder = finished / "beta-0.1"
    metrics = rows_of(folder / "metrics.jsonl")
    tests, steps = [row for row in metrics if "epoch" in row], [row for row in metrics if "step" in row]
    assert [row["epoch"] for row in tests] == [0, 1, 2] and "epoch" in metrics[0] and "epoch" in metrics[-1]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]  # 20 pairs: 8 + 8 + 4, twice
    keys = ["step", "accuracy", "loss", "margin", "chosen_logp", "rejected_logp", "chosen_logratio"]
    assert all(list(row) == [*keys, "rejected_logratio", "grad_norm", "seconds"] for row in steps)
    for row in steps:  # beta is 0.1; means of 8 fp32 numbers, which are a few nats at most: 2^-21 each
        assert row["margin"] == pytest.approx(0.1 * (row["chosen_logratio"] - row["rejected_logratio"]), abs=8 * 2**-21)
    # At the start nothing has moved: a log-ratio of a completion of up to 40 tokens is 0 but for rounding, and the loss
    # half a margin away from ln 2, which is 0.1 times the difference of two of them.
    assert abs(steps[0]["chosen_logratio"]) < 2 * ROUNDED < abs(steps[3]["chosen_logratio"])
    for loss in (tests[0]["test_loss"], steps[0]["loss"]):
        assert loss == pytest.approx(math.log(2), abs=0.1 / 2 * 2 * 2 * ROUNDED)
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
    shown = [[(sample["prompt"], sample["completion"]) for sample in found["samples"]] for found in (again, first)]
    assert shown[0] == shown[1]
    for key in EVALUATED - {"seconds", "samples"}:  # where weights lie in memory may change the order of sums
        assert again[key] == pytest.approx(first[key], abs=ROUNDED), key


def test_kl_of_the_evaluation_is_that_of_policy_to_reference(world, finished):
    """The evaluation's sampling, done again with the saved model; KL, log-probs and lengths row by row."""
    policy, tokenizer = loading.load_policy(arguments(policy=finished / "beta-0.1" / "model"), CPU)
    reference = loading.load_reference(str(world / "policy"), policy)
    prompts = loading.load_prompts(arguments(prompts=world / "prompts"), "test", tokenizer,
                                   common.seeded(0, "test order"))
    numbers = [torch.rand(20, generator=common.seeded(0, f"evaluation, prompt {place}, sample 0"), dtype=torch.float64)
               for place in range(20)]
    tokens = common.sample(policy, prompts, torch.stack(numbers))
    mask = common.completion_mask(tokens[:, 10:], policy.config.eos_token_id)
    with torch.no_grad():
        p, q = (model(tokens).logits[:, 9:-1].log_softmax(-1) for model in (policy, reference))
    picked = [logps.gather(2, tokens[:, 10:, None])[..., 0] for logps in (p, q)]
    expected = {"kl": (p.exp() * (p - q)).sum(-1), "logp": picked[0], "reference_logp": picked[1], "length": 1 * mask}
    rows = rows_of(finished / "beta-0.1" / "completions.jsonl")
    assert [row["text"] for row in rows] == common.decode(tokenizer, tokens)
    for key, values in expected.items():
        assert [row[key] for row in rows] == pytest.approx((values * mask).sum(-1).tolist(), abs=2 * ROUNDED), key
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
    def share_of_e(scorer, texts):  # plain to learn in seconds; about 0 at the start, so that it is no noise
        return torch.tensor([text.count("e") / max(len(text), 1) - 0.09 for text in texts])

    monkeypatch.setattr(reinforce, "positivity", share_of_e)
    more = ["--advantage", advantage, "--lr", 5e-3, "--epochs", 12, "--batch-size", 16, "--eval-limit", 2]
    ends = {}
    for alpha in (0, 100):
        call("reinforce", *flags(world, "reinforce", tmp_path / str(alpha), "--alpha", alpha, *more))
        rows = rows_of(tmp_path / str(alpha) / "metrics.jsonl")
        assert len(rows) == 60  # 80 prompts, 5 steps an epoch
        ends[alpha] = torch.tensor([[row["reward"], row["kl"]] for row in rows[-20:]], dtype=torch.float64)
    (free, kl), (held, held_kl) = (end.mean(dim=0).tolist() for end in ends.values())
    error = sum(end[:, 0].var().item() / 20 for end in ends.values()) ** 0.5
    assert free - held > 8 * error, (free, held, error)  # by chance once in 10^15
    # At alpha 100 a policy that is worth more than the start's is within 1 / 100 nats of it. Adam's steps, of one size
    # whatever the gradient's, let it tremble around there; without the KL nothing keeps it near.
    assert held_kl < 0.1 < 1 < kl, (held_kl, kl)
    assert [row["step"] for row in rows_of(tmp_path / "0" / "samples.jsonl")] == [0, 0, 50, 50, 60, 60]


def test_limits_take_that_many_rows(world, tmp_path):
    more = ["--limit", 5, "--eval-limit", 3, "--batch-size", 2, "--epochs", 1]
    call("dpo", *flags(world, "dpo", tmp_path / "run", *more))
    assert sum("step" in row for row in rows_of(tmp_path / "run" / "metrics.jsonl")) == 3
    assert len(rows_of(tmp_path / "run" / "completions.jsonl")) == 3


def test_bf16_runs_and_starts_close_to_the_reference(world, tmp_path, monkeypatch):
    """Policy and reference are the same function, but for rows beside which others are padded in another way.

    Logits of the toy policy, centred, are below 4 in size: rounded to 8 bits they are off by up to 2^-7. A KL is of
    second order in that: 20 tokens * (2 * 2^-7)^2 / 2. A log-prob of 40 tokens is off by up to 40 * 2 * 2^-7, the loss
    by beta / 2 times as much, for each of policy and reference. Those are bounds that a reference in fp32 would keep
    too, so the logits are looked at: all of both models, in training and in the evaluation, are of the type.
    """
    seen, log_probs = set(), common.log_probs
    for module in (reward, reinforce, dpo):
        monkeypatch.setattr(module, "log_probs", lambda logits: seen.add(logits.dtype) or log_probs(logits))
    more = ["--limit", 8, "--batch-size", 4, "--epochs", 1, "--eval-limit", 4, "--lr", 1e-3]
    cases = (("dpo", "loss", math.log(2), 2 * 0.05 * 40 * 2**-6), ("reinforce", "kl", 0, 20 * 2**-13))
    for script, key, start, tolerance in cases:
        for name in ("bf16", "fp32"):
            seen.clear()
            call(script, *flags(world, script, tmp_path / name / script, *more, "--precision", name))
            assert seen == {torch.bfloat16 if name == "bf16" else torch.float32}
        low, high = (rows_of(tmp_path / name / script / "metrics.jsonl") for name in ("bf16", "fp32"))
        steps = [row for row in low if "step" in row]
        assert steps[0][key] == pytest.approx(start, abs=tolerance)
        assert without_times(low) != without_times(high)  # the flag is not ignored
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / script / "model")
        assert model.dtype == torch.float32


def test_micro_batches_change_nothing(world, tmp_path, monkeypatch):
    """Batches of 8 in parts of 3, 3 and 2: the parts' means count by their rows, or the numbers would differ."""
    counted, pair_logps = [], dpo.pair_logps
    monkeypatch.setattr(dpo, "pair_logps", lambda model, pairs: counted.append(len(pairs)) or pair_logps(model, pairs))
    more = ["--limit", 16, "--batch-size", 8, "--epochs", 1, "--eval-limit", 4, "--lr", 1e-3]
    call("dpo", *flags(world, "dpo", tmp_path / "whole", *more))
    # The reference's 16 and 4 pairs, those before the first step, the two steps, those after them.
    assert counted == [8, 8, 4, 4, 8, 8, 4]
    counted.clear()
    call("dpo", *flags(world, "dpo", tmp_path / "parts", *more, "--micro-batch", 3))
    assert counted == [3, 3, 3, 3, 3, 1, 3, 1, 3, 1, 3, 3, 2, 3, 3, 2, 3, 1]
    whole, parts = (without_times(rows_of(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert [list(row) for row in whole] == [list(row) for row in parts] and len(whole) == 4
    for row, same in zip(whole, parts, strict=True):
        # Log-ratios of 40 tokens and more, each rounded in another order; and the norm of gradients that are.
        # An accuracy counts the signs of margins, which at the start are 0 but for rounding.
        assert {**row, "accuracy": 0} == pytest.approx({**same, "accuracy": 0}, rel=1e-4, abs=2 * ROUNDED)


def test_a_row_of_the_evaluation_does_not_depend_on_the_rows_beside_it(world, tmp_path):
    """What is drawn for a prompt follows from the prompt and its own random numbers, however the batches are cut.

    The chance that a rounding moves a draw over the edge between two words is below 1e-5 for each of 1,200 tokens.
    """
    found = []
    for size in (64, 7, 1):
        more = ["--samples-per-prompt", 3, "--eval-batch-size", size]
        call("reward", *flags(world, "reward", tmp_path / str(size), *more))
        found.append(rows_of(tmp_path / str(size) / "completions.jsonl"))
    # Nor on k, the limit and the length: the first samples of the first prompts are the same, as far as they go.
    call("reward", *flags(world, "reward", tmp_path / "few", "--eval-limit", 5, "--completion-len", 12))
    for row in rows_of(tmp_path / "few" / "completions.jsonl"):
        assert found[0][3 * row["number"]]["text"].startswith(row["text"].rstrip("\ufffd"))
    assert len(found[0]) == 60 and len({row["completion"] for row in found[0]}) == 60
    for rows in found[1:]:
        for row, same in zip(rows, found[0], strict=True):
            # The reward is a softmax of two logits, below 16 in size: a few steps of 2^-20.
            near = {"logp": ROUNDED, "reference_logp": ROUNDED, "reward": 1e-5}
            assert {**row, **dict.fromkeys(near)} == {**same, **dict.fromkeys(near)}
            assert all(row[key] == pytest.approx(same[key], abs=tolerance) for key, tolerance in near.items())


def test_the_precision_that_auto_found_is_written_down(world, tmp_path):
    call("reward", *flags(world, "reward", tmp_path / "run", "--precision", "auto", "--eval-limit", 2))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (about["precision"], about["device"]) == (precision.pick_device("cpu", "auto")[1], "cpu")


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "lab.bench", "--tiny", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=files.HOME, capture_output=True, text=True)
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


OLD_FLAGS = {"out": "runs/course/alpha-0.1", "overwrite": False, "seed": 0, "device": None, "precision": "auto",
             "policy": "distilgpt2", "reference": None, "reward_model": "omidroshani/imdb-sentiment-analysis",
             "positive_label": None, "prompts": "stanfordnlp/imdb", "prompt_len": 10, "completion_len": 20,
             "limit": None, "eval_limit": None, "eval_batch_size": None, "batch_size": 32, "micro_batch": None,
             "lr": 1e-4, "epochs": 1, "max_grad_norm": None, "save_every": 200, "alpha": 0.1, "advantage": "reward"}


def test_the_report_reads_a_run_that_an_older_version_has_left(tmp_path):
    """Its steps told tokens a second and no mean length; there was a --micro-batch and no --samples-per-prompt."""
    folder = tmp_path / "runs" / "alpha-0.1"
    folder.mkdir(parents=True)
    about = {"script": "reinforce.py", "flags": OLD_FLAGS, "device": "cpu", "hardware": "EPYC, 2 threads",
             "versions": {"torch": "2.8", "transformers": "4.57", "datasets": "4.1", "python": "3.11.7"},
             "precision": "fp32", "commit": "0123456789012345678901234567890123456789"}
    steps = [{"step": n, "loss": 50.0, "reward": n / 8, "kl": n / 4, "grad_norm": 2.0, "tokens_per_second": 640.0,
              "seconds": 1.0} for n in range(1, 5)]
    rows = [{"number": n, "prompt": "I saw", "completion": f" it {n}", "text": f"I saw it {n}", "reward": n / 8,
             "kl": 1.0, "logp": -9.0, "reference_logp": -10.0, "length": 5} for n in range(8)]
    result = {"reward": 0.4375, "reward_se": 0.0866, "n": 8, "kl": 1.0, "kl_se": 0.0, "distinct_2": 1.0, "seconds": 9.0,
              "distinct_2_texts": 8, "mean_length": 5.0, "samples": rows[:5]}
    files.write_whole(folder / "config.json", files.to_json(about))
    files.write_whole(folder / "eval.json", files.to_json(result))
    for name, lines in (("metrics.jsonl", steps), ("completions.jsonl", rows)):
        files.write_whole(folder / name, "".join(files.to_json(line) + "\n" for line in lines))
    report.main([str(tmp_path / "runs")])
    text = (tmp_path / "runs" / "results.md").read_text()
    lines = [line for line in text.splitlines() if "`alpha-0.1`" in line]
    assert any("0.438 ± 0.087" in line and "1.00 ± 0.00" in line for line in lines), text
    assert (tmp_path / "runs" / "reinforce.png").exists()


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
    found = (thrice["reward"], thrice["reward_se"])
    assert found == pytest.approx((means.mean().item(), means.std().item() / 2), rel=1e-9)  # both in fp64
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
    tokenizer = demo.world.policy_tokenizer(texts)  # so runs of spaces and the long words are one token each
    for length in (1, 2, 3, 10):
        whole = [encoding.encode(tokenizer, [text])[0][:length] for text in texts]
        assert encoding.first_tokens(tokenizer, texts, length) == whole


def test_an_end_mark_inside_a_text_stays_text(world):
    tokenizer = loading.load_tokenizer("--policy", str(world / "policy"))
    (ids,) = encoding.encode(tokenizer, ["good <|endoftext|> bad"])
    assert tokenizer.eos_token_id not in ids
    assert common.decode(tokenizer, torch.tensor([ids])) == ["good <|endoftext|> bad"]
    assert common.decode(tokenizer, torch.tensor([[*ids, tokenizer.eos_token_id]])) == ["good <|endoftext|> bad"]


def test_test_prompts_are_shuffled_and_the_first_n_stay_the_first_n(world, reviews):
    tokenizer = loading.load_tokenizer("--policy", str(world / "policy"))
    loaded = [loading.load_prompts(arguments(prompts=world / "prompts", prompt_len=12, limit=limit, eval_limit=3),
                                   "train", tokenizer, common.seeded(0, "test order")) for limit in (None, 7)]
    assert loaded[0].shape == (80, 12) and loaded[0][:7].tolist() == loaded[1].tolist()
    whole = [encoding.encode(tokenizer, [text])[0][:12] for text in reviews]
    assert sorted(loaded[0].tolist()) == sorted(whole) and loaded[0].tolist() != whole


def test_positivity_is_the_softmax_of_the_positive_label_row_by_row(world, tmp_path):
    texts = ["the script is superb", "the pace is a mess " * 40, "", "go and see it"]  # one far over 128 positions
    shutil.copytree(world / "reward_model", tmp_path / "longer")
    change(tmp_path / "longer" / "tokenizer_config.json", model_max_length=1000)  # more than the model has positions
    scorer = loading.load_scorer(arguments(reward_model=tmp_path / "longer"), CPU)
    found = reward.positivity(scorer, texts)
    assert found.shape == (4,) and found.requires_grad is False
    for text, score in zip(texts, found, strict=True):
        inputs = scorer.tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        logits = scorer.model(**inputs).logits[0]
        # Two logits, below 16 in size and good to some steps of 2^-20; a softmax's slope is 1/4 at most.
        assert score.item() == pytest.approx((logits[1].exp() / logits.exp().sum()).item(), abs=1e-5)
    shutil.copytree(world / "reward_model", tmp_path / "swapped")
    change(tmp_path / "swapped" / "config.json", id2label={0: "POSITIVE", 1: "NEGATIVE"})
    swapped = loading.load_scorer(arguments(reward_model=tmp_path / "swapped"), CPU)
    torch.testing.assert_close(reward.positivity(swapped, texts), 1 - found, atol=1e-5, rtol=0)


def test_pairs_are_cut_counted_and_encoded_apart(world, tmp_path, capsys):
    tokenizer = loading.load_tokenizer("--policy", str(world / "policy"))
    rows = [pair(0), {**pair(1), "prompt": "the film " * 40}, {**pair(2), "negative_completion": ""},
            {**pair(3), "negative_completion": "Film 3" + pair(3)["positive_completion"]}]  # equal without the prompt
    files.save_rows(tmp_path / "pairs", train=rows, test=rows[:1])
    fitting = functools.partial(dpo.make_pair, eos=tokenizer.eos_token_id, max_len=32)
    order = common.seeded(0, "train subset")
    pairs = loading.load_pairs(arguments(pairs=tmp_path / "pairs"), tokenizer, order, fitting)
    said = capsys.readouterr().out
    left_out = "2 with an empty text or no room under --max-len, 1 with two equal sides"
    assert f"train pairs: 1 of 4; left out: {left_out}\n  chosen completions: 4 of 4 continue their prompt" in said
    assert "; rejected ones: 2 of 4 continue their prompt after white space, " in said
    expected = [encoding.encode(tokenizer, [rows[0][column]])[0] for column in pair(0)]
    eos = [tokenizer.eos_token_id]
    assert encoding.encode(tokenizer, []) == []  # a split may be empty; the library would raise
    assert pairs["train"] == [(expected[0], expected[1] + eos, expected[2] + eos)]


# ---- a folder that is in use -------------------------------------------------------------------------------


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
    assert "step 2: kl is nan; the weights were not touched; try a lower --lr or --max-grad-norm 1" in said
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert not (tmp_path / "run" / "eval.json").exists() and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("script", "message"), [("reinforce", "the test reward is"), ("dpo", "epoch 1: test_loss is nan; try a lower --lr")]
)
def test_a_policy_that_its_last_step_broke_is_no_finished_run(world, tmp_path, capsys, script, message):
    more = ["--lr", 1e30, "--batch-size", 64, "--limit", 16, "--epochs", 1]
    assert message in refusal(script, *flags(world, script, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run" / "eval.json").exists()


def test_the_command_line_itself(world, tmp_path, capsys):
    """As a child process: exit code, one line on stderr, no traceback; and --help loads and ends well."""
    here = files.HOME
    argv = [sys.executable, here / "reward.py", *flags(world, "reward", tmp_path / "run", policy=tmp_path / "none")]
    found = subprocess.run(list(map(str, argv)), capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("reward.py: error: --policy") and not (tmp_path / "run").exists()
    helped = subprocess.run([sys.executable, "-m", "report.report", "--help"], cwd=here, capture_output=True, text=True)
    assert helped.returncode == 0 and "usage:" in helped.stdout
    for main in (reward.main, reinforce.main, dpo.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0 and "usage:" in capsys.readouterr().out
