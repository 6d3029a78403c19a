"""check.py on folders: tables and pages, names that are data, children that hang, answers that are kept."""

import ast
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course import check, child, judging, pages, parse

DPO = "def compute_DPO_loss(policy_chosen, policy_rejected, chosen, rejected, beta):\n    return {}\n"
RIGHT = {"status": "right", "notes": []}
SIGN = {"status": "wrong", "mistake": "sign", "expected": 0.5, "got": -0.5, "line": 1, "notes": ["a note"]}


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """-> list that will hold the jobs; they are answered without a child, by what stands in the file."""
    seen = []

    def judge_all(jobs, limit):
        for file, name in jobs:
            seen.append(file.path.name)
            text = file.read.functions[name].text
            if "hang" in text:
                yield (file, name), {"status": "raises", "got": f"no answer within {limit:g} seconds"}
            else:
                yield (file, name), SIGN if "sign" in text else RIGHT | {"notes": ["open"] * ("note" in text)}

    monkeypatch.setattr(judging, "judge_all", judge_all)
    monkeypatch.setattr(judging, "KEPT", tmp_path / "kept")
    return seen


def write(folder, **bodies):
    """Files with a compute_DPO_loss that returns this -> the folder."""
    for name, body in bodies.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(DPO.format(body))
    return folder


def said(capsys, *arguments):
    """-> exit code, lines of stdout, lines of stderr."""
    code = check.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


# ---- what is printed ---------------------------------------------------------------------------------------


def test_a_folder_is_a_table_and_the_same_mistakes_are_counted(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", b="sign", a="note", c="sign", sub__d="hang", sub__e="right",
                   __pycache____g="sign", __MACOSX__g="sign", **{".ipynb_checkpoints__g": "sign", "._g": "sign"})
    (folder / "f.ipynb").write_text("{")
    code, lines, noise = said(capsys, folder)
    assert code == 1 and not noise
    rows = [re.split(" {2,}", line) for line in lines]
    assert [(row[0], row[4]) for row in (*rows[1:4], *rows[5:7])] == [
        ("a.py", "right*"), ("b.py", "sign"), ("c.py", "sign"), ("sub/d.py", "no answer within 10 seconds"),
        ("sub/e.py", "right")]
    assert rows[0][1:] == ["reward", "reinforce", "KL", "DPO", "batch_logps", "labels", "loops"]
    assert rows[1][1:4] == ["missing"] * 3
    assert rows[4][0] == "f.ipynb" and rows[4][1].startswith("not a notebook")
    assert lines[8].startswith("right*: right, with a note")
    assert lines[9:] == ["", "sign in compute_DPO_loss: 2 files: b.py, c.py",
                         "no answer within 10 seconds in compute_DPO_loss: 1 file: sub/d.py"]


