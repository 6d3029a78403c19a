"""The mathematics against values computed by hand. Probabilities are powers of 1/2, so answers are whole bits.

No network, no files, a few seconds.
"""

import contextlib
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
import reward
from support import fast

BIT = math.log(2)  # one bit in nats
EOS = 0


def nats(*probabilities):
    """Log-probabilities of one distribution, as a (V,) tensor."""
    return torch.tensor(probabilities).log()


@pytest.fixture(scope="module")
def model():
    """A random GPT-2 of 11 words whose forecasts are far from uniform, in eval mode."""
    torch.manual_seed(0)
    size = {"vocab_size": 11, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, eos_token_id=EOS, bos_token_id=EOS)
    policy = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(6)
    return policy


class Flat(torch.nn.Module):
    """A model to which all of 11 words are equally likely. Keeps what it is called with."""

    config = GPT2Config(vocab_size=11, eos_token_id=EOS)

    def __init__(self, device="cpu"):
        super().__init__()
        self.device, self.calls = torch.device(device), []

    def forward(self, **inputs):
        self.calls.append(inputs)
        logits = torch.zeros(len(inputs["input_ids"]), inputs["logits_to_keep"], 11, device=self.device)
        return SimpleNamespace(logits=logits, past_key_values=None)


class Meta(torch.utils._python_dispatch.TorchDispatchMode):
    """Inside, notes the devices of all new tensors, and answers True to `if tensor` on the meta device, counting it.

    A tensor on the meta device has a shape and no numbers. It stands for one on a GPU: what would land on the CPU
    there, or wait for the GPU, shows here.
    """

    def __init__(self):
        super().__init__()
        self.devices, self.answers = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.answers += 1
            return True
        made = function(*args, **(kwargs or {}))
        self.devices |= {tensor.device.type for tensor in (made if isinstance(made, tuple | list) else [made])}
        return made


# ---- log-probabilities -------------------------------------------------------------------------------------


@pytest.fixture
def logits():
    """(2, 2, 4): another distribution in each of the four places, so that a shift in any direction shows."""
    rows = [[nats(1 / 2, 1 / 4, 1 / 8, 1 / 8), nats(1 / 8, 1 / 2, 1 / 8, 1 / 4)]]
    rows += [[nats(1 / 4, 1 / 8, 1 / 2, 1 / 8), nats(1 / 8, 1 / 8, 1 / 4, 1 / 2)]]
    return torch.stack([torch.stack(row) for row in rows])


def test_token_logps_are_those_of_the_tokens_in_their_own_column(logits):
    tokens = torch.tensor([[0, 3], [1, 3]])  # probabilities 1/2, 1/4 | 1/8, 1/2
    expected = -BIT * torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    torch.testing.assert_close(common.token_logps(logits, tokens), expected)
    # Logits are log-probs up to a constant in each place; +100 and -7 must change nothing.
    shift = torch.tensor([[[100.0], [-7.0]], [[0.0], [3.0]]])
    torch.testing.assert_close(common.token_logps(logits + shift, tokens), expected, atol=1e-5, rtol=0)


def test_token_logps_takes_the_softmax_of_bf16_logits_in_fp32():
    # 256 equal logits: every word has probability 2^-8, 8 bits. In bf16 8 * ln 2 = 5.5452 would be 5.5625.
    found = common.token_logps(torch.zeros(1, 1, 256, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.long))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-8 * BIT, abs=1e-6)


def test_token_logps_gradient_is_one_hot_minus_probabilities(logits):
    # d log p_k / d logit_v = [v == k] - p_v; the first place has p = (1/2, 1/4, 1/8, 1/8) and k = 1.
    logits.requires_grad_()
    common.token_logps(logits, torch.tensor([[1, 0], [0, 0]]))[0, 0].backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-1 / 2, 3 / 4, -1 / 8, -1 / 8]))
    assert logits.grad[0, 1].abs().max() == 0 and logits.grad[1].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 2), (2,)])
def test_token_logps_refuses_tokens_of_another_shape(logits, shape):
    with pytest.raises(ValueError, match=r"tokens \(.*\) do not match logits \(2, 2, 4\)"):
        common.token_logps(logits, torch.zeros(shape, dtype=torch.long))


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
    found = common.token_logps(common.completion_logits(model, tokens, 4), tokens[:, 5:])
    assert found.shape == (3, 4)
    for row, logps in zip(tokens, found, strict=True):
        every = model(row[None]).logits[0, :-1]  # column t forecasts token t + 1
        expected = -F.cross_entropy(every, row[1:], reduction="none")[-4:]
        torch.testing.assert_close(logps, expected)


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
    # A grid of 16,000 numbers, k/16,000: exactly n p of them belong to each word, none to a word with p = 0.
    probabilities = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 0.0, 1 / 16])
    drawn = common.draw(probabilities.log().repeat(16_000, 1) + 5, torch.arange(16_000) / 16_000)
    assert torch.bincount(drawn, minlength=6).tolist() == [8000, 4000, 2000, 1000, 0, 1000]


