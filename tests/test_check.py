"""check.py on course/A3.py: right as it stands, and each usual mistake named when it is put in."""

import json
import math
import os
import re
import subprocess
import sys
import time
import types

import pytest
import torch

from course import check, child, explain, judge_data, judge_dpo, judge_kl, judge_reinforce, parse, tiny_models
from tests.wrong_solutions import A3, BOTH, KL, KL_OF_ROWS, LOSS, MISTAKES, OPEN, SHIFTED, SIGNS, changed

BIT = math.log(2)


def judge(tmp_path, text, *names):
    """The verdicts of these functions, in this process."""
    path = tmp_path / "A3.py"
    path.write_text(text)
    torch.manual_seed(0)
    read = parse.read_solution(path)
    found = check.verdicts(read, {name: child.judged(read, name, path) for name in check.written(read) & {*names}})
    return [found[name] for name in names]


def run(*arguments, cwd=None):
    """check.py as a user calls it -> exit code, stdout, stderr."""
    command = [sys.executable, "-m", "course.check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or parse.HERE,
                          env={**os.environ, "PYTHONPATH": str(parse.HERE)})
    return done.returncode, done.stdout, done.stderr


# ---- the confusion table -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction")  # of a mistake, by PyTorch itself
@pytest.mark.parametrize(("name", "function", "pairs"), [(name, where, pairs) for name, where, *pairs in MISTAKES],
                         ids=[f"{function}: {name}" for name, function, *_ in MISTAKES])
def test_each_mistake_is_named(tmp_path, name, function, pairs):
    (found,) = judge(tmp_path, changed(*pairs), function)
    assert (found["status"], found["mistake"]) == ("wrong", name)
    assert found["expected"] != found["got"] or "gradient" in name


def test_the_kl_is_given_what_the_solutions_own_loss_returns(tmp_path):
    text = changed(("    return log_probs, loss", "    return chosen, loss"),
                   (BOTH, "log_q = log_probs_orig[:, 9:-1].gather(-1, output_tokens[:, 10:, None]).squeeze(-1)"),
                   (KL, "kl = log_probs_current - log_q"))
    (found,) = judge(tmp_path, text, "compute_kl_divergence")
    assert (found["status"], found["mistake"]) == ("wrong", "KL sampled and back-propagated")


@pytest.mark.parametrize(("sign", "function", "pairs"), [(sign, function, pairs) for sign, function, *pairs in SIGNS])
def test_each_sign_of_trouble_in_a_loop_is_seen(tmp_path, sign, function, pairs):
    (found,) = judge(tmp_path, changed(*pairs), function)
    assert found["status"] == "not judged" and any(note.startswith(sign) for note in found["notes"])


@pytest.mark.parametrize(("note", "function", "pairs"), [(note, function, pairs) for note, function, *pairs in OPEN])
def test_what_the_assignment_leaves_open_is_not_called_wrong(tmp_path, note, function, pairs):
    (found,) = judge(tmp_path, changed(*pairs), function)
    assert (found["status"], found["mistake"]) == ("right", None)
    assert any(note in said for said in found["notes"])


def confusion():
    """-> lines of docs/check.md's table: each mistake, where it was put in, how it was named (the tests above)."""
    yield "| mistake | put into | named |"
    yield "| --- | --- | --- |"
    for name in dict.fromkeys(name for name, *_ in (*MISTAKES, *SIGNS)):
        judged = [f"`{function}`" for other, function, *_ in MISTAKES if other == name]
        seen = [f"`{function}`" for other, function, *_ in SIGNS if other == name]
        counts = [f"{len(judged)} of {len(judged)}"] * bool(judged)
        counts += [f"{len(seen)} of {len(seen)}, as a sign"] * bool(seen)
        yield f"| {name} | {', '.join(dict.fromkeys(judged + seen))} | {', '.join(counts)} |"
    for note, function, *_ in OPEN:
        yield f"| (left open) {note} | `{function}` | right, with this note |"


def test_the_documented_confusion_table_is_that_of_these_tests():
    page = (parse.HERE / "docs" / "check.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- confusion -->\n\n(.*?)\n\n<!-- end -->", page, re.S)
    assert table.splitlines() == list(confusion())


# ---- the cases, by hand ------------------------------------------------------------------------------------


def test_the_rows_have_the_bits_they_were_made_from():
    tokens, policy = tiny_models.rows(), tiny_models.policy()
    logps = policy(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logps, -BIT * torch.tensor(tiny_models.ROWS, dtype=torch.float), atol=1e-4, rtol=0)
    assert (tokens != tiny_models.EOS).all()


