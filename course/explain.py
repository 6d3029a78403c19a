"""Explains a wrong answer: each way to go wrong is a choice, and the combination that gives the same number is named.

Which tokens, which sign, sum or mean: every axis is a list of choices, the first of them right. Of all combinations
with at most three wrong choices that answer what the function answered, the one with the fewest is taken. What the
assignment leaves open is a choice, too, but not a wrong one: it becomes a note.
"""

import inspect
import itertools
import math
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_GRADIENT = "without a gradient"
# Two wrong choices that have one cause: a mask made for tokens, on what is shifted by one, is late at either end.
ONE_CAUSE = {frozenset(["mask one column late", "off by one at the prompt"]): ["mask one column late"]}


class Choice(NamedTuple):
    name: str  # "" says nothing: it is the usual right one
    wrong: bool
    value: object


def right(value, note=""):
    return Choice(note, False, value)


def wrong(name, value):
    return Choice(name, True, value)


class Verdict(NamedTuple):
    status: str  # right, wrong
    mistake: str | None = None
    expected: object = None
    got: object = None
    notes: tuple = ()


# ---- the search --------------------------------------------------------------------------------------------


def close(found, expected):
    """Lists of numbers, equal up to rounding; nan is nan, infinite is infinite."""
    return len(found) == len(expected) and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(found, expected, strict=True))


def exactly(found, expected):
    return all(math.isclose(a, b, rel_tol=3e-6, abs_tol=1e-6) for a, b in zip(found, expected, strict=True))


def nearly(found, expected):
    """Equal up to what half precision rounds."""
    same_length = len(found) == len(expected)
    return same_length and all(abs(a - b) <= 0.03 * abs(b) for a, b in zip(found, expected, strict=True))


def explain(axes, predict, cases, got, close=close):
    """-> the combination of choices, one of each axis, that answers `got` in all cases; None if there is none.

    The first choice of an axis is the right one. predict(case, *values) -> list of float, or None if that cannot be.
    """
    combinations = [c for c in itertools.product(*axes) if sum(choice.wrong for choice in c) <= 3]
    combinations.sort(key=lambda c: (sum(choice.wrong for choice in c), sum(bool(choice.name) for choice in c)))
    for combination in combinations:
        values = [choice.value for choice in combination]
        predicted = (predict(case, *values) for case in cases)
        if all(p is not None and close(g, p) for g, p in zip(got, predicted, strict=True)):
            return combination
    return None


def verdict(axes, predict, cases, got, watched=None, notes=()):
    """-> Verdict, and the combination of choices that the answer was explained with (right ones if it was not)."""
    combination = explain(axes, predict, cases, got)
    free = [[choice for choice in axis if not choice.wrong] for axis in axes]
    found = combination or tuple(axis[0] for axis in axes)
    meant = [axis[0] if choice.wrong else choice for axis, choice in zip(axes, found, strict=True)]
    expected = [predict(case, *(choice.value for choice in meant)) for case in cases]
    notes = (*(choice.name for choice in meant if choice.name), *notes)
    mistakes = list(dict.fromkeys(choice.name for choice in reversed(found) if choice.wrong))
    mistakes = ONE_CAUSE.get(frozenset(mistakes), mistakes)
    rounded = watched and watched.low and not explain([[choice] for choice in meant], predict, cases, got, exactly)
    if combination and not mistakes and not rounded and not (watched and watched.dropped()):
        return Verdict("right", None, *said(expected, got, 0), notes), meant
    if watched and watched.dropped():
        mistakes = ["dropout on"]
    elif not mistakes and rounded and explain(free, predict, cases, got, nearly):
        mistakes = ["softmax in bf16"]
    pairs = [pair for answers in zip(got, expected, strict=True) for pair in zip(*answers, strict=False)]
    factors = {round(g / e, 4) for g, e in pairs if e}
    if not mistakes and len(factors) == 1:
        notes = (*notes, f"it is {factors.pop():g} times the right number, in every case")
    differs = next((i for i, (e, g) in enumerate(zip(expected, got, strict=True)) if not close(e, g)), 0)
    return Verdict("wrong", " + ".join(mistakes) or None, *said(expected, got, differs), notes), meant


