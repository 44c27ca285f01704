"""Encoders f and projection heads g: z = g(f(x)) (Sec. 2, Figure 1).

f is torchvision's ResNet without its classifier, so its state dict has torchvision's names. An
architecture is named as in torchvision (`resnet50`), plus `resnet10` for small machines (one
BasicBlock per stage). The suffix `-3x3` is for images of 32 pixels: 3x3 stem, no max-pool.
"""

import functools

import torchvision
from torch import nn

from common import UserError
from common.layers import GroupBatchNorm2d, SmallConv2d

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
HEADS = ("mlp", "none", "fixed", "deep", "narrow", "identity")


def resnet(arch, bn_group=None, norm=None, zero_init_residual=False):
    """The encoder f: images (N, 3, H, W) -> h (N, width), after pooling; width is 512 or 2048.

    Batch normalisation is `norm`, by default `GroupBatchNorm2d` with groups of `bn_group` images.
    Initialised as in torchvision, from torch's global generator; with `zero_init_residual`,
    residual branches begin at zero. Raises UserError if `arch` is unknown.
    """
    name = arch.removesuffix("-3x3")
    if name not in ARCHS:
        raise UserError(f"--arch {arch}: unknown; expected one of {', '.join(ARCHS)}, "
                        "optionally with the suffix -3x3")
    options = {"norm_layer": norm or functools.partial(GroupBatchNorm2d, group=bn_group),
               "zero_init_residual": zero_init_residual}
    if name == "resnet10":
        block = torchvision.models.resnet.BasicBlock
        f = torchvision.models.ResNet(block, [1, 1, 1, 1], **options)
    else:
        f = torchvision.models.get_model(name, **options)
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
    to `dim`; what the paper's text calls g is the layers before it (docs/choices.md).
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
    """The MLP on h (N, width) whose state dict has the names of `state`: restores a saved head.

    Covers `nn.Sequential` of Linear, BatchNorm1d and ReLU layers; ReLU layers have no entries in a
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
        for i, layer in enumerate(self.g.children(), 1):
            if isinstance(layer, nn.ReLU):
                return self.g[:i]
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
