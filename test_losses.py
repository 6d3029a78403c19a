"""The mathematics against values computed by hand. Probabilities are powers of 1/2, so answers are whole bits.

In the order of the scripts: common.py, reinforce.py, dpo.py. No network, no files, a few seconds. Where a test has no
other tolerance, pytest's (1e-6 of the value) or PyTorch's (1.3e-6 of it and 1e-5) is some twenty roundings of fp32,
each 2^-24 of the value, and what is compared is a handful of roundings away from its literal. Models compute in double
precision, so that a processor's own order of adding up cannot be seen.

    python -m pytest test_losses.py
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import common
import dpo
import reinforce
from support.ranks import micro_batches

BIT = math.log(2)  # one bit in nats
EOS = 0


def nats(*probabilities):
    """Log-probabilities of one distribution, as a (V,) tensor."""
    return torch.tensor(probabilities).log()


def random_policy(seed=0):
    """A random GPT-2 of 11 words whose forecasts are far from uniform, in eval mode. Its logits lie below 16."""
    torch.manual_seed(seed)
    size = {"vocab_size": 11, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, eos_token_id=EOS, bos_token_id=EOS)
    policy = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(6)
    return policy


@pytest.fixture(scope="module")
def model():
    return random_policy().double()


class Flat(torch.nn.Module):
    """A model to which all of 11 words are equally likely. Keeps what it is called with."""

    config = GPT2Config(vocab_size=11, eos_token_id=EOS, bos_token_id=EOS)

    def __init__(self, device="cpu"):
        super().__init__()
        self.device, self.calls = torch.device(device), []

    def forward(self, **inputs):
        self.calls.append(inputs)
        logits = torch.zeros(len(inputs["input_ids"]), inputs["logits_to_keep"], 11, device=self.device)
        return SimpleNamespace(logits=logits, past_key_values=None)


# ---- log-probabilities -------------------------------------------------------------------------------------


@pytest.fixture
def logits():
    """(2, 2, 4): another distribution in each of the four places, so that a shift in any direction shows."""
    rows = [[nats(1 / 2, 1 / 4, 1 / 8, 1 / 8), nats(1 / 8, 1 / 2, 1 / 8, 1 / 4)]]
    rows += [[nats(1 / 4, 1 / 8, 1 / 2, 1 / 8), nats(1 / 8, 1 / 8, 1 / 4, 1 / 2)]]
    return torch.stack([torch.stack(row) for row in rows])


def test_log_probs_do_not_see_a_number_that_is_added_to_all_logits_of_a_place(logits):
    torch.testing.assert_close(common.log_probs(logits), logits)  # those of probabilities are log-probs already
    # Near 100 fp32 has steps of 2^-17; a logit and the largest one, which is taken off, are each rounded once.
    shift = torch.tensor([[[100.0], [-7.0]], [[0.0], [3.0]]])
    torch.testing.assert_close(common.log_probs(logits + shift), logits, atol=2**-15, rtol=0)


def test_log_probs_of_bf16_logits_are_taken_in_fp32():
    # 256 equal logits: every word has probability 2^-8, 8 bits. In bf16 8 * ln 2 = 5.5452 would be 5.5625.
    found = common.log_probs(torch.zeros(1, 1, 256, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([-8 * BIT] * 256)


def test_token_logps_are_those_of_the_tokens_in_their_own_column(logits):
    tokens = torch.tensor([[0, 3], [1, 3]])  # probabilities 1/2, 1/4 | 1/8, 1/2
    expected = -BIT * torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    torch.testing.assert_close(common.token_logps(logits, tokens), expected)


def test_token_logps_gradient_is_one_hot_minus_probabilities(logits):
    # d log p_k / d logit_v = [v == k] - p_v; the first place has p = (1/2, 1/4, 1/8, 1/8) and k = 1.
    logits.requires_grad_()
    common.token_logps(common.log_probs(logits), torch.tensor([[1, 0], [0, 0]]))[0, 0].backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-1 / 2, 3 / 4, -1 / 8, -1 / 8]))
    assert logits.grad[0, 1].abs().max() == 0 and logits.grad[1].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 2), (2,)])
def test_token_logps_refuses_tokens_of_another_shape(logits, shape):
    with pytest.raises(ValueError, match=r"tokens \(.*\) do not match logp \(2, 2, 4\): they must be"):
        common.token_logps(logits, torch.zeros(shape, dtype=torch.long))


# ---- the KL ------------------------------------------------------------------------------------------------


def test_kl_is_policy_to_reference_and_not_the_other_way():
    # p = (1/2, 1/4, 1/8, 1/8), q = (1/8, 1/2, 1/4, 1/8), in bits:
    # KL(p ‖ q) = 1/2 * 2 - 1/4 * 1 - 1/8 * 1 + 0 = 5/8;  KL(q ‖ p) = -1/8 * 2 + 1/2 * 1 + 1/4 * 1 + 0 = 1/2.
    p, q = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8), nats(1 / 8, 1 / 2, 1 / 4, 1 / 8)
    logp, ref_logp = torch.stack([p, q])[None], torch.stack([q, p])[None]  # (1, 2, 4)
    expected = BIT * torch.tensor([[5 / 8, 1 / 2]])
    torch.testing.assert_close(common.token_kl(logp, ref_logp), expected)


def test_kl_gradient_is_that_of_the_policys_exact_kl():
    # d KL / d logit_v = p_v * (log p_v/q_v - KL). For the p, q above, in bits: log p/q = (2, -1, -1, 0), KL = 5/8:
    # (1/2 * 11/8, -1/4 * 13/8, -1/8 * 13/8, -1/8 * 5/8) = (44, -26, -13, -5) / 64. They add up to 0.
    logits = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8).reshape(1, 1, 4).requires_grad_()
    common.token_kl(common.log_probs(logits), nats(1 / 8, 1 / 2, 1 / 4, 1 / 8).reshape(1, 1, 4)).sum().backward()
    torch.testing.assert_close(logits.grad.flatten(), BIT * torch.tensor([44.0, -26.0, -13.0, -5.0]) / 64)


def test_kl_of_a_policy_to_itself_is_zero_and_never_negative():
    noise = common.seeded(0, "test")
    logp, ref_logp = common.log_probs(torch.randn(2, 4, 5, 300, generator=noise) * 3)
    assert common.token_kl(logp, logp).abs().max() == 0
    assert common.token_kl(logp, ref_logp).min() > 0


def test_kl_counts_a_word_that_the_policy_never_says_as_zero():
    # p = (1, 0), q = (1/2, 1/2): 1 bit. p = q = (1, 0): 0, not nan.
    p, q = nats(1.0, 0.0).reshape(1, 1, 2), nats(1 / 2, 1 / 2).reshape(1, 1, 2)
    assert common.token_kl(p, q).item() == pytest.approx(BIT)
    assert common.token_kl(p, p).item() == 0
    # p = (1/2, 1/2, 0), q = (1/4, 1/2, 1/4): log p/q = (1, 0, .) bits, KL = 1/2 bit. The gradient as above:
    # (1/2 * 1/2, -1/2 * 1/2, 0) bits. Where q is 0 too, it is the same but for log p/q: q = (1/2, 1/2, 0) gives 0.
    for ref, gradient in ((nats(1 / 4, 1 / 2, 1 / 4), [1 / 4, -1 / 4, 0]), (nats(1 / 2, 1 / 2, 0.0), [0, 0, 0])):
        logits = nats(1 / 2, 1 / 2, 0.0).reshape(1, 1, 3).requires_grad_()
        common.token_kl(common.log_probs(logits), ref.reshape(1, 1, 3)).sum().backward()
        torch.testing.assert_close(logits.grad.flatten(), BIT * torch.tensor(gradient))


def test_kl_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"ref_logp \(1, 1, 256\) does not match logp \(1, 2, 256\)"):
        common.token_kl(torch.zeros(1, 2, 256), torch.zeros(1, 1, 256))


# ---- masks, and which forecast belongs to which token ------------------------------------------------------


def test_completion_mask_keeps_the_first_eos_and_nothing_after_it():
    completions = torch.tensor([[5, EOS, EOS, 7], [EOS, 5, 5, 5], [5, 6, 7, 8], [5, 6, 7, EOS]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert common.completion_mask(completions, EOS).tolist() == torch.tensor(expected).bool().tolist()


def test_masked_sum_never_reads_what_the_mask_hides():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, math.nan, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    sums = common.masked_sum(values, mask)
    assert sums.tolist() == [5.0, 8.0]
    sums.sum().backward()
    assert values.grad.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert common.masked_sum(values, mask.long()).tolist() == [5.0, 8.0]  # a mask of 0 and 1 is one, too
    with pytest.raises(ValueError, match=r"mask \(2, 2\) does not match values \(2, 3\)"):
        common.masked_sum(values, mask[:, :2])


def test_completion_logits_stand_in_the_column_of_the_token_they_forecast(model):
    # The oracle: the model's own loss on the whole row, one row at a time, on the 4 last of 9 tokens.
    tokens = torch.randint(1, 11, (3, 9), generator=common.seeded(0, "test"))
    found = common.token_logps(common.log_probs(common.completion_logits(model, tokens, 4)), tokens[:, 5:])
    assert found.shape == (3, 4)
    for row, logps in zip(tokens, found, strict=True):
        every = model(row[None]).logits[0, :-1]  # column t forecasts token t + 1
        expected = -F.cross_entropy(every, row[1:], reduction="none")[-4:]
        # Below 16 fp32 has steps of 2^-20, below 32 of 2^-19: a few of them make up log_probs' own rounding.
        torch.testing.assert_close(logps, expected.float(), atol=2**-16, rtol=0)


def test_completion_logits_tells_the_model_what_is_padding_and_asks_for_the_completion_only():
    # A model may find the padding by other means (positions that start again), so what it is told is looked at.
    tokens, attention = torch.arange(1, 11).view(2, 5), torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    model = Flat()
    assert common.completion_logits(model, tokens, 2, attention).shape == (2, 2, 11)
    (call,) = model.calls
    assert call.pop("input_ids").tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert call.pop("attention_mask").tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert call.pop("position_ids").tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert call == {"use_cache": False, "logits_to_keep": 2}  # keys and values that nobody reads would cost memory


# ---- sampling ----------------------------------------------------------------------------------------------


def test_draw_has_exactly_the_probabilities_of_the_softmax():
    # A grid of 16,000 numbers, (k + 1/2) / 16,000: exactly n p of them belong to each word, none to a word with p = 0.
    # A border between words lies in the middle between two numbers, 1/32,000 from both: 500 times 2^-24.
    probabilities = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 0.0, 1 / 16])
    drawn = common.draw(probabilities.log().repeat(16_000, 1) + 5, (torch.arange(16_000) + 0.5) / 16_000)
    assert torch.bincount(drawn, minlength=6).tolist() == [8000, 4000, 2000, 1000, 0, 1000]


@pytest.mark.parametrize(("uniform", "word"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_draw_reaches_both_ends_and_never_a_word_of_probability_zero(uniform, word):
    # p = (0, 1/2, 0, 1/2, 0): word 1 owns [0, 1/2), word 3 owns [1/2, 1). The largest fp32 below 1 is 1 - 2^-24.
    # Of two equal logits exp(0) = 1, and 1/2 is exact.
    assert common.draw(nats(0.0, 1 / 2, 0.0, 1 / 2, 0.0)[None], torch.tensor([uniform])).tolist() == [word]


def test_draw_of_nan_is_a_word_all_the_same():
    # So that the run stops where it sees the nan, and says so, and not at an index that is out of range.
    assert 0 <= common.draw(torch.full((1, 5), math.nan), torch.tensor([0.5])).item() < 5


def test_draw_gives_rare_words_their_intervals_in_fp64():
    # Word 0 has nearly all, 999 others e^-25 = 1e-11 each, far below the 2^-24 at which fp32 sums up to 1 are rounded.
    logits = torch.full((999, 1000), -25.0)
    logits[:, 0] = 0.0
    share = torch.arange(1, 1000, dtype=torch.float64)  # from the middle of each rare word's interval
    uniform = 1 - (1000 - share - 0.5) * math.exp(-25) / (1 + 999 * math.exp(-25))
    assert common.draw(logits, uniform).tolist() == list(range(1, 1000))


@pytest.mark.parametrize("seed", range(8))
def test_draw_stays_inside_a_vocabulary_of_gpt2s_size(seed):
    # 50,257 rounded probabilities do not add up to 1, but to some multiple of 2^-24 below or above. The number that
    # is looked up must fall below the sum all the same: (1 - 2^-24) times it does, however that is rounded.
    uniform = torch.full((4,), 1 - 2**-24)
    logits = torch.randn(4, 50_257, generator=common.seeded(seed, "test")) * 0.3
    logits[:, -1] = -math.inf  # the last word that can be drawn is the last but one
    assert common.draw(logits, uniform).max() < 50_256
    logits[:, -1] = 20.0  # now nearly all the probability is on the last word
    assert common.draw(logits, uniform).tolist() == [50_256] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_has_no_bias_in_a_vocabulary_of_gpt2s_size(dtype):
    """The border between word v and its successor stands where the exact sum up to v says, at both ends too.

    The exact sums are in double precision. Numbers 2^-18 (a fifth of a mean word) below and above a border must lie on
    their own side of it. Nearly all the probability is on logits at most 8 below the largest: there a difference is
    rounded by 2^-22, its exp by 2^-23, and the quotient by 2^-24; a CPU adds them up in double precision. That is
    2^-21 for a sum and for the whole, 2^-20 together.
    """
    logits = (torch.randn(50_257, generator=common.seeded(0, "test")) * 3).to(dtype)
    sums = logits.double().softmax(-1).cumsum(-1)
    words = torch.cat([torch.arange(0, 50_256, 1000), torch.arange(50_200, 50_256)])
    below, above = (sums[words] - 2**-18).clamp(min=0).float(), (sums[words] + 2**-18).float()
    assert (common.draw(logits.expand(len(words), -1), below) <= words).all()
    inside = above < 1
    assert (common.draw(logits.expand(len(words), -1), above)[inside] > words[inside]).all()


def test_sample_draws_from_the_same_distribution_that_is_scored(model):
    """The entropy identity: on sampled tokens, the mean of -log p(token) is the mean entropy of the forecasts.

    z = their mean difference in standard errors over 2,000 completions. Right: |z| < 4 but for one seed in 16,000.
    Wrong: logits one column off, or another temperature than that of the samples.
    """
    prompts = torch.randint(1, 11, (2000, 3), generator=common.seeded(0, "prompts"))
    tokens = common.sample(model, prompts, torch.rand(2000, 8, generator=common.seeded(0, "sampling")))
    assert abs(surprise(model, tokens)) < 4
    assert abs(surprise(model, tokens, shift=1)) > 10 and abs(surprise(model, tokens, temperature=0.7)) > 10


def surprise(model, tokens, shift=0, temperature=1.0):
    """(B, 11) -> float: z of the entropy identity, for the last 8 tokens of rows that the model has sampled."""
    with torch.no_grad():
        logits = common.completion_logits(model, tokens, 8).roll(shift, dims=1)
    logp = common.log_probs(logits * temperature)
    excess = -common.token_logps(logp, tokens[:, 3:]) + (logp.exp() * logp).sum(-1)  # minus the entropy
    per_row = common.masked_sum(excess, common.completion_mask(tokens[:, 3:], EOS))
    return (per_row.mean() / (per_row.std() / len(per_row) ** 0.5)).item()


def test_sample_with_its_cache_equals_a_loop_that_feeds_everything_again(model):
    prompts = torch.randint(1, 11, (5, 3), generator=common.seeded(1, "prompts"))
    uniform, tokens = torch.rand(5, 12, generator=common.seeded(1, "sampling")), prompts
    with torch.no_grad():
        for column in range(12):
            drawn = common.draw(model(tokens).logits[:, -1], uniform[:, column])
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    found = common.sample(model, prompts, uniform)
    mask = common.completion_mask(tokens[:, 3:], EOS)
    assert not mask.all()  # a row ends early, or the next line would test less than it says
    assert found[:, 3:].tolist() == tokens[:, 3:].masked_fill(~mask, EOS).tolist()
    assert found[:, :3].tolist() == prompts.tolist()
    other = copy.deepcopy(model)
    other.config.use_cache = False  # as in a checkpoint of a training that needed none
    assert common.sample(other, prompts, uniform).tolist() == found.tolist()


def test_a_rows_sample_is_a_function_of_its_prompt_and_its_numbers(model):
    """What is drawn for a row must not depend on the batch, nor on which of several ranks draws it."""
    prompts = torch.randint(1, 11, (6, 3), generator=common.seeded(1, "prompts"))
    uniform = torch.rand(6, 12, generator=common.seeded(1, "sampling"))
    whole = common.sample(model, prompts, uniform)
    assert common.sample(model, prompts[2:5], uniform[2:5]).tolist() == whole[2:5].tolist()
    assert common.sample(model, prompts.flip(0), uniform.flip(0)).tolist() == whole.flip(0).tolist()


def test_sample_feeds_no_row_that_has_ended_and_keeps_the_logits(model):
    sizes = []

    class Watched(torch.nn.Module):
        config = model.config

        def forward(self, **inputs):
            sizes.append(len(inputs["input_ids"]))
            assert inputs["logits_to_keep"] == 1  # the product with the vocabulary is not done for the prompt
            assert inputs["use_cache"]  # whatever the model's config says
            output = model(**inputs)
            assert not output.logits.requires_grad  # no graph is kept while sampling
            return output

    prompts = torch.randint(1, 11, (20, 3), generator=common.seeded(2, "prompts"))
    uniform = torch.rand(20, 12, generator=common.seeded(2, "sampling"))
    tokens, logits = common.sample(Watched(), prompts, uniform, keep_logits=True)
    assert tokens.tolist() == common.sample(model, prompts, uniform).tolist()
    mask = common.completion_mask(tokens[:, 3:], EOS)
    assert sizes == mask.sum(dim=0).tolist() and sizes[-1] < sizes[0]
    with torch.no_grad():
        every = common.completion_logits(model, tokens, 12)
    torch.testing.assert_close(logits[mask], every[mask])
    assert logits[~mask].abs().max() == 0


def test_sample_keeps_its_width_when_every_row_ends_at_once(model):
    class Ends(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, **_):
            logits = torch.full((len(input_ids), 1, 11), -math.inf)
            logits[..., EOS] = 0.0
            return SimpleNamespace(logits=logits, past_key_values=None)

    found = common.sample(Ends(), torch.tensor([[3, 4], [5, 6]]), torch.rand(2, 3))
    assert found.tolist() == [[3, 4, 0, 0, 0], [5, 6, 0, 0, 0]]


def test_seeded_generators_differ_by_use_and_repeat_by_name():
    first, again, other = (torch.rand(4, generator=common.seeded(3, use)) for use in ("a", "a", "b"))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.tolist() != torch.rand(4, generator=common.seeded(4, "a")).tolist()


# ---- the end of a step -------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    """w = (3, 4) and d/dw |5 w|^2 / 2 = 25 w = (75, 100), whose norm is 125."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    ((5 * layer.weight) ** 2 / 2).sum().backward()
    return layer


