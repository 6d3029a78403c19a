"""Section 4: Direct Preference Optimization (Rafailov et al., 2023).

No sampling and no reward model, except to watch: a positive and a negative completion of the same prompt,
and a loss that widens the gap between their log-probabilities, from where the original model had it:

    L = -log sigmoid( beta * ( log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x) ) )       (equation 7)

Left out on purpose: label smoothing, length normalization, the family's other losses, supervised training.

    python dpo.py --beta 0.1 --out runs/course/beta-0.1
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import completion_logits, log_probs, masked_sum, seeded, token_logps, update
from reward import SAMPLE_EVERY, evaluate, log_samples
from support import command, loading
from support.ranks import all_reduce, micro_batches


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """Four (B,) -> (B,) losses, (B,) margins: Rafailov et al. (2023), equation 7.

    Log-probs are sums over the completion's tokens, not means. The margin is the logit of "chosen is
    better": beta times the difference of the two log-ratios; at policy = reference it is 0, and the loss
    ln 2, for any beta. ValueError if the shapes differ.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if logps[0].dim() != 1 or any(other.shape != logps[0].shape for other in logps):
        shapes = ", ".join(str(tuple(other.shape)) for other in logps)
        names = "policy_chosen, policy_rejected, reference_chosen, reference_rejected"
        raise ValueError(f"{names}_logps must all be (B,), not {shapes}")
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    margins = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(margins), margins  # log(sigmoid(-800)) would be -inf


class Pair(NamedTuple):
    prompt: list  # token ids
    chosen: list
    rejected: list


def make_pair(prompt, chosen, rejected, eos, max_len):
    """Three lists of ids -> a Pair of at most max_len tokens a side; None if a part would have no token.

    Truncation takes from the completion's end, and eos stands only where nothing was taken.
    """
    room = max_len - len(prompt)
    if not prompt or room < 1 or not chosen or not rejected:
        return None
    return Pair(prompt, [*chosen, eos][:room], [*rejected, eos][:room])


def collate(pairs, device):
    """List of B Pairs -> tokens (2B, T), attention (2B, T), mask (2B, N): chosen rows, then rejected ones.

    All prompts end at the same column. The padding's id does not matter: attention and mask hide it. The
    mask is the attention of the completion's columns: its eos is a token like any other.
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) for prompt, _ in rows)  # P
    length = max(len(completion) for _, completion in rows)  # N
    tokens = torch.zeros(len(rows), width + length, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(rows):
        filled = slice(width - len(prompt), width + len(completion))
        tokens[row, filled] = torch.tensor(prompt + completion)
        attention[row, filled] = 1
    return tokens.to(device), attention.to(device), attention[:, width:].bool().to(device)


def pair_logps(model, pairs):
    """List of B Pairs -> (B,), (B,): log p(completion | prompt), chosen and rejected, in one forward."""
    tokens, attention, mask = collate(pairs, model.device)
    logp = log_probs(completion_logits(model, tokens, mask.shape[1], attention))  # (2B, N, V)
    return masked_sum(token_logps(logp, tokens[:, -mask.shape[1] :]), mask).chunk(2)


@torch.no_grad()
def all_logps(model, pairs, run, desc):
    """List of n Pairs -> (n, 2) on the CPU: chosen and rejected log-probs, without a graph."""
    logps = torch.zeros(len(pairs), 2)
    longest_first = loading.widths(pairs).argsort(descending=True, stable=True)  # like lengths together: little padding
    batches = longest_first.split(run.args.micro_batch or run.args.batch_size)
    for rows in run.deal(batches, desc):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=run.bf16):
            logps[rows] = torch.stack(pair_logps(model, [pairs[row] for row in rows]), dim=1).cpu()
    all_reduce(logps)  # each batch is one rank's, and 0 on the others
    return logps


def accuracy(margins):
    """(B,) -> (): share of pairs whose chosen completion is preferred; a tie counts one half."""
    return (margins > 0).float().mean() + (margins == 0).float().mean() / 2


def on_test_pairs(policy, pairs, reference_logps, run):
    """Loss, accuracy and margin over the test pairs, with the names they have in eval.json."""
    logps = all_logps(policy, pairs, run, "test pairs")
    losses, margins = dpo_loss(*logps.T, *reference_logps.T, run.args.beta)
    means = {"test_loss": losses.mean(), "test_accuracy": accuracy(margins), "test_margin": margins.mean()}
    return {name: mean.item() for name, mean in means.items()}


def batch_means(losses, margins, logps, ref_logps):
    """(B,), (B,), chosen and rejected (B,) of policy and reference -> dict of (): what is logged."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logps, ref_logps
    found = {"loss": losses, "margin": margins, "chosen_logp": chosen, "rejected_logp": rejected,
             "chosen_logratio": chosen - ref_chosen, "rejected_logratio": rejected - ref_rejected}
    return {"accuracy": accuracy(margins), **{name: values.detach().mean() for name, values in found.items()}}


