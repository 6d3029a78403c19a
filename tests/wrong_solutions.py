"""What people get wrong in the course's notebook: changes to course/A3.py, which is right. For test_check.py."""

from support.files import HOME

A3 = (HOME / "course" / "A3.py").read_text(encoding="utf-8")

# Each mistake as someone would make it: its name, the function, and what is replaced by what.
LOGITS = "logits = model(output_tokens).logits.float()"
LOG_PROBS = "log_probs = logits.log_softmax(dim=-1)"
FORECASTS = "forecasts, completions = log_probs[:, SEED_TOKENS - 1 : -1], output_tokens[:, SEED_TOKENS:]"
CHOSEN = "chosen = forecasts.gather(-1, completions.unsqueeze(-1)).squeeze(-1)"
MASK = "return eos_before == 0"
LOG_P = "log_p = chosen.masked_fill(~completion_mask(output_tokens), 0.0).sum(dim=-1)"
LOSS = "loss = -(reward.detach() * log_p).mean()"
NO_GRAD = "@torch.no_grad()  # the reward is a number: no gradient goes into the classifier\n"
ORIG = "log_probs_orig = orig_model(output_tokens).logits.float().log_softmax(dim=-1)"
WHERE = "forecasts = slice(SEED_TOKENS - 1, -1)"
BOTH = "log_p, log_q = log_probs_current[:, forecasts], log_probs_orig[:, forecasts]"
KL = "kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)"
KL_OF_ROWS = "return kl.masked_fill(~completion_mask(output_tokens), 0.0).sum(dim=-1).mean()"
UNMASKED = (KL_OF_ROWS, "return kl.sum(dim=-1).mean()")
SAMPLED = ".gather(-1, output_tokens[:, SEED_TOKENS:, None]).squeeze(-1)"
CHOICE = "chosen_logratios = policy_chosen_logps - reference_chosen_logps"
REJECTED = "rejected_logratios = policy_rejected_logps - reference_rejected_logps"
MARGINS = "margins = beta * (chosen_logratios - rejected_logratios)"
DPO = "return -F.logsigmoid(margins).mean()"
SHIFTED = "labels, logits = labels[:, 1:], logits[:, :-1]"
COUNTED = "mask = labels != -100"
REAL_IDS = ("masked_fill(~mask, 0)", "masked_fill(labels == -100, 0)")
TOTAL = "total = logps.masked_fill(~mask, 0.0).sum(dim=-1)"
AVERAGE = "return total / mask.sum(dim=-1) if average_log_prob else total"
HIDDEN = "hidden = (attention == 0) | (place < prompt_lengths.unsqueeze(-1))"
LABELS = 'return tokenized_input["input_ids"].masked_fill(hidden, -100)'
OPTIONS = "do_sample=True, top_k=0, top_p=1.0, temperature=1.0"
STEP = "optimizer.zero_grad()\n        loss.backward()\n        optimizer.step()\n        rewards"
REWARD = "reward = reward_model(**scored).logits.softmax(dim=-1)[:, 1]"
PADDED = "    output_tokens = F.pad(output_tokens, (0, missing), value=tokenizer.eos_token_id)\n"
MISTAKES = [
    ("sign", "compute_reinforce_loss", (LOSS, "loss = (reward.detach() * log_p).mean()")),
    ("no shift", "compute_reinforce_loss", (FORECASTS, FORECASTS.replace("SEED_TOKENS - 1 : -1", "SEED_TOKENS:"))),
    ("logits shifted instead of targets", "compute_reinforce_loss",
     (FORECASTS, "forecasts, completions = log_probs[:, 11:], output_tokens[:, 10:-1]"),
     (LOG_P, LOG_P.replace("mask(output_tokens)", "mask(output_tokens)[:, :-1]"))),
    ("off by one at the prompt", "compute_reinforce_loss",
     (FORECASTS, "forecasts, completions = log_probs[:, 10:-1], output_tokens[:, 11:]"),
     (LOG_P, LOG_P.replace("mask(output_tokens)", "mask(output_tokens)[:, 1:]"))),
    ("off by one at the prompt", "compute_reinforce_loss",
     (FORECASTS, "forecasts, completions = log_probs[:, 8:-1], output_tokens[:, 9:]"),
     (LOG_P, LOG_P.replace("~completion_mask(output_tokens)", "F.pad(~completion_mask(output_tokens), (1, 0))"))),
    ("misaligned gather", "compute_reinforce_loss", (FORECASTS, FORECASTS.replace("SEED_TOKENS - 1 : -1", ":-1"))),
    ("first eos dropped", "compute_reinforce_loss", (MASK, "return is_eos.cumsum(dim=-1) == 0")),
    ("first eos dropped", "compute_reinforce_loss",
     (MASK, "return output_tokens[:, SEED_TOKENS:] != tokenizer.pad_token_id")),
    ("mask one column late", "compute_reinforce_loss",
     (MASK, "mask = eos_before == 0\n    return torch.cat([mask[:, :1], mask[:, :-1]], dim=1)")),
    ("mean for sum", "compute_reinforce_loss", (LOG_P, LOG_P + " / completion_mask(output_tokens).sum(dim=-1)")),
    ("mean over padding", "compute_reinforce_loss", (LOG_P, LOG_P.replace("sum", "mean"))),
    ("reward broadcast over tokens", "compute_reinforce_loss", (LOSS, "loss = -(reward.view(-1, 1) * log_p).mean()")),
    ("reward forgotten", "compute_reinforce_loss", (LOSS, "loss = -log_p.mean()")),
    ("log forgotten", "compute_reinforce_loss", (LOG_PROBS, "log_probs = logits.softmax(dim=-1)")),
    ("softmax in bf16", "compute_reinforce_loss", (LOGITS, LOGITS.replace("float", "bfloat16"))),
    ("dropout on", "compute_reinforce_loss", (LOGITS, LOGITS.replace("model(", "model.train()("))),
    ("without a gradient", "compute_reinforce_loss", (CHOSEN, CHOSEN.replace("forecasts", "forecasts.detach()"))),
    ("another gradient", "compute_reinforce_loss", (LOSS, LOSS + "\n    loss = loss / 2 + loss.detach() / 2")),
    ("gradient into the reward", "compute_reinforce_loss", (LOSS, LOSS.replace(".detach()", "")), (NO_GRAD, "")),
    ("entropy bonus", "compute_reinforce_loss",
     (LOSS, LOSS + "\n    loss = loss + 0.01 * (log_probs.exp() * log_probs).sum(dim=-1)[:, 9:-1].mean()")),
    ("discount over the tokens", "compute_reinforce_loss",
     (CHOSEN, CHOSEN + "\n    chosen = chosen * 0.99 ** torch.arange(NEW_TOKENS)")),
    ("tokens weighed by their place", "compute_reinforce_loss",
     (CHOSEN, CHOSEN + "\n    chosen = chosen * torch.arange(NEW_TOKENS, 0, -1)")),
    ("only the last token rewarded", "compute_reinforce_loss", (LOG_P, "log_p = chosen[:, -1]")),
    ("rows not weighed by the reward", "compute_reinforce_loss", (LOSS, LOSS.replace("detach()", "detach() ** 2"))),
    ("without a gradient", "compute_reinforce_loss", (LOSS, "loss = (0 * log_p).mean()")),
    ("KL reversed", "compute_kl_divergence", (KL, "kl = (log_q.exp() * (log_q - log_p)).sum(dim=-1)")),
    ("KL reversed", "compute_kl_divergence",
     (KL, 'kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)')),
    ("KL negated", "compute_kl_divergence", (KL, "kl = (log_p.exp() * (log_q - log_p)).sum(dim=-1)")),
    ("KL sampled and back-propagated", "compute_kl_divergence", (KL, "kl = (log_p - log_q)" + SAMPLED)),
    ("KL sampled and back-propagated, squared", "compute_kl_divergence",
     (KL, f"kl = (log_p - log_q){SAMPLED} ** 2 / 2")),
    ("KL sampled and back-propagated, k3", "compute_kl_divergence",
     (KL, f"x = (log_q - log_p){SAMPLED}\n    kl = x.exp() - 1 - x")),
    ("KL sampled and back-propagated, k3 reversed", "compute_kl_divergence",
     (KL, f"x = (log_p - log_q){SAMPLED}\n    kl = x.exp() - 1 - x")),
    ("KL sampled and back-propagated, times log p", "compute_kl_divergence",
     (KL, f"kl = ((log_p - log_q).detach() * log_p){SAMPLED}")),
    ("symmetric KL", "compute_kl_divergence", (KL, "kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)")),
    ("symmetric KL", "compute_kl_divergence",
     (KL, "kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2")),
    ("Jensen-Shannon", "compute_kl_divergence",
     (KL, "p, q = log_p.exp(), log_q.exp()\n    m = ((p + q) / 2).log()\n"
          "    kl = (p * (log_p - m) + q * (log_q - m)).sum(dim=-1) / 2")),
    ("cross-entropy", "compute_kl_divergence", (KL, "kl = -(log_p.exp() * log_q).sum(dim=-1)")),
    ("log of a log-probability", "compute_kl_divergence",
     (KL, 'kl = F.kl_div(log_q, log_p, reduction="none").sum(dim=-1)')),
    ("prompt positions in the KL", "compute_kl_divergence", (WHERE, "forecasts = slice(0, 9)"), UNMASKED),
    ("KL without a gradient", "compute_kl_divergence", (KL, KL.replace("log_p", "log_p.detach()"))),
    ("KL without a gradient", "compute_kl_divergence", (KL, KL.replace("log_p.exp()", "log_p.exp().detach()"))),
    ("batchmean over the wrong axis", "compute_kl_divergence", (KL_OF_ROWS, "return kl.sum(dim=0).mean()")),
    ("mean over the vocabulary, too", "compute_kl_divergence",
     (KL_OF_ROWS, "return F.kl_div(log_q, log_p, log_target=True)")),
    ("policy and original at different positions", "compute_kl_divergence",
     (BOTH, BOTH.replace("log_probs_current[:, forecasts]", "log_probs_current[:, SEED_TOKENS:]"))),
    ("softmax in bf16", "compute_kl_divergence", (BOTH, BOTH.replace("forecasts]", "forecasts].bfloat16()"))),
    ("dropout on", "compute_kl_divergence", (ORIG, ORIG.replace("orig_model(", "orig_model.train()("))),
    ("off by one at the prompt", "compute_kl_divergence", (WHERE, "forecasts = slice(SEED_TOKENS, -1)"), UNMASKED),
    ("compared with itself", "compute_kl_divergence", (ORIG, ORIG.replace("orig_model(", "model("))),
    ("KL without a gradient", "compute_reinforce_loss", ("return log_probs, loss", "return log_probs.detach(), loss")),
    ("chosen and rejected swapped", "compute_DPO_loss",
     (MARGINS, "margins = beta * (rejected_logratios - chosen_logratios)")),
    ("beta forgotten", "compute_DPO_loss", (MARGINS, MARGINS.replace("beta * ", ""))),
    ("beta forgotten", "compute_DPO_loss", (MARGINS, MARGINS.replace("beta", "0.1"))),
    ("reference forgotten", "compute_DPO_loss",
     (MARGINS, "margins = beta * (policy_chosen_logps - policy_rejected_logps)")),
    ("log(sigmoid)", "compute_DPO_loss", (DPO, "return -torch.log(torch.sigmoid(margins)).mean()")),
    ("sign", "compute_DPO_loss", (DPO, DPO.replace("-F.", "F."))),
    ("compared with itself", "compute_DPO_loss",
     (MARGINS, MARGINS + "\n    margins = margins - margins.detach()")),
    ("reference on the chosen side only", "compute_DPO_loss", (REJECTED, "rejected_logratios = policy_rejected_logps")),
    ("reference on the rejected side only", "compute_DPO_loss", (CHOICE, "chosen_logratios = policy_chosen_logps")),
    ("reference added on the chosen side", "compute_DPO_loss", (CHOICE, CHOICE.replace("-", "+"))),
    ("reference added on the rejected side", "compute_DPO_loss", (REJECTED, REJECTED.replace("-", "+"))),
    ("chosen and rejected added", "compute_DPO_loss", (MARGINS, MARGINS.replace("-", "+"))),
    ("chosen forgotten", "compute_DPO_loss", (MARGINS, "margins = -beta * rejected_logratios")),
    ("rejected forgotten", "compute_DPO_loss", (MARGINS, "margins = beta * chosen_logratios")),
    ("beta on the chosen side only", "compute_DPO_loss",
     (MARGINS, "margins = beta * chosen_logratios - rejected_logratios")),
    ("beta on the rejected side only", "compute_DPO_loss",
     (MARGINS, "margins = chosen_logratios - beta * rejected_logratios")),
    ("beta on the policy's side only", "compute_DPO_loss", (CHOICE, CHOICE.replace("- ", "- 1 / beta * ")),
     (REJECTED, REJECTED.replace("- ", "- 1 / beta * "))),
    ("flat far out", "compute_DPO_loss", (MARGINS, MARGINS + "\n    margins = margins.clamp(-20, 20)")),
    ("flat far out", "compute_DPO_loss", (DPO, "return -torch.log(torch.sigmoid(margins) + 1e-8).mean()")),
    ("exp of a text's log-prob", "compute_DPO_loss",
     (CHOICE, "chosen_logratios = torch.log(policy_chosen_logps.exp() / reference_chosen_logps.exp())")),
    ("IPO", "compute_DPO_loss",
     (DPO, "return ((chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2).mean()")),
    ("hinge", "compute_DPO_loss", (DPO, "return F.relu(1 - margins).mean()")),
    ("label smoothing", "compute_DPO_loss",
     (DPO, "return (-0.9 * F.logsigmoid(margins) - 0.1 * F.logsigmoid(-margins)).mean()")),
    ("SFT term", "compute_DPO_loss", (DPO, DPO + " - 0.2 * policy_chosen_logps.mean()")),
    ("target margin", "compute_DPO_loss", (MARGINS, MARGINS + " - 0.5")),
    ("sum for mean over the batch", "compute_DPO_loss", (DPO, DPO.replace("mean", "sum"))),
    ("no shift", "_get_batch_logps", (SHIFTED, "pass")),
    ("logits shifted instead of targets", "_get_batch_logps",
     (SHIFTED, SHIFTED.replace("labels[:, 1:], logits[:, :-1]", "labels[:, :-1], logits[:, 1:]"))),
    ("mask one column late", "_get_batch_logps", (SHIFTED, "mask = labels[:, :-1] != -100\n    " + SHIFTED),
     (COUNTED, "pass"), REAL_IDS),
    ("padding kept", "_get_batch_logps", (TOTAL, "mask = torch.ones_like(mask)\n    " + TOTAL)),
    ("padding kept before the completion", "_get_batch_logps",
     (COUNTED, "mask = (labels != -100).flip(-1).cumsum(dim=-1).flip(-1) > 0"), REAL_IDS),
    ("padding kept after the completion", "_get_batch_logps",
     (COUNTED, "mask = (labels != -100).cumsum(dim=-1) > 0"), REAL_IDS),
    ("one number for the batch, a mean over all its tokens", "_get_batch_logps",
     (COUNTED, "return -F.cross_entropy(logits.flatten(0, 1), labels.flatten())")),
    ("one number for the batch, the sum over all its tokens", "_get_batch_logps",
     (COUNTED, 'return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")')),
    ("mean for sum", "_get_batch_logps", (AVERAGE, "return total / mask.sum(dim=-1)")),
    ("mean over padding", "_get_batch_logps", (AVERAGE, AVERAGE.replace("mask.sum(dim=-1)", "mask.shape[1]"))),
    ("sum for mean", "_get_batch_logps", (AVERAGE, "return total")),
    ("sign", "_get_batch_logps", (TOTAL, TOTAL.replace("= logps", "= -logps"))),
    ("softmax in bf16", "_get_batch_logps", ("logps = logits.float()", "logps = logits.bfloat16()")),
    ("first eos dropped", "_get_batch_logps",
     (COUNTED, "mask = (labels != -100) & (labels != tokenizer.pad_token_id)")),
    ("labels changed in place", "_get_batch_logps", ("labels.masked_fill(~mask", "labels.masked_fill_(~mask")),
    ("input_ids changed in place", "create_labels_from_attention_mask", (LABELS, LABELS.replace("fill(", "fill_("))),
    ("prompt scored", "create_labels_from_attention_mask", (HIDDEN, "hidden = attention == 0")),
    ("padding kept", "create_labels_from_attention_mask", (HIDDEN, HIDDEN.replace("== 0) |", "== 1) &"))),
    ("off by one at the prompt", "create_labels_from_attention_mask", (HIDDEN, HIDDEN.replace("<", "<="))),
    ("first eos dropped", "create_labels_from_attention_mask",
     (HIDDEN, HIDDEN + ' | (tokenized_input["input_ids"] == tokenizer.pad_token_id)')),
    ("prompt counted from the row's start", "create_labels_from_attention_mask",
     ("place = attention.cumsum(dim=-1) - 1", "place = torch.arange(attention.shape[1])")),
    ("greedy", "compute_reward_for_mini_batch", (OPTIONS, "do_sample=False")),
    ("top-k left on", "compute_reward_for_mini_batch", (OPTIONS, "do_sample=True")),
    ("temperature or top-p left on", "compute_reward_for_mini_batch",
     (OPTIONS, OPTIONS.replace("temperature=1.0", "temperature=0.7"))),
    ("temperature or top-p left on", "compute_reward_for_mini_batch", (OPTIONS, OPTIONS.replace("p=1.0", "p=0.9"))),
    ("temperature or top-p left on", "compute_reward_for_mini_batch",
     (OPTIONS, OPTIONS.replace("temperature=1.0", "temperature=0.95"))),
    *(("temperature or top-p left on", "compute_reward_for_mini_batch", (OPTIONS, f"{OPTIONS}, {bent}"))
      for bent in ("repetition_penalty=1.2", "epsilon_cutoff=3e-4", "bad_words_ids=[[198]]", "num_beams=2")),
    ("temperature or top-p left on", "compute_reward_for_mini_batch",
     ("    inputs =", "    model.generation_config.repetition_penalty = 1.2\n    inputs =")),
    ("log-odds as reward", "compute_reward_for_mini_batch",
     (REWARD, "logits = reward_model(**scored).logits\n    reward = logits[:, 1] - logits[:, 0]")),
    ("P(positive) shifted or scaled", "compute_reward_for_mini_batch", (REWARD, REWARD + " * 2 - 1")),
    ("padding kept", "compute_reward_for_mini_batch", ("reward_model(**scored)", 'reward_model(scored["input_ids"])')),
    ("dropout on", "compute_reward_for_mini_batch", ("model.generate(**inputs", "model.train().generate(**inputs")),
    ("the completion alone is scored", "compute_reward_for_mini_batch",
     ("batch_decode(output_tokens,", "batch_decode(output_tokens[:, SEED_TOKENS:],")),
    ("length", "compute_reward_for_mini_batch", (PADDED, ""),
     (" max_new_tokens=max_new_tokens,", " max_length=max_new_tokens,")),
    ("P(negative)", "compute_reward_for_mini_batch", ("softmax(dim=-1)[:, 1]", "softmax(dim=-1)[:, 0]")),
]
# In the loops, which are not judged: the sign that is seen, and where.
SIGNS = [
    ("the ragged last batch", "evaluate", ("rewards, generations = [], []", "total, generations = 0.0, []"),
     ("rewards.append(reward)", "total += reward.mean().item()")),
    ("the ragged last batch", "train_DPO", ("beta).item() * len(rows)", "beta).item()"),
     ("return losses, total / len(test_pairs)", "return losses, total / (len(test_pairs) // batch_size)")),
    ("the ragged last batch", "evaluate", ("rewards.append(reward)", "rewards.append(reward.mean())"),
     ("rewards = torch.cat(rewards)", "rewards = torch.stack(rewards)")),
    ("gradient into the reward", "train", (LOSS, LOSS.replace(".detach()", "")), (NO_GRAD, "")),
    ("KL negated", "train", ("loss = loss + alpha * kl", "loss = loss - alpha * kl")),
    ("KL negated", "train", ("loss = loss + alpha * kl", "loss = loss + alpha * -kl")),
    ("compared with itself", "train",
     ("output_tokens, orig_model)\n            loss", "output_tokens, model)\n            loss")),
    ("dropout on", "train", ("    rewards, kls = [], []", "    model.train()\n    rewards, kls = [], []")),
    ("no zero_grad()", "train", (STEP, STEP.replace("optimizer.zero_grad()", "pass"))),
    ("`orig_model = model` is no copy", "train",
     ("    rewards, kls = [], []", "    orig_model = model\n    rewards, kls = [], []")),
    ("`orig_model = model.eval()` is no copy", "train",
     ("    rewards, kls = [], []", "    orig_model = model.eval()\n    rewards, kls = [], []")),
    ("zero_grad() between", "train",
     (STEP, "loss.backward()\n        optimizer.zero_grad()\n        optimizer.step()\n        rewards")),
    ("missing position ids", "get_log_probs", (", position_ids=positions)", ")")),
]
# What the assignment leaves open: right, with a note.
OPEN = [
    ("29 log-probs a row", "compute_reinforce_loss",
     (FORECASTS, "forecasts, completions = log_probs[:, :-1], output_tokens[:, 1:]"),
     (LOG_P, "log_p = chosen.sum(dim=-1)")),
    ("counts tokens after the first eos", "compute_reinforce_loss", (LOG_P, "log_p = chosen.sum(dim=-1)")),
    ("less the mean of the others as a baseline", "compute_reinforce_loss",
     (LOSS, "others = (reward.sum() - reward) / (len(reward) - 1)\n    loss = -((reward - others) * log_p).mean()")),
    ("its value is 0", "compute_reinforce_loss",
     (LOSS, "ratio = (log_p - log_p.detach()).exp()\n    loss = -((reward - reward.mean()) * ratio).mean()")),
    ("its gradient is 2 times the right one", "compute_reinforce_loss",
     (LOSS, LOSS.replace("reward.detach()", "(2 * reward.detach() - 1)"))),
    ("less the batch's mean, divided by its standard deviation, as a baseline", "compute_reinforce_loss",
     (LOSS, LOSS.replace("reward.detach()", "(reward - reward.mean()) / (reward.std(unbiased=False) + 1e-4)"))),
    ("less 0.4 as a baseline", "compute_reinforce_loss",
     (LOSS, LOSS.replace("reward.detach()", "(reward.detach() - 0.4)"))),
    ("counts positions after the first eos", "compute_kl_divergence", UNMASKED),
    ("averaged over the positions, row by row", "compute_kl_divergence", (WHERE, "forecasts = slice(0, None)"),
     (KL_OF_ROWS, "m = output_tokens != tokenizer.pad_token_id\n    return ((kl * m).sum(-1) / m.sum(-1)).mean()")),
    ("right for padding on the right", "create_labels_from_attention_mask",
     ('padding_side="left"', 'padding_side="right"'),
     ("place = attention.cumsum(dim=-1) - 1", "place = torch.arange(attention.shape[1])")),
    ("KL at all 30 positions", "compute_kl_divergence", (WHERE, "forecasts = slice(0, None)"), UNMASKED),
    ("KL at columns 10 to 29", "compute_kl_divergence", (WHERE, "forecasts = slice(SEED_TOKENS, None)"), UNMASKED),
    ("KL at 29 positions", "compute_kl_divergence", (WHERE, "forecasts = slice(0, -1)"), UNMASKED),
    ("averaged over the positions", "compute_kl_divergence", (KL_OF_ROWS, "return kl.mean()")),
    ("summed over rows and positions", "compute_kl_divergence", (KL_OF_ROWS, "return kl.sum()")),
    ("the loss is the second of two", "compute_DPO_loss",
     (DPO, "return (margins > 0).float().mean(), -F.logsigmoid(margins).mean()")),
    ("a minimum length forbids eos", "compute_reward_for_mini_batch", (OPTIONS, OPTIONS + ", min_new_tokens=20")),
    ("the reward still has a graph", "compute_reward_for_mini_batch", (NO_GRAD, "")),
]


def changed(*pairs, text=A3):
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
