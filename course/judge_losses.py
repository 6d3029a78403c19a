"""What the course's losses must answer on cases known on paper, and what each usual mistake would answer instead."""

import contextlib
import functools
import math
import signal
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import completion_mask, token_logps
from course import tiny_models
from course.explain import NO_GRADIENT, Watch, call, close, graded, gradient, right, scalar, shapes, verdict, wrong
from course.tiny_models import EOS, LENGTH, REWARDS

NOT_DETACHED = "the reward is not detached here: see that it is before"

# ---- compute_reinforce_loss --------------------------------------------------------------------------------

ALL_COUNTED = "counts tokens after the first eos, too (the assignment leaves it open; ours do not count)"
STOPPED = {1: 17, 3: 25}  # in the second case, rows 1 and 3 end at completion tokens 8 and 16
SIGNS = [right(1), wrong("sign", -1)]
ENDS = [
    right("first"),
    right("all", ALL_COUNTED),
    wrong("first eos dropped", "none"),
    wrong("mask one column late", "late"),
]


def span(first, last, ahead=1):
    """Columns of tokens, first to last, each with the column of the forecast that is used for it (t - 1 is right)."""
    tokens = torch.arange(first, last + 1)
    return tokens - ahead, tokens


def paired(tokens):
    """What `gather` does to an index that is shorter than its input: the first forecasts for the last tokens."""
    return torch.arange(LENGTH - tokens), torch.arange(tokens, LENGTH)


SPANS = [
    right(span(10, 29)),
    right(span(1, 29), "29 log-probs a row: prompt tokens are scored, too, as a hint in the course's template says; "
                       "the policy did not choose them (Q3.4)"),
    *(wrong("no shift", span(first, last, 0)) for first, last in ((10, 29), (0, 29), (1, 29), (0, 28), (10, 28))),
    *(wrong("logits shifted instead of targets", span(first, 28, -1)) for first in (10, 9, 0)),
    *(wrong("off by one at the prompt", span(first, 29)) for first in (9, 11)),
    *(wrong("misaligned gather", pair)
      for pair in (paired(10), paired(11), paired(9))),
    wrong("last token dropped", span(10, 28)),
    wrong("only the prompt's tokens", span(1, 9)),
]
KINDS = [
    right("log"),
    wrong("log forgotten", "probability"),
    wrong("softmax forgotten", "logit"),
    wrong("softmax over the wrong axis", "tokens"),
    wrong("softmax over the wrong axis", "tokens but one"),
    wrong("softmax over the wrong axis", "rows"),
    wrong("likeliest token scored", "likeliest"),
]
TOKENS = [
    right("sum"),
    wrong("mean for sum", "mean"),
    wrong("mean for sum", "pooled"),
    wrong("mean over padding", "padded"),
]
BASELINE = "less {} as a baseline: less noise, but not the assignment's loss"
ROWS = [
    right(lambda reward, logps: (reward * logps).mean()),
    right(lambda reward, logps: ((reward - reward.mean()) * logps).mean(), BASELINE.format("the batch's mean")),
    right(lambda reward, logps: ((reward - (reward.sum() - reward) / (len(reward) - 1)) * logps).mean(),
          BASELINE.format("the mean of the others")),
    right(lambda reward, logps: ((reward - 0.5) * logps).mean(), BASELINE.format("1/2")),
    right(lambda reward, logps: ((reward - reward.mean()) / reward.std() * logps).mean(), BASELINE.format(
        "the batch's mean, divided by its standard deviation,")),
    wrong("reward broadcast over tokens", lambda reward, logps: reward.mean() * logps.mean()),
    wrong("reward broadcast over tokens", lambda reward, logps: reward.sum() * logps.mean()),
    wrong("the ragged last batch", lambda reward, logps: (reward * logps).sum() / 32),
    wrong("sum for mean over the batch", lambda reward, logps: (reward * logps).sum()),
    wrong("reward forgotten", lambda reward, logps: logps.mean()),
    wrong("reward for negative text", lambda reward, logps: ((1 - reward) * logps).mean()),
]


