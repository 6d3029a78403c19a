"""How the tokens of a sample were drawn: what the sampler drew from beside what the model forecast.

generate(), torch.distributions and most loops written by hand end in torch.multinomial, so what that is given is
compared with the softmax of the forward before it. Other ways to draw (Gumbel noise, a search in the cumulative sum)
are not judged.
"""

import torch
from torch.overrides import TorchFunctionMode

from common import completion_mask
from course import tiny_models
from course.tiny_models import EOS, LENGTH, PROMPT, VOCABULARY

EXPECTED = "tokens drawn from softmax(logits)"
TOP_K, OTHERWISE = "top-k left on", "temperature or top-p left on"
UNSEEN = "it draws without torch.multinomial: whether from softmax(logits), is not judged"
ROUNDED = 0.02  # nats: bf16 rounds a probability by 0.004


class Draws(TorchFunctionMode):
    """While it is on, records each draw of one token for some rows. W is the number of words that the model knows.

    own, used: lists of (rows, W), probabilities in the model's forecast, and in what the sampler drew from. left: list
    of (rows,), how many of all V ids the sampler left any probability. dropped: the model was asked in training mode.
    several: more than one token was drawn for a row at a time, as beams do.
    """

    def __init__(self, model):
        super().__init__()
        self.own, self.used, self.left, self.dropped, self.several = [], [], [], False, False
        self.words, self.logits = tiny_models.ids(), torch.empty(0, 0)
        model.register_forward_hook(self.forecast)

    def forecast(self, model, _, output):
        self.logits, self.dropped = output.logits[:, -1, self.words].detach().float(), self.dropped or model.training

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.multinomial, torch.Tensor.multinomial):
            return self.draw(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def draw(self, input, num_samples, *replacement, **options):
        self.several |= num_samples > 1
        if num_samples != 1 or not (input >= 0).all():
            return torch.multinomial(input, num_samples, *replacement, **options)
        rows = input.detach().reshape(-1, input.shape[-1])
        self.record(rows)
        # Words that have no chance need no random numbers: a tenth of the time.
        likely = (rows > 1e-9 * rows.sum(dim=-1, keepdim=True)).any(dim=0).nonzero().squeeze(-1)
        return likely[torch.multinomial(input[..., likely], 1, *replacement, **options)]

    def record(self, rows):
        """(rows, columns): what a token of each row is drawn from. The columns are the ids, or sorted, or some."""
        total, count = rows.sum(dim=-1, keepdim=True), rows.shape[-1]
        own, self.logits = self.logits[: len(rows)].softmax(dim=-1), self.logits[len(rows) :]  # perhaps row by row
        used = rows[:, self.words] / total if count == VOCABULARY else rows[:, :0]
        if used.sum(dim=-1).min() < 0.9:  # not by id: both from the likeliest on
            used, own = rows.topk(min(count, len(self.words))).values / total, own.sort(descending=True).values
            used = torch.nn.functional.pad(used, (0, len(self.words) - used.shape[1]))
        if own.shape == used.shape:
            self.own, self.used = [*self.own, own], [*self.used, used.float()]
            self.left.append((rows > 0).sum(dim=-1))


def live(draws, tokens):
    """-> (n,) bool: the draws that count, those up to a row's first eos; all, if they are not columns of the batch."""
    count = len(draws.own)
    if any(len(own) != len(tokens) for own in draws.own) or count > LENGTH - PROMPT:
        return torch.ones(sum(map(len, draws.own)), dtype=torch.bool)
    return completion_mask(tokens[:, PROMPT : PROMPT + count], EOS).T.flatten()


def changes(draws, tokens):
    """Draws of one call, its tokens -> list of (name, what was seen) of how it drew otherwise; whether eos was
    forbidden, which is no mistake where nothing else is wrong.
    """
    counts = live(draws, tokens)
    own, used, left = (torch.cat(part)[counts] for part in (draws.own, draws.used, draws.left))
    kept, eos = used > 0, draws.words == EOS
    no_eos = eos & ~kept & (kept & (own < own[:, eos])).any(dim=-1, keepdim=True)  # though something rarer is kept
    exact = (own > 1e-6) & ~no_eos  # what rounding to half precision leaves as it is
    lost, known = exact & ~kept, exact & (used > 1e-30)

    def centered(probabilities):
        logs = probabilities.log().masked_fill(~known, torch.nan)
        return (logs - logs.nanmean(dim=-1, keepdim=True)).nan_to_num()

    # Up to a constant of each row, log(used) = log(own) / temperature, if nothing else was done to the words kept.
    x, y = centered(own), centered(used)
    slope = ((x * y).sum() / (x * x).sum()).nan_to_num(1.0).item()
    bent, tempered = (y - slope * x).abs().max() > ROUNDED, abs(slope - 1) > 0.003
    few, most = int(left.min()), int(left.max())
    found = []
    # Ids without a word are nearly alike: a thousandth of a per cent tells them apart, so there are ties.
    if few != len(draws.words) and few < VOCABULARY / 2 and most - few <= few / 100:
        found.append((TOP_K, f"only the {few:,} likeliest words, of {VOCABULARY:,}"))
    if tempered and not bent:
        found.append((OTHERWISE, f"the temperature is {1 / slope:.3g}"))
    elif lost.any() and not found:
        mass = (own * kept).sum(dim=-1).min()
        found.append((OTHERWISE, f"some words are never drawn: {few:,} to {most:,} of {VOCABULARY:,} are left, at "
                                 f"least {mass:.2%} of the probability (top_p, min_p, bad_words_ids ...)"))
    elif bent:
        ratios = (used / own)[known]
        found.append((OTHERWISE, f"words are drawn {ratios.min():.3g} to {ratios.max():.3g} times as often as the "
                                 "model forecasts (repetition_penalty, sequence_bias ...)"))
    return found, bool(no_eos.any())


def is_greedy(model, tokens):
    """(B, 30) -> bool: each token, up to a row's first eos, is the likeliest."""
    with torch.no_grad():
        likeliest = model(tokens).logits[:, PROMPT - 1 : -1].argmax(dim=-1)
    completions = tokens[:, PROMPT:].contiguous()
    return bool((likeliest == completions)[completion_mask(completions, EOS)].all())


def sampling(model, first, second, draws):
    """Tokens of two calls, Draws of the first -> name of what is wrong with how they were drawn, or None; what was
    seen; notes.
    """
    if draws.dropped:
        return "dropout on", "a model in training mode", []
    if draws.own:
        found, no_eos = changes(draws, first)
        notes = ["a minimum length forbids eos, which the model may want to say"] * no_eos
        return " + ".join(name for name, _ in found) or None, "; ".join(seen for _, seen in found), notes
    if draws.several:
        return OTHERWISE, "several tokens drawn for a row at a time, of which one is taken (num_beams ...)", []
    if not torch.equal(first, second):
        return None, None, [UNSEEN]
    if is_greedy(model, first):
        return "greedy", "the most likely token, each time", []
    return "not sampled", "the same tokens twice, not the most likely ones", []
