"""What is read is what runs: the training loops call the functions that the lesson explains, and no other form of them.

Each of them in turn is made to raise, wherever a module has it by name, from the moment when training begins; nothing
but the training step is left that could call it. Then the script stops, at its first step. The reference's forecasts,
which have no gradient, go through some of these functions too: there they do not raise.
"""

import pytest
import torch

import common
import dpo
import reinforce
import reward
from tests.helpers import SCRIPTS, call, flags, rows_of

HOMES = (common, reward, reinforce, dpo)
BOTH = ("log_probs", "token_logps", "masked_sum", "completion_logits", "update")
CALLED = {"reinforce": (*BOTH, "completion_mask", "sample", "draw", "positivity", "token_kl", "reinforce_loss",
                        "leave_one_out"),
          "dpo": (*BOTH, "dpo_loss", "pair_logps", "collate", "accuracy")}


NO_GRADIENT = ("sample", "draw", "positivity")


class Stop(Exception):
    """What no script catches."""


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in CALLED for name in CALLED[script]])
def test_training_stops_where_a_function_of_the_contract_raises(world, tmp_path, monkeypatch, script, name):
    module, train = SCRIPTS[script], SCRIPTS[script].train

    (right,) = {vars(home)[name] for home in HOMES if name in vars(home)}

    def broken(*args, **more):
        if name in NO_GRADIENT or torch.is_grad_enabled():
            raise Stop(name)
        return right(*args, **more)

    def begin(*args):
        for home in HOMES:
            for known, value in list(vars(home).items()):
                if value is right:
                    monkeypatch.setattr(home, known, broken)
        monkeypatch.setattr(module, "log_samples", lambda *args: None)
        monkeypatch.setattr(module, "on_test_pairs", lambda *args: {}, raising=False)
        return train(*args)

    monkeypatch.setattr(module, "train", begin)
    more = ["--limit", 4, "--batch-size", 2, "--eval-limit", 2, "--epochs", 1]
    more += ["--advantage", "loo", "--alpha", 0.1] if script == "reinforce" else []
    with pytest.raises(Stop, match=f"^{name}$") as caught:
        call(script, *flags(world, script, tmp_path / "run", *more))
    assert train.__code__ in [entry.frame.code.raw for entry in caught.traceback]
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or not any("step" in row for row in rows_of(log))
