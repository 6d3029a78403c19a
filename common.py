"""Tokens in, log-probabilities out: what REINFORCE and DPO share.

Left out on purpose: trainers, hidden collators, top-k, temperature, dropout. One alphabet in all files:
B rows, P prompt tokens, N completion tokens, T = P + N, V vocabulary. Prompts are padded on the left,
completions on the right, so that every completion starts at column P. One row, and its mask:

    . p0 p1 | n0 n1 eos .     tokens (B, T), attention 0 at the dots
         ^                    the logits at column P-1 forecast n0
              1  1  1   0     mask (B, N), column j is completion token j
"""

import zlib

import torch
from transformers import AutoModelForCausalLM

from support.families import check_words, end_token, first_tokens, load_model, load_tokenizer, opening
from support.fast import cast_once, prepare
from support.loading import load_columns, loading
from support.runs import UserError

# ---- log-probabilities -------------------------------------------------------------------------------------


def token_logps(logits, tokens):
    """(B, N, V), (B, N) -> (B, N): log-probability in nats of each token under the logits of its own column.

    The softmax is fp32 whatever the logits are: in bf16 it is off by a nat on a 100-token sum.
    ValueError if the shapes disagree: gather would not complain about tokens that are one column short.
    """
    if logits.shape[:-1] != tokens.shape:
        shapes = f"tokens {tuple(tokens.shape)} do not match logits {tuple(logits.shape)}"
        raise ValueError(f"{shapes}: they must be (B, N) and (B, N, V)")
    logps = logits.float().log_softmax(dim=-1)
    return logps.gather(dim=-1, index=tokens.unsqueeze(-1)).squeeze(-1)


def completion_mask(completions, eos):
    """(B, N), int -> (B, N) bool: true up to and including the first eos.

        completions  7 eos 9 eos  ->  1 1 0 0       (eos_before: 0 0 1 1)

    From positions, not `tokens != pad`: GPT-2 pads with eos, and the choice to stop must be trained too.
    """
    is_eos = completions == eos
    eos_before = is_eos.cumsum(dim=-1) - is_eos.long()  # how many lie strictly to the left
    return eos_before == 0


def masked_sum(values, mask):
    """(B, N), (B, N) -> (B,): sum over the tokens in the mask. What it hides is never read, not even a nan.

    ValueError if the shapes disagree.
    """
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
    return model(**inputs, use_cache=False, logits_to_keep=length).logits


# ---- sampling ----------------------------------------------------------------------------------------------


def sample(model, prompts, length, generator=None, forecasts=None, own=slice(None)):
    """(B, P) -> (B, P + N): each prompt and N = `length` tokens drawn from exactly softmax(logits).

    No top-k, no temperature: REINFORCE is right only for samples of the distribution that it scores.
    A row ends with its eos, is filled up with eos, and costs nothing from there on. Reproducible with a
    torch.Generator of the model's device. `forecasts` (B, N, V), of the logits' type, keeps the logits drawn
    from, if given; after a row's eos it stays as it was. `own`: go on with these rows only, as if with all.
    """
    eos = model.config.eos_token_id
    uniform = torch.rand(length, len(prompts), generator=generator, device=prompts.device)  # in [0, 1)
    uniform, prompts = uniform[:, own], prompts[own]
    tokens = torch.cat([prompts, prompts.new_full((len(prompts), length), eos)], dim=1)
    rows = torch.arange(len(prompts), device=prompts.device)  # those that have not ended
    cache, new = None, prompts  # keys and values of what was fed; what is to be fed
    with torch.no_grad(), cast_once(model, prompts.device):
        for column in range(length if len(rows) else 0):
            output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
            drawn = draw(logits, uniform[column, rows])
            tokens[rows, prompts.shape[1] + column] = drawn
            if forecasts is not None:
                forecasts[rows, column] = logits
            going = drawn != eos
            if not going.all():
                rows, drawn = rows[going], drawn[going]
                if not len(rows):
                    break
                cache.reorder_cache(going.nonzero().squeeze(1))  # its row i is now tokens[rows[i]]
            new = drawn.unsqueeze(1)
    return tokens


def draw(logits, uniform):
    """(B, V), (B,) in [0, 1) -> (B,): a word of each row; for uniform numbers, with probability softmax(logits).

    The number is looked up in the cumulative distribution: word v owns the interval between the sums without
    and with it, so a word of probability 0 owns nothing and is never drawn. In fp32 the intervals of GPT-2's
    50,257 words are rounded: all together, 0.0003 of the probability stands with another word (measured on a
    CPU). Where logits are nan the draw means nothing; what follows is nan too, and stops the run.
    """
    cumulative = logits.float().softmax(dim=-1).cumsum_(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]  # in fp32 the probabilities add up to nearly 1 only
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)  # the first word whose sum is above
    return drawn.clamp(max=logits.shape[-1] - 1)  # only nan gets there


