"""What completions say of a policy: how varied and how natural its text is, and the best possible trade.

Everything from rows of completions.jsonl and from an array of rewards (prompts, k): k completions, sampled from the
original policy, of each prompt. numpy only. What each number says: docs/report.md.
"""

import math
from collections import Counter

import numpy as np

from support.statistics import distinct, mean_and_error

ENOUGH = 4  # effective samples of a prompt; with fewer its best completions are too rare to be among them
PROMPTS = 0.9  # share of the prompts that must have ENOUGH
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


def counts(k):
    """1, 2, 4 .. up to k: the n of best-of-n."""
    return [2**i for i in range(k.bit_length())]


def best_of_kl(n):
    """The most that best-of-n can be away from the original, in nats: KL <= ln n - (n-1)/n.

    Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy": a bound, not the KL itself.
    """
    return math.log(n) - (n - 1) / n


def value(rewards, alpha):
    """(prompts, k), alpha -> (prompts,): the highest reward - alpha * KL that any policy can have, estimated.

    It is that of pi*(x) = ref(x) * exp(r(x) / alpha) / Z (Rafailov et al. 2023, equation 4), and is alpha * log Z, Z
    being the mean of exp(r / alpha) under ref. The logarithm of the mean of k samples is too low by some c / k. The
    jackknife (Quenouille 1956) takes it off: k times it, less k - 1 times the mean of the k that lack one sample.
    """
    k, best = rewards.shape[1], rewards.max(axis=1, keepdims=True)
    weights = np.exp((rewards - best) / alpha)
    total = weights.sum(axis=1, keepdims=True)
    lacking = np.log(np.maximum(total - weights, 1e-300) / (k - 1)).mean(axis=1)  # not the log of 0
    return best[:, 0] + alpha * (k * np.log(total[:, 0] / k) - (k - 1) * lacking)


def limit(rewards):
    """(prompts, k) -> (m,) falling alphas, (m, prompts) value of each: all that is needed of the limit.

    They end where fewer than PROMPTS of the prompts have ENOUGH effective samples, (sum w)^2 / sum w^2 for the weights
    w = exp(r / alpha): what was not sampled no weight can find. One alpha alone, where too few were sampled, is none.
    """
    alphas = []
    for alpha in np.geomspace(1000, 0.005, 300):
        weights = np.exp((rewards - rewards.max(axis=1, keepdims=True)) / alpha)
        effective = weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)
        if alphas and np.quantile(effective, 1 - PROMPTS) < ENOUGH:
            break
        alphas.append(alpha)
    return np.array(alphas), np.array([value(rewards, alpha) for alpha in alphas])


def most_reward(alphas, values, kl):
    """A limit and a KL, or (prompts,) KLs -> (prompts,): their mean is the highest reward for the (mean) KL.

    For each alpha no policy has more than alpha * KL + value(alpha); the lowest of these bounds is reached. None if it
    is that of the last alpha: the limit was not followed so far.
    """
    place = (alphas * np.mean(kl) + values.mean(axis=1)).argmin()
    return None if place == len(alphas) - 1 else alphas[place] * kl + values[place]


def least_kl(alphas, values, reward):
    """A limit and (prompts,) rewards -> (prompts,): their mean is the least KL for the mean reward; None as above."""
    place = ((np.mean(reward) - values.mean(axis=1)) / alphas).argmax()
    return None if place == len(alphas) - 1 else (reward - values[place]) / alphas[place]


def limit_curve(rewards, low):
    """(prompts, k) -> list of (KL, reward, its standard error over the prompts) of the limit, from `low` to its end."""
    alphas, values = limit(rewards)
    if len(alphas) == 1:
        return []
    means = values.mean(axis=1)
    end = (means[-1] - means[-2]) / (alphas[-2] - alphas[-1]) * (1 - 1e-9)  # the KL is minus the value's slope
    return [(kl, *mean_and_error(most_reward(alphas, values, kl))) for kl in np.geomspace(min(low, end), end, 100)]
