"""Policies and classifiers of other families than the course's: tiny random ones, saved, loaded and run as any other.

What differs: end and pad tokens, a bos, spaces that a tokenizer writes by itself, words that only the tokenizer or only
the model has, positions, the number of a classifier's logits.
"""

import functools
import json
import math
import random

import pytest
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from transformers import (BertConfig, BertForSequenceClassification, DistilBertConfig,
                          DistilBertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM,
                          LlamaConfig, LlamaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel,
                          PreTrainedTokenizerFast, RobertaConfig, RobertaForCausalLM, RobertaForSequenceClassification)

import common
import demo.world
import dpo
import reward
from demo import grammar
from support import encoding, families, files, loading
from support.errors import UserError
from tests.helpers import arguments, call, change, flags, labelled, pair, rows_of, save_classifier

CPU = torch.device("cpu")
KINDS = ("gpt2", "llama", "gpt_neox")
any_kind = pytest.mark.parametrize("kind", KINDS)
ENDINGS = [" is a joy.", " is", "is", ".", ", not a bore", "!", "(no)", "apple", "a", "0 of 10"]  # after "The film"
REVIEWS = [row["text"] for row in grammar.write_reviews(40, random.Random(0), set())[0]]

PHRASE = "joy to see it in"
# Logits of these models are below 64 in size, where fp32 has steps of 2^-18, and some ten roundings of that size lie on
# the way to them: so much may a token's log-prob be off.
ROUNDED = 10 * 2**-18

# ---- tokenizers --------------------------------------------------------------------------------------------


def byte_level(special, **names):
    """GPT-2's kind, with merges: byte-level BPE, which spells any text as it stands."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(REVIEWS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def with_bos(tokenizer):
    """Llama's special tokens; <pad> is added after the words, as many do who train it further."""
    before = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = before
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama_tokenizer(old=False):
    """BPE of whole texts, spaces written as ▁, one more of them before the text; unknown characters as bytes.

    Old: the space comes before a text's own one, too. And tokens may span words or lines: PHRASE is one token.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *alphabet]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(REVIEWS + [PHRASE, "a\n\nb"] * 300 * old, trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = written["added_tokens"][:3]  # the bytes are words like others
    if not old:
        written["pre_tokenizer"]["split"] = False  # so that nothing but what it learnt keeps words apart
    tokenizer = Tokenizer.from_str(json.dumps(written))
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_bos(tokenizer)


def unigram_tokenizer():
    """XGLM's kind: the likeliest pieces of words; every run of white space is one space."""
    tokenizer = Tokenizer(tokenizers.models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(tokenizers.Regex(" +"), " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
                                      initial_alphabet=sorted(set("".join(ENDINGS))), show_progress=False)
    tokenizer.train_from_iterator(REVIEWS, trainer)
    return with_bos(tokenizer)


END = "<|endoftext|>"
TOKENIZERS = {
    "gpt2": byte_level([END], eos_token=END, bos_token=END),
    "llama": llama_tokenizer(),
    "gpt_neox": byte_level([END, "<|padding|>"], eos_token=END, pad_token="<|padding|>"),
    "old llama": llama_tokenizer(old=True),
    "unigram": unigram_tokenizer(),
}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
BYTEWISE = ("gpt2", "gpt_neox")
ODD = ["  two", "\nline", "\n\n", " ", "  ", "é ü 🎬", "\t", "<s> a", "</s>", END]


@any_tokenizer
def test_prompt_and_completion_spell_their_texts_and_nothing_more(tokenizer):
    (prompt,) = encoding.encode(tokenizer, ["The film"])
    texts = ENDINGS + ODD * (tokenizer is not TOKENIZERS["unigram"])  # which cannot write those at all
    found = encoding.encode_after(tokenizer, texts)
    assert common.decode(tokenizer, [prompt + ids for ids in found]) == ["The film" + text for text in texts]
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & {i for ids in found for i in ids}


@any_tokenizer
def test_a_completion_keeps_the_space_before_its_first_word(tokenizer):
    """Which a tokenizer of Llama's kind takes off where that word is the first of a text."""
    (start,) = encoding.encode(tokenizer, ["The film"])
    for end in (" is", "is"):
        (ids,) = encoding.encode_after(tokenizer, [end])
        found = reward.texts_of(tokenizer, torch.tensor([encoding.opening(tokenizer) + start + ids]), len(ids))
        assert found == (["The film"], [end], [f"The film{end}"])


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "old llama"])
def test_a_character_that_the_prompts_end_cuts_in_two_stands_in_the_completion(kind, cut):
    """Four tokens, one for each of its bytes; the last `cut` of them are sampled, or others that make no character."""
    tokenizer = TOKENIZERS[kind]
    ((*start, a, b, c, d),) = encoding.encode(tokenizer, ["The film 🎬"])
    (end,) = encoding.encode_after(tokenizer, [" is"])
    tokens = torch.tensor([[*start, a, b, c, d, *end]])
    assert reward.texts_of(tokenizer, tokens, cut + len(end)) == (["The film "], ["🎬 is"], ["The film 🎬 is"])
    tokens = torch.tensor([[*start, *(a, b, c, d)[:-cut], *end]])
    ((prompt,), (completion,), (text,)) = reward.texts_of(tokenizer, tokens, len(end))
    assert (prompt, completion.lstrip("\ufffd")) == ("The film ", " is") and prompt + completion == text


