"""Several processes, one batch: data-parallel training with torchrun.

    torchrun --nproc-per-node=2 reinforce.py --alpha 0.02 --out runs/two

Every rank (process) has the whole policy and goes through its share of each batch's rows. The gradients are added up
once a step, so the ranks stay equal. Random numbers are drawn for the whole batch on every rank: a row's sample does
not depend on its rank. Rank 0 alone writes and speaks. Without torchrun there is one rank, and nothing here does
anything. Collectives (from all_reduce on) are called by every rank at the same place. Left out: shards (FSDP).
"""

import contextlib
import os

import torch
import torch.distributed as dist

from support.errors import AGAIN, UserError, out_of_memory

STORE = None  # what the ranks can all read and write, while they are joined


def distributed():
    """True within joined(), with one rank, too. (PyTorch may have been built without torch.distributed.)"""
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if distributed() else 0


def world_size():
    return dist.get_world_size() if distributed() else 1


@contextlib.contextmanager
def joined():
    """Around a script that torchrun has started (command.launch): NCCL between GPUs, gloo between CPUs."""
    global STORE
    store, rank, ranks = next(dist.rendezvous("env://"))  # from torchrun's environment variables
    STORE = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # after a restart, anew
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
        try:
            dist.init_process_group(backend, store=STORE, rank=rank, world_size=ranks)
            if rank:
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        except RuntimeError as error:  # of any collective below. gloo's have no class, but the path of its source
            if out_of_memory(error) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            reason = str(error).rpartition("] ")[2].partition(". ")[0].strip()  # without paths and advice
            raise UserError(f"another rank has ended, killed or out of memory ({reason}); {AGAIN}") from error
    dist.destroy_process_group()  # after an error it ends with the process


def first_to_fail():
    """True on the rank whose failure is the cause: the others fail because of it, and need not say so."""
    with contextlib.suppress(RuntimeError):  # the store has ended with the process that kept it
        return STORE is None or STORE.add("failed", 1) == 1
    return True


def rank_slice(rows):
    """int -> slice, float: this rank's part of a batch of so many rows, and the weight of its mean in the batch's.

    Without torchrun all rows and 1. Parts differ by a row at most, and a mean over all rows is the sum of the parts'
    means, each times its weight. Where ranks outnumber rows, some go through a row of another with weight 0.
    """
    first, stop = (rows * number // world_size() for number in (rank(), rank() + 1))
    return slice(first, max(stop, first + 1)), (stop - first) / rows


def micro_batches(rows, size=None):
    """Yields slices of at most `size` of this rank's rows, and each one's weight in the mean over all rows."""
    own, weight = rank_slice(rows)
    for first in range(own.start, own.stop, size or rows):
        stop = min(first + (size or rows), own.stop)
        yield slice(first, stop), (stop - first) / rows if weight else 0.0


def rank_batches(batches):
    """-> those of a list of batches that are this rank's to compute."""
    return batches[rank() :: world_size()]


def all_reduce(*tensors):
    """Adds up each tensor over the ranks, in place. Every rank gets the same bits."""
    if distributed():
        all_reduce_max(0)  # between CPUs: a rank that has ended is an error there, while a GPU would wait for ever
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def all_reduce_max(number):
    """int -> the largest that any rank has."""
    largest = torch.tensor(number)
    if distributed():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def all_gather(values, rows):
    """(b, ...) of this rank's rows of a batch -> (B, ...), B = `rows`, on every rank."""
    whole, (own, weight) = values.new_zeros(rows, *values.shape[1:]), rank_slice(rows)
    if weight:
        whole[own] = values
    all_reduce(whole)  # all others add 0
    return whole


def all_gather_lists(rows):
    """List -> the lists of all ranks, one behind the other, on every rank."""
    lists = [rows] * world_size()
    if distributed():
        dist.all_gather_object(lists, rows)
    return [row for some in lists for row in some]


def broadcast(function, *args):
    """Rank 0 calls it -> its result, on every rank. If it raises there, the others end, too (joined)."""
    found = [function(*args) if rank() == 0 else None]
    if distributed():
        dist.broadcast_object_list(found, src=0)
    return found[0]
