"""Small functions, right and wrong, for the judges of what goes into the losses, and for the signs in loops."""

import ast

import pytest
import torch

from course import child, draws, loop_signs, parse, tiny_models, wording


def judged(folder, text, name):
    (folder / "A3.py").write_text(text)
    torch.manual_seed(0)
    return child.judged(parse.read_solution(folder / "A3.py"), name, folder / "A3.py")


# ---- compute_reward_for_mini_batch -------------------------------------------------------------------------

REWARD = """
import torch
{top}
@torch.no_grad()
def compute_reward_for_mini_batch(batch, tokenizer, model, reward_tokenizer, reward_model):
    inputs = tokenizer(batch, truncation=True, max_length=10, padding=True, return_tensors="pt")
    {tokens}
    generated = tokenizer.batch_decode(output_tokens, skip_special_tokens=True)
    scored = reward_tokenizer(generated, padding=True, truncation=True, return_tensors="pt")
    logits = reward_model(**scored).logits
    return {reward}, output_tokens, generated
"""
GENERATE = "output_tokens = model.generate(**inputs, max_new_tokens=20, pad_token_id=50256, {})"
SOFTMAX = "logits.softmax(-1)[:, 1]"
BY_HAND = """ids, past, new = inputs["input_ids"], None, inputs["input_ids"]
    for _ in range(20):
        answer = model(new, past_key_values=past, use_cache=True)
        past, logits = answer.past_key_values, answer.logits[:, -1]
        {}
        ids = torch.cat([ids, new], dim=1)
    output_tokens = ids"""


def reward_judged(folder, options="do_sample=True, top_k=0", top="", tokens=GENERATE, reward=SOFTMAX):
    tokens = tokens.format(options)
    return judged(folder, REWARD.format(top=top, tokens=tokens, reward=reward), "compute_reward_for_mini_batch")


@pytest.mark.parametrize(("top", "options"), [
    ('kw = {"do_sample": True, "top_k": 0.0, "min_length": -1}', "**kw"),
    ('kw = {}\nkw["do_sample"] = True\nkw.update({"top_k": 50})\nkw |= {"top_k": 0}', "**kw"),
    ("k = 50\nk -= 50\nmodel.generation_config.top_k = k", "do_sample=True"),
    ("from transformers import GenerationConfig\ngc = GenerationConfig(do_sample=True)\ngc.top_k = 0",
     "generation_config=gc"),
])
def test_options_are_those_that_generate_gets_however_they_were_set(tmp_path, top, options):
    found = reward_judged(tmp_path, options, top)
    assert (found["status"], found["notes"]) == ("right", [])


def test_a_setting_of_the_model_that_bends_is_seen(tmp_path):
    found = reward_judged(tmp_path, "do_sample=True, top_k=0", "model.generation_config.repetition_penalty = 1.2")
    assert found["mistake"] == draws.OTHERWISE and found["got"].startswith("words are drawn ")


@pytest.mark.parametrize(("step", "got"), [
    ("new = torch.distributions.Categorical(logits=logits).sample().unsqueeze(-1)", None),
    ("new = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1, keepdim=True)", None),  # Gumbel noise
    ("logits[(ids[:, 10:] == 50256).any(-1), :50256] = -torch.inf; new = logits.softmax(-1).multinomial(1)", None),
    ("new = torch.stack([p.multinomial(num_samples=1) for p in (logits / 0.9).softmax(-1)])", "the temperature is 0.9"),
    ("p, order = logits.topk(50); new = order.gather(-1, torch.multinomial(p.softmax(-1), 1))",
     "only the 50 likeliest words, of 50,257"),
])
def test_a_loop_of_ones_own_is_judged_by_what_it_draws_from(tmp_path, step, got):
    found = reward_judged(tmp_path, step, tokens=BY_HAND)
    assert (found["status"] == "right") == (got is None) and found["got"] == (got or pytest.approx(found["expected"]))