@pytest.mark.parametrize(("uniform", "word"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_draw_reaches_both_ends_and_never_a_word_of_probability_zero(uniform, word):
    # p = (0, 1/2, 0, 1/2, 0): word 1 owns [0, 1/2), word 3 owns [1/2, 1). The largest fp32 below 1 is 1 - 2^-24.
    assert common.draw(nats(0.0, 1 / 2, 0.0, 1 / 2, 0.0)[None], torch.tensor([uniform])).tolist() == [word]


def test_draw_of_nan_is_a_word_all_the_same():
    # So that the run stops where it sees the nan, and says so, and not at an index that is out of range.
    assert 0 <= common.draw(torch.full((1, 5), math.nan), torch.tensor([0.5])).item() < 5


@pytest.mark.parametrize("seed", range(8))
def test_draw_stays_inside_a_vocabulary_of_gpt2s_size(seed):
    # 50,257 rounded probabilities do not add up to 1: these sums are from 5 * 2^-24 below it to 8 * 2^-24 above. The
    # number that is looked up must fall below the sum all the same.
    uniform = torch.full((4,), 1 - 2**-24)
    logits = torch.randn(4, 50_257, generator=common.seeded(seed, "test")) * 0.3
    logits[:, -1] = -math.inf  # the last word that can be drawn is the last but one
    assert common.draw(logits, uniform).max() < 50_256
    logits[:, -1] = 20.0  # now nearly all the probability is on the last word
    assert common.draw(logits, uniform).tolist() == [50_256] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_has_no_bias_in_a_vocabulary_of_gpt2s_size(dtype):
    """The border between word v and its successor stands where the exact sum up to v says, at both ends too.

    The exact sums are in double precision. Numbers 2^-20 (one in a million) below and above a border must lie on
    their own side of it; the fp32 sums are some 2^-24 off.
    """
    logits = (torch.randn(50_257, generator=common.seeded(0, "test")) * 3).to(dtype)
    sums = logits.double().softmax(-1).cumsum(-1)
    words = torch.cat([torch.arange(0, 50_256, 1000), torch.arange(50_200, 50_256)])
    below, above = (sums[words] - 2**-20).clamp(min=0), sums[words] + 2**-20
    assert (common.draw(logits.expand(len(words), -1), below.float()) <= words).all()
    inside = above < 1
    assert (common.draw(logits.expand(len(words), -1), above.float())[inside] > words[inside]).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sample_draws_from_the_same_distribution_that_is_scored(model, precision):
    """The entropy identity: on sampled tokens, the mean of -log p(token) is the mean entropy of the forecasts.

    z = their mean difference in standard errors over 2,000 completions. Right: |z| < 4 but for one seed in 16,000.
    Measured here: 0.5; logits one column off 44 or 36; temperature 0.7 -43; greedy -116; top-5 -12; dropout on 59.
    """
    model = fast.prepare(copy.deepcopy(model), precision)

    def z(shift=0, temperature=1.0):
        prompts = torch.randint(1, 11, (2000, 3), generator=common.seeded(0, "prompts"))
        tokens = common.sample(model, prompts, 8, common.seeded(0, "sampling"))
        mask = common.completion_mask(tokens[:, 3:], EOS)
        with torch.no_grad():
            logits = common.completion_logits(model, tokens, 8).roll(shift, dims=1) * temperature
        logps = logits.log_softmax(-1)
        surprise = -common.token_logps(logits, tokens[:, 3:]) + (logps.exp() * logps).sum(-1)  # minus the entropy
        per_row = common.masked_sum(surprise, mask)
        return (per_row.mean() / (per_row.std() / len(per_row) ** 0.5)).item()

    assert abs(z()) < 4
    assert abs(z(shift=1)) > 10 and abs(z(temperature=0.7)) > 10  # the test can fail


def test_sample_with_its_cache_equals_a_loop_that_feeds_everything_again(model):
    prompts = torch.randint(1, 11, (5, 3), generator=common.seeded(1, "prompts"))
    uniform, tokens = torch.rand(12, 5, generator=common.seeded(1, "sampling")), prompts
    with torch.no_grad():
        for column in range(12):
            drawn = common.draw(model(tokens).logits[:, -1], uniform[column])
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    found = common.sample(model, prompts, 12, common.seeded(1, "sampling"))
    mask = common.completion_mask(tokens[:, 3:], EOS)
    assert not mask.all()  # a row ends early, or the next line would test less than it says
    assert found[:, 3:].tolist() == tokens[:, 3:].masked_fill(~mask, EOS).tolist()
    assert found[:, :3].tolist() == prompts.tolist()


def test_sample_of_some_rows_goes_on_with_them_as_it_would_among_all(model):
    """What a rank of several draws must not depend on the rank. No rows at all are no reason to stop, either."""
    prompts = torch.randint(1, 11, (6, 3), generator=common.seeded(1, "prompts"))
    whole, some, none = (common.sample(model, prompts, 12, common.seeded(1, "sampling"), own=own)
                         for own in (slice(None), slice(2, 5), slice(4, 4)))
    assert some.tolist() == whole[2:5].tolist() and none.shape == (0, 15)


def test_sample_keeps_a_cache_whatever_the_models_config_says(model):
    prompts, other = torch.randint(1, 11, (5, 3), generator=common.seeded(1, "prompts")), copy.deepcopy(model)
    other.config.use_cache = False  # as in a checkpoint of a training that needed none
    expected, found = (common.sample(some, prompts, 12, common.seeded(1, "sampling")) for some in (model, other))
    assert found.tolist() == expected.tolist()


def test_sample_makes_everything_on_the_device_of_the_prompts(monkeypatch):
    monkeypatch.setattr(common, "cast_once", lambda *_: contextlib.nullcontext())  # autocast knows no meta device
    with Meta() as meta:
        tokens = common.sample(Flat("meta"), torch.ones(2, 3, dtype=torch.long, device="meta"), 4)
    assert tokens.shape == (2, 7) and meta.devices == {"meta"}
    assert meta.answers == 4  # in each column one question: did a row end?


def test_sample_keeps_its_width_when_every_row_ends_at_once(model):
    class Ends(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, **_):
            logits = torch.full((len(input_ids), 1, 11), -math.inf)
            logits[..., EOS] = 0.0
            return type("Output", (), {"logits": logits, "past_key_values": None})

    assert common.sample(Ends(), torch.tensor([[3, 4], [5, 6]]), 3).tolist() == [[3, 4, 0, 0, 0], [5, 6, 0, 0, 0]]


def test_seeded_generators_differ_by_use_and_repeat_by_name():
    first, again, other = (torch.rand(4, generator=common.seeded(3, use)) for use in ("a", "a", "b"))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.tolist() != torch.rand(4, generator=common.seeded(4, "a")).tolist()


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
        logps = common.token_logps(logits, torch.tensor([[token]]))
        reinforce.reinforce_loss(logps, torch.tensor([[True]]), torch.tensor([r])).backward()
        expected += probabilities[token] * logits.grad.flatten()
    torch.testing.assert_close(-expected, torch.tensor([1 / 4, -1 / 8, -1 / 8]))


def test_leave_one_out_takes_the_others_mean():
    # The others' means of (0, 1/2, 1) are (3/4, 1/2, 1/4).
    assert reinforce.leave_one_out(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-0.75, 0.0, 0.75]
    assert reinforce.leave_one_out(torch.tensor([1.0, 0.25])).tolist() == [0.75, -0.75]
    assert reinforce.leave_one_out(torch.tensor([0.5])).tolist() == [0.5]  # a row alone has no others


def test_kl_is_policy_to_reference_and_not_the_other_way():
    # p = (1/2, 1/4, 1/8, 1/8), q = (1/8, 1/2, 1/4, 1/8), in bits:
    # KL(p ‖ q) = 1/2 * 2 - 1/4 * 1 - 1/8 * 1 + 0 = 5/8;  KL(q ‖ p) = -1/8 * 2 + 1/2 * 1 + 1/4 * 1 + 0 = 1/2.
    p, q = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8), nats(1 / 8, 1 / 2, 1 / 4, 1 / 8)
    logits, ref_logits = torch.stack([p, q])[None] + 3, torch.stack([q, p])[None] - 5  # (1, 2, 4)
    expected = BIT * torch.tensor([[5 / 8, 1 / 2]])
    torch.testing.assert_close(reinforce.token_kl(logits, ref_logits), expected)


def test_kl_gradient_is_that_of_the_policys_exact_kl():
    # d KL / d logit_v = p_v * (log p_v/q_v - KL). For the p, q above, in bits: log p/q = (2, -1, -1, 0), KL = 5/8:
    # (1/2 * 11/8, -1/4 * 13/8, -1/8 * 13/8, -1/8 * 5/8) = (44, -26, -13, -5) / 64. They add up to 0.
    logits = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8).reshape(1, 1, 4).requires_grad_()
    reinforce.token_kl(logits, nats(1 / 8, 1 / 2, 1 / 4, 1 / 8).reshape(1, 1, 4)).sum().backward()
    torch.testing.assert_close(logits.grad.flatten(), BIT * torch.tensor([44.0, -26.0, -13.0, -5.0]) / 64)


