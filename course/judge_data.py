"""Cases of what goes into the losses: log-probs, labels, samples and their reward."""

import functools
import inspect

import torch
import torch.nn.functional as F

from common import log_probs, token_logps
from course import tiny_models
from course.draws import EXPECTED, Draws, sampling
from course.explain import (NO_GRADIENT, BadAnswer, Verdict, Watch, call, close, graded, gradient, right, shapes,
                            answered, verdict, wrong)
from course.judge_reinforce import KINDS, of_tokens, span
from course.tiny_models import EOS, LENGTH, PROMPT

# ---- _get_batch_logps --------------------------------------------------------------------------------------

PADDED = [0, 2, 0, 5]  # columns of padding before each row's prompt
TAILS = [0, 0, 3, 1]  # and after its completion


def labels_case():
    """-> (4, 30): tokens with -100 where nothing is scored, in the prompt and in the padding on either side."""
    labels = tiny_models.rows()
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
FILLS = 0, EOS  # what is looked up for -100; all that are no words (1, 100, the 100th from the end) are like 0
BOTH, LEFT, RIGHT = "padding kept", "padding kept before the completion", "padding kept after the completion"
HIDDEN = [  # which labels count, and what is looked up for -100
    right((lambda labels: labels != -100, 0)),
    wrong("mask one column late", (lambda labels: (labels != -100).roll(1, dims=1), 0)),
    wrong("mask one column early", (lambda labels: (labels != -100).roll(-1, dims=1), 0)),
    wrong("off by one at the prompt", (lambda labels: (labels != -100) & (labels != -100).roll(1, dims=1), 0)),
    wrong("first eos dropped", (lambda labels: (labels != -100) & (labels != EOS), 0)),
    *(wrong(BOTH, (lambda labels: torch.ones_like(labels, dtype=torch.bool), fill)) for fill in FILLS),
    *(wrong(LEFT, (lambda labels: (labels != -100).flip(-1).cumsum(dim=-1).flip(-1) > 0, fill)) for fill in FILLS),
    *(wrong(RIGHT, (lambda labels: (labels != -100).cumsum(dim=-1) > 0, fill)) for fill in FILLS),
]
AT_ONCE = "one number for the batch"
TOKENS_AT_ONCE = AT_ONCE + ", a mean over all its tokens"
AVERAGES = [  # what a row's sum is divided by for average_log_prob=False and for True; what is done with the rows then
    right((1, "counted", "each")),
    right((1, "own", "each")),  # but with padding in the sums
    wrong("mean for sum", ("counted", "counted", "each")),
    wrong("sum for mean", (1, 1, "each")),
    wrong("mean over padding", (1, "columns", "each")),
    wrong("mean over padding", ("columns", "columns", "each")),
    wrong("sum and mean swapped", ("counted", 1, "each")),
    wrong(AT_ONCE, (1, "counted", "mean")),
    wrong(AT_ONCE, (1, 1, "mean")),
    wrong(TOKENS_AT_ONCE, ("all counted", "all counted", "sum")),
    wrong(TOKENS_AT_ONCE, ("columns", "columns", "mean")),
    wrong(AT_ONCE + ", the sum over all its tokens", (1, 1, "sum")),
]
EACH_ROW = "a tensor (4,): a number for each row"
BATCH_LOGPS = [KINDS, ALIGNED, HIDDEN, AVERAGES, [right(1), wrong("sign", -1)]]


def judge_batch_logps(function, given):
    policy, labels = tiny_models.policy(), labels_case()
    logits = policy(tiny_models.rows()).logits

    @functools.cache
    def table(kind, fill):
        return of_tokens(kind(logits.detach()), labels.masked_fill(labels == -100, fill))

    def predict(average, kind, columns, hidden, averages, sign):
        (at, of), (counts, fill) = columns, hidden
        mask, own = counts(labels)[:, of], (labels != -100)[:, of]
        divisors = {1: 1, "counted": mask.sum(dim=-1), "own": own.sum(dim=-1), "columns": len(of),
                    "all counted": mask.sum()}
        *divisor, over_rows = averages
        sums = table(kind, fill)[:, at, of].masked_fill(~mask, 0.0).sum(dim=-1) / divisors[divisor[average]]
        return (sign * {"each": sums, "mean": sums.mean(), "sum": sums.sum()}[over_rows]).reshape(-1).tolist()

    takes = len(inspect.signature(function).parameters)  # some leave out average_log_prob
    got, watched, averages = [], Watch(), [False, True][: max(1, takes - 1)]
    for average in averages:
        theirs = labels.clone()
        answer = answered(watched.call(function, given, *(logits, theirs, average)[:takes]))
        if not isinstance(answer, torch.Tensor) or answer.dim() > 1:
            raise BadAnswer(EACH_ROW, shapes(answer))
        if not torch.equal(theirs, labels):
            return Verdict("wrong", "labels changed in place", "labels as they were", "labels without their -100")
        got.append(answer.reshape(-1).tolist())
        if not average:
            (found,) = gradient(answer.sum(), logits)
    result, _ = verdict(BATCH_LOGPS, predict, averages, got, watched,
                        ["has no parameter average_log_prob"] * (takes < 3))
    if answer.numel() == 1:
        result = result._replace(expected=EACH_ROW, got=f"one number, {got[0][0]:.3f}")
    own = labels[:, 1:] != -100
    logps = token_logps(log_probs(logits[:, :-1]), labels[:, 1:].clamp(min=0))
    (expected,) = gradient((logps * own).sum(), logits)
    return graded(result, found, expected, NO_GRADIENT)


