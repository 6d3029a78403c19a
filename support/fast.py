"""What makes it fast, out of the lessons' way: the same numbers, sooner and in less memory.

Precision (which arithmetic, on which device), log-probs and KL whose gradients are written by hand, and rows in
parts. Nothing here changes what is computed: test_losses.py holds every piece to the plain form. What each is
worth: SPEED.md.
"""

import contextlib
import types

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.activations import NewGELUActivation

from support.ranks import claim, mine
from support.runs import UserError

# ---- device and precision ----------------------------------------------------------------------------------


def pick_device(name, precision):
    """-> torch.device, "bf16" or "fp32". Device None: cuda if there is one, else mps, else cpu.

    Precision "auto": bf16 where it is fast, not merely possible: CUDA from compute capability 8.0 up, and
    processors with instructions for it.
    """
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in kinds if kinds[kind]]
    if name and name not in there:
        raise UserError(f"--device {name} is not here; this machine has {', '.join(there)}")
    device = torch.device(name or there[0])
    claim(device)
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    return device, precision


def fast_bf16(device):
    """True if the device multiplies in bf16; where it only emulates that, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device.type != "cpu":
        return False
    processor = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: not known, so fp32
    return any(processor.get(name) for name in ("avx512_bf16", "amx_bf16"))


def prepare(model, precision):
    """A loaded model, made ready to compute in "fp32" or "bf16"; weights are fp32 in any case."""
    for module in model.modules():  # GPT-2's activation: the same function as one operation instead of eight
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = torch.nn.GELU(approximate="tanh")
    if model.device.type == "cpu":  # for rows this short, plain matrix products beat the fused attention
        model.set_attn_implementation("eager")
    model.bf16 = precision == "bf16"
    if model.bf16:
        head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and head.bias is None and ends_with(head, model):
            head.register_buffer("middle", head.weight.detach().mean(dim=0), persistent=False)
            head.__class__ = CentredHead
        # From here on, a call of the model is a call under autocast, for a deepcopy too.
        model.forward = types.MethodType(autocast(model, model.device)(type(model).forward), model)
    return model


@torch.no_grad()
def ends_with(head, model):
    """True if a number that the head adds to all logits is seen by no softmax. False where something bends the logits
    after the head, as a soft cap does."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    plain = model(input_ids=token, use_cache=False).logits.log_softmax(dim=-1)
    hook = head.register_forward_hook(lambda head, inputs, logits: logits + 64)
    moved = model(input_ids=token, use_cache=False).logits.log_softmax(dim=-1)
    hook.remove()
    return torch.allclose(moved, plain, atol=1e-3)


class CentredHead(torch.nn.Linear):
    """A language model's last product in bf16, less the same number for all words, which no softmax sees.

    A model's logits may lie far from 0 all together. Near -100 bf16 has steps of 0.5: rounded there, they would be
    another distribution. Around 0 its steps are small. What is taken off is the forecast of the average word, whose
    weights are `middle`; any vector would do, so it need not follow the training.
    """

    kept = None  # the bf16 weights, inside of cast_once only

    def cast(self):
        return (self.weight - self.middle).bfloat16()

    def forward(self, hidden):
        return F.linear(hidden, self.cast() if self.kept is None else self.kept)


