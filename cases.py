"""What the course's functions must answer on cases known on paper, and what each usual mistake would answer instead."""

import contextlib
import functools
import inspect
import math
import signal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import BatchEncoding

import standins
from explain import (NO_GRADIENT, BadAnswer, Verdict, Watch, call, close, graded, gradient, number, right, shapes,
                     unfinished, verdict, wrong)
from standins import EOS, LENGTH, PROMPT, REWARDS

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
ROWS = [
    right(lambda reward, logps: (reward * logps).mean()),
    right(lambda reward, logps: ((reward - reward.mean()) * logps).mean(),
          "the batch's mean reward is taken off: less noise, but not the assignment's loss"),
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
    before = is_eos.cumsum(dim=-1) - is_eos.long()
    first = before == 0
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
    logits = standins.policy()(tokens).logits.detach()
    tables = {kind.value: of_tokens(scores(logits, kind.value), tokens) for kind in KINDS}
    return Rows(tokens, torch.tensor(reward), tables)


def predict_reinforce(case, kind, *choices):
    return [rewarded(case.reward, case.tables[kind], case.tokens, *choices).item()]


REINFORCE = [KINDS, SPANS, ENDS, TOKENS, ROWS, SIGNS]


def judge_reinforce(function, given):
    whole = standins.rows()
    cases = [reinforce_case(whole, REWARDS), reinforce_case(standins.ended(whole, STOPPED), REWARDS)]
    got, watched = [], Watch()
    for case in cases:
        policy = given["model"] = standins.policy()  # some use the global
        watched.models.append(policy)
        answer = watched.call(function, given, case.reward.clone(), case.tokens.clone(), policy)
        loss, notes = number(answer, "loss")
        got.append([loss.item()])
        if case is cases[0]:
            (found,) = gradient(loss, policy.table)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or getattr(answer[1], "dim", lambda: 1)() > 0:
        notes = (*notes, f"returns {shapes(answer)}; the course's train wants log_probs, loss")
    result, meant = verdict(REINFORCE, predict_reinforce, cases, got, watched, notes)
    policy = standins.policy()
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
        loss, _ = number(call(function, given, 1 * reward, whole.clone(), standins.policy()), "loss")
        if gradient(loss, reward) != [None]:
            result = result._replace(notes=(*result.notes, NOT_DETACHED))
    return result


def own_log_probs(given, tokens, policy, ours):
    """What a solution's compute_reinforce_loss hands to its compute_kl_divergence, if that is of any use, else ours.

    It is if it holds the right log-probs: of all words, or of the chosen ones, at some columns in a row.
    """
    chosen = ours[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
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
    wrong(SAMPLED, lambda p, q, tokens, _: at_next_token((p - q) ** 2 / 2, tokens)),
    wrong(SAMPLED, lambda p, q, tokens, _: at_next_token((q - p).exp() - 1 - (q - p), tokens)),
    wrong(SAMPLED, lambda p, q, tokens, _: at_next_token(p.exp() * (p - q), tokens)),
    wrong(APART, lambda p, q, *_: (p.exp() * (p - q.roll(-1, dims=1))).sum(dim=-1)),
    wrong(APART, lambda p, q, *_: (p.exp() * (p - q.roll(1, dims=1))).sum(dim=-1)),
    wrong("softmax forgotten", lambda p, q, tokens, logits: (p.exp() * (p - logits)).sum(dim=-1)),
    wrong("the weights p forgotten", lambda p, q, *_: (p - q).sum(dim=-1)),
    wrong("the weights p forgotten", lambda p, q, *_: ((p - q) ** 2).sum(dim=-1)),
    wrong("log-probs as weights", lambda p, q, *_: (p * (p - q)).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: (q.exp() * (q - p.exp())).sum(dim=-1)),
    wrong("log forgotten", lambda p, q, *_: (p.exp() * (p - q.exp())).sum(dim=-1)),
    wrong("log_target forgotten", lambda p, q, *_: q.log().sum(dim=-1)),
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
    wrong("only prompt positions in the KL", (0, 9)),
    wrong("only prompt positions in the KL", (0, 10)),
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
    right(lambda kl, mask: kl.mean(), "averaged over the positions, those left out counted as 0 (left open)"),
    right(lambda kl, mask: kl.sum(), "summed over rows and positions: an alpha depends on the batch size (left open)"),
    wrong("batchmean over the wrong axis", lambda kl, mask: kl.sum(dim=0).mean()),
    wrong("the ragged last batch", lambda kl, mask: kl.sum() / 32),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.mean() / standins.VOCABULARY),
    wrong("mean over the vocabulary, too", lambda kl, mask: kl.sum(dim=-1).mean() / standins.VOCABULARY),
]
KL_SIGNS = [right(1), wrong("KL negated", -1)]
KL = [FORMS, WHERE, KL_ENDS, HOW, KL_SIGNS]