def test_expected_reinforce_losses_are_those_worked_out_by_hand(tmp_path):
    # Completions have 59, 69, 67 and 65 bits, rewards are 7/8, 1/8, 1/2, 1/4:
    # (51.625 + 8.625 + 33.5 + 16.25) / 4 = 27.5 bits. With the prompts' 39, 17, 38 and 31 bits 43.25 bits.
    (found,) = judge(tmp_path, A3, "compute_reinforce_loss")
    assert found["expected"] == pytest.approx(27.5 * BIT, abs=1e-3)
    (found,) = judge(tmp_path, changed(*OPEN[0][2:]), "compute_reinforce_loss")
    assert found["expected"] == pytest.approx(43.25 * BIT, abs=1e-3)


def test_expected_kl_is_the_sum_over_16_words_and_20_positions(tmp_path):
    # In plain Python, from the bits alone: sum_j 2^-a_j (b_j - a_j) for a row of the table and a row of the other.
    bits = [*range(1, 16), 15]
    total = 0
    for row in tiny_models.rows():
        words = (row[:, None] == tiny_models.WORDS).int().argmax(-1).tolist()
        for column in range(9, 29):
            ours, theirs = (3 * column + 5 * words[column]) % 16, (7 * column + 3 * words[column] + 5) % 16
            pairs = [(bits[(j + ours) % 16], bits[(j + theirs) % 16]) for j in range(16)]
            total += sum(2.0**-a * (b - a) for a, b in pairs)
    found = read(tmp_path, A3)
    namespace = parse.execute(found, tiny_models.given("compute_kl_divergence"), "A3.py")
    verdict = judge_kl.judge_kl(namespace["compute_kl_divergence"], namespace)
    assert verdict.expected == pytest.approx(total / 4 * BIT, rel=1e-4)


def test_expected_dpo_losses_are_those_worked_out_by_hand():
    # Differences of log-ratios 5, 0.5, -3, 1. At beta 0.1: ln(1 + e^-0.5) = 0.474077, ln(1 + e^-0.05) = 0.668460,
    # ln(1 + e^0.3) = 0.854355, ln(1 + e^-0.1) = 0.644397; mean 0.660322.
    right = [axis[0].value for axis in judge_dpo.DPO]
    assert judge_dpo.predict_dpo(judge_dpo.DPO_CASES[0], *right) == [pytest.approx(0.660322, abs=1e-6)]
    assert judge_dpo.predict_dpo(judge_dpo.FAR_CASES[1], *right) == [pytest.approx(800.0)]


@pytest.mark.parametrize(("axes", "predict", "inputs"), [
    (judge_reinforce.REINFORCE, judge_reinforce.predict_reinforce, judge_reinforce.reinforce_cases),
    (judge_dpo.DPO, judge_dpo.predict_dpo, lambda: judge_dpo.DPO_CASES),
    (judge_data.LABELS, judge_data.predict_labels, lambda: ["left"]),
])
def test_no_two_mistakes_give_the_same_numbers(axes, predict, inputs):
    answers, inputs = {}, inputs()
    for place, axis in enumerate(axes):
        for choice in axis:
            values = [other[0].value for other in axes]
            values[place] = choice.value
            answers.setdefault(choice.name, []).append([predict(case, *values) for case in inputs])
    for name, found in answers.items():
        for other, theirs in answers.items():
            if name < other:
                assert not any(all(map(explain.close, a, b)) for a in found for b in theirs), (name, other)


# ---- reading a stranger's file -----------------------------------------------------------------------------


def read(folder, text, name="A3.py"):
    (folder / name).write_text(text)
    return parse.read_solution(folder / name)


def notebook(*cells):
    return json.dumps({"cells": [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]})


def test_a_solution_is_read_without_its_shell_lines_and_keeps_its_line_numbers(tmp_path):
    text = "%%time\n!pip install \\\n   datasets\nfiles = !ls\nif True:\n    %cd x\n"
    text += "X = [1,\n     7\n     % 4]\ndef f():\n    return X\n"
    found = read(tmp_path, text)
    assert not found.unread and found.functions["f"].node.lineno == 10
    namespace = parse.execute(found, {}, "A3.py")
    assert namespace["f"]() == [1, 3]  # a line that begins with % may be arithmetic


