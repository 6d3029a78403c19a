"""Section 4: Direct Preference Optimization (Rafailov et al., 2023).

No sampling and no reward model in training: a positive and a negative completion of the same prompt, and a loss
that widens the gap between their log-probabilities, measured from where the original model had it:

    L = -log sigmoid( beta * ( log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x) ) )       (equation 7)

Left out on purpose: label smoothing, length normalization, other losses of the family, a supervised first phase.

    python dpo.py --beta 0.1 --out runs/course/beta-0.1
"""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runs
from common import (check_length, checked_grad_norm, completion_logits, encode, generator, load_policy,
                    load_reference, masked_sum, pick_device, token_logps)
from reward import SAMPLE_EVERY, evaluate, load_scorer, load_test_prompts, log_samples

COLUMNS = ("prompt", "positive_completion", "negative_completion")


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """four (B,) -> (B,) losses, (B,) margins: Rafailov et al. (2023), equation 7. Log-probs are sums over tokens.

    The margin is beta times the log-ratio of the chosen minus that of the rejected completion, the logit of
    "chosen is better". At policy = reference it is 0 and the loss ln 2, for any beta. ValueError if shapes differ.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if any(other.shape != policy_chosen_logps.shape for other in logps):
        raise ValueError(f"the log-probs' shapes differ: {', '.join(str(tuple(other.shape)) for other in logps)}")
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    margins = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(margins), margins  # log(sigmoid(-800)) would be -inf


class Pair(NamedTuple):
    prompt: list  # token ids
    chosen: list
    rejected: list


def split_completions(prompts, chosen, rejected):
    """three lists of str -> the same, each completion now exactly what follows its prompt, and how that was found.

    Two layouts, decided once for all rows: completions that repeat the prompt lose it (a row that does not follow
    gets None); others continue it as they stand, or after a space where the data set never writes one itself.
    """

    def repeats(prompt, texts):
        return all(text.startswith(prompt) for text in texts)

    rows = list(zip(prompts, chosen, rejected, strict=True))
    if sum(repeats(prompt, texts) for prompt, *texts in rows) > len(rows) / 2:
        cut = [[t.removeprefix(p) for t in texts] if repeats(p, texts) else [None, None] for p, *texts in rows]
        layout = "completions repeat their prompt, which is taken off"
    elif any(p[-1:].isspace() or c[:1].isspace() or r[:1].isspace() for p, c, r in rows):
        cut, layout = [texts for _, *texts in rows], "completions continue their prompt as they stand"
    else:
        cut = [[" " + text if text else "" for text in texts] for _, *texts in rows]
        layout = "no text has a space where prompt and completion meet, so one is put in"
    return prompts, [c for c, _ in cut], [r for _, r in cut], layout


def make_pair(prompt, chosen, rejected, eos, max_len):
    """Three lists of ids -> a Pair of at most max_len tokens a side; None without a prompt or a completion token.

    Truncation takes from the completion's end, and eos stands only where nothing was taken.
    """
    room = max_len - len(prompt)
    if not prompt or room < 1 or not chosen or not rejected:
        return None
    return Pair(prompt, [*chosen, eos][:room], [*rejected, eos][:room])


def load_pairs(name, tokenizer, eos, max_len):
    """Hub name or local folder -> {"train": [Pair], "test": [Pair]}. Prompt and completion are encoded apart.

    Encoded together, a token could straddle the border, and no mask could tell prompt from completion.
    """
    columns = {split: runs.load_columns("--pairs", name, split, COLUMNS) for split in ("train", "test")}
    sizes = [len(columns["train"][0]), len(columns["test"][0])]
    *texts, layout = split_completions(*(columns["train"][c] + columns["test"][c] for c in range(3)))
    ids = [encode(tokenizer, [text or "" for text in column]) for column in texts]
    pairs = [make_pair(*row, eos, max_len) for row in zip(*ids, strict=True)]
    print(f"pairs: {layout}")
    splits = {"train": pairs[: sizes[0]], "test": pairs[sizes[0] :]}
    for split, rows in splits.items():
        splits[split] = [pair for pair in rows if pair]
        print(f"{split} pairs: {len(splits[split])} of {len(rows)}; {rows.count(None)} keep no completion token")
        if not splits[split]:
            raise runs.UserError(f"--pairs {name}: no {split} pair has two completions and a prompt below --max-len")
    return splits


def collate(pairs, device):
    """list of B Pairs -> tokens (2B, T), attention (2B, T), mask (2B, N): the chosen rows, then the rejected ones.

    Prompts end and completions begin at the same column. The pad's id does not matter: attention and mask hide it.
    """
    prompts = [pair.prompt for pair in pairs] * 2
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width, length = max(map(len, prompts)), max(map(len, completions))  # P, N
    tokens = torch.zeros(len(prompts), width + length, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        filled = slice(width - len(prompt), width + len(completion))
        tokens[row, filled] = torch.tensor(prompt + completion)
        attention[row, filled] = 1
    return tokens.to(device), attention.to(device), attention[:, width:].bool().to(device)


def pair_logps(model, pairs):
    """list of B Pairs -> (B,), (B,): log p(completion | prompt) of the chosen and the rejected, in one forward."""
    tokens, attention, mask = collate(pairs, model.device)
    logits = completion_logits(model, tokens, mask.shape[1], attention)  # (2B, N, V)
    logps = masked_sum(token_logps(logits, tokens[:, -mask.shape[1] :]), mask)  # (2B,)
    return logps.chunk(2)


@torch.no_grad()
def all_logps(model, pairs, batch_size, desc):
    """list of n Pairs -> (n, 2) on the CPU: chosen and rejected log-probs, without a graph."""
    starts = tqdm(range(0, len(pairs), batch_size), desc=desc, unit="batch", dynamic_ncols=True)
    return torch.cat([torch.stack(pair_logps(model, pairs[i : i + batch_size]), dim=1).cpu() for i in starts])


def accuracy(margins):
    """(B,) -> (): share of pairs whose chosen completion is preferred; a tie counts one half."""
    return (margins > 0).float().mean() + (margins == 0).float().mean() / 2


def test(policy, pairs, reference_logps, run):
    """Loss, accuracy and margin over the test pairs, by the names that eval.json has for them."""
    logps = all_logps(policy, pairs, run.args.batch_size, "test pairs")
    losses, margins = dpo_loss(*logps.T, *reference_logps.T, run.args.beta)
    means = {"test_loss": losses.mean(), "test_accuracy": accuracy(margins), "test_margin": margins.mean()}
    return {name: mean.item() for name, mean in means.items()}


def train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run):
    """Trains the policy in place on pairs["train"] -> the last test's numbers. reference_logps: split -> (n, 2)."""
    args, device = run.args, policy.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    order = generator(args.seed, "train order")
    step = 0
    log_samples(policy, tokenizer, scorer, test_prompts, run, step)
    tested = test(policy, pairs["test"], reference_logps["test"], run)
    run.log(epoch=0, **tested)
    for epoch in range(1, args.epochs + 1):
        shuffled = torch.randperm(len(pairs["train"]), generator=order)
        loop = tqdm(shuffled.split(args.batch_size), desc=f"epoch {epoch}", unit="step", dynamic_ncols=True)
        for rows in loop:
            step, start = step + 1, time.perf_counter()
            chosen_logps, rejected_logps = pair_logps(policy, [pairs["train"][row] for row in rows])  # (B,), (B,)
            ref_chosen_logps, ref_rejected_logps = reference_logps["train"][rows].to(device).T  # (B,), (B,)
            losses, margins = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, args.beta)
            loss = losses.mean()

            optimizer.zero_grad()
            loss.backward()
            grad_norm = checked_grad_norm(step, loss, policy)
            optimizer.step()

            seconds = time.perf_counter() - start
            means = {"loss": loss, "accuracy": accuracy(margins), "margin": margins.mean()}
            means |= {"chosen_logp": chosen_logps.mean(), "rejected_logp": rejected_logps.mean()}
            means = {name: mean.item() for name, mean in means.items()}
            run.log(step=step, **means, grad_norm=grad_norm, seconds=seconds)
            loop.set_postfix(loss=f"{means['loss']:.4f}", accuracy=f"{means['accuracy']:.2f}")
            if step % SAMPLE_EVERY == 0:
                log_samples(policy, tokenizer, scorer, test_prompts, run, step)
        tested = test(policy, pairs["test"], reference_logps["test"], run)
        run.log(epoch=epoch, **tested)
        tqdm.write(f"epoch {epoch}: test loss {tested['test_loss']:.4f}, accuracy {tested['test_accuracy']:.3f}")
    return tested


