"""Texts to token ids, for any tokenizer: what is particular about one is found out by trying.

A tokenizer may write a token before every text (a bos), or a space that is not there.
"""

ANCHORS = "\n(a0"  # to write a text after; for nearly any text and tokenizer one of them will do
SPARE = 8  # tokens before a cut that are not trusted


def encode(tokenizer, texts):
    """List of str -> list of lists of ids, nothing added. A literal <|endoftext|> stays text, no end token."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


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

    def spells(rows, expected):
        return tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) == expected

    texts, found = ["b", " b", "."], []
    (start,) = encode(tokenizer, ["a"])
    if spells([start + ids for ids in encode(tokenizer, texts)], ["a" + text for text in texts]):
        return []
    for mark in ANCHORS:
        (start,), wholes = encode(tokenizer, [mark]), encode(tokenizer, [mark + text for text in texts])
        kept = start and all(ids[: len(start)] == start for ids in wholes)
        if kept and spells(wholes, [mark + text for text in texts]):
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


def first_tokens(tokenizer, texts, length):
    """List of str -> the first `length` ids of each: those of the whole text, without encoding all of it.

    (Truncation by the tokenizer encodes all of it: 9 s for 25,000 reviews instead of one.) A text is cut where spaces
    begin; the last tokens before the cut are not trusted, and where too few are left, the whole is encoded.
    """
    cut = 16 * length  # characters: nearly always enough
    heads = [text if len(text) <= cut else text[:cut].rpartition(" ")[0].rstrip(" ") for text in texts]
    found = encode(tokenizer, heads)
    for row, (head, text) in enumerate(zip(heads, texts, strict=True)):
        if head != text and len(found[row]) < length + SPARE:
            (found[row],) = encode(tokenizer, [text])
    return [ids[:length] for ids in found]
