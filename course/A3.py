# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LM Alignment: the assignment's sections 1 to 4 in one notebook
#
# The shape, the order and the names of the course's `A3.ipynb`, in plain PyTorch, to be laid beside a
# solution: `make diff SOLUTION=yours.ipynb` does it, `make check SOLUTION=yours.ipynb` calls your
# functions. The formulas are those of the scripts beside it, and tests hold the two equal; what the
# scripts add is left out here: resuming, bf16, leave-one-out, KL in the evaluation, other families of
# models.
#
# On Colab choose a GPU and run all cells (by the assignment's own times about two hours on a T4; not
# measured). Lines that people get wrong have their reason beside them.

# %%
WORLD = None  # the model hub; or a folder with models and data, as `make demo` makes one: "../build/toy"
LIMIT = None  # all rows of each split; or that many: with 320 it only shows that everything runs

# %%
import torch
import torch.nn.functional as F
from datasets import load_dataset
from matplotlib import pyplot as plt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED_TOKENS, NEW_TOKENS = 10, 20  # P and N: a row is a prompt of 10 tokens and a completion of 20
model_name = f"{WORLD}/policy" if WORLD else "distilgpt2"
reward_name = f"{WORLD}/reward_model" if WORLD else "omidroshani/imdb-sentiment-analysis"
imdb_name = f"{WORLD}/prompts" if WORLD else "stanfordnlp/imdb"
pairs_name = f"{WORLD}/pairs" if WORLD else "hallisky/synthetic-imdb-movie-reviews-parallel"

# %% [markdown]
# ## 1 Baseline evaluation

# %%
# Padding stands on the left: a decoder goes on from the last column, which must be a token.
tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has no padding of its own: so never mask by `!= pad`
reward_tokenizer = AutoTokenizer.from_pretrained(reward_name)
# from_pretrained gives eval mode. It stays on: with dropout, what is scored is not what was sampled.
# And fp32, whatever the checkpoint has: bf16 weights would round most of DPO's steps of 5e-7 away.
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device)
# Loaded again: after `orig_model = model` both would be one model, and the KL 0 for ever.
orig_model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device)
reward_model = AutoModelForSequenceClassification.from_pretrained(reward_name).to(device)

imdb = load_dataset(imdb_name).shuffle(seed=0)  # sorted by label: the first half is negative
train_texts, test_texts = imdb["train"]["text"][:LIMIT], imdb["test"]["text"][:LIMIT]


# %%
@torch.no_grad()  # the reward is a number: no gradient goes into the classifier
def compute_reward_for_mini_batch(batch, tokenizer, model, reward_tokenizer, reward_model,
                                  seed_token_length=SEED_TOKENS, max_new_tokens=NEW_TOKENS):
    """List of B reviews -> reward (B,), output_tokens (B, 30), list of B str: prompts with completions."""
    inputs = tokenizer(batch, truncation=True, max_length=seed_token_length, padding="max_length",
                       return_tensors="pt").to(model.device)
    # From exactly the distribution that is scored: do_sample=True alone keeps top_k=50.
    output_tokens = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                   max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id)
    # generate stops once all rows have ended: always 30 columns, the rest filled with eos.
    missing = seed_token_length + max_new_tokens - output_tokens.shape[1]
    output_tokens = F.pad(output_tokens, (0, missing), value=tokenizer.eos_token_id)
    generated = tokenizer.batch_decode(output_tokens, skip_special_tokens=True)
    scored = reward_tokenizer(generated, padding=True, truncation=True, return_tensors="pt").to(model.device)
    # ** gives it the attention_mask, too, which hides the padding. Label 1 is "positive".
    reward = reward_model(**scored).logits.softmax(dim=-1)[:, 1]
    return reward, output_tokens, generated


# %%
def evaluate(tokenizer, model, reward_tokenizer, reward_model, batch_size=32):
    """-> mean reward over the test reviews, its standard error, the generated texts."""
    rewards, generations = [], []
    loop = tqdm(total=len(test_texts), position=0, leave=False)
    for i in range(0, len(test_texts), batch_size):
        batch = test_texts[i : i + batch_size]
        reward, _, generated = compute_reward_for_mini_batch(
            batch, tokenizer, model, reward_tokenizer, reward_model)
        rewards.append(reward)
        generations += generated
        loop.update(len(batch))
    loop.close()
    # (n,), for the mean of the batches' means would weigh a smaller last batch like the others.
    rewards = torch.cat(rewards)
    return rewards.mean().item(), (rewards.std() / len(rewards) ** 0.5).item(), generations


def report(what, results):
    """Prints what evaluate() returned, and the first five texts: of every policy those of the same prompts."""
    mean, error, generations = results
    print(f"{what}: test reward {mean:.3f} ± {error:.3f} ({len(generations)} reviews)")
    print(*generations[:5], sep="\n")


