"""make diff: what is set aside, what stands side by side, and that a stranger's text stays text."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from course import check, compare, parse
from support.errors import UserError

REFERENCE = '''
SEED_TOKENS, batch_size = 10, 32
tokenizer.padding_side = "left"
lr = 1e-4

def helper(x):
    return x

def compute_reinforce_loss(reward, output_tokens, model):
    chosen = model(output_tokens)
    loss = -(reward * chosen).mean()
    return chosen, loss

def train(alpha):
    pass
'''
WRONG = {"status": "wrong", "mistake": "sign", "expected": 19.062, "got": -19.062, "line": 5, "cell": None,
         "notes": ["a note of <b>"]}


def parts(tmp_path, text, reference=REFERENCE, verdicts=None):
    """-> {name: Part} of a text beside a reference."""
    for name, written in (("theirs.py", text), ("reference.py", reference)):
        (tmp_path / name).write_text(written)
    found = compare.compared(tmp_path / "theirs.py", compare.definitions_of(tmp_path / "reference.py"), verdicts or {})
    return {part.name: part for part in found}


def words(side):
    return "".join(f"[{word}]" if differs else word for word, differs in side[1])


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command, in tmp_path, without judging: -> what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("reference.py").write_text(REFERENCE)

    def judged(paths):
        for path in paths:
            file = check.opened_solution(path)
            yield check.Checked(path, {} if file.error else {"compute_reinforce_loss": WRONG}, [], file.error)

    def run(*arguments):
        compare.main(["--reference", "reference.py", *arguments])
        return capsys.readouterr().out

    monkeypatch.setattr(check, "checked", judged)
    return run


# ---- what is compared --------------------------------------------------------------------------------------


def test_comments_docstrings_annotations_formatting_and_order_are_set_aside(tmp_path):
    text = '''
def train(alpha: float) -> None:
    """Trains."""

def compute_reinforce_loss(
        reward: "torch.Tensor", output_tokens, model):  # TODO
    """-> log-probs."""
    chosen: "B, N" = (model(output_tokens))
    "an old line"
    loss = -( reward*chosen ).mean()
    return (chosen,
            loss)

def helper(x): return x
'''
    found = parts(tmp_path, text)
    assert list(found) == ["helper", "compute_reinforce_loss", "train"]  # the reference's order
    assert {part.cell for part in found.values()} == {"same"}


def test_lines_that_differ_stand_side_by_side_with_their_numbers_and_words(tmp_path):
    text = REFERENCE.replace("loss = -(", "# flipped\n    loss = (").replace("    return chosen", "    print(loss)\n"
                                                                            "    return chosen")
    part = parts(tmp_path, text)["compute_reinforce_loss"]
    rows = [(mark, theirs[0], words(theirs), ours[0], words(ours)) for mark, theirs, ours in part.rows]
    assert part.said == "line 9, 2 lines differ"
    assert rows[2:] == [("|", 12, "    loss = (reward * chosen).mean()", 11, "    loss = [-](reward * chosen).mean()"),
                        ("<", 13, "    print(loss)", None, ""),
                        (" ", 14, "    return (chosen, loss)", 12, "    return (chosen, loss)")]


def test_like_lines_are_found_though_others_are_between():
    theirs = [(1, "def f(x):"), (2, "y = start(x)"), (3, "loss = -(reward * x).mean()"), (4, "return loss")]
    ours = [(1, "def f(x):"), (2, "loss = (reward * x).mean()"), (3, "return loss, x")]
    assert list(compare.line_pairs(theirs, ours)) == [
        (theirs[0], ours[0]), (theirs[1], None), (theirs[2], ours[1]), (theirs[3], ours[2])]


def test_what_one_file_alone_has_is_said(tmp_path):
    found = parts(tmp_path, REFERENCE.replace("def helper", "def mine"))
    assert {name: part.said for name, part in found.items()} == {
        "helper": "only in the reference", "compute_reinforce_loss": "line 9, the same", "train": "line 14, the same",
        "mine": "line 6, only in the solution"}


def test_settings_that_both_make_are_compared(tmp_path):
    text = 'SEED_TOKENS, batch_size = 12, 32\nlr = 0.0001\ntokenizer.padding_side: str = "right"\nmine = 1\n'
    found = parts(tmp_path, text)
    settings = [words(part.rows[0][1]) for part in found.values() if "top level" in part.said]
    assert settings == ["SEED_TOKENS, batch_size = ([12], 32)", "tokenizer.padding_side = '[right]'"]
    assert found["tokenizer.padding_side"].rows[0][1][0] == 3


def test_a_notebooks_places_are_told_by_cell(tmp_path):
    cells = [{"cell_type": "code", "source": source} for source in ("x = 1", "\ndef helper(x):\n    return -x")]
    (tmp_path / "A3.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "reference.py").write_text(REFERENCE)
    definitions = compare.definitions_of(tmp_path / "reference.py")
    part = compare.compared(tmp_path / "A3.ipynb", definitions, {})[0]
    assert (part.said, part.rows[1][1][0]) == ("code cell 2, line 2, 1 line differs", 3)


def test_the_reference_of_this_project_is_the_same_as_itself():
    found = compare.compared(compare.REFERENCE, compare.definitions_of(compare.REFERENCE), {})
    assert len(found) > 10 and {part.cell for part in found} == {"same"}


@pytest.mark.parametrize(("line", "count"), [("x = x * y - {}", 4000), ("x = [" + "x, " * 9000 + "{}]", 3)])
def test_long_texts_take_no_more_than_seconds(tmp_path, line, count):
    begun = time.perf_counter()
    texts = ["def helper(x):\n    " + "\n    ".join(line.format(i * k) for i in range(count)) for k in (2, 3)]
    assert parts(tmp_path, *texts)["helper"].differ > count / 2
    assert time.perf_counter() - begun < 5


def test_what_is_nested_too_deeply_is_compared_as_it_stands(tmp_path):
    deep = "+".join(["x"] * 600)
    part = parts(tmp_path, f"def helper(x):\n\treturn {deep} # \x1b[31m\n")["helper"]
    assert words(part.rows[1][1]) == f"    return {deep} # \\x1b[31m"


# ---- on a terminal -----------------------------------------------------------------------------------------


def test_without_colour_the_marks_tell(call, monkeypatch):
    Path("A3.py").write_text(REFERENCE.replace("-(reward", "(reward"))
    monkeypatch.setenv("COLUMNS", "120")
    said = call("A3.py")
    assert "\x1b" not in said and compare.ASIDE in said
    assert "compute_reinforce_loss: line 9, wrong: sign, 1 line differs" in said
    assert "the sign is flipped" in said and "Expected +19.062, got -19.062 (line 5)" in said
    left, right = "  11     loss = (reward * chosen).mean()", "  11     loss = -(reward * chosen).mean()"
    assert f"{left:<58} | {right}" in said.splitlines()
    monkeypatch.setenv("COLUMNS", "80")
    assert f"-{left}\n+{right}\n" in call("A3.py")


def test_colour_is_for_terminals_that_want_it(call, monkeypatch):
    Path("A3.py").write_text(REFERENCE.replace("-(reward", "(reward"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36;1;4m-\x1b[0m" in call("A3.py")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in call("A3.py")


@pytest.mark.parametrize("text", ["x" * 300, "    f(" + ", ".join(["compute_reinforce_loss"] * 9) + ")"])
def test_long_lines_are_wrapped_and_not_cut(text):
    lines = compare.wrapped((7, [(text, False)]), 50)
    assert "".join(line[5:] for line in lines).replace(" ", "") == text.replace(" ", "")
    assert len(lines) > 4 and all(len(line) == 50 for line in lines)


# ---- pages -------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data


def test_a_strangers_text_stays_text_on_the_page(call):
    name = "<title><script>alert(1)<!--\udcff\x1b[31m.py"
    bad = "</style></td><script>alert(1)</script>\\x1b\\u202e"
    more = f"def é():\n  return f'{bad}{{1}}'\n"
    Path(name).write_text(REFERENCE.replace("-(reward * chosen)", f"'{bad}'") + more)
    call("--html", "page.html", name)
    page = Path("page.html").read_text(encoding="utf-8")
    read = Tags(page)
    assert not read.tags & {"script", "link", "img", "iframe"} and not read.links
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]|url\(|@import", page)
    assert "</style></td><script>alert(1)</script>\\x1b\\u202e" in read.text and "a note of <b>" in read.text
    assert "Expected +19.062, got -19.062" in read.text


def test_a_folder_gets_a_table_and_pages_that_its_index_leads_to(call, tmp_path):
    names = ["O'Brien A3.ipynb", "a#b?%41 $(touch x).py", "sub/A3.py", "A3.py", "torn.py"]
    for name in names:
        Path("all", name).parent.mkdir(parents=True, exist_ok=True)
        Path("all", name).write_text(REFERENCE.replace("-(", "("))
    Path("all", names[0]).write_text("{}")
    before = set(tmp_path.rglob("*"))
    said = call("--html", "pages", "all")
    rows = [line for line in said.splitlines() if line.startswith(tuple(names))]
    assert len(rows) == 5 and all("±1 sign" in row for row in rows if "O'Brien" not in row)
    assert "cannot be read: not a notebook" in "".join(rows)
    new = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    links = Tags(Path("pages/index.html").read_text()).links
    assert {f"pages/{unquote(link)}" for link in links} | {"pages/index.html"} == new
    assert new == {f"pages/{name}.html" for name in names[1:]} | {"pages/index.html"}


def test_notes_are_on_the_page_though_nothing_differs(call):
    assert call("--html", "new/page.html", "reference.py") == "written: new/page.html\n"
    assert "a note of &lt;b&gt;" in Path("new/page.html").read_text()


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "said"), [
    (["missing.py"], "missing.py: No such file or directory"),
    (["empty"], "empty: there is no .py and no .ipynb in it"),
    (["bad.ipynb"], "bad.ipynb: not a notebook that can be read"),
    (["--reference", "bad.ipynb", "reference.py"], "bad.ipynb: not a notebook that can be read"),
    (["--html", "bad.ipynb", "empty"], "empty: there is no .py"),
    (["--html", "empty", "reference.py"], "empty: Is a directory"),
])
def test_what_cannot_be_read_or_written_is_refused_in_one_line(call, arguments, said):
    Path("bad.ipynb").write_text("{}")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        call(*arguments)


def test_it_loads_no_torch():
    command = "import sys, course.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=parse.HERE)
    assert done.stdout == "False\n"
