"""The toy world of `make demo`: film reviews from a grammar, and two small models trained on them.

Writes the folders that the course gets from the model hub, in the same formats: policy/ (a GPT-2),
reward_model/ (a DistilBERT), prompts/ (reviews and labels) and pairs/ (a positive and a negative completion of
a prompt). The other scripts run on it unchanged. Nothing here is needed to follow them.

    python -m demo.world --out build/toy
"""

import math
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

from common import completion_logits, decode, log_probs, masked_sum, seeded, token_logps
from demo import grammar
from reward import positivity
from support import command, files
from support.encoding import encode
from support.errors import UserError
from support.loading import Scorer
from support.progress import Bar
from support.runs import lock

POSITIONS = 128  # tokens that the models can read
CUT = 30  # tokens: what the reward model reads in the demo, 10 of the prompt and 20 of the completion


class Size(NamedTuple):
    reviews: int  # of the training split
    test_reviews: int
    pairs: int
    test_pairs: int
    policy_width: int
    classifier_width: int
    layers: int  # of both
    batch_size: int
    epochs: int


# Less than a minute on two cores, for a policy that is nearly as good as the grammar lets it be.
SIZE = Size(reviews=10_000, test_reviews=1_000, pairs=1_000, test_pairs=300, policy_width=96,
            classifier_width=64, layers=2, batch_size=32, epochs=2)


# ---- tokenizers: without training, so that they are the same everywhere ------------------------------------


def policy_tokenizer(texts):
    """GPT-2's kind: bytes, so that it can write anything, but each word of the texts is one token."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for text in texts for word, _ in bytewise.pre_tokenize_str(text)}  # with the space before them
    vocabulary = dict.fromkeys(["<|endoftext|>", *sorted(bytewise.alphabet()), *sorted(words)])
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def scorer_tokenizer(texts):
    """DistilBERT's kind: lower-case words, and the characters of a word that is in none of the texts."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = {word for text in texts for word in re.findall(r"\w+|\S", text.lower())}
    characters = sorted({character for word in words for character in word})
    inside = ["##" + character for character in characters]
    vocabulary = dict.fromkeys([*special.values(), *characters, *inside, *sorted(words)])
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, tokenizer.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **special)


# ---- models ------------------------------------------------------------------------------------------------


def new_policy(tokenizer, size):
    """A GPT-2 with random weights."""
    eos = tokenizer.eos_token_id
    shape = {"vocab_size": len(tokenizer), "n_positions": POSITIONS, "n_embd": size.policy_width, "n_head": 4}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(**shape, n_layer=size.layers, **no_dropout, bos_token_id=eos, eos_token_id=eos)
    return GPT2LMHeadModel(config)


def new_classifier(tokenizer, size, labels=("LABEL_0", "LABEL_1")):
    """A DistilBERT with random weights; label names in the order of their index, the course's by default."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "n_heads": 4}
    shape |= {"dim": size.classifier_width, "hidden_dim": 4 * size.classifier_width, "n_layers": size.layers}
    no_dropout = {"dropout": 0, "attention_dropout": 0, "seq_classif_dropout": 0}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = DistilBertConfig(**shape, **no_dropout, **names, pad_token_id=tokenizer.pad_token_id)
    return DistilBertForSequenceClassification(config)


def padded(rows):
    """List of B lists of ids -> (B, longest), filled on the right with -100, the label of what is not trained."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)


