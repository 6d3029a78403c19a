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


def test_the_limit_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8, as 8 samples, rewards 0, 1, 2, 3, alpha 1 / ln 2, so exp(r / alpha) = 2^r.

    Z = 1/2 + 2/4 + 4/8 + 8/8 = 5/2; pi* = 1/5, 1/5, 1/5, 2/5; reward 9/5; KL = 9/5 ln 2 - ln 5/2. The weights are
    1/20 four times, 2/20 twice, 4/20, 8/20: effective samples 400 / (4 + 8 + 16 + 64).
    """
    rewards = np.array([[0, 0, 0, 0, 1, 1, 2, 3], [1.0] * 8])
    reward, kl, effective = measures.tilted(rewards, 1 / math.log(2))
    assert reward == pytest.approx([1.8, 1]) and effective == pytest.approx([400 / 92, 8])
    assert kl == pytest.approx([1.8 * math.log(2) - math.log(2.5), 0])
    reward, kl, effective = measures.tilted(rewards, 1e-4)  # what was not sampled cannot be found
    assert (reward[0], kl[0], effective[0]) == pytest.approx((3, math.log(8), 1))


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
    chances, reward, sampled = exact
    best = chances * np.exp(reward / alpha)
    best /= best.sum(axis=1, keepdims=True)
    exact_kl = (best * np.log(best / chances)).sum(axis=1)
    found, kl, effective = measures.tilted(sampled, alpha)
    assert found == pytest.approx(best @ reward, abs=0.02) and kl == pytest.approx(exact_kl, abs=0.05)
    assert effective == pytest.approx(4000 / (best**2 / chances).sum(axis=1), rel=0.1)
    for other in (chances, chances[::-1], np.full_like(chances, 1 / len(reward)), 0.5 * (best + chances)):  # all worse
        value = other @ reward - alpha * (other * np.log(other / chances)).sum(axis=1)
        assert (value <= best @ reward - alpha * exact_kl + 1e-9).all()


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_best_of_n_is_that_of_exact_enumeration(exact, n):
    chances, reward, sampled = exact
    order = reward.argsort()
    below = chances[:, order].cumsum(axis=1)  # P(reward <= that of each completion)
    expected = (np.diff(below**n, axis=1, prepend=0) * reward[order]).sum(axis=1)
    assert measures.best_of(sampled, n) == pytest.approx(expected, abs=0.03)


def test_the_limit_ends_where_too_few_samples_are_effective(exact):
    rewards = exact[2][:, :32]
    points = measures.limit(rewards)
    alphas, gained, kls = zip(*points, strict=True)
    assert list(gained) == sorted(gained) and list(kls) == sorted(kls) and list(alphas) == sorted(alphas, reverse=True)
    effective = [measures.tilted(rewards, alpha)[2].mean() for alpha in (alphas[-1], alphas[-1] ** 2 / alphas[-2])]
    assert effective[1] < measures.ENOUGH <= effective[0]
    assert measures.between(2, [1, 3], [10, 30]) == 20 and measures.between(4, [1, 3], [10, 30]) is None
