"""The same numbers from other people's code, on random inputs: values and gradients.

The others are PyTorch's losses and distributions, and TRL. TRL is optional: `make bench` installs it, and from then on
`make test` runs these tests too; where it is missing they are skipped. test_losses.py has the numbers done by hand.
"""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from transformers import GPT2Config, GPT2LMHeadModel

import common
import dpo
import fast
import reinforce

ROWS, LENGTH, WORDS = 5, 7, 50
LOGITS, REF_LOGITS = 3 * torch.randn(2, ROWS, LENGTH, WORDS, generator=common.seeded(0, "logits"))
TOKENS = torch.randint(WORDS, (ROWS, LENGTH), generator=common.seeded(0, "tokens"))


def assert_same(ours, theirs, *inputs):
    """Two functions of the same tensors: the same values, and gradients of the same random mixture of them."""
    found = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        values = function(*leaves)
        mixture = torch.randn(values.shape, generator=common.seeded(0, "mixture"))
        found.append((values, *torch.autograd.grad((mixture * values).sum(), leaves)))
    assert all(gradient.abs().max() > 0 for gradient in found[0][1:])
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-4)


def selective_log_softmax(logits):
    utils = pytest.importorskip("trl.trainer.utils")
    return utils.selective_log_softmax(logits, TOKENS)


@pytest.mark.parametrize("ours", [common.token_logps, lambda *args: fast.logps_and_kl(*args)[0]], ids=["plain", "fast"])
@pytest.mark.parametrize("theirs", [
    lambda logits: -F.cross_entropy(logits.transpose(1, 2), TOKENS, reduction="none"),
    lambda logits: Categorical(logits=logits).log_prob(TOKENS),
    selective_log_softmax,
], ids=["cross_entropy", "Categorical.log_prob", "TRL"])
def test_log_probs_of_tokens(ours, theirs):
    assert_same(lambda logits: ours(logits, TOKENS), theirs, LOGITS)


@pytest.mark.parametrize("ours", [
    reinforce.token_kl, lambda logits, ref_logits: fast.logps_and_kl(logits, TOKENS, ref_logits)[1],
], ids=["plain", "fast"])
@pytest.mark.parametrize("theirs", [
    lambda logits, ref_logits: F.kl_div(  # its arguments are q, p: KL(p ‖ q)
        ref_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1),
    lambda logits, ref_logits: kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits)),
], ids=["kl_div", "kl_divergence"])
def test_kl_of_policy_to_reference(ours, theirs):
    assert_same(lambda logits: ours(logits, REF_LOGITS), lambda logits: theirs(logits, REF_LOGITS), LOGITS)


def test_kl_to_the_uniform_distribution_is_what_the_entropy_lacks():
    uniform = torch.zeros_like(LOGITS)
    lacks = lambda logits: torch.tensor(WORDS).log() - Categorical(logits=logits).entropy()  # noqa: E731
    assert_same(lambda logits: reinforce.token_kl(logits, uniform), lacks, LOGITS)


def test_reinforce_loss_is_a_cross_entropy_weighted_by_the_reward():
    mask = common.completion_mask(TOKENS, TOKENS[0, 3].item())
    rewards, labels = torch.rand(ROWS, generator=common.seeded(0, "rewards")), TOKENS.masked_fill(~mask, -100)
    assert not mask.all()

    def ours(logits):
        return reinforce.reinforce_loss(common.token_logps(logits, TOKENS), mask, rewards)

    def theirs(logits):  # -100 is what cross_entropy leaves out
        sums = [F.cross_entropy(row, label, reduction="sum") for row, label in zip(logits, labels, strict=True)]
        return (rewards * torch.stack(sums)).mean()

    assert_same(ours, theirs, LOGITS)


def test_dpo_loss_is_a_binary_cross_entropy_of_the_margin():
    logps, ones = 20 * torch.randn(4, ROWS, generator=common.seeded(0, "log-probs")), torch.ones(ROWS)

    def theirs(logps):
        log_ratios = logps[:2] - logps[2:]
        return F.binary_cross_entropy_with_logits(0.3 * (log_ratios[0] - log_ratios[1]), ones, reduction="none")

    assert_same(lambda logps: dpo.dpo_loss(*logps, 0.3)[0], theirs, logps)


def test_dpo_from_pairs_to_gradients_is_that_of_trl():
    """TRL's own collator, log-probs and loss, and what they send into every weight of the policy.

    Its trainer is made without __init__, which would want a data set: with the settings that _compute_loss reads, and
    an accelerator of one process.
    """
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(0)
    size = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, eos_token_id=0, bos_token_id=0)
    policy, reference = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in [*policy.parameters(), *reference.parameters()]:
            weight.mul_(5)
    words = torch.randint(1, WORDS, (ROWS, 3, 9), generator=common.seeded(0, "words")).tolist()
    lengths = torch.randint(1, 10, (ROWS, 3), generator=common.seeded(0, "lengths")).tolist()
    pairs = [dpo.make_pair(*(part[:length] for part, length in zip(*row, strict=True)), 0, 14)
             for row in zip(words, lengths, strict=True)]

    trainer = object.__new__(trl.DPOTrainer)
    alone = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    vars(trainer).update(
        model=copy.deepcopy(policy), ref_model=copy.deepcopy(reference), accelerator=alone, beta=0.3, ld_alpha=None,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), precompute_ref_logps=False, aux_loss_enabled=False,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False,
        _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)))
    trl.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trl.add_fused_lm_head(trainer.ref_model)
    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    their_loss = trainer._compute_loss(trainer.model, trl.DataCollatorForPreference(pad_token_id=0)(rows), False)
    their_loss.backward()

    with torch.no_grad():
        ref_logps = dpo.pair_logps(reference, pairs)
    losses, margins = dpo.dpo_loss(*dpo.pair_logps(policy, pairs), *ref_logps, 0.3)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), their_loss)
    assert margins.mean().item() == pytest.approx(trainer._metrics["eval"]["rewards/margins"][0], rel=1e-4)
    for ours, theirs in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    assert losses.std() > 0.1  # a test of zeros would pass, too