def test_nothing_but_imports_constants_and_definitions_is_executed(tmp_path):
    trap = tmp_path / "trap"
    text = f"""
import os, pathlib, torch
pathlib.Path({str(trap)!r}).touch()
x = os.system("touch {trap}")
saved = torch.save(1, {str(trap)!r})
def log(text):
    pathlib.Path({str(trap)!r}).touch()
logged = log("start")  # by its name it might be math.log
for _ in range(3):
    pathlib.Path({str(trap)!r}).touch()
class Batch(dict):
    pathlib.Path({str(trap)!r}).touch()
    size = 32
    def double(self):
        return 2 * self.size
try:
    from transformers import AdamW
except ImportError:
    from torch.optim import AdamW
if x:
    LENGTH = 10 + 20
def f(n=LENGTH, lost=pathlib.Path({str(trap)!r}).touch()):
    return n
model = "mine"
other = model
"""
    namespace = parse.execute(read(tmp_path, text), {"model": 1}, "A3.py")
    assert namespace["LENGTH"] == namespace["f"]() == 30 and namespace["Batch"]().double() == 64
    assert not trap.exists()
    assert namespace["AdamW"] is torch.optim.AdamW and namespace["other"] == 1 and "x" not in namespace


def test_what_is_gone_or_not_installed_is_stood_in_for(tmp_path):
    text = "from transformers import AdamW, AutoTokenizer\nimport wandb_is_not_here.sub as w\n" \
           "from os.path import *\nfrom .mine import thing\ndef f():\n    return w.log(1), thing(), join('a', 'b')\n"
    namespace = parse.execute(read(tmp_path, text), {}, "A3.py")
    assert namespace["f"]()[2] == "a/b" and callable(namespace["AdamW"])
    assert "AutoTokenizer" in str(namespace["AutoTokenizer"])  # the real one, beside a name that is gone
    assert any(name == "AdamW" and "from transformers import" in note for name, note in namespace.notes)


def test_a_module_is_imported_when_it_is_first_used(tmp_path):
    text = """
import fractions, xml.dom
import xml.sax
import math as given
from decimal import Decimal as D
half = lambda: fractions.Fraction(1, 2)
class Words:
    number = D
    def shout(self):
        return string.ascii_letters
import string
"""
    namespace = parse.execute(read(tmp_path, text), {"given": 1}, "A3.py")
    assert namespace["given"] == 1 and namespace["Words"].number(2) == 2
    assert not {"fractions", "xml", "string"} & namespace.keys()
    assert namespace["half"]() == 0.5 and namespace["Words"]().shout()[0] == "a"
    assert namespace["xml"].dom and namespace["xml"].sax and {"fractions", "string"} <= namespace.keys()
    with pytest.raises(KeyError):
        namespace["none"]


def test_settings_can_be_changed_after_they_were_made(tmp_path):
    text = """
import os, types
from dataclasses import dataclass
@dataclass
class Config:
    beta: float = 0.1
    rows: list = None
cfg, kw = Config(beta=0.5), dict(top_k=50)
cfg.rows = [n for n in range(3)]
kw["top_k"] = 0
kw.update(top_p=1.0)
kw["top_k"] += 1
kw.update(eval("{}"))
broken = Config(beta=open("none"))
os.environ["OF_A_SOLUTION"] = "1"
model.config.top_k = 7
gpt = load_a_CausalLM()
gpt.generation_config.top_k = 8
model.weights = 9
"""
    model = types.SimpleNamespace(config=types.SimpleNamespace(), generation_config=types.SimpleNamespace())
    namespace = parse.execute(read(tmp_path, text), {"model": model}, "A3.py")
    assert (namespace["cfg"].beta, namespace["cfg"].rows, namespace["kw"]) == (0.5, [0, 1, 2], {"top_k": 1, "top_p": 1})
    assert model.config.top_k == 7 and model.generation_config.top_k == 8
    assert not hasattr(model, "weights") and not {"broken"} & namespace.keys() and "OF_A_SOLUTION" not in os.environ


