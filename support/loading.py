"""What comes from outside: models and data sets, from the hub or a local folder. Whatever is wrong becomes one line."""

import contextlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from support.encoding import encode, encode_after, first_tokens, opening
from support.errors import UserError
from support.families import check_forecasts, end_token, fit_padding, head_name, most_words, positions

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # no writer types them
REPEAT = "repeat their prompt, which is taken off"
PUT_IN = "after a space, put in as no completion begins with one"


@contextlib.contextmanager
def loading(flag, name, kind):
    """Around a library's loading call: checks a local path first; whatever goes wrong becomes one line."""
    folder = Path(name).is_dir()
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} {name}: there is no such folder")
    transformers.utils.logging.disable_progress_bar()  # a bar for each weight read from disk
    huggingface_hub.utils.enable_progress_bars()  # but downloads show theirs
    logging.disable(logging.CRITICAL)  # the libraries' own warnings: what matters becomes the error below
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__  # it knows the row
        reason = " ".join(str(error).split()).partition(" for this kind of AutoModel")[0]  # a list of all kinds
        reason, advice = reason[:300] or type(error).__name__, ""
        if "SafetensorError" in (type(error).__name__, type(error.__cause__).__name__):
            advice = ": model.safetensors is cut off or broken, copy or download it anew"
        elif isinstance(error, UnicodeError):
            advice = ": save its files as UTF-8"
        elif "instantiate the backend tokenizer" in reason:
            advice = ": put a tokenizer's files beside the model's (save_pretrained)"
            reason = "nothing there can be read as one"
        elif isinstance(error, OSError) and not folder:  # other errors: it was found, but is wrong
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            variable = "POLICY" if flag == "--reference" else flag.removeprefix("--").upper().replace("-", "_")
            advice = (f": no such folder here; check the name and the network{offline} and call again (what has been "
                      f"downloaded is kept), or give a local folder (to make: {variable}=FOLDER)")
            reason = re.split(r"\. | For more information", reason)[0]
        raise UserError(f"{flag} {name} cannot be loaded as {kind}{advice} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)


# ---- models ------------------------------------------------------------------------------------------------


def load_tokenizer(flag, name):
    """The tokenizer of a model, by hub name or local folder."""
    with loading(flag, name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library returns where it finds none
        raise UserError(f"{flag} {name} has no tokenizer: put its files beside the model's (save_pretrained)")
    return tokenizer


def load_model(auto_class, kind, flag, name, device):
    """A model in eval mode, so without dropout, with fp32 weights whatever the checkpoint's are."""
    with loading(flag, name, kind):
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "activation_function", None) == "gelu_new":  # GPT-2's
            config.activation_function = "gelu_pytorch_tanh"  # the same function, one operation instead of eight
        attention = "eager" if device.type == "cpu" else None  # for rows this short faster than the fused one
        options = {"config": config, "dtype": torch.float32, "attn_implementation": attention}
        model, info = auto_class.from_pretrained(name, **options, output_loading_info=True)
    if info["missing_keys"]:  # the library would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{flag} {name} is not {kind}: its checkpoint has no {missing}")
    return model.eval().to(device)


def load_policy(args, device):
    """--policy -> (language model, tokenizer); model.config has one eos_token_id and a vocab_size."""
    flag, name = "--policy", args.policy
    model = load_model(AutoModelForCausalLM, "a language model", flag, name, device)
    tokenizer = load_tokenizer(flag, name)
    eos = model.config.eos_token_id = end_token(model, tokenizer)
    if eos is None:
        raise UserError(f"{flag} {name}: neither config.json nor the tokenizer names an end token (eos_token_id)")
    model.config.vocab_size = model.config.get_text_config().vocab_size  # which a model that reads images hides
    most, has = most_words(tokenizer, eos), model.get_input_embeddings().num_embeddings
    if most > has:
        raise UserError(f"{flag} {name}: its tokenizer has {most} words, the model only {has}")
    with loading(flag, name, "a policy that keeps keys and values and reads padded rows"):
        check_forecasts(model)
    model.head_name = head_name(model)
    check_length(model, args.prompt_len + args.completion_len, "--prompt-len + --completion-len", tokenizer)
    return model, tokenizer


def load_reference(name, policy):
    """The original model, without gradients, for a policy of the same vocabulary."""
    model = load_model(AutoModelForCausalLM, "a language model", "--reference", name, policy.device)
    words = model.config.get_text_config().vocab_size
    if words != policy.config.vocab_size:
        sizes = f"{words} words, the policy {policy.config.vocab_size}"
        raise UserError(f"--reference {name} has a vocabulary of {sizes}: there is no KL between them")
    model.head_name = head_name(model)
    return model.requires_grad_(False)


def check_length(model, length, flags, tokenizer=None):
    """UserError if the model has fewer positions than the flags ask for, and the tokenizer writes before a text."""
    own, longest = len(opening(tokenizer)) if tokenizer else 0, positions(model)
    if longest and length + own > longest:
        more = f" and {own} that the tokenizer adds" * bool(own)
        raise UserError(f"{flags} = {length} tokens{more}, but the policy has {longest} positions")


class Scorer(NamedTuple):
    model: torch.nn.Module
    tokenizer: object  # cuts what is too long for the model
    positive: int  # the positive label's index


def load_scorer(args, device):
    """--reward-model, a sentiment classifier -> Scorer."""
    flag, name = "--reward-model", args.reward_model
    model = load_model(AutoModelForSequenceClassification, "a classifier", flag, name, device)
    positive = positive_index(model.config.id2label, args.positive_label, f"{flag} {name}")
    tokenizer = load_tokenizer(flag, name)
    with loading(flag, name, "a classifier"):
        fit_padding(model, tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions(model) or 512)
    return Scorer(model, tokenizer, positive)


def positive_index(id2label, wanted=None, source="--reward-model"):
    """{index: label name} -> index of the label `wanted`, else of the positive one; UserError if unclear.

    Beside "very positive" it is unclear. A single label must be the positive one, too, or the one wanted: its logit
    says how likely that is.
    """
    names = {index: str(label).casefold() for index, label in id2label.items()}
    sounding = [name for name in names.values() if re.search("positive|(?<![a-z])pos(?![a-z])", name)]
    accepted = [wanted.casefold()] if wanted else sounding if sounding in (["positive"], ["pos"]) else []
    if not wanted and sorted(names.values()) in (["label_0"], ["label_0", "label_1"]):
        accepted = [f"label_{len(names) - 1}"]  # the course's model, and those with a single logit
    found = [index for index, name in names.items() if name in accepted]
    if len(found) != 1:
        unclear = f"which of the labels {', '.join(map(str, id2label.values()))} is {wanted or 'positive'}"
        raise UserError(f"{source}: cannot tell {unclear}; name one with --positive-label")
    return found[0]


# ---- data --------------------------------------------------------------------------------------------------


def load_prompts(args, split, tokenizer, order):
    """-> (n, P) LongTensor: the first --prompt-len tokens of a split's reviews, shuffled by the Generator `order`.

    Before them stands what the tokenizer writes before any text: a bos, or nothing, as for GPT-2. n is at most --limit,
    or --eval-limit. The data set is sorted by label: without the shuffle the first n would all be negative.
    Shorter reviews are left out and counted: prompts never need padding.
    """
    name, length, limit = args.prompts, args.prompt_len, args.limit if split == "train" else args.eval_limit
    (texts,) = load_columns("--prompts", name, split, ["text"])
    shuffled = [texts[row] for row in torch.randperm(len(texts), generator=order)]
    prompts = [ids for ids in first_tokens(tokenizer, shuffled, length) if len(ids) == length]
    if not prompts:
        raise UserError(f"--prompts {name}: no {split} review has {length} tokens; lower --prompt-len")
    short, prompts = len(texts) - len(prompts), prompts[:limit]
    print(f"{split} prompts: {len(prompts)} of {len(texts)} reviews; {short} have fewer than {length} tokens")
    return torch.tensor([opening(tokenizer) + ids for ids in prompts])


def load_pairs(args, tokenizer, order, make_pair):
    """--pairs -> {"train": list, "test": list} of what make_pair makes of the ids of prompt, chosen and rejected;
    --limit of them, shuffled by the torch.Generator `order`, and the first --eval-limit.

    Prompt and completion are encoded apart: a token of the joined text could straddle their border, and no mask could
    then tell one from the other. Rows of which make_pair makes None, or two equal sides, are left out and counted.
    """
    first, pairs = opening(tokenizer), {}  # a bos, or nothing
    for split in ("train", "test"):
        columns = load_columns("--pairs", args.pairs, split, ("prompt", "positive_completion", "negative_completion"))
        prompts, chosen, rejected, layout = split_completions(*columns, f"--pairs {args.pairs}, split {split}")
        prompts = [ids and first + ids for ids in encode(tokenizer, prompts)]
        rows = list(map(make_pair, prompts, encode_after(tokenizer, chosen), encode_after(tokenizer, rejected)))
        pairs[split] = [pair for pair in rows if pair and pair.chosen != pair.rejected]  # equal: no gradient
        equal = len(rows) - rows.count(None) - len(pairs[split])
        why = f"{rows.count(None)} with an empty text or no room under --max-len, {equal} with two equal sides"
        print(f"{split} pairs: {len(pairs[split])} of {len(rows)}; left out: {why}\n  {layout}")
        if not pairs[split]:
            raise UserError(f"--pairs {args.pairs}: no {split} pair is left; left out: {why}")
    subset = torch.randperm(len(pairs["train"]), generator=order)[: args.limit]
    return {"train": [pairs["train"][row] for row in subset], "test": pairs["test"][: args.eval_limit]}


def widths(pairs):
    """List of n Pairs -> (n,): the columns that each pair's completions need, the longer one's tokens."""
    return torch.tensor([max(len(pair.chosen), len(pair.rejected)) for pair in pairs])


def like_lengths(lengths, batch_size, order, window=50):
    """(n,) -> list of LongTensors: batches of rows in random order, those of a batch of like length.

    All rows are shuffled by the Generator `order`; each `window` batches' worth of them is then sorted by length and
    cut into batches, and the batches are shuffled. So a batch holds little padding, and long rows come at any time.
    """
    batches = []
    for rows in torch.randperm(len(lengths), generator=order).split(window * batch_size):
        batches += rows[lengths[rows].argsort(stable=True)].split(batch_size)
    return [batches[index] for index in torch.randperm(len(batches), generator=order)]


def split_completions(prompts, chosen, rejected, source):
    """Three lists of str -> prompts, chosen and rejected, now just what follows the prompt; a sentence on the layout.

    A completion that begins with its prompt repeats it, and loses it; any other one continues it. But a prompt of one
    word may begin its continuation by chance: UserError with the row (of `source`) if one side alone has it, and does
    not have it in all rows. White space at a prompt's end becomes the completions': tokens begin with their space.
    """
    texts, repeats, layouts = [], [], []
    space = "" if any(re.match(r"\s+\S", text) for text in (*chosen, *rejected)) else " "  # for both sides alike
    for side in (chosen, rejected):
        found = [after_prompt(prompt, text, space) for prompt, text in zip(prompts, side, strict=True)]
        ways = [way for _, way in found]
        texts.append([text if text.strip() else "" for text, _ in found])
        repeats.append([way == REPEAT for way in ways])
        layouts.append(", ".join(f"{ways.count(way)} of {len(ways)} {way}" for way in sorted(set(ways))))
    told = any(map(all, repeats))  # one side does in all rows
    for row, prompt in enumerate(prompts):
        if repeats[0][row] != repeats[1][row] and len(prompt.split()) == 1 and not told:
            sides = f"of {chosen[row]!r:.40} and {rejected[row]!r:.40} only one begins with the prompt {prompt!r:.40}"
            raise UserError(f"{source}, row {row}: {sides}, and one word may do so by chance: let both begin with it, "
                            "or take the row out; rows count from 0")
    layout = "completions: {}" if layouts[0] == layouts[1] else "chosen completions: {}; rejected ones: {}"
    return [prompt.rstrip() for prompt in prompts], *texts, layout.format(*layouts)


def after_prompt(prompt, completion, space):
    """-> what follows the prompt's last word, and the way it does: after `space` if there is no white space."""
    words, text = prompt.strip(), completion.lstrip()
    if words and text.startswith(words):
        return text.removeprefix(words), REPEAT
    text = prompt[len(prompt.rstrip()) :] + completion
    if text[:1].isspace():
        return text, "continue their prompt after white space"
    return space + text, f"continue their prompt {PUT_IN if space else 'without white space'}"


def load_columns(flag, name, split, columns):
    """The named text columns of a data set's split (hub name or local folder): lists of str.

    UserError with the row (from 0) and the column for what is no text. Any text is taken as it stands; if it holds
    control characters, as broken files do, that is said.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with loading(flag, name, "a data set"):
        splits = datasets.load_dataset(name)
    if split not in splits:
        raise UserError(f"{flag} {name} has no split {split!r}; it has {', '.join(splits)}")
    source, there = f"{flag} {name}, split {split}", splits[split].column_names
    for column in columns:
        if column not in there:
            raise UserError(f"{source}, has no column {column!r}; it has {', '.join(there)}")
    with loading(flag, name, "a data set"):
        texts = [splits[split][column][:] for column in columns]
        rows = json_rows(name, split)
    for column, values in zip(columns, texts, strict=True):
        given = [row.get(column) for row in rows] if len(rows) == len(values) else values
        for row, value in enumerate(given):
            if not isinstance(value, str):
                kind = "not a text" + (", but missing (so is an empty cell of a csv file)" if value is None else "")
                raise UserError(f"{source}, row {row}, column {column}: {value!r:.80} is {kind}; rows count from 0")
        if odd := [row for row, value in enumerate(values) if CONTROL.search(value)]:
            where = f"{source}, column {column}: {len(odd)} of {len(values)} texts, the first in row {odd[0]}"
            print(f"{where}, hold control characters and are taken as they stand")
    return texts


def json_rows(name, split):
    """The rows of a local folder's .json or .jsonl files as they were written; [] for any other data.

    datasets gives all splits the types of the first rows: where those are texts, a later 42 would become "42".
    """
    import datasets

    rows = []
    for path in datasets.load_dataset_builder(name).config.data_files[split] if Path(name).is_dir() else ():
        if not path.endswith((".json", ".jsonl")):
            return []
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError:  # not an object a line, but one value
            found = [json.loads(text)]
        rows += found[0] if isinstance(found[0], list) else found
    return rows