def divergence(form, tokens, where, ends, how, sign):
    """The KL of one combination of choices. form: (B, T) -> ()"""
    columns = slice(*where)
    mask = F.pad(masks(tokens)[ends][:, 1:], (0, 1), value=ends == "all")[:, columns]  # t forecasts token t + 1
    return sign * how(form[:, columns].masked_fill(~mask, 0.0), mask)


def judge_kl(function, given):
    whole = standins.rows()
    cases, got, watched, use_own = [], [], Watch(), True
    for tokens in (whole, standins.ended(whole, STOPPED)):
        policy, original = standins.policy(), standins.original()
        given |= {"model": policy, "orig_model": original}  # some use the globals
        watched.models.append(original)
        ours = policy(tokens).logits.log_softmax(dim=-1)
        theirs = own_log_probs(given, tokens.clone(), policy, ours) if use_own else ours
        use_own = theirs is not ours
        kl, notes = number(watched.call(function, given, theirs, tokens.clone(), original), "KL")
        got.append([kl.item()])
        with torch.no_grad():
            logits = [model(tokens).logits for model in (standins.policy(), standins.original())]
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
    policy = standins.policy()
    form, *choices = (choice.value for choice in meant)
    p, q = policy(whole).logits.log_softmax(dim=-1), standins.original()(whole).logits.log_softmax(dim=-1).detach()
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
        if isinstance(answer, (tuple, list)):  # losses, chosen rewards, rejected rewards: as others write it
            answer, notes = answer[0], ("returns a tuple; its first part is taken for the loss",)
        loss, more = number(answer, "loss")
        got.append([loss.item()])
        if beta == 0.1:
            found, notes = gradient(loss, *sides[:2]), (*notes, *more)
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


# ---- _get_batch_logps --------------------------------------------------------------------------------------

PADDED = [0, 2, 0, 5]  # columns of padding before each row's prompt
TAILS = [0, 0, 3, 1]  # and after its completion


def labels_case():
    """-> (4, 30): tokens with -100 where nothing is scored, in the prompt and in the padding on either side."""
    labels = standins.rows()
    labels[0, -1] = EOS
    labels[:, :PROMPT] = -100
    for row, tail in enumerate(TAILS):
        labels[row, LENGTH - tail :] = -100
    return labels


