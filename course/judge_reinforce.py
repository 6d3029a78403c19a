"""What compute_reinforce_loss must answer on cases known on paper, and what each usual mistake would answer instead.

Where the loss's value says nothing (that of a ratio is a constant), its gradient does. It is a sum of the slopes of the
tokens' log-probs, each times a weight, and has more numbers (256, of the policy's table) than there are weights: they
can be solved for, however the loss is written.
"""

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import completion_mask
from course import tiny_models
from course.explain import (NO_GRADIENT, Watch, best, call, close, combinations, graded, gradient, names, numbers,
                            right, shapes, verdict, wrong)
from course.tiny_models import EOS, LENGTH, REWARDS, WORDS

NOT_DETACHED = "the reward is not detached here: see that it is before"

# ---- what can be right or wrong ----------------------------------------------------------------------------

KINDS = [  # (B, T, V) logits -> (B, T, V): what is gathered from
    right(lambda logits: logits.log_softmax(dim=-1)),
    wrong("log forgotten", lambda logits: logits.softmax(dim=-1)),
    wrong("softmax forgotten", lambda logits: logits),
    wrong("softmax over the wrong axis", lambda logits: logits.log_softmax(dim=1)),
    wrong("softmax over the wrong axis", lambda logits: logits.log_softmax(dim=0)),
]


def span(first, last, ahead=1):
    """Columns of tokens, first to last, each with the column of the forecast that is used for it (t - 1 is right)."""
    tokens = torch.arange(first, last + 1)
    return tokens - ahead, tokens


SPANS = [
    right(span(10, 29)),
    right(span(1, 29), "29 log-probs a row: the prompt's, too, though the policy did not choose them (Q3.4)"),
    *(wrong("no shift", span(first, last, 0)) for first, last in ((10, 29), (0, 29), (1, 29), (0, 28), (10, 28))),
    *(wrong("logits shifted instead of targets", span(first, 28, -1)) for first in (10, 9, 0)),
    *(wrong("off by one at the prompt", span(first, 29)) for first in (9, 11)),
    # What gather does to an index that is shorter than its input: the first forecasts for the last tokens.
    *(wrong("misaligned gather", (torch.arange(LENGTH - first), torch.arange(first, LENGTH))) for first in (10, 11, 9)),
]
ENDS = [  # which of masks()
    right("first"),
    right("all", "counts tokens after the first eos, too (left open)"),
    wrong("first eos dropped", "none"),
    wrong("mask one column late", "late"),
]
TOKENS = [  # (..., B, n) values of a row's tokens, their (B, n) mask -> (..., B)
    right(lambda values, mask: (values * mask).sum(dim=-1)),
    wrong("mean for sum", lambda values, mask: (values * mask).sum(dim=-1) / mask.sum(dim=-1)),
    wrong("mean for sum", lambda values, mask: (values * mask).sum(dim=-1) / mask.sum() * len(mask)),
    wrong("mean over padding", lambda values, mask: (values * mask).mean(dim=-1)),
]
ROWS = [  # (B,) rewards -> (B,): what each row's log-prob is multiplied with. For more, see row_words().
    right(lambda reward: reward / len(reward)),
    wrong("reward broadcast over tokens", lambda reward: reward.mean().expand_as(reward) / len(reward)),
    wrong("reward broadcast over tokens", lambda reward: reward.sum().expand_as(reward) / len(reward)),
]
REINFORCE = [KINDS, SPANS, ENDS, TOKENS, ROWS, [right(1), wrong("sign", -1)]]

# ---- the cases ---------------------------------------------------------------------------------------------

REWARD = torch.tensor(REWARDS)  # (B,)
STOPPED = {1: 17, 3: 25}  # in the second case, rows 1 and 3 end at completion tokens 8 and 16


def of_tokens(values, tokens):
    """(B, T, V), (B, T) -> (B, T, T): value of the token of column u at column t."""
    return values.gather(-1, tokens.unsqueeze(1).expand(-1, values.shape[1], -1))


def masks(tokens):
    """(B, T) -> {which: (B, T) bool}: tokens that count, by what is done about eos."""
    is_eos = tokens == EOS
    first = completion_mask(tokens, EOS)
    late = torch.cat([first[:, :1], first[:, :-1]], dim=1)
    return {"all": torch.ones_like(is_eos), "first": first, "none": ~is_eos, "late": late}


@dataclass(eq=False)  # each is its own key in a cache
class Rows:
    """Rows on which compute_reinforce_loss is called. All is computed on the 16 words alone."""

    masks: dict  # (B, T) each
    tables: dict  # of KINDS -> of_tokens() of what is gathered from, under the policy
    slopes: torch.Tensor  # (256, B, T, T): how the right table changes with each number of the policy's


def reinforce_case(tokens):
    table, words = tiny_models.policy().table[:, WORDS].detach(), (tokens.unsqueeze(-1) == WORDS).float()
    rows = tiny_models.policy().row(tokens)
    tables = {kind.value: of_tokens(kind.value(table[rows]), words.argmax(dim=-1)) for kind in KINDS}
    here = F.one_hot(rows, len(table)).float()  # (B, T, 16)
    slopes = torch.einsum("btr,buw->rwbtu", here, words)  # 1 for the word itself, less p
    slopes -= torch.einsum("btr,rw->rwbt", here, table.softmax(dim=-1)).unsqueeze(-1)
    return Rows(masks(tokens), tables, slopes.flatten(0, 1))


