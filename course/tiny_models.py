"""Tiny offline stand-ins for what a solution of the course works on, made so that answers are known on paper.

Ids and widths are GPT-2's (50,257 words, the last one eos, which is also the padding), so that numbers that a
solution has as literals fit: 10 prompt tokens, 20 more, 50256.
"""

import functools

import torch

# transformers' parts are imported where they are used: its models take a second, which the losses need not wait for.

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
        from transformers import GPT2Config

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

    def forward(self, input_ids=None, *_, labels=None, **__):
        from transformers.modeling_outputs import CausalLMOutput

        logits = self.table[self.row(input_ids)]  # (B, T, V)
        self.dropped |= self.training
        logits = torch.nn.functional.dropout(logits, 0.1, self.training)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def policy():
    return Forecasts((3, 5, 0))


def original():
    return Forecasts((7, 3, 5))


def rows():
    """-> (4, 30): tokens with ROWS' bits under the policy; row b begins with word b."""
    model, found = policy(), []
    for first, row in enumerate(ROWS):
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

@functools.cache
def words():
    """Some 400 words in no order: a language of its own, of which the stand-ins know every word."""
    order = torch.Generator().manual_seed(1)
    parts = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return [parts[i] + parts[j] for i, j in torch.randint(len(parts), (400, 2), generator=order).tolist()]


@functools.cache
def reviews():
    """-> list of str: reviews of 12 to 40 words. The first repeats itself, for a sampler that may not."""
    order = torch.Generator().manual_seed(2)
    lengths = torch.randint(12, 41, (16,), generator=order).tolist()
    rows = [[words()[i] for i in torch.randint(400, (n,), generator=order).tolist()] for n in lengths]
    return [" ".join(row) for row in (rows[0][:3] * 4, *rows[1:])]


@functools.cache
def ids():
    """-> (W,): the ids of the words and of eos, the last; all others have no word."""
    return torch.tensor(sorted(tokenizer().get_vocab().values()))


def of_words(vocabulary, **options):
    """{word: id} -> a tokenizer: a word is a token, and what is none is the `unk_token`.

    It has the methods that transformers 5 no longer has, and the course's version had.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel(vocabulary, unk_token=options["unk_token"]))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=bare, **options)
    found.batch_encode_plus = found.encode_plus = found.__call__
    return found


def tokenizer():
    """The policy's: it pads on the left with eos, as the course's notebook sets it."""
    vocabulary = {word: 100 + 7 * i for i, word in enumerate(dict.fromkeys(words()))} | {"<|endoftext|>": EOS}
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return of_words(vocabulary, padding_side="left", model_max_length=1024, **special)


def writer():
    """A GPT-2 with random weights that writes the tokenizer's words, some far more likely than others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False, eos_token_id=EOS, bos_token_id=EOS)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.mul_(10)
        # Coordinate 0 of what the last layer sees is always 10: the ids that are no words get -40, eos +2.
        model.transformer.ln_f.weight.fill_(1.0)[0] = 0.0
        model.transformer.ln_f.bias.fill_(0.0)[0] = 10.0
        model.lm_head.weight.normal_(std=0.35)[:, 0] = -4.0
        model.lm_head.weight[ids(), 0] = 0.0
        model.lm_head.weight[EOS, 0] = 0.2
    return model


def scorer():
    """-> a DistilBERT with random weights whose P(positive) depends on the text, its tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special.values(), *words()]))}
    reader = of_words(vocabulary, model_max_length=512, **special)
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    reader.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    torch.manual_seed(4)
    config = DistilBertConfig(dim=32, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=len(vocabulary))
    model = DistilBertForSequenceClassification(config).eval()
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
    found = {"device": torch.device("cpu"), "tokenizer": tokenizer(), "reward_model": None, "reward_tokenizer": None}
    found |= {"model": policy(), "orig_model": original()}
    if name == "compute_reward_for_mini_batch":
        found["model"] = found["orig_model"] = writer()
        found["reward_model"], found["reward_tokenizer"] = scorer()
    others = ("ref_model", "reference_model", "original_model", "base_model")
    return found | dict.fromkeys(others, found["orig_model"]) | {"policy": found["model"]}
