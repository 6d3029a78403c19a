"""Arithmetic and places: bf16 under torch.autocast computes what fp32 does, only rounded; gradients and optimizer reach
the fp32 weights; nothing waits for a GPU, or lands beside it."""

import copy
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import common
import dpo
import reinforce
from support.families import head_name
from support.loading import load_model, load_policy
from support.precision import fast_bf16, pick_device
from support.statistics import mean_and_error
from test_losses import EOS, Flat, random_policy, surprise
from tests.helpers import arguments


@pytest.fixture
def policy():
    """test_losses.py's random GPT-2 in fp32, with the name of its head's weights, as load_policy() gives it."""
    policy = random_policy()
    policy.head_name = head_name(policy)
    assert policy.head_name == "lm_head.weight"
    return policy


TOKENS = torch.randint(1, 11, (4, 9), generator=common.seeded(0, "test"))


def bf16(enabled=True):
    """A new context; the training loops have one that they enter anew each time, which is the same."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def forecasts(model, tokens=TOKENS, enabled=True):
    """-> (B, 4, 11): log-probs of the last 4 tokens' columns, of logits in bf16."""
    with bf16(enabled), torch.no_grad():
        return common.log_probs(common.completion_logits(model, tokens, 4))


# ---- the same numbers, rounded -----------------------------------------------------------------------------


def test_a_loaded_model_computes_what_the_librarys_does(tmp_path):
    random_policy().save_pretrained(tmp_path)
    loaded = load_model(AutoModelForCausalLM, "a language model", "--policy", str(tmp_path), torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    kinds = [{type(module).__name__ for module in model.modules()} for model in (loaded, plain)]
    assert "NewGELUActivation" in kinds[1] - kinds[0]  # eight operations where one does
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():  # in double precision: only another function would be seen
        torch.testing.assert_close(loaded.double()(TOKENS).logits, plain.double()(TOKENS).logits, atol=1e-9, rtol=0)


def test_bf16_forecasts_are_those_of_fp32_but_for_their_rounding(policy):
    exact, found = forecasts(policy, enabled=False), forecasts(policy)
    # 8 bits: each of some twenty operations from token to logit rounds by 2^-9 of the value.
    assert 0 < (found - exact).abs().mean() < 20 * 2**-9 * exact.abs().mean()


def far_from_zero(policy):
    """The words' weights get a common part, in every other of 16 columns: a logit is -100 plus a part of its own."""
    common_part = torch.arange(16) % 2
    with torch.no_grad():
        policy.lm_head.weight.normal_(generator=common.seeded(0, "weights")).mul_(0.1).add_(common_part)
        policy.transformer.ln_f.weight.fill_(1.0)
        policy.transformer.ln_f.bias.copy_(-100 / 8 * common_part)
    return policy


def test_logits_far_from_zero_keep_their_distribution_in_bf16(policy):
    # Near -100 bf16 has steps of 0.5: two words whose logits differ by 0.1 become equal. That is an error of 0.5^2 / 12
    # in the square, while around 0 the steps are 2^-8 and less. The KL goes with the square: thousands of times less.
    policy, plain = far_from_zero(policy), far_from_zero(random_policy())  # without a head_name
    exact = common.completion_logits(policy, TOKENS, 4)
    with bf16():
        low, rounded = (common.completion_logits(model, TOKENS, 4) for model in (policy, plain))
        _, sampled = common.sample(policy, TOKENS[:, :5], torch.rand(4, 4), keep_logits=True)
    assert exact.mean() < -90 and rounded.mean() < -90 and low.abs().mean() < 10
    assert 0 < sampled.abs().mean() < 10  # at least the first of four columns is not 0: of logits near -100 over 22
    assert low.dtype == rounded.dtype == torch.bfloat16
    exact, low, rounded = map(common.log_probs, (exact, low, rounded))
    assert common.token_kl(exact, rounded).mean() > 20 * common.token_kl(exact, low).mean()


def test_in_fp32_and_without_its_name_the_heads_weights_stay_as_they_are(policy):
    assert common.centred_head(policy) == {}
    with bf16():
        assert common.centred_head(policy).keys() == {"lm_head.weight"}
        assert common.centred_head(random_policy()) == {}


def test_sampling_in_bf16_draws_from_the_distribution_that_is_scored(policy):
    prompts = torch.randint(1, 11, (2000, 3), generator=common.seeded(0, "prompts"))
    with bf16():
        tokens = common.sample(policy, prompts, torch.rand(2000, 8, generator=common.seeded(0, "sampling")))
        assert abs(surprise(policy, tokens)) < 4
        assert abs(surprise(policy, tokens, shift=1)) > 10  # the test can fail


@pytest.mark.skipif("OWN_POLICY" not in os.environ, reason="for a policy of your own, OWN_POLICY=path/to/model")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_of_your_own_is_sampled_from_the_distribution_that_is_scored(precision):
    """The entropy identity on 640 completions of 20 tokens, each of a random first token."""
    model, tokenizer = load_policy(arguments(policy=os.environ["OWN_POLICY"]), torch.device("cpu"))
    order, found = common.seeded(0, "test"), []
    for prompts in torch.randint(len(tokenizer), (640, 1), generator=order).split(64):
        with bf16(precision == "bf16"), torch.no_grad():
            tokens = common.sample(model, prompts, torch.rand(64, 20, generator=order))
            logp = common.log_probs(common.completion_logits(model, tokens, 20))
        excess = -common.token_logps(logp, tokens[:, 1:]) + (logp.exp() * logp).sum(-1)  # less the entropy
        found.append(common.masked_sum(excess, common.completion_mask(tokens[:, 1:], model.config.eos_token_id)))
    mean, error = mean_and_error(torch.cat(found))
    print(f"\n{precision}: -log p less entropy {mean:.3f} ± {error:.3f} nats a completion, z = {mean / error:.2f}")
    assert abs(mean) < 4 * error


# ---- gradients, and weights that change --------------------------------------------------------------------


def test_bf16_gradients_reach_the_head_and_the_embedding_that_it_is_tied_to(policy):
    def gradients(model, enabled):
        model = copy.deepcopy(model)
        with bf16(enabled):
            logp = common.log_probs(common.completion_logits(model, TOKENS, 4))
        common.token_logps(logp, TOKENS[:, 5:]).sum().backward()
        assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())
        return model.lm_head.weight.grad, model.transformer.wte.weight.grad

    untied = copy.deepcopy(policy)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    exact, found = gradients(untied, False), gradients(untied, True)
    for ours, expected in zip(found, exact, strict=True):  # 0.99: what is beside it is a seventh of it at most
        assert torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.99
    tied, same = gradients(policy, True)
    assert tied is same and torch.cosine_similarity(tied.flatten(), sum(found).flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("enabled", "rounding"), [(False, 0.01), (True, 0.25)], ids=["fp32", "bf16"])
