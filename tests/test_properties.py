"""Properties that must hold for any text, length, batch size and limit, tried on what hypothesis thinks of.

The same examples in each run. EXAMPLES=2000 pytest tests/test_properties.py looks for new ones. Models compute in
double precision, so only the rounding of log_probs is left: logits lie below 16, where fp32 has steps of 2^-20,
log-probs below 32, steps of 2^-19; a few of them are 2^-17 for each of at most 12 tokens.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import common
import demo.world
import dpo
from support import encoding
from support.loading import like_lengths, split_completions
from test_losses import EOS, random_policy

FOUND = os.environ.get("EXAMPLES")
settings.register_profile("here", max_examples=int(FOUND or 60), derandomize=not FOUND, deadline=None, database=None)
settings.load_profile("here")

ROUNDING = 2 * 12 * 2**-17  # of two sums over a completion's tokens
WORDS = ["the film", " the", "don't", "  ", " ", "\n", "\t ", "\x00", "\x1b[31m", "\x1f", "\x85", "\u2028",
         "é", "🎬", "👩\u200d👧", "<|endoftext|>", " <|endoftext|>", "שלום", "\u202eabc", "ا", "|",
         "3.5/10", "!!!", "\u00a0"]
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=12).map("".join)
ids = st.lists(st.integers(1, 10), min_size=1, max_size=9)
pairs = st.lists(st.builds(dpo.Pair, ids, ids, ids), min_size=1, max_size=5)


def merging_tokenizer():
    """GPT-2's kind as it is, with merges: bytes, then ever longer pieces of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    start = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=start, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS), "".join(WORDS), "the film and the others in it"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


TOKENIZERS = {"words": demo.world.policy_tokenizer(["".join(WORDS), "the film and the others"]),
              "merges": merging_tokenizer()}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@pytest.fixture(scope="module")
def models_of_11_words():
    """A policy with forecasts far from uniform, and another one."""
    return random_policy(0).double(), random_policy(1).double()


# ---- tokenizing --------------------------------------------------------------------------------------------


@any_tokenizer
@given(text=texts)
def test_any_text_comes_back_as_it_was_and_holds_no_end_token(tokenizer, text):
    (found,) = encoding.encode(tokenizer, [text])
    assert tokenizer.eos_token_id not in found
    assert common.decode(tokenizer, [found]) == [text]
    assert common.decode(tokenizer, [[*found, tokenizer.eos_token_id]]) == [text]


@any_tokenizer
@given(text=texts, length=st.integers(1, 12), repeat=st.integers(1, 20))
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer, text, length, repeat):
    text *= repeat  # so that it is cut
    (whole,) = encoding.encode(tokenizer, [text])
    assert encoding.first_tokens(tokenizer, [text], length) == [whole[:length]]


# ---- masks -------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_mask_ends_with_the_first_eos(completions):
    for row, mask in zip(completions, common.completion_mask(torch.tensor(completions), EOS).tolist(), strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert mask == [True] * length + [False] * (len(row) - length)


# ---- pairs -------------------------------------------------------------------------------------------------


@any_tokenizer
@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5), max_len=st.integers(1, 40))
def test_the_mask_covers_the_completions_own_tokens_and_nothing_else(tokenizer, rows, max_len):
    """From text to tensors: under the mask stand the completion's tokens, and the end where nothing was cut."""
    eos = tokenizer.eos_token_id
    encoded = [encoding.encode(tokenizer, row) for row in rows]
    kept = [row for row in encoded if row[0] and row[1] and row[2] and len(row[0]) < max_len]
    made = [dpo.make_pair(*row, eos, max_len) for row in encoded]
    assert [pair is not None for pair in made] == [row in kept for row in encoded]
    if not kept:
        return
    tokens, attention, mask = dpo.collate([pair for pair in made if pair], "cpu")
    width = tokens.shape[1] - mask.shape[1]
    sides = [(prompt, chosen) for prompt, chosen, _ in kept] + [(prompt, rejected) for prompt, _, rejected in kept]
    assert len(tokens) == len(sides)
    for row, (prompt, completion) in enumerate(sides):
        whole = [*prompt, *completion, eos]
        own = whole[len(prompt) : max_len]
        assert tokens[row, width:][mask[row]].tolist() == own
        assert mask[row].tolist() == [True] * len(own) + [False] * (mask.shape[1] - len(own))
        assert tokens[row][attention[row].bool()].tolist() == prompt + own and len(prompt + own) <= max_len
        assert attention[row, width - len(prompt) : width + len(own)].all()  # no gap