ALIGNED = [
    right(span(1, 29)),
    wrong("no shift", span(0, 29, 0)),
    wrong("no shift", span(1, 29, 0)),
    wrong("logits shifted instead of targets", span(0, 28, -1)),
]
HIDDEN = [
    right(lambda labels: labels != -100),
    wrong("mask one column late", lambda labels: (labels != -100).roll(1, dims=1)),
    wrong("mask one column early", lambda labels: (labels != -100).roll(-1, dims=1)),
    wrong("off by one at the prompt", lambda labels: (labels != -100) & (labels != -100).roll(1, dims=1)),
    wrong("first eos dropped", lambda labels: (labels != -100) & (labels != EOS)),
    wrong("padding kept", lambda labels: torch.ones_like(labels, dtype=torch.bool)),
]
FILLS = [right(0), right(EOS)]  # what is looked up for a label of -100: it shows only where padding is kept
AVERAGES = [
    right(lambda values, mask, average: values.sum(dim=-1) / (mask.sum(dim=-1) if average else 1)),
    wrong("mean for sum", lambda values, mask, average: values.sum(dim=-1) / mask.sum(dim=-1)),
    wrong("sum for mean", lambda values, mask, average: values.sum(dim=-1)),
    wrong("mean over padding", lambda values, mask, average: values.sum(dim=-1) / (mask.shape[1] if average else 1)),
    wrong("mean over padding", lambda values, mask, average: values.sum(dim=-1) / mask.shape[1]),
    wrong("sum and mean swapped", lambda values, mask, average: values.sum(-1) / (1 if average else mask.sum(-1))),
    wrong("one number for the batch", lambda values, mask, average: values.sum(-1) / (mask.sum() if average else 1)),
]
WHOLE = [
    right(lambda logps: logps.tolist()),
    wrong("one number for the batch", lambda logps: [logps.mean().item()]),
    wrong("one number for the batch", lambda logps: [logps.sum().item()]),
]
BATCH_LOGPS = [KINDS, ALIGNED, HIDDEN, FILLS, AVERAGES, WHOLE, [right(1), wrong("sign", -1)]]


