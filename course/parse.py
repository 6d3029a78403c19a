"""Reads somebody's solution of the course, a .py export or the .ipynb itself, without running it.

Of its top level only this is executed: imports, name by name, with a stand-in for what is not there; constants;
definitions of functions and classes. No shell line, no download, no training, no plot. What these would have set
(device, tokenizer, model) is given by the caller. A cell with a syntax error costs only the functions it is in.
"""

import __future__

import ast
import builtins
import contextlib
import importlib
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
START = re.compile(r"(async def|def|class|import|from) |@|# ?%%|# In\[")  # where a file can be torn
DEVICE = re.compile(r"(cuda|mps)(:\d+)?")
PLAIN = (ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.BoolOp,
         ast.Compare, ast.IfExp, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.JoinedStr, ast.FormattedValue,
         ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)  # a constant: nothing in it is called...
HARMLESS = ("dict", "list", "tuple", "set", "range", "int", "float", "str", "bool", "len", "min", "max", "sum", "abs",
            "round", "sorted", "GenerationConfig", "KLDivLoss", "CrossEntropyLoss", "NLLLoss", "LogSoftmax", "Softmax",
            "LogSigmoid", "Sigmoid", "partial", "defaultdict", "Counter", "OrderedDict", "SimpleNamespace", "tensor",
            "arange", "zeros", "ones", "log", "exp", "sqrt")  # ... but these,
LIBRARIES = ("builtins", "collections", "functools", "math", "numpy", "torch", "transformers", "types")  # ... from here


class Piece(NamedTuple):
    """A file, or a cell of a notebook."""

    text: str
    line: int  # the number of its first line, in the file or in the cell
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
    statements: list  # of the top level, those that can be read
    functions: dict  # name -> Function; the last of that name, as in a notebook that is run from top to bottom
    unread: list  # Unread


# ---- text to statements ------------------------------------------------------------------------------------


def pieces(path):
    """-> list of Pieces; ValueError if the file is not what its name says."""
    try:
        with tokenize.open(path) as file:  # knows `# coding: latin-1` and a byte order mark
            text = file.read()
    except SyntaxError as error:
        raise ValueError(f"not a text that can be read: {error.msg}") from None
    if "\0" in text:
        raise ValueError("not a text that can be read: it has null bytes")
    if Path(path).suffix != ".ipynb" and not text.lstrip().startswith("{"):  # some notebooks are called .py
        return [Piece(text, 1, None)]
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a notebook that can be read (format 4): {type(error).__name__}: {error}") from None
    return [Piece(source, 1, number) for number, source in enumerate(sources, 1) if not OTHER_LANGUAGE.match(source)]


def parsed(piece):
    """-> list of statements, None; or None, SyntaxError. Shell lines become `pass`, on the line where they were."""
    lines = piece.text.split("\n")
    while True:
        try:
            with warnings.catch_warnings(action="ignore"):  # "\d" in a string that is not raw, and the like
                return ast.parse("\n" * (piece.line - 1) + "\n".join(lines)).body, None
        except SyntaxError as error:
            row = (error.lineno or 0) - piece.line
            if not 0 <= row < len(lines) or not SHELL.match(lines[row]):
                return None, error
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
    return [Piece("\n".join(lines[first:end]), piece.line + first, piece.cell)
            for first, end in zip(firsts, ends, strict=True)]


def read_solution(path):
    """-> Solution. Executes nothing. OSError, ValueError (UnicodeDecodeError is one) if the file can't be read."""
    solution = Solution([], {}, [])
    for piece in pieces(path):
        statements, error = parsed(piece)
        if not error:
            take(solution, statements, piece)
            continue
        for part in torn(piece):
            statements, error = parsed(part)
            if error:
                solution.unread.append(unread(part, error))
            else:
                take(solution, statements, part)
    return solution


def unread(piece, error):
    """-> Unread of a piece and its SyntaxError."""
    line = min(error.lineno or piece.line, piece.line + piece.text.count("\n"))
    text = piece.text.split("\n")[line - piece.line].strip()
    return Unread(error.msg, line, piece.cell, text, piece.text, re.findall(r"^def (\w+)", piece.text, re.M))


