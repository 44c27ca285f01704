"""Encoders f and projection heads g: z = g(f(x)) (Sec. 2, Figure 1).

f is torchvision's ResNet without its classifier, so its state dict has torchvision's names. An
architecture is named as in torchvision (`resnet50`), plus `resnet10` for small machines (one
BasicBlock per stage). The suffix `-3x3` is for images of 32 pixels: 3x3 stem, no max-pool.
"""

import functools

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import UserError

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
HEADS = ("mlp", "none", "fixed", "deep", "narrow", "identity")


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with statistics over groups of `group` images.

    The groups belong to the run (the paper's 256 images on 8 GPUs are groups of 32), not to a
    process. So shuffling BN (He et al. 2020, Sec. 3.3) works in one process too, and W processes
    compute what one computes. The running statistics move once per step, by the mean over the
    groups. With `group` None this is ordinary batch normalisation.
    """

    def __init__(self, channels, group=None, **kwargs):
        super().__init__(channels, **kwargs)
        self.group, self.pending = group, None

    def forward(self, x):                                       # (N, C, H, W)
        if not self.training or self.group is None or len(x) <= self.group:
            return super().forward(x)
        if x.device.type == "cpu" or len(x) % self.group:
            return self.one_by_one(x)
        return self.batched(x)

    def one_by_one(self, x):
        """A call per group: fast on a CPU."""
        self.num_batches_tracked.add_(1)
        groups = x.split(self.group)
        n, m, out = len(groups), self.momentum, []
        for i, group in enumerate(groups):
            # Applied in turn, these momenta give every group the weight m / n.
            momentum = m / (n - m * (n - 1 - i))
            out.append(F.batch_norm(group, self.running_mean, self.running_var, self.weight,
                                    self.bias, True, momentum, self.eps))
        return torch.cat(out)

    def batched(self, x):
        """One call for all groups: few kernel launches, for GPUs.

        `update_statistics` moves the running statistics of all layers together.
        """
        out, mean, invstd = _Batched.apply(x, self.weight, self.bias, self.group, self.eps)
        count = self.group * x[0, 0].numel()
        self.pending = mean, invstd, count / (count - 1)
        return out


class _Batched(torch.autograd.Function):
    """Batch normalisation of n groups as one of n C channels: `(out, mean (n, C), invstd (n, C))`.

    The inner layout is (1, n C, pixels). The bias is added while copying back.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, group, eps):
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.shape = eps, (len(x) // group, x.shape[1], -1)
        y, weight = _to_channels(x, ctx.shape), weight.repeat(ctx.shape[0])
        z, mean, invstd = torch.native_batch_norm(y, weight, None, None, None, True, 0., eps)
        ctx.save_for_backward(y, weight, mean, invstd)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        torch.add(_from_channels(z, ctx.shape, x), bias[:, None, None], out=out)
        mean, invstd = mean.view(ctx.shape[:2]), invstd.view(ctx.shape[:2])
        ctx.mark_non_differentiable(mean, invstd)
        return out, mean, invstd

    @staticmethod
    def backward(ctx, grad, *_):
        y, weight, mean, invstd = ctx.saved_tensors
        grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            _to_channels(grad, ctx.shape), y, weight, None, None, mean, invstd, True, ctx.eps,
            (True, True, True))
        grad_x = _from_channels(grad_y, ctx.shape, grad)
        grad_weight, grad_bias = (g.view(ctx.shape[:2]).sum(0) for g in (grad_weight, grad_bias))
        return (grad_x.contiguous(memory_format=torch.channels_last), grad_weight, grad_bias, None,
                None)


def _to_channels(x, shape):
    n, C, _ = shape
    return x.permute(0, 2, 3, 1).reshape(n, -1, C).transpose(1, 2).reshape(1, n * C, -1)


def _from_channels(y, shape, like):
    N, C, H, W = like.shape
    return y.view(shape).transpose(1, 2).unflatten(1, (-1, H, W)).flatten(0, 1).permute(0, 3, 1, 2)


