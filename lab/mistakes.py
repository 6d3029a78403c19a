"""Mistakes that people really make, put into this code one at a time. Nearly all run without an error message.

    python -m lab.mistakes                                                   # the list, with the test that catches each
    python -m lab.mistakes sign reinforce.py --alpha 0.1 --out runs/broken   # a script with one of them in it

A mistake is a change of one function's source text: that function is compiled anew, nothing is written to disk, so a
broken run that was cut off goes on broken only if it is called with its mistake again. A name may have dashes for its
spaces. `make broken` makes some such runs and draws them; test_mistakes.py shows that each mistake fails its test.
"""

import importlib
import inspect
import sys
from typing import NamedTuple

from support.command import launch
from support.errors import UserError

SCRIPTS = ("reward.py", "reinforce.py", "dpo.py")
OURS = ("common", "reward", "reinforce", "dpo", "support", "demo", "test_losses", "tests")  # modules and rooms


class Mistake(NamedTuple):
    name: str
    where: str  # module.function
    old: str  # stands exactly once in the function's source
    new: str
    test: str  # of test_losses.py, or tests/FILE.py::NAME
    says: str  # what is wrong


CALL = "\n    return functional_call(model, centred_head(model), kwargs=inputs, tie_weights=False).logits"
KL = "(logp.exp() * (logp - ref_logp).masked_fill_(logp == -torch.inf, 0.0)).sum(dim=-1)"
ALIGNED = "test_completion_logits_stand_in_the_column_of_the_token_they_forecast"
MASK = "test_completion_mask_keeps_the_first_eos_and_nothing_after_it"
SUM = "test_masked_sum_never_reads_what_the_mask_hides"
LOSS = "test_reinforce_loss_is_minus_the_mean_of_reward_times_summed_logps"
KL_VALUE = "test_kl_is_policy_to_reference_and_not_the_other_way"
DRAW = "test_draw_has_exactly_the_probabilities_of_the_softmax"

MISTAKES = [Mistake(*fields) for fields in (
    # ---- which forecast belongs to which token
    ("no shift", "common.completion_logits",
     'attention = attention[:, :-1]\n        positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)\n'
     '    inputs = {"input_ids": tokens[:, :-1]',
     'positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)\n    inputs = {"input_ids": tokens',
     ALIGNED, "token t is scored at column t, where the model has read it already"),
    ("logits shifted instead of targets", "common.completion_logits", CALL, CALL + ".roll(-2, dims=1)", ALIGNED,
     "logits[:, 1:] with tokens[:, :-1]: token t is scored at column t + 1 (at the end, where a row begins)"),
    ("off by one at the prompt", "common.completion_logits", "length}" + CALL, "length + 1}" + CALL + "[:, :-1]",
     ALIGNED, "the completion's logits begin at column P - 2: each token is scored by the forecast of the one before"),
    ("missing position ids", "common.completion_logits", '"position_ids": positions', '"position_ids": None',
     "test_pair_logps_are_those_of_the_completions_alone_however_they_are_padded",
     "the padding on the left is counted: a prompt's first token has another position in each batch"),
    # ---- which tokens count
    ("first eos dropped", "common.completion_mask", " - is_eos.long()", "", MASK,
     "as with tokens != pad: where to stop is never trained"),
    ("padding kept", "common.completion_mask", "eos_before == 0", "eos_before >= 0", MASK,
     "the eos that fill up a finished row are scored as if they had been written"),
    ("mask one column late", "dpo.collate", "attention[:, width:]", "attention[:, width - 1 : -1]",
     "test_collate_meets_prompts_and_completions_at_one_column",
     "one token of padding is scored after each completion but the longest"),
    ("prompt scored", "dpo.make_pair", "Pair(prompt, [*chosen, eos][:room], [*rejected, eos][:room])",
     "Pair(prompt[:1], *([*prompt[1:], *text, eos][: max_len - 1] for text in (chosen, rejected)))",
     "test_pairs_end_in_eos_unless_truncated_and_never_lose_the_whole_completion",
     "all tokens but the first are scored; the DPO loss cannot see it: the prompt's log-probs cancel"),
    # ---- REINFORCE
    ("sign", "reinforce.reinforce_loss", "return -(", "return (", LOSS,
     "what is rewarded is made less likely"),
    ("mean for sum", "common.masked_sum", ".sum(dim=-1)", ".sum(dim=-1) / mask.sum(dim=-1)", SUM,
     "a completion's log-prob is averaged: a word in a long one counts less, and beta and alpha have another unit"),
    ("mean over padding", "common.masked_sum", ".sum(dim=-1)", ".mean(dim=-1)", SUM,
     "averaged over the columns, padding too: a row's weight depends on the longest in its batch"),
    ("reward broadcast over tokens", "reinforce.reinforce_loss", "reward.detach() *", "reward.detach().unsqueeze(1) *",
     LOSS, "rewards (B, 1) times log-probs (B,) is (B, B): every row's tokens get every row's reward"),
    ("gradient into the reward", "reinforce.reinforce_loss", "reward.detach()", "reward",
     "test_reinforce_loss_sends_no_gradient_into_the_reward",
     "a differentiable reward would be trained to fit the samples (ours is a number: does nothing in a run)"),
    # ---- the KL
    ("KL reversed", "common.token_kl", KL, "(ref_logp.exp() * (ref_logp - logp)).sum(dim=-1)", KL_VALUE,
     "KL(reference ‖ policy), as kl_div(policy, reference) gives it: its arguments are (q, p)"),
    ("KL negated", "common.token_kl", "(logp - ref_logp)", "(ref_logp - logp)", KL_VALUE,
     "the penalty is a bonus: the loss falls as the policy runs away"),
    ("KL sampled and back-propagated", "reinforce.train", "token_kl(logp, log_probs(ref_logits))",
     "token_logps(logp, completions) - token_logps(log_probs(ref_logits), completions)",
     "tests/test_mistakes.py::test_a_step_of_reinforce_has_the_gradient_of_the_reward_and_of_the_exact_kl",
     "log p - log q of the sampled token is right on average; its gradient is on average zero"),
    ("KL without a gradient", "common.token_kl", "logp.exp() *", "logp.exp().detach() *",
     "test_kl_gradient_is_that_of_the_policys_exact_kl",
     "p is detached: the logged KL is right, its gradient exactly zero, whatever alpha"),
    ("batchmean over the wrong axis", "common.token_kl", KL, KL + " / logp.shape[1]", KL_VALUE,
     "rows and tokens flattened before batchmean: a mean over N tokens, so alpha is N times too small"),
    ("prompt positions in the KL", "common.completion_logits", ', "logits_to_keep": length}' + CALL,
     "}" + CALL + "[:, :length]", ALIGNED,
     "the first N columns, not the last: KL (and log-probs) at forecasts of prompt tokens"),
    # ---- DPO
    ("chosen and rejected swapped", "dpo.collate",
     "[(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]",
     "[(pair.prompt, pair.rejected) for pair in pairs] + [(pair.prompt, pair.chosen) for pair in pairs]",
     "test_collate_meets_prompts_and_completions_at_one_column",
     "the worse completion is preferred; loss, accuracy and margin look as they should"),
    ("beta forgotten", "dpo.dpo_loss", "beta * (", "1.0 * (", "test_dpo_loss_by_hand",
     "beta is 1, whatever the flag says"),
    ("reference forgotten", "dpo.dpo_loss", "(chosen_logratios - rejected_logratios)",
     "(policy_chosen_logps - policy_rejected_logps)", "test_dpo_loss_of_the_reference_itself_is_ln_2",
     "the margin is that of the policy's log-probs alone: the longer completion starts far behind"),
    ("log(sigmoid)", "dpo.dpo_loss", "F.logsigmoid(margins)", "margins.sigmoid().log()",
     "test_dpo_loss_is_finite_where_log_of_sigmoid_is_not", "infinite for a margin below -89"),
    # ---- sampling and arithmetic
    ("dropout on", "common.completion_logits", "functional_call(model,", "functional_call(model.train(),", ALIGNED,
     "log-probs of another network each time (the demo's models have no dropout: does nothing there)"),
    ("top-k left on", "common.draw", "cumulative = logits",
     "logits = logits.masked_fill(logits < logits.topk(min(50, logits.shape[-1]))[0][:, -1:], -torch.inf)\n"
     "    cumulative = logits", "test_draw_has_no_bias_in_a_vocabulary_of_gpt2s_size",
     "generate()'s k = 50: samples of another distribution than the one that is scored"),
    ("greedy", "common.draw", "drawn.clamp(max=logits.shape[-1] - 1)", "logits.argmax(dim=-1)", DRAW,
     "generate() without do_sample: always the likeliest word, so nothing is explored"),
    ("softmax in bf16", "common.log_probs", ", dtype=torch.float32", "",
     "test_log_probs_of_bf16_logits_are_taken_in_fp32",
     "8 bits for numbers around -10, errors add up (in a run: --precision bf16; on CUDA its autocast mends it)"),
    ("the ragged last batch", "support.ranks.micro_batches", "(stop - first) / rows",
     "1 / -(-rows // (size or rows))", "test_means_of_micro_batches_add_up_to_the_mean_of_all_rows",
     "the mean of the parts' means: rows of a short last part count more (in a run: dpo.py with --micro-batch)"),
)]