def take(solution, statements, piece):
    """Adds what is defined in these statements, also under `if`, `try` and `with`."""
    lines = piece.text.split("\n")
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            node = named(node)
        if isinstance(node, ast.Assign) and getattr(node.value, "id", None) in solution.functions:  # f = g
            names = [name.id for name in node.targets if isinstance(name, ast.Name)]
            solution.functions.update(dict.fromkeys(names, solution.functions[node.value.id]))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = "\n".join(lines[node.lineno - piece.line : node.end_lineno - piece.line + 1])
            solution.functions[node.name] = Function(node, text, piece.cell)
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            inner = [*node.body, *(s for handler in getattr(node, "handlers", []) for s in handler.body)]
            take(solution, [*inner, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])], piece)
        else:
            solution.statements.append(node)


def named(node):
    """f = lambda x: y -> def f(x): return y"""
    function = ast.parse(f"def {ast.unparse(node.targets[0]).split('.')[-1]}(): return 0").body[0]
    function.args, function.body[0].value = node.value.args, node.value.body
    for part in (function, function.body[0]):
        ast.copy_location(part, node)
    return function


# ---- statements to a namespace -----------------------------------------------------------------------------


class OnCPU(ast.NodeTransformer):
    """"cuda" and "mps" become "cpu": the check needs no accelerator."""

    def visit_Constant(self, node):
        if isinstance(node.value, str) and DEVICE.fullmatch(node.value):
            return ast.copy_location(ast.Constant("cpu"), node)
        return node


def execute(solution, given, path):
    """-> namespace, notes. given: {name: stand-in}, which no statement of the solution replaces.

    Functions keep their line numbers. notes: pairs, a name and how it was stood in for or defined otherwise.
    """
    namespace, notes = {"__name__": "solution", "__builtins__": builtins, **given}, []
    for node in solution.statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, value in imported(node):
                namespace[name] = given.get(name, value)  # `from torch import *` has a name `device`, too
                if isinstance(value, MagicMock):
                    notes.append((name, f"is stood in for: what `{ast.unparse(node)}` names is gone or not installed"))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            define(node, namespace, notes, path)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            names = targets(node)
            if not names or any(name in given for name in names):
                continue
            if is_plain(node.value, namespace) or called(node.value) in bare_classes(solution):
                with contextlib.suppress(Exception):  # a name in it that nothing has set: so is this one
                    run_statement(node, namespace, path)
            else:
                namespace |= {name: given[role] for name in names if (role := role_of(name, node.value)) in given}
    return namespace, notes


def targets(node):
    """Names that a statement of the top level sets; [] if it sets something else, too."""
    found = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    found = [part for each in found for part in (each.elts if isinstance(each, (ast.Tuple, ast.List)) else [each])]
    return [part.id for part in found] if all(isinstance(part, ast.Name) for part in found) else []


def bare_classes(solution):
    """Classes that hold constants: to make one executes nothing of the solution's."""
    return [node.name for node in solution.statements if isinstance(node, ast.ClassDef)
            and not any(isinstance(part, ast.FunctionDef) for part in node.body)]


def run_statement(node, namespace, path):
    module = ast.fix_missing_locations(ast.Module([OnCPU().visit(node)], []))
    flags = __future__.annotations.compiler_flag  # a type that is not there must not keep a function from its test
    exec(compile(module, str(path), "exec", flags=flags, dont_inherit=True), namespace)


