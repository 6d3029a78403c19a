"""How fast, and in how much memory: this code, the course's way, and TRL, on the same work in one run.

Course sizes (DistilGPT2's and DistilBERT's shape) with random weights made on the spot, so no hub is needed. Each
way is a process of its own; they take turns, so that a machine that slows down slows them all, and every ratio
is of two turns in the same round.

    python -m lab.bench                    # about ten minutes on two cores; TRL's part needs requirements-bench.txt
    python -m lab.bench --device cuda
    python -m lab.bench --tiny             # only that it works: small models, seconds
"""

import argparse
import ctypes
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace

from support import runs

PROMPT, COMPLETION, BATCH = 10, 20, 32  # REINFORCE: tokens, tokens, rows
PAIRS, STEPS, LONGEST = 16, 2, 128  # DPO: pairs a step, steps a turn, tokens of prompt and completion
TESTED = 64  # prompts of an evaluation
EPOCHS = 2  # the reference's log-probs, computed once, serve so many epochs of DPO
ALPHA, BETA = 0.02, 0.1
TURNS = {"REINFORCE": (4, 3), "DPO": (1, 2), "evaluation": (1, 3)}  # to warm up, until memory is laid out; counted

WIDE = {"cpu": 2048, "cuda": 8192}  # matrices whose product is the machine's peak
FULL = {"policy": {"n_layer": 6}, "scorer": {}, "words": 50_257, "scorer_words": 30_522, "wide": WIDE}
TINY = {
    "policy": {"n_layer": 1, "n_embd": 32, "n_head": 2},
    "scorer": {"n_layers": 1, "dim": 32, "hidden_dim": 64, "n_heads": 2},
    "words": 1000,
    "scorer_words": 1000,
    "wide": {"cpu": 256, "cuda": 256},
}

# ---- the same models, prompts and pairs for every way ------------------------------------------------------


def new_models(size):
    """-> GPT-2 and DistilBERT with random weights, in eval mode, the same in every process."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": size["words"] - 1, "eos_token_id": size["words"] - 1}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=size["words"], **size["policy"], **ends))
    scorer = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=size["scorer_words"], **size["scorer"]))
    return policy.eval(), scorer.eval()


def new_tokenizers(size):
    """-> tokenizers of the models' sizes: word i is " wi", one token for either, [UNK] for the smaller one's rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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
    import torch

    return torch.randint(0, size["words"] - 1, (count, PROMPT), generator=torch.Generator().manual_seed(1))


