"""Several processes, one batch: data-parallel training with torchrun.

    torchrun --nproc-per-node=2 reinforce.py --alpha 0.02 --out runs/two

Every rank (process) has the whole policy, and goes through its share of each batch's rows; the gradients are added up
once a step, so all ranks take the same step and stay equal. What is random is drawn for the whole batch on every rank,
so a row's sample does not depend on the rank that draws it. Rank 0 alone writes and speaks. Without torchrun there is
one rank, all rows are its own, and nothing here does anything. Left out on purpose: shards of a model (FSDP).
"""

import contextlib
import os
import re

import torch
import torch.distributed as dist

from support.runs import AGAIN, UserError, out_of_memory

STORE = None  # what the ranks can all read and write, while they are joined


def several():
    """True within joined(), with one rank, too. (PyTorch may have been built without torch.distributed.)"""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined():
    """Around a script that torchrun has started (runs.launch): NCCL between GPUs, gloo between CPUs.

    Only rank 0 speaks: the others' output and progress bars go nowhere.
    """
    global STORE
    store, rank, ranks = next(dist.rendezvous("env://"))  # from torchrun's environment variables
    STORE = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # after a restart, anew
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    with together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=STORE, rank=rank, world_size=ranks)
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
        if rank:
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()  # after an error it ends with the process


def first_to_fail():
    """True on the rank whose failure is the cause: the others fail because of it, and need not say so."""
    try:
        return STORE is None or STORE.add("failed", 1) == 1
    except RuntimeError:  # it has ended with the process that kept it
        return True


def claim(device):
    """Each rank takes the GPU of its own number; UserError if there are fewer than ranks."""
    if not several():
        return
    ranks, local, gpus = dist.get_world_size(), int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.type == "mps" and ranks > 1:
        raise UserError("--device mps: there is one such device, for one process; call it without torchrun")
    if device.type == "cuda":
        if local >= gpus:
            raise UserError(f"torchrun: GPUs on this machine: {gpus}; give --nproc-per-node={gpus}, or --device cpu")
        torch.cuda.set_device(local)  # from here on it is "cuda"


def each(hardware):
    """A rank's hardware -> that of all, for config.json."""
    return f"{dist.get_world_size()} ranks, each {hardware}" if several() else hardware


# ---- who does what -----------------------------------------------------------------------------------------


def mine(rows):
    """int -> slice: this rank's share (shard) of a batch of so many rows, in order; shares differ by a row at most.

    A rank may have none, if there are more ranks than rows.
    """
    if not several():
        return slice(0, rows)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)


def turns():
    """-> slice: this rank's batches of a list, where each batch is one rank's."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if several() else slice(None)


# ---- what the ranks tell each other ------------------------------------------------------------------------


@contextlib.contextmanager
def together():
    """Around what all ranks have to do at once: if one has ended, so do the others, in a line."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = re.sub(r"\[.*?\] ", "", str(error)).split(". ")[0].strip()  # without the library's paths and advice
        raise UserError(f"another rank has ended, killed or out of memory ({reason}); {AGAIN}") from error


def summed(values, model=None):
    """Adds up over the ranks (all-reduce), in place: a tensor, and the gradients of a model -> the tensor.

    A rank's gradient is that of its rows' share of the batch's mean, so the sum is the whole batch's: exact for shares
    of any size. Every rank gets the same bits.
    """
    if not several():
        return values
    tensors = [values]
    for weight in model.parameters() if model else ():
        if weight.requires_grad:
            if weight.grad is None:  # a rank without rows
                weight.grad = torch.zeros_like(weight)
            tensors.append(weight.grad)
    anyone(0)  # between CPUs: a rank that has ended is an error there, while a GPU would wait for it for ever
    with together():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
    return values


def gathered(values, rows):
    """(b, ...) of this rank's rows of a batch -> (B, ...), B = `rows`, on every rank (all-gather of unequal shares)."""
    if not several():
        return values
    whole = values.new_zeros(rows, *values.shape[1:])
    whole[mine(rows)] = values
    return summed(whole)  # all others add 0


def everyone(rows):
    """List -> the lists of all ranks, one behind the other, on every rank (all-gather of objects)."""
    if not several():
        return rows
    lists = [None] * dist.get_world_size()
    with together():
        dist.all_gather_object(lists, rows)
    return [row for some in lists for row in some]


def anyone(number):
    """int -> the largest that any rank has (all-reduce)."""
    if not several():
        return number
    largest = torch.tensor(number)
    with together():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def agree(settings):
    """UserError unless all ranks have the same dict of settings: other files on another machine, say."""
    for rank, other in enumerate(everyone([settings])):
        names = [name for name in {**settings, **other} if settings.get(name) != other.get(name)]
        if names:
            raise UserError(f"rank {rank} has another {', '.join(names)} than rank {dist.get_rank()}")


def once(function, *args):
    """Rank 0 calls it -> its result, on every rank. A UserError that it raises is raised on every rank."""
    if not several():
        return function(*args)
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = function(*args)
        except UserError as error:
            found[1] = error
    with together():
        dist.broadcast_object_list(found, src=0)
    if found[1]:
        raise found[1]
    return found[0]