def scores(logits, kind):
    """(B, T, V) -> (B, T, V): what is gathered from."""
    if kind == "logit":
        return logits
    if kind == "tokens but one":
        return F.pad(logits[:, :-1].log_softmax(dim=1), (0, 0, 0, 1), value=math.nan)
    logps = logits.log_softmax(dim={"rows": 0, "tokens": 1}.get(kind, -1))
    if kind == "likeliest":
        return logps.amax(dim=-1, keepdim=True).expand_as(logps)
    return logps.exp() if kind == "probability" else logps


def of_tokens(values, tokens):
    """(B, T, V), (B, T) -> (B, T, T): value of the token of column u at column t."""
    return values.gather(-1, tokens.unsqueeze(1).expand(-1, values.shape[1], -1))


def masks(tokens):
    """(B, T) -> {which: (B, T) bool}: tokens that count, by what is done about eos. The prompt's always do."""
    is_eos = tokens == EOS
    first = completion_mask(tokens, EOS)
    late = torch.cat([first[:, :1], first[:, :-1]], dim=1)
    return {"all": torch.ones_like(is_eos), "first": first, "none": ~is_eos, "late": late}


def rewarded(reward, table, tokens, columns, ends, per_row, over_rows, sign):
    """The REINFORCE loss of one combination of choices. table: of_tokens(scores(...)); -> ()"""
    at, of = columns
    mask = masks(tokens)[ends][:, of]
    logps = (table[:, at, of] * mask).sum(dim=-1)
    counts = mask.sum(dim=-1)
    logps = logps / {"sum": 1, "mean": counts, "pooled": counts.float().mean(), "padded": len(of)}[per_row]
    return -sign * over_rows(reward, logps)


class Rows(NamedTuple):
    tokens: torch.Tensor  # (B, 30)
    reward: torch.Tensor  # (B,)
    tables: dict  # kind -> of_tokens(scores(...)) under the policy


def reinforce_case(tokens, reward):
    logits = tiny_models.policy()(tokens).logits.detach()
    tables = {kind.value: of_tokens(scores(logits, kind.value), tokens) for kind in KINDS}
    return Rows(tokens, torch.tensor(reward), tables)


def predict_reinforce(case, kind, *choices):
    loss = rewarded(case.reward, case.tables[kind], case.tokens, *choices).item()
    return None if math.isnan(loss) else [loss]


REINFORCE = [KINDS, SPANS, ENDS, TOKENS, ROWS, SIGNS]


def judge_reinforce(function, given):
    whole = tiny_models.rows()
    cases = [reinforce_case(whole, REWARDS), reinforce_case(tiny_models.ended(whole, STOPPED), REWARDS)]
    got, watched = [], Watch()
    for case in cases:
        policy = given["model"] = tiny_models.policy()  # some use the global
        watched.models.append(policy)
        answer = watched.call(function, given, case.reward.clone(), case.tokens.clone(), policy)
        loss, notes = scalar(answer, "loss")
        got.append([loss.item()])
        if case is cases[0]:
            (found,) = gradient(loss, policy.table)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or getattr(answer[1], "dim", lambda: 1)() > 0:
        notes = (*notes, f"returns {shapes(answer)}; the course's train wants log_probs, loss")
    result, meant = verdict(REINFORCE, predict_reinforce, cases, got, watched, notes)
    policy = tiny_models.policy()
    kind, *choices = (choice.value for choice in meant)
    table = of_tokens(scores(policy(whole).logits, kind), whole)
    (expected,) = gradient(rewarded(cases[0].reward, table, whole, *choices), policy.table)
    result = graded(result, found, expected, NO_GRADIENT, "no gradient reaches the policy: it will not learn")
    graph = getattr(answer[0], "requires_grad", True) if isinstance(answer, (tuple, list)) else True
    if result.status == "right" and not graph and "compute_kl_divergence" in given:
        note = "the log-probs that it returns have no graph: no gradient of a KL made of them reaches the policy"
        return result._replace(status="wrong", mistake="KL without a gradient", notes=(*result.notes, note))
    with contextlib.suppress(Exception):  # a function that wants a reward without a graph is right to
        reward = torch.tensor(REWARDS, requires_grad=True)
        loss, _ = scalar(call(function, given, 1 * reward, whole.clone(), tiny_models.policy()), "loss")
        if gradient(loss, reward) != [None]:
            result = result._replace(notes=(*result.notes, NOT_DETACHED))
    return result