report("untouched", evaluate(tokenizer, model, reward_tokenizer, reward_model))

# %% [markdown]
# **Q1.1, Q1.2** The number and the five texts are above. Five texts show the grammar, but say nothing
# about the mean: one reward has a standard deviation of 0.33 in the toy world, so the mean of five is ±
# 0.15. ([ANSWERS.md, section 1](../ANSWERS.md#section-1))
#
# **Q1.3** `loop` is a progress bar, moved by hand beside the `for` over the batches: take it away, and
# every number stays the same. ([ANSWERS.md, section 1](../ANSWERS.md#section-1))

# %% [markdown]
# ## 2 REINFORCE

# %%
def completion_mask(output_tokens):
    """(B, 30) -> (B, 20) bool: true for each completion token up to and including the first eos.

    Counted, not `!= pad`: the padding is eos, too, and the sampled eos, the choice to stop, must be trained.
    """
    is_eos = output_tokens[:, SEED_TOKENS:] == tokenizer.eos_token_id
    eos_before = is_eos.cumsum(dim=-1) - is_eos.long()  # how many lie strictly to the left
    return eos_before == 0


def compute_reinforce_loss(reward, output_tokens, model):
    """(B,), (B, 30) -> log_probs (B, 30, V), loss (): -mean_b(reward_b * sum_t log p(token_bt))."""
    # Without a mask: no training review of IMDB has fewer than 10 tokens, so nothing is padded on the left.
    logits = model(output_tokens).logits.float()  # under autocast, too: sums of bf16 log-probs are far off
    log_probs = logits.log_softmax(dim=-1)
    # Column t forecasts token t + 1: columns 9 to 28 for tokens 10 to 29. gather would take any other pairing.
    forecasts, completions = log_probs[:, SEED_TOKENS - 1 : -1], output_tokens[:, SEED_TOKENS:]
    chosen = forecasts.gather(-1, completions.unsqueeze(-1)).squeeze(-1)  # (B, 20)
    # log p(text) is the sum over its tokens; (B,) like the reward: (B,) times (B, 1) would broadcast to (B, B).
    log_p = chosen.masked_fill(~completion_mask(output_tokens), 0.0).sum(dim=-1)
    # Minus: an optimizer goes down, and what was rewarded shall become more likely.
    loss = -(reward.detach() * log_p).mean()
    return log_probs, loss