def test_what_is_sampled_from_is_what_is_scored_after_every_step_of_the_optimizer(policy, enabled, rounding):
    # Whatever copy of the weights sampling makes must end with its context: a fused AdamW changes weights without
    # counting their version up, so a copy that is kept by version would stay what the weights were before training.
    # Rounding: a mean over forecasts; logits are below 64, where bf16 has steps of 1/4 and fp32 of 2^-18.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    prompts, autocast, drawn = torch.ones(8, 3, dtype=torch.long), bf16(enabled), []
    for step in range(3):
        uniform = torch.rand(8, 4, generator=common.seeded(step, "test"))
        with autocast, torch.no_grad():
            tokens, logits = common.sample(policy, prompts, uniform, keep_logits=True)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        mask = common.completion_mask(tokens[:, 3:], EOS)
        with autocast:
            logp = common.log_probs(common.completion_logits(policy, tokens, 4))
        assert (common.log_probs(logits) - logp)[mask].abs().mean() < rounding
        drawn.append(common.log_probs(logits)[0, 0])
        common.masked_sum(common.token_logps(logp, tokens[:, 3:]), mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (drawn[1] - drawn[0]).abs().mean() > 1 and (drawn[2] - drawn[1]).abs().mean() > 1  # the steps were large


def test_sampling_in_bf16_leaves_no_weight_without_a_gradient(policy):
    # As in the training loop, each in a context of its own: in one context older releases of PyTorch score with the
    # bf16 weights that sampling made without a graph (pytorch/pytorch issue 112583), and no layer's weight learns.
    with bf16(), torch.no_grad():
        tokens = common.sample(policy, torch.ones(2, 3, dtype=torch.long), torch.rand(2, 4))
    with bf16():
        logp = common.log_probs(common.completion_logits(policy, tokens, 4))
    common.token_logps(logp, tokens[:, 3:]).sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in policy.parameters())
    assert policy.transformer.h[0].mlp.c_fc.weight.grad.abs().max() > 0