def own_log_probs(given, tokens, policy, ours):
    """What a solution's compute_reinforce_loss hands to its compute_kl_divergence, if that is of any use, else ours.

    It is if it holds the right log-probs: of all words, or of the chosen ones, at some columns in a row.
    """
    chosen = token_logps(ours[:, :-1], tokens[:, 1:])
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.alarm(5)  # seconds: it may hang
    try:
        theirs = call(given["compute_reinforce_loss"], given, torch.tensor(REWARDS), tokens, policy)[0]
        for whole in (ours, chosen):
            for first in range(LENGTH):
                part = whole[:, first : first + theirs.shape[1]]
                if part.shape == theirs.shape and torch.allclose(part, theirs, atol=1e-3) and theirs.requires_grad:
                    return theirs
    except Exception:
        pass  # it is judged elsewhere
    finally:
        signal.alarm(0)
    return ours


# ---- compute_kl_divergence ---------------------------------------------------------------------------------


def at_next_token(values, tokens):
    """(B, T, V), (B, T) -> (B, T): of the token that follows; nan in the last column, where none does."""
    values = values[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return F.pad(values, (0, 1), value=math.nan)


def at_own_token(values, tokens):
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


SAMPLED = "KL sampled and back-propagated"
APART = "policy and original at different positions"
FORMS = [  # of (B, T, V) log-probs p of the policy and q of the original, the tokens, and the original's logits
    right(lambda p, q, *_: (p.exp() * (p - q)).sum(dim=-1)),
    wrong("KL reversed", lambda p, q, *_: (q.exp() * (q - p)).sum(dim=-1)),
    wrong(SAMPLED, lambda p, q, tokens, _: at_next_token(p - q, tokens)),
    wrong(SAMPLED, lambda p, q, tokens, _: at_own_token(p - q, tokens)),
    wrong(SAMPLED + ", squared", lambda p, q, tokens, _: at_next_token((p - q) ** 2 / 2, tokens)),
    wrong(SAMPLED + ", k3", lambda p, q, tokens, _: at_next_token((q - p).exp() - 1 - (q - p), tokens)),
    wrong("only the sampled word in the KL", lambda p, q, tokens, _: at_next_token(p.exp() * (p - q), tokens)),
    wrong(APART, lambda p, q, *_: (p.exp() * (p - q.roll(-1, dims=1))).sum(dim=-1)),
    wrong(APART, lambda p, q, *_: (p.exp() * (p - q.roll(1, dims=1))).sum(dim=-1)),
    wrong("softmax forgotten", lambda p, q, tokens, logits: (p.exp() * (p - logits)).sum(dim=-1)),
    wrong("the weights p forgotten", lambda p, q, *_: (p - q).sum(dim=-1)),
    wrong("the weights p forgotten", lambda p, q, *_: ((p - q) ** 2).sum(dim=-1)),
    wrong("log-probs as weights", lambda p, q, *_: (p * (p - q)).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: (q.exp() * (q - p.exp())).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: (p.exp() * (p - q.exp())).sum(dim=-1)),
    wrong("log of a log-probability", lambda p, q, *_: q.log().sum(dim=-1)),
    wrong("compared with itself", lambda p, q, *_: 0 * q.sum(dim=-1)),
]
LATE = "KL at columns 10 to {}, the forecasts of tokens 11 to {}; that of the first token written is at 9 (left open)"
WHERE = [
    right((9, 29)),
    right((0, 30), "KL at all 30 positions, the prompt's and the one after the last token included (left open)"),
    right((0, 29), "KL at 29 positions, the prompt's included (left open)"),
    right((9, 30), "KL at the completion's positions and at the one after its last token (left open)"),
    right((10, 30), LATE.format(29, 30)),
    wrong("off by one at the prompt", (10, 29)),
    wrong("off by one at the prompt", (8, 29)),
    wrong("prompt positions in the KL", (0, 9)),  # only these
    wrong("prompt positions in the KL", (0, 10)),
]
KL_ENDS = [
    right("all"),
    right("first", "positions after the first eos are left out (left open)"),
    wrong("first eos dropped", "none"),
]


def averaged(kl, mask):
    return kl.sum() / mask.sum()


HOW = [
    right(lambda kl, mask: kl.sum(dim=-1).mean()),
    right(averaged, "averaged over the positions: an alpha must be that many times as large as for a sum (left open)"),
    right(lambda kl, mask: (kl.sum(dim=-1) / mask.sum(dim=-1)).mean(),
          "averaged over the positions, row by row: an alpha must be that many times as large as for a sum (open)"),
    right(lambda kl, mask: kl.mean(), "averaged over the positions, those left out counted as 0 (left open)"),
    right(lambda kl, mask: kl.sum(), "summed over rows and positions: an alpha depends on the batch size (left open)"),
    wrong("batchmean over the wrong axis", lambda kl, mask: kl.sum(dim=0).mean()),
    wrong("the ragged last batch", lambda kl, mask: kl.sum() / 32),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.mean() / tiny_models.VOCABULARY),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.sum(dim=-1).mean() / tiny_models.VOCABULARY),
]
KL_SIGNS = [right(1), wrong("KL negated", -1)]
KL = [FORMS, WHERE, KL_ENDS, HOW, KL_SIGNS]


