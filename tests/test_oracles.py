"""The same numbers from other people's code, on random inputs: values and gradients.

The others are PyTorch's losses and distributions, and TRL. TRL is optional: `make bench` installs it, and from then on
`make test` runs these tests too; where it is missing they are skipped. test_losses.py has the numbers done by hand.
And what docs/trl.md says of TRL's configurations.
"""

import ast
import copy
import dataclasses
import inspect
import re
import textwrap
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from transformers import GPT2Config, GPT2LMHeadModel

import common
import dpo
import reinforce
from lab import bench
from support import loading
from support.progress import Progress

ROWS, LENGTH, WORDS = 5, 7, 50
LOGITS, REF_LOGITS = 3 * torch.randn(2, ROWS, LENGTH, WORDS, generator=common.seeded(0, "logits"))
TOKENS = torch.randint(WORDS, (ROWS, LENGTH), generator=common.seeded(0, "tokens"))


def assert_same(ours, theirs, *inputs, rounding):
    """Two functions of the same tensors: the same values, and gradients of the same random mixture of them.

    rounding: of a value. Those of the gradients are as large, times the mixture's coefficients, at most 4.
    """
    found = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        values = function(*leaves)
        mixture = torch.randn(values.shape, generator=common.seeded(0, "mixture")).clamp(-4, 4)
        found.append((values, *torch.autograd.grad((mixture * values).sum(), leaves)))
    bound = 2 * 4 * rounding  # each of the two is off
    assert all(gradient.abs().max() > 50 * bound for gradient in found[0][1:])  # a test of zeros would pass, too
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, atol=bound, rtol=0)


# The logits differ by less than 32, where fp32 rounds by 2^-20. A log-prob is made of two such numbers, a KL is a mean
# of differences of log-probs of two models.
LOGP, KL = 2 * 2**-20, 4 * 2**-20


def selective_log_softmax(logits):
    utils = pytest.importorskip("trl.trainer.utils")
    return utils.selective_log_softmax(logits, TOKENS)


@pytest.mark.parametrize("theirs", [
    lambda logits: -F.cross_entropy(logits.transpose(1, 2), TOKENS, reduction="none"),
    lambda logits: Categorical(logits=logits).log_prob(TOKENS),
    selective_log_softmax,
], ids=["cross_entropy", "Categorical.log_prob", "TRL"])
def test_log_probs_of_tokens(theirs):
    assert LOGITS.max() - LOGITS.min() < 32
    assert_same(lambda logits: common.token_logps(common.log_probs(logits), TOKENS), theirs, LOGITS, rounding=LOGP)


def kl_of(logits, ref_logits):
    return common.token_kl(common.log_probs(logits), common.log_probs(ref_logits))


@pytest.mark.parametrize("theirs", [
    lambda logits, ref_logits: F.kl_div(  # its arguments are q, p: KL(p ‖ q)
        ref_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1),
    lambda logits, ref_logits: kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits)),
], ids=["kl_div", "kl_divergence"])
def test_kl_of_policy_to_reference(theirs):
    assert REF_LOGITS.max() - REF_LOGITS.min() < 32
    both = (partial(function, ref_logits=REF_LOGITS) for function in (kl_of, theirs))
    assert_same(*both, LOGITS, rounding=KL)


def test_kl_to_the_uniform_distribution_is_what_the_entropy_lacks():
    uniform = torch.zeros_like(LOGITS)
    lacks = lambda logits: torch.tensor(WORDS).log() - Categorical(logits=logits).entropy()  # noqa: E731
    assert_same(lambda logits: kl_of(logits, uniform), lacks, LOGITS, rounding=KL)


def test_reinforce_loss_is_a_cross_entropy_weighted_by_the_reward():
    mask = common.completion_mask(TOKENS, TOKENS[0, 3].item())
    rewards, labels = torch.rand(ROWS, generator=common.seeded(0, "rewards")), TOKENS.masked_fill(~mask, -100)
    assert not mask.all()

    def ours(logits):
        return reinforce.reinforce_loss(common.token_logps(common.log_probs(logits), TOKENS), mask, rewards)

    def theirs(logits):  # -100 is what cross_entropy leaves out
        sums = [F.cross_entropy(row, label, reduction="sum") for row, label in zip(logits, labels, strict=True)]
        return (rewards * torch.stack(sums)).mean()

    assert_same(ours, theirs, LOGITS, rounding=LENGTH * 2 * LOGP)  # a sum of log-probs, rounded like them