def reinforce_tokens():
    """-> two batches (B, T): nothing ends early, and two rows do."""
    return [tiny_models.rows(), tiny_models.ended(tiny_models.rows(), STOPPED)]


@functools.cache
def reinforce_cases():
    return [reinforce_case(tokens) for tokens in reinforce_tokens()]


def of_rows(case, table, columns, ends, reduce):
    """(..., B, T, T) -> (..., B): each row's log-prob, or whatever else of its tokens the table holds."""
    at, of = columns
    return reduce(table[..., at, of], case.masks[ends][:, of])


@functools.cache
def log_prob(case, kind, *choices):
    return of_rows(case, case.tables[kind], *choices)


def predict_reinforce(case, kind, columns, ends, reduce, over_rows, sign):
    """-> [the REINFORCE loss of one combination of choices]"""
    return [-sign * (over_rows(REWARD) @ log_prob(case, kind, columns, ends, reduce)).item()]


# ---- the verdict -------------------------------------------------------------------------------------------


def judge_reinforce(function, given):
    answers, watched = [], Watch()
    for tokens in reinforce_tokens():
        policy = given["model"] = tiny_models.policy()  # some use the global
        watched.models.append(policy)
        answers.append(watched.call(function, given, REWARD.clone(), tokens, policy))
    result = best(answers, "loss", lambda losses, notes: reinforced(losses, watched, notes), 1)
    if not isinstance(answers[0], (tuple, list)) or len(answers[0]) != 2:
        note = f"returns {shapes(answers[0])}; the course's train wants log_probs, loss"
        result = result._replace(notes=(*result.notes, note))
    elif result.status == "right" and "compute_kl_divergence" in given \
            and not getattr(answers[0][0], "requires_grad", True):
        note = "the log-probs that it returns have no graph: no gradient of a KL made of them reaches the policy"
        return result._replace(status="wrong", mistake="KL without a gradient", notes=(*result.notes, note))
    with contextlib.suppress(Exception):  # a function that wants a reward without a graph is right to
        reward, policy = REWARD.clone().requires_grad_(), tiny_models.policy()
        answer = call(function, given, 1 * reward, tiny_models.rows(), policy)
        for loss in numbers(answer, "loss")[0].values():
            if all(slope.norm() > 0 for slope in gradient(loss, reward, policy.table)):
                return result._replace(notes=(*result.notes, NOT_DETACHED))
    return result


def reinforced(losses, watched, notes):
    """-> Verdict on the losses of both cases. watched.models: the policies that they were computed with."""
    cases, got = reinforce_cases(), [[loss.item()] for loss in losses]
    found = [gradient(loss, policy.table)[0][:, WORDS].flatten()
             for loss, policy in zip(losses, watched.models, strict=True)]
    result, meant = verdict(REINFORCE, predict_reinforce, cases, got, watched, notes)
    if result.status == "right":
        _, *choices, over_rows, _ = (choice.value for choice in meant)
        expected = -of_rows(cases[0], cases[0].slopes, *choices) @ over_rows(REWARD)
        return graded(result, found[0], expected, NO_GRADIENT, watched)
    zero = all(close(each, [0]) for each in got)  # explains itself with anything that is 0 by chance
    if all(each.norm() == 0 for each in found):
        return result._replace(mistake=NO_GRADIENT) if zero or not result.mistake else result
    if watched.low or watched.dropped() or not all(each.isfinite().all() for each in found):
        return result
    other = by_gradient(result, cases, got, found, notes)
    unlikely = zero or not result.mistake or " + " in result.mistake
    return other if other.status == "right" or (unlikely and other.mistake) else result


# ---- what the gradient says --------------------------------------------------------------------------------

RATIO = ("its value is {:g} and its gradient that of {:g}: only the gradient matters (the ratio form, "
         "(log p - log p.detach()).exp(), is like that)")
BASELINE = "less {} as a baseline: less noise, but not the assignment's loss"


def by_gradient(result, cases, got, found, notes):
    """-> Verdict on a loss whose value is not the right one: what was right or wrong judging by its gradient."""
    read = []
    for bonus, combination in itertools.product((False, True), combinations([SPANS, ENDS, TOKENS], 1)):
        reading = None if read and bonus else weighed(cases, found, [choice.value for choice in combination], bonus)
        if reading:
            *weights, values = reading
            more_mistakes, more, usual = row_words(*weights)
            mistakes = ["entropy bonus"] * bonus + names(combination) + more_mistakes
            more = [choice.name for choice in combination if choice.name and not choice.wrong] + more
            if not bonus and not all(close(g, [value]) for g, value in zip(got, values, strict=True)):
                more.append(RATIO.format(round(got[0][0], 3) + 0.0, round(values[0], 3)))
            read.append((len(mistakes) + (not usual), not usual, mistakes, more))
    if read:
        *_, mistakes, more = min(read, key=lambda one: one[:2])
        status = "wrong" if mistakes else "right"
        return result._replace(status=status, mistake=" + ".join(mistakes) or None, notes=(*more, *notes))
    return result._replace(mistake=by_place(cases[0], found[0]) or result.mistake)