@pytest.mark.parametrize("kind", BYTEWISE)
def test_byte_level_tokenizers_encode_a_completion_as_they_encode_any_text(kind):
    tokenizer, texts = TOKENIZERS[kind], ENDINGS + ODD
    assert encoding.encode_after(tokenizer, texts) == encoding.encode(tokenizer, texts)
    assert encoding.anchors(tokenizer) == []


def test_a_completion_is_encoded_as_it_would_be_inside_a_text():
    """Not letter by letter, which would spell it too: a space and a word are one token, and "." has no space."""
    tokenizer = TOKENIZERS["llama"]
    word = max((token for token in tokenizer.get_vocab() if token[0] == "▁" and token[1:].isalpha()), key=len)
    texts = [" " + word[1:], ".", "\n.", "\n\n"]
    found = [tokenizer.convert_ids_to_tokens(ids) for ids in encoding.encode_after(tokenizer, texts)]
    assert found == [[word], ["."], ["<0x0A>", "."], ["<0x0A>", "<0x0A>"]] and len(word) > 4


def test_the_opening_is_what_the_tokenizer_writes_before_a_text_and_not_what_it_writes_after_it():
    assert [encoding.opening(TOKENIZERS[kind]) for kind in KINDS] == [[], [1], []]
    other = llama_tokenizer()
    ends = [("<s>", 1), ("</s>", 2)]
    for template, ids in (("</s> $A", [2]), ("$A </s>", []), ("</s> <s> $A </s>", [2, 1])):
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
        assert encoding.opening(other) == ids


@any_tokenizer
def test_the_first_tokens_are_those_of_the_whole_text_though_tokens_may_span_words(tokenizer):
    texts = [f"{PHRASE} one", *(" ".join(REVIEWS[first : first + 4]) for first in range(30))]
    whole = encoding.encode(tokenizer, texts)
    for length in (1, 2, 10):
        assert encoding.first_tokens(tokenizer, texts, length) == [ids[:length] for ids in whole]
    assert (common.decode(tokenizer, [whole[0][:1]]) == [PHRASE]) == (tokenizer is TOKENIZERS["old llama"])


# ---- policies ----------------------------------------------------------------------------------------------


def random_policy(kind):
    """-> model, tokenizer: random, with forecasts far from uniform."""
    tokenizer = TOKENIZERS[kind]
    words, eos = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    if kind == "gpt2":  # tied head
        shape = {"n_positions": 96, "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=words, **shape, bos_token_id=eos, eos_token_id=eos))
    elif kind == "llama":  # no embedding for <pad>, the tokenizer's last word
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 96}
        ends = {"bos_token_id": 1, "eos_token_id": [7, eos], "pad_token_id": None, "tie_word_embeddings": False}
        config = LlamaConfig(vocab_size=words - 1, **shape, **ends, num_attention_heads=4, num_key_value_heads=2)
        model = LlamaForCausalLM(config)
    else:  # half of a head's width rotated; 23 words that the tokenizer does not have
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 96}
        ends = {"bos_token_id": eos, "eos_token_id": eos, "tie_word_embeddings": False}
        config = GPTNeoXConfig(vocab_size=words + 23, **shape, **ends, num_attention_heads=2, rotary_pct=0.5)
        model = GPTNeoXForCausalLM(config)
    return louder(model), tokenizer


