"""Cases of what goes into the losses: log-probs, labels, samples and their reward. judge_losses.py has the losses'."""

import contextlib
import inspect

import torch
import torch.nn.functional as F
from transformers import BatchEncoding

from common import log_probs, token_logps
from course import tiny_models
from course.explain import (NO_GRADIENT, BadAnswer, Verdict, Watch, call, close, graded, gradient, right, shapes,
                            answered, verdict, wrong)
from course.judge_losses import KINDS, masks, of_tokens, scores, span
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
    policy, labels = tiny_models.policy(), labels_case()
    logits = policy(tiny_models.rows()).logits
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
        answer = answered(watched.call(function, given, *(logits, theirs, average)[:takes]))
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
    logps = token_logps(log_probs(logits[:, :-1]), labels[:, 1:].clamp(min=0))
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
    ids, attention = tiny_models.rows(), torch.ones(4, LENGTH, dtype=torch.long)
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
            return answered(call(function, given, encoded, lengths)), encoded["input_ids"]
        except (TypeError, AttributeError) as error:  # perhaps it wants the lengths as numbers
            with contextlib.suppress(Exception):
                return answered(call(function, given, encoded, lengths.tolist())), encoded["input_ids"]
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
    words = torch.tensor(sorted(tiny_models.tokenizer().get_vocab().values()))  # nothing else is ever drawn
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


OTHERWISE = "temperature or top-p left on"
NEUTRAL = {"temperature": (None, 1), "top_p": (None, 1), "typical_p": (None, 1), "min_p": (None, 0),
           "repetition_penalty": (None, 1), "no_repeat_ngram_size": (None, 0)}


def recorded(model):
    """-> a dict that will hold what the model's generate() is called with, by keyword or in a GenerationConfig."""
    settings, generate = {}, model.generate

    def watched(*arguments, **keywords):
        config = keywords.get("generation_config")
        settings.update(config.to_diff_dict() if config else {}, **keywords)
        return generate(*arguments, **keywords)

    model.generate = watched
    return settings


def sampling(model, first, second):
    """Tokens of two calls -> name of what is wrong with how they were drawn, or None; expected; got."""
    both = first if torch.equal(first, second) else torch.cat([first, second])
    ranks, places = drawn(model, both)
    if not ranks.any():
        return "greedy", "tokens drawn from softmax(logits)", "the most likely token, each time"
    if ranks.max() <= 50 and distance(places) > 0.15 and not torch.equal(first, second):
        got = f"only words among the {int(ranks.max()) + 1} most likely, of {len(tiny_models.words())}"
        return "top-k left on", "tokens drawn from softmax(logits)", got
    if distance(places) > 2 / len(places) ** 0.5:  # by chance once in 1,500 times
        if torch.equal(first, second):
            return "not sampled", "another sample at each call", "the same tokens twice, not the most likely ones"
        got = f"likely words too often, the rarest {1 - places.max():.0%} of the probability never"
        return OTHERWISE, "tokens drawn from softmax(logits)", got
    return None, None, None


def judge_reward(function, given):
    names = ("tokenizer", "model", "reward_tokenizer", "reward_model")
    parts = [given[name] for name in names]
    reviews, (tokenizer, model, reader, scorer) = tiny_models.reviews(), parts
    answers, batch, settings = [], list(reviews), recorded(model)
    for seed in (0, 1):
        torch.manual_seed(seed)
        try:
            answers.append(answered(call(function, given, batch, *parts)))
        except (TypeError, KeyError) as error:  # perhaps it takes rows of the data set, not texts
            for batch in ({"text": list(reviews), "label": [0] * len(reviews)}, [{"text": text} for text in reviews]):
                with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError):
                    answers.append(answered(call(function, given, batch, *parts)))
                    break
            else:
                raise error
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
    bent = {name: value for name, value in settings.items() if value not in NEUTRAL.get(name, (value,))}
    if bent and not mistake:  # too little to be seen in the samples
        mistake, expected, got = OTHERWISE, "tokens drawn from softmax(logits)", f"generate() with {bent}"
    if settings.get("min_new_tokens") or settings.get("min_length"):
        result = result._replace(notes=(*result.notes, "a minimum length forbids eos, which the model may want to say"))
    if mistake:
        both = mistake if result.status == "right" else f"{mistake} + {result.mistake or 'another reward'}"
        return result._replace(status="wrong", mistake=both, expected=expected, got=got)
    if batch != reviews:
        return result._replace(notes=(*result.notes, "it takes rows of the data set; the course's a list of texts"))
    if torch.equal(tokens, answers[1][1]):
        result = result._replace(notes=(*result.notes, "two calls write the same: a seed is set inside"))
    try:
        call(function, given, [reviews[0], " ".join(reviews[1].split()[: tiny_models.SHORT])], *parts)
    except Exception as error:
        note = f"a review of fewer than 10 tokens (2 of IMDB's test reviews) ends in {type(error).__name__}: pad"
        result = result._replace(notes=(*result.notes, note))
    return result


JUDGES = {
    "compute_reward_for_mini_batch": judge_reward,
    "_get_batch_logps": judge_batch_logps,
    "create_labels_from_attention_mask": judge_labels,
}