def test_kl_of_a_policy_to_itself_is_zero_and_never_negative():
    noise = common.seeded(0, "test")
    logits, ref_logits = torch.randn(2, 4, 5, 300, generator=noise) * 3
    assert reinforce.token_kl(logits, logits).abs().max() == 0
    assert reinforce.token_kl(logits, ref_logits).min() > 0


def test_kl_counts_a_word_that_the_policy_never_says_as_zero():
    # p = (1, 0), q = (1/2, 1/2): 1 bit. p = q = (1, 0): 0, not nan.
    p, q = nats(1.0, 0.0).reshape(1, 1, 2), nats(1 / 2, 1 / 2).reshape(1, 1, 2)
    assert reinforce.token_kl(p, q).item() == pytest.approx(BIT)
    assert reinforce.token_kl(p, p).item() == 0


def test_kl_takes_the_softmax_of_bf16_logits_in_fp32_and_refuses_other_shapes():
    # p = (1, 0, 0, ...) against 256 equal words: 8 bits. In bf16, log 256 = 5.5452 would be 5.5625.
    flat = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    sure = torch.full_like(flat, -math.inf)
    sure[..., 0] = 0
    assert reinforce.token_kl(sure, flat).item() == pytest.approx(8 * BIT, abs=1e-6)
    logits, ref_logits = torch.randn(2, 1, 4, 256, generator=common.seeded(0, "test")).bfloat16()
    exact = reinforce.token_kl(logits.float(), ref_logits.float())  # of the same, already rounded, numbers
    assert reinforce.token_kl(logits, ref_logits).tolist() == exact.tolist()
    with pytest.raises(ValueError, match=r"ref_logits \(1, 1, 256\) do not match logits \(1, 2, 256\)"):
        reinforce.token_kl(flat.expand(1, 2, 256), flat)


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


