"""Numbers made of an evaluation's completions. numpy only."""

import math

import numpy as np

DISTINCT_TEXTS = 500  # distinct-n and repeats fall with the number of texts, so the first so many are counted


def distinct(texts, n):
    """List of str -> different n-grams of words / n-grams, over all texts (distinct-n); None if there is none."""
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def mean_and_error(values, group=1):
    """(n,) numbers -> their mean and its standard error; None for the error of a single value.

    Each `group` in a row, the samples of one prompt, count as one value: they are not independent.
    """
    values = np.asarray(values, dtype=float).reshape(-1, group).mean(axis=1)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def summary(rows, k, samples):
    """Rows of completions.jsonl, k of each prompt -> what eval.json says, with so many samples as they are.

    FloatingPointError if reward or KL is not finite.
    """
    reward, reward_se = mean_and_error([row["reward"] for row in rows], k)
    kl, kl_se = mean_and_error([row["kl"] for row in rows], k)
    if not math.isfinite(reward + kl):
        raise FloatingPointError(f"the test reward is {reward}, the KL {kl}: the policy is broken; try a lower --lr")
    firsts = rows[::k]
    counted = [row["completion"] for row in firsts[:DISTINCT_TEXTS]]
    return {
        "reward": reward, "reward_se": reward_se, "n": len(firsts), "kl": kl, "kl_se": kl_se,
        "distinct_2": distinct(counted, 2), "distinct_2_texts": len(counted),
        "mean_length": sum(row["length"] for row in rows) / len(rows),
        "samples": [{key: row[key] for key in ("prompt", "completion", "reward")} for row in firsts[:samples]],
    }