def louder(model, factor=16):
    """Random weights are so small that all forecasts are alike."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(factor)
    return model.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy of each kind, and prompts, pairs and a classifier for all of them."""
    folder = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        model, tokenizer = random_policy(kind)
        demo.world.save_model(folder / kind, model.bfloat16() if kind == "llama" else model, tokenizer)
    save_classifier(folder / "reward_model", REVIEWS, ["NEGATIVE", "POSITIVE"])
    files.save_rows(folder / "prompts", train=labelled(REVIEWS[:24]), test=labelled(REVIEWS[24:]))
    files.save_rows(folder / "pairs", train=[pair(n) for n in range(12)], test=[pair(n) for n in range(12, 16)])
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    """kind -> model, tokenizer: as the scripts load them."""
    return {kind: loading.load_policy(arguments(policy=home / kind), CPU) for kind in KINDS}


def log_softmax_of(model, ids):
    """(T,) ids -> (T, V), by one plain forward of this row alone, without anything but its ids."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@any_kind
def test_a_loaded_policy_has_fp32_weights_and_one_end_token(loaded, kind):
    model, tokenizer = loaded[kind]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.eos_token_id == tokenizer.eos_token_id == {"gpt2": 0, "llama": 2, "gpt_neox": 0}[kind]


@any_kind
def test_a_pairs_log_probs_are_the_same_alone_batched_and_padded(loaded, kind):
    model, tokenizer = loaded[kind]
    texts = [("The film", " is"), (REVIEWS[0][:80], "."), ("A", " bore, and not a joy to see.")]
    ids = [encoding.encode(tokenizer, [prompt]) + encoding.encode_after(tokenizer, [end]) for prompt, end in texts]
    pairs = [dpo.make_pair(prompt, end, end[:1], model.config.eos_token_id, 90) for prompt, end in ids]
    together = torch.stack(dpo.pair_logps(model, pairs), dim=1)  # (3, 2), of up to 20 tokens
    assert max(len(side) for one in pairs for side in one[1:]) <= 20
    for one, found in zip(pairs, together, strict=True):
        alone = torch.stack(dpo.pair_logps(model, [one]), dim=1)[0]
        torch.testing.assert_close(alone, found, atol=20 * ROUNDED, rtol=0)
        for completion, logp in zip((one.chosen, one.rejected), found, strict=True):
            every = log_softmax_of(model, one.prompt + completion)
            own = every[range(len(one.prompt) - 1, len(every) - 1), completion]
            assert own.sum().item() == pytest.approx(logp.item(), abs=20 * ROUNDED)


@any_kind
def test_what_is_sampled_is_what_a_full_forward_forecasts(loaded, kind, monkeypatch):
    """The cache against full forwards, and the entropy identity of test_losses.py, while rows end one by one.

    A word that is often drawn is made the end token, so that they do.
    """
    model, words = loaded[kind][0], loaded[kind][0].config.vocab_size
    prompts = torch.randint(3, words, (1000, 4), generator=common.seeded(0, "prompts"))
    uniform = torch.rand(1000, 6, generator=common.seeded(0, "sampling"))
    often = common.sample(model, prompts, uniform[:, :3])[:, 4:].flatten().bincount().argmax().item()
    monkeypatch.setattr(model.config, "eos_token_id", often)
    tokens, logits = common.sample(model, prompts, uniform, keep_logits=True)
    mask = common.completion_mask(tokens[:, 4:], often)
    assert 20 < mask.all(dim=1).logical_not().sum() < 1000 and not logits[~mask].any()
    with torch.no_grad():
        logps = common.log_probs(common.completion_logits(model, tokens, 6))
    assert logps.abs().max() < 64
    torch.testing.assert_close(common.log_probs(logits)[mask], logps[mask], atol=2 * ROUNDED, rtol=0)
    for row in range(5):
        plain = log_softmax_of(model, tokens[row].tolist())[3:-1]
        torch.testing.assert_close(plain, logps[row], atol=2 * ROUNDED, rtol=0)

    def z(logps):
        surprise = -common.token_logps(logps, tokens[:, 4:]) + (logps.exp() * logps).sum(-1)
        per_row = common.masked_sum(surprise, mask)
        return (per_row.mean() / (per_row.std() / len(per_row) ** 0.5)).item()

    assert abs(z(logps)) < 4
    assert abs(z((logps * 0.7).log_softmax(-1))) > 8  # the test can fail


def test_prompts_begin_with_the_tokenizers_own_tokens_and_hold_as_many_of_the_review_all_the_same(home, loaded):
    for kind in KINDS:
        tokenizer = loaded[kind][1]
        order = common.seeded(0, "test order")
        prompts = loading.load_prompts(arguments(prompts=home / "prompts"), "train", tokenizer, order)
        first = {"gpt2": [], "llama": [1], "gpt_neox": []}[kind]
        assert prompts[:, : len(first)].tolist() == [first] * 24
        whole = [ids[:10] for ids in encoding.encode(tokenizer, REVIEWS[:24])]
        assert sorted(prompts[:, len(first) :].tolist()) == sorted(whole)
        assert tokenizer.eos_token_id not in prompts


def test_a_pairs_prompt_begins_with_the_tokenizers_own_tokens_and_an_empty_one_is_left_out(loaded, tmp_path, capsys):
    ends = {"positive_completion": "!", "negative_completion": ", a bore"}  # no space where they meet
    rows = [pair(0), {**pair(1), "prompt": ""}, {**pair(2), **ends}]
    files.save_rows(tmp_path / "pairs", train=rows, test=rows[:1])
    for kind in KINDS:
        tokenizer = loaded[kind][1]
        fitting = functools.partial(dpo.make_pair, eos=tokenizer.eos_token_id, max_len=60)
        order = common.seeded(0, "train subset")
        pairs = loading.load_pairs(arguments(pairs=tmp_path / "pairs"), tokenizer, order, fitting)
        assert "train pairs: 2 of 3" in capsys.readouterr().out
        first = {"gpt2": [], "llama": [1], "gpt_neox": []}[kind]
        prompts = [first + ids for ids in encoding.encode(tokenizer, ["Film 0", "Film 2"])]
        assert sorted(one.prompt for one in pairs["train"]) == sorted(prompts)
        sides = [(one.prompt, side) for one in pairs["train"] for side in (one.chosen, one.rejected)]
        texts = ["Film 0 is a joy, scene 0.", "Film 0 is a bore, scene 0.", "Film 2!", "Film 2, a bore"]
        assert common.decode(tokenizer, [prompt + side for prompt, side in sides]) == texts[2:] + texts[:2]
        assert all(side[-1] == tokenizer.eos_token_id for _, side in sides)


def test_the_tokenizers_own_tokens_need_positions_too(loaded):
    model, tokenizer = loaded["llama"]
    loading.check_length(model, 95, "--prompt-len", tokenizer)
    loading.check_length(model, 96, "--max-len")
    loading.check_length(loaded["gpt2"][0], 96, "--prompt-len", loaded["gpt2"][1])
    with pytest.raises(UserError, match=r"--prompt-len = 96 tokens and 1 that the tokenizer adds, but .* 96"):
        loading.check_length(model, 96, "--prompt-len", tokenizer)


def test_ids_that_only_the_model_knows_are_no_text(loaded):
    model, tokenizer = loaded["gpt_neox"]
    ids = [*encoding.encode(tokenizer, ["The film"])[0], model.config.vocab_size - 1, len(tokenizer)]
    assert common.decode(tokenizer, torch.tensor([ids])) == ["The film"]


@any_kind
def test_whole_runs_begin_at_the_original_and_a_saved_policy_is_the_one_that_was_trained(home, tmp_path, kind):
    small = ["--lr", 1e-2, "--eval-limit", 6, "--prompt-len", 6, "--completion-len", 5, "--batch-size", 4]
    for script, more in (("reinforce", ["--alpha", 0.1, "--limit", 12]), ("dpo", ["--epochs", 1, "--max-len", 60])):
        out = tmp_path / script
        call(script, *flags(home, script, out, *small, *more, policy=home / kind))
        log = rows_of(out / "metrics.jsonl")
        if script == "reinforce":
            assert abs(log[0]["kl"]) < 5 * 2 * ROUNDED < 1e-2 < log[2]["kl"]  # 5 tokens, policy and reference
        else:  # the very same operations twice give the same bits
            assert log[0]["test_loss"] == pytest.approx(math.log(2), abs=2**-23) and log[0]["test_accuracy"] == 0.5
            off = 0.1 / 2 * 4 * 20 * ROUNDED  # beta / 2 times four log-probs of 20 tokens
            assert log[1]["loss"] == pytest.approx(math.log(2), abs=off) and log[3]["loss"] < 0.69 < math.log(2) - off
        expected = json.loads((out / "eval.json").read_text())
        again = flags(home, "reward", tmp_path / f"{script} again", *small[2:-2], policy=out / "model")
        call("reward", *again, "--reference", home / kind)
        found = json.loads((tmp_path / f"{script} again" / "eval.json").read_text())
        shown = [[(row["prompt"], row["completion"]) for row in one["samples"]] for one in (found, expected)]
        assert shown[0] == shown[1] and found["kl"] > 1e-2
        near = [expected[key] for key in ("reward", "kl")]  # of 5 tokens; weights may lie elsewhere in memory
        assert [found[key] for key in ("reward", "kl")] == pytest.approx(near, abs=5 * 2 * ROUNDED)


def test_the_end_token_is_one_of_the_models_and_the_tokenizers_own_if_it_can_be(loaded):
    model, tokenizer = loaded["llama"]

    def found(eos):
        kept, model.config.eos_token_id = model.config.eos_token_id, eos
        try:
            return families.end_token(model, tokenizer)
        finally:
            model.config.eos_token_id = kept

    assert [found(eos) for eos in (7, [7, 2], [7, 8], None, [])] == [7, 2, 7, 2, 2]  # the tokenizer's is 2


def test_a_tokenizer_with_words_beyond_the_models_is_refused_and_one_with_a_pad_token_there_is_not(home, tmp_path):
    model, tokenizer = random_policy("llama")
    assert tokenizer.pad_token_id == model.config.vocab_size  # loaded all the same, in all the other tests
    model.resize_token_embeddings(model.config.vocab_size - 1)
    demo.world.save_model(tmp_path / "policy", model, tokenizer)
    with pytest.raises(UserError, match="its tokenizer has 420 words, the model only 419"):
        loading.load_policy(arguments(policy=tmp_path / "policy"), CPU)


def refused_policies():
    shape = {"vocab_size": 421, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    yield OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape, eos_token_id=2)), "no attribute 'past_key_values'"
    shape = {"vocab_size": 421, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**shape, intermediate_size=24, max_position_embeddings=64, is_decoder=True, eos_token_id=2)
    yield RobertaForCausalLM(config), "a row has other log-probs when it is padded on the left"


def test_a_family_that_would_give_wrong_numbers_is_refused_in_a_line(tmp_path):
    for number, (model, reason) in enumerate(refused_policies()):
        demo.world.save_model(tmp_path / str(number), louder(model), TOKENIZERS["llama"])
        with pytest.raises(UserError) as refusal:
            loading.load_policy(arguments(policy=tmp_path / str(number)), CPU)
        start = f"--policy {tmp_path}/{number} cannot be loaded as a policy that keeps keys and values and reads"
        assert str(refusal.value).startswith(f"{start} padded rows (") and reason in str(refusal.value)


class Forgets(torch.nn.Module):
    """A model whose cache keeps the row that has ended instead of the other."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, **inputs):
        output = self.model(**inputs)
        if output.past_key_values:
            select = output.past_key_values.reorder_cache
            output.past_key_values.reorder_cache = lambda rows: select(1 - rows)
        return output


