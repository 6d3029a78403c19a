"""Whole runs through the scripts' command lines, in a world that toy.py makes in seconds."""

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
from support import families, fast, runs
from tests.helpers import call, change, flags, pair, refusal, rows_of, without_times


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
    assert [row["text"] for row in rows] == families.decode(tokenizer, tokens)
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
    command = [sys.executable, "-m", "lab.bench", "--tiny", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=runs.HOME, capture_output=True, text=True)
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
    tokenizer = demo.world.policy_tokenizer(texts)  # so runs of spaces and the long words are one token each
    for length in (1, 2, 3, 10):
        whole = [families.encode(tokenizer, [text])[0][:length] for text in texts]
        assert families.first_tokens(tokenizer, texts, length) == whole


def test_an_end_mark_inside_a_text_stays_text(world):
    tokenizer = families.load_tokenizer("--policy", str(world / "policy"))
    (ids,) = families.encode(tokenizer, ["good <|endoftext|> bad"])
    assert tokenizer.eos_token_id not in ids
    assert families.decode(tokenizer, torch.tensor([ids])) == ["good <|endoftext|> bad"]
    assert families.decode(tokenizer, torch.tensor([[*ids, tokenizer.eos_token_id]])) == ["good <|endoftext|> bad"]


def test_test_prompts_are_shuffled_and_the_first_n_stay_the_first_n(world, reviews):
    tokenizer = families.load_tokenizer("--policy", str(world / "policy"))
    loaded = [
        common.load_prompts(str(world / "prompts"), "train", tokenizer, 12, common.seeded(0, "test order"), limit)
        for limit in (None, 7)
    ]
    assert loaded[0].shape == (80, 12) and loaded[0][:7].tolist() == loaded[1].tolist()
    whole = [families.encode(tokenizer, [text])[0][:12] for text in reviews]
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
    tokenizer = families.load_tokenizer("--policy", str(world / "policy"))
    rows = [pair(0), {**pair(1), "prompt": "the film " * 40}, {**pair(2), "negative_completion": ""}]
    demo.world.save_rows(tmp_path / "pairs", train=rows, test=rows[:1])
    pairs = dpo.load_pairs(str(tmp_path / "pairs"), tokenizer, tokenizer.eos_token_id, 32)
    said = capsys.readouterr().out
    assert "as they stand" in said and "train pairs: 1 of 3; 2 left out (an empty text, another layout" in said
    expected = [families.encode(tokenizer, [rows[0][column]])[0] for column in dpo.COLUMNS]
    eos = [tokenizer.eos_token_id]
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
    assert "step 2: the KL is nan; the weights were not touched; try a lower --lr" in said
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
    here = runs.HOME
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