def divergence(form, tokens, where, ends, how, sign):
    """The KL of one combination of choices. form: (B, T) -> ()"""
    columns = slice(*where)
    is_eos = tokens == EOS
    mask = {"all": torch.ones_like(is_eos), "first": is_eos.cumsum(dim=-1) == 0,  # as long as no eos has been read
            "none": ~F.pad(is_eos[:, 1:], (0, 1), value=True)}[ends][:, columns]  # where no eos is to be forecast
    return sign * how(form[:, columns].masked_fill(~mask, 0.0), mask)


def judge_kl(function, given):
    whole = tiny_models.rows()
    cases, got, watched, use_own = [], [], Watch(), True
    for tokens in (whole, tiny_models.ended(whole, STOPPED)):
        policy, original = tiny_models.policy(), tiny_models.original()
        given |= {"model": policy, "orig_model": original}  # some use the globals
        watched.models.append(original)
        ours = policy(tokens).logits.log_softmax(dim=-1)
        theirs = own_log_probs(given, tokens.clone(), policy, ours) if use_own else ours
        use_own = theirs is not ours
        kl, notes = scalar(watched.call(function, given, theirs, tokens.clone(), original), "KL")
        got.append([kl.item()])
        with torch.no_grad():
            logits = [model(tokens).logits for model in (tiny_models.policy(), tiny_models.original())]
            parts = (*(each.log_softmax(dim=-1) for each in logits), tokens, logits[1])
            cases.append((tokens, functools.cache(lambda form, parts=parts: form(*parts))))
        if tokens is whole:
            found, into_original = gradient(kl, policy.table, original.table)

    def predict(case, form, *choices):
        tokens, computed = case
        return [divergence(computed(form), tokens, *choices).item()]

    if into_original is not None and into_original.norm() > 0:
        notes = (*notes, "a gradient for the original is computed, for nothing: torch.no_grad() saves memory")
    result, meant = verdict(KL, predict, cases, got, watched, notes)
    policy = tiny_models.policy()
    form, *choices = (choice.value for choice in meant)
    p, q = policy(whole).logits.log_softmax(dim=-1), tiny_models.original()(whole).logits.log_softmax(dim=-1).detach()
    (expected,) = gradient(divergence(form(p, q, whole, None), whole, *choices), policy.table)
    words = "no gradient of it reaches the policy: the penalty does nothing"
    return graded(result, found, expected, "KL without a gradient", words, watched)


# ---- compute_DPO_loss --------------------------------------------------------------------------------------

# Log-probs of four pairs: policy chosen, policy rejected, reference chosen, reference rejected. The log-ratios are
# 2, -1.5, -2, 1 of the chosen and -3, -2, 1, 0 of the rejected: differences 5, 0.5, -3, 1.
LOGPS = [[-38.0, -41.5, -52.0, -60.0], [-33.0, -45.0, -47.0, -66.0],
         [-40.0, -40.0, -50.0, -61.0], [-30.0, -43.0, -48.0, -66.0]]