def test_completions_that_repeat_the_prompt_lose_it():
    prompts = ["I saw", "We saw", "It is"]
    texts = ["I saw it.", "We saw it.", "is good"], ["I saw no.", "We saw no.", "It is bad"]
    chosen, rejected, layout = dpo.split_completions(prompts, *texts)
    assert layout == "completions repeat their prompt, which is taken off"
    assert chosen == [" it.", " it.", ""]  # the third row follows no layout: its completion can't be told
    assert rejected == [" no.", " no.", ""]


def test_completions_that_bring_their_own_space_stand_as_they_are():
    for texts in ([" good", ", good"], ["bad", "bad"]), (["good", "fine"], ["bad", " bad"]):  # one space in all
        chosen, rejected, layout = dpo.split_completions(["I saw", "We saw"], *texts)
        assert layout == "completions continue their prompt as they stand"
        assert [chosen, rejected] == [texts[0], texts[1]]
    chosen, _, layout = dpo.split_completions(["I saw ", "We saw"], ["it", "it"], ["no", "no"])
    assert layout == "completions continue their prompt as they stand" and chosen == ["it", "it"]


def test_half_of_the_rows_are_not_enough_to_say_that_completions_repeat_the_prompt():
    # "It" begins its own completion by chance: taken off, it would leave a text that is none.
    texts = ["It was", " it."], ["Itself", " no."]
    chosen, rejected, layout = dpo.split_completions(["It", "We saw"], *texts)
    assert [chosen, rejected] == [texts[0], texts[1]] and "as they stand" in layout


@pytest.mark.parametrize("missing", range(3))
def test_columns_of_unequal_length_are_refused(missing):
    columns = [["I saw", "We saw"], ["good", "good"], ["bad", "bad"]]
    columns[missing].pop()
    with pytest.raises(ValueError, match="zip"):
        dpo.split_completions(*columns)


def test_a_space_is_put_in_where_the_data_never_has_one():
    chosen, rejected, layout = dpo.split_completions(["I saw", "We saw"], ["good", ""], ["bad", "bad"])
    assert layout == "no text has a space where prompt and completion meet, so one is put in"
    assert chosen == [" good", ""] and rejected == [" bad", " bad"]


def test_pairs_end_in_eos_unless_truncated_and_never_lose_the_whole_completion():
    prompt = [5, 6, 7]
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 6) == (prompt, [8, EOS], [9, 9, EOS])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 5) == (prompt, [8, EOS], [9, 9])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 4) == (prompt, [8], [9])
    assert dpo.make_pair(prompt, [8], [9, 9], EOS, 3) is None  # no room
    assert dpo.make_pair(prompt, [], [9, 9], EOS, 6) is None  # nothing but the eos
    assert dpo.make_pair([], [8], [9, 9], EOS, 6) is None  # nothing to forecast the first token from


def test_collate_meets_prompts_and_completions_at_one_column():
    pairs = [dpo.Pair([1, 2, 3], [4], [5, 6]), dpo.Pair([7], [8, 9], [10, 1])]
    tokens, attention, mask = dpo.collate(pairs, "cpu")
    chosen, rejected = [[1, 2, 3, 4, 0], [0, 0, 7, 8, 9]], [[1, 2, 3, 5, 6], [0, 0, 7, 10, 1]]
    assert tokens.tolist() == chosen + rejected
    assert attention.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert mask.tolist() == [[True, False], [True, True], [True, True], [True, True]]