def said(expected, got, case):
    """One number as a number, more as a list."""
    pair = [[round(x, 6) if math.isfinite(x) else str(x) for x in answers[case]] for answers in (expected, got)]
    return [answer[0] if len(answer) == 1 else answer for answer in pair]


class Watch(TorchDispatchMode):
    """Sees whether anything was computed in less than fp32, and whether one of the models dropped out."""

    def __init__(self):
        super().__init__()
        self.models, self.low = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.low |= isinstance(output, torch.Tensor) and output.dtype in (torch.bfloat16, torch.float16)
        return output

    def dropped(self):
        return any(model.dropped for model in self.models)

    def call(self, function, given, *arguments):
        with self:
            return call(function, given, *arguments)


def call(function, given, *arguments):
    """Calls it as the course does; a further parameter without a default gets the stand-in of its name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[len(arguments) :]
    except ValueError:  # a compiled function has none
        parameters = []
    more = {p.name: given[p.name] for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name in given}
    return function(*arguments, **more)


class BadAnswer(Exception):
    """An answer of a kind that cannot be compared: what is needed, and what came."""


class Unfinished(TypeError):
    """The function returns None or ..., as one does that has not been written yet."""


def answered(answer):
    """Raises Unfinished if there is nothing in an answer, or nothing in a part of it."""
    for part in answer if isinstance(answer, (tuple, list)) else [answer]:
        if part is None or part is ...:
            raise Unfinished(f"returns {shapes(answer)}")
    return answer


def scalar(answer, what):
    """-> the tensor of one element in an answer (the last, if it is a tuple), notes."""
    answer = answer.get("loss", answer) if isinstance(answer, dict) else answer
    parts = answered(answer) if isinstance(answer, (tuple, list)) else [answered(answer)]
    for part in reversed(parts):
        if isinstance(part, int):
            raise Unfinished(f"returns {part}")
        if isinstance(part, float):
            return torch.tensor(float(part)), ("a Python number: no gradient can flow through it",)
        if isinstance(part, torch.Tensor) and part.numel() == 1:
            return part.reshape(()), ()
    for part in reversed(parts):
        if isinstance(part, torch.Tensor) and part.dim() == 1:
            return part.mean(), (f"{what} of each row; the course returns their mean",)
    raise BadAnswer(f"a {what}: a tensor of one number", shapes(answer))


def shapes(answer):
    if isinstance(answer, torch.Tensor):
        return f"a tensor {tuple(answer.shape)}"
    if isinstance(answer, (tuple, list)):
        return "(" + ", ".join(map(shapes, answer[:4])) + (", ...)" if len(answer) > 4 else ")")
    return {None: "None", ...: "..."}.get(answer) if answer in (None, ...) else type(answer).__name__


def gradient(loss, *leaves):
    """-> the loss's gradient for each leaf, None where it has none."""
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))


def same(found, expected):
    return (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7


def graded(result, found, expected, name, words, watched=None):
    """A right value whose gradient is not right is a mistake of that name."""
    if result.status != "right" or (found is not None and same(found, expected)):
        return result
    if found is None or found.norm() <= 1e-6 * expected.norm():
        return result._replace(status="wrong", mistake=name, notes=(*result.notes, f"the value is right, but {words}"))
    if watched and watched.low:
        return result._replace(status="wrong", mistake="softmax in bf16")
    ratio = (found.flatten() @ expected.flatten() / expected.norm() ** 2).item()
    note = f"the value is right, its gradient is not ({ratio:.3g} of the right one along its direction)"
    return result._replace(status="wrong", mistake="another gradient", notes=(*result.notes, note))
