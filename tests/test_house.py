"""The house keeps its shape: what lies where, how long it may be, who imports whom, and how far a reader has to go."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
LESSON = ("common.py", "reward.py", "reinforce.py", "dpo.py")
MAY_IMPORT = {  # room: what of ours its files may import
    "lesson": {"lesson", "support"}, "plot": {"support", "report"}, "support": {"support"},
    "course": {"course", "demo", "lesson", "support"}, "demo": {"demo", "lesson", "support"},
    "report": {"report", "plot", "support"}, "lab": {"lab", "lesson", "plot", "report", "support"},
}
BUDGET = {  # lines at most, all together: what is added has to be paid for
    LESSON: 607, ("plot.py",): 205, ("test_losses.py",): 600, ("README.md",): 200, ("Makefile",): 130,
    ("support/*.py",): 1427, ("course/*.py",): 3442, ("demo/*.py",): 413, ("report/*.py",): 831, ("lab/*",): 990,
    ("support/ranks.py",): 125, ("support/families.py",): 120, ("support/checkpoint.py", "support/files.py"): 200,
    ("support/runs.py",): 250,
}


def files():
    """-> {path from the root: module} of all Python files but the tests'."""
    found = [path.relative_to(HOME) for pattern in ("*.py", "*/*.py") for path in HOME.glob(pattern)]
    return {path.as_posix(): ".".join(path.with_suffix("").parts) for path in found
            if not path.parts[0].startswith((".", "test", "build", "runs", "mutants"))}


def room(module):
    first = module.split(".")[0]
    return "lesson" if f"{first}.py" in LESSON else first


@functools.cache
def tree(module):
    return ast.parse((HOME / (module.replace(".", "/") + ".py")).read_text())


@functools.cache
def imports(module):
    """-> {name in this module: (module, name there or None for the module itself)} of what is imported of ours."""
    ours, found = set(files().values()), {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in ours:
                    found[alias.asname or alias.name] = f"{node.module}.{alias.name}", None
                elif node.module in ours:
                    found[alias.asname or alias.name] = node.module, alias.name
        elif isinstance(node, ast.Import):
            found |= {alias.name: (alias.name, None) for alias in node.names if alias.name in ours}
    return found


def lines(*patterns):
    paths = [path for pattern in patterns for path in HOME.glob(pattern) if path.is_file()]
    assert paths, patterns
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


# ---- what lies where ---------------------------------------------------------------------------------------


def test_the_root_is_the_lesson():
    assert {path.name for path in HOME.glob("*.py")} == {*LESSON, "plot.py", "test_losses.py"}


@pytest.mark.parametrize("name", ["support", "course", "demo", "report", "lab", "tests"])
def test_each_room_says_in_two_lines_who_reads_it(name):
    said = ast.get_docstring(ast.parse((HOME / name / "__init__.py").read_text()), clean=False)
    assert said.startswith("For ") and said.count("\n") == 1 and lines(f"{name}/__init__.py") == 2


@pytest.mark.parametrize(("patterns", "most"), BUDGET.items(), ids=["+".join(some) for some in BUDGET])
def test_nothing_is_longer_than_it_may_be(patterns, most):
    assert lines(*patterns) <= most


@pytest.mark.parametrize("page", sorted(path.name for path in (HOME / "docs").glob("*.md")))
def test_each_page_is_short(page):
    assert lines(f"docs/{page}") <= 250


# ---- who imports whom --------------------------------------------------------------------------------------


def test_each_file_imports_only_what_its_room_may():
    wrong = [(module, other) for module in files().values() for other, _ in imports(module).values()
             if room(other) not in MAY_IMPORT[room(module)]]
    assert not wrong
    assert not {other for other, _ in imports("reinforce").values()} & {"dpo"}
    assert not {other for other, _ in imports("dpo").values()} & {"reinforce"}


def test_there_is_no_circle():
    """Modules are taken away whose imports are all gone; in a circle none ever is."""
    left = {module: {other for other, _ in imports(module).values()} - {module} for module in files().values()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("script", LESSON)
def test_a_script_of_the_lesson_imports_at_most_three_modules_of_support(script):
    others = {other for other, _ in imports(script.removesuffix(".py")).values() if room(other) == "support"}
    assert len(others) <= 3


def test_no_two_functions_or_classes_have_one_name():
    """Or a reader would have to know where he is. Every script has a main(), both algorithms a train().

    course/A3.py has the course's names, and is read by itself.
    """
    names = Counter(node.name for module in files().values() if module != "course.A3" for node in tree(module).body
                    if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} <= {"main", "train"}


# ---- how far a reader has to go ----------------------------------------------------------------------------


def definitions(module):
    """-> {name: (first line, last line, node)} of functions, classes and constants."""
    found = {}
    for node in tree(module).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        for target in node.targets if isinstance(node, ast.Assign) else ():
            names += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        found |= {name: (first, node.end_lineno, node) for name in names}
    return found


def closure(module, name):
    """-> {(module, first line, last line)}: whole definitions of all names of ours that a definition leads to.

    A name leads to what it stands for, module.name too; what a parameter is, run say, the text does not tell.
    """
    seen, left = set(), [(module, name)]
    while left:
        module, name = left.pop()
        known, outside = definitions(module), imports(module)
        if name not in known:
            if name in outside and outside[name][1]:
                left.append(outside[name])
            continue
        first, last, node = known[name]
        if (module, first, last) in seen:
            continue
        seen.add((module, first, last))
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                left.append((module, part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                where = outside.get(part.value.id)
                left += [(where[0], part.attr)] if where and where[1] is None else []
    return seen


def test_a_closure_is_what_the_names_lead_to():
    (own,) = [found for found in closure("common", "masked_sum")]  # calls nothing of ours
    assert own[0] == "common"
    assert {module for module, *_ in closure("common", "update")} == {"common", "support.ranks"}
    assert closure("reinforce", "main") > closure("reinforce", "train") > closure("reinforce", "leave_one_out")


@pytest.mark.parametrize(("script", "most"), [("reinforce", 3), ("dpo", 4)])  # dpo's batches hold pairs of like length
def test_the_names_of_a_loop_lead_through_few_files_and_lines(script, most):
    found = closure(script, "train")
    assert len({module for module, *_ in found} - {script}) <= most
    assert sum(last - first + 1 for _, first, last in found) <= 350


@pytest.mark.parametrize("script", ["reinforce", "dpo"])
def test_a_loop_fits_a_screen(script):
    first, last, _ = definitions(script)["train"]
    assert last - first + 1 <= 30


# ---- links -------------------------------------------------------------------------------------------------


def anchors_of(text):
    """A heading's anchor as a Markdown page has it: lower case, without punctuation, dashes for spaces."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    pages = [HOME / "README.md", HOME / "ANSWERS.md", HOME / "course/A3.py", *(HOME / "docs").glob("*.md")]
    count = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), (page.name, target)
            assert not anchor or anchor in anchors_of(there.read_text(encoding="utf-8")), (page.name, target)
            count += 1
    assert count > 20  # it has looked


def test_every_figure_is_shown_somewhere():
    text = "".join(path.read_text(encoding="utf-8") for path in [HOME / "README.md", *(HOME / "docs").glob("*.md")])
    assert not [path.name for path in (HOME / "docs/figures").iterdir() if f"figures/{path.name}" not in text]