def test_pairs_are_put_on_the_models_device():
    pairs = [dpo.Pair([1, 2, 3], [4], [5, 6]), dpo.Pair([7], [8, 9], [10, 1])]
    assert [tensor.device.type for tensor in dpo.collate(pairs, "meta")] == ["meta"] * 3
    model = Flat("meta")
    assert [logps.device.type for logps in dpo.pair_logps(model, pairs)] == ["meta"] * 2
    assert model.calls[0]["input_ids"].device.type == model.calls[0]["attention_mask"].device.type == "meta"


def test_widths_are_those_of_the_longer_completions():
    pairs = [dpo.Pair([1, 2, 3, 4], [5], [6, 7]), dpo.Pair([1], [5, 6, 7], [8])]
    assert dpo.widths(pairs).tolist() == [2, 3]


def test_pair_logps_are_those_of_the_completions_alone_however_they_are_padded(model):
    # The oracle: each row by itself, without padding, through cross-entropy, prompt tokens dropped.
    pairs = [dpo.Pair([1, 2, 3, 4, 5], [6], [7, 8, 9, EOS]), dpo.Pair([9], [8, 7, 6, 5, 4, EOS], [3, EOS])]
    pairs.append(dpo.Pair([2, 2], [2, EOS], [3, 3, 3]))

    def alone(prompt, completion):
        row = torch.tensor(prompt + completion)
        every = -F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
        return every[len(prompt) - 1 :].sum().item()

    chosen, rejected = dpo.pair_logps(model, pairs)
    assert chosen.tolist() == pytest.approx([alone(pair.prompt, pair.chosen) for pair in pairs], abs=1e-4)
    assert rejected.tolist() == pytest.approx([alone(pair.prompt, pair.rejected) for pair in pairs], abs=1e-4)


# ---- the fast forms are the plain ones ---------------------------------------------------------------------


def test_logps_and_kl_have_the_gradients_written_on_paper():
    # z = log p, p = (1/2, 1/4, 1/8, 1/8), q = (1/8, 1/2, 1/4, 1/8): log p - log q = (2, -1, -1, 0) bits,
    # KL = 1/2 * 2 - 1/4 - 1/8 = 5/8 bit, and p * (log p - log q - KL) = (11/16, -13/32, -13/64, -5/64) bits.
    # Token 1: log p = -2 bits, its gradient (-1/2, 3/4, -1/8, -1/8).
    logits = nats(1 / 2, 1 / 4, 1 / 8, 1 / 8).reshape(1, 1, 4).requires_grad_()
    ref_logits = nats(1 / 8, 1 / 2, 1 / 4, 1 / 8).reshape(1, 1, 4).requires_grad_()
    logps, kl = fast.logps_and_kl(logits, torch.tensor([[1]]), ref_logits)
    assert (logps.item(), kl.item()) == (pytest.approx(-2 * BIT), pytest.approx(5 / 8 * BIT))
    (by_kl,) = torch.autograd.grad(kl.sum(), logits, retain_graph=True)
    torch.testing.assert_close(by_kl[0, 0], BIT * torch.tensor([11 / 16, -13 / 32, -13 / 64, -5 / 64]))
    (logps.sum() + 0 * kl.sum()).backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-1 / 2, 3 / 4, -1 / 8, -1 / 8]))
    assert ref_logits.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_and_kl_equal_the_plain_functions_with_their_gradients(dtype):
    # (2, 70, 30,000): pieces of 34 forecasts, the last one ragged. A word of probability 0 in some of them.
    generator = common.seeded(0, "test")
    logits, ref_logits = (torch.randn(2, 70, 30_000, generator=generator).mul(3).to(dtype) for _ in range(2))
    logits[0, :3, 7] = -math.inf
    ref_logits[0, 0, 7] = -math.inf
    tokens = torch.randint(8, 30_000, (2, 70), generator=generator)
    weights = torch.randn(2, 2, 70, generator=generator)

    def both(leaf, function):
        logps, kl = function(leaf.requires_grad_())
        (weights[0] * logps + weights[1] * kl).sum().backward()
        return logps.detach(), kl.detach(), leaf.grad.float()

    found = both(logits.clone(), lambda leaf: fast.logps_and_kl(leaf, tokens, ref_logits))
    plain = lambda leaf: (common.token_logps(leaf, tokens), reinforce.token_kl(leaf, ref_logits))  # noqa: E731
    expected = both(logits.float().clone(), plain)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8  # of the gradient, which has the logits' type
    for ours, theirs, tolerance in zip(found, expected, (1e-5, 1e-5, rounding), strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=tolerance)
    alone, nothing = fast.logps_and_kl(logits, tokens)
    torch.testing.assert_close(alone, found[0])
    assert nothing.abs().max() == 0


