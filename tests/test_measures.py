"""What completions say: text measures by hand, and what is possible against exact enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import common
from report import measures
from support.statistics import distinct

# ---- measures of text --------------------------------------------------------------------------------------


def test_distinct_is_the_share_of_different_ngrams_within_completions():
    # a b, b a, a b | a b: 4 bigrams, 2 different ones. Pairs across completions (b a) don't count.
    assert distinct(["a b a b", "a  b\n"], 2) == 2 / 4
    assert distinct(["a b a b", "a  b\n"], 1) == 2 / 6
    assert distinct(["one", ""], 2) is None and distinct(["one", ""], 1) == 1


def test_repeated_counts_every_text_that_has_a_twin():
    assert measures.repeated(["a", "b", "a", "c", "a"]) == 3 / 5  # three times a
    assert measures.repeated(["a", "b"]) == 0


def scored(values, length=2, text="a b c d"):
    return [{"reference_logp": value * length, "length": length, "completion": text} for value in values]


def test_log_prob_a_token_weighs_completions_by_their_length():
    rows = [{"reference_logp": -4.0, "length": 1}, {"reference_logp": -2.0, "length": 3}]
    assert measures.logp_a_token(rows) == -6 / 4  # not the mean of -4 and -2/3


def test_natural_is_the_share_within_the_middle_of_the_originals_own():
    # The original's completions: -0.00, -0.01 .. -1.00 nats a token. Its middle 95 % is -0.975 to -0.025.
    originals = scored([-i / 100 for i in range(101)])
    assert measures.natural(scored([-0.5, -0.97, -0.03, -0.98]), originals) == 3 / 4
    # A word over and over that the original finds too easy is as unnatural as noise.
    assert measures.natural(scored([-0.01, -8.0]), originals) == 0
    assert measures.natural(originals, originals) == pytest.approx(95 / 101)


def test_a_word_over_and_over_is_not_natural_however_probable():
    # Of 40 completions of the original 3/4 of the words differ, of one 2/4. The lowest 2.5 % of 41 are at 1 of 0 .. 40.
    originals = [*scored([-1.0] * 40, text="a b c a"), *scored([-1.0], text="a a b b")]
    rows = [one for text in ("a b c a", "a b c d", "", "a a b b", "a a a a") for one in scored([-1.0], text=text)]
    assert measures.natural(rows, originals) == 3 / 5  # what has no word repeats none
    assert measures.natural(originals, originals) == 40 / 41


# ---- what is possible --------------------------------------------------------------------------------------


def test_best_of_n_by_hand():
    # Of 0, 1/4, 1/2, 1 there are 6 ways to take two: maximum 1/4 in one of them, 1/2 in two, 1 in three.
    rewards = np.array([[0.5, 0.0, 1.0, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert measures.best_of(rewards, 2) == pytest.approx([(0.25 + 2 * 0.5 + 3 * 1) / 6, 0.25])
    assert measures.best_of(rewards, 1) == pytest.approx([0.4375, 0.25])
    assert measures.best_of(rewards, 4) == pytest.approx([1, 0.25])
    assert measures.counts(32) == [1, 2, 4, 8, 16, 32] and measures.counts(6) == [1, 2, 4]


def test_best_of_n_is_right_on_average_over_everything_that_can_be_sampled():
    """Three completions of probability 1/2, 1/4, 1/4 and reward 0, 1/2, 1. The best of two is worth, exactly,
    1/2 * (P(<= 1/2)^2 - P(<= 0)^2) + 1 * (1 - P(<= 1/2)^2) = 1/2 * (9/16 - 1/4) + 7/16 = 19/32."""
    p, reward = [0.5, 0.25, 0.25], [0.0, 0.5, 1.0]
    mean = 0.0
    for drawn in itertools.product(range(3), repeat=4):  # all 81 ways to sample four
        mean += math.prod(p[i] for i in drawn) * measures.best_of(np.array([[reward[i] for i in drawn]]), 2)[0]
    assert mean == pytest.approx(19 / 32)


def test_the_kl_of_best_of_n_is_at_most_the_bound():
    # n = 4: ln 4 - 3/4 = 0.636294. For m equally likely completions of different reward the best of 4 is the i-th
    # with probability (i^4 - (i-1)^4) / m^4; its KL comes close to the bound from below as m grows.
    assert measures.best_of_kl(4) == pytest.approx(0.636294, abs=1e-6) and measures.best_of_kl(1) == 0
    kls = []
    for m in (4, 64, 1024):
        chances = [(i**4 - (i - 1) ** 4) / m**4 for i in range(1, m + 1)]
        kls.append(sum(chance * math.log(chance * m) for chance in chances))
    assert kls[0] < kls[1] < kls[2] < measures.best_of_kl(4) < kls[2] + 0.01


def test_the_limits_value_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8, as 8 samples, rewards 0, 1, 2, 3, alpha 1 / ln 2, so exp(r / alpha) = 2^r.

    alpha * log is log2. The weights 1 (four times), 2 (twice), 4, 8 add up to 20: log2(20/8) = 1.321928. Without one of
    them they add up to 19 (four times), 18 (twice), 16, 12: the mean of log2(19/7) .. log2(12/7) is 1.307211. The
    jackknife: 8 * 1.321928 - 7 * 1.307211 = 1.424950.
    """
    rewards = np.array([[0, 0, 0, 0, 1, 1, 2, 3], [1.0] * 8])
    assert measures.value(rewards, 1 / math.log(2)) == pytest.approx([1.424950, 1], abs=2e-6)


