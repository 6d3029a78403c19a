"""Reads somebody's solution of the course, a .py export or the .ipynb itself, without running it.

Of its top level only this is executed: imports, with a stand-in for what is not there; constants; definitions of
functions and classes. No shell line, no download, no training, no plot. What these would have set (device,
tokenizer, model) is given by the caller. A cell with a syntax error costs only the functions it is in.
"""

import __future__

import ast
import builtins
import contextlib
import copy
import json
import re
import tokenize
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

HERE = Path(__file__).resolve().parent.parent  # of this project
SHELL = re.compile(r"\s*[!%?]|\s*[\w, ]+=\s*[!%]|.*\?\s*$")  # !pip install, %matplotlib, files = !ls, help?
OTHER_LANGUAGE = re.compile(r"\s*%%(?!time|capture|prun)\w")  # %%bash, %%html, %%writefile: a whole cell
START = re.compile(r"(def|class|import|from) |@|# ?%%|# In\[")  # where a file can be torn
DEVICE = re.compile(r"(cuda|mps)(:\d+)?")
# What a constant may call, where it is a library's:
HARMLESS = ("dict", "list", "tuple", "set", "range", "int", "float", "str", "bool", "len", "min", "max", "sum", "abs",
            "round", "sorted", "GenerationConfig", "KLDivLoss", "CrossEntropyLoss", "NLLLoss", "LogSoftmax", "Softmax",
            "LogSigmoid", "Sigmoid", "partial", "defaultdict", "Counter", "OrderedDict", "SimpleNamespace", "tensor",
            "arange", "zeros", "ones", "log", "exp", "sqrt", "device", "is_available", "update", "setdefault")
LIBRARIES = ("builtins", "collections", "functools", "math", "numpy", "torch", "transformers", "types")


class Piece(NamedTuple):
    """A file, a cell of a notebook, or a part of these, below empty lines: lines keep their numbers."""

    text: str
    cell: int | None  # 1 is the notebook's first code cell


class Function(NamedTuple):
    node: ast.FunctionDef
    text: str  # with its comments
    cell: int | None


class Unread(NamedTuple):
    """Text with a syntax error."""

    message: str
    line: int
    cell: int | None
    text: str  # of that line
    piece: str  # all of it
    functions: list  # names of those that are lost with it


class Solution(NamedTuple):
    pieces: list  # Piece: all that was read
    statements: list  # of the top level, those that can be read
    functions: dict  # name -> Function; the last of that name, as in a notebook that is run from top to bottom
    unread: list  # Unread


# ---- text to statements ------------------------------------------------------------------------------------


def read_solution(path):
    """-> Solution. Executes nothing. OSError, ValueError (UnicodeDecodeError is one) if the file can't be read."""
    solution = Solution(pieces(path), [], {}, [])
    for whole in solution.pieces:
        for piece in torn(whole) if parsed(whole)[1] else [whole]:
            statements, error = parsed(piece)
            lines = piece.text.split("\n")
            for node in flat(statements):
                solution.statements.append(node)
                if isinstance(node, ast.FunctionDef):
                    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    solution.functions[node.name] = Function(node, text, piece.cell)
            if error:
                line = min(error.lineno or 1, len(lines))
                lost = re.findall(r"^def (\w+)", piece.text, re.M)
                solution.unread.append(
                    Unread(error.msg, line, piece.cell, lines[line - 1].strip(), piece.text.lstrip("\n"), lost))
    return solution


def pieces(path):
    """-> list of Pieces; ValueError if the file is not what its name says."""
    if Path(path).exists() and not Path(path).is_file():  # to read a pipe could take for ever
        raise ValueError("not a file")
    try:
        with tokenize.open(path) as file:  # knows `# coding: latin-1` and a byte order mark
            text = file.read()
    except SyntaxError as error:
        raise ValueError(f"not a text that can be read: {error.msg}") from None
    if Path(path).suffix != ".ipynb" and not text.lstrip().startswith("{"):  # some notebooks are called .py
        return [Piece(text, None)]
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a notebook that can be read (format 4): {type(error).__name__}: {error}") from None
    return [Piece(source, number) for number, source in enumerate(sources, 1) if not OTHER_LANGUAGE.match(source)]


