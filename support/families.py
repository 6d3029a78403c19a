"""Models and tokenizers of any family: what differs between them, found out by trying and never by a name.

A tokenizer may write a token before every text, or a space that is not there; it may know words that the model has no
weights for. A model may have several end tokens, or room for fewer tokens than its config says. Left out on purpose:
chat templates, models that read more than text, models that keep no keys and values (state space models).
"""

import torch
from transformers import AutoTokenizer

from support.loading import loading
from support.runs import UserError

# What GPT-2's pattern calls white space: less than Python does.
WHITE = "".join(mark for mark in map(chr, range(0x3001)) if mark.isspace() and mark not in "\x1c\x1d\x1e\x1f")
ANCHORS = "\n(a0"  # to write a text after; for nearly any text and tokenizer one of them will do
SPARE = 8  # tokens before a cut that are not trusted

# ---- tokens ------------------------------------------------------------------------------------------------


def encode(tokenizer, texts):
    """List of str -> list of lists of ids, nothing added. A literal <|endoftext|> stays text, no end token."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def opening(tokenizer):
    """-> list of the ids that the tokenizer writes before any text: Llama's kind a bos, GPT-2's nothing.

    A model that was trained with them is another one without. What a tokenizer writes after a text is left out.
    """
    (whole,), (text,) = tokenizer(["a"])["input_ids"], encode(tokenizer, ["a"])
    places = (place for place in range(len(whole)) if whole[place : place + len(text)] == text)
    return whole[: next(places, 0)]


def anchors(tokenizer):
    """-> list of (ids, character): what a text must be written after to be encoded as in the middle of a text.

    Sentencepiece and its kind write a space before each text: "." alone would be " .". Empty for tokenizers that add
    nothing, so that a text can be encoded alone.
    """
    texts, found = ["b", " b", "."], []
    for mark in ("", *ANCHORS):
        start = encode(tokenizer, [mark or "a"])[0]
        wholes = encode(tokenizer, [mark + text for text in texts])
        if not mark and decode(tokenizer, [start + ids for ids in wholes]) == ["a" + text for text in texts]:
            return []
        spelled = decode(tokenizer, wholes) == [mark + text for text in texts]
        if mark and start and spelled and all(ids[: len(start)] == start for ids in wholes):
            found.append((start, mark))
    return found


def encode_after(tokenizer, texts):
    """List of str -> list of lists of ids which, after those of another text, spell that text and this one.

    Encoded after an anchor, whose ids are taken off again. Where it shares a token with a text, the next one is tried.
    """
    found, left = encode(tokenizer, texts), range(len(texts))
    for start, mark in anchors(tokenizer):
        wholes = encode(tokenizer, [mark + texts[row] for row in left]) if left else []
        whole_of, left = dict(zip(left, wholes, strict=True)), []
        for row, ids in whole_of.items():
            if ids[: len(start)] == start:
                found[row] = ids[len(start) :]
            else:
                left.append(row)
    return found


def decode(tokenizer, tokens):
    """(B, T) -> list of B str, as they stand but for special tokens (finished rows are filled with eos).

    Ids beyond the tokenizer's, which a padded vocabulary has, are no text.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.batch_decode(tokens, **options) if len(tokens) else []  # of no rows it would make one text


def decode_after(tokenizer, tokens):
    """(B, N) -> list of B str: as decode, for tokens that go on after others. Their first space is kept."""
    start, mark = next(iter(anchors(tokenizer)), ([], ""))
    return [text[len(mark) :] for text in decode(tokenizer, [start + row for row in tokens.tolist()])]