def seeded(seed, use, device="cpu"):
    """A torch.Generator for one use ("sampling", "train order"), so that no use disturbs another."""
    # crc32 and not hash(), which differs from process to process.
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {use}".encode()))


# ---- training ----------------------------------------------------------------------------------------------


def checked_grad_norm(step, values, model, max_norm=None):
    """Norm of the whole gradient, after loss.backward(); one longer than `max_norm` is then shortened to that.

    Stops the run before a nan can reach the weights. values: dict of (), in the order in which one spoils the next.
    """
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    for name, value in {**values, "gradient's norm": norm}.items():
        if not torch.isfinite(value):
            advice = "try a lower --lr or --max-grad-norm 1" if step > 1 else "what was loaded, or a flag, is at fault"
            raise UserError(f"step {step}: the {name} is {value.item()}; the weights were not touched; {advice}")
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.item()


# ---- loading -----------------------------------------------------------------------------------------------


def load_policy(name, device, precision="fp32"):
    """Hub name or local folder -> (language model, tokenizer)."""
    model = load_model(AutoModelForCausalLM, "a language model", "--policy", name, device)
    tokenizer = load_tokenizer("--policy", name)
    model.config.eos_token_id = end_token("--policy", name, model, tokenizer)
    model.config.vocab_size = model.config.get_text_config().vocab_size  # which a model that reads images hides
    check_words("--policy", name, model, tokenizer, model.config.eos_token_id)
    with loading("--policy", name, "a policy that keeps keys and values and reads padded rows"):
        check_forecasts(model)
    return prepare(model, precision), tokenizer  # not sooner: the check needs exact numbers


@torch.no_grad()
def check_forecasts(model):
    """ValueError unless a row is forecast the same with padding on its left, and from a cache that another row left.

    Some families count positions in their own way, or keep something else than keys and values.
    """
    tokens = torch.arange(2, 14, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
    attention = torch.ones_like(tokens)
    attention[1, 0] = 0  # the second row begins one column later
    padded, alone = completion_logits(model, tokens, 2, attention)[1:], completion_logits(model, tokens[1:, 1:], 2)
    cache = model(input_ids=tokens[:, :4], use_cache=True, logits_to_keep=1).past_key_values
    cache.reorder_cache(torch.tensor([1], device=model.device))
    cached = model(input_ids=tokens[1:, 4:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    whole = model(input_ids=tokens[1:], use_cache=False, logits_to_keep=1).logits
    for found, expected, where in ((padded, alone, "padded on the left"), (cached, whole, "sampled with a cache")):
        if not torch.allclose(found.log_softmax(dim=-1), expected.log_softmax(dim=-1), atol=1e-2, equal_nan=True):
            raise ValueError(f"a row has other log-probs when it is {where}")


def load_reference(name, policy, device, precision="fp32"):
    """The original model, without gradients, for a policy of the same vocabulary."""
    reference = load_model(AutoModelForCausalLM, "a language model", "--reference", name, device)
    words = reference.config.get_text_config().vocab_size
    if words != policy.config.vocab_size:
        sizes = f"{words} words, the policy {policy.config.vocab_size}"
        raise UserError(f"--reference {name} has a vocabulary of {sizes}: there is no KL between them")
    return prepare(reference, precision).requires_grad_(False)  # of weights with a gradient autocast keeps copies


def load_prompts(name, split, tokenizer, length, order, limit=None):
    """-> (n, P) LongTensor: the first `length` tokens of a split's reviews, shuffled by a Generator.

    Before them stands what the tokenizer writes before any text: a bos, or nothing, as for GPT-2 (P = `length`).
    The data set is sorted by label: without the shuffle the first n = `limit` would all be negative.
    Shorter reviews are left out and counted: prompts never need padding.
    """
    (texts,) = load_columns("--prompts", name, split, ["text"])
    shuffled = [texts[row] for row in torch.randperm(len(texts), generator=order)]
    prompts = [ids for ids in first_tokens(tokenizer, shuffled, length) if len(ids) == length]
    if not prompts:
        raise UserError(f"--prompts {name}: no {split} review has {length} tokens; lower --prompt-len")
    short, prompts = len(texts) - len(prompts), prompts[:limit]
    print(f"{split} prompts: {len(prompts)} of {len(texts)} reviews; {short} have fewer than {length} tokens")
    return torch.tensor([opening(tokenizer) + ids for ids in prompts])
