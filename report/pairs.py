"""Preference pairs from a policy's own samples: the first half of the DPO pipeline (the assignment's 4.1, step 1).

    python -m report.pairs --train runs/course/train-samples-8 --test runs/course/samples-8 --out runs/course/pairs

Of the k samples of a review's first words (reward.py --samples-per-prompt k) the one with the highest reward is chosen
and the one with the lowest rejected, if they are --gap apart. Any policy will do, and any reward. Left out on purpose:
more than one pair a review. Written are train.jsonl and test.jsonl in the course's columns; a completion is the whole
text, as the classifier read it, prompt included. No prompt is in both. Loads no torch.
"""

import os
import shutil
from pathlib import Path

from report.run_folders import BROKEN, RunRecord, samples_by_prompt
from support.command import bare_flags, launch, not_negative
from support.errors import UserError
from support.files import save_rows

SAME = ("policy", "reward_model", "positive_label", "prompts", "prompt_len", "completion_len", "samples_per_prompt")


def read_samples(flag, folder, split):
    """A folder of samples of that split's prompts -> its RunRecord, and {(number, prompt): rows of its k samples}."""
    try:
        run = RunRecord(folder)
        groups = samples_by_prompt(run)
        [row[key] for rows in groups.values() for row in rows for key in ("prompt", "text")]  # a KeyError here
        script, own, count = run.about["script"], run.flags.get("split", "test"), run.result and run.result["n"]
    except BROKEN as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise UserError(f"{flag} {folder}: no run's folder, or its files are broken ({reason})") from problem
    if (script, own) != ("reward.py", split) or run.k < 2 or not count:
        found = f"a run of {script}, {own} prompts, --samples-per-prompt {run.k}" + ", not finished" * (not count)
        raise UserError(f"{flag} {folder} is {found}; wanted: reward.py --split {split} --samples-per-prompt 8")
    if len(groups) != count:
        raise UserError(f"{flag} {folder}: completions.jsonl is not whole; remove the folder and make it again")
    return run, groups


def best_and_worst(groups, gap):
    """{(number, prompt): rows} -> list of (best row, worst row), of the reviews where these are `gap` apart.

    A sample that ended at once is neither: it has no text to learn from.
    """
    pairs = []
    for rows in groups.values():
        written = [row for row in rows if row["completion"].strip()]
        best = max(written, key=lambda row: row["reward"], default=None)
        worst = min(written, key=lambda row: row["reward"], default=None)
        if written and best["reward"] - worst["reward"] >= gap:
            pairs.append((best, worst))
    return pairs


def save_pairs(groups, gap, folder):
    """{"test", "train": groups of rows}, gap -> folder, whole or not there; UserError if a split would have no pair."""
    splits, seen = {}, set()
    for split in ("test", "train"):
        pairs = best_and_worst(groups[split], gap)
        kept = [pair for pair in pairs if pair[0]["prompt"].strip() not in seen]
        close, shared = len(groups[split]) - len(pairs), len(pairs) - len(kept)
        said = (f"{split}: {len(kept)} pairs of {len(groups[split])} reviews; left out: {close} without two texts "
                f"{gap:g} apart, {shared} with a prompt of a test pair")
        if not kept:
            raise UserError(f"{said}; try more samples or a lower --gap")
        means = [sum(row["reward"] for row in side) / len(kept) for side in zip(*kept, strict=True)]
        print(f"{said}; mean reward of the chosen {means[0]:.3f}, of the rejected {means[1]:.3f}")
        splits[split] = [{"prompt": best["prompt"], "positive_completion": best["text"],
                          "negative_completion": worst["text"]} for best, worst in kept]
        seen = {best["prompt"].strip() for best, _ in kept}
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_rows(unfinished, **splits)
    os.replace(unfinished, folder)


def main(argv=None):
    flags = bare_flags(__doc__)
    add = flags.add_argument
    add("--train", required=True, type=Path, help="folder of a run of reward.py --split train --samples-per-prompt k")
    add("--test", required=True, type=Path, help="the same of --split test")
    add("--gap", type=not_negative, default=0.25, help="least difference of the two rewards (%(default)s)")
    add("--out", required=True, type=Path, help="new folder, for dpo.py --pairs")
    args = flags.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already: give another folder, or remove it")
    train, train_groups = read_samples("--train", args.train, "train")
    test, test_groups = read_samples("--test", args.test, "test")
    for name in SAME:
        values = train.flags.get(name), test.flags.get(name)
        if values[0] != values[1]:
            raise UserError(f"--{name.replace('_', '-')} is {values[0]} in {args.train}, {values[1]} in {args.test}")
    save_pairs({"train": train_groups, "test": test_groups}, args.gap, args.out)
    length = train.flags["prompt_len"] + train.flags["completion_len"]
    models = [f"--{name.replace('_', '-')} {train.flags[name]}" for name in ("policy", "reward_model", "prompts")]
    print(f"{args.out}: for dpo.py with {' '.join(models)} --pairs {args.out} --max-len {length} "
          f"({length + 1} if the tokenizer writes a bos): a sample that was cut off fills that, and gets no end token")


if __name__ == "__main__":
    launch(main)