def test_a_cache_that_keeps_the_wrong_rows_is_noticed(loaded):
    families.check_forecasts(loaded["gpt2"][0])
    with pytest.raises(ValueError, match="when it is sampled with a cache"):
        families.check_forecasts(Forgets(loaded["gpt2"][0]))


# ---- in bf16 -----------------------------------------------------------------------------------------------


def gemma(cap):
    """A Gemma 2; `cap` bends its logits into -cap .. cap, which a number added to all of them would change."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=421, **shape, num_key_value_heads=1, head_dim=8, final_logit_softcapping=cap)
    torch.manual_seed(0)
    return louder(Gemma2ForCausalLM(config), 20)


def shift_logits(model):
    """Gives the words of the head something in common, so that all logits of a place are some 100 higher or lower."""
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight += 32 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    return model


TOKENS = torch.arange(3, 43).view(4, 10)


@any_kind
def test_in_bf16_a_centred_head_leaves_the_log_probs_as_they_are_tied_or_not(kind):
    model = shift_logits(random_policy(kind)[0])
    model.config.eos_token_id = 2  # one of Llama's two
    model.head_name = families.head_name(model)
    head = dict(model.named_parameters(remove_duplicate=False))[model.head_name]
    assert head is model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == (kind == "gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = common.completion_logits(model, TOKENS, 6)
        exact, size = common.log_probs(logits), (logits - logits.mean(-1, keepdim=True)).abs().max().item()
        # bf16 keeps 8 bits: half a step, 2^-9, of a number's size. Eight roundings in a row, and twice for log Z.
        tolerance = 2 * 8 * 2**-9 * size
        with torch.autocast("cpu", torch.bfloat16):
            found = common.log_probs(common.completion_logits(model, TOKENS, 6))
            plain = common.log_probs(model(TOKENS[:, :-1]).logits[:, 3:])
            _, sampled = common.sample(model, TOKENS[:, :4], torch.full((4, 1), 0.5), keep_logits=True)
    torch.testing.assert_close(found, exact, atol=tolerance, rtol=0)
    torch.testing.assert_close(common.log_probs(sampled[:, 0]), exact[:, 0], atol=tolerance, rtol=0)
    assert (plain - exact).abs().max() > tolerance  # what it is for; else this test would show nothing
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_in_bf16_nothing_is_taken_off_logits_that_are_bent_after_the_head(tmp_path):
    """A soft-capped Gemma 2 computes as it would by itself, as policy and as reference; one without a cap need not."""
    for cap, name in ((5.0, None), (None, "lm_head.weight")):
        demo.world.save_model(tmp_path / str(cap), gemma(cap), TOKENIZERS["llama"])
        model, _ = loading.load_policy(arguments(policy=tmp_path / str(cap)), CPU)
        assert model.head_name == name == loading.load_reference(str(tmp_path / str(cap)), model).head_name
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            plain = model(TOKENS[:, :-1], use_cache=False).logits[:, 3:]
            assert torch.equal(common.completion_logits(model, TOKENS, 6), plain) == (name is None)
            first = model(TOKENS[:, :4], use_cache=True, logits_to_keep=1).logits
            sampled = common.sample(model, TOKENS[:, :4], torch.full((4, 1), 0.5), keep_logits=True)[1]
            assert torch.equal(sampled, first) == (name is None)


# ---- classifiers -------------------------------------------------------------------------------------------

TEXTS = ["good", "the pace is a mess " * 20, "", "a film to see", "[PAD] <pad> </s>"]  # the second one is cut
CLASSIFIERS = ("bert", "roberta", "distilbert")
LABELS = [["LABEL_0"], ["POS"], ["negative", "positive"], ["Positive", "neutral", "Negative"]]


def random_classifier(kind, labels):
    """-> model that reads at most 32 tokens, tokenizer: random, with logits that are far apart."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "roberta":  # positions begin at 2; nobody says how long a text may be
        ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        tokenizer = byte_level(["<s>", "<pad>", "</s>"], **ends)
        around = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        tokenizer.backend_tokenizer.post_processor = around
        shape |= {"max_position_embeddings": 34, "type_vocab_size": 1}
        config = RobertaConfig(vocab_size=len(tokenizer), **shape, **names)
        return louder(RobertaForSequenceClassification(config), 12), tokenizer
    tokenizer = demo.world.scorer_tokenizer(REVIEWS)  # with "[PAD]" 0
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    if kind == "bert":
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape, **names)
        return louder(BertForSequenceClassification(config), 12), tokenizer
    shape = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    config = DistilBertConfig(vocab_size=len(tokenizer), **shape, **names)
    return louder(DistilBertForSequenceClassification(config), 12), tokenizer