def test_the_limit_ends_where_too_few_samples_are_effective():
    # Six rewards 0 and two 1: (6 + 2w)^2 / (6 + 2w^2) effective samples, w = exp(1 / alpha). Four of them where
    # w^2 - 6w - 3 = 0, so w = 3 + sqrt(12), alpha = 0.5358. Of ten prompts the last has 8 equal ones and is fine.
    rewards = np.array([[0, 0, 0, 0, 0, 0, 1, 1.0]] * 9 + [[0.5] * 8])
    alphas, values = measures.limit(rewards)
    assert list(alphas) == sorted(alphas, reverse=True) and values.shape == (len(alphas), 10)
    assert alphas[-1] ** 2 / alphas[-2] < 1 / math.log(3 + math.sqrt(12)) <= alphas[-1]
    odd = np.array([[0, 0, 0, 0, 0, 0, 0, 1.0]])  # goes down to one effective sample
    assert measures.limit(np.concatenate([np.full((19, 8), 0.5), odd]))[0][-1] == pytest.approx(0.005)  # one in twenty
    assert measures.limit(np.concatenate([np.full((4, 8), 0.5), odd]))[0][-1] > 0.2  # one in five is too many


def test_the_limit_of_a_coin_by_hand():
    """Rewards 0 and 1, as likely: whoever has 1 with probability 3/4 has the KL 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812.

    Two prompts, of which one always pays 1/2: a mean reward of 5/8 costs 0.065406 in the mean. 1,000 samples are as
    good as all. More than 1 there is not, and 1 has the KL ln 2 = 0.693 (0.347 in the mean).
    """
    rewards = np.array([[0.0, 1.0] * 500, [0.5] * 1000])
    limit = measures.limit(rewards)
    assert measures.most_reward(*limit, 0.065406).mean() == pytest.approx(0.625, abs=1e-4)
    assert measures.most_reward(*limit, np.array([0.130812, 0])) == pytest.approx([0.75, 0.5], abs=0.01)
    assert measures.least_kl(*limit, np.array([0.75, 0.5])).mean() == pytest.approx(0.065406, abs=1e-4)
    assert measures.least_kl(*limit, np.array([0.0, 0.5])).mean() == pytest.approx(0, abs=1e-3)
    assert measures.most_reward(*limit, 0.35) is None and measures.least_kl(*limit, np.array([1.0, 0.6])) is None
    curve = np.array(measures.limit_curve(rewards, 0.065406))
    # alpha is 1 / ln 3 there (odds of 3), the value of the coin ln 2 / ln 3 = 0.630930, of the other 1/2.
    assert curve[0] == pytest.approx([0.065406, 0.625, 0.065465], abs=2e-3)
    assert curve[-1, :2] == pytest.approx([math.log(2) / 2, 0.75], abs=1e-3)