def reset_model_optimizer(name, lr):
    """A fresh policy and a fresh optimizer: each experiment starts from the same weights."""
    global model, optimizer
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    # Anew, for the old one holds on to the old weights; without decay, which by default is 0.01.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def train(name, alpha=None, lr=1e-4, batch_size=32):
    """One epoch of REINFORCE -> lists: reward and KL of each step. alpha: of section 3; None: without a KL."""
    reset_model_optimizer(name, lr)
    rewards, kls = [], []
    loop = tqdm(total=len(train_texts), position=0, leave=False)
    for i in range(0, len(train_texts), batch_size):
        batch = train_texts[i : i + batch_size]
        reward, output_tokens, _ = compute_reward_for_mini_batch(
            batch, tokenizer, model, reward_tokenizer, reward_model)
        log_probs, loss = compute_reinforce_loss(reward, output_tokens, model)
        if alpha is not None:
            kl = compute_kl_divergence(log_probs, output_tokens, orig_model)
            loss = loss + alpha * kl  # plus: a nat costs alpha of reward
            kls.append(kl.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
        loop.update(len(batch))
        loop.set_description(f"reward {rewards[-1]:.3f}")  # not the loss: its value means nothing
    loop.close()
    return rewards, kls


# %%
rewards, _ = train(model_name)
plt.plot(rewards)
plt.xlabel("step")
plt.ylabel("batch reward")
plt.show()
report("REINFORCE", evaluate(tokenizer, model, reward_tokenizer, reward_model))

# %% [markdown]
# **Q2.1, Q2.2** The curve, the test reward and five texts are above. After a whole epoch those of our
# runs were more positive to the classifier, and no reviews to a reader. ([ANSWERS.md, section
# 2](../ANSWERS.md#section-2))
#
# **Q2.3** REINFORCE gets what it is paid for, the classifier's score and nothing else, and it learns from
# noisy estimates: one number for twenty tokens, of its own samples only. ([ANSWERS.md, section
# 2](../ANSWERS.md#section-2))
#
# **Q2.4** `reset_model_optimizer()` loads the pretrained policy anew, makes a new AdamW for its weights,
# and binds the global names to both: no experiment goes on from where the last one ended. ([ANSWERS.md,
# section 2](../ANSWERS.md#section-2))
#
# **Q2.5** `log_probs` is (batch, positions, vocabulary), here (32, 30, 50257): position t holds the
# forecast of token t + 1. Positions 9 to 28 belong to the sampled tokens, the last one to none.
# ([ANSWERS.md, section 2](../ANSWERS.md#section-2))
#
# **Q3.4** The loss runs over the tokens that the policy chose, the completion's up to its first eos:
# prompt tokens are not its actions, and what follows the eos nobody sampled. (The template's 29 log-probs
# a row are the 30 tokens' but the first one's, prompt included.) ([ANSWERS.md, section 3](../ANSWERS.md#section-3))

# %% [markdown]
# ## 3 Regularization

# %%
def compute_kl_divergence(log_probs_current, output_tokens, orig_model):
    """(B, 30, V), (B, 30) -> (): KL(policy ‖ original) in nats per completion.

    Exact over the vocabulary at each position of the completion, summed over its tokens, averaged over the batch.
    That an early token changes which contexts come later is left out of its gradient.
    """
    with torch.no_grad():  # the original is not trained
        log_probs_orig = orig_model(output_tokens).logits.float().log_softmax(dim=-1)
    forecasts = slice(SEED_TOKENS - 1, -1)  # of the completion's tokens, as in the loss
    log_p, log_q = log_probs_current[:, forecasts], log_probs_orig[:, forecasts]
    # P is the policy, Q the original (F.kl_div takes them the other way round). The gradient goes through p and
    # log p: of the sampled tokens' log-ratio alone it would be zero on average.
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (B, 20)
    return kl.masked_fill(~completion_mask(output_tokens), 0.0).sum(dim=-1).mean()


# %%
ALPHAS = [0.0, 0.002, 0.02, 0.5]  # 0 for Q3.1; too low, in between, too high for Q3.2: try others for your models
fig, (above, below) = plt.subplots(2, sharex=True)
for alpha in ALPHAS:
    rewards, kls = train(model_name, alpha)
    above.plot(rewards, label=f"alpha {alpha:g}")
    below.plot(kls)
    report(f"alpha {alpha:g}", evaluate(tokenizer, model, reward_tokenizer, reward_model))
above.set_ylabel("batch reward")
below.set(xlabel="step", ylabel="KL, nats")
above.legend()
plt.show()

# %% [markdown]
# **Q3.1** Without a penalty the KL rises steeply, and the reward does not show what is lost. ([ANSWERS.md,
# section 3](../ANSWERS.md#section-3))
#
# **Q3.2** alpha is a price: the reward that a nat of a whole completion's KL must earn. Which alpha does
# what depends on the models, and on the KL's unit: averaged over 20 tokens it needs an alpha 20 times as
# large. ([ANSWERS.md, section 3](../ANSWERS.md#section-3))
#
# **Q3.3** alpha fixes a price, not an amount, and must be found by trial; steering for a target KL is one
# remedy. ([ANSWERS.md, section 3](../ANSWERS.md#section-3))

# %% [markdown]
# ## 4 DPO

# %%
def compute_DPO_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                     beta=0.1):
    """Four (B,) -> (): Rafailov et al. (2023), equation 7. At the start, policy = reference, it is ln 2."""
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    margins = beta * (chosen_logratios - rejected_logratios)  # beta inside: not a factor of the loss
    return -F.logsigmoid(margins).mean()  # log(sigmoid(-800)) would be -inf


def _get_batch_logps(logits, labels, average_log_prob=False):
    """(B, T, V), (B, T) -> (B,): the sum (or mean) of the labels' log-probs; -100 counts for nothing."""
    labels, logits = labels[:, 1:], logits[:, :-1]  # column t forecasts token t + 1
    mask = labels != -100  # of the shifted labels: of the others it would be a column late
    index = labels.masked_fill(~mask, 0)  # gather needs real ids; a copy, for the next model reads labels, too
    logps = logits.float().log_softmax(dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    total = logps.masked_fill(~mask, 0.0).sum(dim=-1)  # what DPO wants: log p(completion) is a sum
    return total / mask.sum(dim=-1) if average_log_prob else total


def get_log_probs(model, batch):
    """-> (B,), (B,): log p(completion | prompt) of the chosen and of the rejected side."""
    logps = []
    for side in ("chosen", "rejected"):
        tokens, attention = batch[side]["input_ids"], batch[side]["attention_mask"]
        # GPT-2 does not take positions from the mask: without these the padding on the left would be counted.
        positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=attention, position_ids=positions).logits
        logps.append(_get_batch_logps(logits, batch[side]["labels"], average_log_prob=False))
    return logps