def saved(folder, model, tokenizer):
    demo.world.save_model(folder, model, tokenizer)
    return str(folder)


@pytest.mark.parametrize("labels", LABELS, ids="-".join)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_reward_is_the_classifiers_probability_of_positive_for_each_text_alone(tmp_path, kind, labels):
    model, tokenizer = random_classifier(kind, labels)
    scorer = loading.load_scorer(arguments(reward_model=saved(tmp_path / "classifier", model, tokenizer)), CPU)
    found = reward.positivity(scorer, TEXTS)
    for text, p in zip(TEXTS, found.tolist(), strict=True):
        inside = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:30]
        ids = [0, *inside, 2] if kind == "roberta" else [2, *inside, 3]  # <s> </s> or [CLS] [SEP]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        weights = logits.exp()
        shares = weights / (weights.sum() if len(labels) > 1 else 1 + weights)  # of a single one: e^z / (1 + e^z)
        positive = [label.lower()[:3] in ("pos", "lab") for label in labels].index(True)
        assert p == pytest.approx(shares[positive].item(), abs=1e-4)
    assert found.max() - found.min() > 0.02


def test_each_label_may_name_what_is_rewarded(tmp_path):
    model, tokenizer = random_classifier("bert", ["negative", "positive"])
    folder = saved(tmp_path / "classifier", model, tokenizer)
    scorers = [loading.load_scorer(arguments(reward_model=folder, positive_label=label), CPU)
               for label in ("negative", None)]
    negative, positive = (reward.positivity(scorer, TEXTS) for scorer in scorers)
    torch.testing.assert_close(negative + positive, torch.ones(len(TEXTS)))
    change(tmp_path / "classifier" / "config.json", problem_type="multi_label_classification")
    with torch.no_grad():
        logit = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0, 1]
    found = reward.positivity(loading.load_scorer(arguments(reward_model=folder), CPU), TEXTS[:1]).item()
    assert found == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)  # each label for itself: not a softmax