@pytest.fixture(scope="module")
def exact():
    """A tiny policy, 2 prompts: probability and reward of each completion of 2 tokens, and 4,000 sampled rewards."""
    torch.manual_seed(0)
    size = {"vocab_size": 6, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform
    prompts = torch.tensor([[1, 2], [3, 4]])
    ways = [way for way in itertools.product(range(6), repeat=2) if way[0] != 0 or way[1] == 0]  # after eos only eos
    worth = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    chances = np.zeros((2, len(ways)))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for j, way in enumerate(ways):
                logps = model(torch.tensor([[*prompt, *way]])).logits[0, 1:3].log_softmax(-1)
                chances[i, j] = math.exp(logps[0, way[0]] + (logps[1, way[1]] if way[0] else 0))
    reward = np.array([float(worth[way]) for way in ways])
    prompts = prompts.repeat_interleave(4000, dim=0)
    tokens = common.sample(model, prompts, torch.rand(len(prompts), 2, generator=torch.Generator().manual_seed(2)))
    sampled = worth[tokens[:, 2], tokens[:, 3]].view(2, 4000).double().numpy()
    return chances, reward, sampled


def test_the_tiny_policys_completions_are_all_there(exact):
    chances, reward, sampled = exact
    assert chances.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert sampled.mean(axis=1) == pytest.approx(chances @ reward, abs=0.03)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1])
def test_the_limit_is_that_of_exact_enumeration(exact, alpha):
    """The value of 250 times 16 samples is that of all completions, to four standard errors. The correction is what a
    logarithm is too low by, half the relative variance of the mean. The limit has pi*'s reward at its KL, nobody more.
    """
    chances, reward, sampled = exact
    best = chances * np.exp(reward / alpha)
    expected = alpha * np.log(best.sum(axis=1)).mean()
    few = sampled.reshape(500, 16)
    found = measures.value(few, alpha).reshape(2, 250).mean(axis=0)
    plain = (alpha * np.log(np.exp(few / alpha).mean(axis=1))).reshape(2, 250).mean(axis=0)
    error = found.std() / 250**0.5
    assert abs(found.mean() - expected) < 4 * error
    spread = (chances * np.exp(2 * reward / alpha)).sum(axis=1) / best.sum(axis=1) ** 2 - 1  # relative variance
    assert found.mean() - plain.mean() == pytest.approx(alpha * spread.mean() / (2 * 16), rel=0.25)
    best /= best.sum(axis=1, keepdims=True)
    limit = measures.limit(sampled)
    kl = (best * np.log(best / chances)).sum(axis=1)
    assert measures.most_reward(*limit, kl).mean() == pytest.approx((best @ reward).mean(), abs=0.02)
    assert measures.least_kl(*limit, best @ reward).mean() == pytest.approx(kl.mean(), abs=0.05)
    for other in (chances, chances[::-1], np.full_like(chances, 1 / len(reward)), 0.5 * (best + chances)):  # all worse
        most = measures.most_reward(*limit, (other * np.log(other / chances)).sum(axis=1))
        assert most is None or (other @ reward).mean() < most.mean() + 0.02


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_best_of_n_is_that_of_exact_enumeration(exact, n):
    chances, reward, sampled = exact
    order = reward.argsort()
    below = chances[:, order].cumsum(axis=1)  # P(reward <= that of each completion)
    expected = (np.diff(below**n, axis=1, prepend=0) * reward[order]).sum(axis=1)
    assert measures.best_of(sampled, n) == pytest.approx(expected, abs=0.03)
