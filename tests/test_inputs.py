"""What users give: hostile texts, wrong folders, wrong flags. Taken as they are, or refused in one clear line."""

import functools
import json
import re
import shutil

import datasets
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config

import common
import dpo
from report import report
from support import files, loading
from tests.helpers import arguments, call, change, flags, labelled, pair, refusal, save_classifier

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
    files.save_rows(here / "prompts", train=hostile, test=hostile)
    rows = [{"prompt": "A film:", "positive_completion": f" {text}", "negative_completion": f" not {text}"}
            for text in HOSTILE]
    rows += [{**rows[0], "prompt": HOSTILE[1]}, {**rows[0], "positive_completion": ""}]
    files.save_rows(here / "pairs", train=rows, test=rows[:1])
    out = tmp_path / "runs ü"
    call("reward", *flags(here, "reward", out / "baseline"))
    call("reinforce", *flags(here, "reinforce", out / "alpha-0.1", "--alpha", 0.1, "--batch-size", 3))
    call("dpo", *flags(here, "dpo", out / "beta-0.1", "--batch-size", 3, "--epochs", 1))
    said = capsys.readouterr()
    assert "train prompts: 7 of 9 reviews; 2 have fewer than 10 tokens" in said.out
    assert "column text: 1 of 9 texts, the first in row 0, hold control characters" in said.out
    assert "train pairs: 7 of 9; left out: 2 with an empty text" in said.out
    report.main([str(out)])
    results = (out / "results.md").read_text()
    shown = said.out + said.err + capsys.readouterr().out + results
    assert not set(shown) & set("\x00\x07\x1b\u202e\u2066\u2029") and "table" in results
    assert not re.search(r"^(?!    ).*<script>", results, re.MULTILINE)  # in indented blocks only
    tokenizer = loading.load_tokenizer("--policy", str(here / "policy"))
    prompts = loading.load_prompts(arguments(prompts=here / "prompts"), "train", tokenizer,
                                   common.seeded(0, "test order"))
    assert tokenizer.eos_token_id not in prompts
    starts = common.decode(tokenizer, prompts)
    assert sum(any(text.startswith(start) for start in starts) for text in HOSTILE) >= 5  # a cut emoji is no text
    fitting = functools.partial(dpo.make_pair, eos=tokenizer.eos_token_id, max_len=128)
    order = common.seeded(0, "train subset")
    pairs = loading.load_pairs(arguments(pairs=here / "pairs"), tokenizer, order, fitting)
    assert len(pairs["train"]) == 7
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
    files.save_rows(tmp_path / "data", train=texts, test=rows)
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
        assert loading.json_rows(str(tmp_path / name), "test") == rows
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "test.csv").write_text("text\na\n")
    assert loading.json_rows(str(tmp_path / "d"), "test") == loading.json_rows("stanfordnlp/imdb", "test") == []


def test_control_characters_in_a_message_do_not_reach_the_terminal(world, tmp_path, capsys):
    files.save_rows(tmp_path / "data", test=[{"te\x1b[31mxt": "a"}])
    said = refusal("reward", *flags(world, "reward", tmp_path / "run", prompts=tmp_path / "data"), capsys=capsys)
    assert "has no column 'text'; it has te [31mxt" in said
    said = refusal("reward", "--out", "x", "--seed", "a\x1bb", capsys=capsys)
    assert "argument --seed: invalid whole number value: 'a\\x1bb'" in said
    said = refusal("reward", "--out", "x", "--a\x1bb", capsys=capsys)
    assert "unrecognized arguments: --a b" in said


# ---- wrong folders and flags: one clear line, exit code not 0, nothing half-written -------------------------


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
    change(folder / "endless" / "config.json", eos_token_id=None)
    change(folder / "endless" / "tokenizer_config.json", eos_token=None)
    size = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**size, intermediate_size=8)).save_pretrained(folder / "llama")
    T5Config().save_pretrained(folder / "t5")
    (folder / "no-rows").mkdir()
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(folder / "no-rows" / "test.parquet")
    files.save_rows(folder / "no-train", test=labelled(reviews))
    files.save_rows(folder / "numbers", train=[{**pair(0), "prompt": 7}], test=[{**pair(0), "prompt": 7}])
    (folder / "empty").mkdir()
    files.save_rows(folder / "no-test", train=labelled(reviews))
    files.save_rows(folder / "no-test-pairs", train=[pair(0)])
    files.save_rows(folder / "no-text", test=[{"review": "fine", "stars": 3}])
    files.save_rows(folder / "short", test=labelled(["Short.", "Too."]))
    files.save_rows(folder / "missing", test=labelled([*reviews[:3], None]))
    files.save_rows(folder / "no-rejected", train=[{"prompt": "a", "positive_completion": "b"}])
    files.save_rows(folder / "empty-pairs", train=[pair(0)], test=[{**pair(1), "positive_completion": ""}])
    return folder


BAD_FOLDERS = [  # script, flag, folder below `odd`, what the one line must say
    ("reward", "--policy", "nowhere", "--policy {}: there is no such folder"),
    ("reward", "--policy", "empty", "--policy {} cannot be loaded as a language model"),
    ("reward", "--policy", "no-tokenizer", "--policy {} has no tokenizer: put its files beside the model"),
    ("reward", "--policy", "llama", "as a tokenizer: put a tokenizer's files beside the model's (save_pretrained) ("),
    ("reward", "--policy", "t5", "T5Config'>)"),
    ("reward", "--policy", "cut-short", "as a language model: model.safetensors is cut off or broken, copy or"),
    ("reward", "--policy", "../reward_model", "--policy {} cannot be loaded as a language model"),
    ("reward", "--reward-model", "../policy", "{} is not a classifier: its checkpoint has no score.weight"),
    ("reward", "--reward-model", "nowhere", "--reward-model {}: there is no such folder"),
    ("reward", "--reward-model", "mute-classifier", "--reward-model {} has no tokenizer"),
    ("reward", "--policy", "endless", "--policy {}: neither config.json nor the tokenizer names an end token"),
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
