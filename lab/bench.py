"""How fast, and in how much memory: this code, the course's way, and TRL, on the same work in one run.

Course sizes (DistilGPT2's and DistilBERT's shape) with random weights made on the spot, so no hub is needed. Each
way is a process of its own; they take turns, so that a machine that slows down slows them all, and every ratio
is of two turns in the same round.

    python -m lab.bench                    # about ten minutes on two cores; TRL's part needs requirements-bench.txt
    python -m lab.bench --device cuda
    python -m lab.bench --tiny             # only that it works: small models, seconds
"""

import ctypes
import importlib.util
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast, TrainerCallback)

import dpo
import reinforce
import reward
from support import command, loading
from support.errors import UserError
from support.precision import pick_device
from support.progress import Progress

PROMPT, COMPLETION, BATCH = 10, 20, 32  # REINFORCE: tokens, tokens, rows
PAIRS, STEPS, LONGEST = 16, 2, 128  # DPO: pairs a step, steps a turn, tokens of prompt and completion
TESTED = 64  # prompts of an evaluation
EPOCHS = 2  # the reference's log-probs, computed once, serve so many epochs of DPO
ALPHA, BETA = 0.02, 0.1
# Steps and samples of a turn; turns to warm up, until memory is laid out, and turns that count.
WORKS = {"REINFORCE": (1, BATCH, 4, 3), "DPO": (STEPS, PAIRS * STEPS, 1, 2), "evaluation": (1, TESTED, 1, 3)}

FULL = {"policy": {"n_layer": 6}, "words": 50_257, "scorer": {}, "scorer_words": 30_522}
TINY = {"policy": {"n_layer": 1, "n_embd": 32, "n_head": 2}, "words": 1000,
        "scorer": {"n_layers": 1, "dim": 32, "hidden_dim": 64, "n_heads": 2}, "scorer_words": 1000}

# ---- the same models, prompts and pairs for every way ------------------------------------------------------


def new_models(size):
    """-> GPT-2 and DistilBERT with random weights, in eval mode, the same in every process."""
    torch.manual_seed(0)
    ends = {"bos_token_id": size["words"] - 1, "eos_token_id": size["words"] - 1}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=size["words"], **size["policy"], **ends))
    scorer = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=size["scorer_words"], **size["scorer"]))
    return policy.eval(), scorer.eval()


def new_tokenizers(size):
    """-> tokenizers of the models' sizes: word i is " wi", one token for either, [UNK] for the smaller one's rest."""
    words = {f" w{i}": i for i in range(size["words"] - 1)} | {"<|endoftext|>": size["words"] - 1}
    policy = Tokenizer(models.WordLevel(words, unk_token=" w0"))
    policy.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    policy.decoder = decoders.Fuse()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*special.values(), *(f"w{i}" for i in range(size["scorer_words"] - 4))]
    scorer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    scorer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, scorer.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    scorer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return (PreTrainedTokenizerFast(tokenizer_object=policy, padding_side="left", **end),
            PreTrainedTokenizerFast(tokenizer_object=scorer, model_max_length=512, **special))


def new_prompts(size, count):
    return torch.randint(0, size["words"] - 1, (count, PROMPT), generator=torch.Generator().manual_seed(1))


