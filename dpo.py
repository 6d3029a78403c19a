"""Section 4: Direct Preference Optimization (Rafailov et al., 2023).

No sampling and no reward model, except to watch: a positive and a negative completion of the same prompt,
and a loss that widens the gap between their log-probabilities, from where the original model had it:

    L = -log sigmoid( beta * ( log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x) ) )       (equation 7)

Left out on purpose: label smoothing, length normalization, the family's other losses, supervised training.

    python dpo.py --beta 0.1 --out runs/course/beta-0.1
"""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import checked_grad_norm, completion_logits, load_policy, load_reference, masked_sum, seeded
from reward import SAMPLE_EVERY, evaluate, load_scorer, load_test_prompts, log_samples
from support import runs
from support.checkpoint import Progress
from support.families import check_length, encode, encode_after, opening
from support.fast import like_lengths, logps_and_kl, parts, pick_device
from support.loading import load_columns
from support.ranks import summed, turns

COLUMNS = ("prompt", "positive_completion", "negative_completion")


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


def split_completions(prompts, chosen, rejected):
    """Three lists of str -> chosen, rejected, now just what follows the prompt, and a sentence on the layout.

    Two layouts, decided once for all rows. Completions that repeat the prompt lose it ("" where a row does
    not follow). Others continue it as they stand, or after a space if the data set never writes one itself.
    """
    rows = list(zip(prompts, chosen, rejected, strict=True))
    repeats = [c.startswith(p) and r.startswith(p) for p, c, r in rows]
    if sum(repeats) > len(rows) / 2:
        texts = [(c.removeprefix(p), r.removeprefix(p)) for p, c, r in rows]
        texts = [both if repeat else ("", "") for both, repeat in zip(texts, repeats, strict=True)]
        layout = "completions repeat their prompt, which is taken off"
    elif any(p[-1:].isspace() or c[:1].isspace() or r[:1].isspace() for p, c, r in rows):
        texts = [(c, r) for _, c, r in rows]
        layout = "completions continue their prompt as they stand"
    else:
        texts = [(c and " " + c, r and " " + r) for _, c, r in rows]
        layout = "no text has a space where prompt and completion meet, so one is put in"
    return [c for c, _ in texts], [r for _, r in texts], layout


def make_pair(prompt, chosen, rejected, eos, max_len):
    """Three lists of ids -> a Pair of at most max_len tokens a side; None if a part would have no token.

    Truncation takes from the completion's end, and eos stands only where nothing was taken.
    """
    room = max_len - len(prompt)
    if not prompt or room < 1 or not chosen or not rejected:
        return None
    return Pair(prompt, [*chosen, eos][:room], [*rejected, eos][:room])


def load_pairs(name, tokenizer, eos, max_len):
    """Hub name or local folder -> {"train": [Pair], "test": [Pair]}.

    Prompt and completion are encoded apart: a token of the joined text could straddle their border, and no
    mask could then tell one from the other.
    """
    train, test = (load_columns("--pairs", name, split, COLUMNS) for split in ("train", "test"))
    prompts, chosen, rejected = (train[column] + test[column] for column in range(3))
    chosen, rejected, layout = split_completions(prompts, chosen, rejected)
    print(f"pairs: {layout}")
    first = opening(tokenizer)  # a bos, or nothing
    prompts = [ids and first + ids for ids in encode(tokenizer, prompts)]
    ids = (prompts, encode_after(tokenizer, chosen), encode_after(tokenizer, rejected))
    pairs = [make_pair(*row, eos, max_len) for row in zip(*ids, strict=True)]
    splits = {"train": pairs[: len(train[0])], "test": pairs[len(train[0]) :]}
    for split, rows in splits.items():
        splits[split] = [pair for pair in rows if pair]
        why = "an empty text, another layout, or no room under --max-len"
        print(f"{split} pairs: {len(splits[split])} of {len(rows)}; {rows.count(None)} left out ({why})")
        if not splits[split]:
            raise runs.UserError(f"--pairs {name}: no {split} pair is left: each has {why}")
    return splits


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
    logits = completion_logits(model, tokens, mask.shape[1], attention)  # (2B, N, V)
    logps, _ = logps_and_kl(logits, tokens[:, -mask.shape[1] :])  # (2B, N)
    return masked_sum(logps, mask).chunk(2)


def widths(pairs):
    """List of n Pairs -> (n,): the columns that each pair's completions need, the longer one's tokens."""
    return torch.tensor([max(len(pair.chosen), len(pair.rejected)) for pair in pairs])


@torch.no_grad()
def all_logps(model, pairs, batch_size, desc):
    """List of n Pairs -> (n, 2) on the CPU: chosen and rejected log-probs, without a graph."""
    logps = torch.zeros(len(pairs), 2)
    longest_first = widths(pairs).argsort(descending=True, stable=True)  # like lengths together: little padding
    for rows in tqdm(longest_first.split(batch_size)[turns()], desc=desc, unit="batch", dynamic_ncols=True):
        logps[rows] = torch.stack(pair_logps(model, [pairs[row] for row in rows]), dim=1).cpu()
    return summed(logps)  # of all ranks: each batch is one rank's, and 0 on the others


def accuracy(margins):
    """(B,) -> (): share of pairs whose chosen completion is preferred; a tie counts one half."""
    return (margins > 0).float().mean() + (margins == 0).float().mean() / 2


