"""Encoders f and projection heads g: z = g(f(x)) (Sec. 2, Figure 1).

f is torchvision's ResNet without its classifier, so its state dict has torchvision's names. An
architecture is named as in torchvision (`resnet50`), plus `resnet10` for small machines (one
BasicBlock per stage). The suffix `-3x3` is for images of 32 pixels: 3x3 stem, no max-pool.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import UserError

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
HEADS = ("mlp", "none", "fixed", "deep", "narrow", "identity")


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


def resnet(arch, bn_group=None, norm=None):
    """The encoder f: images (N, 3, H, W) -> h (N, width), after pooling; width is 512 or 2048.

    Batch normalisation is `norm`, by default `GroupBatchNorm2d` with groups of `bn_group` images.
    Initialised as in torchvision, from torch's global generator. Raises UserError if `arch` is
    unknown.
    """
    name = arch.removesuffix("-3x3")
    if name not in ARCHS:
        raise UserError(f"--arch {arch}: unknown; expected one of {', '.join(ARCHS)}, "
                        "optionally with the suffix -3x3")
    norm = norm or functools.partial(GroupBatchNorm2d, group=bn_group)
    if name == "resnet10":
        block = torchvision.models.resnet.BasicBlock
        f = torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=norm)
    else:
        f = torchvision.models.get_model(name, norm_layer=norm)
    for module in f.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = SmallConv2d      # the same parameters, another forward pass
    f.width, f.fc = f.fc.in_features, nn.Identity()
    if name != arch:
        f.conv1, f.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(f.conv1.weight, mode="fan_out", nonlinearity="relu")
    return f


def head(kind, width, dim=128):
    """The projection head g: h (N, width) -> z (N, dim). Table 1.

    `mlp`: fc-ReLU-fc. (a) `none`: one fc layer, the released code without its MLP. (b) `fixed`:
    the MLP with its hidden layer frozen at its uniform initialisation. (c) `deep`:
    fc-ReLU-fc-ReLU-fc. (d) `narrow`: the MLP with a hidden layer of width / 16 (2048 -> 128).
    `identity`: no layer at all, h itself is contrasted. Every row keeps the last layer, which maps
    to `dim`; the g of the paper's text is what precedes it (docs/choices.md).
    """
    if kind not in HEADS:
        raise UserError(f"head {kind}: expected one of {', '.join(HEADS)}")
    if kind == "identity":
        return nn.Identity()
    hidden = {"none": [], "deep": [width, width], "narrow": [width // 16]}.get(kind, [width])
    layers = []
    for after in hidden:
        layers += [nn.Linear(width, after), nn.ReLU(inplace=True)]
        width = after
    g = nn.Sequential(*layers, nn.Linear(width, dim))
    if kind == "fixed":
        g[0].requires_grad_(False)
    return g


def mlp_from(state, width):
    """The MLP on h (N, width) whose state dict has the names of `state`, to read a head back.

    Covers `nn.Sequential` of Linear, BatchNorm1d and ReLU layers; the latter have no entries in a
    state dict. An empty `state` gives the identity.
    """
    layers = []
    indices = [int(name.split(".")[0]) for name in state if name[:1].isdigit()]
    for i in range(max(indices, default=-1) + 1):
        weight = state.get(f"{i}.weight")
        if weight is None:
            layers.append(nn.ReLU(inplace=True))
        elif weight.ndim == 1:
            layers.append(nn.BatchNorm1d(width))
        else:                                   # a bias is redundant before batch normalisation
            bias = f"{i}.bias" in state or f"{i + 1}.running_mean" not in state
            layers.append(nn.Linear(width, len(weight), bias=bias))
            width = len(weight)
    return nn.Sequential(*layers) if layers else nn.Identity()


class Encoder(nn.Module):
    """z = g(f(x)): (N, 3, H, W) -> (N, D)."""

    def __init__(self, f, g):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x):
        return self.g(self.f(x))

    def _layers(self, feature):
        """The layers of g that lead to `feature`, as one module."""
        if feature == "h":
            return nn.Identity()
        if feature == "z":
            return self.g
        layers = []
        for layer in self.g.children():
            layers.append(layer)
            if isinstance(layer, nn.ReLU):
                return nn.Sequential(*layers)
        raise UserError("--feature hidden: the head of this encoder has no hidden layer")

    def width(self, feature="h"):
        """The number of dimensions of `feature`; names and errors are as in `embed`."""
        width = self.f.width
        for layer in self._layers(feature).modules():
            width = getattr(layer, "out_features", width)
        return width

    def embed(self, x, feature="h"):
        """Features of x (N, 3, H, W) by name: `h`, `hidden` or `z`.

        `h` = f(x) (N, width). `hidden` is the activation after g's first ReLU, which Figure 2 (d)
        calls z; a deep head has a second one, which is not probed. `z` = g(h) (N, D). Raises
        UserError if `feature` is `hidden` and g has no hidden layer.
        """
        return self.project(self.f(x), feature)

    def project(self, h, feature):
        """The feature that follows from h (N, width), as in `embed`."""
        return self._layers(feature)(h)
