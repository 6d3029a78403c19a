"""Losses as people write them: what is right is called right, and why, and what is wrong is called by its name."""

import math

import pytest

from course import child, judge_reinforce, parse

REINFORCE = """
import torch
import torch.nn.functional as F
def compute_reinforce_loss(reward, output_tokens, model):
    reward = reward.detach()
    log_probs = F.log_softmax(model(output_tokens).logits, dim=-1)
    lp = log_probs[:, 9:-1].gather(-1, output_tokens[:, 10:].unsqueeze(-1)).squeeze(-1)
    is_eos = (output_tokens[:, 10:] == 50256).long()
    mask = ((is_eos.cumsum(-1) - is_eos) == 0).float()
    log_p = (lp * mask).sum(-1)
    entropy = lambda: -(log_probs.exp() * log_probs).sum(-1)
    ratio = (lp - lp.detach()).exp()
    place = torch.arange(20)
"""
KL = """
import torch
import torch.nn.functional as F
def compute_kl_divergence(log_probs_current, output_tokens, orig_model):
    with torch.no_grad():
        q = F.log_softmax(orig_model(output_tokens).logits, dim=-1)[:, 9:-1]
    p = log_probs_current[:, 9:-1]
    x = (p - q).gather(-1, output_tokens[:, 10:, None]).squeeze(-1)
    kl = (p.exp() * (p - q)).sum(-1).sum(-1).mean()
"""
DPO = """
import torch
import torch.nn.functional as F
def compute_DPO_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                     reference_rejected_logps, beta):
    pc, pr = policy_chosen_logps, policy_rejected_logps
    rc, rr = reference_chosen_logps, reference_rejected_logps
    m = beta * ((pc - rc) - (pr - rr))
"""


@pytest.fixture
def judged(tmp_path):
    """judged(head, lines) -> the verdict on a function of these last lines."""
    def judge(head, lines):
        path = tmp_path / "A3.py"
        path.write_text(head + "".join(f"    {line}\n" for line in lines.split("; ")))
        read = parse.read_solution(path)
        (name,) = read.functions
        return child.judged(read, name, path)
    return judge


MEAN = "less the batch's mean as a baseline"
STD = "less the batch's mean, divided by its standard deviation"


@pytest.mark.parametrize(("lines", "said"), [
    # A value that is not the loss, with its gradient. Ratios are 1, so their mean, less their mean, is 0.
    ("return log_probs, -((reward - reward.mean())[:, None] * ratio * mask).sum(1).mean()", [MEAN, "its value is 0"]),
    # -(7/8 + 1/8 + 1/2 + 1/4) / 4 of 20 ratios each is -8.75, where the loss is 27.5 ln 2 = 19.062
    ("return log_probs, -(reward[:, None] * ratio).sum(1).mean()",
     ["counts tokens after", "its value is -8.75 and its gradient that of 19.062"]),
    # Another factor: 2 r - 1 is 2 (r - 1/2)
    ("return log_probs, -((2 * reward - 1) * log_p).mean()",
     ["less 0.5 as a baseline", "its gradient is 2 times the right one"]),
    # Baselines: any number, with any epsilon and either standard deviation
    ("return log_probs, -((reward - 0.4) * log_p).mean()", ["less 0.4 as a baseline"]),
    ("return log_probs, -((reward - reward.mean()) / (reward.std() + 1e-4) * log_p).mean()", [STD]),
    ("return log_probs, -((reward - reward.mean()) / (reward.std(unbiased=False) + 1e-8) * log_p).mean()", [STD]),
    ("a = ((reward - reward.mean()) / (reward.std() + 1e-6))[:, None]; "
     "return log_probs, -(torch.min(a * ratio, a * ratio.clamp(0.8, 1.2)) * mask).sum(1).mean()",
     [STD, "its value is 0"]),
    # The loss at another place
    ("return log_probs, entropy().mean(), -(reward * log_p).mean()", ["the loss is the third of three"]),
])
def test_a_reinforce_loss_with_the_right_gradient_is_right(judged, lines, said):
    found = judged(REINFORCE, lines)
    assert (found["status"], found["mistake"]) == ("right", None)
    for words in said:
        assert any(note.startswith(words) for note in found["notes"]), found["notes"]