@pytest.mark.parametrize(("reward", "mistake"), [
    ("torch.sigmoid(logits[:, 1] - logits[:, 0]).tolist()", None),  # for two labels it is the softmax
    ("logits[:, 1] - logits[:, 0]", "log-odds as reward"),
    ("2 * logits.softmax(-1)[:, 1] - 1", "P(positive) shifted or scaled"),
])
def test_a_reward_is_right_in_any_form_and_named_on_another_scale(tmp_path, reward, mistake):
    found = reward_judged(tmp_path, reward=reward)
    assert (found["status"], found["mistake"]) == ("wrong" if mistake else "right", mistake)
    assert not mistake or mistake in wording.MEANING


@pytest.fixture(scope="module")
def writer():
    return tiny_models.writer(), torch.tensor([tiny_models.tokenizer()(text)["input_ids"][:10]
                                               for text in tiny_models.reviews()[:8]])


@pytest.mark.parametrize(("options", "name", "seen"), [
    ({"min_length": -1, "min_new_tokens": 0, "top_p": 1, "length_penalty": 0.5, "renormalize_logits": True}, None, ""),
    ({"min_new_tokens": 20}, None, ""),
    ({"top_k": 1000}, draws.TOP_K, "only the 1,000 likeliest words"),
    ({"temperature": 0.99}, draws.OTHERWISE, "the temperature is 0.99"),
    ({"temperature": 0.05}, draws.OTHERWISE, "the temperature is 0.05"),
    ({"top_p": 0.9}, draws.OTHERWISE, "some words are never drawn"),
    ({"epsilon_cutoff": 3e-4}, draws.OTHERWISE, "some words are never drawn"),
    ({"eta_cutoff": 3e-4}, draws.OTHERWISE, "some words are never drawn"),
    ({"bad_words_ids": [[198]]}, draws.OTHERWISE, "some words are never drawn: 50,256 to 50,256 of 50,257"),
    ({"sequence_bias": {(107,): 2.0}}, draws.OTHERWISE, "words are drawn "),
])
def test_each_way_to_draw_from_something_else_is_said(writer, options, name, seen):
    model, prompts = writer
    with draws.Draws(model) as watched:
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20,
                                pad_token_id=tiny_models.EOS, **{"do_sample": True, "top_k": 0, **options})
    found, no_eos = draws.changes(watched, tokens)
    assert [part[0] for part in found] == [name] * bool(name) and all(part[1].startswith(seen) for part in found)
    assert no_eos == (options == {"min_new_tokens": 20})


def test_words_without_a_chance_are_left_out_of_a_draw_and_nothing_else_is_changed():
    # One word of 4 has no chance; the others are drawn with their probabilities 1/2, 1/4, 1/4, within 4 sigma.
    with draws.Draws(tiny_models.writer()):
        found = torch.multinomial(torch.tensor([[2.0, 0.0, 1.0, 1.0]]).expand(10_000, -1), 1)
        assert torch.multinomial(torch.tensor([0.0, 1.0]), 1).tolist() == [1]
        with pytest.raises(RuntimeError, match="inf"):
            torch.multinomial(torch.tensor([0.5, -0.1]), 1)
    assert found.shape == (10_000, 1)
    assert (found.flatten().bincount(minlength=4) / 1e4).tolist() == pytest.approx([0.5, 0.0, 0.25, 0.25], abs=0.02)


# ---- _get_batch_logps, create_labels_from_attention_mask ---------------------------------------------------

LOGPS = """
import torch
import torch.nn.functional as F
def _get_batch_logps(logits, labels, average_log_prob=False):
    logits, labels = logits[:, :-1], labels[:, 1:]
    {}
"""
GATHERED = "logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]; counts = {}; " \
           "return (logps * counts).sum(-1) / (counts.sum(-1) if average_log_prob else 1)"