def judge_batch_logps(function, given):
    policy, labels = standins.policy(), labels_case()
    logits = policy(standins.rows()).logits
    filled = {fill: labels.masked_fill(labels == -100, fill) for fill in (0, EOS)}
    tables = {(kind.value, fill): of_tokens(scores(logits.detach(), kind.value), filled[fill])
              for kind in KINDS for fill in filled}

    def predict(average, kind, columns, hidden, fill, reduce, whole, sign):
        at, of = columns
        mask = hidden(labels)[:, of]
        return whole(sign * reduce(tables[kind, fill][:, at, of].masked_fill(~mask, 0.0), mask, average))

    got, watched, takes = [], Watch(), 3
    with contextlib.suppress(ValueError):  # a compiled function has no signature
        takes = len(inspect.signature(function).parameters)
    averages = [False, True] if takes > 2 else [False]
    for average in averages:
        theirs = labels.clone()
        answer = unfinished(watched.call(function, given, *(logits, theirs, average)[:takes]))
        if not isinstance(answer, torch.Tensor) or answer.dim() > 1:
            raise BadAnswer("a tensor (4,): a number for each row", shapes(answer))
        if not torch.equal(theirs, labels):
            return Verdict("wrong", "labels changed in place", "labels as they were", "labels without their -100")
        got.append(answer.reshape(-1).tolist())
        if not average:
            (found,) = gradient(answer.sum(), logits)
    notes = ("has no parameter average_log_prob",) if takes < 3 else ()
    result, _ = verdict(BATCH_LOGPS, predict, averages, got, watched, notes)
    own = labels[:, 1:] != -100
    logps = logits.log_softmax(dim=-1)[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    (expected,) = gradient((logps * own).sum(), logits)
    return graded(result, found, expected, NO_GRADIENT, "no gradient reaches the logits")


# ---- create_labels_from_attention_mask ---------------------------------------------------------------------

PROMPTS = [
    right("own"),
    wrong("prompt scored", "none"),
    wrong("prompt counted from the row's start", "start"),
    wrong("off by one at the prompt", "short"),
    wrong("off by one at the prompt", "long"),
    wrong("the completion is hidden instead of the prompt", "inverse"),
    wrong("everything is hidden", "all"),
    wrong("one prompt length for all rows", "longest"),
]
PADDINGS = [right(False), wrong("padding kept", True)]
LAST_EOS = [right(False), wrong("first eos dropped", True)]
VALUES = [
    right(lambda ids, hidden, attention: ids.masked_fill(hidden, -100)),
    wrong("labels shifted twice", lambda ids, hidden, attention: F.pad(
        ids.masked_fill(hidden, -100)[:, 1:], (0, 1), value=-100)),
    wrong("labels are not the tokens", lambda ids, hidden, attention: attention.masked_fill(hidden, -100)),
    wrong("0 instead of -100", lambda ids, hidden, attention: ids.masked_fill(hidden, 0)),
]
LABELS = [PROMPTS, PADDINGS, LAST_EOS, VALUES]


def tokenized(side):
    """-> input_ids, attention_mask (4, 30), prompt_lengths (4,): padded on one side; rows 0 and 3 end with an eos."""
    ids, attention = standins.rows(), torch.ones(4, LENGTH, dtype=torch.long)
    ids[[0, 3], -1] = EOS
    for row, pad in enumerate(PADDED):
        kept = ids[row, pad:].clone()
        columns = slice(pad, None) if side == "left" else slice(0, LENGTH - pad)
        ids[row], attention[row] = EOS, 0
        ids[row, columns], attention[row, columns] = kept, 1
    return BatchEncoding({"input_ids": ids, "attention_mask": attention}), torch.tensor([10, 8, 6, 3])


def predict_labels(side, prompt, keep, drop, values=VALUES[0].value):
    encoded, lengths = tokenized(side)
    ids, attention = encoded["input_ids"], encoded["attention_mask"]
    text, columns = attention == 1, torch.arange(LENGTH).expand(4, -1)
    place = attention.cumsum(dim=-1) - 1  # of a token within its text
    start, shorter, longer = columns < lengths[:, None], place < lengths[:, None] - 1, place < lengths[:, None] + 1
    own = text & (place < lengths[:, None])
    prompts = {"own": own, "none": torch.zeros_like(own), "start": start, "short": text & shorter,
               "long": text & longer, "inverse": text & ~own, "all": torch.ones_like(own),
               "longest": columns < lengths.max()}
    hidden = prompts[prompt] | (~text & (not keep)) | (text & (ids == EOS) & drop)
    return values(ids, hidden, attention).flatten().tolist()


def judge_labels(function, given, side="left"):
    def answer(side):
        encoded, lengths = tokenized(side)
        try:
            return unfinished(call(function, given, encoded, lengths)), encoded["input_ids"]
        except (TypeError, AttributeError) as error:  # perhaps it wants the lengths as numbers
            with contextlib.suppress(Exception):
                return unfinished(call(function, given, encoded, lengths.tolist())), encoded["input_ids"]
            raise error

    labels, ids = answer(side)
    if not isinstance(labels, torch.Tensor) or labels.shape != (4, LENGTH):
        raise BadAnswer(f"labels of the shape of input_ids, (4, {LENGTH})", shapes(labels))
    if not torch.equal(ids, tokenized(side)[0]["input_ids"]):
        return Verdict("wrong", "input_ids changed in place", "input_ids as they were", "input_ids with -100 in them")
    result, _ = verdict(LABELS, predict_labels, [side], [labels.flatten().tolist()])
    wanted = torch.tensor(predict_labels(side, "own", False, False)).view(4, LENGTH)
    row = int((wanted != labels).any(dim=1).int().argmax())  # the first that differs
    result = result._replace(expected=wanted[row].tolist(), got=labels[row].tolist())
    other = "right" if side == "left" else "left"
    if result.status == "right" and answer(other)[0].flatten().tolist() != predict_labels(other, "own", False, False):
        result = result._replace(notes=(f"right for padding on the {side}, as the tokenizer pads; not on the {other}",))
    return result


# ---- compute_reward_for_mini_batch -------------------------------------------------------------------------

FUNCTIONS_OF_LOGITS = [
    right(lambda logits: logits.softmax(dim=-1)[:, 1]),
    wrong("P(negative)", lambda logits: logits.softmax(dim=-1)[:, 0]),
    wrong("softmax forgotten", lambda logits: logits[:, 1]),
    wrong("softmax over the wrong axis", lambda logits: logits.softmax(dim=0)[:, 1]),
    wrong("the label instead of its probability", lambda logits: logits.argmax(dim=-1).float()),
    wrong("log-probability as reward", lambda logits: logits.log_softmax(dim=-1)[:, 1]),
    wrong("sigmoid of one logit", lambda logits: logits[:, 1].sigmoid()),
    wrong("probability of the likelier label", lambda logits: logits.softmax(dim=-1).amax(dim=-1)),
]
ATTENTION = [right(True), wrong("padding kept", False)]
TEXTS = [
    right("generated"),
    right("output", "the reward is of the decoded tokens, not of the texts returned"),
    right("raw", "the reward is of the tokens decoded with special ones: the classifier reads <|endoftext|>"),
    wrong("the completion alone is scored", "completion"),
    wrong("the prompt alone is scored", "prompt"),
    wrong("the review itself is scored", "review"),
]
REWARD = [FUNCTIONS_OF_LOGITS, ATTENTION, TEXTS]


def drawn(model, tokens):
    """(B, 30) -> ranks (n,), places (n,): of the tokens drawn, up to the first eos, among all words by probability.

    The place is where in the cumulative distribution a token lies, 0 the most likely: uniform if it was sampled.
    """
    words = torch.tensor(sorted(standins.tokenizer().get_vocab().values()))  # nothing else is ever drawn
    with torch.no_grad():
        probabilities = model(tokens).logits[:, PROMPT - 1 : -1, words].softmax(dim=-1)  # (B, 20, words)
    completions = tokens[:, PROMPT:].contiguous()
    counts = masks(completions)["first"]
    own = probabilities.gather(-1, torch.searchsorted(words, completions).clamp(max=len(words) - 1).unsqueeze(-1))
    above = probabilities > own
    ranks, below = above.sum(dim=-1)[counts], (probabilities * above).sum(dim=-1)[counts]
    noise = torch.rand(len(ranks), generator=torch.Generator().manual_seed(0))
    return ranks, below + noise * own.squeeze(-1)[counts]


def distance(places):
    """(n,) -> (): Kolmogorov and Smirnov's distance from uniform."""
    ordered = places.sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return torch.maximum((steps - ordered).abs().max(), (steps - 1 / len(ordered) - ordered).abs().max()).item()


def sampling(model, first, second):
    """Tokens of two calls -> name of what is wrong with how they were drawn, or None; expected; got."""
    ranks, places = drawn(model, first)
    if not ranks.any():
        return "greedy", "tokens drawn from softmax(logits)", "the most likely token, each time"
    if ranks.max() < 50 and distance(places) > 0.15 and not torch.equal(first, second):
        got = f"only words among the {int(ranks.max()) + 1} most likely, of {len(standins.words())}"
        return "top-k left on", "tokens drawn from softmax(logits)", got
    if distance(places) > 2 / len(places) ** 0.5:  # by chance once in 1,500 times
        if torch.equal(first, second):
            return "not sampled", "another sample at each call", "the same tokens twice, not the most likely ones"
        got = f"likely words too often, the rarest {1 - places.max():.0%} of the probability never"
        return "temperature or top-p left on", "tokens drawn from softmax(logits)", got
    return None, None, None


def judge_reward(function, given):
    names = ("tokenizer", "model", "reward_tokenizer", "reward_model")
    parts = [given[name] for name in names]
    reviews, (tokenizer, model, reader, scorer) = standins.reviews(), parts
    answers, batch = [], list(reviews)
    for seed in (0, 1):
        torch.manual_seed(seed)
        try:
            answers.append(unfinished(call(function, given, batch, *parts)))
        except (TypeError, KeyError):  # perhaps it takes rows of the data set, not texts
            batch = {"text": list(reviews), "label": [0] * len(reviews)}
            answers.append(unfinished(call(function, given, batch, *parts)))
    if not isinstance(answers[0], (tuple, list)) or len(answers[0]) != 3:
        raise BadAnswer("reward, output_tokens, generated", shapes(answers[0]))
    if model.training or scorer.training:
        return Verdict("wrong", "dropout on", "models in eval mode", "a model put into training mode")
    reward, tokens, generated = answers[0]
    prompts = torch.tensor([tokenizer(text)["input_ids"][:PROMPT] for text in reviews])
    size, wanted = tuple(getattr(tokens, "shape", ())), (len(reviews), LENGTH)
    if size != wanted:
        notes = ("max_length counts the prompt, max_new_tokens does not",) if size[1:] in ((20,), (40,)) else ()
        return Verdict("wrong", "length", f"output_tokens {wanted}: 10 + 20", f"{size}", notes)
    if not torch.equal(tokens[:, :PROMPT], prompts):
        return Verdict("wrong", "prompt", "rows that begin with the first 10 tokens of their review",
                       f"{int((tokens[:, :PROMPT] == prompts).all(dim=1).sum())} of {len(reviews)} rows do")
    notes = []
    if isinstance(reward, torch.Tensor) and reward.requires_grad:
        notes.append("the reward still has a graph: detach it, or work under torch.no_grad()")
    values = torch.as_tensor(reward, dtype=torch.float32).detach()
    if values.shape == (len(reviews), 1):
        values = values.flatten()
        notes.append("the reward is (B, 1): beside log-probs of (B,) it would broadcast to (B, B)")
    if values.numel() == 1:
        return Verdict("wrong", "one number for the batch", f"a reward for each of {len(reviews)} rows", values.item())
    if values.dim() != 1 or not isinstance(generated, (list, tuple)) or len(generated) != len(reviews):
        raise BadAnswer("a tensor (B,), a tensor (B, 30), a list of B texts", shapes(answers[0]))
    texts = {"generated": list(generated), "review": list(reviews)}
    for name, part, skip in (("output", tokens, True), ("raw", tokens, False), ("completion", tokens[:, PROMPT:], True),
                             ("prompt", tokens[:, :PROMPT], True)):
        texts[name] = tokenizer.batch_decode(part, skip_special_tokens=skip)
    if [str(text).split() for text in generated] == [text.split() for text in texts["completion"]]:
        texts["generated"] = texts["output"]  # the text that the reward is to be of

    def predict(_, form, attend, which):
        encoded = reader([str(text) for text in texts[which]], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = scorer(**encoded if attend else {"input_ids": encoded["input_ids"]}).logits
        return form(logits).tolist()

    result, _ = verdict(REWARD, predict, [None], [values.tolist()], None, notes)
    row = next((i for i, (e, g) in enumerate(zip(result.expected, result.got, strict=True)) if not close([e], [g])), 0)
    result = result._replace(expected=result.expected[row], got=result.got[row])
    mistake, expected, got = sampling(model, tokens, answers[1][1])
    if mistake:
        both = mistake if result.status == "right" else f"{mistake} + {result.mistake or 'another reward'}"
        return result._replace(status="wrong", mistake=both, expected=expected, got=got)
    if isinstance(batch, dict):
        return result._replace(notes=(*result.notes, "it takes rows of the data set; the course's a list of texts"))
    if torch.equal(tokens, answers[1][1]):
        result = result._replace(notes=(*result.notes, "two calls write the same: a seed is set inside"))
    try:
        call(function, given, [reviews[0], " ".join(reviews[1].split()[: standins.SHORT])], *parts)
    except Exception as error:
        note = f"a review of fewer than 10 tokens (2 of IMDB's test reviews) ends in {type(error).__name__}: pad"
        result = result._replace(notes=(*result.notes, note))
    return result


JUDGES = {
    "compute_reward_for_mini_batch": judge_reward,
    "compute_reinforce_loss": judge_reinforce,
    "compute_kl_divergence": judge_kl,
    "compute_DPO_loss": judge_dpo,
    "_get_batch_logps": judge_batch_logps,
    "create_labels_from_attention_mask": judge_labels,
}