def on_test_pairs(policy, pairs, reference_logps, run):
    """Loss, accuracy and margin over the test pairs, with the names they have in eval.json."""
    logps = all_logps(policy, pairs, run.args.micro_batch or run.args.batch_size, "test pairs")
    losses, margins = dpo_loss(*logps.T, *reference_logps.T, run.args.beta)
    means = {"test_loss": losses.mean(), "test_accuracy": accuracy(margins), "test_margin": margins.mean()}
    return {name: mean.item() for name, mean in means.items()}


def train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run):
    """Trains the policy in place on pairs["train"]; reference_logps[split]: (n, 2) -> the last test's numbers."""
    args, device = run.args, policy.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    order = seeded(args.seed, "train order")
    progress = Progress(run, policy=policy, optimizer=optimizer, reference_logps=reference_logps)  # may go on
    if progress.step == 0:
        run.log(epoch=0, **on_test_pairs(policy, pairs["test"], reference_logps["test"], run))
    for epoch in range(1, args.epochs + 1):
        batches = like_lengths(widths(pairs["train"]), args.batch_size, order)
        for step, rows in progress.steps(batches, f"epoch {epoch}"):
            if (step - 1) % SAMPLE_EVERY == 0:
                log_samples(policy, tokenizer, scorer, test_prompts, run, step - 1)
            start = time.perf_counter()
            ref_logps = reference_logps["train"][rows].to(device).T  # (2, B): chosen, rejected

            found = torch.zeros(4, len(rows), device=device)
            for part, share in parts(len(rows), args.micro_batch):  # one part with all rows, but for --micro-batch
                logps = pair_logps(policy, [pairs["train"][row] for row in rows[part]])  # (B,), (B,)
                losses, margins = dpo_loss(*logps, *ref_logps[:, part], args.beta)
                (share * losses.mean()).backward()  # adds to .grad: in the end, the gradient of the whole batch's mean
                found[:, part] = torch.stack([losses, margins, *logps]).detach()
            losses, margins, chosen_logps, rejected_logps = summed(found, policy)  # of all ranks; gradients, too
            loss = losses.mean()
            grad_norm = checked_grad_norm(step, {"loss": loss}, policy, args.max_grad_norm)
            optimizer.step()

            seconds = time.perf_counter() - start
            run.log(step=step, loss=loss.item(), accuracy=accuracy(margins).item(), margin=margins.mean().item(),
                    chosen_logp=chosen_logps.mean().item(), rejected_logp=rejected_logps.mean().item(),
                    chosen_logratio=(chosen_logps - ref_logps[0]).mean().item(),
                    rejected_logratio=(rejected_logps - ref_logps[1]).mean().item(),
                    grad_norm=grad_norm, seconds=seconds)
            progress.show(loss=f"{loss.item():.4f}", accuracy=f"{accuracy(margins).item():.2f}")
            optimizer.zero_grad()  # here, since the tests want the memory
        if progress.step == epoch * len(batches):  # not an epoch that was over before the checkpoint
            tested = on_test_pairs(policy, pairs["test"], reference_logps["test"], run)
            run.log(epoch=epoch, **tested)
            print(f"epoch {epoch}: test loss {tested['test_loss']:.4f}, accuracy {tested['test_accuracy']:.3f}")
    log_samples(policy, tokenizer, scorer, test_prompts, run, progress.step)  # the last look
    return tested


def main(argv=None):
    flags = runs.training_flags(runs.parser(__doc__), batch_size=16, lr=5e-7, epochs=2)
    flags.set_defaults(precision="fp32")  # at this lr weights move less than bf16 can see: SPEED.md
    add = flags.add_argument
    add("--pairs", default=runs.COURSE["pairs"], help="hub name or local folder (%(default)s)")
    add("--beta", type=runs.positive, default=0.1, help="hold of the original: larger moves less (%(default)s)")
    add("--max-len", type=runs.count, default=128, help="tokens of prompt + completion at most (%(default)s)")
    args = flags.parse_args(argv)
    run = runs.Run(args, "dpo.py")
    device, precision = pick_device(args.device, args.precision)
    policy, tokenizer = load_policy(args.policy, device, precision)
    check_length(policy, args.prompt_len + args.completion_len, "--prompt-len + --completion-len", tokenizer)
    check_length(policy, args.max_len, "--max-len")
    reference = load_reference(args.reference or args.policy, policy, device, precision)
    scorer = load_scorer(args.reward_model, device, args.positive_label, precision)
    pairs = load_pairs(args.pairs, tokenizer, policy.config.eos_token_id, args.max_len)
    subset = torch.randperm(len(pairs["train"]), generator=seeded(args.seed, "train subset"))[: args.limit]
    pairs = {"train": [pairs["train"][row] for row in subset], "test": pairs["test"][: args.eval_limit]}
    test_prompts = load_test_prompts(args, tokenizer)

    run.start(str(device), precision, policy=policy, reference=reference, pairs=pairs)
    size = args.micro_batch or args.batch_size
    reference_logps = run.saved.get("parts", {}).get("reference_logps") or {
        split: all_logps(reference, rows, size, f"reference, {split} pairs") for split, rows in pairs.items()}
    reference.cpu()  # until the evaluation it is only in the way
    tested = train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run)
    run.save_model(policy, tokenizer)
    run.finish(**evaluate(policy, reference.to(device), tokenizer, scorer, test_prompts, run), **tested)


if __name__ == "__main__":
    runs.launch(main)