def descend(layer, step=7, **more):
    """common.update with plain gradient descent at a learning rate of 1/16, and a loss of 1 if no other is given."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1 / 16)
    return common.update(layer, optimizer, step, **{"metrics": {"loss": torch.tensor(1.0)}, **more})


def test_update_takes_a_step_with_the_gradient_and_leaves_none(layer):
    # 3 - 75/16 = -1.6875, 4 - 100/16 = -2.25.
    metrics = {"reward": torch.tensor(0.5), "loss": torch.tensor(-2.0, requires_grad=True)}
    assert descend(layer, metrics=metrics) == {"reward": 0.5, "loss": -2.0, "grad_norm": 125.0}
    assert layer.weight.tolist() == [[-1.6875, -2.25]] and layer.weight.grad is None


def test_update_weighs_the_metrics_by_the_share_of_the_batch_and_leaves_the_gradient(layer):
    # The gradient is that of the weighted loss already; metrics are means over this rank's rows.
    assert descend(layer, metrics={"loss": torch.tensor(3.0)}, weight=1 / 4) == {"loss": 0.75, "grad_norm": 125.0}
    assert layer.weight.tolist() == [[-1.6875, -2.25]]


def test_update_adds_up_metrics_and_gradients_over_the_ranks(layer, monkeypatch):
    # Two ranks that found the same: twice 3/4, and twice (75, 100), whose norm is 250. 3 - 150/16, 4 - 200/16.
    monkeypatch.setattr(common, "all_reduce", lambda *tensors: [tensor.mul_(2) for tensor in tensors])
    assert descend(layer, metrics={"loss": torch.tensor(3.0)}, weight=1 / 4) == {"loss": 1.5, "grad_norm": 250.0}
    assert layer.weight.tolist() == [[-6.375, -8.5]]


@pytest.mark.parametrize(("max_norm", "gradient"), [(None, (75, 100)), (200, (75, 100)), (12.5, (7.5, 10))])
def test_a_gradient_longer_than_max_grad_norm_is_shortened_to_it(layer, max_norm, gradient):
    assert descend(layer, max_norm=max_norm)["grad_norm"] == 125.0  # as it was before
    assert layer.weight[0].tolist() == pytest.approx([3 - gradient[0] / 16, 4 - gradient[1] / 16])


@pytest.mark.parametrize(("step", "values", "gradient", "message"), [
    (7, {"reward": 1.0, "loss": math.nan}, 100, "step 7: loss is nan; the weights were not touched; try a lower --lr"),
    (2, {"loss": math.nan}, 100, "step 2: loss is nan; the weights were not touched; try a lower --lr"),
    (7, {"reward": math.nan, "loss": math.nan}, math.nan, "step 7: reward is nan; the weights were not touched"),
    (1, {"loss": -math.inf}, 100, "step 1: loss is -inf; the weights were not touched; look at the flags and the"),
    (7, {"loss": 1.0}, math.inf, "step 7: grad_norm is inf; the weights were not touched; try a lower"),
    (7, {"loss": math.nan}, math.inf, "step 7: loss is nan"),
])
def test_a_number_that_is_not_finite_stops_with_its_step_and_the_first_cause(layer, step, values, gradient, message):
    layer.weight.grad[0, 1] = gradient
    with pytest.raises(FloatingPointError, match=message):
        descend(layer, step, metrics={name: torch.tensor(value) for name, value in values.items()})
    assert layer.weight.tolist() == [[3, 4]]


# ---- REINFORCE ---------------------------------------------------------------------------------------------


def test_reinforce_loss_is_minus_the_mean_of_reward_times_summed_logps():
    # Row 0: 1 + 2 bits in the mask, reward 1/2 -> 1.5 bits. Row 1: 3 + 1 + 4 bits, reward 1/4 -> 2 bits. Mean 1.75.
    logps = -BIT * torch.tensor([[1.0, 2.0, 100.0], [3.0, 1.0, 4.0]])
    logps.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = reinforce.reinforce_loss(logps, mask, torch.tensor([0.5, 0.25]))
    assert loss.item() == pytest.approx(1.75 * BIT)
    loss.backward()  # -reward_b / B at every token in the mask
    assert logps.grad.tolist() == [[-0.25, -0.25, 0.0], [-0.125, -0.125, -0.125]]


def test_reinforce_loss_sends_no_gradient_into_the_reward():
    rewards = torch.tensor([0.5], requires_grad=True)
    logps = torch.tensor([[-1.0]], requires_grad=True)
    reinforce.reinforce_loss(logps, torch.tensor([[True]]), rewards).backward()
    assert rewards.grad is None and logps.grad is not None


@pytest.mark.parametrize("shape", [(2, 1), (3,), ()])
def test_reinforce_loss_refuses_a_reward_that_would_broadcast(shape):
    with pytest.raises(ValueError, match=r"reward \(.*\) does not match logps \(2, 3\)"):
        reinforce.reinforce_loss(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(shape))


def test_reinforce_loss_refuses_logps_without_a_batch():
    with pytest.raises(ValueError, match=r"reward \(3,\) does not match logps \(3,\)"):
        reinforce.reinforce_loss(torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.ones(3))


def test_reinforce_gradient_is_on_average_minus_the_gradient_of_the_expected_reward():
    # p = (1/2, 1/4, 1/4), r = (1, 0, 0): E[r] = p_0, d p_0 / d logits = p_0 * ([v == 0] - p_v) = (1/4, -1/8, -1/8).
    # The average over what is sampled, exactly: each token's gradient weighted with its probability.
    probabilities, expected = torch.tensor([1 / 2, 1 / 4, 1 / 4]), torch.zeros(3)
    for token, r in enumerate((1.0, 0.0, 0.0)):
        logits = probabilities.log().reshape(1, 1, 3).requires_grad_()
        logps = common.token_logps(common.log_probs(logits), torch.tensor([[token]]))
        reinforce.reinforce_loss(logps, torch.tensor([[True]]), torch.tensor([r])).backward()
        expected += probabilities[token] * logits.grad.flatten()
    torch.testing.assert_close(-expected, torch.tensor([1 / 4, -1 / 8, -1 / 8]))


def test_leave_one_out_takes_the_others_mean():
    # The others' means of (0, 1/2, 1) are (3/4, 1/2, 1/4).
    assert reinforce.leave_one_out(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-0.75, 0.0, 0.75]
    assert reinforce.leave_one_out(torch.tensor([1.0, 0.25])).tolist() == [0.75, -0.75]
    assert reinforce.leave_one_out(torch.tensor([0.5])).tolist() == [0.5]  # a row alone has no others


def test_leave_one_out_leaves_the_average_gradient_as_it_is():
    # The p, r and gradient above, of two rows of the same prompt: all 9 batches, each with its probability. Less the
    # mean of both rows, one's own too, the gradient would be half of it.
    probabilities, rewards, expected = torch.tensor([1 / 2, 1 / 4, 1 / 4]), torch.tensor([1.0, 0.0, 0.0]), 0
    for tokens in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
        logits = probabilities.log().requires_grad_()
        logps = common.token_logps(common.log_probs(logits.expand(2, 1, 3)), tokens[:, None])
        advantage = reinforce.leave_one_out(rewards[tokens])
        reinforce.reinforce_loss(logps, torch.ones(2, 1, dtype=torch.bool), advantage).backward()
        expected += probabilities[tokens].prod() * logits.grad
    torch.testing.assert_close(-expected, torch.tensor([1 / 4, -1 / 8, -1 / 8]))


def test_loss_and_kl_of_the_same_log_probs_have_the_gradients_written_on_paper():
    # z = log p, p = (1/2, 1/4, 1/8, 1/8), q = (1/8, 1/2, 1/4, 1/8): KL = 5/8 bit. Token 1: log p = -2 bits. With
    # reward 1/2 and alpha 2 the loss is 1/2 * 2 + 2 * 5/8 = 9/4 bits. Its gradient: -1/2 times (-1/2, 3/4, -1/8, -1/8)
    # and 2 times (44, -26, -13, -5) / 64 bits, both from above.
    logits, mask = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8).reshape(1, 1, 4).requires_grad_(), torch.tensor([[True]])
    logp, ref_logp = common.log_probs(logits), nats(1 / 8, 1 / 2, 1 / 4, 1 / 8).reshape(1, 1, 4)
    loss = reinforce.reinforce_loss(common.token_logps(logp, torch.tensor([[1]])), mask, torch.tensor([0.5]))
    loss = loss + 2 * common.masked_sum(common.token_kl(logp, ref_logp), mask).mean()
    assert loss.item() == pytest.approx(9 / 4 * BIT)
    loss.backward()
    by_loss, by_kl = torch.tensor([1 / 4, -3 / 8, 1 / 16, 1 / 16]), torch.tensor([44.0, -26.0, -13.0, -5.0]) / 32
    torch.testing.assert_close(logits.grad.flatten(), by_loss + BIT * by_kl)


# ---- DPO ---------------------------------------------------------------------------------------------------


def rows(*values):
    return [torch.tensor([value], requires_grad=True) for value in values]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_loss_of_the_reference_itself_is_ln_2(beta):
    losses, margins = dpo.dpo_loss(*rows(-40.0, -30.0, -40.0, -30.0), beta)
    assert losses.item() == pytest.approx(0.693147, abs=1e-6) and margins.item() == 0


@pytest.mark.parametrize(("difference", "loss"), [(5.0, 0.474077), (-5.0, 0.974077)])
def test_dpo_loss_by_hand(difference, loss):
    # The chosen log-ratio is (-38 + 40) = 2, the rejected -(5 - 2) = -3: together 5 nats, margin 0.1 * 5 = 0.5.
    # ln(1 + e^-0.5) = 0.474077, ln(1 + e^0.5) = 0.974077. For -5 both log-ratios change sign.
    sign = math.copysign(1.0, difference)
    losses, margins = dpo.dpo_loss(*rows(-40.0 + 2 * sign, -30.0 - 3 * sign, -40.0, -30.0), 0.1)
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert margins.item() == pytest.approx(0.1 * difference, abs=1e-6)


def test_dpo_gradient_lifts_the_chosen_and_lowers_the_rejected_and_weighs_by_the_mistake():
    # d loss / d chosen = -beta * sigmoid(-margin): margin 0.5 gives -0.1 * 0.377541; rejected the opposite.
    logps = rows(-38.0, -33.0, -40.0, -30.0)
    dpo.dpo_loss(*logps, 0.1)[0].backward()
    assert logps[0].grad.item() == pytest.approx(-0.0377541, abs=1e-6)
    assert logps[1].grad.item() == pytest.approx(0.0377541, abs=1e-6)


def test_dpo_loss_is_finite_where_log_of_sigmoid_is_not():
    losses, _ = dpo.dpo_loss(*rows(-800.0, 0.0, 0.0, 0.0), 1.0)
    assert losses.item() == pytest.approx(800.0)


def test_dpo_loss_refuses_shapes_that_would_broadcast_and_logps_that_are_not_summed():
    names = "policy_chosen, policy_rejected, reference_chosen, reference_rejected_logps"
    shapes = r"\(2,\), \(2,\), \(2,\), \(2, 1\)$"
    with pytest.raises(ValueError, match=rf"^{names} must all be \(B,\), not {shapes}"):
        dpo.dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match=r"all be \(B,\), not \(2, 3\), \(2, 3\)"):
        dpo.dpo_loss(*torch.zeros(4, 2, 3), 0.1)


def test_accuracy_counts_a_tie_one_half():
    assert dpo.accuracy(torch.tensor([0.5, -1.0, 0.0, 2.0])).item() == 0.625  # (1 + 0 + 1/2 + 1) / 4


def test_means_are_of_the_pairs_and_of_each_side():
    # The pair above, policy (-38, -33) and reference (-40, -30), and another, (-42, -27) and (-40, -31).
    logps, ref_logps = torch.tensor([[-38.0, -42.0], [-33.0, -27.0]]), torch.tensor([[-40.0, -40.0], [-30.0, -31.0]])
    found = dpo.batch_means(torch.tensor([0.25, 0.75], requires_grad=True), torch.tensor([0.5, -1.5]), logps, ref_logps)
    assert {name: mean.item() for name, mean in found.items()} == {
        "accuracy": 0.5, "loss": 0.5, "margin": -0.5, "chosen_logp": -40.0, "rejected_logp": -30.0,
        "chosen_logratio": 0.0, "rejected_logratio": 0.5}  # (2 - 2) / 2, (-3 + 4) / 2
    assert not any(mean.requires_grad for mean in found.values())


def test_means_of_micro_batches_add_up_to_the_mean_of_all_rows():
    # Rows 0 .. 7, means 1, 4 and 6.5 of three, three and two rows, weights 3/8, 3/8, 2/8: 3.5, not (1 + 4 + 6.5) / 3.
    rows = torch.arange(8.0)
    found = [(rows[part].mean().item(), weight) for part, weight in micro_batches(8, 3)]
    assert found == [(1.0, 3 / 8), (4.0, 3 / 8), (6.5, 2 / 8)]
    assert sum(weight * mean for mean, weight in found) == rows.mean() == 3.5
    assert list(micro_batches(8)) == [(slice(0, 8), 1)] and list(micro_batches(2, 5)) == [(slice(0, 2), 1)]


def test_pairs_end_in_eos_unless_truncated_and_never_lose_the_whole_completion():
    prompt = [5, 6, 7]
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 6) == (prompt, [8, EOS], [9, 9, EOS])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 5) == (prompt, [8, EOS], [9, 9])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 4) == (prompt, [8], [9])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 3) is None  # no room
    assert dpo.make_pair(prompt, [], [9, 9], EOS, 6) is None  # nothing but the eos
    assert dpo.make_pair(prompt, [8], [], EOS, 6) is None
    assert dpo.make_pair([], [8], [9, 9], EOS, 6) is None  # nothing to forecast the first token from


def test_collate_meets_prompts_and_completions_at_one_column():
    pairs = [dpo.Pair([1, 2, 3], [4], [5, 6]), dpo.Pair([7], [8, 9], [10, 1])]
    tokens, attention, mask = dpo.collate(pairs, "cpu")
    chosen, rejected = [[1, 2, 3, 4, 0], [0, 0, 7, 8, 9]], [[1, 2, 3, 5, 6], [0, 0, 7, 10, 1]]
    assert tokens.tolist() == chosen + rejected
    assert attention.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert mask.tolist() == [[True, False], [True, True], [True, True], [True, True]]


def test_pair_logps_are_those_of_the_completions_alone_however_they_are_padded(model):
    # The oracle: each row by itself, without padding, through cross-entropy, prompt tokens dropped.
    pairs = [dpo.Pair([1, 2, 3, 4, 5], [6], [7, 8, 9, EOS]), dpo.Pair([9], [8, 7, 6, 5, 4, EOS], [3, EOS])]
    pairs.append(dpo.Pair([2, 2], [2, EOS], [3, 3, 3]))

    def alone(prompt, completion):
        row = torch.tensor(prompt + completion)
        every = -F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
        return every[len(prompt) - 1 :].sum().item()

    # At most 6 tokens; each log-prob is within 2^-16, as for completion_logits.
    chosen, rejected = dpo.pair_logps(model, pairs)
    assert chosen.tolist() == pytest.approx([alone(pair.prompt, pair.chosen) for pair in pairs], abs=6 * 2**-16)
    assert rejected.tolist() == pytest.approx([alone(pair.prompt, pair.rejected) for pair in pairs], abs=6 * 2**-16)
