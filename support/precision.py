"""Where to compute, and in which arithmetic."""

import os

import torch

from support.errors import UserError
from support.ranks import distributed, world_size


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
    fast = "bf16" if fast_bf16(device) else "fp32"
    return device, fast if precision == "auto" else precision


def claim(device):
    """Each rank takes the GPU of its own number; UserError if there are fewer than ranks."""
    if device.type == "mps" and world_size() > 1:
        raise UserError("--device mps: there is one such device, for one process; call it without torchrun")
    if device.type == "cuda" and distributed():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"torchrun: GPUs on this machine: {gpus}; give --nproc-per-node={gpus}, or --device cpu")
        torch.cuda.set_device(local)  # from here on it is "cuda"


def fast_bf16(device):
    """True if the device multiplies in bf16; where it only emulates that, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    processor = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: not known, so fp32
    return device.type == "cpu" and any(processor.get(name) for name in ("avx512_bf16", "amx_bf16"))
