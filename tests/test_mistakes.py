"""Each of the mistakes that people make fails the test that the list names for it, and broken runs are drawn.

That the tests pass without a mistake they show themselves, in test_losses.py and in one case here.
"""

import copy
import importlib
import itertools
import re
import shutil
import sys

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import common
import dpo
import reinforce
from demo import world
from lab import bench, broken, mistakes
from support.errors import UserError
from support.files import HOME
from test_losses import layer, logits, model  # noqa: F401  (fixtures of the tests that are called here)
from tests.written_runs import steps, write_run

CAUGHT = (AssertionError, pytest.fail.Exception)


def pytest_calls(test, request):
    """Yields the keyword arguments of each call that pytest would make of a test: parameters, then fixtures."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    names = [names.replace(" ", "").split(",") if isinstance(names, str) else list(names) for names, _ in marks]
    for chosen in itertools.product(*(values for _, values in marks)):
        given = {}
        for group, values in zip(names, chosen, strict=True):
            given |= dict(zip(group, values if len(group) > 1 else [values], strict=True))
        wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
        fixtures = {name: copy.deepcopy(request.getfixturevalue(name)) for name in wanted if name not in given}
        yield given | fixtures


@pytest.mark.parametrize("mistake", mistakes.MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_fails_its_test(mistake, request):
    file, _, name = mistake.test.rpartition("::")
    test = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".") or "test_losses"), name)
    right, wrong = mistakes.put_in(mistake)
    try:
        with pytest.raises(CAUGHT):
            for given in pytest_calls(test, request):
                test(**given)
    finally:
        mistakes.replace(wrong, right)


class Stepped(Exception):
    """Raised in a loop where the optimizer would take its first step."""


def stopped(*_):
    raise Stepped


def test_a_step_of_reinforce_has_the_gradient_of_the_reward_and_of_the_exact_kl(model):  # noqa: F811
    """The loop itself, on 4 prompts, against PyTorch's distributions on the tokens that it has sampled.

    Logits lie below 32, where fp32 has steps of 2^-19: a log-prob is off by 2^-18, and each term of the gradient by
    that share of itself. A thousandth of the whole leaves room for terms that cancel down to a 250th of what they are.
    """
    reference, rewards, sampled = copy.deepcopy(model), torch.tensor([0.25, 1.0, 0.5, 0.75]), []
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(0.9)
    run = bench.Stub(None, "fp32", alpha=2.0, advantage="reward", lr=1.0, batch_size=4)
    prompts = torch.randint(1, 11, (4, 3), generator=common.seeded(0, "prompts"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stepped):
        patch.setattr(reinforce, "log_samples", lambda *_: None)
        patch.setattr(reinforce, "decode", lambda _, tokens: sampled.append(tokens))
        patch.setattr(reinforce, "positivity", lambda *_: rewards)
        patch.setattr(reinforce, "update", stopped)
        reinforce.train(model, reference, None, None, prompts, None, run)
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()

    (tokens,) = sampled
    policy, original = (Categorical(logits=of(tokens).logits[:, 2:-1].double()) for of in (model, reference))
    ends = [[*row, 0].index(0) for row in tokens[:, 3:].tolist()]  # where the eos is
    mask = torch.arange(20) <= torch.tensor(ends)[:, None]
    assert not mask.all()
    log_probs, kl = policy.log_prob(tokens[:, 3:]) * mask, kl_divergence(policy, original) * mask
    (-(rewards * log_probs.sum(1)).mean() + 2 * kl.sum(1).mean()).backward()
    for ours, weight in zip(found, model.parameters(), strict=True):
        assert (ours - weight.grad).norm() <= 1e-3 * weight.grad.norm()


def test_a_script_runs_with_the_mistake_in_the_functions_that_it_calls(monkeypatch, capsys):
    seen = []

    def script():
        policy = torch.tensor([[[0.25, 0.75]]]).log()
        negated = reinforce.token_kl(policy, policy.flip(-1)).item() < 0
        seen.append((sys.argv, negated, reinforce.token_kl is common.token_kl))

    monkeypatch.setattr(sys, "argv", ["mistakes.py"])
    monkeypatch.setattr(reinforce, "main", script)
    right = common.token_kl
    try:
        mistakes.main("KL-negated", "reinforce.py", "--alpha", "0.1")
    finally:
        mistakes.replace(common.token_kl, right)
    assert seen == [(["reinforce.py", "--alpha", "0.1"], True, True)]
    assert "'KL negated', in common.token_kl" in capsys.readouterr().out


def test_a_mistake_reaches_every_module_that_has_the_function_by_name():
    def nothing(*_):
        pass

    right = common.masked_sum
    mistakes.replace(right, nothing)
    try:
        assert all(module.masked_sum is nothing for module in (common, dpo, reinforce, world))
    finally:
        mistakes.replace(nothing, right)
    assert all(module.masked_sum is right for module in (common, dpo, reinforce, world))


@pytest.mark.parametrize(("argv", "message"), [
    (["signs", "dpo.py"], "no mistake 'signs'; python -m lab.mistakes lists them"),
    (["sign"], "comes one of reward.py, reinforce.py, dpo.py"), (["sign", "toy.py"], "not 'toy.py'"),
    (["sign", "dpo.py"], "dpo.py does not call reinforce.reinforce_loss"),
    (["KL sampled and back-propagated", "dpo.py"], "dpo.py does not call reinforce.train"),  # dpo.train is another
    (["the-ragged-last-batch", "reinforce.py"], "reinforce.py does not call support.ranks.micro_batches"),
])
def test_what_cannot_be_run_is_said(argv, message):
    with pytest.raises(UserError, match=message):
        mistakes.main(*argv)


def test_without_arguments_they_are_listed(capsys):
    mistakes.main()
    listed = capsys.readouterr().out
    assert all(f"{one.name} ({one.where})" in listed and one.test in listed for one in mistakes.MISTAKES)


def test_broken_runs_are_drawn_and_tabulated_with_what_was_measured_without_the_mistake(tmp_path, capsys):
    rewards, pairs = {"alpha": 0.1, "advantage": "loo", "lr": 5e-4}, {"beta": 0.1, "lr": 5e-5}
    trained = {"alpha": steps(reward=0.1, kl=-1.0, grad_norm=1.0),
               "beta": steps(loss=0.1, accuracy=0.1, margin=0.1, chosen_logratio=-1.0, rejected_logratio=-2.0)}
    tested = {"test_loss": 0.5, "test_accuracy": 0.9, "test_margin": 0.2}
    for name, flags, more in (("alpha-0.1", rewards, {}), ("broken/sign", rewards, {}),
                              ("beta-0.1", pairs, tested), ("broken/dpo-prompt-scored", pairs, tested)):
        write_run(tmp_path / name, 0.9, 1.5, "it is", flags, metrics=trained[next(iter(flags))], **more)
    write_run(tmp_path / "broken-measured" / "sign", 0.1, 2.5, "it is", {"policy": "broken"})
    broken.main(tmp_path)
    said = capsys.readouterr().out
    assert "| `sign`      | 0.35           | -3.50      | 0.100 ± 0.010 | 2.50 ± 0.02 |" in said  # 0.0 .. 0.7
    assert "| `alpha-0.1` | 0.35           | -3.50      | 0.900 ± 0.010 |" in said
    assert all((tmp_path / f"broken-{name}.png").stat().st_size < 60_000 for name in ("reinforce", "dpo"))
    with pytest.raises(UserError, match="make broken makes them"):
        broken.main(tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "dpo-prompt-scored")
    broken.main(tmp_path)  # as with BROKEN_DPO=: there is nothing of that kind to draw
    assert "`sign`" in capsys.readouterr().out


def test_make_broken_names_mistakes_that_there_are():
    makefile = (HOME / "demo" / "demo.mk").read_text(encoding="utf-8")
    names = " ".join(re.findall(r"^BROKEN_\w+ = (.*)$", makefile, re.MULTILINE)).split()
    assert names and set(names) <= {one.name.replace(" ", "-") for one in mistakes.MISTAKES}