def test_dpo_loss_is_a_binary_cross_entropy_of_the_margin():
    logps, ones = 20 * torch.randn(4, ROWS, generator=common.seeded(0, "log-probs")), torch.ones(ROWS)
    assert logps.abs().max() < 64  # so differences are below 256, where fp32 rounds by 2^-17, and there are three

    def theirs(logps):
        log_ratios = logps[:2] - logps[2:]
        return F.binary_cross_entropy_with_logits(0.3 * (log_ratios[0] - log_ratios[1]), ones, reduction="none")

    assert_same(lambda logps: dpo.dpo_loss(*logps, 0.3)[0], theirs, logps, rounding=3 * 2**-17)


def test_dpo_from_pairs_to_gradients_is_that_of_trl():
    """TRL's own collator, log-probs and loss, and what they send into every weight of the policy.

    Its trainer is made without __init__, which would want a data set: with the settings that _compute_loss reads, and
    an accelerator of one process. The models compute in double precision; the softmax is fp32 in both.
    """
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(0)
    size = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, eos_token_id=0, bos_token_id=0)
    policy, reference = (GPT2LMHeadModel(config).eval().double() for _ in range(2))
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
    # A margin is 0.3 times four sums of at most 10 log-probs, and a loss moves by no more than its margin. A weight's
    # gradient, below 8, adds up some ten parts, each of them within 2^-19 of its value, too.
    bound = 2 * 0.3 * 4 * 10 * LOGP
    assert losses.mean().item() == pytest.approx(their_loss.item(), abs=bound)
    assert margins.mean().item() == pytest.approx(trainer._metrics["eval"]["rewards/margins"][0], abs=bound)
    for ours, theirs in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=8 * 10 * 2**-19, rtol=0)
    assert losses.std() > 0.1  # a test of zeros would pass, too


# ---- the way on to TRL -------------------------------------------------------------------------------------

ON_TO_TRL = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
CONFIGS = ("DPOConfig", "RLOOConfig", "GRPOConfig")


def settings_of(config):
    """The keywords with which the page's snippet makes a TRL configuration."""
    snippets = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", ON_TO_TRL, flags=re.MULTILINE)
    (text,) = (snippet for snippet in snippets if f"trl.{config}(" in snippet)
    calls = [node for node in ast.walk(ast.parse(textwrap.dedent(text))) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == f"trl.{config}")
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords}


