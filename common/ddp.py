"""One process or many: the same script runs plain and under torchrun (NCCL on GPUs, gloo on CPUs).

Without a process group every function here is the identity, so that a script is written once.
"""

import contextlib
import ctypes
import datetime
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def init():
    """Join torchrun's process group, if there is one, and return this process's `torch.device`."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True
    if not cuda:
        _keep_freed_memory()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # of a machine that is gone, the others hear after this time at the latest, and end
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=10))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _keep_freed_memory():
    """Have glibc keep what is freed, as GPU allocators do, instead of having it faulted in anew at every step.

    A step of ResNet-50 at 224 pixels frees and allocates gigabytes: a seventh faster. Other C libraries stay as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                     # M_MMAP_MAX: large blocks too come from the heap
        libc.mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: which is never given back


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows(n):
    """The slice of n global rows that belongs to this process: its r-th of W parts, in order; each row in one part."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def all_gather(x):
    """Rows of all processes in order of rank: (N, ...) -> (W N, ...). Carries no gradient; N is equal everywhere."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Every process's loss depends on every row, so a row's gradient is the sum over processes of its slices."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.n:(rank() + 1) * ctx.n]


def all_gather_with_grad(x):
    """Like `all_gather`, with the gradient: (N, ...) -> (W N, ...).

    The gradient is that of the *sum* of the processes' losses. DDP then averages over processes; so a loss that each
    process takes as the mean over its own rows gives the gradient of the mean over all rows.
    """
    return x if world() == 1 else _Gather.apply(x)


def total(x):
    """Sum over processes of a tensor, without gradient."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
    return x


def mean(x):
    """Mean over processes of a tensor, without gradient."""
    return total(x) / world()


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return mean(x)

    @staticmethod
    def backward(ctx, grad):
        return mean(grad)


def mean_with_grad(x):
    """Like `mean`, with the gradient of the sum of what the processes make of it, as in `all_gather_with_grad`."""
    return x if world() == 1 else _Mean.apply(x)


def any_process(flag, device):
    """True on every process as soon as it is true on one."""
    return mean(torch.tensor(float(flag), device=device)).item() > 0 if world() > 1 else bool(flag)


def wrap(module):
    """`module` in DistributedDataParallel under torchrun, itself otherwise. Only what is trained belongs in here.

    Buffers are not broadcast: batch statistics belong to groups of images, not to processes (`average_buffers`).
    """
    if world() == 1:
        return module
    wrapped = DistributedDataParallel(module)
    wrapped.broadcast_buffers = False
    return wrapped


def average_buffers(module):
    """Average the running batch statistics over processes, in place; before evaluating and saving.

    A running mean is linear in the batches' statistics, so that this equals one process that has seen all groups.
    """
    if world() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world()