LOST = [[-800.0], [0.0], [0.0], [0.0]]  # log(sigmoid(-800)) is not finite, logsigmoid(-800) is -800
DPO_CASES = [(LOGPS, 0.1), (LOGPS, 0.5), (LOST, 1.0)]
RATIOS = [
    right(lambda pc, pr, rc, rr: (pc - rc, pr - rr)),
    wrong("chosen and rejected swapped", lambda pc, pr, rc, rr: (pr - rr, pc - rc)),
    wrong("reference forgotten", lambda pc, pr, rc, rr: (pc, pr)),
    wrong("policy forgotten", lambda pc, pr, rc, rr: (rc, rr)),
    wrong("reference added", lambda pc, pr, rc, rr: (pc + rc, pr + rr)),
    wrong("rejected forgotten", lambda pc, pr, rc, rr: (pc - rc, 0 * pr)),
    wrong("log-probs divided, not subtracted", lambda pc, pr, rc, rr: (pc / rc, pr / rr)),
    wrong("log-probs divided, not subtracted", lambda pc, pr, rc, rr: ((pc / rc).log(), (pr / rr).log())),
]
BETAS = [
    right(lambda c, r, beta: (beta * (c - r), 1)),
    wrong("beta forgotten", lambda c, r, beta: (c - r, 1)),
    wrong("beta forgotten", lambda c, r, beta: (0.1 * (c - r), 1)),
    wrong("beta forgotten", lambda c, r, beta: (0.5 * (c - r), 1)),
    wrong("beta outside the sigmoid", lambda c, r, beta: (c - r, beta)),
    wrong("beta on one side only", lambda c, r, beta: (beta * c - r, 1)),
    wrong("divided by beta", lambda c, r, beta: ((c - r) / beta, 1)),
]
OUTER = [
    right(lambda margin: -F.logsigmoid(margin)),
    wrong("log(sigmoid)", lambda margin: -margin.sigmoid().log()),
    wrong("sign", F.logsigmoid),
    wrong("log forgotten", lambda margin: -margin.sigmoid()),
    wrong("sigmoid forgotten", lambda margin: -margin),
    wrong("mean before the sigmoid", lambda margin: -F.logsigmoid(margin.mean())),
]
PAIRS = [
    right(torch.mean),
    wrong("sum for mean over the batch", torch.sum),
    wrong("the ragged last batch", lambda losses: losses.sum() / 16),
]
DPO = [RATIOS, BETAS, OUTER, PAIRS]


def preference(logps, beta, ratios, weigh, outer, reduce):
    """The DPO loss of one combination of choices; logps: four (B,) -> ()"""
    margin, factor = weigh(*ratios(*logps), beta)
    return factor * reduce(outer(margin))


def predict_dpo(case, *choices):
    logps, beta = case
    return [preference([torch.tensor(side) for side in logps], beta, *choices).item()]


def judge_dpo(function, given):
    got, watched, notes = [], Watch(), ()
    for logps, beta in DPO_CASES:
        sides = [torch.tensor(side, requires_grad=i < 2) for i, side in enumerate(logps)]
        answer = watched.call(function, given, *(1 * side for side in sides), beta)
        first = answer[0] if isinstance(answer, (tuple, list)) else answer  # others return rewards, too
        loss, more = scalar(first, "loss")
        got.append([loss.item()])
        if beta == 0.1 and len(got) == 1:
            found, notes = gradient(loss, *sides[:2]), more
            notes += ("returns a tuple; its first part is taken for the loss",) * (first is not answer)
    result, meant = verdict(DPO, predict_dpo, DPO_CASES, got, watched, notes)
    if result.status == "wrong" and not result.mistake:
        if close(got[0], got[1]):  # the same pairs at two betas
            result = result._replace(mistake="beta forgotten")
        elif all(map(close, got[:2], [predict_dpo(case, *(axis[0].value for axis in DPO)) for case in DPO_CASES[:2]])):
            result = result._replace(mistake="log(sigmoid)")  # with something added to it, perhaps
    sides = [torch.tensor(side, requires_grad=i < 2) for i, side in enumerate(LOGPS)]
    expected = gradient(preference(sides, 0.1, *(choice.value for choice in meant)), *sides[:2])
    found = torch.cat([torch.zeros(4) if side is None else side for side in found])
    return graded(result, found, torch.cat(expected), NO_GRADIENT, "no gradient reaches the policy")


JUDGES = {
    "compute_reinforce_loss": judge_reinforce,
    "compute_kl_divergence": judge_kl,
    "compute_DPO_loss": judge_dpo,
}