@pytest.mark.parametrize(("lines", "name"), [
    ("return log_probs, (log_p * 0).sum()", "without a gradient"),
    ("return log_probs, -(reward * ratio.detach().sum(1)).mean()", "without a gradient"),
    ("return log_probs, -(reward * log_p).mean() - 0.01 * entropy().mean()", "entropy bonus"),
    ("return log_probs, -((reward - 0.3) * log_p).mean() - 0.02 * (entropy()[:, 9:-1] * mask).sum(1).mean()",
     "entropy bonus"),
    ("return log_probs, -(reward[:, None] * 0.99**place * lp * mask).sum(1).mean()", "discount over the tokens"),
    ("return log_probs, -((reward - 0.3)[:, None] * 0.9**place.flip(0) * lp * mask).sum(1).mean()",
     "discount over the tokens"),
    ("return log_probs, -(reward * lp[:, -1]).mean()", "only the last token rewarded"),
    ("return log_probs, -(reward[:, None] * (20 - place) * lp).sum(1).mean()", "tokens weighed by their place"),
    ("return log_probs, -(reward**2 * log_p).mean()", "rows not weighed by the reward"),
    # What the value would have told tells the gradient of a ratio
    ("return log_probs, (reward[:, None] * ratio).sum(1).mean()", "sign"),
    ("return log_probs, -(reward[:, None] * ratio).mean()", "mean for sum"),
    ("return log_probs, -(reward[:, None] * ratio).sum()", "sum for mean over the batch"),
    ("return log_probs, -((1 - reward)[:, None] * ratio).sum(1).mean()", "reward for negative text"),
    ("return log_probs, -(ratio * mask).sum(1).mean()", "reward forgotten"),
    ("return log_probs, (reward[:, None] * ratio).sum()", "sign + sum for mean over the batch"),
])
def test_a_reinforce_loss_with_another_gradient_is_named(judged, lines, name):
    found = judged(REINFORCE, lines)
    assert (found["status"], found["mistake"]) == ("wrong", name)


def test_a_mean_of_rewards_beside_the_loss_is_not_taken_for_a_reward_with_a_graph(judged):
    text = REINFORCE.replace("    reward = reward.detach()\n", "")
    found = judged(text, "return log_probs, -(reward.detach() * log_p).mean(), reward.mean()")
    assert found["status"] == "right" and judge_reinforce.NOT_DETACHED not in found["notes"]
    found = judged(text, "return log_probs, -(reward * log_p).mean()")
    assert found["status"] == "right" and judge_reinforce.NOT_DETACHED in found["notes"]


def test_the_part_that_the_course_calls_the_loss_goes_before_others_that_are_wrong_too(judged):
    loss = "-(reward * log_p * (1 + (mask.sum(1) == 8))).mean()"  # right but for a row that ends early: it has no name
    found = judged(REINFORCE, f"return log_probs, {loss}, log_p.mean()")
    assert (found["status"], found["mistake"]) == ("wrong", None)


def test_a_loss_that_is_nan_is_wrong_without_a_name(judged):
    found = judged(REINFORCE, "return log_probs, -(reward * log_p).mean() * float('nan')")
    assert (found["status"], found["mistake"]) == ("wrong", None)


@pytest.mark.parametrize(("lines", "name"), [
    ("m = torch.logaddexp(p, q) - 0.6931472; "
     "return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)).sum(-1).mean() / 2", "Jensen-Shannon"),
    ("return kl + (q.exp() * (q - p)).sum(-1).sum(-1).mean()", "symmetric KL"),
    ("return (kl + (q.exp() * (q - p)).sum(-1).sum(-1).mean()) / 2", "symmetric KL"),
    ("return (x.exp() - 1 - x).sum(-1).mean()", "KL sampled and back-propagated, k3 reversed"),
    ("return (x.detach() * p.gather(-1, output_tokens[:, 10:, None]).squeeze(-1)).sum(-1).mean()",
     "KL sampled and back-propagated, times log p"),
    ("return -(p.exp() * q).sum(-1).sum(-1).mean()", "cross-entropy"),
    ("return ((p.exp() - q.exp())**2).sum(-1).sum(-1).mean()", None),  # not three mistakes that are near it by chance
    ("return x.mean(), kl", "the KL is the second of two"),
    ("return {'mean': x.mean(), 'kl': kl}", "the KL is at 'kl'"),
])
def test_other_divergences_are_named(judged, lines, name):
    found = judged(KL, lines)
    if "return x" in lines or "{" in lines:
        assert found["status"] == "right" and found["notes"][-1] == f"{name}, in what it returns"
    else:
        assert (found["status"], found["mistake"]) == ("wrong", name)


@pytest.mark.parametrize(("lines", "note"), [
    ("return F.softplus(-m).mean()", None),
    ("return F.binary_cross_entropy_with_logits(m, torch.ones_like(m))", None),
    ("return F.cross_entropy(torch.stack([m, 0 * m], 1), torch.zeros(len(m), dtype=torch.long))", None),
    ("return torch.logaddexp(0 * m, -m).mean()", None),
    ("return (F.relu(-m) + torch.log1p(torch.exp(-m.abs()))).mean()", None),
    ("return -F.logsigmoid(m.clamp(max=30)).mean()", None),  # flat where a pair is won: so is the loss itself
    ("return (m > 0).float().mean(), -F.logsigmoid(m).mean()", "the loss is the second of two"),
    ("return -F.logsigmoid(m), (pc - rc).detach(), (pr - rr).detach()", "the loss is the first of three"),
    ("return pc.mean(), pr.mean(), -F.logsigmoid(m).mean()", "the loss is the third of three"),
    ("return {'accuracy': (m > 0).float().mean(), 'dpo': -F.logsigmoid(m).mean()}", "the loss is at 'dpo'"),
])
def test_a_dpo_loss_is_right_however_it_is_written_and_wherever_it_stands(judged, lines, note):
    found = judged(DPO, lines)
    assert (found["status"], found["mistake"]) == ("right", None)
    assert not note or any(said.startswith(note) for said in found["notes"])