def test_globals_under_other_names_get_stand_ins_by_what_would_have_set_them(tmp_path):
    text = """
tok = AutoTokenizer.from_pretrained("distilgpt2")
sentiment_tok = AutoTokenizer.from_pretrained("omidroshani/imdb-sentiment-analysis")
judge = AutoModelForSequenceClassification.from_pretrained("x").to(dev)
gpt, ref_gpt = 1, 2
gpt_ref = copy.deepcopy(gpt)
lm = GPT2LMHeadModel.from_pretrained("distilgpt2")
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""
    given = {name: name for name in ("tokenizer", "reward_tokenizer", "reward_model", "orig_model", "model", "device")}
    found = parse.execute(read(tmp_path, text), given, "A3.py")
    assert [found[name] for name in ("tok", "sentiment_tok", "judge", "gpt_ref", "lm", "dev")] == [*given]


def test_a_cell_with_a_syntax_error_costs_only_its_own_function(tmp_path):
    broken = "def g():\n    loss = # TODO\n    return loss\n\n\ndef h():\n    return 2\n"
    for text, name in ((f"def f():\n    return 1\n\n\n{broken}", "A3.py"),
                       (notebook("def f():\n    return 1\n", "%%bash\nthis is (not python", broken), "A3.ipynb")):
        found = read(tmp_path, text, name)
        assert set(found.functions) == {"f", "h"}
        (unread,) = found.unread
        assert unread.functions == ["g"] and unread.text == "loss = # TODO"
        assert (unread.line, unread.cell) == ((2, 3) if name == "A3.ipynb" else (6, None))


# ---- the command -------------------------------------------------------------------------------------------


def test_a_right_solution_is_all_green_as_a_notebook_too(tmp_path):
    text = changed(  # as people have it, on a machine without an accelerator
        ('return_tensors="pt").to(model.device)\n    # From', 'return_tensors="pt").to("cuda")\n    # From'),
        ("= model.generate(**inputs", "= model.cuda().generate(**inputs"),
        (KL_OF_ROWS, "return common.per_row(kl.cuda() * completion_mask(output_tokens))\n\n\nimport common"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/common.py").write_text("per_row = lambda kl: kl.sum(-1).mean()")  # not this project's
    (tmp_path / "theirs/A3.ipynb").write_text(notebook(*text.split("# %%\n")))
    code, said, noise = run("theirs/A3.ipynb", "--json", cwd=tmp_path)
    assert (code, noise) == (0, "")
    found = json.loads(said)["functions"]
    assert {name: verdict["status"] for name, verdict in found.items()} == {
        **dict.fromkeys(check.JUDGED, "right"), **dict.fromkeys(check.NOT_JUDGED, "not judged")}
    for verdict in found.values():
        assert set(verdict) == {"status", "mistake", "expected", "got", "line", "cell", "notes", "sentence"}
        assert verdict["mistake"] is verdict["sentence"] is None and verdict["notes"] == [] and verdict["cell"] > 1


def test_what_raises_hangs_exits_or_is_not_written_does_not_stop_the_rest(tmp_path):
    seconds = 10**6 + os.getpid()  # a process of this test, and of no other run of it
    text = changed(
        (LOSS, LOSS.replace("-(", "(")),
        (KL, f"__import__('subprocess').run(['sleep', '{seconds}'])"),
        ("chosen_logratios = policy_chosen_logps - reference_chosen_logps", "exit(0)"),
        (SHIFTED, "1 / 0"),
        ("    attention = tokenized_input[\"attention_mask\"]\n", "    # TODO: get the mask\n"),
        ("def compute_reward_for_mini_batch", "def some_other_name"),
    )
    path = tmp_path / "A3.py"
    path.write_text(text)
    begun = time.perf_counter()
    code, said, _ = run(path, "--limit", 4)
    assert code == 1 and time.perf_counter() - begun < 60
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("  ")}
    assert lines["compute_reinforce_loss"].split() == ["wrong", "sign"]
    assert [lines[name] for name in check.JUDGED[2:]] == ["raises", "raises", "raises", "missing"]
    assert lines["compute_reward_for_mini_batch"] == "missing"
    line = text.split("def compute_reinforce_loss")[0].count("\n") + 1
    meaning = "the sign is flipped: minimising it makes rewarded text *less* likely"
    assert f"compute_reinforce_loss: {meaning}. Expected +19.062, got -19.062 (line {line})" in said
    assert "compute_kl_divergence: no answer within 4 seconds" in said
    assert "compute_DPO_loss: SystemExit: 0" in said
    line = text.split("    1 / 0")[0].count("\n") + 1
    assert f"_get_batch_logps: ZeroDivisionError: division by zero (line {line})" in said
    assert "still TODO" in said
    assert f"sleep {seconds}" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(("name", "content", "message"), [
    ("A3.py", None, "No such file"), ("A3.ipynb", "{", "not a notebook"), ("A3.py", b"\xff\xfe\x00", "not a text")])
def test_a_file_that_cannot_be_read_is_refused_in_a_line(tmp_path, capsys, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert check.main([str(tmp_path / name)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


@pytest.mark.parametrize(("text", "status"), [
    ("def compute_DPO_loss(a, b, c, d, beta):\n    'Later.'\n    pass\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    ...\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    raise NotImplementedError\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    # TODO: losses\n    return losses.mean()\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    losses = None # TODO\n    return losses.mean()\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    loss = # TODO\n    return loss\n", "missing"),
    ("def compute_DPO_loss(a, b, c, d, beta):\n    return losses.mean()\n", "raises"),
    ("x = 1\n", "missing"),
])
def test_a_function_that_is_not_written_yet_is_missing(tmp_path, text, status):
    (found,) = judge(tmp_path, text, "compute_DPO_loss")
    assert found["status"] == status
    assert bool(found["notes"]) == (text != "x = 1\n" and status == "missing")
