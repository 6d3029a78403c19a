"""Sections 2 and 3: REINFORCE with a per-token KL penalty.

Samples a completion of each prompt, scores it with the classifier, and makes what was rewarded more likely:

    L' = L + alpha * KL(policy ‖ original),     L = -mean_b( r(x_b) * log p(x_b) )        (Williams 1992)

alpha is how much reward a nat of KL, summed over a completion, costs. Left out on purpose: a critic,
clipping, a second step on the same samples, reward normalization. --advantage loo is the one variance
reduction, and unbiased.

    python reinforce.py --alpha 0    --out runs/course/alpha-0          # section 2
    python reinforce.py --alpha 0.02 --out runs/course/alpha-0.02       # section 3
"""

import time

import torch

from common import (checked_grad_norm, completion_logits, completion_mask, load_policy, load_prompts, load_reference,
                    masked_sum, sample, seeded)
from reward import SAMPLE_EVERY, evaluate, load_scorer, load_test_prompts, log_samples, positivity
from support import runs
from support.checkpoint import Progress
from support.families import check_length, decode
from support.fast import logps_and_kl, parts, pick_device
from support.ranks import gathered, mine, summed


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


def token_kl(logits, ref_logits):
    """(B, N, V) twice -> (B, N): exact KL(policy ‖ reference) in nats at each position (section 3).

        KL = sum_v p(v) * (log p(v) - log q(v)),   p the policy, q the reference, v the whole vocabulary

    The gradient flows through p and log p. It leaves out that an early token changes which contexts come
    later: biased, on purpose, for far less variance than the sampled form. The loop takes the same numbers from
    fast.logps_and_kl, together with the log-probs. ValueError if the shapes disagree.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"ref_logits {tuple(ref_logits.shape)} do not match logits {tuple(logits.shape)}")
    logp = logits.float().log_softmax(dim=-1)
    logq = ref_logits.float().log_softmax(dim=-1)
    # A word of probability 0 adds 0, where 0 * (-inf) would add nan.
    return (logp.exp() * (logp - logq).masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


def leave_one_out(reward):
    """(B,) -> (B,): each reward minus the mean of the batch's others (a row alone keeps its reward).

    A baseline that does not depend on the row's own sample keeps the gradient's mean and cuts its variance.
    The mean of all B would not do: it holds the row's own reward and shrinks the gradient by (B-1)/B.
    Kool et al. (2019), "Buy 4 REINFORCE samples, get a baseline for free!"
    """
    others = (reward.sum() - reward) / max(len(reward) - 1, 1)
    return reward - others


def train(policy, reference, tokenizer, scorer, prompts, test_prompts, run):
    """Trains the policy in place on prompts (n, P); samples.jsonl follows the first few test prompts."""
    args, device = run.args, policy.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    order, noise = seeded(args.seed, "train order"), seeded(args.seed, "sampling", device)
    progress = Progress(run, policy=policy, optimizer=optimizer, noise=noise)  # goes on where a run was cut off
    for epoch in range(1, args.epochs + 1):
        shuffled = torch.randperm(len(prompts), generator=order)
        for step, rows in progress.steps(shuffled.split(args.batch_size), f"epoch {epoch}"):
            if (step - 1) % SAMPLE_EVERY == 0:
                log_samples(policy, tokenizer, scorer, test_prompts, run, step - 1)
            start = time.perf_counter()
            own = mine(len(rows))  # of the B rows: all, but with torchrun (ranks.py)
            tokens = sample(policy, prompts[rows].to(device), args.completion_len, noise, own=own)
            reward = positivity(scorer, decode(tokenizer, tokens))
            tokens, reward = gathered(tokens, len(rows)), gathered(reward, len(rows))  # (B, T), (B,)
            completions = tokens[:, prompts.shape[1] :]  # (B, N)
            mask = completion_mask(completions, policy.config.eos_token_id)  # (B, N)
            advantage = leave_one_out(reward) if args.advantage == "loo" else reward

            found = torch.zeros(2, device=device)  # loss, KL
            for part, share in parts(len(tokens), args.micro_batch):  # one part with all rows, but for --micro-batch
                logits = completion_logits(policy, tokens[part], args.completion_len)  # (B, N, V), B of this part
                with torch.no_grad():
                    ref_logits = completion_logits(reference, tokens[part], args.completion_len)
                logps, kls = logps_and_kl(logits, completions[part], ref_logits)  # (B, N), (B, N)
                part_kl = masked_sum(kls, mask[part]).mean()  # nats per completion
                part_loss = reinforce_loss(logps, mask[part], advantage[part]) + args.alpha * part_kl
                (share * part_loss).backward()  # adds to .grad: in the end, the gradient of the whole batch's mean
                found += share * torch.stack([part_loss, part_kl]).detach()
                del logits, ref_logits  # the largest tensors, before the next ones are made
            loss, kl = summed(found, policy)  # of all ranks; gradients, too
            values = {"reward": reward.mean(), "KL": kl, "loss": loss}
            grad_norm = checked_grad_norm(step, values, policy, args.max_grad_norm)
            optimizer.step()

            seconds = time.perf_counter() - start
            run.log(step=step, loss=loss.item(), reward=reward.mean().item(), kl=kl.item(), grad_norm=grad_norm,
                    tokens_per_second=mask.sum().item() / seconds, seconds=seconds)
            progress.show(reward=f"{reward.mean().item():.3f}", kl=f"{kl.item():.2f}")
            optimizer.zero_grad()  # here, since sampling wants the memory
    log_samples(policy, tokenizer, scorer, test_prompts, run, progress.step)  # the last look


def main(argv=None):
    flags = runs.training_flags(runs.parser(__doc__), batch_size=32, lr=1e-4, epochs=1)
    add = flags.add_argument
    add("--alpha", type=runs.not_negative, default=0.0, help="reward that a nat of a completion's KL costs (0)")
    advantage = "weight of log p: the reward, or what it has over the others' mean (%(default)s)"
    add("--advantage", choices=("reward", "loo"), default="reward", help=advantage)
    args = flags.parse_args(argv)
    run = runs.Run(args, "reinforce.py")
    device, precision = pick_device(args.device, args.precision)
    policy, tokenizer = load_policy(args.policy, device, precision)
    check_length(policy, args.prompt_len + args.completion_len, "--prompt-len + --completion-len", tokenizer)
    reference = load_reference(args.reference or args.policy, policy, device, precision)
    scorer = load_scorer(args.reward_model, device, args.positive_label, precision)
    order = seeded(args.seed, "train subset")
    prompts = load_prompts(args.prompts, "train", tokenizer, args.prompt_len, order, args.limit)
    test_prompts = load_test_prompts(args, tokenizer)

    run.start(str(device), precision, policy=policy, reference=reference, classifier=scorer.model, prompts=prompts)
    train(policy, reference, tokenizer, scorer, prompts, test_prompts, run)
    run.save_model(policy, tokenizer)
    run.finish(**evaluate(policy, reference, tokenizer, scorer, test_prompts, run))


if __name__ == "__main__":
    runs.launch(main)
