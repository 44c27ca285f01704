"""One process or many: the same script runs plain and under torchrun (NCCL on GPUs, gloo on CPUs).

Without a process group, the collectives return their own input, so that a script is written once.
"""

import contextlib
import ctypes
import datetime
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import UserError


def init(name=None):
    """Join the process group of torchrun, if there is one. Returns the `torch.device` to use.

    `name` is cuda or cpu; by default cuda if there is a GPU. Raises UserError if there is no GPU
    for this process.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available; expected cpu")
    torch.backends.cudnn.benchmark = True
    backend, device = "gloo", torch.device(name)
    if name == "cpu":
        _keep_freed_memory()
    if name == "cuda":
        index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= gpus:
            raise UserError(f"more processes than GPUs: expected --nproc_per_node={gpus}, or less")
        backend, device = "nccl", torch.device(name, index)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # If a machine is lost, the other processes fail after this time at the latest.
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    return device


def _keep_freed_memory():
    """Tell glibc to keep freed memory, as GPU allocators do, instead of returning it to the system.

    A ResNet-50 step at 224 pixels frees and allocates gigabytes; this makes it about 15 % faster.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):   # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                     # M_MMAP_MAX: allocate large blocks on the heap too
        libc.mallopt(-1, -1)                    # M_TRIM_THRESHOLD: never shrink the heap


def close():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def send(tensors, device):
    """Copy a dict of CPU tensors to `device` in a single asynchronous transfer, as a dict.

    Values that are not tensors stay as they are.
    """
    if device.type == "cpu":
        return tensors
    packed = pack(tensors)
    if device.type == "cuda":
        packed = packed.pin_memory()
    return unpack(packed.to(device, non_blocking=True), tensors)


def pack(tensors):
    """The bytes of all tensors in a dict, each padded to a multiple of 8, as one uint8 tensor."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()
             if isinstance(tensor, torch.Tensor)]
    return torch.cat([F.pad(part, (0, -len(part) % 8)) for part in parts])


def unpack(packed, tensors):
    """The inverse of `pack`; `tensors` gives names, types and shapes."""
    found, start = dict(tensors), 0
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            end = start + tensor.nbytes
            found[name] = packed[start:end].view(tensor.dtype).view(tensor.shape)
            start = end + -end % 8
    return found


def say(text):
    """Print `text` on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def discard_output():
    """Discard further output to stdout, because the program that read it has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def rows(n):
    """The slice of n global rows that belongs to this process: the r-th of W contiguous parts."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def all_gather(x):
    """Concatenate the rows of all processes in rank order: (N, ...) -> (W N, ...).

    Without gradient. N must be the same on every process.
    """
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _Total(torch.autograd.Function):
    """The sum over processes. Every process's loss depends on it, so gradients are summed, too."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, grad):
        return total(grad)


def all_gather_with_grad(x):
    """Like `all_gather`, with gradient: (N, ...) -> (W N, ...).

    The gradient is that of the *sum* of the losses of all processes. DDP then averages over
    processes. If the loss of each process is the mean over its own rows, the result is therefore
    the gradient of the mean over all rows.
    """
    if world() == 1:
        return x
    parts = [torch.zeros_like(x)] * world()
    parts[rank()] = x
    return _Total.apply(torch.cat(parts))                       # the others' rows are added


def total(x):
    """Sum of a tensor over processes, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if world() > 1:
        dist.all_reduce(x)
    return x


def mean(x):
    """Mean of a tensor over processes, without gradient."""
    return total(x) / world()


def all_equal(value):
    """Whether all processes have an equal `value`, any object."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values.count(value) == len(values)


def any_process(flag, device):
    """Whether `flag` is true on at least one process; the same answer on every process."""
    if world() == 1:
        return bool(flag)
    return mean(torch.tensor(float(flag), device=device)).item() > 0


def wrap(module):
    """With several processes, wrap a module in DistributedDataParallel for training.

    Buffers are not broadcast: batch statistics belong to groups of images, not to processes.
    `average_buffers` combines them.
    """
    if world() > 1:
        module = DistributedDataParallel(module)
        module.broadcast_buffers = False        # an argument of this name is deprecated
    return module


def average_buffers(module):
    """Average the running batch statistics over processes, in place, before evaluating or saving.

    The running mean is linear in the batch statistics, so this equals one process that has seen
    all groups.
    """
    if world() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean(buffer))