def new_pairs(size):
    """-> one turn's pairs of token lists: prompts of 6 to 14 tokens, at most 128 with a completion.

    Of 800 pairs (chosen sides of 32 to 128 tokens in all, rejected ones up to a quarter longer or shorter), batches
    of like length from a quarter and three quarters of the way up: what an epoch's batches are like for ours. The
    other ways take the same pairs in random batches.
    """
    dice, last, pairs = torch.Generator().manual_seed(2), size["words"] - 2, []

    def pick(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=dice).tolist()

    for _ in range(50 * PAIRS):
        prompt, total = pick(0, last, pick(6, 14)), pick(32, LONGEST)
        sides = total, max(16, min(LONGEST, total * pick(75, 125) // 100))
        pairs.append(dpo.Pair(prompt, *(pick(0, last, side - len(prompt)) for side in sides)))
    batches = loading.widths(pairs).argsort().split(PAIRS)
    return [pairs[row] for step in range(STEPS) for row in batches[(2 * step + 1) * len(batches) // (2 * STEPS)]]


# ---- ours: the scripts' own loops --------------------------------------------------------------------------


class Stub:
    """A run folder's place: nothing is written, but the turn ends after `steps` logged steps."""

    def __init__(self, turn, precision, steps=1, **args):
        self.turn, self.steps, self.saved, self.bf16, self.looked = turn, steps, {}, precision == "bf16", 0.0
        self.args = SimpleNamespace(seed=0, completion_len=COMPLETION, eval_batch_size=None, samples_per_prompt=1,
                                    epochs=10**6, save_every=10**6, max_grad_norm=None, micro_batch=None, **args)

    def log(self, step=0, **row):
        if step and step % self.steps == 0:
            self.turn()

    def resume(self, **parts):
        return Progress(self, parts)

    deal = gather = lambda _, items, *desc: items
    checkpoint = completions = sample = lambda *_, **row: None


def load_ours(size, device):
    """Models and tokenizers as the scripts load them."""
    device, args = torch.device(device), SimpleNamespace(prompt_len=PROMPT, completion_len=COMPLETION)
    with tempfile.TemporaryDirectory() as folder:
        args.policy, args.reward_model, args.positive_label = f"{folder}/policy", f"{folder}/scorer", None
        names = args.policy, args.reward_model
        for name, model, tokenizer in zip(names, new_models(size), new_tokenizers(size), strict=True):
            model.save_pretrained(name)
            tokenizer.save_pretrained(name)
        policy, tokenizer = loading.load_policy(args, device)
        return policy, loading.load_reference(args.policy, policy), tokenizer, loading.load_scorer(args, device)


def gradient_bytes(policy):
    return 4 * sum(weight.numel() for weight in policy.parameters())


def ours_reinforce(turn, size, device, precision):
    loaded = load_ours(size, device)
    run = Stub(turn, precision, alpha=ALPHA, advantage="reward", lr=1e-4, batch_size=BATCH)
    turn.missing = gradient_bytes(loaded[0])
    turn()
    reinforce.train(*loaded, new_prompts(size, 64 * BATCH), new_prompts(size, 1), run)


def ours_dpo(turn, size, device, precision):
    policy, reference, *scorers = load_ours(size, device)
    run = Stub(turn, precision, STEPS, beta=BETA, lr=5e-7, batch_size=PAIRS)
    turn.missing = gradient_bytes(policy)
    pairs = {"train": new_pairs(size), "test": [dpo.Pair([1], [2], [3])]}
    logps = {split: dpo.all_logps(reference, rows, run, split) for split, rows in pairs.items()}  # warms up, too
    start = time.perf_counter()
    dpo.all_logps(reference, pairs["train"], run, "reference")
    turn(extra=(time.perf_counter() - start) / EPOCHS)
    dpo.train(policy, logps, *scorers, pairs, new_prompts(size, 1), run)


def ours_evaluation(turn, size, device, precision, untouched=False):
    """untouched: section 1, the policy is its own reference, so the KL costs no second model."""
    policy, reference, *scorers = load_ours(size, device)
    while True:
        turn()
        run = Stub(turn, precision)
        reward.evaluate(policy, policy if untouched else reference, *scorers, new_prompts(size, TESTED), run)


# ---- the course's way: what a good notebook does -----------------------------------------------------------


def course(size, device):
    policy, scorer = (model.to(device) for model in new_models(size))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    return policy, new_models(size)[0].to(device), scorer, *new_tokenizers(size), optimizer


def positivities(scorer, tokenizer, texts):
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(scorer.device)
    return scorer(**inputs).logits.float().softmax(dim=-1)[:, 1]


@torch.no_grad()
def generate(policy, scorer, tokenizer, scorer_tokenizer, prompts):
    """-> (B, T) tokens and (B,) rewards."""
    freely = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": COMPLETION}
    ids = {"attention_mask": torch.ones_like(prompts), "pad_token_id": tokenizer.eos_token_id}
    tokens = policy.generate(prompts, **ids, **freely)
    return tokens, positivities(scorer, scorer_tokenizer, tokenizer.batch_decode(tokens, skip_special_tokens=True))


def take_step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()


def course_reinforce(turn, size, device):
    policy, reference, scorer, *tokenizers, optimizer = course(size, device)
    turn()
    while True:
        for prompts in new_prompts(size, 64 * BATCH).split(BATCH):
            tokens, rewards = generate(policy, scorer, *tokenizers, prompts.to(device))
            logps = policy(tokens).logits[:, :-1].log_softmax(dim=-1)  # every position, over the whole vocabulary
            with torch.no_grad():
                ref_logps = reference(tokens).logits[:, :-1].log_softmax(dim=-1)
            taken = logps.gather(dim=-1, index=tokens[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]
            kl = (logps.exp() * (logps - ref_logps)).sum(dim=-1)[:, PROMPT - 1 :]
            loss = -(rewards * taken.sum(dim=-1)).mean() + ALPHA * kl.sum(dim=-1).mean()
            take_step(loss, optimizer)
            del logps, ref_logps, taken, kl, loss
            turn()


def course_dpo(turn, size, device):
    policy, reference, _, tokenizer, _, optimizer = course(size, device)
    pairs = new_pairs(size)

    def logps(model, prompts, completions):
        """A forward of one side, padded on the right to its longest row."""
        rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
        tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id).to(device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            mask[row, len(prompt) : len(rows[row])] = 1
        every = model(tokens).logits[:, :-1].log_softmax(dim=-1)
        return (every.gather(dim=-1, index=tokens[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(dim=-1)

    turn()
    while True:
        for order in torch.randperm(len(pairs)).split(PAIRS):
            prompts, chosen, rejected = zip(*(pairs[row] for row in order), strict=True)
            policy_logps = logps(policy, prompts, chosen) - logps(policy, prompts, rejected)
            with torch.no_grad():
                reference_logps = logps(reference, prompts, chosen) - logps(reference, prompts, rejected)
            loss = -F.logsigmoid(BETA * (policy_logps - reference_logps)).mean()
            take_step(loss, optimizer)
        turn()


def course_evaluation(turn, size, device):
    """Rewards only: the course's evaluation has no KL."""
    policy, _, scorer, *tokenizers, _ = course(size, device)
    while True:
        turn()
        for prompts in new_prompts(size, TESTED).split(BATCH):
            generate(policy, scorer, *tokenizers, prompts.to(device))[1].mean().item()


# ---- TRL: its trainers, with what makes them fast ----------------------------------------------------------


def trl_trainer(turn, size, device, precision, steps, kind, config, rows, folder, **more):
    """Builds a trainer whose turns end after `steps` steps, and trains without end."""
    import datasets
    import trl

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % steps == 0:
                turn()

    policy = new_models(size)[0]
    policy.save_pretrained(folder)  # TRL loads the reference from the policy's name
    turn.missing = gradient_bytes(policy)
    config |= {"output_dir": folder, "use_cpu": device == "cpu", "bf16": precision == "bf16", "max_steps": 10**6,
               "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    arguments = getattr(trl, kind + "Config")(disable_tqdm=True, **config)
    trainer = getattr(trl, kind + "Trainer")(model=folder, args=arguments, callbacks=[Turns()], **more,
                                             train_dataset=datasets.Dataset.from_list(rows),
                                             processing_class=new_tokenizers(size)[0])
    turn()
    trainer.train()


def trl_reinforce(turn, size, device, precision, folder):
    """RLOO with two samples of each prompt, the fewest it allows; the KL is part of the reward. No top-k by default."""
    scorer, (tokenizer, scorer_tokenizer) = new_models(size)[1].to(device), new_tokenizers(size)

    def reward_func(prompts, completions, **_):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return positivities(scorer, scorer_tokenizer, list(map(str.__add__, prompts, completions))).tolist()

    config = {"per_device_train_batch_size": BATCH, "num_generations": 2, "max_completion_length": COMPLETION,
              "beta": ALPHA, "learning_rate": 1e-4, "disable_dropout": True}
    rows = [{"prompt": prompt} for prompt in tokenizer.batch_decode(new_prompts(size, 64 * BATCH))]
    trl_trainer(turn, size, device, precision, 1, "RLOO", config, rows, folder, reward_funcs=reward_func)


def trl_dpo(turn, size, device, precision, folder):
    """The reference's log-probs are computed before the first turn and not counted."""
    tokenizer = new_tokenizers(size)[0]
    rows = [dict(zip(("prompt", "chosen", "rejected"), tokenizer.batch_decode(pair), strict=True))
            for pair in new_pairs(size)]
    config = {"per_device_train_batch_size": PAIRS, "beta": BETA, "learning_rate": 5e-7, "max_length": LONGEST,
              "precompute_ref_log_probs": True}
    trl_trainer(turn, size, device, precision, STEPS, "DPO", config, rows, folder)


# ---- taking turns ------------------------------------------------------------------------------------------


class Turn:
    """In a worker: called where a turn ends. Reports the turn, waits for the next one to begin."""

    def __init__(self, pipe, device):
        self.pipe, self.device, self.extra, self.turns, self.start, self.held = pipe, device, 0.0, 0, None, None
        self.missing = 0  # bytes of gradients, of a way that ends its turns without them

    def __call__(self, extra=0.0):
        self.extra = self.extra or extra
        self.synchronize()
        seconds = self.start and time.perf_counter() - self.start + self.extra
        self.turns += 1
        if self.turns == 2:  # after the first step: weights, gradients and optimizer are there
            self.held = self.resident()
        peak = self.peak() - self.held if self.held and self.turns > 2 else None
        self.pipe.send((seconds, peak))
        if self.pipe.recv() == "stop":
            raise SystemExit
        self.synchronize()
        self.start = time.perf_counter()

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def resident(self):
        """Bytes held between two steps, without what the C library keeps of freed memory; the peak starts anew."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() + self.missing
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return proc_status("VmRSS") + self.missing

    def peak(self):
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else proc_status("VmHWM")


def proc_status(key):
    """A size in Linux's words on this process, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def worker(pipe, way, size, device, more):
    if not way.__name__.startswith(("course", "trl")):
        command.keep_memory()  # as the scripts do
    quiet = os.open(os.devnull, os.O_WRONLY)  # for progress bars and samples
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        way(Turn(pipe, device), size, device, *more)
    except Exception:
        pipe.send(traceback.format_exc())


def take_turns(ways, size, device, rounds, warm=1):
    """{name: (function, *arguments)} -> {name: [(seconds, peak bytes)] of each round}, after `warm` others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reinforce", "dpo"])  # PyTorch is loaded once, not by each way
    workers, pipes, results = [], {}, {name: [] for name in ways}
    for name, (way, *more) in ways.items():
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=worker, args=(theirs, way, size, device, more), daemon=True))
        workers[-1].start()
        theirs.close()
        receive(pipes[name], name)  # it is ready
    for number in range(-warm, rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            result = receive(pipe, name)
            print(f"  {name}: {result[0]:.2f} s{' (warming up)' if number < 0 else ''}", file=sys.stderr)
            results[name].append(result)
    for pipe, process in zip(pipes.values(), workers, strict=True):
        pipe.send("stop")
        process.join()
    return {name: turns[warm:] for name, turns in results.items()}


def receive(pipe, name):
    try:
        result = pipe.recv()
    except EOFError:
        raise UserError(f"{name}: its process was killed; not enough memory?") from None
    if isinstance(result, str):
        raise UserError(f"{name} failed:\n{result}")
    return result


# ---- the table ---------------------------------------------------------------------------------------------


def ways_of(work, precision, trl, folder):
    """-> {name of a way: (function, *arguments)}; ours in `precision` is what the others are compared with."""
    ours, notebook, name, trainer = {
        "REINFORCE": (ours_reinforce, course_reinforce, "RLOO", trl_reinforce),
        "DPO": (ours_dpo, course_dpo, "DPO", trl_dpo),
        "evaluation": (ours_evaluation, course_evaluation, None, None),
    }[work]
    ways = {f"ours, {kind}": (ours, kind) for kind in sorted({"fp32", precision})}
    ways["the course's way, fp32"] = (notebook,)
    if work == "evaluation":
        ways[f"ours, section 1, {precision}"] = (ours, precision, True)
    elif trl:
        ways[f"TRL {name}, {precision}"] = (trainer, precision, f"{folder}/{name}")
    return ways


def line_of(work, name, turns, reference):
    """A line of the table: medians, and the ratio's smallest and largest round."""
    seconds = statistics.median(taken for taken, _ in turns)
    ratios = sorted(taken / ours for (taken, _), (ours, _) in zip(turns, reference, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    memory = max((held for _, held in turns if held is not None), default=None)
    memory = "" if memory is None else f"{memory / 2**20:.0f}"
    steps, samples, _, _ = WORKS[work]
    return f"| {work} | {name} | {seconds / steps:.3g} | {samples / seconds:.1f} | {memory} | {ratio} |"


def main(argv=None):
    flags = command.bare_flags(__doc__)
    flags.add_argument("--device", choices=("cuda", "cpu"), help="where to compute (cuda if it is there)")
    flags.add_argument("--rounds", type=command.count, help="counted turns of each way (3; DPO 2)")
    flags.add_argument("--work", choices=WORKS, help="only this one (all three)")
    flags.add_argument("--tiny", action="store_true", help="small models: to see that it works")
    args = flags.parse_args(argv)
    device, precision = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), "auto")
    trl = importlib.util.find_spec("trl") is not None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device: {device}, {name}, torch {torch.__version__}; TRL: {'yes' if trl else 'not installed'}")
    print("\n| work | way | seconds a step | samples a second | memory, MiB | times ours |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for work in [args.work] if args.work else WORKS:
            _, _, warm, rounds = WORKS[work]
            ways, size = ways_of(work, precision, trl, folder), TINY if args.tiny else FULL
            results = take_turns(ways, size, device.type, args.rounds or rounds, warm)
            for way, turns in results.items():
                print(line_of(work, way, turns, results[f"ours, {precision}"]), flush=True)


if __name__ == "__main__":
    command.launch(main)