@pytest.mark.parametrize(("device", "rows", "words", "starts"), [
    ("cpu", 140, 30_000, [0, 34, 68, 102, 136]),  # 2^20 // 30,000 = 34 rows: 4 MB
    ("meta", 5000, 30_000, [0, 2236, 4472]),  # 2^26 // 30,000 = 2,236 rows: 256 MB, for a GPU
    ("meta", 3, 2**26 + 1, [0, 1, 2]),  # never less than a row
])
def test_logps_and_kl_go_through_the_rows_once_in_pieces_of_limited_size(device, rows, words, starts):
    with Meta() as meta:
        pieces = list(fast.LogpsAndKL.pieces(torch.empty(rows, words, device=device), None))
    assert [(piece.start, piece.stop) for piece, _, _ in pieces] == [(first, first + starts[1]) for first in starts]
    assert meta.devices == {device} and (meta.answers == 0 or device == "cpu")


def test_logps_and_kl_never_wait_for_a_gpu_and_make_nothing_elsewhere():
    logits, ref_logits = torch.zeros(2, 2, 3, 11, device="meta").unbind()
    tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
    with Meta() as meta:
        logps, kl = fast.logps_and_kl(logits.requires_grad_(), tokens, ref_logits)
        (logps + kl).sum().backward()
    assert meta.devices == {"meta"} and meta.answers == 0


def test_logps_and_kl_give_their_gradient_rows_that_begin_at_multiples_of_64():
    # Products with it are faster then: 70 words take the place of 128.
    logits, ones = torch.zeros(3, 70), torch.ones(3, 1)
    grad = fast.LogpsAndKL.gradient(logits, torch.zeros(3, 1, dtype=torch.long), None, 0 * ones, ones, ones)
    assert grad.shape == (3, 70) and grad.stride() == (128, 1)


def test_logps_and_kl_have_no_second_derivative_and_say_so():
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    logps, _ = fast.logps_and_kl(logits, torch.tensor([[1]]))
    (grad,) = torch.autograd.grad(logps.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_logps_and_kl_refuse_other_shapes():
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"tokens \(2, 2\)"):
        fast.logps_and_kl(logits, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ref_logits \(2, 3, 5\)"):
        fast.logps_and_kl(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 5))


