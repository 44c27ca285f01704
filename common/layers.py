"""Layers of the encoders: group batch normalisation, and convolutions that are fast on a CPU."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import ddp


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with statistics over groups of `group` images.

    The size of a group does not depend on the number of processes (32, as with 256 images on 8
    GPUs). So shuffling BN (He et al. 2020, Sec. 3.3) works in one process too, and W processes
    compute what one computes. The running statistics move once per step, by the mean over the
    groups. With `group` None this is ordinary batch normalisation.
    """

    def __init__(self, channels, group=None, **kwargs):
        super().__init__(channels, **kwargs)
        self.group = group

    def forward(self, x):                                       # (N, C, H, W)
        if not self.training or self.group is None or len(x) <= self.group:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        if x.is_cuda and len(x) % self.group == 0:
            return self.together(x)
        return self.one_by_one(x)

    def one_by_one(self, x):
        """A call per group."""
        groups = x.split(self.group)
        n, m, out = len(groups), self.momentum, []
        for i, group in enumerate(groups):
            # Applied in turn, these momenta give every group the weight m / n: with
            # d_i = n - m (n - 1 - i), the i-th is m / d_i, and 1 minus it is d_(i-1) / d_i.
            momentum = m / (n - m * (n - 1 - i))
            out.append(F.batch_norm(group, self.running_mean, self.running_var, self.weight,
                                    self.bias, True, momentum, self.eps))
        return torch.cat(out)

    def together(self, x):
        """All groups, on a GPU: a step takes 16 to 23 % less time than with `one_by_one`."""
        n = len(x) // self.group
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():                   # `_NormaliseGroups` differentiates them too
            pixels = x.permute(0, 2, 3, 1).reshape(n, -1, x.shape[1])           # (n, P, C), a view
            count = pixels.shape[1]
            # Statistics (n, C) are float32 also where x is bf16.
            mean = pixels.sum(1, dtype=torch.float32) / count
            square = torch.linalg.vector_norm(pixels, dim=1, dtype=torch.float32).square() / count
            var = (square - mean.square()).clamp_(0)
            self.running_mean.lerp_(mean.mean(0), self.momentum)
            self.running_var.lerp_(var.mean(0) * (count / (count - 1)), self.momentum)
        return _NormaliseGroups.apply(x, self.weight, self.bias, mean, (var + self.eps).rsqrt(),
                                      self.eps)


class _NormaliseGroups(torch.autograd.Function):
    """Normalises n groups of images on a GPU: x (N, C, H, W) channels_last -> y like x.

    `mean` and `invstd` (n, C) are the statistics of x. The operators are those of
    nn.SyncBatchNorm; for the statistics, PyTorch's general reductions are faster.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, eps):
        n, y = len(mean), torch.empty_like(x)
        for part, m, s, out in zip(x.chunk(n), mean, invstd, y.chunk(n)):
            torch.batch_norm_elemt(part, weight, bias, m, s, eps, out=out)
        ctx.save_for_backward(x, weight, mean, invstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd = ctx.saved_tensors
        n, found = len(mean), []
        grad = grad.contiguous(memory_format=torch.channels_last)
        count = torch.full((1,), x.numel() // x.shape[1] // n, dtype=torch.int32, device=x.device)
        for dy, part, m, s in zip(grad.chunk(n), x.chunk(n), mean, invstd):
            sums = torch.batch_norm_backward_reduce(dy, part, m, s, weight, True, True, True)
            dx = torch.batch_norm_backward_elemt(dy, part, m, s, weight, *sums[:2], count)
            found.append([dx, *sums[2:]])
        dx, dweight, dbias = zip(*found)
        return (torch.cat(dx), torch.stack(dweight).sum(0), torch.stack(dbias).sum(0), None, None,
                None)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes; x is (N, C) or (N, C, H, W).

    Like nn.SyncBatchNorm, which runs on GPUs only. N may differ between processes.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or ddp.world() == 1:
            return super().forward(x)
        C, shape = self.num_features, (1, -1, *[1] * (x.ndim - 2))
        wide = x.to(self.running_mean.dtype)                    # float32 also where x is bf16
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        count = torch.full_like(mean[:1], x.numel() / C)
        parts = ddp.all_gather_with_grad(torch.cat([mean, var, count])[None])   # (W, 2 C + 1)
        means, variances, counts = parts.split([C, C, 1], 1)
        n, share = counts.sum(), counts / counts.sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # A momentum of None stands for the mean over all batches.
            weight = self.momentum
            if weight is None:
                weight = 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(var * n / (n - 1), weight)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)


class SmallConv2d(nn.Conv2d):
    """A convolution that is computed as a matrix product where its output is up to 2x2 pixels.

    The result is the same up to rounding. On a CPU, PyTorch's own convolutions are slow there, and
    they use weights that only see padding: eight of nine in the last stage of a ResNet on images of
    32 pixels, whose feature maps are 1x1. A step of ResNet-10 takes about half the time. On other
    devices, and under torch.compile, this is a plain convolution.
    """

    def forward(self, x):                                       # (N, C, H, W)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        sides = zip(x.shape[2:], self.kernel_size, self.padding, self.stride)
        shape = [(size + 2 * p - k) // s + 1 for size, k, p, s in sides]
        if math.prod(shape) > 4:
            return super().forward(x)
        pixels, crop = _windows(*x.shape[2:], self.kernel_size, self.padding, self.stride)
        # Negative padding crops. Unlike a slice, its gradient has the memory format of the weight.
        weight = F.pad(self.weight, crop) if any(crop) else self.weight
        weight = weight.permute(0, 2, 3, 1).flatten(1)          # (outputs, taps C)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)                 # (N, H W, C)
        x = F.pad(x, (0, 0, 0, max(pixels) + 1 - x.shape[1]))   # a pixel of zeros, if it is needed
        x = x.index_select(1, torch.tensor(pixels)).reshape(-1, weight.shape[1])
        return F.linear(x, weight, self.bias).unflatten(0, (-1, *shape)).permute(0, 3, 1, 2)


@functools.cache
def _windows(height, width, kernel, padding, stride):
    """Which pixels the taps of a convolution read, for all pixels of its output.

    Returns the indices of these pixels, with height * width for padding, and the negative padding
    that crops the kernel to the taps that see the image. The list of indices has an entry for each
    pixel of the output and tap, so this is for small outputs.
    """
    sides = []
    for size, k, p, s in zip((height, width), kernel, padding, stride):
        starts = range(-p, size + p - k + 1, s)                 # one for each pixel of the output
        taps = [tap for tap in range(k) if any(0 <= start + tap < size for start in starts)]
        sides.append((starts, range(taps[0], taps[-1] + 1), k - 1 - taps[-1]))
    (tops, rows, below), (lefts, columns, right) = sides
    pixels = []
    for top, left, row, column in itertools.product(tops, lefts, rows, columns):
        y, x = top + row, left + column
        inside = 0 <= y < height and 0 <= x < width
        pixels.append(y * width + x if inside else height * width)
    return pixels, (-columns[0], -right, -rows[0], -below)
