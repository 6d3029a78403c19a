"""Explains a wrong answer: each way to go wrong is a choice, and the combination that gives the same number is named.

Which tokens, which sign, sum or mean: every axis is a list of choices, the first of them right. Of all combinations
with at most three wrong choices that answer what the function answered, the one with the fewest is taken. What the
assignment leaves open is a choice, too, but not a wrong one: it becomes a note.
"""

import functools
import inspect
import itertools
import math
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

NO_GRADIENT = "without a gradient"


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


def close(found, expected, rounding=1e-4):
    """Lists of numbers, equal up to rounding; nan is nan, infinite is infinite."""
    return len(found) == len(expected) and all(
        math.isclose(a, b, rel_tol=rounding, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(found, expected, strict=True))


EXACT, HALF = 1e-5, 0.03  # what fp32 rounds off, and half precision


def combinations(axes, most=3):
    """-> tuples of one choice of each axis, at most so many wrong: fewest wrong first, then what says the least."""
    all_of_them = []
    for count in range(most + 1):
        found = []
        for places in itertools.combinations(range(len(axes)), count):
            found += itertools.product(*([choice for choice in axis if choice.wrong == (place in places)]
                                         for place, axis in enumerate(axes)))
        all_of_them += sorted(found, key=lambda combination: sum(bool(choice.name) for choice in combination))
    return all_of_them


def explain(axes, predict, cases, got, rounding=None):
    """-> the combination of choices, one of each axis, that answers `got` in all cases; None if there is none.

    The first choice of an axis is the right one. predict(case, *values) -> list of float.
    """
    for combination in combinations(axes):
        values = [choice.value for choice in combination]
        usual = EXACT if sum(choice.wrong for choice in combination) > 1 else 1e-4  # of so many one fits by chance
        if all(close(g, predict(case, *values), rounding or usual) for g, case in zip(got, cases, strict=True)):
            return combination
    return None


def names(combination):
    """-> the mistakes in it, each once"""
    return list(dict.fromkeys(choice.name for choice in reversed(combination) if choice.wrong))


def verdict(axes, predict, cases, got, watched=None, notes=()):
    """-> Verdict, and the combination of choices that the answer is explained with (None if it is not)."""
    found = explain(axes, predict, cases, got)
    combination = found or [axis[0] for axis in axes]
    meant = [axis[0] if choice.wrong else choice for axis, choice in zip(axes, combination, strict=True)]
    expected = [predict(case, *(choice.value for choice in meant)) for case in cases]
    notes = (*(choice.name for choice in meant if choice.name), *notes)
    mistakes = names(combination)
    if watched and watched.dropped():
        mistakes = ["dropout on"]
    elif watched and watched.low and not mistakes:
        free = [[choice for choice in axis if not choice.wrong] for axis in axes]
        exact = found and all(map(functools.partial(close, rounding=EXACT), got, expected))
        if not exact and explain(free, predict, cases, got, HALF):
            mistakes = ["softmax in bf16"]
    status = "right" if found and not mistakes else "wrong"
    return Verdict(status, " + ".join(mistakes) or None, *said(expected, got), notes), found


def said(expected, got):
    """-> what was expected and what came in the first case in which they differ: one number as a number."""
    cases = list(zip(expected, got, strict=True))
    pair = next((pair for pair in cases if not close(*pair)), cases[0])
    pair = [[round(x, 6) if math.isfinite(x) else str(x) for x in answer] for answer in pair]
    return [answer[0] if len(answer) == 1 else answer for answer in pair]


class Watch(TorchFunctionMode):
    """Sees whether anything was computed in less than fp32, and whether one of the models dropped out."""

    def __init__(self):
        super().__init__()
        self.models, self.low = [], False

    def __torch_function__(self, function, types, args=(), kwargs=None):
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
    more = {p.name: given[p.name] for p in parameters if p.default is p.empty and p.name in given}
    return function(*arguments, **more)


# ---- what comes back ---------------------------------------------------------------------------------------


class BadAnswer(Exception):
    """An answer of a kind that cannot be compared: what is needed, and what came."""


class Unfinished(TypeError):
    """The function returns None, ... or 0, as one does that has not been written yet."""


def answered(answer):
    """Raises Unfinished if there is nothing in an answer, or nothing in a part of it."""
    for part in answer if isinstance(answer, (tuple, list)) else [answer]:
        if part is None or part is ...:
            raise Unfinished(f"returns {shapes(answer)}")
    return answer


def parts(answer):
    """-> {place: part}: of a dict or a tuple; {None: answer} of anything else."""
    if isinstance(answer, dict):
        return answer
    return dict(enumerate(answer)) if isinstance(answer, (tuple, list)) else {None: answer}


def numbers(answer, what):
    """-> {place: tensor of one number}, notes: all that may be the loss in what a function returns.

    If any of them has a gradient, those that have one; if none is one number, the means of what is one for each row.
    """
    found, notes = parts(answered(answer)), ()
    for part in found.values():
        if isinstance(part, int) and not any(getattr(other, "requires_grad", False) for other in found.values()):
            raise Unfinished(f"returns {part}")
    found = {place: torch.tensor(part) if isinstance(part, float) else part for place, part in found.items()}
    found = {place: part for place, part in found.items()
             if isinstance(part, torch.Tensor) and (part.numel() == 1 or part.dim() == 1)}
    if not found:
        raise BadAnswer(f"a {what}: a tensor of one number", shapes(answer))
    for better in (lambda part: part.requires_grad, lambda part: part.numel() == 1):
        found = {place: part for place, part in found.items() if better(part)} or found
    if any(part.numel() > 1 for part in found.values()):
        notes = (f"{what} of each row; the course returns their mean",)
    return {place: part.float().mean() for place, part in found.items()}, notes


ORDINAL, COUNT = ("first", "second", "third"), {2: "two", 3: "three"}


def best(answers, what, judge, usual=None):
    """-> the Verdict on the part that is right, of all that may be the loss; else on one whose mistake has a name.

    answers: of all cases. judge(tensors of one number, notes) -> Verdict. usual: where the course has it.
    """
    cases, verdicts, count = [numbers(answer, what) for answer in answers], [], len(parts(answers[0]))
    for place in (place for place in cases[0][0] if all(place in found for found, _ in cases)):
        elsewhere, notes = place not in (None, "loss", usual), cases[0][1]
        if elsewhere:
            number = place in range(3) and count in (2, 3)
            where = f"the {ORDINAL[place]} of {COUNT[count]}" if number else f"at {place!r}"
            notes = (*notes, f"the {what} is {where}, in what it returns")
        verdicts.append((elsewhere, judge([found[place] for found, _ in cases], notes)))
    if not verdicts:
        raise BadAnswer(f"a {what} in each case", shapes(answers[0]))
    return min(verdicts, key=lambda one: (one[1].status != "right", one[0], not one[1].mistake))[1]


def shapes(answer):
    if isinstance(answer, torch.Tensor):
        return f"a tensor {tuple(answer.shape)}"
    if isinstance(answer, (tuple, list)):
        return "(" + ", ".join(map(shapes, answer[:4])) + (", ...)" if len(answer) > 4 else ")")
    return {None: "None", ...: "..."}.get(answer) if answer in (None, ...) else type(answer).__name__


def gradient(loss, *leaves):
    """-> the loss's gradient for each leaf, 0 where it has none."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True, materialize_grads=True)


def same(found, expected):
    return (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7


def graded(result, found, expected, name, watched=None):
    """A right value whose gradient is not right is a mistake: of that name, if there is no gradient at all."""
    if result.status != "right" or same(found, expected):
        return result
    if found.norm() > 1e-6 * expected.norm():
        name = "softmax in bf16" if watched and watched.low else "another gradient"
    return result._replace(status="wrong", mistake=name)
