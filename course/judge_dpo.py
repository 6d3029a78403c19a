"""What compute_DPO_loss must answer on cases known on paper, and what each usual mistake would answer instead."""

import math

import torch
import torch.nn.functional as F

from course.explain import (NO_GRADIENT, Verdict, Watch, best, close, explain, graded, gradient, names, right, said,
                            same, verdict, wrong)

# ---- the cases ---------------------------------------------------------------------------------------------

# Log-probs of four pairs: policy chosen, policy rejected, reference chosen, reference rejected. The log-ratios are
# 2, -1.5, -2, 1 of the chosen and -3, -2, 1, 0 of the rejected: differences 5, 0.5, -3, 1.
LOGPS = ((-9.0, -12.5, -23.0, -31.0), (-4.0, -16.0, -18.0, -37.0),
         (-11.0, -11.0, -21.0, -32.0), (-1.0, -14.0, -19.0, -37.0))
DPO_CASES = [(LOGPS, 0.1), (LOGPS, 0.5)]
LONGER = tuple(tuple(logp - 300 for logp in side) for side in LOGPS), 0.1  # exp() of these is 0 in fp32
LOST = ((-800.0,), (0.0,), (0.0,), (0.0,)), 1.0  # log(sigmoid(-800)) is not finite, logsigmoid(-800) is -800
WON = ((0.0,), (-800.0,), (0.0,), (0.0,)), 1.0
FAR_CASES = [LONGER, LOST, WON]

# ---- what can be right or wrong ----------------------------------------------------------------------------

RATIOS = [
    right(lambda pc, pr, rc, rr, _: (pc - rc, pr - rr)),
    wrong("chosen and rejected swapped", lambda pc, pr, rc, rr, _: (pr - rr, pc - rc)),
    wrong("chosen and rejected added", lambda pc, pr, rc, rr, _: (pc - rc, rr - pr)),
    wrong("reference forgotten", lambda pc, pr, rc, rr, _: (pc, pr)),
    wrong("reference on the chosen side only", lambda pc, pr, rc, rr, _: (pc - rc, pr)),
    wrong("reference on the rejected side only", lambda pc, pr, rc, rr, _: (pc, pr - rr)),
    wrong("reference added", lambda pc, pr, rc, rr, _: (pc + rc, pr + rr)),
    wrong("reference added on the chosen side", lambda pc, pr, rc, rr, _: (pc + rc, pr - rr)),
    wrong("reference added on the rejected side", lambda pc, pr, rc, rr, _: (pc - rc, pr + rr)),
    wrong("beta on the policy's side only", lambda pc, pr, rc, rr, beta: (pc - rc / beta, pr - rr / beta)),
    wrong("beta on the reference's side only", lambda pc, pr, rc, rr, beta: (pc / beta - rc, pr / beta - rr)),
    wrong("rejected forgotten", lambda pc, pr, rc, rr, _: (pc - rc, 0 * pr)),
    wrong("chosen forgotten", lambda pc, pr, rc, rr, _: (0 * pc, pr - rr)),
]
BETAS = [  # of the two log-ratios -> the margin, a factor of the loss
    right(lambda c, r, beta: (beta * (c - r), 1)),
    wrong("beta forgotten", lambda c, r, beta: (c - r, 1)),
    wrong("beta forgotten", lambda c, r, beta: (0.1 * (c - r), 1)),
    wrong("beta outside the sigmoid", lambda c, r, beta: (c - r, beta)),
    wrong("beta outside the sigmoid", lambda c, r, beta: (beta * (c - r), beta)),
    wrong("beta on the chosen side only", lambda c, r, beta: (beta * c - r, 1)),
    wrong("beta on the rejected side only", lambda c, r, beta: (c - beta * r, 1)),
]
OUTER = [  # of the margin
    right(lambda margin, beta: -F.logsigmoid(margin)),
    wrong("sign", lambda margin, beta: F.logsigmoid(margin)),
    wrong("log forgotten", lambda margin, beta: -margin.sigmoid()),
    wrong("log forgotten", lambda margin, beta: 1 - margin.sigmoid()),
    wrong("sigmoid forgotten", lambda margin, beta: -margin),
    wrong("IPO", lambda margin, beta: (margin / beta - 1 / (2 * beta)) ** 2),
    wrong("IPO", lambda margin, beta: (margin - 1 / 2) ** 2),
    wrong("hinge", lambda margin, beta: F.relu(1 - margin)),
]
PAIRS = [right(torch.mean), wrong("sum for mean over the batch", torch.sum)]
DPO = [RATIOS, BETAS, OUTER, PAIRS]