def first_tokens(tokenizer, texts, length):
    """List of str -> the first `length` ids of each: those of the whole text, without encoding all of it.

    A text is cut where a space begins. No token of GPT-2's kind spans that border: tokens begin with their space. Other
    kinds join words, so the last tokens before the cut are not trusted. Where too few are left, the whole is encoded.
    """
    cut = 16 * length  # characters: nearly always enough
    heads = [text if len(text) <= cut else text[:cut].rpartition(" ")[0].rstrip(WHITE) for text in texts]
    found = encode(tokenizer, heads)
    for row, (head, text) in enumerate(zip(heads, texts, strict=True)):
        if head != text and len(found[row]) < length + SPARE:
            (found[row],) = encode(tokenizer, [text])
    return [ids[:length] for ids in found]


# ---- loading -----------------------------------------------------------------------------------------------


def load_tokenizer(flag, name):
    """The tokenizer of a model, by hub name or local folder."""
    with loading(flag, name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library returns where it finds none
        raise UserError(f"{flag} {name} has no tokenizer: put its files beside the model's (save_pretrained)")
    return tokenizer


def load_model(auto_class, kind, flag, name, device):
    """A model with fp32 weights whatever the checkpoint's are, in eval mode: no dropout, not in sampling or training.

    What computes in bf16 later (fast.prepare) computes in fp32 still, as what is tried at loading needs.
    """
    with loading(flag, name, kind):
        model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:  # the library would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{flag} {name} is not {kind}: its checkpoint has no {missing}")
    return model.eval().to(device)


def end_token(flag, name, model, tokenizer):
    """-> int: the config's eos; of several the tokenizer's own, else the first; of none the tokenizer's."""
    configs = (model.config, model.config.get_text_config())  # one in the other, for models that read images too
    given = [getattr(config, "eos_token_id", None) for config in configs]
    found, own = given[1] if given[0] is None else given[0], tokenizer.eos_token_id
    if isinstance(found, list | tuple):
        found = own if own in found else next(iter(found), None)
    found = own if found is None else found
    if found is None:
        raise UserError(f"{flag} {name}: neither config.json nor the tokenizer names an end token (eos_token_id)")
    return found


def check_words(flag, name, model, tokenizer, eos):
    """UserError if a text could be encoded to an id that the model has no weights for.

    A pad token, or another special one that no text is encoded to, may be beyond the model's words.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    words = [i for i in tokenizer.get_vocab().values() if i not in special]
    most, has = max(words + opening(tokenizer) + [eos]) + 1, model.get_input_embeddings().num_embeddings
    if most > has:
        raise UserError(f"{flag} {name}: its tokenizer has {most} words, the model only {has}")


def positions(model):
    """-> how many tokens the model can read at once; None where nothing limits them."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = module.num_embeddings - module.padding_idx - 1  # RoBERTa's kind counts from there: 512 of 514
    return longest


def check_length(model, length, flags, tokenizer=None):
    """UserError if the model has fewer positions than the flags ask for, and the tokenizer writes before a text."""
    own, longest = len(opening(tokenizer)) if tokenizer else 0, positions(model)
    if longest and length + own > longest:
        more = f" and {own} that the tokenizer adds" * bool(own)
        raise UserError(f"{flags} = {length} tokens{more}, but the policy has {longest} positions")


@torch.no_grad()
def fit_classifier(flag, name, model, tokenizer):
    """Makes the tokenizer pad as the model needs it: a text's logits are the same alone and beside a longer one.

    UserError if there is no way.
    """
    config = model.config.get_text_config()
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(config, "pad_token_id", None) is None:  # a GPT-2 looks for the last token that is not this one
        config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no pad token and nothing in its place")

    def logits(*texts):
        return model(**tokenizer(texts, padding=True, return_tensors="pt").to(model.device)).logits

    with loading(flag, name, "a classifier"):
        texts = ["good", "a film that is not good at all, and too long"]
        alone = torch.cat([logits(text) for text in texts])
        for side in sorted(("right", "left"), key=lambda side: side != tokenizer.padding_side):  # its own first
            tokenizer.padding_side = side
            if torch.allclose(logits(*texts), alone, atol=1e-2, equal_nan=True):
                return
        raise ValueError("beside a longer text, a short one has other logits")