def parsed(piece):
    """-> list of statements, None; or [], SyntaxError. Shell lines become `pass`, on the line where they were."""
    lines = piece.text.split("\n")
    while True:
        try:
            with warnings.catch_warnings(action="ignore"):  # "\d" in a string that is not raw, and the like
                return ast.parse("\n".join(lines)).body, None
        except SyntaxError as error:  # a line that begins with % may be arithmetic, so only where it is an error
            row = (error.lineno or 0) - 1
            if not 0 <= row < len(lines) or not SHELL.match(lines[row]):
                return [], error
            goes_on = lines[row].rstrip().endswith("\\")
            lines[row] = re.match(r"\s*", lines[row]).group() + "pass"
            while goes_on and row + 1 < len(lines):
                row += 1
                goes_on, lines[row] = lines[row].rstrip().endswith("\\"), ""


def torn(piece):
    """-> list of Pieces of a piece with a syntax error: a new one at each definition, import or cell."""
    lines, firsts = piece.text.split("\n"), [0]
    for row, line in enumerate(lines):
        if START.match(line) and not (row and lines[row - 1].startswith("@")):  # a decorator stays with its function
            firsts.append(row)
    ends = [*firsts[1:], len(lines)]
    return [Piece("\n" * first + "\n".join(lines[first:end]), piece.cell)
            for first, end in zip(firsts, ends, strict=True)]


def flat(statements):
    """Yields statements, in place of `if`, `try` and `with` those in them."""
    for node in statements:
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from flat(getattr(node, part, []))
        else:
            yield node


# ---- statements to a namespace -----------------------------------------------------------------------------


class Namespace(dict):
    """A solution's globals. A module is imported when it is first used: to import takes longer than to judge."""

    def __init__(self, given, path):
        super().__init__(given, __name__="__main__", __builtins__=builtins)
        self.given = given  # {name: stand-in}, which no statement of the solution replaces
        self.path = path
        self.imports = {}  # name -> import statements of this name alone, not executed yet
        self.own = set()  # names of constants and definitions
        self.bare = set()  # names of classes without functions: to make one executes nothing of the solution's
        self.notes = []  # pairs: a name, and how it was stood in for or defined otherwise

    def __missing__(self, name):
        for node in self.imports.pop(name):  # KeyError: a builtin, or nothing
            found = self.imported(node)
            if name not in found:
                found[name] = MagicMock(name=node.names[0].name)
                said = f"is stood in for: what `{ast.unparse(node)}` names is gone or not installed"
                self.notes.append((name, said))
            self[name] = found[name]
        return self[name]

    def imported(self, node):
        """-> {name: value} of an import statement; {} if it fails."""
        found = {}
        with contextlib.suppress(Exception, SystemExit):
            run_statement(node, found, self.path)
        return found


def execute(solution, given, path):
    """-> Namespace of a Solution. given: {name: stand-in}. Functions keep their line numbers."""
    namespace = Namespace(given, path)
    for node in solution.statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defer(node, namespace)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            define(node, namespace)
        elif changed := targets(node):
            assign(node, changed, namespace)
    return namespace


def run_statement(node, namespace, path):
    module = ast.fix_missing_locations(ast.Module([OnCPU().visit(node)], []))
    flags = __future__.annotations.compiler_flag  # a type that is not there must not keep a function from its test
    exec(compile(module, str(path), "exec", flags=flags, dont_inherit=True), namespace)


class OnCPU(ast.NodeTransformer):
    """"cuda" and "mps" become "cpu": the check needs no accelerator."""

    def visit_Constant(self, node):
        if isinstance(node.value, str) and DEVICE.fullmatch(node.value):
            return ast.copy_location(ast.Constant("cpu"), node)
        return node


def defer(node, namespace):
    """Notes what an import statement would set; only of `import *` this cannot be known before."""
    for alias in node.names:
        alone, name = copy.copy(node), alias.asname or alias.name.partition(".")[0]
        alone.names = [alias]
        if name == "*":
            found = namespace.imported(alone)
            namespace.update({name: found[name] for name in found if name not in {"__builtins__", *namespace}})
        elif name not in namespace.given:
            namespace.imports.setdefault(name, []).append(alone)
            namespace.pop(name, None)