@pytest.mark.parametrize(("labels", "said"), [(["NEGATIVE"], "which of the labels NEGATIVE is positive"),
                                              (["toxic"], "which of the labels toxic is positive")])
def test_a_single_logit_of_something_else_is_not_taken_for_positive(labels, said):
    with pytest.raises(UserError, match=said):
        loading.positive_index(dict(enumerate(labels)))
    assert loading.positive_index(dict(enumerate(labels)), labels[0]) == 0


def gpt2_classifier(folder):
    """One that reads the last token of a text, with a tokenizer that knows no pad token and pads on the left."""
    tokenizer = byte_level([END], eos_token=END, bos_token=END, padding_side="left")
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": 0, "bos_token_id": 0}
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    torch.manual_seed(0)
    model = louder(GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), **shape, **labels)))
    demo.world.save_model(folder, model, tokenizer)
    return model, tokenizer


def test_a_classifier_without_a_pad_token_pads_with_its_end_token_on_the_side_that_changes_nothing(tmp_path):
    model, tokenizer = gpt2_classifier(tmp_path / "classifier")
    scorer = loading.load_scorer(arguments(reward_model=tmp_path / "classifier"), CPU)
    texts = ["good", "a film that is not good", "the"]
    for text, p in zip(texts, reward.positivity(scorer, texts).tolist(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(encoding.encode(tokenizer, [text]))).logits[0]
        assert p == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-4)


def test_a_classifier_whose_tokenizer_cannot_pad_is_refused(tmp_path):
    gpt2_classifier(tmp_path / "classifier")
    change(tmp_path / "classifier" / "tokenizer_config.json", eos_token=None, unk_token=None)
    with pytest.raises(UserError, match=r"as a classifier \(its tokenizer has no pad token and nothing in its"):
        loading.load_scorer(arguments(reward_model=tmp_path / "classifier"), CPU)