def test_a_prepared_model_computes_the_same(model):
    tokens = torch.randint(1, 11, (4, 9), generator=common.seeded(0, "test"))
    with torch.no_grad():
        plain = model(tokens).logits
        prepared = fast.prepare(copy.deepcopy(model), "fp32")
        assert not any(type(module).__name__ == "NewGELUActivation" for module in prepared.modules())
        torch.testing.assert_close(prepared(tokens).logits, plain, atol=1e-4, rtol=1e-5)
        low = fast.prepare(copy.deepcopy(model), "bf16")(tokens).logits
    assert low.dtype == torch.bfloat16
    # In bf16 the logits of a place are shifted together, and each is rounded to 8 bits on the way.
    exact, found = plain.log_softmax(-1), low.float().log_softmax(-1)
    assert 0 < (found - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_logits_far_from_zero_keep_their_distribution_in_bf16(model):
    # The words' weights have a common part, and logits are near -100, where bf16 has steps of 0.5. Two
    # words whose logits differ by 0.1 would become equal. Taking the common part off leaves differences as they are.
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.lm_head.weight.normal_(generator=common.seeded(0, "weights")).mul_(0.1).add_(1.0)
        policy.transformer.ln_f.weight.fill_(1.0)
        policy.transformer.ln_f.bias.fill_(-100 / 16)  # 16 wide: every logit is -100 plus its own part
        tokens = torch.randint(1, 11, (4, 9), generator=common.seeded(0, "test"))
        exact = policy(tokens).logits
        rounded = exact.bfloat16()
        low = fast.prepare(policy, "bf16")(tokens).logits
    assert policy(tokens).logits.tolist() == low.tolist()  # with a graph too
    assert exact.mean() < -90 and low.dtype == torch.bfloat16
    assert reinforce.token_kl(exact, rounded).mean() > 20 * reinforce.token_kl(exact, low).mean()


def test_the_bf16_head_follows_its_weights_and_their_gradient(model):
    policy, plain = fast.prepare(copy.deepcopy(model), "bf16"), copy.deepcopy(model)
    tokens = torch.randint(1, 11, (4, 9), generator=common.seeded(0, "test"))
    with torch.no_grad():
        before = policy(tokens).logits.float().log_softmax(-1)
        for changed in (policy, plain):
            changed.lm_head.weight.mul_(0.5)  # in place, as an optimizer does
        after, expected = (changed(tokens).logits.float().log_softmax(-1) for changed in (policy, plain))
    assert (after - expected).abs().mean() < 0.1 < (after - before).abs().mean()
    for changed in (policy, plain):
        common.token_logps(changed(tokens).logits, tokens).sum().backward()
    found, exact = policy.lm_head.weight.grad, plain.lm_head.weight.grad
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deepcopy_of_a_prepared_model_has_weights_of_its_own(model, precision):
    policy = fast.prepare(copy.deepcopy(model), precision)
    other = copy.deepcopy(policy)
    tokens = torch.randint(1, 11, (2, 5), generator=common.seeded(0, "test"))
    with torch.no_grad():
        before = policy(tokens).logits
        for weight in other.parameters():
            weight.zero_()
        assert other(tokens).logits.abs().max() == 0 and other(tokens).logits.dtype == before.dtype
        assert policy(tokens).logits.tolist() == before.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_sampled_from_is_what_is_scored_after_every_step_of_the_optimizer(model, precision):
    # Whatever copy of the weights sampling makes must end with it: a fused AdamW changes weights without counting
    # their version up, so a copy that is kept by version would stay what the weights were before training.
    policy = fast.prepare(copy.deepcopy(model), precision)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    prompts, drawn = torch.ones(2, 3, dtype=torch.long), []
    for step in range(3):
        forecasts = torch.zeros(2, 4, 11, dtype=torch.bfloat16 if precision == "bf16" else None)
        tokens = common.sample(policy, prompts, 4, common.seeded(step, "test"), forecasts)
        mask = common.completion_mask(tokens[:, 3:], EOS)
        logits = common.completion_logits(policy, tokens, 4)
        sampled, scored = (some.float().log_softmax(-1)[mask] for some in (forecasts, logits))
        drawn.append(sampled[0].clone())
        torch.testing.assert_close(sampled, scored, atol=0.1 if precision == "bf16" else 1e-4, rtol=0)
        common.masked_sum(fast.logps_and_kl(logits, tokens[:, 3:])[0], mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (drawn[2] - drawn[0]).abs().max() > 1  # the steps were large


def test_sampling_in_bf16_leaves_no_weight_without_a_gradient(model):
    # autocast keeps the bf16 copies that sampling made without a graph; a later forward must not find them.
    policy = fast.prepare(copy.deepcopy(model), "bf16")
    tokens = common.sample(policy, torch.ones(2, 3, dtype=torch.long), 4, common.seeded(0, "test"))
    logps, _ = fast.logps_and_kl(common.completion_logits(policy, tokens, 4), tokens[:, 3:])
    logps.sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in policy.parameters())


def test_sampling_in_bf16_casts_a_weight_once(model):
    policy, casts = fast.prepare(copy.deepcopy(model), "bf16"), []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Casts():
        tokens = common.sample(policy, torch.ones(2, 3, dtype=torch.long), 6, common.seeded(0, "test"))
    assert (tokens[:, -2] != EOS).any()  # six columns were drawn
    assert casts.count((16, 64)) == 2 and casts.count((11, 16)) == 1  # the MLP's first weight in two layers; the head


def test_sample_feeds_no_row_that_has_ended_and_keeps_the_forecasts(model):
    sizes = []

    class Watched(torch.nn.Module):
        config = model.config

        def forward(self, **inputs):
            sizes.append(len(inputs["input_ids"]))
            assert inputs["logits_to_keep"] == 1  # the product with the vocabulary is not done for the prompt
            output = model(**inputs)
            assert not output.logits.requires_grad  # no graph is kept while sampling
            return output

    prompts = torch.randint(1, 11, (20, 3), generator=common.seeded(2, "prompts"))
    forecasts = torch.zeros(20, 12, 11)
    tokens = common.sample(Watched(), prompts, 12, common.seeded(2, "sampling"), forecasts)
    mask = common.completion_mask(tokens[:, 3:], EOS)
    assert sizes == mask.sum(dim=0).tolist() and sizes[-1] < sizes[0]
    with torch.no_grad():
        every = common.completion_logits(model, tokens, 12)
    torch.testing.assert_close(forecasts[mask], every[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "micro_batch", "sizes"), [(8, None, [8]), (8, 3, [3, 3, 2]), (2, 5, [2])])
def test_parts_cover_the_rows_and_their_shares_are_exact(rows, micro_batch, sizes):
    found = list(fast.parts(rows, micro_batch))
    assert [row for part, _ in found for row in range(rows)[part]] == list(range(rows))
    assert [part.stop - part.start for part, _ in found] == sizes
    assert [share for _, share in found] == [size / rows for size in sizes]


def test_parts_are_of_a_ranks_own_rows_and_their_shares_of_all(monkeypatch):
    monkeypatch.setattr(fast, "mine", lambda rows: {8: slice(3, 7), 1: slice(0, 0)}[rows])
    assert list(fast.parts(8, 3)) == [(slice(3, 6), 3 / 8), (slice(6, 7), 1 / 8)]
    assert list(fast.parts(8, None)) == [(slice(3, 7), 1 / 2)] and list(fast.parts(1, 3)) == []


def test_like_lengths_are_batches_of_every_row_in_random_order():
    lengths = torch.randint(1, 100, (330,), generator=common.seeded(0, "lengths"))
    batches = fast.like_lengths(lengths, 8, common.seeded(0, "order"), window=10)
    assert sorted(torch.cat(batches).tolist()) == list(range(330))
    assert sorted(map(len, batches)) == [2] + [8] * 41  # the ragged batch is there, and there is one
    spread = [(lengths[rows].max() - lengths[rows].min()).item() for rows in batches]
    assert sum(spread) / len(spread) < 15  # of 99: ten batches sorted together; at random it would be 78
    assert all(len(set((rows // 80).tolist())) > 1 for rows in batches if len(rows) > 2)  # from all over the data set
    means = torch.stack([lengths[rows].float().mean() for rows in batches])
    neighbours = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
    assert abs(neighbours) < 0.5  # long batches come at no particular time
    again = fast.like_lengths(lengths, 8, common.seeded(0, "order"), window=10)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in batches]
    other = fast.like_lengths(lengths, 8, common.seeded(1, "order"), window=10)
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in batches]


@pytest.mark.parametrize(("capabilities", "precision"), [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
    ({"avx512_f": True}, "fp32"), ({}, "fp32"),
])
def test_auto_is_bf16_on_processors_that_have_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast.pick_device("cpu", "auto") == (torch.device("cpu"), precision)
    assert fast.pick_device("cpu", "fp32")[1] == "fp32" and fast.pick_device("cpu", "bf16")[1] == "bf16"
    assert not fast.fast_bf16(torch.device("mps"))


@pytest.mark.parametrize(("capability", "fast_enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_auto_is_bf16_on_gpus_that_do_not_emulate_it(monkeypatch, capability, fast_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # (7, 5): the course's T4
    assert fast.fast_bf16(torch.device("cuda")) == fast_enough


# ---- numbers of the evaluation -----------------------------------------------------------------------------


def test_mean_comes_with_the_standard_error_of_the_mean():
    # Values 0, 1/2, 1: variance (1/4 + 0 + 1/4) / 2 = 1/4, standard error 1/2 / sqrt(3) = 0.288675.
    assert reward.mean_and_error([0.0, 0.5, 1.0]) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert reward.mean_and_error([0.25]) == (0.25, None)
    # Two samples each of three prompts: means 0, 1/2, 1 as above. As six values they would be thought surer.
    assert reward.mean_and_error([0, 0, 0.25, 0.75, 1, 1], group=2) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert reward.mean_and_error([0.25, 0.75], group=2) == (0.5, None)


@pytest.mark.parametrize(
    ("names", "wanted", "index"),
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["positive", "neutral", "negative"], None, 0),
        (["neg", "pos"], None, 1),
        (["LABEL_0", "LABEL_1"], None, 1),
        (["1 star", "5 stars"], "5 stars", 1),
    ],
)
def test_positive_is_found_by_its_name(names, wanted, index):
    assert reward.positive_index(dict(enumerate(names)), wanted) == index


@pytest.mark.parametrize(
    ("names", "wanted"),
    [(["good", "bad"], None), (["LABEL_0", "LABEL_1", "LABEL_2"], None), (["neg", "pos"], "x"), (["pos", "POS"], None)],
)
def test_positive_is_not_guessed(names, wanted):
    with pytest.raises(ValueError, match=f"which of the labels {', '.join(names)} is {wanted or 'positive'}"):
        reward.positive_index(dict(enumerate(names)), wanted)


@pytest.fixture
def layer():
    """w = (3, 4) and d/dw |5 w|^2 / 2 = 25 w = (75, 100), whose norm is 125."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    ((5 * layer.weight) ** 2 / 2).sum().backward()
    return layer


def test_a_number_that_is_not_finite_stops_with_its_step_and_the_first_cause(layer):
    fine, nan = torch.tensor(1.0), torch.tensor(math.nan)
    assert common.checked_grad_norm(7, {"loss": fine}, layer) == 125.0
    for step, values, message in ((7, {"reward": fine, "loss": nan}, "step 7: the loss is nan; the weights were not t"),
                                  (7, {"reward": nan, "loss": nan}, "step 7: the reward is nan; the weights were not"),
                                  (1, {"loss": nan}, r"step 1: the loss is nan; .* what was loaded, or a flag")):
        with pytest.raises(common.UserError, match=message):
            common.checked_grad_norm(step, values, layer)
    layer.weight.grad[0, 1] = math.inf
    for loss, message in ((fine, "step 7: the gradient's norm is inf"), (nan, "step 7: the loss is nan")):
        with pytest.raises(common.UserError, match=message):
            common.checked_grad_norm(7, {"loss": loss}, layer)


@pytest.mark.parametrize(("max_norm", "gradient"), [(None, (75, 100)), (200, (75, 100)), (12.5, (7.5, 10))])
def test_a_gradient_longer_than_max_grad_norm_is_shortened_to_it(layer, max_norm, gradient):
    assert common.checked_grad_norm(1, {}, layer, max_norm) == 125.0  # as it was before
    assert layer.weight.grad[0].tolist() == pytest.approx(gradient, rel=1e-6)
