"""Section 1: how positive are the reviews that a language model writes?

A sentiment classifier's P(positive) of prompt + completion is the reward. evaluate(), which the training
scripts share, goes through the test split: mean reward, KL to the original, how varied the text is.

    python reward.py --out runs/course/baseline                             # the untouched policy
    python reward.py --out runs/mine --policy runs/course/alpha-0.02/model  # any checkpoint
    python reward.py --out runs/course/samples-32 --samples-per-prompt 32 --eval-limit 500
"""

import time

import torch
from tqdm import tqdm

from common import (completion_logits, completion_mask, decode, log_probs, masked_sum, noise_on, sample, seeded,
                    token_kl, token_logps)
from support import command, loading
from support.statistics import summary

SAMPLES = 5  # completions shown of every policy, always of the same prompts
SAMPLE_EVERY = 50  # training steps between two looks at them
FEW = 2  # rows that are scored at a time: (2, N, V) is 8 MB, which stays in a processor's cache


@torch.no_grad()
def positivity(scorer, texts):
    """List of B str -> (B,): the reward, P(positive) in [0, 1]. Text over the classifier's length is cut."""
    options = {"padding": True, "truncation": True, "split_special_tokens": True}
    inputs = scorer.tokenizer(texts, return_tensors="pt", **options).to(scorer.model.device)
    logits = scorer.model(**inputs).logits.float()
    if logits.shape[1] == 1 or scorer.model.config.problem_type == "multi_label_classification":
        return logits.sigmoid()[:, scorer.positive]  # no choice between labels; the softmax of one logit is 1
    return logits.softmax(dim=-1)[:, scorer.positive]


@torch.no_grad()
def evaluate(policy, reference, tokenizer, scorer, prompts, run):
    """Samples completions of each prompt (n, P) -> dict for eval.json; writes completions.jsonl.

    reward and kl are means over the n prompts, reward_se and kl_se their standard errors. kl is the exact
    KL(policy ‖ reference) at each token, summed over the completion: nats per completion. mean_length counts
    tokens, the eos too. Of several samples of a prompt, distinct_2 and "samples" take the first one.
    """
    start, device, k = time.perf_counter(), policy.device, run.args.samples_per_prompt
    prompts = prompts.repeat_interleave(k, dim=0)  # k completions of each, one behind the other
    batch_size = run.args.eval_batch_size or (256 if device.type == "cuda" else 64)
    found = []
    for batch in run.deal(torch.arange(len(prompts)).split(batch_size), "evaluate"):
        uniform = test_noise(run.args, batch, device, k)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
            rows = complete(policy, reference, tokenizer, scorer, prompts[batch].to(device), uniform)
        found += zip(batch.tolist(), rows, strict=True)
    found = sorted(run.gather(found), key=lambda pair: pair[0])  # by place: a prompt's may be two ranks'
    rows = [{"number": place // k, **row} for place, row in found]
    result = summary(rows, k, SAMPLES)  # stops the run before a nan is written
    run.completions(rows)
    return {**result, "seconds": time.perf_counter() - start}


def test_noise(args, places, device, k=1):
    """(B,) places among the completions, k of each prompt -> (B, N) in [0, 1): the numbers that draw them.

    They follow from --seed and the places of prompt, sample and token alone, whatever k, limit, length, batch
    and device are: each policy meets a prompt with the same numbers, so differences are paired.
    """
    uses = [f"evaluation, prompt {place // k}, sample {place % k}" for place in places.tolist()]
    return torch.stack([noise_on(device, seeded(args.seed, use), args.completion_len) for use in uses])


def complete(policy, reference, tokenizer, scorer, prompts, uniform):
    """(B, P), (B, N) -> list of B dicts: what is known of each completion."""
    # What the policy forecast while it sampled serves again: no second forward.
    tokens, logits = sample(policy, prompts, uniform, keep_logits=True)  # (B, T), (B, N, V)
    completions = tokens[:, prompts.shape[1] :]  # (B, N)
    mask = completion_mask(completions, policy.config.eos_token_id)
    starts, ends, texts = texts_of(tokenizer, tokens, uniform.shape[1])
    reward = positivity(scorer, texts)  # (B,)

    # In section 1 the reference is the policy: nothing to compute twice.
    ref_logits = logits if reference is policy else completion_logits(reference, tokens, uniform.shape[1])
    parts = zip(*(part.split(FEW) for part in (logits, ref_logits, completions, mask)), strict=True)
    kl, logps, ref_logps = torch.cat([score(*part) for part in parts], dim=1).tolist()
    columns = {"prompt": starts, "completion": ends, "text": texts, "reward": reward.tolist(), "kl": kl,
               "logp": logps, "reference_logp": ref_logps, "length": mask.sum(dim=-1).tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def score(logits, ref_logits, completions, mask):
    """(B, N, V) twice, (B, N) twice -> (3, B), sums over the completions: KL, log-probs, the reference's."""
    logp, ref_logp = log_probs(logits), log_probs(ref_logits)
    values = token_kl(logp, ref_logp), token_logps(logp, completions), token_logps(ref_logp, completions)
    return torch.stack([masked_sum(value, mask) for value in values])


def texts_of(tokenizer, tokens, length):
    """(B, T), N -> three lists of B str: prompts, completions, and both in one.

    Decoded alone, some tokenizers' completions would lose the space before their first word. A character whose
    first bytes are the prompt's and whose last bytes are sampled stands in the completion.
    """
    texts, prompts = decode(tokenizer, tokens), decode(tokenizer, tokens[:, :-length])
    starts = [prompt.rstrip("\ufffd") for prompt in prompts]  # a character cut in two decodes to this
    return starts, [text[len(start) :] for text, start in zip(texts, starts, strict=True)], texts


@torch.no_grad()
def log_samples(policy, tokenizer, scorer, prompts, run, step):
    """Continues the first few prompts with the evaluation's numbers: rewards alone hide a collapse."""
    prompts = prompts[:SAMPLES].to(policy.device)
    uniform = test_noise(run.args, torch.arange(len(prompts)), policy.device)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=run.bf16):
        starts, ends, texts = texts_of(tokenizer, sample(policy, prompts, uniform), uniform.shape[1])
        rewards = positivity(scorer, texts).tolist()
    for start, end, reward in zip(starts, ends, rewards, strict=True):
        run.sample(step=step, prompt=start, completion=end, reward=reward)
    tqdm.write(f"step {step}, reward {rewards[0]:.2f}: {starts[0]!r} -> {ends[0]!r}")


def main(argv=None):
    flags = command.flags(__doc__)
    which = "whose reviews begin the prompts (%(default)s); train: the first --limit, for pairs"
    flags.add_argument("--split", choices=("test", "train"), default="test", help=which)
    run = command.open_run(flags, argv, "reward.py")
    args, device = run.args, run.device
    policy, tokenizer = loading.load_policy(args, device)
    original = args.reference or command.COURSE["policy"]
    reference = policy if original == args.policy else loading.load_reference(original, policy)
    scorer = loading.load_scorer(args, device)
    # A constant seed, here as in training: --eval-limit n (of train --limit n) is the same n prompts in every run.
    prompts = loading.load_prompts(args, args.split, tokenizer, seeded(0, f"{args.split} order"))

    run.start()
    run.finish(**evaluate(policy, reference, tokenizer, scorer, prompts, run))


if __name__ == "__main__":
    command.launch(main)
