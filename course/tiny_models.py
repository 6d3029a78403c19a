"""Tiny offline stand-ins for what a solution of the course works on, made so that answers are known on paper.

Ids and widths are GPT-2's (50,257 words, the last one eos, which is also the padding), so that numbers that a
solution has as literals fit: 10 prompt tokens, 20 more, 50256.
"""

import functools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

import demo.world

PROMPT, LENGTH = 10, 30  # tokens of a row: 10 of the prompt, 20 more
VOCABULARY, EOS = 50_257, 50_256

# ---- forecasts known on paper ------------------------------------------------------------------------------

# Only these words are ever forecast. One has probability 1/2, one 1/4, ... down to 2^-15 twice: together 1.
WORDS = torch.tensor([*range(1000, 16_000, 1000), EOS])
BITS = torch.tensor([*range(1, 16), 15])

# Bits (minus log2 of the probability) of tokens 2 to 30 of four rows under the policy: the rows are made from these.
ROWS = [[*(7, 3, 3, 8, 6, 1, 2, 8, 1), *(2, 1, 3, 5, 2, 4, 6, 1, 7, 2, 1, 2, 4, 3, 2, 4, 2, 1, 2, 5)],
        [*(2, 2, 1, 1, 2, 2, 2, 2, 3), *(3, 2, 6, 8, 8, 2, 2, 2, 4, 3, 1, 3, 4, 2, 2, 3, 1, 3, 3, 7)],
        [*(7, 1, 7, 8, 3, 1, 3, 5, 3), *(2, 5, 5, 2, 1, 3, 1, 3, 4, 1, 6, 4, 3, 4, 7, 1, 5, 1, 2, 7)],
        [*(2, 1, 2, 3, 6, 3, 6, 3, 5), *(1, 7, 3, 3, 1, 4, 1, 2, 3, 6, 7, 3, 2, 3, 3, 6, 1, 3, 3, 3)]]
REWARDS = [7 / 8, 1 / 8, 1 / 2, 1 / 4]


class Forecasts(torch.nn.Module):
    """A language model whose forecast after word j in column t is one of 16 rows of a table, each known on paper.

    In row r of the table word j has BITS[(j + r) % 16] bits. Which row comes after what is another one for each
    `turns`, so a policy and an original differ. Like GPT-2, it drops out in training mode.
    """

    def __init__(self, turns):
        super().__init__()
        self.turns = turns  # row = (turns[0] * column + turns[1] * word + turns[2]) % 16
        self.config = GPT2Config(eos_token_id=EOS, pad_token_id=EOS)
        self.dropped = False  # True once it was asked in training mode
        table = torch.full((16, VOCABULARY), -40.0)  # what is no word: e^-40
        for row in range(16):
            table[row, WORDS] = -torch.log(torch.tensor(2.0)) * BITS.roll(-row)
        words = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, WORDS, True)
        table -= torch.arange(16).unsqueeze(1) * ~words  # or the sum of all log-probs would be the same in all rows
        table += torch.arange(16).unsqueeze(1) / 4 + 1  # logits are log-probabilities only up to a constant
        self.table = torch.nn.Parameter(table)
        self.eval()

    @property
    def device(self):
        return self.table.device

    def row(self, tokens):
        """(B, T) -> (B, T): the row of the table that forecasts the token after each."""
        words = (tokens.unsqueeze(-1) == WORDS).int().argmax(dim=-1)
        columns = torch.arange(tokens.shape[-1])
        return (self.turns[0] * columns + self.turns[1] * words + self.turns[2]) % 16

    def forward(self, input_ids=None, *_, labels=None, return_dict=True, **__):
        logits = self.table[self.row(input_ids)]  # (B, T, V)
        self.dropped |= self.training
        logits = torch.nn.functional.dropout(logits, 0.1, self.training)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()


def policy():
    return Forecasts((3, 5, 0))


def original():
    return Forecasts((7, 3, 5))


