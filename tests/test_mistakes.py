"""Each of the mistakes that people make fails the test of test_losses.py that the list names for it.

That the tests pass without a mistake, test_losses.py itself shows.
"""

import copy
import itertools
import re
import sys

import pytest
import torch

import reinforce
import test_losses
from lab import broken, mistakes
from support import fast, runs
from test_losses import layer, logits, model  # noqa: F401  (fixtures of the tests that are called here)
from tests.test_report import steps, write_run

CAUGHT = (AssertionError, pytest.fail.Exception)


def calls(test, request):
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
    test = getattr(test_losses, mistake.test)
    right, wrong = mistakes.put_in(mistake)
    try:
        with pytest.raises(CAUGHT):
            for given in calls(test, request):
                test(**given)
    finally:
        mistakes.replace(wrong, right)


def test_a_script_runs_with_the_mistake_in_the_functions_that_it_calls(monkeypatch, capsys):
    seen = []

    def script():
        policy, token = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0]])
        kl = fast.logps_and_kl(policy, token, -policy)[1]
        seen.append((sys.argv, kl.item() < 0, reinforce.logps_and_kl is fast.logps_and_kl))

    monkeypatch.setattr(sys, "argv", ["mistakes.py"])
    monkeypatch.setattr(reinforce, "main", script)
    right, plain = reinforce.token_kl, fast.logps_and_kl
    try:
        mistakes.main("KL-negated", "reinforce.py", "--alpha", "0.1")
    finally:
        mistakes.replace(reinforce.token_kl, right)
        mistakes.replace(fast.logps_and_kl, plain)
    assert seen == [(["reinforce.py", "--alpha", "0.1"], True, True)]
    assert "'KL negated', in reinforce.token_kl" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["signs", "dpo.py"], "no mistake 'signs'; python -m lab.mistakes lists them"),
    (["sign"], "comes one of reward.py, reinforce.py, dpo.py"), (["sign", "toy.py"], "not 'toy.py'"),
    (["sign", "dpo.py"], "dpo.py does not call reinforce.reinforce_loss"),
])
def test_what_cannot_be_run_is_said(argv, message):
    with pytest.raises(runs.UserError, match=message):
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
    with pytest.raises(runs.UserError, match="make broken makes them"):
        broken.main(tmp_path / "broken")


def test_make_broken_names_mistakes_that_there_are():
    makefile = (runs.HOME / "Makefile").read_text(encoding="utf-8")
    names = " ".join(re.findall(r"^BROKEN_\w+ = (.*)$", makefile, re.MULTILINE)).split()
    assert names and set(names) <= {one.name.replace(" ", "-") for one in mistakes.MISTAKES}
