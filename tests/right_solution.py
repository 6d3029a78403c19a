"""A solution of the course in the style of its notebook, right everywhere, and what people get wrong in it.

For test_check.py. Each mistake is text that is replaced by other text.
"""

# In the course's names and the shape of its notebook, as Colab exports it: with shell lines, downloads, training.
SOLUTION = r'''
# %% [markdown]
# # Assignment 3
# A solution in the course's style.

# %%
!pip install -q datasets transformers
%matplotlib inline
import random
import torch
import torch.nn.functional as F
from tqdm import tqdm
from datasets import load_dataset
from matplotlib import pyplot as plt
from transformers import AutoTokenizer, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AdamW, set_seed
from typing import Dict, List, Tuple, Union

# %%
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model_name = "distilgpt2"
SEED_TOKENS = 10
tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_name).to(device)
model.config.pad_token_id = tokenizer.eos_token_id
reward_name = "omidroshani/imdb-sentiment-analysis"
reward_tokenizer = AutoTokenizer.from_pretrained(reward_name)
reward_model = AutoModelForSequenceClassification.from_pretrained(reward_name).to(device)
imdb = load_dataset("imdb")
train_texts, test_texts = list(imdb["train"]["text"]), list(imdb["test"]["text"])
random.seed(0)
random.shuffle(train_texts)
random.shuffle(test_texts)


# %%
@torch.no_grad()
def compute_reward_for_mini_batch(batch, tokenizer, model, reward_tokenizer, reward_model,
                                  seed_token_length=10, max_new_tokens=20):
    """Continue the first tokens of each review and score the result."""
    # TODO: tokenize
    inputs = tokenizer(batch, truncation=True, max_length=seed_token_length, padding=True,
                       return_tensors="pt").to(device)
    # TODO: generate
    output_tokens = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=max_new_tokens,
                                   pad_token_id=tokenizer.eos_token_id)
    generated = tokenizer.batch_decode(output_tokens, skip_special_tokens=True)
    scored = reward_tokenizer(generated, padding=True, truncation=True, return_tensors="pt").to(device)
    logits = reward_model(**scored).logits
    reward = F.softmax(logits, dim=-1)[:, 1]
    return reward, output_tokens, generated


def evaluate(tokenizer, model, reward_tokenizer, reward_model, batch_size=32):
    model.eval()
    total_reward, generations = 0.0, []
    for i in tqdm(range(0, len(test_texts), batch_size)):
        batch = test_texts[i:i + batch_size]
        reward, _, generated = compute_reward_for_mini_batch(batch, tokenizer, model, reward_tokenizer, reward_model)
        total_reward += reward.sum().item()
        generations.extend(generated)
    return {"reward": total_reward / len(test_texts), "generations": generations}


results = evaluate(tokenizer, model, reward_tokenizer, reward_model)
print("reward", results["reward"])


# %%
def compute_reinforce_loss(reward, output_tokens, model):
    """-> log-probs (B, 30, V) and the loss."""
    logits = model(output_tokens).logits
    log_probs = F.log_softmax(logits, dim=-1)
    chosen = log_probs[:, 9:-1].gather(-1, output_tokens[:, 10:].unsqueeze(-1)).squeeze(-1)
    is_eos = (output_tokens[:, 10:] == tokenizer.eos_token_id).long()
    mask = (is_eos.cumsum(-1) - is_eos) == 0
    log_p = (chosen * mask).sum(-1)
    loss = -(reward.detach() * log_p).mean()
    return log_probs, loss


def reset_model_optimizer(name, lr=1e-4):
    global model, optimizer
    model = AutoModelForCausalLM.from_pretrained(name).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)


def train(model_name, alpha=0.0, lr=1e-4, batch_size=32, use_kl_divergence=False):
    global model, optimizer, orig_model
    reset_model_optimizer(model_name, lr)
    orig_model = AutoModelForCausalLM.from_pretrained(model_name).to(device).eval()
    rewards, kls = [], []
    for i in range(0, len(train_texts), batch_size):
        batch = train_texts[i:i + batch_size]
        reward, output_tokens, _ = compute_reward_for_mini_batch(batch, tokenizer, model,
                                                                 reward_tokenizer, reward_model)
        reward = reward.detach()
        log_probs, loss = compute_reinforce_loss(reward, output_tokens, model)
        if use_kl_divergence:
            kl = compute_kl_divergence(log_probs, output_tokens, orig_model)
            kls.append(kl.item())
            loss = loss + alpha * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    return {"rewards": rewards, "kl": kls}


history = train(model_name)
plt.plot(history["rewards"])


# %%
def compute_kl_divergence(log_probs_current, output_tokens, orig_model):
    with torch.no_grad():
        log_probs_orig = F.log_softmax(orig_model(output_tokens).logits, dim=-1)
    log_p, log_q = log_probs_current[:, 9:-1], log_probs_orig[:, 9:-1]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl.sum(-1).mean()


# %%
def compute_DPO_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                     beta=0.1):
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def _get_batch_logps(logits: torch.FloatTensor, labels: torch.LongTensor, average_log_prob: bool = False):
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1]
    mask = labels != -100
    labels[labels == -100] = 0
    per_token = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    if average_log_prob:
        return (per_token * mask).sum(-1) / mask.sum(-1)
    return (per_token * mask).sum(-1)


def get_log_probs(model, batch):
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=position_ids).logits
    return _get_batch_logps(logits, batch["labels"])


def create_labels_from_attention_mask(tokenized_input, prompt_lengths):
    attention_mask = tokenized_input["attention_mask"]
    labels = tokenized_input["input_ids"].clone()
    labels[attention_mask == 0] = -100
    place = attention_mask.cumsum(-1) - 1
    labels[place < prompt_lengths.unsqueeze(-1)] = -100
    return labels


def train_DPO(model_name, beta=0.1, lr=5e-7, batch_size=16, max_length=128):
    global model, orig_model, optimizer
    reset_model_optimizer(model_name, lr)
    orig_model = AutoModelForCausalLM.from_pretrained(model_name).to(device).eval()

    def encode(texts, lengths):
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(device)
        encoded["labels"] = create_labels_from_attention_mask(encoded, lengths)
        return encoded

    def batch_loss(batch):
        lengths = torch.tensor([len(tokenizer(prompt)["input_ids"]) for prompt, _, _ in batch]).to(device)
        chosen, rejected = encode([x[1] for x in batch], lengths), encode([x[2] for x in batch], lengths)
        policy = get_log_probs(model, chosen), get_log_probs(model, rejected)
        with torch.no_grad():
            reference = get_log_probs(orig_model, chosen), get_log_probs(orig_model, rejected)
        return compute_DPO_loss(*policy, *reference, beta)

    losses = []
    for _ in range(2):
        for i in range(0, len(train_texts_parallel), batch_size):
            loss = batch_loss(train_texts_parallel[i:i + batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    test_loss = 0.0
    with torch.no_grad():
        for i in range(0, len(test_texts_parallel), batch_size):
            batch = test_texts_parallel[i:i + batch_size]
            test_loss += batch_loss(batch).item() * len(batch)
    return {"losses": losses, "test_loss": test_loss / len(test_texts_parallel)}


results_DPO = train_DPO(model_name)
'''