ends = st.sampled_from(["", " ", "\n\t"])
rows_of_pairs = st.lists(st.tuples(texts, ends, *[st.tuples(texts, st.booleans())] * 2), min_size=1, max_size=6)


@given(rows_of_pairs, st.sampled_from(["", " ", "\n"]))
def test_prompt_and_completion_are_joined_as_each_row_means_it(rows, gap):
    """gap: what the data set writes before a completion; ends: what it writes after a prompt."""
    columns, joined = [], []
    for start, end, *sides in rows:
        prompt = f"P{start} y."  # two words, which nothing but a repeat begins with
        columns.append([prompt + end, *(prompt * repeats + f"{gap}x{text}" for text, repeats in sides)])
        joined.append([prompt, *(f"{prompt}{gap if repeats else end + gap or ' '}x{text}" for text, repeats in sides)])
    prompts, *found, _ = split_completions(*zip(*columns, strict=True), "pairs")
    for prompt, one, other, expected in zip(prompts, *found, joined, strict=True):
        assert [prompt, prompt + one, prompt + other] == expected


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), batch_size=st.integers(1, 9),
       window=st.integers(1, 4), seed=st.integers(0, 99))
def test_batches_of_like_length_hold_every_row_once(lengths, batch_size, window, seed):
    batches = like_lengths(torch.tensor(lengths), batch_size, common.seeded(seed, "train order"), window)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in batches)


# ---- a row alone and in any batch --------------------------------------------------------------------------


@given(pairs=pairs, batch_size=st.integers(1, 6))
def test_a_pairs_log_probs_are_the_same_alone_and_in_any_batch(models_of_11_words, pairs, batch_size):
    policy, _ = models_of_11_words
    run = SimpleNamespace(args=SimpleNamespace(micro_batch=None, batch_size=batch_size), bf16=False,
                          deal=lambda batches, _: batches)
    together = dpo.all_logps(policy, pairs, run, "test")
    for pair, found in zip(pairs, together, strict=True):
        alone = torch.stack(dpo.pair_logps(policy, [pair]), dim=1)[0]
        torch.testing.assert_close(alone, found, atol=ROUNDING, rtol=0)
        for completion, logp in zip((pair.chosen, pair.rejected), found, strict=True):  # and without any padding
            every = policy(torch.tensor([pair.prompt + completion])).logits[0].log_softmax(-1)
            own = every[range(len(pair.prompt) - 1, len(every) - 1), completion]
            assert own.sum().item() == pytest.approx(logp.item(), abs=ROUNDING)


sizes = {"rows": st.integers(1, 6), "prompt": st.integers(1, 9), "completion": st.integers(1, 12),
         "seed": st.integers(0, 999)}


@given(**sizes)
def test_a_completions_log_probs_and_kl_are_the_same_alone_and_in_any_batch(
        models_of_11_words, rows, prompt, completion, seed):
    policy, reference = models_of_11_words
    prompts = torch.randint(1, 11, (rows, prompt), generator=common.seeded(seed, "prompts"))
    uniform = torch.rand(rows, completion, generator=common.seeded(seed, "sampling"))
    tokens = common.sample(policy, prompts, uniform)
    mask = common.completion_mask(tokens[:, prompt:], EOS)

    def scored(rows):
        logp, ref_logp = (common.log_probs(common.completion_logits(one, tokens[rows], completion))
                          for one in (policy, reference))
        values = common.token_logps(logp, tokens[rows, prompt:]), common.token_kl(logp, ref_logp)
        return torch.stack([common.masked_sum(some, mask[rows]) for some in values])

    with torch.no_grad():
        together = scored(slice(None))
        for row in range(rows):
            alone = scored(slice(row, row + 1))[:, 0]
            torch.testing.assert_close(alone, together[:, row], atol=ROUNDING, rtol=0)


@given(**sizes)
def test_a_row_is_sampled_the_same_whatever_the_others_are(models_of_11_words, rows, prompt, completion, seed):
    """Other prompts and numbers beside it, which end sooner or later, and more of them: its own tokens stay."""
    policy, _ = models_of_11_words
    prompts, others = torch.randint(1, 11, (2, rows, prompt), generator=common.seeded(seed, "prompts"))
    uniform, noise = torch.rand(2, rows, completion, generator=common.seeded(seed, "sampling"))
    alone = common.sample(policy, prompts[-1:], uniform[-1:])
    others[-1], noise[-1] = prompts[-1], uniform[-1]  # the last row, so that those that end are above it
    for some, numbers in ((prompts, uniform), (others, noise)):
        assert common.sample(policy, some, numbers)[-1:].tolist() == alone.tolist()
