"""Augmentations, batched, on the device of the images, with parameters drawn per image (facts of each stack below).

Parameters are drawn on the CPU from (seed, step), for the whole global batch, and each process takes its rows: so the
number of workers, of processes, and a resumption change nothing of what is seen. One thing is drawn per batch and view
where torchvision draws it per image: the order of jitter's four operations.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# channel means and standard deviations of images in [0, 1]
NORMALISE = {"imagenet": ((.485, .456, .406), (.229, .224, .225)),
             "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010)),
             "textures": ((.5, .5, .5), (.17, .17, .17)),
             "unit": ((0., 0., 0.), (1., 1., 1.))}              # none at all: SimCLR's images stay in [0, 1]
# what follows the random resized crop: operation and probability, in the released order
STACKS = {"moco_v1": (("gray", .2), ("jitter", 1.), ("flip", .5)),                   # He et al. 2020
          "moco_v2": (("jitter", .8), ("gray", .2), ("blur", .5), ("flip", .5)),     # Chen et al. 2020c; strong
          "simclr": (("flip", .5), ("jitter", .8), ("gray", .2), ("blur", .5)),      # Chen et al. 2020a
          "instdisc_cifar10": (("jitter", 1.), ("gray", .2)),                        # Wu et al. 2018, whose ImageNet is v1's
          "weak": (("flip", .5),),                                                   # supervised, linear probe
          "none": ()}
GRAY = (.2989, .587, .114)                                      # ITU-R 601, as PIL and torchvision
BLUR_SIGMA = (.1, 2.)                                           # pixels
CACHED = 8 * 3 * 224 ** 2                                       # values of images worked on at once on a CPU
BLUR_RADIUS = 8                                                 # 4 sigma: PIL's has no sharp end, SimCLR's has 11


def generator(*key):
    """A numpy generator for a tuple of integers such as (seed, step, purpose); unequal keys give unrelated streams."""
    return np.random.default_rng(key)


def jitter_strength(s):
    """Brightness, contrast, saturation, hue for SimCLR's strength s, Table 2 (b); MoCo v2 is s = 1/2."""
    return .8 * s, .8 * s, .8 * s, .2 * s


def crop_boxes(height, width, u, area, ratio=(3 / 4, 4 / 3)):
    """Random resized crops: boxes (n, 4) int64, top, left, height, width, in pixels; torchvision's rule.

    `height`, `width` are numbers or (n,); `u` (n, 22) is uniform in [0, 1): ten tries at area and aspect ratio, then the
    place. If no try fits, the largest centred crop within `ratio`. `area` (lo, hi) is a share of the image's.
    """
    height, width = (np.broadcast_to(np.asarray(v, np.float64), len(u)) for v in (height, width))
    pixels = (height * width)[:, None] * (area[0] + u[:, :10] * (area[1] - area[0]))
    aspect = np.exp(math.log(ratio[0]) + u[:, 10:20] * (math.log(ratio[1]) - math.log(ratio[0])))
    w, h = np.round(np.sqrt(pixels * aspect)), np.round(np.sqrt(pixels / aspect))
    fits = (0 < w) & (w <= width[:, None]) & (0 < h) & (h <= height[:, None])
    first, n = fits.argmax(1), np.arange(len(u))
    w, h, fits = w[n, first], h[n, first], fits.any(1)
    w = np.where(fits, w, np.minimum(width, np.round(height * ratio[1])))
    h = np.where(fits, h, np.minimum(height, np.round(width / ratio[0])))
    top = np.where(fits, np.floor(u[:, 20] * (height - h + 1)), (height - h) // 2)
    left = np.where(fits, np.floor(u[:, 21] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def _resize_weights(start, length, source, size):
    """Rows of an antialiased bilinear filter, (n, size, source): what torchvision's resize of a crop computes."""
    scale = length[:, None, None] / size
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + .5) * scale
    pixel = torch.arange(source, device=start.device) + .5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def crop_resize(images, boxes, size):
    """Crop each image to its box and resize it: (n, 3, H, W) uint8, (n, 4) -> (n, 3, size, size) uint8.

    Two batched matrix products instead of n calls: for small images that are in memory already.
    """
    n, channels, height, width = images.shape
    boxes = boxes.to(images.device).float()
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], height, size)              # (n, size, H)
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], width, size)            # (n, size, W)
    x = images.float().reshape(n, channels * height, width) @ columns.mT        # (n, 3 H, size)
    x = rows[:, None] @ x.view(n, channels, height, size)                       # (n, 3, size, size)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _gray(x):
    return GRAY[0] * x[:, 0] + GRAY[1] * x[:, 1] + GRAY[2] * x[:, 2]            # (n, H, W)


def brightness(x, factor):
    return x.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(x, factor):
    factor = factor.view(-1, 1, 1, 1)
    mean = (x.mean((2, 3)) * x.new_tensor(GRAY)).sum(1).view(-1, 1, 1, 1)       # of the grey image
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x, factor):
    factor, gray = factor.view(-1, 1, 1, 1), _gray(x)[:, None]
    return x.mul_(factor).add_((1 - factor) * gray).clamp_(0, 1)


