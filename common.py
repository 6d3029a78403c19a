"""Tokens in, log-probabilities out: what REINFORCE and DPO share.

Left out on purpose: trainers, hidden collators, top-k, temperature, dropout. One alphabet in all files:
B rows, P prompt tokens, N completion tokens, T = P + N, V vocabulary. Prompts are padded on the left,
completions on the right, so that every completion starts at column P. One row, and its mask:

    . p0 p1 | n0 n1 eos .     tokens (B, T), attention 0 at the dots
         ^                    the logits at column P-1 forecast n0
              1  1  1   0     mask (B, N), column j is completion token j
"""

import math
import zlib

import torch
from torch.func import functional_call

from support.ranks import all_reduce

# ---- log-probabilities -------------------------------------------------------------------------------------


def log_probs(logits):
    """(B, N, V) -> (B, N, V), nats. fp32 whatever the logits are: in bf16 100 tokens' sum is 0.1 to 0.5 nats off."""
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def token_logps(logp, tokens):
    """(B, N, V), (B, N) -> (B, N): the log-probability of each token, from its own column.

    ValueError if the shapes disagree: gather would not complain about tokens that are one column short.
    """
    if logp.shape[:-1] != tokens.shape:
        shapes = f"tokens {tuple(tokens.shape)} do not match logp {tuple(logp.shape)}"
        raise ValueError(f"{shapes}: they must be (B, N) and (B, N, V)")
    return logp.gather(dim=-1, index=tokens.unsqueeze(-1)).squeeze(-1)


