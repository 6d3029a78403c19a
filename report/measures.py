"""What completions say of a policy: how varied and how natural its text is, and the best possible trade.

Everything from rows of completions.jsonl and from an array of rewards (prompts, k): k completions, sampled from the
original policy, of each prompt. numpy only. What each number says: docs/report.md.
"""

import math
from collections import Counter

import numpy as np

from support.statistics import distinct

ENOUGH = 8  # effective samples, mean over the prompts; with fewer the best completions are too rare to be among them
MIDDLE = (0.025, 0.975)  # quantiles of the original's own texts: what is called natural


# ---- text --------------------------------------------------------------------------------------------------


def repeated(texts):
    """List of str -> share of the texts that are there more than once."""
    return sum(count for count in Counter(texts).values() if count > 1) / len(texts)


def logp_a_token(rows):
    """Rows of completions.jsonl -> log-prob a token under the original policy, nats, over all completions."""
    return sum(row["reference_logp"] for row in rows) / sum(row["length"] for row in rows)


def natural(rows, originals):
    """Rows of a policy and of the original policy -> share of the policy's completions that could be the original's.

    Could be: its log-prob a token under the original lies where the middle 95 % of the original's own completions lie,
    and it repeats its words no more than they do (share of different words, but for the lowest 2.5 %). Neither alone
    will do: "incredible incredible incredible" is as probable to a language model as what it writes itself. The
    original itself scores about 0.93.
    """
    own, other = (np.array([row["reference_logp"] / row["length"] for row in some]) for some in (originals, rows))
    low, high = np.quantile(own, MIDDLE)
    variety = [[distinct([row["completion"]], 1) or 1.0 for row in some] for some in (originals, rows)]
    least = np.quantile(variety[0], MIDDLE[0])
    return float(((low <= other) & (other <= high) & (least <= np.array(variety[1]))).mean())


# ---- what is possible --------------------------------------------------------------------------------------


def best_of(rewards, n):
    """(prompts, k), n <= k -> (prompts,): expected reward of the best of n samples of the original, without bias.

    The mean of the maximum over all ways to take n of the k: the i-th smallest of k is the largest of n in
    C(i-1, n-1) of the C(k, n) ways.
    """
    k = rewards.shape[1]
    ways = np.array([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)])
    return np.sort(rewards, axis=1) @ ways


def best_of_kl(n):
    """The most that best-of-n can be away from the original, in nats: KL <= ln n - (n-1)/n.

    Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy": a bound, not the KL itself.
    """
    return math.log(n) - (n - 1) / n


def tilted(rewards, alpha):
    """(prompts, k), alpha -> (prompts,) reward, (prompts,) KL in nats, (prompts,) effective samples: the limit.

    No policy has a higher reward - alpha * KL than pi*(x) = ref(x) * exp(r(x) / alpha) / Z, where Z is the mean of
    exp(r / alpha) under ref (Rafailov et al. 2023, equation 4). With k samples of ref, and weights w that are
    exp(r / alpha) made to add up to 1:

        reward = sum_i w_i r_i,     KL(pi* || ref) = sum_i w_i log(k w_i),     effective samples = 1 / sum_i w_i^2

    Both means of pi* are good for many effective samples only: no weights can find what was not sampled, so for small
    alpha the reward ends at the best of the k, the KL at ln k (less where several are equally good).
    """
    weights = np.exp((rewards - rewards.max(axis=1, keepdims=True)) / alpha)
    weights /= weights.sum(axis=1, keepdims=True)
    kl = (weights * np.log(np.maximum(rewards.shape[1] * weights, 1e-300))).sum(axis=1)  # 0 log 0 = 0
    return (weights * rewards).sum(axis=1), kl, 1 / (weights**2).sum(axis=1)


def limit(rewards):
    """(prompts, k) -> list of (alpha, reward, KL), means over the prompts, for falling alpha, while ENOUGH samples
    are effective on average over the prompts."""
    found = []
    for alpha in np.geomspace(10, 0.005, 80):
        reward, kl, effective = (float(values.mean()) for values in tilted(rewards, alpha))
        if effective < ENOUGH:
            break
        found.append((float(alpha), reward, kl))
    return found


# ---- small things ------------------------------------------------------------------------------------------


def counts(k):
    """1, 2, 4 .. up to k: the n of best-of-n."""
    return [2**i for i in range(k.bit_length())]


def between(x, xs, ys):
    """y at x on the line through points of rising x; None outside of them."""
    return float(np.interp(x, xs, ys)) if xs[0] <= x <= xs[-1] else None