def tensors(logps):
    """Four sides -> four (B,) tensors, of which the policy's two have a gradient."""
    return [torch.tensor(side, requires_grad=place < 2) for place, side in enumerate(logps)]


def preference(case, ratios, weigh, outer, reduce):
    """-> the DPO loss () of one combination of choices, the four (B,) tensors that it was computed from"""
    logps, beta = case
    sides = tensors(logps)
    margin, factor = weigh(*ratios(*sides, beta), beta)
    return factor * reduce(outer(margin, beta)), sides


def predict_dpo(case, *choices):
    return [preference(case, *choices)[0].item()]


def slopes_of(loss, sides):
    """-> (2 B,): how a loss changes with the policy's log-probs, chosen and rejected."""
    return torch.cat(gradient(loss, *sides[:2]))


# ---- the verdict -------------------------------------------------------------------------------------------


def judge_dpo(function, given):
    answers, policies, watched = [], [], Watch()
    for logps, beta in DPO_CASES + FAR_CASES:
        sides = tensors(logps)
        policies.append(sides)
        answers.append(watched.call(function, given, *(1 * side for side in sides), beta))
    return best(answers, "loss", lambda losses, notes: preferred(losses, policies, watched, notes))


def preferred(losses, policies, watched, notes):
    """-> Verdict on the losses of all cases, each with the policy's log-probs that it was computed from."""
    got, found = [[loss.item()] for loss in losses], list(map(slopes_of, losses, policies))
    result, combination = verdict(DPO, predict_dpo, DPO_CASES, got[: len(DPO_CASES)], watched, notes)
    if all(close(each, got[0]) for each in got):
        constant = NO_GRADIENT if all(each.norm() == 0 for each in found) else None
        return result._replace(mistake="compared with itself" if close(got[0], [math.log(2)]) else constant)
    if watched.low:
        return result
    if not combination:
        return result._replace(mistake=other_loss(got))
    choices = [choice.value for choice in combination]
    expected = slopes_of(*preference(DPO_CASES[0], *choices))
    result = graded(result, found[0], expected, NO_GRADIENT)
    name, *pair = far_out(got[len(DPO_CASES) :], found[len(DPO_CASES) :], choices)
    if name and len(names(combination)) > 1:  # far out it is another loss: so many choices fitted by chance
        return result._replace(mistake=other_loss(got))
    if name and (result.status == "right" or names(combination)):
        mistake = " + ".join(filter(None, (result.mistake, name)))
        return Verdict("wrong", mistake, *pair, result.notes)
    return result


def far_out(got, found, choices):
    """-> the mistake, what was expected and what came in FAR_CASES; a mistake of None if all is as it should be.

    choices: the combination that the loss is on ordinary pairs.
    """
    expected = [predict_dpo(case, *choices) for case in FAR_CASES]
    bad = [not (close(g, e) and same(slopes, slopes_of(*preference(case, *choices))))
           for case, g, e, slopes in zip(FAR_CASES, got, expected, found, strict=True)]
    finite = all(math.isfinite(*g) and slopes.isfinite().all() for g, slopes in zip(got, found, strict=True))
    mistake = "exp of a text's log-prob" if bad[0] else "flat far out" if finite else "log(sigmoid)"
    return (mistake if any(bad) else None), *said(expected, got)


def other_loss(got):
    """-> the mistake in a loss that no combination of choices explains: it has a number in it that may be any."""
    cases = DPO_CASES + FAR_CASES
    more = got[cases.index(LOST)][0] / 800 - 1  # what is added there, in parts of its loss, which is minus the margin
    if not math.isfinite(more):
        return None
    without = [[loss + more * sum(chosen) / len(chosen)] for (loss,), ((chosen, *_), _) in zip(got, cases, strict=True)]
    if explain([axis[:1] for axis in DPO], predict_dpo, cases, without):
        return "SFT term"
    others = [  # (1 - e) * loss(m) + e * loss(-m) is loss(m) + e * m
        wrong("label smoothing", lambda margin, _: -F.logsigmoid(margin) - more * margin),
        wrong("target margin", lambda margin, _: -F.logsigmoid(margin - 800 * more)),
    ]
    return " + ".join(names(explain([RATIOS, BETAS, others, PAIRS], predict_dpo, cases, got) or ())) or None