@pytest.mark.parametrize(("body", "mistake"), [
    ("return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)",
     "one number for the batch, a mean over all its tokens"),
    ("return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='sum')",
     "sign + one number for the batch, the sum over all its tokens"),
    (GATHERED.format("labels != -100"), None),
    (GATHERED.format("torch.ones_like(labels)"), "padding kept"),
    (GATHERED.format("(labels != -100).cumsum(-1) > 0"), "padding kept after the completion"),
    (GATHERED.format("(labels != -100).flip(-1).cumsum(-1).flip(-1) > 0"), "padding kept before the completion"),
    ("i, t = torch.arange(4)[:, None], torch.arange(29); logps = logits.log_softmax(-1)[i, t, labels]; "  # from the end
     "return logps.sum(-1) / ((labels != -100).sum(-1) if average_log_prob else 1)", "padding kept"),
    ("return torch.stack([row[label != -100].log_softmax(-1).gather(-1, label[label != -100, None]).mean() * ("
     "1 if average_log_prob else (label != -100).sum()) for row, label in zip(logits, labels)])", None),
])
def test_log_probs_are_named_by_which_labels_they_take_and_how_they_add_them(tmp_path, body, mistake):
    found = judged(tmp_path, LOGPS.format(body), "_get_batch_logps")
    assert (found["status"], found["mistake"]) == ("wrong" if mistake else "right", mistake)
    if "one number" in str(mistake):  # of 76 labels, whose log-probs add up to -172.594
        assert found["got"] == f"one number, {172.594 if 'sum' in mistake else -172.594 / 76:.3f}"
        assert all(part in wording.MEANING for part in mistake.split(" + "))


LABELS = """
import torch
def create_labels_from_attention_mask(tokenized_input, prompt_lengths):
    ids, attention = tokenized_input["input_ids"], tokenized_input["attention_mask"]
    {}
"""


@pytest.mark.parametrize(("body", "mistake"), [
    ("return torch.tensor([[-100 if not a or sum(row[:j]) < n else t for j, (t, a) in enumerate(zip(text, row))] for "
     "text, row, n in zip(ids.tolist(), attention.tolist(), prompt_lengths)])", None),
    ("lengths = prompt_lengths + [0] and torch.tensor(prompt_lengths)[:, None]; "  # of a list
     "return torch.where((attention == 1) & (attention.cumsum(-1) > lengths), ids, -100)", None),
    ("return ids.masked_fill((attention == 0) | (attention.cumsum(-1) <= prompt_lengths), -100)", None),  # of (B, 1)
    ("return ids.masked_fill((attention == 0) | (torch.arange(30) <= prompt_lengths[:, None]), -100)",
     "off by one at the prompt + prompt counted from the row's start"),
])
def test_labels_are_right_with_prompt_lengths_of_any_kind(tmp_path, body, mistake):
    found = judged(tmp_path, LABELS.format(body), "create_labels_from_attention_mask")
    assert (found["status"], found["mistake"]) == ("wrong" if mistake else "right", mistake)


# ---- signs in loops ----------------------------------------------------------------------------------------

TRAIN = "def train():\n    optimizer.zero_grad()\n    loss.backward()\n    optimizer.step()\n    {}"
EVALUATE = "def evaluate():\n    for i in range(0, len(test_texts), batch_size):\n" \
           "        reward = compute(test_texts[i : i + batch_size])\n        {}\n    return {}"
SCORE = "{}\ndef get_log_probs(model, batch):\n" \
        "    return pick(model(batch['input_ids'], attention_mask=batch['attention_mask']).logits)"


def signs(text, name):
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return [sign for _, sign in loop_signs.of(functions, tree.body)[name]]


@pytest.mark.parametrize("line", [
    "orig_model = model", "orig_model = model.eval()", "orig_model = model.to(device).requires_grad_(False)",
    "losses, orig_model = [], model", "global orig_model; orig_model = model",
    "ref_model = policy", "print(ref := model.eval())", "self.ref_model: Model = self.model",
    "model = orig_model = load()", "orig_model = copy.copy(model)",
    "orig_model = load(); model = orig_model.train(False)",
])
def test_the_original_is_no_copy_however_it_is_spelled(line):
    (sign,) = signs(TRAIN.format(line), "train")
    assert "is no copy" in sign