def fit(model, batches, lr, desc):
    """Trains on a list of batches, the keywords of a forward with labels; the lr rises, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    bar = Bar(batches, desc, "step")
    for batch in bar:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.show(loss=loss.item())
    return model.eval()


def shuffled(count, batch_size, epochs, order):
    """-> lists of row numbers: every row once an epoch, in batches."""
    orders = [torch.randperm(count, generator=order) for _ in range(epochs)]
    return [rows.tolist() for shuffled_rows in orders for rows in shuffled_rows.split(batch_size)]


# ---- measures ----------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexities(policy, tokenizer, texts, tallies, firsts):
    """-> perplexity a token on the texts: the policy's, and the grammar's own, the lowest possible.

    Both are given a text's first token, which nothing comes before: its probability under the grammar is taken
    from `firsts`, a Counter of the training texts' first tokens.
    """
    ids = [[*row, tokenizer.eos_token_id] for row in encode(tokenizer, texts)]
    policy_nats = grammar_nats = 0.0
    for start in range(0, len(ids), 100):
        labels = padded(ids[start : start + 100])  # (B, T)
        tokens, mask = labels.clamp(min=0), labels != -100
        logits = completion_logits(policy, tokens, tokens.shape[1] - 1)  # (B, T-1, V)
        policy_nats -= masked_sum(token_logps(log_probs(logits), tokens[:, 1:]), mask[:, 1:]).sum().item()
    for row, tally in zip(ids, tallies, strict=True):
        first = math.log(max(firsts[row[0]], 1) / firsts.total())
        grammar_nats -= grammar.log_probability(tally) - first
    count = sum(len(row) - 1 for row in ids)
    return math.exp(policy_nats / count), math.exp(grammar_nats / count)


def share_right(scores, labels):
    """P(positive) of each text, and its label, 0 or 1 -> the share of texts on the right side of one half."""
    return sum((score > 0.5) == (label == 1) for score, label in zip(scores, labels, strict=True)) / len(labels)


# ---- the world ---------------------------------------------------------------------------------------------


def save_model(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_world(folder, size=SIZE, seed=0):
    """Writes policy/, reward_model/, prompts/ and pairs/ into the folder -> what it measured, for world.json."""
    rng, order, seen = random.Random(seed), seeded(seed, "toy order"), set()
    torch.manual_seed(seed)  # the models' first weights
    test, tallies = grammar.write_reviews(size.test_reviews, rng, seen)
    train, _ = grammar.write_reviews(size.reviews, rng, seen)  # none of them is a test review
    pairs = [grammar.write_pairs(count, rng, seen) for count in (size.pairs, size.test_pairs)]
    files.save_rows(folder / "prompts", train=train, test=test)
    files.save_rows(folder / "pairs", train=pairs[0], test=pairs[1])
    texts, labels = [row["text"] for row in train], [row["label"] for row in train]
    test_texts, test_labels = [row["text"] for row in test], [row["label"] for row in test]

    tokenizer = policy_tokenizer(texts)
    ids = encode(tokenizer, texts)
    batches = []
    for rows in shuffled(len(ids), size.batch_size, size.epochs, order):
        target = padded([[*ids[row], tokenizer.eos_token_id] for row in rows])  # (B, T)
        batches.append({"input_ids": target.clamp(min=0), "labels": target})
    policy = fit(new_policy(tokenizer, size), batches, lr=5e-3, desc="policy")
    save_model(folder / "policy", policy, tokenizer)

    reader = scorer_tokenizer(texts)
    batches = []
    for rows in shuffled(len(ids), size.batch_size, size.epochs, order):
        cuts = [ids[row][: rng.randint(5, 2 * len(ids[row]))] for row in rows]  # about half of them whole
        inputs = reader(decode(tokenizer, cuts), return_tensors="pt", padding=True, truncation=True)
        batches.append({**inputs, "labels": torch.tensor([labels[row] for row in rows])})
    classifier = fit(new_classifier(reader, size), batches, lr=1e-3, desc="reward model")
    save_model(folder / "reward_model", classifier, reader)

    scorer = Scorer(classifier, reader, positive=1)
    cuts = decode(tokenizer, [row[:CUT] for row in encode(tokenizer, test_texts)])
    perplexity, best = perplexities(policy, tokenizer, test_texts, tallies, Counter(row[0] for row in ids))
    return {
        "size": size._asdict(),
        "policy_parameters": policy.num_parameters(),
        "perplexity": perplexity,
        "grammars_perplexity": best,
        "reward_model_parameters": classifier.num_parameters(),
        "accuracy": share_right(positivity(scorer, test_texts).tolist(), test_labels),
        "best_accuracy": share_right(map(grammar.positive, tallies), test_labels),
        "accuracy_of_cuts": share_right(positivity(scorer, cuts).tolist(), test_labels),
    }


def main(argv=None):
    flags = command.bare_flags(__doc__)
    flags.add_argument("--out", required=True, type=Path, help="the world's folder, a new one (required)")
    flags.add_argument("--seed", type=command.number(int, 0), default=0, help="of texts and models (%(default)s)")
    args = flags.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already; remove it (rm -r {args.out}) or give another folder")
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    transformers.utils.logging.disable_progress_bar()  # a bar for each file of weights
    transformers.utils.logging.set_verbosity_error()  # that no loss is named, when the usual one is meant
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock(unfinished)
        for path in unfinished.iterdir():  # of a world that was cut off
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found = make_world(unfinished, seed=args.seed)
        files.write_whole(unfinished / "world.json", files.to_json(found, indent=2))
        os.replace(unfinished, args.out)  # a world is there whole or not at all
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror or error}") from None
    print(f"{args.out}, measured on {SIZE.test_reviews} reviews that are not in the training split:")
    print(f"policy: {found['policy_parameters']:,} parameters, perplexity {found['perplexity']:.3f} a token; "
          f"the grammar's own, the lowest possible: {found['grammars_perplexity']:.3f}")
    print(f"reward model: {found['reward_model_parameters']:,} parameters, accuracy {found['accuracy']:.3f}; "
          f"the best possible: {found['best_accuracy']:.3f}; "
          f"of the first {CUT} tokens: {found['accuracy_of_cuts']:.3f}")


if __name__ == "__main__":
    command.launch(main)