def test_a_long_name_is_cut_and_a_strange_one_escaped_so_that_the_table_stays_a_table(
        tmp_path, capsys, judged, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = write(tmp_path / "all", **{"x" * 200: "sign", "\x1b[31mred\n": "sign"})
    _, lines, _ = said(capsys, folder)
    assert lines[1].split()[0] == r"\x1b[31mred\n.py"
    assert max(map(len, lines[:3])) <= pages.NARROWEST and lines[2].startswith("x" * 35 + "…")
    assert lines[-1] == r"sign in compute_DPO_loss: 2 files: \x1b[31mred\n.py, " + "x" * 200 + ".py"


def test_a_table_for_a_spreadsheet_holds_no_formula(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", **dict.fromkeys(("=1+1", "+1", "-rf", "@x", 'a"b, c', "O'Brien A3"), "sign"))
    (folder / "z.ipynb").write_bytes(b"\xff")
    code = check.main([str(folder), "--csv"])
    text = capsys.readouterr().out
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert code == 1 and text.count("\r\n") == 8
    assert head == ["file", *check.JUDGED, *check.NOT_JUDGED, "error"]
    assert [row[0] for row in rows[:4]] == ["'+1.py", "'-rf.py", "'=1+1.py", "'@x.py"]
    assert [row[0] for row in rows[4:]] == ["O'Brien A3.py", 'a"b, c.py', "z.ipynb"]
    assert [row[head.index("compute_DPO_loss")] for row in rows] == ["sign"] * 6 + [""]
    assert "not a text" in rows[-1][-1]


def test_json_has_places_and_sentences(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", b="sign")
    cells = [{"cell_type": "code", "source": text} for text in ("x = 1\n", DPO.format("sign"))]
    (folder / "a.ipynb").write_text(json.dumps({"cells": cells}))
    (folder / "c.ipynb").write_text("{")
    sentence = "compute_DPO_loss: the sign is flipped: minimising it makes the chosen text *less* likely. " \
               "Expected +0.500, got -0.500 ({}line 1)"
    assert check.main([str(folder), "--json"]) == 1
    many = json.loads(capsys.readouterr().out)
    assert many["mistakes"] == [{"mistake": "sign", "function": "compute_DPO_loss", "files": ["a.ipynb", "b.py"]}]
    assert list(many["files"]) == ["a.ipynb", "b.py", "c.ipynb"] and list(many["files"]["c.ipynb"]) == ["error"]
    assert many["files"]["a.ipynb"]["functions"]["compute_DPO_loss"] == {
        **SIGN, "cell": 2, "sentence": sentence.format("code cell 2, ")}
    assert check.main([str(folder / "b.py"), "--json"]) == 1
    one = json.loads(capsys.readouterr().out)["functions"]
    assert one["compute_DPO_loss"] == {**SIGN, "cell": None, "sentence": sentence.format("")}
    assert one["train"]["status"] == "missing" and one["train"]["sentence"] is None


def test_feedback_is_a_page_for_each_file_where_the_file_stands(tmp_path, capsys, judged):
    folder, out = write(tmp_path / "all", a__A3="sign", b__A3="right"), tmp_path / "new" / "pages"
    (folder / "A3.ipynb").write_text("{")
    assert said(capsys, folder / "a", folder / "b", folder / "A3.ipynb", "--feedback", out)[0] == 1
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == [
        "A3.ipynb.txt", "a/A3.py.txt", "b/A3.py.txt"]
    assert "the sign is flipped" in (out / "a/A3.py.txt").read_text()
    assert "cannot be read: not a notebook" in (out / "A3.ipynb.txt").read_text()


def test_a_place_where_no_page_can_be_written_is_refused_before_anything_is_judged(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", a="sign")
    code, lines, noise = said(capsys, folder, "--feedback", folder / "a.py")
    assert (code, lines, judged) == (2, [], [])
    assert noise == [f"check.py: error: {folder / 'a.py'}: File exists"]


def test_what_cannot_be_read_is_a_row(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", right="right", deep="+".join("1" * 9999))
    (folder / "gone.py").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.py")
    code, lines, _ = said(capsys, folder)
    assert code == 1
    rows = dict(re.split(" {2,}", line)[:2] for line in lines[1:5])
    assert rows == {"deep.py": rows["deep.py"], "gone.py": "No such file or directory", "pipe.py": "not a file",
                    "right.py": "missing"}


@pytest.mark.parametrize(("bodies", "code"), [({"a": "right", "b": "note"}, 0), ({"a": "sign"}, 1), ({"a": "hang"}, 1)])
def test_the_exit_code_says_whether_something_is_wrong(tmp_path, capsys, judged, bodies, code):
    folder = write(tmp_path / "all", **bodies)
    assert said(capsys, folder)[0] == said(capsys, *folder.iterdir())[0] == code


def test_where_there_is_nothing_to_be_read_it_says_so_in_a_line(tmp_path, capsys, judged):
    (tmp_path / "empty").mkdir()
    write(tmp_path, a="sign")
    for wrong, words in ((tmp_path / "empty", "there is no .py and no .ipynb in it"),
                         (tmp_path / "\x1b[2Jb.py", "No such file or directory")):
        code, lines, noise = said(capsys, tmp_path / "a.py", wrong)
        assert (code, lines, judged) == (2, [], [])
        assert noise == [f"check.py: error: {wrong}: {words}".replace("\x1b", r"\x1b")]


# ---- names are data ----------------------------------------------------------------------------------------


def test_no_name_is_read_by_make_or_a_shell(tmp_path):
    stub, trap = tmp_path / "python", tmp_path / "trap"
    stub.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    stub.chmod(0o755)
    names = ["O'Brien A3.ipynb", 'a"b.py', f"$(touch {trap}).py", f"`touch {trap}`.py", f";touch {trap};.py", "-rf.py",
             f"$(shell touch {trap}).py", "a  b#c%$$@.py\\"]
    for name in names:
        given = {"SOLUTION": name, "HTML": f"{name}.html", "REFERENCE": name}
        wanted = [["-m", "course.check", "--", name],
                  ["-m", "course.compare", f"--html={name}.html", f"--reference={name}", "--", name]]
        for arguments, more in (([f"{key}={value}" for key, value in given.items()], {}), ([], given)):
            done = subprocess.run(["make", "-s", f"PYTHON={stub}", *arguments, "check", "diff"], cwd=parse.HERE,
                                  capture_output=True, text=True, env={**os.environ, **more})
            assert done.stdout.splitlines() == [str(each) for each in wanted] and not trap.exists()


# ---- children ----------------------------------------------------------------------------------------------


def jobs(tmp_path, *bodies):
    """-> a job of each body of a function, which work() below executes."""
    found = []
    for number, body in enumerate(bodies):
        write(tmp_path, **{f"s{number}": body})
        found.append((check.opened_solution(tmp_path / f"s{number}.py"), "compute_DPO_loss"))
    return found


def work(read, name, path, answers):
    """What a child does here, in place of child.work()."""
    os.setsid()
    exec(ast.unparse(read.functions[name].node.body[0].value), {"os": os, "time": time, "subprocess": subprocess})
    answers.send_bytes(json.dumps(RIGHT).encode())


def gone(pid):
    """True once a process has ended, or will have within 3 seconds."""
    for _ in range(60):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_hangs_or_dies_costs_its_own_answer_only(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "work", work)
    note = tmp_path / "pid"
    start = f"open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    bodies = "1", f"{start} and time.sleep(60)", "os._exit(3)", "os.kill(os.getpid(), 9)", "os.closerange(3, 99)", "1"
    found = judging.judge_all(jobs(tmp_path, *bodies), 0.7)
    said = {file.path.name: answer.get("got") or answer for (file, _), answer in found}
    ended = "its process ended without an answer (exit code {})"
    assert said == {"s0.py": RIGHT, "s1.py": "no answer within 0.7 seconds", "s2.py": ended.format(3),
                    "s3.py": ended.format(-9), "s4.py": ended.format(1), "s5.py": RIGHT}
    assert gone(note.read_text())


def test_children_end_with_whoever_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "work", work)
    note = tmp_path / "pid"
    hangs = f"open({str(note)!r}, 'w').write(str(os.getpid())) and time.sleep(60)"
    found = judging.judge_all(jobs(tmp_path, "1", hangs), 60)
    assert next(found)[1] == RIGHT
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    found.close()
    assert gone(note.read_text())


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    note, parent = tmp_path / "pid", os.fork()
    if not parent:
        parent = os.getpid()
        if not os.fork():
            os.setsid()
            note.write_text(str(os.getpid()))
            child.end_with_parent(parent)
        time.sleep(60)
        os._exit(0)
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(note.read_text())


@pytest.mark.parametrize(("number", "code", "words"), [
    (signal.SIGINT, 130, "check.py: interrupted\n"), (signal.SIGTERM, 128 + signal.SIGTERM, "")])
def test_a_signal_ends_all_at_once_and_without_a_traceback(tmp_path, number, code, words):
    note = tmp_path / "pid"
    text = f"""import course, os, runpy, time, types
def work(*_):  # in place of child.work(), so that PyTorch is not needed
    os.setsid()
    open({str(note)!r}, "w").write(str(os.getpid()))
    time.sleep(60)
course.child = types.SimpleNamespace(work=work)
runpy.run_module("course.check", run_name="__main__", alter_sys=True)"""
    running = subprocess.Popen([sys.executable, "-c", text, write(tmp_path, a="never") / "a.py"], cwd=parse.HERE,
                               stderr=subprocess.PIPE, text=True)
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    begun = time.perf_counter()
    running.send_signal(number)
    assert running.communicate()[1] == words and running.returncode == code and time.perf_counter() - begun < 2
    assert gone(note.read_text())


# ---- what is kept ------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_judged_again(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", a="sign", b="right", helper="one")
    (folder / "c.py").write_text("def f():\n    import helper\n" + DPO.format("sign"))
    first = said(capsys, folder)
    assert judged == ["a.py", "b.py", "c.py", "helper.py"]
    assert said(capsys, folder) == first and len(judged) == 4
    write(folder, helper="two", b="signs")
    said(capsys, folder)
    assert judged[4:] == ["b.py", "c.py", "helper.py"]


def test_what_got_no_answer_is_judged_again_and_so_is_what_was_kept_badly(tmp_path, capsys, judged, monkeypatch):
    folder = write(tmp_path / "all", a="hang", b="sign")
    first = said(capsys, folder)
    assert said(capsys, folder) == first and judged == ["a.py", "b.py", "a.py"]
    for path in (tmp_path / "kept").iterdir():
        path.write_text(path.read_text()[:-1])
    assert said(capsys, folder) == first and judged[3:] == ["a.py", "b.py"]
    monkeypatch.setattr(judging, "KEPT", folder / "a.py" / "kept")  # which cannot be made
    assert said(capsys, folder) == first and judged[5:] == ["a.py", "b.py"]


def test_another_version_of_a_package_or_of_this_project_is_another_answer(tmp_path, monkeypatch):
    (tmp_path / "course").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(parse, "HERE", tmp_path)
    seen = set()
    for change in ("torch-1.dist-info", "torch-2.dist-info", "course/judge.py", "common.py"):
        (tmp_path / change).write_text("")
        seen.add(judging.tools.__wrapped__())
    assert len(seen) == 4


def test_what_is_known_is_told_without_loading_pytorch(tmp_path, capsys, judged):
    folder = write(tmp_path / "all", a="sign")
    said(capsys, folder)
    text = "import sys; from pathlib import Path; from course import check, judging\n" \
           "judging.KEPT = Path(sys.argv[1]); code = check.main([sys.argv[2]]); print('torch' in sys.modules, code)"
    done = subprocess.run([sys.executable, "-c", text, tmp_path / "kept", folder], cwd=parse.HERE,
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False 1"