def define(node, namespace):
    """Defines a function or class; without decorators and defaults if these cannot be had."""
    functions = [node]
    if isinstance(node, ast.ClassDef):  # its body is executed too, so keep only definitions and constants
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                with contextlib.suppress(KeyError):
                    namespace[part.id]  # is imported now: the body of a class does not ask __missing__() for it
        functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        constants = [part for part in node.body if targets(part) and is_constant(part, namespace)]
        node.body = [*constants, *functions] or [ast.Pass()]
        namespace.bare |= {node.name} if not functions else set()
    for function in functions:  # a default is executed with its definition, so it must be a constant, too
        replace_defaults(function, lambda value: value if is_constant(value, namespace) else ast.Constant(None))
    try:
        run_statement(node, namespace, namespace.path)
        lost = isinstance(namespace[node.name], MagicMock) and "its decorator is not there"
    except Exception as error:
        lost = f"{type(error).__name__}: {error}"
    if lost:
        namespace.notes.append((node.name, f"is defined without decorators and defaults: {lost}"))
        node.decorator_list = []
        for function in functions:
            replace_defaults(function, lambda value: ast.Constant(None))
        with contextlib.suppress(Exception):
            run_statement(node, namespace, namespace.path)
    namespace.own.add(node.name)


def replace_defaults(function, new):
    args = function.args
    args.defaults = [new(value) for value in args.defaults]
    args.kw_defaults = [value and new(value) for value in args.kw_defaults]


def targets(node):
    """-> list of what a statement sets or changes: x; kw["top_k"]; gc.top_k; kw.update of `kw.update(top_k=0)`."""
    if isinstance(node, ast.Expr) and called(node.value) in ("update", "setdefault"):
        return [node.value.func]
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return []
    found = getattr(node, "targets", None) or [node.target]
    return [part for each in found for part in (each.elts if isinstance(each, (ast.Tuple, ast.List)) else [each])]


def assign(node, changed, namespace):
    """Executes a statement that sets or changes something, if all in it are constants; or gives the name a stand-in."""
    names = [part.id for part in changed if isinstance(part, ast.Name) and part.id not in namespace.given]
    if not is_constant(node, namespace):
        roles = {name: role_of(name, node.value) for name in names if node.value}
        namespace.update({name: namespace.given[role] for name, role in roles.items() if role in namespace.given})
    elif all(may_change(part, namespace) for part in changed):
        with contextlib.suppress(Exception):  # a name in it that nothing has set: so is this one
            run_statement(node, namespace, namespace.path)
            namespace.own.update(names)


def may_change(target, namespace):
    """True for a name that is not given, a part of what the solution itself has set, and settings of a model."""
    path = ast.unparse(target)
    if isinstance(target, ast.Name):
        return path not in namespace.given
    return re.match(r"\w*", path).group() in namespace.own or re.match(r"\w+\.(generation_)?config\b", path)


def is_constant(node, namespace):
    """True if nothing in it is called but what makes a list, a number and the like; a lambda's body is not called."""
    parts = [node.args] if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node)
    return all(is_constant(part, namespace) for part in parts) and (
        not isinstance(node, ast.Call) or is_harmless(node, namespace))


def is_harmless(call, namespace):
    """True for a function in HARMLESS that is the library's own, and for a class of the solution without functions."""
    name = called(call)
    if name not in HARMLESS:
        return name in namespace.bare
    try:
        function = eval(ast.unparse(call.func), namespace)  # a constant, too
    except Exception:
        return False
    return (getattr(function, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def called(node):
    """The last name of what a call calls; None for what is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", None) or getattr(function, "id", None)


def role_of(name, value):
    """A top-level name and the call that would have set it -> which of the caller's stand-ins it gets, or None."""
    used = [getattr(part, "id", None) or getattr(part, "attr", None) or "" for part in ast.walk(value)]
    texts = [str(part.value) for part in ast.walk(value) if isinstance(part, ast.Constant)]
    judges = re.search("reward|sentiment|classif|score", " ".join([name, *texts]).lower())
    if any("Tokenizer" in word for word in used):
        return "reward_tokenizer" if judges else "tokenizer"
    if any("SequenceClassification" in word for word in used):
        return "reward_model"
    if any(re.search("CausalLM|LMHeadModel|deepcopy", word) for word in used):
        return "orig_model" if re.search("orig|ref|base|init|old|frozen", name.lower()) else "model"
    return "device" if "device" in used or "is_available" in used else None