def test_one_context_around_a_step_of_the_optimizer_would_go_on_with_the_weights_before_it(policy):
    # Why the training loops enter their context anew: it keeps the bf16 weights until it ends, whatever becomes of
    # the fp32 ones. (The weights of the layers only; the head is made for each call.)
    fc, before = policy.transformer.h[0].mlp.c_fc, forecasts(policy)
    with bf16():
        assert forecasts(policy).tolist() == before.tolist()
        with torch.no_grad():
            fc.weight.neg_()
        assert forecasts(policy).tolist() == before.tolist()  # the trap
    assert (forecasts(policy) - before).abs().mean() > 0.1


def test_sampling_in_bf16_casts_a_weight_once(policy):
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Casts(), bf16():
        uniform = torch.rand(2, 6, generator=common.seeded(0, "test"))
        tokens = common.sample(policy, torch.ones(2, 3, dtype=torch.long), uniform)
    assert (tokens[:, -2] != EOS).any()  # six columns were drawn
    assert casts.count((16, 64)) == 2 and casts.count((11, 16)) == 1  # the MLP's first weight in two layers; the head


@pytest.mark.parametrize("enabled", [False, True], ids=["fp32", "bf16"])
def test_a_deepcopy_of_a_policy_has_weights_of_its_own(policy, enabled):
    other, before = copy.deepcopy(policy), forecasts(policy, enabled=enabled)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert forecasts(other, enabled=enabled).unique().tolist() == pytest.approx([-torch.tensor(11.0).log().item()])
    assert forecasts(policy, enabled=enabled).tolist() == before.tolist()


# ---- where -------------------------------------------------------------------------------------------------


class Meta(TorchDispatchMode):
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


def test_sample_makes_everything_on_the_device_of_the_prompts():
    with Meta() as meta:
        prompts, uniform = torch.ones(2, 3, dtype=torch.long, device="meta"), torch.zeros(2, 4, device="meta")
        tokens, logits = common.sample(Flat("meta"), prompts, uniform, keep_logits=True)
    assert tokens.shape == (2, 7) and logits.shape == (2, 4, 11) and meta.devices == {"meta"}
    assert meta.answers == 4  # in each column one question: did a row end?


def test_the_losses_never_wait_for_a_gpu_and_make_nothing_elsewhere():
    logits, ref_logits = torch.zeros(2, 2, 3, 11, device="meta").unbind()
    tokens, reward = torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.zeros(2, device="meta")
    with Meta() as meta:
        mask = common.completion_mask(tokens, EOS)
        logp, ref_logp = common.log_probs(logits.requires_grad_()), common.log_probs(ref_logits)
        logps = common.token_logps(logp, tokens)
        loss = reinforce.reinforce_loss(logps, mask, reinforce.leave_one_out(reward))
        (loss + common.masked_sum(common.token_kl(logp, ref_logp), mask).mean()).backward()
        sums, ref_sums = common.masked_sum(logps.detach().requires_grad_(), mask), torch.zeros(2, device="meta")
        losses, margins = dpo.dpo_loss(sums, sums, ref_sums, ref_sums, 0.1)
        losses.mean().backward()
        dpo.batch_means(losses, margins, (sums, sums), (ref_sums, ref_sums))
    assert meta.devices == {"meta"} and meta.answers == 0


def test_pairs_are_put_on_the_models_device():
    pairs = [dpo.Pair([1, 2, 3], [4], [5, 6]), dpo.Pair([7], [8, 9], [10, 1])]
    assert [tensor.device.type for tensor in dpo.collate(pairs, "meta")] == ["meta"] * 3
    model = Flat("meta")
    assert [logps.device.type for logps in dpo.pair_logps(model, pairs)] == ["meta"] * 2
    assert model.calls[0]["input_ids"].device.type == model.calls[0]["attention_mask"].device.type == "meta"


@pytest.mark.parametrize(("capabilities", "precision"), [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
    ({"avx512_f": True}, "fp32"), ({}, "fp32"),
])
def test_auto_is_bf16_on_processors_that_have_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_device("cpu", "auto") == (torch.device("cpu"), precision)
    assert pick_device("cpu", "fp32")[1] == "fp32" and pick_device("cpu", "bf16")[1] == "bf16"
    assert not fast_bf16(torch.device("mps"))


@pytest.mark.parametrize(("capability", "fast_enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_auto_is_bf16_on_gpus_that_do_not_emulate_it(monkeypatch, capability, fast_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # (7, 5): the course's T4
    assert fast_bf16(torch.device("cuda")) == fast_enough