def autocast(model, device):
    """The context in which a model prepared for "bf16" computes; for any other model it does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=getattr(model, "bf16", False))


@contextlib.contextmanager
def cast_once(model, device):
    """Around several calls of a model prepared for "bf16": casts each weight once and not once a call.

    Without gradients only: a copy that was made without one would hide the weight from a later backward. The
    copies end with the context. Nothing tells when a weight has changed: a fused AdamW does not count its version.
    """
    head = model.get_output_embeddings() if getattr(model, "bf16", False) else None
    with autocast(model, device):
        if isinstance(head, CentredHead):
            head.kept = head.cast()
        try:
            yield
        finally:
            if isinstance(head, CentredHead):
                head.kept = None


# ---- log-probs and KL in one go ----------------------------------------------------------------------------


class LogpsAndKL(torch.autograd.Function):
    """common.token_logps and reinforce.token_kl of M forecasts, with their gradients by hand (z: the logits):

        d log p(k) / dz_v = [v = k] - p_v           d KL / dz_v = p_v * (log p_v - log q_v - KL)

    M = B * N, a few of them at a time, so that what is as wide as the vocabulary stays in the processor's cache.
    None of it is kept: backward computes it again, which is cheaper than to fetch it from memory.
    """

    @staticmethod
    def pieces(logits, ref_logits):
        """Yields rows, (m, V) log p, (m, V) log p - log q: new tensors, which the caller may overwrite."""
        on_cpu = logits.device.type == "cpu"
        size = max(1, (2**20 if on_cpu else 2**26) // logits.shape[1])  # 4 MB; a GPU wants fewer, larger pieces
        for first in range(0, len(logits), size):
            rows = slice(first, first + size)
            logp = logits[rows].float().log_softmax(dim=-1)
            logq = logp if ref_logits is None else ref_logits[rows].float().log_softmax(dim=-1)
            log_ratio = logp - logq
            if not on_cpu or logp.amin() == -torch.inf:  # rare, and cheaper to look for than to mask for nothing
                log_ratio.masked_fill_(logp == -torch.inf, 0.0)
            yield rows, logp, log_ratio

    @staticmethod
    def forward(ctx, logits, tokens, ref_logits):
        logps, kl = torch.zeros(2, len(logits), 1, device=logits.device)
        for rows, logp, log_ratio in LogpsAndKL.pieces(logits, ref_logits):
            logps[rows] = logp.gather(dim=-1, index=tokens[rows])
            kl[rows] = log_ratio.mul_(logp.exp_()).sum(dim=-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, ref_logits, kl)
        return logps, kl

    @staticmethod
    def gradient(logits, tokens, ref_logits, kl, grad_logps, grad_kl):
        """(M, V): what flows into the logits."""
        words = logits.shape[1]
        grad = logits.new_empty(len(logits), words + -words % 64)[:, :words]  # aligned rows: faster products with it
        for rows, logp, log_ratio in LogpsAndKL.pieces(logits, ref_logits):
            # grad_kl * p * (log_ratio - KL) + grad_logps * ([v = k] - p), where p takes log p's place:
            dz = log_ratio.sub_(kl[rows]).mul_(grad_kl[rows]).sub_(grad_logps[rows]).mul_(logp.exp_())
            grad[rows] = dz.scatter_add_(dim=-1, index=tokens[rows], src=grad_logps[rows])
        return grad

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_kl):
        return LogpsAndKL.gradient(*ctx.saved_tensors, grad_logps, grad_kl), None, None


def logps_and_kl(logits, tokens, ref_logits=None):
    """(B, N, V), (B, N), (B, N, V) -> (B, N) token_logps(logits, tokens), (B, N) token_kl(logits, ref_logits).

    Without ref_logits the KL is 0. No gradient flows into ref_logits. ValueError if the shapes disagree.
    """
    if logits.shape[:-1] != tokens.shape or (ref_logits is not None and ref_logits.shape != logits.shape):
        others = f"tokens {tuple(tokens.shape)}, ref_logits {ref_logits is not None and tuple(ref_logits.shape)}"
        raise ValueError(f"{others} do not match logits {tuple(logits.shape)}")
    flat_ref = None if ref_logits is None else ref_logits.flatten(0, 1)
    logps, kl = LogpsAndKL.apply(logits.flatten(0, 1), tokens.reshape(-1, 1), flat_ref)
    return logps.view(tokens.shape), kl.view(tokens.shape)


# ---- rows in parts -----------------------------------------------------------------------------------------


def parts(rows, micro_batch):
    """Yields slices of 0 .. rows-1 and the share of the rows that each holds; micro_batch None: one slice.

    A mean over all rows is the sum of the parts' means, each times its share: exact for a ragged last part. With
    torchrun the slices are those of this rank's rows, and the sum is over all ranks (ranks.summed).
    """
    own = mine(rows)
    size = micro_batch or rows
    for first in range(own.start, own.stop, size):
        part = slice(first, min(first + size, own.stop))
        yield part, (part.stop - first) / rows


def like_lengths(lengths, batch_size, order, window=50):
    """(n,) -> list of LongTensors: batches of rows in random order, those of a batch of like length.

    All rows are shuffled by the Generator `order`; each `window` batches' worth of them is then sorted by
    length and cut into batches, and the batches are shuffled. So a batch holds little padding, and the long
    rows come at no particular time.
    """
    batches = []
    for rows in torch.randperm(len(lengths), generator=order).split(window * batch_size):
        batches += rows[lengths[rows].argsort(stable=True)].split(batch_size)
    return [batches[index] for index in torch.randperm(len(batches), generator=order)]