def hue(x, shift):
    """Rotate the hue by `shift` (n,) turns, in [-.5, .5]."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)                            # (n, H, W)
    chroma = high - low
    # sector of the colour circle: by the channel that is highest; arithmetic, as where() is 20 times slower on a CPU
    turn = torch.lerp(blue - red + 2 * chroma, red - green + 4 * chroma, (high - green).sign_())
    turn = torch.lerp(green - blue, turn, (high - red).sign_())
    turn.div_(chroma.clamp(min=1e-12)).div_(6).add_(shift.view(-1, 1, 1))
    sector = turn.sub_(turn.floor()).mul_(6)
    shares = (sector - 3).abs_().sub_(1), 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_()
    for channel, share in zip((red, green, blue), shares):      # each channel is low plus a trapezoid of the sector
        torch.addcmul(low, share.clamp_(0, 1), chroma, out=channel)
    return x


def grayscale(x):
    return _gray(x)[:, None].expand_as(x)


def blur(x, sigma, radius=BLUR_RADIUS, border="reflect"):
    """Gaussian blur with `sigma` (n,) pixels, `border` as in torch's pad: two convolutions, each channel its own."""
    n, channels, height, width = x.shape
    reach = min(radius, height - 1, width - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-.5 * (offset / sigma[:, None]) ** 2, 1).repeat_interleave(channels, 0)
    x = F.pad(x.reshape(1, n * channels, height, width), (reach,) * 4, mode=border)
    x = F.conv2d(x, kernel[:, None, None], groups=n * channels)
    return F.conv2d(x, kernel[:, None, :, None], groups=n * channels).view(n, channels, height, width)


class Augment(nn.Module):
    """What follows the crop: uint8 views (V, N, 3, H, W) -> V normalised views (N, 3, H, W) float32, channels_last.

    `stack` names the operations (STACKS), `jitter` their strengths (`jitter_strength`), `blur` whether there is any.
    `scale` names the normalisation (NORMALISE). Of the global batch's parameters the images x have those of `rows`.
    """

    def __init__(self, stack, jitter=jitter_strength(.5), blur=True, scale="imagenet"):
        super().__init__()
        self.operations = tuple((name, p) for name, p in STACKS[stack] if blur or name != "blur")
        self.jitter, self.simclr = jitter, stack == "simclr"    # whose blur has one sigma per batch and view, and ends in 0
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISE[scale])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def draw(self, views, batch, seed, step):
        """The parameters of a global batch, a dict of tensors (views, batch, ...) on the CPU.

        `flip`, `gray` say whether; `factors` (..., 4) holds brightness, contrast, saturation (1 is none) and hue in
        turns (0 is none); `sigma` is the blur's, in pixels (0 is none); `order` (views, 4) is jitter's, per view.
        """
        rng, p = generator(seed, step, 2), dict(self.operations)
        chance, shape = rng.random((4, views, batch)), (views, batch)
        width = np.array(self.jitter)                           # factors are uniform in [1 - width, 1 + width]
        factors = rng.uniform([*np.maximum(0, 1 - width[:3]), -width[3]], [*(1 + width[:3]), width[3]], (*shape, 4))
        factors[chance[0] >= p.get("jitter", 0)] = (1, 1, 1, 0)
        sigma = rng.uniform(*BLUR_SIGMA, (views, 1) if self.simclr else shape) * (chance[1] < p.get("blur", 0))
        draws = {"flip": chance[2] < p.get("flip", 0), "gray": chance[3] < p.get("gray", 0),
                 "sigma": sigma.astype(np.float32), "factors": factors.astype(np.float32),
                 "order": np.stack([rng.permutation(4) for _ in range(views)])}
        return {name: torch.from_numpy(value) for name, value in draws.items()}

    def apply_draws(self, x, draw):
        """One view (n, 3, H, W) uint8 under its own parameters, a dict of (n, ...): normalised, float32."""
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for name, _ in self.operations:
            if name == "jitter":
                factors = draw["factors"].to(x.device)
                for i in draw["order"].tolist():
                    x = (brightness, contrast, saturation, hue)[i](x, factors[:, i])
                continue
            chosen = (draw["sigma"] > 0 if name == "blur" else draw[name]).nonzero().flatten()
            index = chosen.to(x.device)                         # known on the CPU: nothing waits for the device
            if not len(index):
                continue
            if name == "gray":
                x[index] = grayscale(x[index])
            elif name == "blur":
                how = (x.shape[3] // 20, "constant") if self.simclr else ()         # 23 taps at 224 pixels
                x[index] = blur(x[index], draw["sigma"][chosen].to(x.device), *how)
            elif name == "flip":
                x[index] = x[index].flip(3)
        return x.sub_(self.mean).div_(self.std).to(memory_format=torch.channels_last)

    def forward(self, x, seed, step, batch, rows=slice(None)):
        return self.apply(x, self.draw(len(x), batch, seed, step), rows)

    def apply(self, x, draws, rows=slice(None)):
        """The views of x under the parameters that `rows` (a slice or indices) of a global batch have in `draws`."""
        # on a CPU a few images at a time, which its cache can hold: nearly twice as fast
        part = len(x[0]) if x.is_cuda else max(1, CACHED // x[0, 0].numel())
        return [torch.cat([self.apply_draws(images, {name: t[v] if name == "order" else t[v, rows][i * part:(i + 1) * part]
                                                     for name, t in draws.items()})
                           for i, images in enumerate(view.split(part))]) for v, view in enumerate(x)]