def token_kl(logp, ref_logp):
    """(B, N, V) twice -> (B, N): exact KL(policy ‖ reference) in nats at each position, of log-probabilities.

        KL = sum_v p(v) * (log p(v) - log q(v)),   p the policy, q the reference, v the whole vocabulary

    The gradient flows through p and log p. It leaves out that an early token changes which contexts come
    later: biased, on purpose (how much: docs/wrong.md, exercise 6). ValueError if the shapes disagree.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"ref_logp {tuple(ref_logp.shape)} does not match logp {tuple(logp.shape)}")
    # A word of probability 0 adds 0, where 0 * (-inf) would add nan.
    return (logp.exp() * (logp - ref_logp).masked_fill_(logp == -torch.inf, 0.0)).sum(dim=-1)


def completion_mask(completions, eos):
    """(B, N), int -> (B, N) bool: true up to and including the first eos.

        completions  7 eos 9 eos  ->  1 1 0 0       (eos_before: 0 0 1 1)

    From positions, not `tokens != pad`: GPT-2 pads with eos, and the choice to stop must be trained too.
    """
    is_eos = completions == eos
    eos_before = is_eos.cumsum(dim=-1) - is_eos.long()  # how many lie strictly to the left
    return eos_before == 0


def masked_sum(values, mask):
    """(B, N) twice -> (B,): sum over the mask; not even a nan that it hides is read. ValueError if shapes differ."""
    if values.shape != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not match values {tuple(values.shape)}")
    return values.masked_fill(~mask.bool(), 0.0).sum(dim=-1)


def completion_logits(model, tokens, length, attention=None):
    """(B, T) -> (B, N, V): the logits that forecast the last N = `length` tokens, aligned with them.

    The forecast of token t stands at column t-1: columns 0 .. T-2 are fed, and the last N outputs kept, so
    the big product with the vocabulary is done for these only. Prompts that are padded on the left need
    `attention` (B, T), 0 at the padding. What follows a row's eos on the right is seen by nothing before it.
    """
    positions = None
    if attention is not None:  # GPT-2 would count the padding on the left as positions
        attention = attention[:, :-1]
        positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": attention, "position_ids": positions}
    # What follows is model(**inputs), but for the head in bf16; not for the embedding, which GPT-2 ties to it.
    inputs |= {"use_cache": False, "logits_to_keep": length}
    return functional_call(model, centred_head(model), kwargs=inputs, tie_weights=False).logits


def centred_head(model):
    """-> {name: the last layer's weights less their mean over the words}; {} outside of torch.autocast.

    That shifts all logits of a place by one number, which a softmax ignores. bf16 does not: GPT-2's logits lie
    around -100, where it has steps of 0.5, and rounded there they are another distribution.
    """
    name = getattr(model, "head_name", None)  # from load_policy; None where something bends the logits later
    if name is None or not torch.is_autocast_enabled(model.device.type):
        return {}
    weight = model.get_output_embeddings().weight  # (V, width)
    return {name: (weight - weight.detach().mean(dim=0)).bfloat16()}


# ---- sampling ----------------------------------------------------------------------------------------------


def sample(model, prompts, uniform, keep_logits=False):
    """(B, P), (B, N) in [0, 1) -> (B, P + N): each prompt and N tokens drawn from softmax(logits).

    No top-k, no temperature: REINFORCE is right only for samples of the distribution that it scores. A row
    is a function of its prompt and its numbers; after its eos it is filled up with eos and costs nothing.
    keep_logits: -> tokens and (B, N, V), the logits that they were drawn from, 0 after a row's eos.
    """
    eos, (batch, length) = model.config.eos_token_id, uniform.shape
    tokens = torch.cat([prompts, prompts.new_full((batch, length), eos)], dim=1)
    rows = torch.arange(batch, device=prompts.device)  # those that have not ended
    cache, new, kept = None, prompts, None  # keys and values of what was fed; what is to be fed
    with torch.no_grad():
        head = centred_head(model)
        for column in range(length):
            inputs = {"input_ids": new, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            output = functional_call(model, head, kwargs=inputs, tie_weights=False)
            cache, logits = output.past_key_values, output.logits[:, -1]
            drawn = draw(logits, uniform[rows, column])
            tokens[rows, prompts.shape[1] + column] = drawn
            if keep_logits:
                kept = logits.new_zeros(batch, length, logits.shape[-1]) if kept is None else kept
                kept[rows, column] = logits
            going = drawn != eos
            if not going.all():
                rows, drawn = rows[going], drawn[going]
                if not len(rows):
                    break
                cache.reorder_cache(going.nonzero().squeeze(1))  # its row i is now tokens[rows[i]]
            new = drawn.unsqueeze(1)
    return (tokens, kept) if keep_logits else tokens


def draw(logits, uniform):
    """(B, V), (B,) in [0, 1) -> (B,): a word of each row, with probability softmax(logits).

    The number is looked up in the cumulative distribution: word v owns the interval between the sums without
    and with it, a word of probability 0 nothing. In uniform's dtype: in fp64 3e-8 of the probability stands
    with another word (total variation, 50,257 words), in fp32, where many rare words own nothing, 5e-4. Of
    nan logits the draw means nothing; what follows is nan too, and stops the run.
    """
    cumulative = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1, dtype=uniform.dtype)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]  # rounded probabilities add up to nearly 1 only
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)  # the first word whose sum is above
    return drawn.clamp(max=logits.shape[-1] - 1)  # only nan gets there


def seeded(seed, use):
    """A torch.Generator on the CPU for one use ("sampling", "train order"), so that no use disturbs another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {use}".encode()))  # hash() is not the same twice


def noise_on(device, generator, *shape):
    """-> numbers in [0, 1) on the device, drawn on the CPU: the same everywhere. fp64, but for MPS."""
    numbers = torch.rand(*shape, generator=generator, dtype=torch.float64)
    if device.type == "mps":  # it has no fp64, and fp32 would round some up to 1
        numbers = numbers.float().clamp(max=1 - 2**-24)
    return numbers.to(device)


def decode(tokenizer, tokens):
    """(B, T) -> list of B str, as they stand but for special tokens (finished rows are filled with eos)."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def update(policy, optimizer, step, metrics, weight=1.0, max_norm=None):
    """What follows loss.backward(): the optimizer's step -> dict of float, the metrics and "grad_norm".

    metrics: dict of (), causes first. With torchrun they and the gradients are added up over the ranks, the
    metrics times `weight`, the share of the batch that this rank has gone through. FloatingPointError before
    a nan can reach the weights. A gradient longer than max_norm is shortened to it.
    """
    values = weight * torch.stack([*metrics.values()]).detach()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    all_reduce(values, *gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    found = dict(zip([*metrics, "grad_norm"], [*values.tolist(), norm.item()], strict=True))
    for name, value in found.items():
        if not math.isfinite(value):
            advice = "try a lower --lr or --max-grad-norm 1" if step > 1 else "look at the flags and the models"
            raise FloatingPointError(f"step {step}: {name} is {value}; the weights were not touched; {advice}")
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_norm, norm)
    optimizer.step()
    optimizer.zero_grad()  # not later: sampling wants the memory
    return found