def replace(right, wrong):
    """Puts one function in another's place in every module of ours that has it, imported by name too."""
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in OURS]:
        for name, value in list(vars(module).items()):
            if value is right:
                setattr(module, name, wrong)


def put_in(mistake):
    """-> the right function and the wrong one, which has its place from now on (replace() puts it back)."""
    module_name, name = mistake.where.rsplit(".", 1)
    module = importlib.import_module(module_name)
    right = getattr(module, name)
    source = inspect.getsource(right)
    if (times := source.count(mistake.old)) != 1:
        raise ValueError(f"{mistake.name}: {mistake.where} has {mistake.old!r} {times} times, not once")
    exec(compile(source.replace(mistake.old, mistake.new), f"<{mistake.name}>", "exec"), vars(module))
    wrong = getattr(module, name)
    replace(right, wrong)
    return right, wrong


def main(name="--help", script="", *flags):
    if name in ("-h", "--help"):
        return print("\n".join([__doc__, *(f"{one.name} ({one.where})\n    {one.says}\n    caught by {one.test}"
                                          for one in MISTAKES)]))
    mistake = next((one for one in MISTAKES if one.name.replace(" ", "-") == name.replace(" ", "-")), None)
    if not mistake:
        raise UserError(f"there is no mistake {name!r}; python -m lab.mistakes lists them")
    if script not in SCRIPTS:
        raise UserError(f"after the mistake comes one of {', '.join(SCRIPTS)} with its flags, not {script!r}")
    own = importlib.import_module(script.removesuffix(".py"))
    module, function = mistake.where.rsplit(".", 1)
    if module != "common" and getattr(own, function, None) is not getattr(importlib.import_module(module), function):
        raise UserError(f"{mistake.name!r} would change nothing: {script} does not call {mistake.where}")
    put_in(mistake)
    print(f"with a mistake in it, {mistake.name!r}, in {mistake.where}: {mistake.says}")
    sys.argv = [script, *flags]  # errors and --help are the script's own
    own.main()


if __name__ == "__main__":
    launch(lambda: main(*sys.argv[1:]))
