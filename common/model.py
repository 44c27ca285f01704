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
        self.group = group

    def forward(self, x):                                       # (N, C, H, W)
        if not self.training or self.group is None or len(x) <= self.group:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        groups = x.split(self.group)
        n, m, out = len(groups), self.momentum, []
        for i, group in enumerate(groups):
            # Applied in turn, these momenta give every group the weight m / n.
            momentum = m / (n - m * (n - 1 - i))
            out.append(F.batch_norm(group, self.running_mean, self.running_var, self.weight,
                                    self.bias, True, momentum, self.eps))
        return torch.cat(out)


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
        return self.g(self.f(x))

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