def create_labels_from_attention_mask(tokenized_input, prompt_lengths):
    """input_ids and attention_mask (B, T), prompt_lengths (B,) -> labels (B, T): -100 at prompt and padding."""
    attention = tokenized_input["attention_mask"]
    # Each token's place in its own text, from 0: the padding on the left is not counted.
    place = attention.cumsum(dim=-1) - 1
    hidden = (attention == 0) | (place < prompt_lengths.unsqueeze(-1))  # not `== pad`: the last eos counts
    return tokenized_input["input_ids"].masked_fill(hidden, -100)  # a copy


def tokenize_completions(prompts, completions, max_length=128):
    """Lists of B str -> input_ids, attention_mask, labels (B, T). eos stands only where nothing was cut off.

    Encoded apart and joined as ids: a token of the joined text could lie across the border. A prompt of max_length
    tokens would leave nothing to be scored.
    """
    prompt_ids, completion_ids = tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"]
    ids = [[*p, *c, tokenizer.eos_token_id][:max_length] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    tokenized = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
    lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    return {**tokenized, "labels": create_labels_from_attention_mask(tokenized, lengths)}


# %%
def read_pairs(split):
    """-> list of (prompt, chosen, rejected). Completions without their prompt, beginning with their space.

    The space is put in only if the data set never writes one: otherwise a text without one begins with a comma, say.
    """
    columns = [parallel[split][name][:] for name in ("prompt", "positive_completion", "negative_completion")]
    rows = [(p, c.removeprefix(p), r.removeprefix(p)) for p, c, r in zip(*columns, strict=True)]
    spaced = any(c[:1].isspace() or r[:1].isspace() or p[-1:].isspace() for p, c, r in rows)
    return rows if spaced else [(p, " " + c, " " + r) for p, c, r in rows]


parallel = load_dataset(pairs_name).shuffle(seed=0)
train_pairs, test_pairs = read_pairs("train")[:LIMIT], read_pairs("test")[:LIMIT]


def tokenize_pairs(rows):
    """List of B (prompt, chosen, rejected) -> the batch that get_log_probs() reads."""
    prompts, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    return {"chosen": tokenize_completions(prompts, chosen), "rejected": tokenize_completions(prompts, rejected)}


def dpo_batch_loss(rows, beta):
    """List of B pairs -> (): the loss of the policy as it is."""
    batch = tokenize_pairs(rows)
    with torch.no_grad():  # the reference is not trained
        reference_logps = get_log_probs(orig_model, batch)
    return compute_DPO_loss(*get_log_probs(model, batch), *reference_logps, beta)


def train_DPO(name, beta=0.1, lr=5e-7, epochs=2, batch_size=16):
    """-> list: the training loss of each step; the mean loss over the test pairs."""
    reset_model_optimizer(name, lr)
    losses = []
    loop = tqdm(total=epochs * len(train_pairs), position=0, leave=False)
    for _ in range(epochs):
        order = torch.randperm(len(train_pairs)).tolist()
        for i in range(0, len(order), batch_size):
            rows = [train_pairs[row] for row in order[i : i + batch_size]]
            loss = dpo_batch_loss(rows, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            loop.update(len(rows))
    loop.close()
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(test_pairs), batch_size):
            rows = test_pairs[i : i + batch_size]
            total += dpo_batch_loss(rows, beta).item() * len(rows)  # each pair counts once, in a smaller batch, too
    return losses, total / len(test_pairs)


# %%
BETAS = [0.1, 0.25, 0.4]
for beta in BETAS:
    losses, test_loss = train_DPO(model_name, beta)
    plt.plot(losses, label=f"beta {beta:g}")
    print(f"beta {beta:g}: first loss {losses[0]:.6f}, test loss {test_loss:.4f}")
    report(f"beta {beta:g}", evaluate(tokenizer, model, reward_tokenizer, reward_model))
plt.xlabel("step")
plt.ylabel("DPO loss")
plt.legend()
plt.show()

# %% [markdown]
# **Q4.1** The curves and the test losses are above. The first loss is ln 2 = 0.693147 for every beta, up
# to rounding.
#
# **Q4.2, Q4.3** At a learning rate of 5e-7 the policy hardly moves, so its texts are nearly the
# original's; REINFORCE's is 200 times as large. DPO learns about given texts, few and of other prompts.
# ([ANSWERS.md, section 4](../ANSWERS.md#section-4))
#
# **Q4.4** Losses of different betas cannot be compared: the margin in them is multiplied by beta. Compare
# rewards at the same KL, which `make dpo` measures. ([ANSWERS.md, section 4](../ANSWERS.md#section-4))
#
# **Q4.5** It makes a probability of a margin: sigma(margin) is the model's probability that the chosen
# text is the better one, so the loss is that of logistic regression. ([ANSWERS.md, section
# 4](../ANSWERS.md#section-4))
#
# **Q4.6** DPO needs pairs, but no reward model, no sampling and no critic; it cannot try anything out.
# ([ANSWERS.md, section 4](../ANSWERS.md#section-4))