def train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run):
    """Trains the policy in place on pairs["train"]; reference_logps[split]: (n, 2) -> test numbers."""
    args, device, pairs, test_pairs = run.args, policy.device, pairs["train"], pairs["test"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    order = seeded(args.seed, "train order")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.bf16)
    progress = run.resume(policy=policy, optimizer=optimizer, reference_logps=reference_logps)
    if progress.step == 0:
        run.log(epoch=0, **on_test_pairs(policy, test_pairs, reference_logps["test"], run))
    for epoch in range(1, args.epochs + 1):
        for step, rows in progress.steps(loading.like_lengths(loading.widths(pairs), args.batch_size, order)):
            if (step - 1) % SAMPLE_EVERY == 0:
                log_samples(policy, tokenizer, scorer, test_prompts, run, step - 1)
            ref_logps, metrics = reference_logps["train"][rows].to(device).T, {}  # (2, B): chosen, rejected
            for part, weight in micro_batches(len(rows), args.micro_batch):  # one: all rows and 1
                with autocast:
                    logps = pair_logps(policy, [pairs[row] for row in rows[part]])  # (B,), (B,)
                losses, margins = dpo_loss(*logps, *ref_logps[:, part], args.beta)
                (weight * losses.mean()).backward()  # adds up to the gradient of the batch's mean
                metrics = {name: metrics.get(name, 0) + weight * mean
                           for name, mean in batch_means(losses, margins, logps, ref_logps[:, part]).items()}
            progress.log(step=step, **update(policy, optimizer, step, metrics, max_norm=args.max_grad_norm))
        if progress.step == progress.end:  # not an epoch that was over before the checkpoint
            tested = on_test_pairs(policy, test_pairs, reference_logps["test"], run)
            run.log(epoch=epoch, **tested)
            print(f"epoch {epoch}: test loss {tested['test_loss']:.4f}, accuracy {tested['test_accuracy']:.3f}")
    log_samples(policy, tokenizer, scorer, test_prompts, run, progress.step)  # the last look
    return tested


def main(argv=None):
    flags = command.training_flags(__doc__, batch_size=16, lr=5e-7, epochs=2)
    flags.set_defaults(precision="fp32")  # at this lr weights move less than bf16 can see: docs/speed.md
    add = flags.add_argument
    add("--pairs", default=command.COURSE["pairs"], help="hub name or local folder (%(default)s)")
    add("--beta", type=command.positive, default=0.1, help="factor in the loss: larger moves less (%(default)s)")
    add("--max-len", type=command.count, default=128, help="tokens of prompt + completion at most (%(default)s)")
    add("--micro-batch", type=command.count, metavar="B", help="pairs in memory at a time (the whole batch)")
    run = command.open_run(flags, argv, "dpo.py")
    args = run.args
    policy, tokenizer = loading.load_policy(args, run.device)
    loading.check_length(policy, args.max_len, "--max-len")
    reference = loading.load_reference(args.reference or args.policy, policy)
    scorer = loading.load_scorer(args, run.device)
    fitting = partial(make_pair, eos=policy.config.eos_token_id, max_len=args.max_len)
    pairs = loading.load_pairs(args, tokenizer, seeded(args.seed, "train subset"), fitting)
    test_prompts = loading.load_prompts(args, "test", tokenizer, seeded(0, "test order"))

    run.start(policy=policy, reference=reference, pairs=pairs)
    reference_logps = run.saved.get("parts", {}).get("reference_logps") or {
        split: all_logps(reference, rows, run, f"reference, {split} pairs") for split, rows in pairs.items()}
    reference.cpu()  # until the evaluation it is only in the way
    tested = train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run)
    run.save_model(policy, tokenizer)
    run.finish(**evaluate(policy, reference.to(run.device), tokenizer, scorer, test_prompts, run), **tested)


if __name__ == "__main__":
    command.launch(main)