# ---- create_labels_from_attention_mask ---------------------------------------------------------------------

PROMPTS = [  # what is hidden, by a token's place in its text (LENGTH for padding) or column, and the prompts' lengths
    right(lambda place, column, lengths: place < lengths),
    wrong("prompt scored", lambda place, column, lengths: place < 0),
    wrong("prompt counted from the row's start", lambda place, column, lengths: column < lengths),
    wrong("off by one at the prompt", lambda place, column, lengths: place < lengths - 1),
    wrong("off by one at the prompt", lambda place, column, lengths: place < lengths + 1),
    wrong("off by one at the prompt + prompt counted from the row's start",
          lambda place, column, lengths: column < lengths - 1),
    wrong("off by one at the prompt + prompt counted from the row's start",
          lambda place, column, lengths: column < lengths + 1),
    wrong("the completion is hidden instead of the prompt", lambda place, column, lengths: place >= lengths),
    wrong("everything is hidden", lambda place, column, lengths: place >= 0),
    wrong("one prompt length for all rows", lambda place, column, lengths: column < lengths.max()),
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
    from transformers import BatchEncoding  # here, as in tiny_models.py

    ids, attention = tiny_models.rows(), torch.ones(4, LENGTH, dtype=torch.long)
    ids[[0, 3], -1] = EOS
    for row, pad in enumerate(PADDED):
        kept = ids[row, pad:].clone()
        columns = slice(pad, None) if side == "left" else slice(0, LENGTH - pad)
        ids[row], attention[row] = EOS, 0
        ids[row, columns], attention[row, columns] = kept, 1
    return BatchEncoding({"input_ids": ids, "attention_mask": attention}), torch.tensor([10, 8, 6, 3])


def predict_labels(side, prompt, keep, drop, values):
    encoded, lengths = tokenized(side)
    ids, attention = encoded["input_ids"], encoded["attention_mask"]
    padding, column = attention == 0, torch.arange(LENGTH).expand(4, -1)
    place = (attention.cumsum(dim=-1) - 1).masked_fill(padding, LENGTH)
    hidden = prompt(place, column, lengths[:, None]) | (padding & (not keep)) | (~padding & (ids == EOS) & drop)
    return values(ids, hidden, attention).flatten().tolist()


def labels_of(function, given, side):
    """-> its answer, the input_ids after that. It may take the prompts' lengths as a tensor (4,), a list, or (4, 1)."""
    first = None
    for kind in (lambda lengths: lengths, torch.Tensor.tolist, lambda lengths: lengths.unsqueeze(1)):
        encoded, lengths = tokenized(side)
        try:
            return answered(call(function, given, encoded, kind(lengths))), encoded["input_ids"]
        except Exception as error:
            first = first or error
    raise first


def judge_labels(function, given, side="left"):
    labels, ids = labels_of(function, given, side)
    if not isinstance(labels, torch.Tensor) or labels.shape != (4, LENGTH):
        raise BadAnswer(f"labels of the shape of input_ids, (4, {LENGTH})", shapes(labels))
    if not torch.equal(ids, tokenized(side)[0]["input_ids"]):
        return Verdict("wrong", "input_ids changed in place", "input_ids as they were", "input_ids with -100 in them")
    result, _ = verdict(LABELS, predict_labels, [side], [labels.flatten().tolist()])
    meant = [axis[0].value for axis in LABELS]
    wanted = torch.tensor(predict_labels(side, *meant)).view(4, LENGTH)
    row = int((wanted != labels).any(dim=1).int().argmax())  # the first that differs
    result = result._replace(expected=wanted[row].tolist(), got=labels[row].tolist())
    other = "right" if side == "left" else "left"
    if result.status == "right" and labels_of(function, given, other)[0].flatten().tolist() != predict_labels(
            other, *meant):
        return result._replace(notes=(f"right for padding on the {side}, as the tokenizer pads; not on the {other}",))
    return result


# ---- compute_reward_for_mini_batch -------------------------------------------------------------------------

SCALED = "P(positive) shifted or scaled"
FUNCTIONS_OF_LOGITS = [
    right(lambda logits: logits.softmax(dim=-1)[:, 1]),
    wrong("P(negative)", lambda logits: logits.softmax(dim=-1)[:, 0]),
    wrong("softmax forgotten", lambda logits: logits[:, 1]),
    wrong("softmax over the wrong axis", lambda logits: logits.softmax(dim=0)[:, 1]),
    wrong("the label instead of its probability", lambda logits: logits.argmax(dim=-1).float()),
    wrong("log-odds as reward", lambda logits: logits[:, 1] - logits[:, 0]),
    wrong(SCALED, lambda logits: 2 * logits.softmax(dim=-1)[:, 1] - 1),
    wrong(SCALED, lambda logits: logits.softmax(dim=-1)[:, 1] - 0.5),
    wrong(SCALED, lambda logits: (p := logits.softmax(dim=-1)[:, 1]) - p.mean()),
    wrong(SCALED, lambda logits: ((p := logits.softmax(dim=-1)[:, 1]) - p.mean()) / p.std()),
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
REWARDED = [FUNCTIONS_OF_LOGITS, ATTENTION, TEXTS]


def judge_reward(function, given):
    parts = [given[name] for name in ("tokenizer", "model", "reward_tokenizer", "reward_model")]
    reviews, (tokenizer, model, reader, scorer) = tiny_models.reviews(), parts
    answers, draws = [], [Draws(model), Draws(model)]
    for seed, watched in enumerate(draws):
        torch.manual_seed(seed)
        with watched:
            answers.append(answered(call(function, given, list(reviews), *parts)))
    answer = answers[0]
    if not isinstance(answer, (tuple, list)) or len(answer) != 3 or getattr(answer[1], "ndim", 0) != 2:
        raise BadAnswer("reward (B,), output_tokens (B, 30), generated, in this order", shapes(answer))
    if model.training or scorer.training:
        return Verdict("wrong", "dropout on", "models in eval mode", "a model put into training mode")
    reward, tokens, generated = answer
    size, wanted = tuple(tokens.shape), (len(reviews), LENGTH)
    if size != wanted:
        notes = ("max_length counts the prompt, max_new_tokens does not",) * (size[1] in (20, 40))
        return Verdict("wrong", "length", f"output_tokens {wanted}: 10 + 20", f"{size}", notes)
    prompts = torch.tensor([tokenizer(text)["input_ids"][:PROMPT] for text in reviews])
    if not torch.equal(tokens[:, :PROMPT], prompts):
        count = (tokens[:, :PROMPT] == prompts).all(dim=1).sum()
        return Verdict("wrong", "prompt", "rows that begin with the first 10 tokens of their review",
                       f"{count} of {len(reviews)} rows do")
    notes = []
    if isinstance(reward, torch.Tensor) and reward.requires_grad:
        notes.append("the reward still has a graph: detach it, or work under torch.no_grad()")
    values = torch.as_tensor(reward, dtype=torch.float32).detach()
    if values.shape == (len(reviews), 1):
        values = values.flatten()
        notes.append("the reward is (B, 1): beside log-probs of (B,) it would broadcast to (B, B)")
    if values.numel() == 1:
        return Verdict("wrong", AT_ONCE, f"a reward for each of {len(reviews)} rows", values.item())
    if values.shape != (len(reviews),) or not isinstance(generated, (list, tuple)) or len(generated) != len(reviews):
        raise BadAnswer("a tensor (B,), a tensor (B, 30), a list of B texts", shapes(answer))
    texts = {"generated": list(generated), "review": reviews, "raw": tokenizer.batch_decode(tokens)}
    for name, part in {"output": tokens, "completion": tokens[:, PROMPT:], "prompt": tokens[:, :PROMPT]}.items():
        texts[name] = tokenizer.batch_decode(part, skip_special_tokens=True)
    if [str(text).split() for text in generated] == [text.split() for text in texts["completion"]]:
        texts["generated"] = texts["output"]  # the text that the reward is to be of

    @functools.cache
    def logits(attend, which):
        encoded = reader([str(text) for text in texts[which]], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            return scorer(**encoded if attend else {"input_ids": encoded["input_ids"]}).logits

    def predict(_, form, attend, which):
        return form(logits(attend, which)).tolist()

    mistake, seen, more = sampling(model, tokens, answers[1][1], draws[0])
    result, _ = verdict(REWARDED, predict, [None], [values.tolist()], None, [*notes, *more])
    if mistake:
        both = mistake if result.status == "right" else f"{mistake} + {result.mistake or 'another reward'}"
        return result._replace(status="wrong", mistake=both, expected=EXPECTED, got=seen)
    pairs = list(zip(result.expected, result.got, strict=True))
    expected, got = next((pair for pair in pairs if not close(pair[:1], pair[1:])), pairs[0])
    return result._replace(expected=expected, got=got)


JUDGES = {
    "compute_reward_for_mini_batch": judge_reward,
    "_get_batch_logps": judge_batch_logps,
    "create_labels_from_attention_mask": judge_labels,
}
