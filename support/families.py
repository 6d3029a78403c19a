"""Language models and classifiers of any family: what differs is found out by trying and never by a name.

A model may have several end tokens, count positions in its own way, or have room for fewer tokens than its config says.
Left out on purpose: models that read more than text, models that keep no keys and values (state space models).
"""

import torch

from support.encoding import opening


def end_token(model, tokenizer):
    """-> int: the config's eos; of several the tokenizer's own, else the first; of none the tokenizer's; or None."""
    configs = (model.config, model.config.get_text_config())  # one in the other, for models that read images too
    given = [getattr(config, "eos_token_id", None) for config in configs]
    found, own = given[1] if given[0] is None else given[0], tokenizer.eos_token_id
    if isinstance(found, list | tuple):
        found = own if own in found else next(iter(found), None)
    return own if found is None else found


def most_words(tokenizer, eos):
    """-> how many words a model needs so that any text can be encoded.

    A pad token, or another special one that no text is encoded to, may be beyond the model's words.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    words = [i for i in tokenizer.get_vocab().values() if i not in special]
    return max(words + opening(tokenizer) + [eos]) + 1


def positions(model):
    """-> how many tokens the model can read at once; None where nothing limits them."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = module.num_embeddings - module.padding_idx - 1  # RoBERTa's kind counts from there: 512 of 514
    return longest


@torch.no_grad()
def check_forecasts(model):
    """ValueError unless a row is forecast the same with padding on its left, and from a cache that another row left.

    Some families count positions in their own way, or keep something else than keys and values.
    """

    def forecast(ids, **more):
        return model(input_ids=ids, logits_to_keep=1, **more).logits.log_softmax(dim=-1)

    tokens = torch.arange(2, 14, device=model.device).view(2, 6) % model.config.vocab_size
    attention, places = torch.ones_like(tokens), torch.arange(6, device=model.device).repeat(2, 1)
    attention[1, 0], places[1] = 0, (places[1] - 1).clamp(min=0)  # the second row begins one column later
    padded = forecast(tokens, use_cache=False, attention_mask=attention, position_ids=places)[1:]
    cache = model(input_ids=tokens[:, :4], use_cache=True, logits_to_keep=1).past_key_values
    cache.reorder_cache(torch.tensor([1], device=model.device))
    cached = forecast(tokens[1:, 4:], use_cache=True, past_key_values=cache)
    alone, whole = forecast(tokens[1:, 1:], use_cache=False), forecast(tokens[1:], use_cache=False)
    for found, expected, where in ((padded, alone, "padded on the left"), (cached, whole, "sampled with a cache")):
        if not torch.allclose(found, expected, atol=1e-2, equal_nan=True):
            raise ValueError(f"a row has other log-probs when it is {where}")


@torch.no_grad()
def head_name(model):
    """-> the name of the head's weights, for common.centred_head; None if a number added to all logits matters.

    Where a soft cap, say, bends the logits after the head, a number that is taken off all of them is seen.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings().num_embeddings
    if type(head) is not torch.nn.Linear:
        return None
    # Several: of a pad token, such as 0 may be, all logits can be 0, and any bend leaves them alike.
    tokens = torch.arange(6, device=model.device).view(1, 6) % words
    plain = model(input_ids=tokens, use_cache=False).logits.log_softmax(dim=-1)
    hook = head.register_forward_hook(lambda head, inputs, logits: logits + 64)
    moved = model(input_ids=tokens, use_cache=False).logits.log_softmax(dim=-1)
    hook.remove()
    name = next(name for name, module in model.named_modules() if module is head)
    return f"{name}.weight" if torch.allclose(moved, plain, atol=1e-3) else None


@torch.no_grad()
def fit_padding(model, tokenizer):
    """Makes a classifier's tokenizer pad as its model needs it: a text's logits are the same alone and beside a longer
    one. ValueError if there is no way."""
    config = model.config.get_text_config()
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(config, "pad_token_id", None) is None:  # a GPT-2 looks for the last token that is not this one
        config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has no pad token and nothing in its place")

    def logits(*texts):
        return model(**tokenizer(texts, padding=True, return_tensors="pt").to(model.device)).logits

    texts = ["good", "a film that is not good at all, and too long"]
    alone = torch.cat([logits(text) for text in texts])
    for side in sorted(("right", "left"), key=lambda side: side != tokenizer.padding_side):  # its own first
        tokenizer.padding_side = side
        if torch.allclose(logits(*texts), alone, atol=1e-2, equal_nan=True):
            return
    raise ValueError("beside a longer text, a short one has other logits")