def test_an_original_of_the_top_level_is_no_copy_either_unless_a_loop_makes_a_new_policy():
    top, loop = "model = load()\norig_model = model\n", TRAIN.format("pass")
    (sign,) = signs(top + loop, "train")
    assert "is no copy" in sign
    assert not signs(top + TRAIN.format("reset_model_optimizer(name)"), "train")


@pytest.mark.parametrize("line", [
    "orig_model = copy.deepcopy(model).eval()", "orig_model = AutoModel.from_pretrained(name, config=model.config)",
    "orig_model = GPT2(model.config); orig_model.load_state_dict(model.state_dict())", "model = orig_model = None",
    "orig_model = orig_model.to(device)", "orig_model = model\n    model = load()", "model, orig_model = load(), model",
    "orig_model = model\n    reset_model_optimizer(name)", "get_log_probs(model=orig_model)", "refined_model = model",
    "loss = alpha * kl - (reward * log_p).mean()", "reward = reward - alpha * kl", "loss -= -alpha * kl",
    "loss = -((reward - alpha * kl) * log_p).mean()", "loss = -(log_p - alpha * kl).mean()", "kl_loss = -alpha * kl",
    "loss = loss - alpha * entropy", "model.train(False)",
    "trainer.train()",
])
def test_right_code_in_a_loop_gives_no_sign(line):
    assert not signs(TRAIN.format(line), "train")


@pytest.mark.parametrize(("line", "sign"), [
    ("loss = loss + alpha * -kl", "KL negated"), ("loss += -alpha * kl", "KL negated"),
    ("(loss - kl.mean() * alpha).backward()", "KL neg"),
    ("loss = (log_p - alpha * kl).mean()", "KL negated"), ("loss = loss + -1.0 * kl", "KL negated"),
    ("model.train(True)", "dropout on"), ("model.train(mode=True)", "dropout on"),
    ("loss.backward(); optimizer.zero_grad(); optimizer.step()", "zero_grad() between"),
    ("compute_kl_divergence(log_probs, tokens, model)", "compared with itself"),
])
def test_wrong_code_in_a_loop_gives_its_sign(line, sign):
    assert [found.startswith(sign) for found in signs(TRAIN.format(line), "train")] == [True]


@pytest.mark.parametrize(("line", "answer", "seen"), [
    ("total += reward.mean().item()", "total / n", True),
    ("rewards.append(reward.mean().item())", "np.mean(rewards)", True),
    ("total += len(reward) * reward.mean().item()", "total / len(test_texts)", False),
    ("rewards.append(reward)", "torch.cat(rewards).mean()", False),
    ("for r in reward: total += r.item()", "total / len(test_texts)", False),
    ("rewards.append(reward.mean().item()); sizes.append(len(reward))", "np.average(rewards, weights=sizes)", False),
])
def test_a_last_batch_that_is_weighed_gives_no_sign(line, answer, seen):
    assert [sign.startswith("the ragged last batch") for sign in signs(EVALUATE.format(line, answer), "evaluate")] == (
        [True] * seen)


@pytest.mark.parametrize(("top", "seen"), [
    ("tokenizer = AutoTokenizer.from_pretrained(name, padding_side='left')", True),
    ("tokenizer = AutoTokenizer.from_pretrained(name, padding_side='right')", False),
    ("tokenizer = AutoTokenizer.from_pretrained(name)", False),  # GPT-2's pads right by itself
])
def test_positions_need_no_ids_where_padding_is_on_the_right(top, seen):
    assert [sign[:20] for sign in signs(SCORE.format(top), "get_log_probs")] == ["missing position ids"] * seen