def new_pairs(size):
    """-> one turn's pairs of token lists: prompts of 6 to 14 tokens, at most 128 with a completion.

    Of 800 pairs (chosen sides of 32 to 128 tokens in all, rejected ones up to a quarter longer or shorter), batches
    of like length from a quarter and three quarters of the way up: what an epoch's batches are like for ours. The
    other ways take the same pairs in random batches.
    """
    import torch

    from dpo import Pair, widths

    dice = torch.Generator().manual_seed(2)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=dice))

    def text(length):
        return torch.randint(0, size["words"] - 1, (length,), generator=dice).tolist()

    pairs = []
    for _ in range(50 * PAIRS):
        prompt, total = text(pick(6, 14)), pick(32, LONGEST)
        sides = total, max(16, min(LONGEST, total * pick(75, 125) // 100))
        pairs.append(Pair(prompt, *(text(side - len(prompt)) for side in sides)))
    batches = widths(pairs).argsort().split(PAIRS)
    return [pairs[row] for step in range(STEPS) for row in batches[(2 * step + 1) * len(batches) // (2 * STEPS)]]


# ---- ours: the functions of the scripts, as they stand -----------------------------------------------------


class Stub:
    """A run folder's place: nothing is written, but the turn ends after `steps` logged steps."""

    def __init__(self, turn, steps=1, **args):
        self.turn, self.steps, self.saved = turn, steps, {}
        self.args = SimpleNamespace(seed=0, completion_len=COMPLETION, eval_batch_size=None, samples_per_prompt=1,
                                    epochs=10**6, save_every=10**6, max_grad_norm=None, **args)

    def log(self, step=0, **row):
        if step and step % self.steps == 0:
            self.turn()

    def sample(self, **row):
        pass

    def checkpoint(self, **content):
        pass

    def completions(self, rows):
        pass


def ours(size, device, precision):
    from reward import Scorer
    from support import fast

    policy, scorer = (fast.prepare(model.to(device), precision) for model in new_models(size))
    reference = fast.prepare(new_models(size)[0].to(device), precision).requires_grad_(False)
    tokenizer, scorer_tokenizer = new_tokenizers(size)
    return policy, reference, tokenizer, Scorer(scorer, scorer_tokenizer, 1)


def ours_reinforce(turn, size, device, precision):
    import reinforce

    policy, reference, tokenizer, scorer = ours(size, device, precision)
    run = Stub(turn, alpha=ALPHA, advantage="reward", lr=1e-4, batch_size=BATCH, micro_batch=None)
    turn()
    reinforce.train(policy, reference, tokenizer, scorer, new_prompts(size, 64 * BATCH), new_prompts(size, 1), run)


def ours_dpo(turn, size, device, precision):
    import dpo

    policy, reference, tokenizer, scorer = ours(size, device, precision)
    run = Stub(turn, STEPS, beta=BETA, lr=5e-7, batch_size=PAIRS, micro_batch=None)
    pairs = {"train": new_pairs(size), "test": [dpo.Pair([1], [2], [3])]}
    logps = {split: dpo.all_logps(reference, rows, PAIRS, split) for split, rows in pairs.items()}  # warms up, too
    start = time.perf_counter()
    dpo.all_logps(reference, pairs["train"], PAIRS, "reference")
    turn(extra=(time.perf_counter() - start) / EPOCHS)
    dpo.train(policy, logps, tokenizer, scorer, pairs, new_prompts(size, 1), run)


def ours_evaluation(turn, size, device, precision):
    import reward

    models = ours(size, device, precision)
    while True:
        turn()
        reward.evaluate(*models, new_prompts(size, TESTED), Stub(turn))


def ours_baseline(turn, size, device, precision):
    """Section 1: the policy is its own reference, so the KL costs no second model."""
    import reward

    policy, _, tokenizer, scorer = ours(size, device, precision)
    while True:
        turn()
        reward.evaluate(policy, policy, tokenizer, scorer, new_prompts(size, TESTED), Stub(turn))


# ---- the course's way: what a good notebook does -----------------------------------------------------------


def course(size, device):
    import torch

    policy, scorer = (model.to(device) for model in new_models(size))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    return policy, new_models(size)[0].to(device), scorer, *new_tokenizers(size), optimizer


def generate(policy, scorer, tokenizer, scorer_tokenizer, prompts):
    """-> (B, T) tokens and (B,) rewards."""
    import torch

    with torch.no_grad():
        freely = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": COMPLETION}
        ids = {"attention_mask": torch.ones_like(prompts), "pad_token_id": tokenizer.eos_token_id}
        tokens = policy.generate(prompts, **ids, **freely)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        inputs = scorer_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(prompts.device)
        return tokens, scorer(**inputs).logits.softmax(dim=-1)[:, 1]


def course_reinforce(turn, size, device):
    import torch

    policy, reference, scorer, tokenizer, scorer_tokenizer, optimizer = course(size, device)
    turn()
    while True:
        for prompts in new_prompts(size, 64 * BATCH).split(BATCH):
            tokens, reward = generate(policy, scorer, tokenizer, scorer_tokenizer, prompts.to(device))
            logps = policy(tokens).logits[:, :-1].log_softmax(dim=-1)  # every position, over the whole vocabulary
            with torch.no_grad():
                ref_logps = reference(tokens).logits[:, :-1].log_softmax(dim=-1)
            taken = logps.gather(dim=-1, index=tokens[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]
            kl = (logps.exp() * (logps - ref_logps)).sum(dim=-1)[:, PROMPT - 1 :]
            loss = -(reward * taken.sum(dim=-1)).mean() + ALPHA * kl.sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            del logps, ref_logps, taken, kl, loss
            turn()


def course_dpo(turn, size, device):
    import torch
    import torch.nn.functional as F

    policy, reference, _, tokenizer, _, optimizer = course(size, device)
    pairs = new_pairs(size)

    def logps(model, prompts, completions):
        """A forward of one side, padded on the right to its longest row."""
        longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        tokens = torch.full((len(prompts), longest), tokenizer.eos_token_id)
        mask = torch.zeros_like(tokens)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.tensor(prompt + completion)
            mask[row, len(prompt) : end] = 1
        tokens, mask = tokens.to(device), mask.to(device)
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
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        turn()


def course_evaluation(turn, size, device):
    """Rewards only: the course's evaluation has no KL."""
    policy, _, scorer, tokenizer, scorer_tokenizer, _ = course(size, device)
    while True:
        turn()
        for prompts in new_prompts(size, TESTED).split(BATCH):
            generate(policy, scorer, tokenizer, scorer_tokenizer, prompts.to(device))[1].mean().item()


# ---- TRL: its trainers, with what makes them fast ----------------------------------------------------------


def trl_trainer(turn, size, device, precision, steps, kind, config, rows, folder, **more):
    """Builds a trainer whose turns end after `steps` steps, and trains without end."""
    import datasets
    import transformers
    import trl

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % steps == 0:
                turn()

    policy = new_models(size)[0]
    policy.save_pretrained(folder)  # TRL loads the reference from the policy's name
    turn.missing = 4 * sum(weight.numel() for weight in policy.parameters())  # it ends a turn without gradients
    common = {"output_dir": folder, "use_cpu": device == "cpu", "bf16": precision == "bf16"}
    common |= {"gradient_checkpointing": False}
    common |= {"max_steps": 10**6, "report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    arguments = getattr(trl, kind + "Config")(**common, disable_tqdm=True, **config)
    trainer = getattr(trl, kind + "Trainer")(
        model=folder, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=new_tokenizers(size)[0], callbacks=[Turns()], **more
    )
    turn()
    trainer.train()


def trl_reinforce(turn, size, device, precision, folder):
    """RLOO with two samples of each prompt, the fewest it allows; the KL is part of the reward."""
    import torch

    scorer, (tokenizer, scorer_tokenizer) = new_models(size)[1].to(device), new_tokenizers(size)

    def positive(prompts, completions, **_):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        inputs = scorer_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return scorer(**inputs).logits.float().softmax(dim=-1)[:, 1].tolist()

    prompts = tokenizer.batch_decode(new_prompts(size, 64 * BATCH))
    config = {"per_device_train_batch_size": BATCH, "num_generations": 2, "max_completion_length": COMPLETION}
    config |= {"beta": ALPHA, "learning_rate": 1e-4, "temperature": 1.0,
               "top_p": 1.0, "top_k": 0, "disable_dropout": True}
    rows = [{"prompt": prompt} for prompt in prompts]
    trl_trainer(turn, size, device, precision, 1, "RLOO", config, rows, folder, reward_funcs=positive)


def trl_dpo(turn, size, device, precision, folder):
    """The reference's log-probs are computed before the first turn and not counted."""
    tokenizer = new_tokenizers(size)[0]
    rows = [dict(zip(("prompt", "chosen", "rejected"), tokenizer.batch_decode(pair), strict=True))
            for pair in new_pairs(size)]
    config = {"per_device_train_batch_size": PAIRS, "beta": BETA, "learning_rate": 5e-7, "max_length": LONGEST}
    config |= {"precompute_ref_log_probs": True}
    trl_trainer(turn, size, device, precision, STEPS, "DPO", config, rows, folder)


def matmul_peak(turn, size, device, precision):
    """Turns of 20 products of square matrices, into a buffer that is there."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    wide = size["wide"][device]
    a, b = (torch.randn(wide, wide).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    while True:
        turn()
        for _ in range(20):
            torch.mm(a, b, out=out)


# ---- taking turns ------------------------------------------------------------------------------------------


class Turn:
    """In a worker: called where a turn ends. Reports the turn, waits for the next one to begin."""

    def __init__(self, pipe, device):
        self.pipe, self.device, self.extra, self.turns, self.start, self.held = pipe, device, 0.0, 0, None, None
        self.missing = 0  # bytes of gradients that are not there when a turn ends

    def __call__(self, extra=0.0):
        self.extra = self.extra or extra
        self.synchronize()
        seconds = self.start and time.perf_counter() - self.start + self.extra
        self.turns += 1
        if self.turns == 2:  # after the first step: weights, gradients and optimizer are there
            self.held = self.resident()
            self.held = self.held and self.held + self.missing
        peak = self.peak() - self.held if self.held and self.turns > 2 else None
        self.pipe.send((seconds, peak))
        if self.pipe.recv() == "stop":
            raise SystemExit
        self.synchronize()
        self.start = time.perf_counter()

    def synchronize(self):
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def resident(self):
        """Bytes held between two steps, without what the C library keeps of freed memory; the peak starts anew."""
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return self.status("VmRSS")

    def peak(self):
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return self.status("VmHWM")

    @staticmethod
    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def worker(pipe, function, size, device, more, tuned):
    if tuned:
        runs.keep_memory()  # as the scripts do
    quiet = os.open(os.devnull, os.O_WRONLY)  # for progress bars and samples
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        globals()[function](Turn(pipe, device), size, device, *more)
    except Exception:
        pipe.send(traceback.format_exc())


def take_turns(ways, size, device, rounds, warm=1):
    """{name: (function, *arguments)} -> {name: [(seconds, peak bytes)] of each round}, after `warm` others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reinforce", "dpo"])  # PyTorch is loaded once, not by each way
    workers, pipes, results = [], {}, {name: [] for name in ways}
    for name, (function, *more) in ways.items():
        pipes[name], theirs = context.Pipe()
        tuned = not function.startswith(("course", "trl"))
        arguments = (theirs, function, size, device, more, tuned)
        workers.append(context.Process(target=worker, args=arguments, daemon=True))
        workers[-1].start()
        theirs.close()
        receive(pipes[name], name)  # it is ready
    for number in range(-warm, rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            result = receive(pipe, name)
            print(f"  {name}: {result[0]:.2f} s{' (warming up)' if number < 0 else ''}", file=sys.stderr)
            if number >= 0:
                results[name].append(result)
    for pipe in pipes.values():
        pipe.send("stop")
    for process in workers:
        process.join()
    return results


def receive(pipe, name):
    try:
        result = pipe.recv()
    except EOFError:
        raise runs.UserError(f"{name}: its process was killed; not enough memory?") from None
    if isinstance(result, str):
        raise runs.UserError(f"{name} failed:\n{result}")
    return result


# ---- the table ---------------------------------------------------------------------------------------------


def necessary(size):
    """-> floating point operations that each work's matrix products must do: no padding, nothing twice."""
    policy, scorer = new_models(size)
    head = policy.lm_head.weight.numel()
    blocks = {"policy": policy.transformer.h, "scorer": scorer.distilbert.transformer}
    body = {name: sum(w.numel() for w in part.parameters() if w.dim() == 2) for name, part in blocks.items()}
    fed = PROMPT + COMPLETION - 1  # the last token forecasts nothing
    forward = fed * body["policy"] + COMPLETION * head
    reward = (PROMPT + COMPLETION + 2) * body["scorer"]  # [CLS] and [SEP]
    sides = [(pair.prompt, side) for pair in new_pairs(size) for side in (pair.chosen, pair.rejected)]
    pairs = sum((len(prompt) + len(side) - 1) * body["policy"] + len(side) * head for prompt, side in sides)
    return {  # a backward pass is two forward ones
        "REINFORCE": 2 * BATCH * (forward + reward + forward + 3 * forward),  # sample, reward, reference, policy
        "DPO": 2 * pairs * (3 + 1 / EPOCHS),
        "evaluation": 2 * TESTED * (forward + reward + forward),
    }


def works(device, precision, trl, folder):
    """-> {work: (samples a turn, {name of a way: (function, *arguments)})}, ours in the best precision first."""
    lower = {"fp32"} | {precision}
    found = {}
    for work, samples in (("REINFORCE", BATCH), ("DPO", PAIRS * STEPS), ("evaluation", TESTED)):
        key = work.lower()
        ways = {f"ours, {name}": (f"ours_{key}", name) for name in sorted(lower)}
        ways["the course's way, fp32"] = (f"course_{key}",)
        if work == "evaluation":
            ways[f"ours, section 1, {precision}"] = ("ours_baseline", precision)
        if trl and work != "evaluation":
            name = "TRL RLOO" if work == "REINFORCE" else "TRL DPO"
            ways[f"{name}, {precision}"] = (f"trl_{key}", precision, f"{folder}/{key}")
        found[work] = (samples, ways)
    return found


def row(work, name, turns, reference, samples, operations, peak):
    """One line of the table: medians, and the ratio's smallest and largest round."""
    seconds = statistics.median(taken for taken, _ in turns)
    ratios = sorted(theirs / taken for (theirs, _), (taken, _) in zip(turns, reference, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    memory = max((held for _, held in turns if held is not None), default=None)
    memory = "" if memory is None else f"{memory / 2**20:.0f}"
    share = f"{operations / seconds / peak:.2f}" if name in ("ours, bf16", "ours, fp32") else ""
    steps = STEPS if work == "DPO" else 1
    return f"| {work} | {name} | {seconds / steps:.3g} | {samples / seconds:.1f} | {memory} | {ratio} | {share} |"


def main(argv=None):
    flags = runs.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cuda", "cpu"), help="where to compute (cuda if it is there)")
    flags.add_argument("--rounds", type=runs.count, help="counted turns of each way (3; DPO 2)")
    flags.add_argument("--work", choices=("REINFORCE", "DPO", "evaluation"), help="only this one (all three)")
    flags.add_argument("--tiny", action="store_true", help="small models: to see that it works")
    args = flags.parse_args(argv)

    import torch

    from support import fast

    device, precision = fast.pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), "auto")
    size = TINY if args.tiny else FULL
    trl = importlib.util.find_spec("trl") is not None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device: {device}, {name}, torch {torch.__version__}; TRL: {'yes' if trl else 'not installed'}")
    operations = necessary(size)
    with tempfile.TemporaryDirectory() as folder:
        kinds = sorted({"fp32", precision})
        peaks = {kind: ("matmul_peak", kind) for kind in kinds}
        measured = take_turns(peaks, size, device.type, 3)
        flops = 20 * 2 * size["wide"][device.type] ** 3
        peak = {kind: flops / min(taken for taken, _ in turns) for kind, turns in measured.items()}
        print("matmul peak: " + ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in peak.items()))
        counts = ", ".join(f"{work} {count / 1e12:.2f}" for work, count in operations.items())
        print(f"necessary arithmetic, TFLOP a turn: {counts}")
        print("\n| work | way | seconds a step | samples a second | memory, MiB | times ours | share of peak |")
        print("|---|---|---|---|---|---|---|")
        for work, (samples, ways) in works(device.type, precision, trl, folder).items():
            if args.work not in (None, work):
                continue
            warm, rounds = TURNS[work]
            results = take_turns(ways, size, device.type, args.rounds or rounds, warm)
            reference = results[f"ours, {precision}"]
            for way, turns in results.items():
                best = peak["fp32" if way.endswith("fp32") else precision]
                print(row(work, way, turns, reference, samples, operations[work], best), flush=True)


if __name__ == "__main__":
    runs.launch(main)