def rows(bits=ROWS):
    """-> (B, 30): tokens with these bits under the policy; row b begins with word b."""
    model, found = policy(), []
    for first, row in enumerate(bits):
        tokens = [first]
        for column, count in enumerate(row):
            turn = model.turns[0] * column + model.turns[1] * tokens[-1]
            tokens.append((count - 1 - turn) % 16)
        found.append(WORDS[tokens])
    return torch.stack(found)


def ended(tokens, ends):
    """(B, T), {row: column} -> (B, T): an eos in that column of the row, which is filled up with eos from there."""
    tokens = tokens.clone()
    for row, column in ends.items():
        tokens[row, column:] = EOS
    return tokens


# ---- models that write and judge ---------------------------------------------------------------------------

REVIEWS = 32
SHORT = 6  # words: fewer than a prompt has


@functools.cache
def words():
    """Some 400 words in no order: a language of its own, of which the stand-ins know every word."""
    order = torch.Generator().manual_seed(1)
    parts = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return [parts[i] + parts[j] for i, j in torch.randint(len(parts), (400, 2), generator=order).tolist()]


@functools.cache
def reviews():
    """-> list of str: reviews of 12 to 40 words."""
    order = torch.Generator().manual_seed(2)
    lengths = torch.randint(12, 41, (REVIEWS,), generator=order).tolist()
    return [" ".join(words()[i] for i in torch.randint(400, (n,), generator=order).tolist()) for n in lengths]


def tokenizer():
    """The policy's: a word is a token; pads on the left with eos, as the course's notebook sets it."""
    vocabulary = {word: 100 + 7 * i for i, word in enumerate(dict.fromkeys(words()))} | {"<|endoftext|>": EOS}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|endoftext|>")
    return with_old_names(
        PreTrainedTokenizerFast(tokenizer_object=bare, padding_side="left", model_max_length=1024, **ends))


def with_old_names(tokenizer):
    """A tokenizer with the methods that transformers 5 no longer has, and the course's version had."""
    tokenizer.batch_encode_plus = tokenizer.encode_plus = tokenizer.__call__
    return tokenizer


def writer():
    """A GPT-2 with random weights that writes the tokenizer's words, some far more likely than others."""
    torch.manual_seed(3)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False, eos_token_id=EOS, bos_token_id=EOS)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.mul_(10)
        # Coordinate 0 of what the last layer sees is always 10: the ids that are no words get -100, eos +2.
        model.transformer.ln_f.weight.fill_(1.0)[0] = 0.0
        model.transformer.ln_f.bias.fill_(0.0)[0] = 10.0
        model.lm_head.weight.normal_(std=0.35)[:, 0] = -10.0
        model.lm_head.weight[list(tokenizer().get_vocab().values()), 0] = 0.0
        model.lm_head.weight[EOS, 0] = 0.2
    return model


def scorer():
    """-> a DistilBERT with random weights whose P(positive) depends on the text, its tokenizer."""
    torch.manual_seed(4)
    reader = with_old_names(demo.world.scorer_tokenizer(reviews()))
    model = demo.world.new_classifier(reader, demo.world.Size(*[0] * 4, 0, 32, 2, 0, 0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)
        model.classifier.bias -= model(**reader(reviews(), padding=True, return_tensors="pt")).logits.mean(dim=0)
    return model, reader


def no_accelerator():
    """Makes .cuda() do nothing, and Apple's MPS look absent. For a process of its own."""
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.backends.mps.is_available = lambda: False


def given(name):
    """-> {name of a global: stand-in} for a function of the course; several names for one thing, as people do."""
    found = {"device": torch.device("cpu"), "tokenizer": tokenizer(), "orig_model": original()}
    found |= {"reward_model": None, "reward_tokenizer": None, "model": policy()}
    if name == "compute_reward_for_mini_batch":
        found["model"] = found["orig_model"] = writer()
        found["reward_model"], found["reward_tokenizer"] = scorer()
    others = {"orig_model": ("ref_model", "reference_model", "original_model", "base_model"), "model": ("policy",)}
    return found | {other: found[name] for name, names in others.items() for other in names}