@pytest.mark.parametrize(("lines", "name"), [
    ("return -F.logsigmoid(beta * ((pc - pc.detach()) - (pr - pr.detach()))).mean()", "compared with itself"),
    ("return (m * 0).sum() + 3", "without a gradient"),
    ("return (m * 0).sum()", "without a gradient"),
    ("return (m > 0).float().mean(), F.logsigmoid(m).mean()", "sign"),
    # what happens far out
    ("return -F.logsigmoid(m.clamp(-20, 20)).mean()", "flat far out"),
    ("return -torch.log(torch.sigmoid(m) + 1e-8).mean()", "flat far out"),
    ("return -F.logsigmoid(m.clamp(-20, 20)).sum()", "sum for mean over the batch + flat far out"),
    ("return torch.log(1 + torch.exp(-m)).mean()", "log(sigmoid)"),
    ("return (torch.log(1 + torch.exp(m)) - m).mean()", "log(sigmoid)"),  # infinite where a pair is won
    ("return torch.where(m > -50, -torch.log(torch.sigmoid(m)), -m).mean()", "log(sigmoid)"),  # its gradient is nan
    ("return -F.logsigmoid(beta * (torch.log(pc.exp() / rc.exp()) - torch.log(pr.exp() / rr.exp()))).mean()",
     "exp of a text's log-prob"),
    ("return -F.logsigmoid(beta * torch.log(pc.exp() * rr.exp() / (rc.exp() * pr.exp()))).mean()",
     "exp of a text's log-prob"),
    # half a mistake
    ("return -F.logsigmoid(beta * ((pc - rc) - pr)).mean()", "reference on the chosen side only"),
    ("return -F.logsigmoid(beta * (pc - (pr - rr))).mean()", "reference on the rejected side only"),
    ("return -F.logsigmoid(beta * ((pc + rc) - (pr - rr))).mean()", "reference added on the chosen side"),
    ("return -F.logsigmoid(beta * ((pc - rc) - (pr + rr))).mean()", "reference added on the rejected side"),
    ("return -F.logsigmoid(beta * (pc - rc) - (pr - rr)).mean()", "beta on the chosen side only"),
    ("return -F.logsigmoid((pc - rc) - beta * (pr - rr)).mean()", "beta on the rejected side only"),
    ("return -F.logsigmoid(beta * (pc - pr) - (rc - rr)).mean()", "beta on the policy's side only"),
    ("return -F.logsigmoid((pc - pr) - beta * (rc - rr)).mean()", "beta on the reference's side only"),
    ("return -F.logsigmoid(beta * (rr - pr)).mean()", "chosen forgotten"),
    ("return -F.logsigmoid(beta * ((pc - rc) + (pr - rr))).mean()", "chosen and rejected added"),
    ("return beta * -F.logsigmoid(m).mean()", "beta outside the sigmoid"),
    # other losses
    ("return ((pc - rc - pr + rr - 1 / (2 * beta))**2).mean()", "IPO"),
    ("return F.relu(1 - m).mean()", "hinge"),
    ("return F.relu(-m).mean()", None),  # not the three mistakes that fit on ordinary pairs, by chance
    ("return (-0.9 * F.logsigmoid(m) - 0.1 * F.logsigmoid(-m)).mean()", "label smoothing"),
    ("return -F.logsigmoid(m).mean() - 0.2 * pc.mean()", "SFT term"),
    ("return -F.logsigmoid(beta * (pc - pr) - 0.5).mean()", "target margin + reference forgotten"),
    ("return -F.logsigmoid(beta * (pc.detach() - rc - pr + rr)).mean()", "another gradient"),
])
def test_a_wrong_dpo_loss_is_named(judged, lines, name):
    found = judged(DPO, lines)
    assert (found["status"], found["mistake"]) == ("wrong", name)


def test_a_constant_dpo_loss_is_ln_2_where_the_policy_is_its_own_reference(judged):
    found = judged(DPO, "return -F.logsigmoid(0 * m).mean()")
    assert found["mistake"] == "compared with itself" and found["got"] == pytest.approx(math.log(2), abs=1e-6)