def define(node, namespace, notes, path):
    """Defines a function or class; without decorators and defaults if these cannot be had."""
    functions = [node]
    if isinstance(node, ast.ClassDef):  # its body is executed too, so keep only definitions and constants
        functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        constants = [part for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign))
                     and is_plain(part.value, namespace)]
        node.body = [*constants, *functions] or [ast.Pass()]
    for function in functions:  # a default is executed with its definition, so it must be a constant, too
        bare(function, lambda name, value: (
            value if is_plain(value, namespace) else standing_for(name, value, namespace)))
    try:
        run_statement(node, namespace, path)
        lost = isinstance(namespace[node.name], MagicMock) and "its decorator is not there"
    except Exception as error:
        lost = f"{type(error).__name__}: {error}"
    if lost:
        notes.append((node.name, f"is defined without decorators and defaults: {lost}"))
        node.decorator_list = []
        for function in functions:
            bare(function, lambda name, value: ast.Constant(None))
        with contextlib.suppress(Exception):
            run_statement(node, namespace, path)


def is_plain(value, namespace):
    """True for a constant: nothing in it is called but what makes a list, a number and the like."""
    parts = [] if value is None else ast.walk(value)
    return all(isinstance(part, (*PLAIN, ast.keyword)) or harmless(part, namespace) for part in parts)


def harmless(node, namespace):
    """True for the call of a function in HARMLESS that is the library's own, and not one of the solution's."""
    if called(node) not in HARMLESS or not all(isinstance(part, PLAIN) for part in ast.walk(node.func)):
        return False
    try:
        function = eval(ast.unparse(node.func), namespace)  # a name, or names with dots
    except Exception:
        return False
    return (getattr(function, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def called(node):
    """The last name of what a call calls; None for what is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", None) or getattr(function, "id", None)


def standing_for(name, value, namespace):
    """What a default becomes that is not executed: the stand-in of its role, or None."""
    role = role_of(name, value)
    return ast.Name(role, ast.Load()) if role in namespace else ast.Constant(None)


def bare(function, replaced):
    """Replaces the defaults of a function's parameters by replaced(name of the parameter, default)."""
    args = function.args
    named = [*args.posonlyargs, *args.args][len(args.posonlyargs) + len(args.args) - len(args.defaults) :]
    args.defaults = [replaced(arg.arg, value) for arg, value in zip(named, args.defaults, strict=True)]
    args.kw_defaults = [value and replaced(arg.arg, value)
                        for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True)]


def imported(node):
    """Yields name, value of an import statement; a stand-in for a module or a name that is not there."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            whole, top = module(alias.name), alias.name.partition(".")[0]
            yield (alias.asname, whole) if alias.asname else (top, module(top))
        return
    source = module("." * node.level + (node.module or ""))
    for alias in node.names:
        if alias.name == "*":
            public = getattr(source, "__all__", [name for name in dir(source) if not name.startswith("_")])
            yield from ((name, getattr(source, name)) for name in public if hasattr(source, name))
        elif hasattr(source, alias.name):
            yield alias.asname or alias.name, getattr(source, alias.name)
        else:
            yield alias.asname or alias.name, module(f"{node.module}.{alias.name}")


def module(name):
    """The installed module of that name, else a stand-in. This project's own files are not what was meant."""
    with contextlib.suppress(Exception, SystemExit):
        found = importlib.import_module(name)
        if Path(getattr(found, "__file__", None) or "/").parent not in (HERE, *HERE.iterdir()):
            return found
    return MagicMock(name=name)


def role_of(name, value):
    """A top-level name and the call that would have set it -> which of the caller's stand-ins it gets, or None."""
    used = [part.id if isinstance(part, ast.Name) else part.attr for part in ast.walk(value)
            if isinstance(part, (ast.Name, ast.Attribute))]
    texts = [part.value for part in ast.walk(value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    about = " ".join([name, *texts]).lower()
    judges = re.search("reward|sentiment|classif|score", about)
    if any("Tokenizer" in word for word in used):
        return "reward_tokenizer" if judges else "tokenizer"
    if any("SequenceClassification" in word for word in used):
        return "reward_model"
    if any(re.search("CausalLM|LMHeadModel|deepcopy", word) for word in used):
        return "orig_model" if re.search("orig|ref|base|init|old|frozen", name.lower()) else "model"
    return "device" if "device" in used or "is_available" in used else None
