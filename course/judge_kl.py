"""What compute_kl_divergence must answer on cases known on paper, and what each usual mistake would answer instead."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import token_logps
from course import tiny_models
from course.explain import Watch, best, call, graded, gradient, right, verdict, wrong
from course.judge_reinforce import masks, reinforce_tokens
from course.tiny_models import EOS, LENGTH, REWARDS

# ---- what can be right or wrong ----------------------------------------------------------------------------


def at_next_token(values, tokens):
    """(B, T, V), (B, T) -> (B, T): of the token that follows; nan in the last column, where none does."""
    return F.pad(token_logps(values[:, :-1], tokens[:, 1:]), (0, 1), value=math.nan)


def of_pair(p, q):
    """KL(p ‖ q)"""
    return (p.exp() * (p - q)).sum(dim=-1)


def jensen_shannon(p, q):
    middle = torch.logaddexp(p, q) - math.log(2)
    return (of_pair(p, middle) + of_pair(q, middle)) / 2


SAMPLED = "KL sampled and back-propagated"
APART = "policy and original at different positions"
FORMS = [  # of (B, T, V) log-probs p of the policy and q of the original, the tokens, and the original's logits
    right(lambda p, q, *_: of_pair(p, q)),
    wrong("KL reversed", lambda p, q, *_: of_pair(q, p)),
    wrong(SAMPLED, lambda p, q, tokens, _: at_next_token(p - q, tokens)),
    wrong(SAMPLED, lambda p, q, tokens, _: token_logps(p - q, tokens)),  # without a shift
    wrong(SAMPLED + ", squared", lambda p, q, tokens, _: at_next_token((p - q) ** 2 / 2, tokens)),
    wrong(SAMPLED + ", k3", lambda p, q, tokens, _: at_next_token((q - p).exp() - 1 - (q - p), tokens)),
    wrong(SAMPLED + ", k3 reversed", lambda p, q, tokens, _: at_next_token((p - q).exp() - 1 - (p - q), tokens)),
    wrong(SAMPLED + ", times log p", lambda p, q, tokens, _: at_next_token((p - q) * p, tokens)),
    wrong("cross-entropy", lambda p, q, *_: -(p.exp() * q).sum(dim=-1)),
    wrong("Jensen-Shannon", lambda p, q, *_: jensen_shannon(p, q)),
    wrong("symmetric KL", lambda p, q, *_: of_pair(p, q) + of_pair(q, p)),
    wrong("symmetric KL", lambda p, q, *_: (of_pair(p, q) + of_pair(q, p)) / 2),
    wrong("only the sampled word in the KL", lambda p, q, tokens, _: at_next_token(p.exp() * (p - q), tokens)),
    # One of them is taken a column late. The other's column is where it is masked.
    wrong(APART, lambda p, q, *_: of_pair(p.roll(-1, dims=1), q)),
    wrong(APART, lambda p, q, *_: of_pair(p, q.roll(-1, dims=1))),
    wrong("softmax forgotten", lambda p, q, tokens, logits: of_pair(p, logits)),
    wrong("the weights p forgotten", lambda p, q, *_: (p - q).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: (q.exp() * (q - p.exp())).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: of_pair(p, q.exp())),
    wrong("log of a log-probability", lambda p, q, *_: q.log().sum(dim=-1)),
    wrong("compared with itself", lambda p, q, *_: 0 * q.sum(dim=-1)),
]
WHERE = [
    right((9, 29)),
    right((0, 30), "KL at all 30 positions, the prompt's and the one after the last token included (left open)"),
    right((0, 29), "KL at 29 positions, the prompt's included (left open)"),
    right((9, 30), "KL at the completion's positions and at the one after its last token (left open)"),
    right((10, 30), "KL at columns 10 to 29; the forecast of the first token written is in column 9 (left open)"),
    wrong("off by one at the prompt", (10, 29)),
    wrong("off by one at the prompt", (8, 29)),
    wrong("prompt positions in the KL", (0, 9)),  # only these
    wrong("prompt positions in the KL", (0, 10)),
]
KL_ENDS = [  # which of Forecasted.counted
    right("first"),
    right("all", "counts positions after the first eos, too (left open)"),
    wrong("first eos dropped", "none"),
]
HOW = [  # (B, n) KL, 0 where it is left out, and its mask -> ()
    right(lambda kl, mask: kl.sum(dim=-1).mean()),
    right(lambda kl, mask: kl.sum() / mask.sum(),
          "averaged over the positions: alpha must be that many times larger (left open)"),
    right(lambda kl, mask: (kl.sum(dim=-1) / mask.sum(dim=-1)).mean(),
          "averaged over the positions, row by row: alpha must be that many times larger (left open)"),
    right(lambda kl, mask: kl.mean(), "averaged over the positions, those left out counted as 0 (left open)"),
    right(lambda kl, mask: kl.sum(), "summed over rows and positions: an alpha depends on the batch size (left open)"),
    wrong("batchmean over the wrong axis", lambda kl, mask: kl.sum(dim=0).mean()),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.mean() / tiny_models.VOCABULARY),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.sum(dim=-1).mean() / tiny_models.VOCABULARY),
]
KL = [FORMS, WHERE, KL_ENDS, HOW, [right(1), wrong("KL negated", -1)]]

# ---- the cases ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Forecasted:
    """Rows on which compute_kl_divergence is called, with what both models forecast there."""

    tokens: torch.Tensor  # (B, T)
    counted: dict  # (B, T) each: positions that count, by which of masks() the token that follows is in
    forecasts: tuple  # what each of FORMS is computed from


@functools.cache
def kl_cases():
    cases = []
    for tokens in reinforce_tokens():
        ours, theirs = (model(tokens).logits.detach() for model in (tiny_models.policy(), tiny_models.original()))
        counted = {ends: mask[:, 1:] for ends, mask in masks(F.pad(tokens, (0, 1), value=EOS)).items()}
        cases.append(Forecasted(tokens, counted, (ours.log_softmax(-1), theirs.log_softmax(-1), tokens, theirs)))
    return cases


@functools.cache
def by_position(case, form):
    return form(*case.forecasts)


def divergence(case, kl, where, ends, how):
    """(B, T) KL by position -> (): of these positions."""
    mask = case.counted[ends][:, slice(*where)]
    return how(kl[:, slice(*where)].masked_fill(~mask, 0.0), mask)


def predict_kl(case, form, where, ends, how, sign):
    """-> [the KL of one combination of choices]"""
    return [sign * divergence(case, by_position(case, form), where, ends, how).item()]


# ---- the verdict -------------------------------------------------------------------------------------------


def judge_kl(function, given):
    answers, tables, watched = [], [], Watch()
    for case in kl_cases():
        policy, original = tiny_models.policy(), tiny_models.original()
        given |= {"model": policy, "orig_model": original}  # some use the globals
        watched.models.append(original)
        tables.append(policy.table)
        log_probs = own_log_probs(given, case.tokens.clone(), policy)
        answers.append(watched.call(function, given, log_probs, case.tokens.clone(), original))
    return best(answers, "KL", lambda kls, notes: diverging(kls, tables[0], watched, notes))


def own_log_probs(given, tokens, policy):
    """What a solution's compute_reinforce_loss hands to its compute_kl_divergence, if that is of any use, else ours.

    It is if it holds the right log-probs: of all words, or of the chosen ones, at some columns in a row.
    """
    ours = policy(tokens).logits.log_softmax(dim=-1)
    try:
        theirs = call(given["compute_reinforce_loss"], given, torch.tensor(REWARDS), tokens, policy)[0]
        for whole in (ours, token_logps(ours[:, :-1], tokens[:, 1:])):
            for first in range(LENGTH):
                part = whole[:, first : first + theirs.shape[1]]
                if part.shape == theirs.shape and torch.allclose(part, theirs, atol=1e-3) and theirs.requires_grad:
                    return theirs
    except Exception:
        pass  # it is judged elsewhere
    return ours


def diverging(kls, table, watched, notes):
    """-> Verdict on the KLs of both cases. table: the policy's, of the first case."""
    (found,) = gradient(kls[0], table)
    result, meant = verdict(KL, predict_kl, kl_cases(), [[kl.item()] for kl in kls], watched, notes)
    if result.status == "wrong":
        return result
    form, *choices, _ = (choice.value for choice in meant)
    case, policy = kl_cases()[0], tiny_models.policy()
    kl = form(policy(case.tokens).logits.log_softmax(dim=-1), *case.forecasts[1:])
    (expected,) = gradient(divergence(case, kl, *choices), policy.table)
    return graded(result, found, expected, "KL without a gradient", watched)
