"""Sections 2 and 3: REINFORCE with a per-token KL penalty.

Samples a completion of each prompt, scores it with the classifier, and makes what was rewarded more likely:

    L' = L + alpha * KL(policy ‖ original),     L = -mean_b( r(x_b) * log p(x_b) )        (Williams 1992)

alpha is how much reward a nat of KL, summed over a completion, costs. Left out on purpose: a critic,
clipping, a second step on the same samples, reward normalization. --advantage loo is the one variance
reduction, and unbiased.

    python reinforce.py --alpha 0    --out runs/course/alpha-0          # section 2
    python reinforce.py --alpha 0.02 --out runs/course/alpha-0.02       # section 3
"""

import torch

from common import (completion_logits, completion_mask, decode, log_probs, masked_sum, noise_on, sample, seeded,
                    token_kl, token_logps, update)
from reward import SAMPLE_EVERY, evaluate, log_samples, positivity
from support import command, loading
from support.ranks import all_gather, rank_slice


def reinforce_loss(logps, mask, reward):
    """(B, N), (B, N), (B,) -> (): its gradient is minus the policy gradient; its value means nothing.

        L = -mean_b( reward_b * sum_t log p(token_bt) )       Williams (1992), the assignment's section 2

    With rewards in [0, 1] it is never negative, and it can fall while the policy gets worse: watch the
    reward instead. The reward is a number, not a function of the weights, so it is detached. ValueError if
    the shapes disagree.
    """
    if logps.dim() != 2 or reward.shape != logps.shape[:1]:
        shapes = f"reward {tuple(reward.shape)} does not match logps {tuple(logps.shape)}"
        raise ValueError(f"{shapes}: they must be (B,) and (B, N)")
    return -(reward.detach() * masked_sum(logps, mask)).mean()


def leave_one_out(reward):
    """(B,) -> (B,): each reward minus the mean of the batch's others (a row alone keeps its reward).

    A baseline that does not depend on the row's own sample keeps the gradient's mean. Kool et al. (2019), "Buy
    4 REINFORCE samples, get a baseline for free!", take samples of one prompt; these are other prompts', so
    what prompts differ by stays in. The mean of all B would leave (B-1)/B of it, so alpha would weigh more.
    """
    others = (reward.sum() - reward) / max(len(reward) - 1, 1)
    return reward - others


def train(policy, reference, tokenizer, scorer, prompts, test_prompts, run):
    """Trains the policy in place on prompts (n, P), in eval mode: no dropout. run: support.runs.Run."""
    args, device = run.args, policy.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    order, noise = seeded(args.seed, "train order"), seeded(args.seed, "sampling")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.bf16)
    progress = run.resume(policy=policy, optimizer=optimizer, noise=noise)  # goes on where it was cut off
    for _ in range(args.epochs):
        shuffled = torch.randperm(len(prompts), generator=order)
        for step, rows in progress.steps(shuffled.split(args.batch_size)):
            if (step - 1) % SAMPLE_EVERY == 0:
                log_samples(policy, tokenizer, scorer, test_prompts, run, step - 1)
            uniform = noise_on(device, noise, len(rows), args.completion_len)  # (B, N)
            own, weight = rank_slice(len(rows))  # all of the B rows and 1, unless torchrun deals them out
            with autocast, torch.no_grad():
                tokens = sample(policy, prompts[rows[own]].to(device), uniform[own])  # (B, T)
                reward = positivity(scorer, decode(tokenizer, tokens))  # (B,)
                ref_logits = completion_logits(reference, tokens, args.completion_len)  # (B, N, V)
            completions = tokens[:, prompts.shape[1] :]  # (B, N)
            mask = completion_mask(completions, policy.config.eos_token_id)  # (B, N)
            advantage = leave_one_out(all_gather(reward, len(rows)))[own] if args.advantage == "loo" else reward

            with autocast:  # anew, for the bf16 weights that it has made under no_grad have no gradient
                logp = log_probs(completion_logits(policy, tokens, args.completion_len))  # (B, N, V)
            kl = masked_sum(token_kl(logp, log_probs(ref_logits)), mask).mean()  # nats per completion
            loss = reinforce_loss(token_logps(logp, completions), mask, advantage) + args.alpha * kl
            (weight * loss).backward()
            metrics = {"reward": reward.mean(), "kl": kl, "loss": loss, "mean_length": mask.sum(1).float().mean()}
            progress.log(step=step, **update(policy, optimizer, step, metrics, weight, args.max_grad_norm))
    log_samples(policy, tokenizer, scorer, test_prompts, run, progress.step)  # the last look


def main(argv=None):
    flags = command.training_flags(__doc__, batch_size=32, lr=1e-4, epochs=1)
    add = flags.add_argument
    cost = "reward that a nat of a completion's KL costs (%(default)s)"
    add("--alpha", type=command.not_negative, default=0.0, help=cost)
    advantage = "weight of log p: the reward, or what it has over the others' mean (%(default)s)"
    add("--advantage", choices=("reward", "loo"), default="reward", help=advantage)
    run = command.open_run(flags, argv, "reinforce.py")
    policy, tokenizer = loading.load_policy(run.args, run.device)
    reference = loading.load_reference(run.args.reference or run.args.policy, policy)
    scorer = loading.load_scorer(run.args, run.device)
    prompts = loading.load_prompts(run.args, "train", tokenizer, seeded(run.args.seed, "train subset"))
    test_prompts = loading.load_prompts(run.args, "test", tokenizer, seeded(0, "test order"))

    run.start(policy=policy, reference=reference, classifier=scorer.model, prompts=prompts)
    train(policy, reference, tokenizer, scorer, prompts, test_prompts, run)
    run.save_model(policy, tokenizer)
    run.finish(**evaluate(policy, reference, tokenizer, scorer, test_prompts, run))


if __name__ == "__main__":
    command.launch(main)