def main(argv=None):
    flags = runs.training_flags(runs.parser(__doc__), batch_size=16, lr=5e-7, epochs=2)
    flags.add_argument("--pairs", default=runs.COURSE["pairs"], help="pairs: hub name or local folder (%(default)s)")
    flags.add_argument("--beta", type=runs.positive, default=0.1, help="how strongly the reference holds (%(default)s)")
    flags.add_argument("--max-len", type=runs.count, default=128, help="tokens of prompt + completion (%(default)s)")
    args = flags.parse_args(argv)
    run = runs.Run(args, "dpo.py")
    device = pick_device(args.device)
    policy, tokenizer = load_policy(args.policy, device, args.precision)
    check_length(policy, args.prompt_len + args.completion_len, "--prompt-len + --completion-len")
    check_length(policy, args.max_len, "--max-len")
    reference = load_reference(args.reference or args.policy, policy, device, args.precision)
    scorer = load_scorer(args.reward_model, device, args.positive_label, args.precision)
    pairs = load_pairs(args.pairs, tokenizer, policy.config.eos_token_id, args.max_len)
    subset = torch.randperm(len(pairs["train"]), generator=generator(args.seed, "train subset"))[: args.limit]
    pairs = {"train": [pairs["train"][row] for row in subset], "test": pairs["test"][: args.eval_limit]}
    test_prompts = load_test_prompts(args, tokenizer)

    run.start(str(device))
    reference_logps = {}
    for split, rows in pairs.items():
        reference_logps[split] = all_logps(reference, rows, args.batch_size, f"reference, {split} pairs")
    tested = train(policy, reference_logps, tokenizer, scorer, pairs, test_prompts, run)
    run.save_model(policy, tokenizer)
    run.finish(**evaluate(policy, reference, tokenizer, scorer, test_prompts, run), **tested)


if __name__ == "__main__":
    runs.launch(main)
