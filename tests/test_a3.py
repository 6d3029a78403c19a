"""course/A3.py, the notebook in the course's shape: equal to the scripts, function by function, and it runs."""

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient

import common
import dpo
import reinforce
import reward
from course import parse
from support import loading
from support.files import HOME
from tests.helpers import arguments, rows_of

P, N = 10, 20
LONG = 40  # tokens of a pair at most
A3 = HOME / "course" / "A3.py"


@pytest.fixture(scope="module")
def models(world):
    """-> a policy that has been trained a little away from its original, the original, tokenizer, scorer."""
    args = arguments(policy=world / "policy", reward_model=world / "reward_model", prompt_len=P, completion_len=N)
    policy, tokenizer = loading.load_policy(args, torch.device("cpu"))
    original = loading.load_reference(str(world / "policy"), policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return policy, original, tokenizer, loading.load_scorer(args, torch.device("cpu"))


@pytest.fixture
def a3(models):
    """-> the notebook's functions, with these models as its globals."""
    policy, original, tokenizer, scorer = models
    policy.zero_grad()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token  # as its second cell sets them
    given = {"tokenizer": tokenizer, "model": policy, "orig_model": original, "device": torch.device("cpu"),
             "reward_model": scorer.model, "reward_tokenizer": scorer.tokenizer}
    return parse.execute(parse.read_solution(A3), given, A3)


@pytest.fixture
def rows(models):
    """-> (4, 30): of real words; row 1 ends at its 8th completion token, row 2 at its last, row 3 with its first."""
    tokenizer = models[2]
    tokens = torch.randint(len(tokenizer) // 2, len(tokenizer), (4, P + N), generator=torch.Generator().manual_seed(1))
    tokens[1, P + 7 :] = tokens[2, -1] = tokens[3, P:] = tokenizer.eos_token_id
    return tokens


def gradients(loss, model):
    """-> all gradients in one vector, 0 where there is none."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(weight) if grad is None else grad).flatten()
                      for grad, weight in zip(found, model.parameters(), strict=True)])


def equal(theirs, ours, model):
    """Values and gradients. Each is a sum of thousands of fp32 products in another order: 1e-5 of its size."""
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    found, expected = gradients(theirs.sum(), model), gradients(ours.sum(), model)
    assert expected.norm() > 0 and (found - expected).norm() <= 1e-5 * expected.norm()


# ---- it equals the scripts ---------------------------------------------------------------------------------


def test_the_mask_is_the_scripts(a3, rows, models):
    mask = a3["completion_mask"](rows)
    assert torch.equal(mask, common.completion_mask(rows[:, P:], models[2].eos_token_id))
    assert mask.sum(dim=-1).tolist() == [20, 8, 20, 1]


def test_the_reinforce_loss_is_the_scripts(a3, rows, models):
    policy, eos = models[0], models[2].eos_token_id
    reward = torch.tensor([0.875, 0.125, 0.5, 0.25])
    whole, theirs = a3["compute_reinforce_loss"](reward, rows, policy)
    logp = common.log_probs(common.completion_logits(policy, rows, N))
    mask = common.completion_mask(rows[:, P:], eos)
    equal(theirs, reinforce.reinforce_loss(common.token_logps(logp, rows[:, P:]), mask, reward), policy)
    assert whole.shape == (4, P + N, policy.config.vocab_size)


def test_the_kl_is_the_scripts(a3, rows, models):
    policy, original, tokenizer, _ = models
    whole = common.log_probs(policy(rows).logits)
    theirs = a3["compute_kl_divergence"](whole, rows, original)
    logp, ref_logp = (common.log_probs(common.completion_logits(model, rows, N)) for model in (policy, original))
    mask = common.completion_mask(rows[:, P:], tokenizer.eos_token_id)
    assert theirs > 0.01  # the policy has moved
    equal(theirs, common.masked_sum(common.token_kl(logp, ref_logp), mask).mean(), policy)


def test_the_dpo_loss_is_the_scripts(a3):
    sides = [torch.nn.Linear(3, 4, bias=False).weight.sum(dim=1) for _ in range(4)]
    layer = torch.nn.Linear(3, 1)
    sides[0] = sides[0] + layer.bias
    equal(a3["compute_DPO_loss"](*sides, beta=0.3), dpo.dpo_loss(*sides, 0.3)[0].mean(), layer)


def test_pairs_are_read_encoded_and_scored_as_the_scripts_do(a3, models, world):
    policy, _, tokenizer, _ = models
    read = rows_of(world / "pairs" / "train.jsonl")
    a3["parallel"] = {"train": {name: [row[name] for row in read] for name in read[0]}}
    ours = loading.load_pairs(arguments(pairs=world / "pairs"), tokenizer, torch.Generator().manual_seed(0),
                              lambda *ids: dpo.make_pair(*ids, tokenizer.eos_token_id, LONG))
    ours = sorted(ours["train"])[:6]
    texts = sorted(a3["read_pairs"]("train"), key=lambda row: [tokenizer(text)["input_ids"] for text in row])[:6]
    prompts, *completions = (list(column) for column in zip(*texts, strict=True))
    batch = {side: a3["tokenize_completions"](prompts, texts, max_length=LONG)
             for side, texts in zip(("chosen", "rejected"), completions, strict=True)}
    eos = tokenizer.eos_token_id
    assert {pair.chosen[-1] == eos for pair in ours} == {True, False}  # where LONG is too few, there is none
    for side, inputs in batch.items():
        for row, pair in enumerate(ours):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
            assert ids == pair.prompt + getattr(pair, side)
            assert [label for label in inputs["labels"][row].tolist() if label != -100] == getattr(pair, side)
    for theirs, scripts in zip(a3["get_log_probs"](policy, batch), dpo.pair_logps(policy, ours), strict=True):
        equal(theirs, scripts, policy)
    mean = a3["_get_batch_logps"](policy(batch["chosen"]["input_ids"]).logits, batch["chosen"]["labels"], True)
    whole = a3["_get_batch_logps"](policy(batch["chosen"]["input_ids"]).logits, batch["chosen"]["labels"])
    torch.testing.assert_close(mean, whole / torch.tensor([float(len(pair.chosen)) for pair in ours]))


def test_the_reward_is_the_scripts_of_30_tokens_that_begin_with_the_prompt(a3, models, reviews):
    policy, _, tokenizer, scorer = models
    found, tokens, texts = a3["compute_reward_for_mini_batch"](
        [*reviews[:5], "Short."], tokenizer, policy, scorer.tokenizer, scorer.model)
    assert tokens.shape == (6, P + N)
    assert torch.equal(tokens[:5, :P], torch.tensor([tokenizer(text)["input_ids"][:P] for text in reviews[:5]]))
    assert texts == common.decode(tokenizer, tokens) and texts[5].startswith("Short.")
    torch.testing.assert_close(found, reward.positivity(scorer, texts))


def test_an_evaluation_is_the_mean_over_the_reviews_not_over_the_batches(a3):
    a3["test_texts"] = list("abcde")  # rewards 0 to 4 in batches of 2, 2 and 1: mean 2, not (0.5 + 2.5 + 4) / 3
    a3["compute_reward_for_mini_batch"] = lambda batch, *_: (
        torch.tensor([float(ord(text) - ord("a")) for text in batch]), None, batch)
    mean, error, texts = a3["evaluate"](None, None, None, None, batch_size=2)
    assert (mean, texts) == (2.0, list("abcde"))
    assert error == pytest.approx((2.5 / 5) ** 0.5)  # variance (4 + 1 + 0 + 1 + 4) / 4


def test_training_takes_the_steps_of_the_scripts(a3, models, world, rows):
    """Two batches of given samples and rewards: the weights after AdamW's two steps on the scripts' loss."""
    _, original, tokenizer, _ = models
    rewards = torch.tensor([0.875, 0.125, 0.5, 0.25])
    a3["train_texts"] = list(range(4))
    a3["compute_reward_for_mini_batch"] = lambda batch, *_: (rewards[batch], rows[batch], None)
    found = a3["train"](str(world / "policy"), alpha=0.5, lr=1e-3, batch_size=3)
    args = arguments(policy=world / "policy", reward_model=world / "reward_model", prompt_len=P, completion_len=N)
    policy, _ = loading.load_policy(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    kls = []
    for batch in (slice(0, 3), slice(3, 4)):
        tokens, reward = rows[batch], rewards[batch]
        mask = common.completion_mask(tokens[:, P:], tokenizer.eos_token_id)
        logp, ref_logp = (common.log_probs(common.completion_logits(model, tokens, N)) for model in (policy, original))
        kl = common.masked_sum(common.token_kl(logp, ref_logp), mask).mean()
        loss = reinforce.reinforce_loss(common.token_logps(logp, tokens[:, P:]), mask, reward) + 0.5 * kl
        loss.backward()
        kls.append(common.update(policy, optimizer, 1, {"kl": kl})["kl"])
    assert found == ([0.5, 0.25], pytest.approx(kls, rel=1e-4, abs=1e-6))
    assert kls[0] < 1e-5 < kls[1]
    # AdamW's first step has the size lr whatever the gradient's, so what is nearly 0 may differ by 2 lr.
    theirs, ours = (torch.cat([weight.flatten() for weight in model.parameters()]) for model in (a3["model"], policy))
    assert ((theirs - ours).abs() > 1e-5).float().mean() < 1e-3


# ---- it runs -----------------------------------------------------------------------------------------------


def test_the_notebook_is_the_script():
    """`make notebook` makes it."""
    made, there = jupytext.read(A3), nbformat.read(A3.with_suffix(".ipynb"), as_version=4)
    parts = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (made, there)]
    assert parts[0] == parts[1]
    assert not any(cell.get("outputs") for cell in there.cells)


def test_every_cell_of_the_notebook_runs_on_a_small_world(world, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own shows figures
    book = nbformat.read(A3.with_suffix(".ipynb"), as_version=4)
    codes = [cell for cell in book.cells if cell.cell_type == "code"]
    for setting, value in (("WORLD = None", f"WORLD = {str(world)!r}"), ("LIMIT = None", "LIMIT = 40")):
        assert setting in codes[0].source
        codes[0].source = codes[0].source.replace(setting, value)
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in codes for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert [said.count(words) for words in ("test reward", "alpha", "first loss 0.693147")] == [9, 4, 3]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