# Each mistake as someone would make it: its name, the function, and what is replaced by what.
LOG_PROBS = "log_probs = F.log_softmax(logits, dim=-1)"
CHOSEN = "chosen = log_probs[:, 9:-1].gather(-1, output_tokens[:, 10:].unsqueeze(-1)).squeeze(-1)"
IS_EOS = "is_eos = (output_tokens[:, 10:] == tokenizer.eos_token_id).long()"
MASK = "mask = (is_eos.cumsum(-1) - is_eos) == 0"
LOG_P = "log_p = (chosen * mask).sum(-1)"
LOSS = "loss = -(reward.detach() * log_p).mean()"
KL = "kl = (log_p.exp() * (log_p - log_q)).sum(-1)"
WHERE = "log_p, log_q = log_probs_current[:, 9:-1], log_probs_orig[:, 9:-1]"
DPO = "return -F.logsigmoid(beta * (chosen - rejected)).mean()"
SHIFTED = "labels = labels[:, 1:].clone()\n    logits = logits[:, :-1]\n    mask = labels != -100\n"
SUMMED = "    return (per_token * mask).sum(-1)\n\n\ndef get_log_probs"
AVERAGE = "return (per_token * mask).sum(-1) / mask.sum(-1)"
PLACE = "labels[place < prompt_lengths.unsqueeze(-1)] = -100"
MISTAKES = [
    ("sign", "compute_reinforce_loss", (LOSS, "loss = (reward.detach() * log_p).mean()")),
    ("no shift", "compute_reinforce_loss", (CHOSEN, CHOSEN.replace("9:-1", "10:"))),
    ("logits shifted instead of targets", "compute_reinforce_loss",
     (CHOSEN, CHOSEN.replace("9:-1", "11:").replace("10:]", "10:-1]")), (IS_EOS, IS_EOS.replace("10:]", "10:-1]"))),
    ("off by one at the prompt", "compute_reinforce_loss",
     (CHOSEN, CHOSEN.replace("9:-1", "10:-1").replace("10:]", "11:]")), (IS_EOS, IS_EOS.replace("10:]", "11:]"))),
    ("off by one at the prompt", "compute_reinforce_loss",
     (CHOSEN, CHOSEN.replace("9:-1", "8:-1").replace("10:]", "9:]")), (IS_EOS, IS_EOS.replace("10:]", "9:]"))),
    ("misaligned gather", "compute_reinforce_loss", (CHOSEN, CHOSEN.replace("9:-1", ":-1"))),
    ("first eos dropped", "compute_reinforce_loss", (MASK, "mask = is_eos.cumsum(-1) == 0")),
    ("first eos dropped", "compute_reinforce_loss",
     (MASK, "mask = output_tokens[:, 10:] != tokenizer.pad_token_id")),
    ("mask one column late", "compute_reinforce_loss",
     (MASK, MASK + "\n    mask = torch.cat([mask[:, :1], mask[:, :-1]], dim=1)")),
    ("mean for sum", "compute_reinforce_loss", (LOG_P, LOG_P + " / mask.sum(-1)")),
    ("mean over padding", "compute_reinforce_loss", (LOG_P, "log_p = (chosen * mask).mean(-1)")),
    ("reward broadcast over tokens", "compute_reinforce_loss", (LOSS, "loss = -(reward.view(-1, 1) * log_p).mean()")),
    ("reward forgotten", "compute_reinforce_loss", (LOSS, "loss = -log_p.mean()")),
    ("log forgotten", "compute_reinforce_loss", (LOG_PROBS, "log_probs = F.softmax(logits, dim=-1)")),
    ("softmax in bf16", "compute_reinforce_loss", (LOG_PROBS, "log_probs = F.log_softmax(logits.bfloat16(), dim=-1)")),
    ("dropout on", "compute_reinforce_loss", ("logits = model(output", "logits = model.train()(output")),
    ("without a gradient", "compute_reinforce_loss", (CHOSEN, "chosen = log_probs.detach()" + CHOSEN[18:])),
    ("another gradient", "compute_reinforce_loss", (LOSS, LOSS + "\n    loss = loss / 2 + loss.detach() / 2")),
    ("gradient into the reward", "compute_reinforce_loss", (LOSS, LOSS.replace(".detach()", "")),
     ("        reward = reward.detach()\n", ""), ("@torch.no_grad()\n", "")),
    ("KL reversed", "compute_kl_divergence", (KL, "kl = (log_q.exp() * (log_q - log_p)).sum(-1)")),
    ("KL reversed", "compute_kl_divergence",
     (KL, 'kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)')),
    ("KL negated", "compute_kl_divergence", (KL, "kl = (log_p.exp() * (log_q - log_p)).sum(-1)")),
    ("KL sampled and back-propagated", "compute_kl_divergence",
     (KL, "kl = (log_p - log_q).gather(-1, output_tokens[:, 10:, None]).squeeze(-1)")),
    ("KL sampled and back-propagated, squared", "compute_kl_divergence",
     (KL, "kl = (log_p - log_q).gather(-1, output_tokens[:, 10:, None]).squeeze(-1) ** 2 / 2")),
    ("KL sampled and back-propagated, k3", "compute_kl_divergence",
     (KL, "x = (log_q - log_p).gather(-1, output_tokens[:, 10:, None]).squeeze(-1)\n    kl = x.exp() - 1 - x")),
    ("log of a log-probability", "compute_kl_divergence",
     (KL, 'kl = F.kl_div(log_q, log_p, reduction="none").sum(-1)')),
    ("prompt positions in the KL", "compute_kl_divergence", (WHERE, WHERE.replace("9:-1", ":9"))),
    ("KL without a gradient", "compute_kl_divergence", (KL, KL.replace("log_p", "log_p.detach()"))),
    ("KL without a gradient", "compute_kl_divergence", (KL, KL.replace("log_p.exp()", "log_p.exp().detach()"))),
    ("batchmean over the wrong axis", "compute_kl_divergence", ("return kl.sum(-1).mean()", "return kl.sum(0).mean()")),
    ("mean over the vocabulary, too", "compute_kl_divergence",
     (KL, "kl = F.kl_div(log_q, log_p, log_target=True)\n    return kl")),
    ("policy and original at different positions", "compute_kl_divergence",
     (WHERE, WHERE.replace("9:-1", "10:", 1))),
    ("softmax in bf16", "compute_kl_divergence", (WHERE, WHERE.replace("9:-1]", "9:-1].bfloat16()"))),
    ("dropout on", "compute_kl_divergence", ("with torch.no_grad():\n        log_probs_orig",
                                             "orig_model.train()\n    with torch.no_grad():\n        log_probs_orig")),
    ("off by one at the prompt", "compute_kl_divergence", (WHERE, WHERE.replace("9:-1", "10:-1"))),
    ("compared with itself", "compute_kl_divergence", ("orig_model(output_tokens)", "model(output_tokens)")),
    ("KL without a gradient", "compute_reinforce_loss", ("return log_probs, loss", "return log_probs.detach(), loss")),
    ("chosen and rejected swapped", "compute_DPO_loss", (DPO, DPO.replace("chosen - rejected", "rejected - chosen"))),
    ("beta forgotten", "compute_DPO_loss", (DPO, DPO.replace("beta * ", ""))),
    ("beta forgotten", "compute_DPO_loss", (DPO, DPO.replace("beta", "0.1"))),
    ("reference forgotten", "compute_DPO_loss",
     (DPO, DPO.replace("chosen - rejected", "policy_chosen_logps - policy_rejected_logps"))),
    ("log(sigmoid)", "compute_DPO_loss", (DPO, "return -torch.log(torch.sigmoid(beta * (chosen - rejected))).mean()")),
    ("sign", "compute_DPO_loss", (DPO, DPO.replace("-F.", "F."))),
    ("sum for mean over the batch", "compute_DPO_loss", (DPO, DPO.replace("mean", "sum"))),
    ("no shift", "_get_batch_logps", (SHIFTED, "mask = labels != -100\n    labels = labels.clone()\n")),
    ("logits shifted instead of targets", "_get_batch_logps",
     (SHIFTED, SHIFTED.replace("labels[:, 1:]", "labels[:, :-1]").replace("logits[:, :-1]", "logits[:, 1:]"))),
    ("mask one column late", "_get_batch_logps",
     (SHIFTED, "mask = labels[:, :-1] != -100\n    labels, logits = labels[:, 1:].clone(), logits[:, :-1]\n")),
    ("padding kept", "_get_batch_logps", (SHIFTED, SHIFTED.replace("labels != -100", "torch.ones_like(labels)"))),
    ("mean for sum", "_get_batch_logps", (SUMMED, SUMMED.replace(".sum(-1)", ".sum(-1) / mask.sum(-1)"))),
    ("mean over padding", "_get_batch_logps", (AVERAGE, "return (per_token * mask).mean(-1)")),
    ("sum for mean", "_get_batch_logps", (AVERAGE, "return (per_token * mask).sum(-1)")),
    ("sign", "_get_batch_logps",
     (SUMMED, SUMMED.replace("(per", "-(per")), (AVERAGE, AVERAGE.replace("(per", "-(per"))),
    ("softmax in bf16", "_get_batch_logps", ("logits.log_softmax(-1)", "logits.bfloat16().log_softmax(-1)")),
    ("first eos dropped", "_get_batch_logps",
     (SHIFTED, SHIFTED.replace("!= -100", "!= -100\n    mask = mask & (labels != tokenizer.pad_token_id)"))),
    ("labels changed in place", "_get_batch_logps", ("labels = labels[:, 1:].clone()", "labels = labels[:, 1:]")),
    ("input_ids changed in place", "create_labels_from_attention_mask",
     ('labels = tokenized_input["input_ids"].clone()', 'labels = tokenized_input["input_ids"]')),
    ("prompt scored", "create_labels_from_attention_mask", (PLACE, "pass")),
    ("padding kept", "create_labels_from_attention_mask", ("labels[attention_mask == 0] = -100", "pass"),
     (PLACE, "labels[(place < prompt_lengths.unsqueeze(-1)) & (attention_mask == 1)] = -100")),
    ("off by one at the prompt", "create_labels_from_attention_mask", (PLACE, PLACE.replace("<", "<="))),
    ("first eos dropped", "create_labels_from_attention_mask",
     (PLACE, PLACE + "\n    labels[labels == tokenizer.pad_token_id] = -100")),
    ("prompt counted from the row's start", "create_labels_from_attention_mask",
     (PLACE, "for row, length in enumerate(prompt_lengths):\n        labels[row, :length] = -100")),
    ("greedy", "compute_reward_for_mini_batch", ("do_sample=True, top_k=0, ", "")),
    ("top-k left on", "compute_reward_for_mini_batch", ("top_k=0, ", "")),
    ("temperature or top-p left on", "compute_reward_for_mini_batch", ("top_k=0, ", "top_k=0, temperature=0.7, ")),
    ("temperature or top-p left on", "compute_reward_for_mini_batch", ("top_k=0, ", "top_k=0, top_p=0.9, ")),
    ("temperature or top-p left on", "compute_reward_for_mini_batch", ("top_k=0, ", "top_k=0, temperature=0.95, ")),
    ("padding kept", "compute_reward_for_mini_batch", ("reward_model(**scored)", 'reward_model(scored["input_ids"])')),
    ("dropout on", "compute_reward_for_mini_batch", ("    # TODO: generate", "    model.train()")),
    ("the completion alone is scored", "compute_reward_for_mini_batch",
     ("batch_decode(output_tokens,", "batch_decode(output_tokens[:, 10:],")),
    ("length", "compute_reward_for_mini_batch", ("max_new_tokens=max_new_tokens,\n", "max_length=max_new_tokens,\n")),
    ("P(negative)", "compute_reward_for_mini_batch",
     ("F.softmax(logits, dim=-1)[:, 1]", "F.softmax(logits, dim=-1)[:, 0]")),
]
# In the loops, which are not judged: the sign that is seen, and where.
SIGNS = [
    ("the ragged last batch", "evaluate",
     ("total_reward += reward.sum().item()", "total_reward += reward.mean().item()")),
    ("the ragged last batch", "train_DPO", ("batch_loss(batch).item() * len(batch)", "batch_loss(batch).item()"),
     ("test_loss / len(test_texts_parallel)", "test_loss / (len(test_texts_parallel) // batch_size)")),
    ("gradient into the reward", "train", ("        reward = reward.detach()\n", ""), ("@torch.no_grad()\n", "")),
    ("KL negated", "train", ("loss = loss + alpha * kl", "loss = loss - alpha * kl")),
    ("dropout on", "train", ("    rewards, kls = [], []", "    model.train()\n    rewards, kls = [], []")),
    ("no zero_grad()", "train", ("        optimizer.zero_grad()\n        loss.backward()", "        loss.backward()")),
    ("`orig_model = model` is no copy", "train",
     ("orig_model = AutoModelForCausalLM.from_pretrained(model_name).to(device).eval()\n    rewards",
      "orig_model = model\n    rewards")),
    ("missing position ids", "get_log_probs", (", position_ids=position_ids)", ")")),
]
# What the assignment leaves open: right, with a note.
OPEN = [
    ("29 log-probs a row", "compute_reinforce_loss",
     (CHOSEN, "chosen = log_probs[:, :-1].gather(-1, output_tokens[:, 1:, None]).squeeze(-1)"),
     (LOG_P, "log_p = chosen.sum(-1)")),
    ("counts tokens after the first eos", "compute_reinforce_loss", (LOG_P, "log_p = chosen.sum(-1)")),
    ("less the mean of the others as a baseline", "compute_reinforce_loss",
     (LOSS, "others = (reward.sum() - reward) / (len(reward) - 1)\n    loss = -((reward - others) * log_p).mean()")),
    ("positions after the first eos are left out", "compute_kl_divergence", (WHERE, WHERE.replace("[:, 9:-1]", "")),
     ("return kl.sum(-1).mean()", "return (kl * (output_tokens != tokenizer.pad_token_id)).sum(-1).mean()")),
    ("averaged over the positions, row by row", "compute_kl_divergence", (WHERE, WHERE.replace("[:, 9:-1]", "")),
     ("return kl.sum(-1).mean()",
      "m = (output_tokens != tokenizer.pad_token_id)\n    return ((kl * m).sum(-1) / m.sum(-1)).mean()")),
    ("right for padding on the right", "create_labels_from_attention_mask",
     ('padding_side="left"', 'padding_side="right"'),
     (PLACE, "for row, length in enumerate(prompt_lengths):\n        labels[row, :length] = -100")),
    ("KL at all 30 positions", "compute_kl_divergence", (WHERE, WHERE.replace("[:, 9:-1]", ""))),
    ("KL at columns 10 to 29", "compute_kl_divergence", (WHERE, WHERE.replace("9:-1", "10:"))),
    ("KL at 29 positions", "compute_kl_divergence", (WHERE, WHERE.replace("9:-1", ":-1"))),
    ("averaged over the positions", "compute_kl_divergence", ("return kl.sum(-1).mean()", "return kl.mean()")),
    ("summed over rows and positions", "compute_kl_divergence", ("return kl.sum(-1).mean()", "return kl.sum()")),
    ("the reward still has a graph", "compute_reward_for_mini_batch", ("@torch.no_grad()\n", "")),
]


def changed(*pairs, text=SOLUTION):
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