@torch.no_grad()
def update_statistics(module):
    """Move the running statistics by the mean over groups, after `GroupBatchNorm2d.batched`."""
    layers = [m for m in module.modules() if isinstance(m, GroupBatchNorm2d) and m.pending]
    if not layers:
        return
    mean, invstd, unbiased = zip(*(layer.pending for layer in layers))
    channels = [layer.num_features for layer in layers]
    mean = list(torch.cat(mean, 1).mean(0).split(channels))
    var = list((torch.cat(invstd, 1) ** -2 - layers[0].eps).mean(0).split(channels))
    torch._foreach_mul_(var, unbiased)
    momentum = layers[0].momentum
    torch._foreach_lerp_([layer.running_mean for layer in layers], mean, momentum)
    torch._foreach_lerp_([layer.running_var for layer in layers], var, momentum)
    torch._foreach_add_([layer.num_batches_tracked for layer in layers], 1)
    for layer in layers:
        layer.pending = None


class SmallConv2d(nn.Conv2d):
    """A convolution that leaves out the kernel's rows and columns that only see padding.

    The result is the same. In the last stage of a ResNet on 32 pixels, where images are 1x1, this
    leaves one of nine weights: a step of ResNet-10 takes a third less time.
    """

    def forward(self, x):
        (top, bottom), (left, right) = (self._used(axis, x.shape[2 + axis]) for axis in (0, 1))
        weight = self.weight
        if (bottom - top, right - left) == self.kernel_size:
            return super().forward(x)
        padding = self.padding[0] - top, self.padding[1] - left
        return F.conv2d(x, weight[:, :, top:bottom, left:right], self.bias, self.stride, padding)

    def _used(self, axis, length):
        """The range of the kernel's rows (axis 0) or columns that touch an image of that length."""
        kernel, padding, stride = self.kernel_size[axis], self.padding[axis], self.stride[axis]
        outputs = (length + 2 * padding - kernel) // stride + 1
        first = max(0, padding - (outputs - 1) * stride)
        last = min(kernel, length + padding)
        # The padding must become smaller on both sides alike.
        same = (length + 2 * (padding - first) - (last - first)) // stride + 1 == outputs
        return (first, last) if same else (0, kernel)


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
        f = getattr(torchvision.models, name)(weights=None, norm_layer=norm)
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
    if kind == "identity":
        return nn.Identity()
    hidden = {"none": [], "deep": [width, width], "narrow": [width // 16]}.get(kind, [width])
    layers = []
    for before, after in zip([width, *hidden], hidden):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    g = nn.Sequential(*layers, nn.Linear([width, *hidden][-1], dim))
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
        h = self.f(x)
        update_statistics(self.f)
        return self.g(h)

    def _layers(self, kind):
        return [m for m in self.g.modules() if isinstance(m, kind)]

    def check_feature(self, feature):
        """Raises UserError if `feature` is `hidden` and g has no hidden layer."""
        if feature == "hidden" and not self._layers(nn.ReLU):
            raise UserError("--feature hidden: the head of this encoder has no hidden layer")

    def width(self, feature="h"):
        """The number of dimensions of `feature`, as in `embed`."""
        self.check_feature(feature)
        linear = self._layers(nn.Linear)
        if feature == "h" or not linear:
            return self.f.width
        return linear[0 if feature == "hidden" else -1].out_features

    def embed(self, x, feature="h"):
        """Features of x (N, 3, H, W) by name: `h`, `hidden` or `z`.

        `h` = f(x) (N, width). `hidden` is the activation after g's first ReLU, which Figure 2 (d)
        calls z. `z` = g(h) (N, D). Raises UserError as `check_feature` does.
        """
        self.check_feature(feature)
        h = self.f(x)
        if feature == "h":
            return h
        if feature == "z":
            return self.g(h)
        first = next(i for i, layer in enumerate(self.g) if isinstance(layer, nn.ReLU))
        return self.g[:first + 1](h)
