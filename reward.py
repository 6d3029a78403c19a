"""Section 1: how positive are the reviews that a language model writes?

A sentiment classifier's P(positive) of prompt + completion is the reward. evaluate(), which the training
scripts share, goes through the test split: mean reward, KL to the original policy, and how varied the
completions are.

    python reward.py --out runs/course/baseline                             # the untouched policy
    python reward.py --out runs/mine --policy runs/course/alpha-0.02/model  # any checkpoint
    python reward.py --out runs/course/samples-32 --samples-per-prompt 32 --eval-limit 500
"""

import math
import time
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from common import (completion_logits, completion_mask, load_policy, load_prompts, load_reference, masked_sum, sample,
                    seeded)
from report.measures import DISTINCT_TEXTS, distinct
from support import runs
from support.families import check_length, decode, decode_after, fit_classifier, load_model, load_tokenizer, positions
from support.fast import logps_and_kl, pick_device, prepare
from support.ranks import everyone, mine

SAMPLES = 5  # completions shown of every policy, always of the same prompts
SAMPLE_EVERY = 50  # training steps between two looks at them


class Scorer(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    positive: int  # the positive label's index


def positive_index(id2label, wanted=None):
    """{index: label name} -> index of the label `wanted`, else of the positive one; ValueError if unclear.

    A single label must be the positive one, too, or the one wanted: its logit says how likely that is.
    """
    names = {index: str(label).casefold() for index, label in id2label.items()}
    accepted = [wanted.casefold()] if wanted else ["positive", "pos"]
    if not wanted and sorted(names.values()) in (["label_0"], ["label_0", "label_1"]):
        accepted = [f"label_{len(names) - 1}"]  # the course's model, and those with a single logit
    found = [index for index, name in names.items() if name in accepted]
    if len(found) != 1:
        labels = ", ".join(map(str, id2label.values()))
        raise ValueError(f"cannot tell which of the labels {labels} is {wanted or 'positive'}")
    return found[0]


def load_scorer(name, device, positive_label=None, precision="fp32"):
    """Hub name or local folder of a sentiment classifier -> Scorer."""
    model = load_model(AutoModelForSequenceClassification, "a classifier", "--reward-model", name, device)
    try:
        positive = positive_index(model.config.id2label, positive_label)
    except ValueError as error:
        raise runs.UserError(f"--reward-model {name}: {error}; name one with --positive-label") from None
    tokenizer = load_tokenizer("--reward-model", name)
    fit_classifier("--reward-model", name, model, tokenizer)
    return Scorer(prepare(model, precision), tokenizer, positive)


@torch.no_grad()
def positivity(scorer, texts):
    """List of B str -> (B,): the reward, P(positive) in [0, 1]. Text over the classifier's length is cut."""
    if not texts:  # more ranks than rows
        return torch.zeros(0, device=scorer.model.device)
    longest = min(scorer.tokenizer.model_max_length, positions(scorer.model) or 512)
    options = {"padding": True, "truncation": True, "max_length": longest, "split_special_tokens": True}
    inputs = scorer.tokenizer(texts, return_tensors="pt", **options).to(scorer.model.device)
    logits = scorer.model(**inputs).logits.float()
    if logits.shape[1] == 1 or scorer.model.config.problem_type == "multi_label_classification":
        return logits.sigmoid()[:, scorer.positive]  # not a choice between labels; the softmax of one logit is 1
    return logits.softmax(dim=-1)[:, scorer.positive]


@torch.no_grad()
def evaluate(policy, reference, tokenizer, scorer, prompts, run):
    """Samples completions of each prompt (n, P) -> dict for eval.json; writes completions.jsonl.

    reward and kl are means over the n prompts, reward_se and kl_se their standard errors. kl is the exact
    KL(policy ‖ reference) at each token, summed over the completion: nats per completion. mean_length counts
    tokens, the eos too. With --samples-per-prompt, distinct_2 and the samples take the first one of each prompt.
    """
    start, device, args = time.perf_counter(), policy.device, run.args
    noise = seeded(args.seed, "evaluation", device)
    batch_size = args.eval_batch_size or (256 if device.type == "cuda" else 64)
    places = torch.arange(len(prompts) * args.samples_per_prompt)  # of the completions: k for each prompt
    batches = tqdm(places.split(batch_size), desc="evaluate", unit="batch", dynamic_ncols=True)
    rows, total = [], 0.0
    for batch in batches:
        numbers, own = batch // args.samples_per_prompt, mine(len(batch))  # own: all, but with torchrun (ranks.py)
        # What the policy forecast while it sampled serves again: no second forward.
        size = (len(batch[own]), args.completion_len, policy.config.vocab_size)
        logits = torch.zeros(size, dtype=torch.bfloat16 if policy.bf16 else None, device=device)  # (B, N, V)
        tokens = sample(policy, prompts[numbers].to(device), args.completion_len, noise, logits, own)  # (B, T)
        if not len(tokens):  # more ranks than rows
            continue
        completions = tokens[:, prompts.shape[1] :]  # (B, N)
        mask = completion_mask(completions, policy.config.eos_token_id)
        texts = decode(tokenizer, tokens)
        reward = positivity(scorer, texts)  # (B,)

        same = reference is policy  # section 1: nothing to compute twice
        ref_logits = logits if same else completion_logits(reference, tokens, args.completion_len)
        logps, kls = logps_and_kl(logits, completions, ref_logits)
        ref_logps = logps if same else logps_and_kl(ref_logits, completions)[0]
        columns = {
            "number": numbers[own].tolist(),
            "prompt": decode(tokenizer, prompts[numbers[own]]),
            "completion": decode_after(tokenizer, completions),
            "text": texts,
            "reward": reward.tolist(),
            "kl": masked_sum(kls, mask).tolist(),
            "logp": masked_sum(logps, mask).tolist(),
            "reference_logp": masked_sum(ref_logps, mask).tolist(),
            "length": mask.sum(dim=-1).tolist(),
        }
        found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows += zip(batch[own].tolist(), found, strict=True)
        total += reward.sum().item()
        if len(tokens) == len(batch):  # all rows are this rank's
            batches.set_postfix(reward=f"{total / len(rows):.4f}")

    rows = [row for _, row in sorted(everyone(rows), key=lambda pair: pair[0])]
    reward, reward_se = mean_and_error([row["reward"] for row in rows], args.samples_per_prompt)
    kl, kl_se = mean_and_error([row["kl"] for row in rows], args.samples_per_prompt)
    if not math.isfinite(reward + kl):
        raise runs.UserError(f"the test reward is {reward}, the KL {kl}: the policy is broken; try a lower --lr")
    run.completions(rows)
    firsts = rows[:: args.samples_per_prompt]
    counted = [row["completion"] for row in firsts[:DISTINCT_TEXTS]]
    return {
        "reward": reward,
        "reward_se": reward_se,
        "n": len(firsts),
        "kl": kl,
        "kl_se": kl_se,
        "distinct_2": distinct(counted, 2),
        "distinct_2_texts": len(counted),
        "mean_length": sum(row["length"] for row in rows) / len(rows),
        "seconds": time.perf_counter() - start,
        "samples": [{key: row[key] for key in ("prompt", "completion", "reward")} for row in firsts[:SAMPLES]],
    }


def log_samples(policy, tokenizer, scorer, prompts, run, step):
    """Continues the first few prompts with the same noise each time: rewards alone hide a collapse."""
    noise = seeded(run.args.seed, "samples", policy.device)
    tokens = sample(policy, prompts[:SAMPLES].to(policy.device), run.args.completion_len, noise)
    rewards = positivity(scorer, decode(tokenizer, tokens)).tolist()
    starts, ends = tokens.split([prompts.shape[1], run.args.completion_len], dim=1)
    starts, ends = decode(tokenizer, starts), decode_after(tokenizer, ends)
    for start, end, reward in zip(starts, ends, rewards, strict=True):
        run.sample(step=step, prompt=start, completion=end, reward=reward)
    tqdm.write(f"step {step}, reward {rewards[0]:.2f}: {starts[0]!r} -> {ends[0]!r}")


def mean_and_error(values, group=1):
    """List of float -> their mean and its standard error; None for the error of a single value.

    Each `group` in a row, the samples of one prompt, count as one value: they are not independent.
    """
    values = torch.tensor(values, dtype=torch.float64).view(-1, group).mean(dim=1)
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def load_test_prompts(args, tokenizer):
    """The test prompts in an order that no flag changes: --eval-limit n is the same n in every run."""
    order = seeded(0, "test order")
    return load_prompts(args.prompts, "test", tokenizer, args.prompt_len, order, args.eval_limit)


def main(argv=None):
    args = runs.parser(__doc__).parse_args(argv)
    run = runs.Run(args, "reward.py")
    device, precision = pick_device(args.device, args.precision)
    policy, tokenizer = load_policy(args.policy, device, precision)
    check_length(policy, args.prompt_len + args.completion_len, "--prompt-len + --completion-len", tokenizer)
    original = args.reference or runs.COURSE["policy"]
    reference = policy
    if original != args.policy:
        reference = load_reference(original, policy, device, precision)
    scorer = load_scorer(args.reward_model, device, args.positive_label, precision)
    prompts = load_test_prompts(args, tokenizer)

    run.start(str(device), precision)
    run.finish(**evaluate(policy, reference, tokenizer, scorer, prompts, run))


if __name__ == "__main__":
    runs.launch(main)