def rows_of_tables():
    """-> lists of cells of the page's tables, in all."""
    lines = [line for line in ON_TO_TRL.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_on_trl_names_fields_that_trl_has():
    trl = pytest.importorskip("trl")
    fields = {name: {field.name for field in dataclasses.fields(getattr(trl, name))} for name in CONFIGS}
    trainers = {name: inspect.signature(getattr(trl, name.replace("Config", "Trainer")).__init__).parameters
                for name in CONFIGS}
    rows, checked = rows_of_tables(), 0
    assert [cell.strip("`") for cell in rows[0][1:]] == list(CONFIGS)
    for _, *cells in rows[1 : rows.index(["default", "to be", "in", "why"])]:
        for config, cell in zip(CONFIGS, cells, strict=True):
            for argument, name in re.findall(r"(the trainer's )?`([a-z_]+)(?:=[^`(]*)?`", cell):
                assert name in (trainers[config] if argument else fields[config]), f"{config} has no {name}"
                checked += 1
    assert checked > 25
    for config in ("DPOConfig", "RLOOConfig"):
        assert settings_of(config).keys() <= fields[config]


def test_the_page_on_trl_knows_trls_defaults(tmp_path):
    """Those that are to be changed, and that the snippets change them; and those that are right as they are."""
    trl = pytest.importorskip("trl")
    made = {name: getattr(trl, name)(output_dir=str(tmp_path), use_cpu=True) for name in CONFIGS}
    rows = rows_of_tables()
    for default, wanted, where, _ in rows[rows.index(["default", "to be", "in", "why"]) + 1 :]:
        name, value = default.strip("`").split("=")
        for config in CONFIGS if where == "all" else re.findall(r"\w+Config", where):
            assert getattr(made[config], name) == ast.literal_eval(value), f"{config}: {default}"
            if config != "GRPOConfig":
                assert repr(settings_of(config)[name]).replace("'", '"') == wanted.strip("`")
    right = ON_TO_TRL.partition("As they should be:")[2].partition("\n\n")[0]
    ours, theirs = right.split("and of RLOO and GRPO")
    for text, configs in ((ours, ["DPOConfig"]), (theirs, ["RLOOConfig", "GRPOConfig"])):
        for name, value in re.findall(r"`(\w+)=([^`]+)`", text):
            assert all(getattr(made[config], name) == ast.literal_eval(value) for config in configs), name


def test_dpo_run_is_that_of_trl_with_the_pages_configuration(tmp_path, monkeypatch):
    """Five steps on the same 16 pairs: losses, margins and log-probs of both sides.

    Some pairs are longer than max_length. The configuration is the page's, but for lr, steps and length.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    size = {**bench.TINY, "words": 60, "scorer_words": 60}
    bench.new_models(size)[0].save_pretrained(tmp_path)
    bench.new_tokenizers(size)[0].save_pretrained(tmp_path)
    named = SimpleNamespace(policy=str(tmp_path), prompt_len=8, completion_len=8)
    policy, tokenizer = loading.load_policy(named, torch.device("cpu"))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(3)  # forecasts that differ from word to word
    policy.save_pretrained(tmp_path)
    words = torch.randint(59, (16, 3, 12), generator=common.seeded(0, "words")).tolist()
    lengths = torch.randint(1, 13, (16, 3), generator=common.seeded(0, "lengths")).tolist()
    rows = [tuple(row[part][: length[part]] for part in range(3)) for row, length in zip(words, lengths, strict=True)]
    pairs = [dpo.make_pair(*row, policy.config.eos_token_id, 16) for row in rows]
    assert any(len(prompt) + len(chosen) >= 16 for prompt, chosen, _ in rows)

    logged = []
    args = SimpleNamespace(seed=0, lr=1e-3, epochs=5, batch_size=16, micro_batch=None, beta=0.1, max_grad_norm=None,
                           save_every=100)
    run = SimpleNamespace(args=args, bf16=False, saved={}, looked=0.0, log=lambda **row: logged.append(row),
                          deal=lambda batches, _: batches, checkpoint=lambda step, parts: None)
    run.resume = lambda **parts: Progress(run, parts)
    monkeypatch.setattr(dpo, "log_samples", lambda *args: None)
    with torch.no_grad():
        logps = torch.stack(dpo.pair_logps(policy, pairs), dim=1)
    dpo.train(policy, {"train": logps, "test": logps}, tokenizer, None, {"train": pairs, "test": pairs}, None, run)
    ours = [row for row in logged if "step" in row]

    changed = {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-3, "num_train_epochs": 5, "max_length": 16}
    settings = settings_of("DPOConfig") | changed | {"use_cpu": True, "disable_tqdm": True}
    texts = [dict(zip(("prompt", "chosen", "rejected"), tokenizer.batch_decode(row), strict=True)) for row in rows]
    trainer = trl.DPOTrainer(model=str(tmp_path), args=trl.DPOConfig(**settings),
                             train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(theirs) == 5
    # Rounding alone would be 10^-6. But AdamW takes a step of lr in the direction of any gradient, even one that is
    # nothing but rounding: such a weight may go the other way, which the loss, flat there, sees in the second order.
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-4)
        assert our["margin"] == pytest.approx(their["rewards/margins"], abs=1e-3)
        assert our["chosen_logp"] == pytest.approx(their["logps/chosen"], rel=1e-4)
    assert ours[0]["loss"] - ours[-1]["loss"] > 0.1  # they moved: a thousand times the first tolerance