def solved(slopes, found):
    """(N, K), (N,) -> (K,): weights with which the slopes add up to what was found; None if none do."""
    weights = torch.linalg.lstsq(slopes, found.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    return weights if (slopes @ weights - found).norm() <= 3e-5 * found.norm() else None


@functools.cache
def entropy_slopes():
    """-> (256, 16): how the entropy of each of the policy's 16 forecasts changes with each number of its table."""
    logps = tiny_models.policy().table[:, WORDS].detach().log_softmax(dim=-1)
    entropy = -(logps.exp() * logps).sum(dim=-1, keepdim=True)
    return torch.block_diag(*(-logps.exp() * (logps + entropy)).unsqueeze(-1))


def weighed(cases, found, choices, bonus):
    """-> scale, baseline, [the loss in each case], if a row's weight is scale * (reward - baseline); None if not.

    found: the gradient in each case. choices: which tokens, and how they are added up. bonus: forecasts' entropies,
    in whatever proportion, may be in it, too.
    """
    lines, values = [], []
    for case, gradients in zip(cases, found, strict=True):
        line = -torch.stack([REWARD, torch.ones_like(REWARD)], dim=-1) / len(REWARD)  # (B, 2)
        slopes = of_rows(case, case.slopes, *choices) @ line
        weights = solved(torch.cat([slopes, entropy_slopes()], dim=-1) if bonus else slopes, gradients)
        if weights is None:
            return None
        lines.append(weights[:2].tolist())
        values.append((log_prob(case, KINDS[0].value, *choices) @ line @ weights[:2]).item())
    scales = [scale if abs(scale) > 1e-3 * abs(offset) else 0.0 for scale, offset in lines]
    if not math.isclose(*scales, rel_tol=2e-3):
        return None
    return scales[0], -lines[0][1] / (scales[0] or 1), values


def row_words(scale, baseline):
    """-> mistakes in how rows are weighed, notes on it, whether the scale is that of a usual formula."""
    size, mean = len(REWARD), REWARD.mean().item()

    def is_about(value):
        return math.isclose(baseline, value, abs_tol=1e-3)

    if scale == 0 or (scale < 0 and is_about(1)):
        return ["reward for negative text" if scale else "reward forgotten"], [], True
    mistakes = ["sign"] * (scale < 0)
    name = "" if is_about(0) else "the batch's mean" if is_about(mean) else f"{baseline:.3g}"
    usual = [(1, 1, name)]  # 1 / scale from, to, and the baseline that is used with it
    if is_about(mean):
        for deviation in (REWARD.std().item(), REWARD.std(unbiased=False).item()):  # with a little added, lest it be 0
            usual.append((deviation, deviation + 0.0101, "the batch's mean, divided by its standard deviation,"))
        usual.append(((size - 1) / size, (size - 1) / size, "the mean of the others"))
    for factor, mistake in ((1, None), (size, "sum for mean over the batch"), (size / 32, "the ragged last batch")):
        for least, most, used in usual:
            if least * 0.999 < factor / abs(scale) < most * 1.001:
                return [*mistakes, *[mistake] * bool(mistake)], [BASELINE.format(used)] * bool(used), True
    note = f"its gradient is {scale:.3g} times the right one: AdamW does not mind, but alpha must be as large, too"
    return mistakes, [BASELINE.format(name)] * bool(name) + [note], False


def by_place(case, found):
    """-> the mistake of weighing tokens by their place, or rows not by the reward; None if it is neither.

    The case is that in which nothing ends early, so that a token's place is its column.
    """
    slopes = -case.slopes.diagonal(offset=1, dim1=-2, dim2=-1)  # (256, B, 29): of tokens 1 to 29
    weights = solved(torch.cat([torch.einsum("nbt,b->nt", slopes, REWARD / len(REWARD)), slopes.mean(dim=1)], dim=-1),
                     found)
    if weights is None:
        rows = [slopes[..., first:].sum(dim=-1) for first in (0, 9)]  # with the prompt's tokens, and without
        return "rows not weighed by the reward" if any(solved(row, found) is not None for row in rows) else None
    weights = weights[: LENGTH - 1]  # those that go with the reward; the others with a baseline
    most = weights.abs().max()
    used = weights.abs() > 1e-3 * most
    weights = weights[used]
    if used[-1] and len(weights) == 1:
        return "only the last token rewarded"
    if not len(weights) or weights.max() - weights.min() <= 1e-3 * most:
        return None  # it is right where nothing ends early
    gamma = (weights[-1] / weights[0]) ** (1 / (len(weights) - 1))
    discounts = weights[0] * gamma ** torch.arange(len(weights))
    falls = (weights - discounts).abs().max() <= 1e-3 * most
    return "discount over the tokens" if falls else "tokens weighed by their place"
