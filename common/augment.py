"""Augmentations (Sec. 4): batched, on the device of the images, with parameters drawn per image.

Parameters are drawn on the CPU from (seed, step) for the whole global batch, and each process takes
its rows, so they do not depend on the number of workers or processes, or on resuming. The order of
the jitter's operations is drawn per batch and view; torchvision draws it per image.
"""

import functools
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, ddp

# Channel means and standard deviations of images in [0, 1].
NORMALISE = {"imagenet": ((.485, .456, .406), (.229, .224, .225)),
             "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010)),
             "textures": ((.5, .5, .5), (.21, .21, .21)),
             "unit": ((0., 0., 0.), (1., 1., 1.))}              # none: SimCLR
# The operations after the random resized crop, in the released order, with their probabilities.
STACKS = {
    "moco_v1": {"gray": .2, "jitter": 1., "flip": .5},          # He et al. 2020
    "moco_v2": {"jitter": .8, "gray": .2, "blur": .5, "flip": .5},              # Chen et al. 2020c
    "simclr": {"flip": .5, "jitter": .8, "gray": .2, "blur": .5},               # Chen et al. 2020a
    "instdisc_cifar10": {"jitter": 1., "gray": .2},             # Wu et al. 2018; ImageNet: moco_v1
    "weak": {"flip": .5},                                       # supervised, linear probe
    "none": {}}
INDEXED = ("blur", "flip", "gray")              # drawn as the indices of the images they change
GRAY = (.2989, .587, .114)                                      # ITU-R 601, as in PIL
BLUR_SIGMA = (.1, 2.)                                           # pixels
BLUR_RADIUS = 8                                                 # pixels: 4 sigma
CPU_CACHE = 8 * 3 * 224 ** 2                                    # values that fit into a CPU's cache


def generator(purpose, *key):
    """A numpy generator for a purpose (a word) and a tuple of integers, such as (seed, step).

    The purpose keeps keys of different lengths apart: numpy ignores trailing zeros of a seed.
    """
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


def device_generator(device, purpose, *key):
    """A torch generator on `device` for large draws, with keys as in `generator`."""
    seed = int(generator(purpose, *key).integers(2 ** 32))      # CPU generators use 32 bits
    return torch.Generator(device).manual_seed(seed)


def uniform(shape, device, purpose, *key):
    """Many uniform float32 numbers in [0, 1), drawn on `device`. On a CPU, numpy is faster."""
    if device.type == "cpu":
        return torch.from_numpy(generator(purpose, *key).random(shape, np.float32))
    return torch.rand(shape, device=device, generator=device_generator(device, purpose, *key))


def jitter_strength(s):
    """Brightness, contrast, saturation and hue for SimCLR's strength s (Table 2 (b)).

    MoCo v2 has s = 1/2.
    """
    return .8 * s, .8 * s, .8 * s, .2 * s


def crop_boxes(height, width, u, area, ratio=(3 / 4, 4 / 3)):
    """Random resized crops as torchvision draws them: boxes (n, 4) int64, in pixels.

    A box is (top, left, height, width). `u` (n, 22) is uniform in [0, 1): ten tries of area and
    aspect ratio, then the position. If no try fits, the largest centred crop within `ratio`.
    `area` (lo, hi) is a share of the image's area.
    """
    area = height * width * (area[0] + u[:, :10] * (area[1] - area[0]))         # (n, 10)
    log_ratio = np.log(ratio)
    aspect = np.exp(log_ratio[0] + u[:, 10:20] * (log_ratio[1] - log_ratio[0]))
    w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first, n = fits.argmax(1), np.arange(len(u))
    w, h, fits = w[n, first], h[n, first], fits.any(1)
    w = np.where(fits, w, min(width, round(height * ratio[1])))
    h = np.where(fits, h, min(height, round(width / ratio[0])))
    top = np.where(fits, np.floor(u[:, 20] * (height - h + 1)), (height - h) // 2)
    left = np.where(fits, np.floor(u[:, 21] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def resize(x, size):
    """Antialiased bilinear resizing: (3, H, W) or (n, 3, H, W) uint8 -> (..., 3, *size) uint8."""
    if x.ndim == 3:
        return resize(x[None], size)[0]
    x = x.contiguous(memory_format=torch.channels_last)         # fastest in this layout
    if x.device.type != "cpu":                                  # PyTorch has no uint8 kernel there
        x = x.float()
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).byte()


def _resize_weights(start, length, source, size):
    """The antialiased bilinear filter of torchvision's resize, (n, size, source)."""
    start, end = start[:, None, None], (start + length)[:, None, None]
    step = (end - start) / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + .5) * step
    pixel = torch.arange(source, device=start.device) + .5
    weight = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * (pixel > start) * (pixel < end)
    return weight / weight.sum(2, keepdim=True)


def crop_resize(images, boxes, size):
    """Crop each image to its box and resize it: (n, 3, H, W) uint8 -> (n, 3, size, size) uint8.

    For small images in memory: two batched matrix products instead of n calls.
    """
    n, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.float().unbind(1)
    rows = _resize_weights(top, box_height, height, size)                       # (n, size, H)
    columns = _resize_weights(left, box_width, width, size)                     # (n, size, W)
    x = images.float().reshape(n, channels * height, width) @ columns.mT        # (n, 3 H, size)
    x = rows[:, None] @ x.view(n, channels, height, size)                       # (n, 3, size, size)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def grayscale(x):
    """(n, 3, H, W) -> (n, 1, H, W)"""
    red, green, blue = x.split(1, 1)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def _blend(x, other, factor):
    """factor x + (1 - factor) other, clamped, in place; one factor per image."""
    factor = factor.view(-1, 1, 1, 1)
    return x.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)


def brightness(x, factor):
    return x.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(x, factor):
    return _blend(x, grayscale(x.mean((2, 3), keepdim=True)), factor)


def saturation(x, factor):
    return _blend(x, grayscale(x), factor)


def hue(x, shift):
    """Rotate the hue of x (n, 3, H, W) in [0, 1] by `shift` (n,) turns, in [-.5, .5], in place."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)                            # (n, H, W)
    chroma = high - low
    # The sector of the colour circle depends on which channel is highest. Arithmetic instead of
    # where(), which is 20 times slower on a CPU.
    turn = torch.lerp(blue - red + 2 * chroma, red - green + 4 * chroma, (high - green).sign_())
    turn = torch.lerp(green - blue, turn, (high - red).sign_())
    turn.div_(chroma.clamp(min=1e-12)).div_(6).add_(shift.view(-1, 1, 1))
    sector = turn.sub_(turn.floor()).mul_(6)
    # Each channel is the lowest value plus the chroma times a trapezoid of the sector.
    shares = (sector - 3).abs_().sub_(1), 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_()
    for channel, share in zip((red, green, blue), shares):
        torch.addcmul(low, share.clamp_(0, 1), chroma, out=channel)
    return x


JITTER = (brightness, contrast, saturation, hue)


def blur(x, sigma, radius=BLUR_RADIUS, border="reflect"):
    """Gaussian blur with `sigma` (n,) pixels; `border` as in torch's pad."""
    n, channels, height, width = x.shape
    radius = min(radius, height - 1, width - 1)
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-.5 * (offset / sigma[:, None]) ** 2, 1).repeat_interleave(channels, 0)
    x = F.pad(x.reshape(1, n * channels, height, width), (radius,) * 4, mode=border)
    x = F.conv2d(x, kernel[:, None, None], groups=n * channels)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return x.view(n, channels, height, width)


class Augment(nn.Module):
    """The operations after the crop: uint8 views -> normalised float32 views.

    `stack` names the operations (STACKS), `jitter` their strengths (`jitter_strength`),
    `normalisation` the mean and deviation (NORMALISE). `blur` False leaves the blur out.
    """

    def __init__(self, stack, jitter=jitter_strength(.5), blur=True, normalisation="imagenet",
                 seed=0):
        super().__init__()
        if normalisation not in NORMALISE:
            known = ", ".join(NORMALISE)
            raise UserError(f"normalisation {normalisation}: expected one of {known}")
        self.operations = dict(STACKS[stack])
        if not blur:
            self.operations.pop("blur", None)
        self.jitter, self.seed = jitter, seed
        # SimCLR draws one sigma per batch and view, and pads with zeros.
        self.simclr = stack == "simclr"
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in NORMALISE[normalisation])
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self._sample = functools.lru_cache(maxsize=1)(self._sample)

    def _sample(self, step, batch, views):
        """The parameters of a global batch: a dict of arrays (views, batch, ...)."""
        rng, shape = generator("augment", self.seed, step), (views, batch)
        chance = dict(zip(("jitter", "blur", "flip", "gray"), rng.random((4, *shape))))
        chosen = {name: chance[name] < self.operations.get(name, 0) for name in chance}
        jittered = chosen.pop("jitter")
        width = np.array(self.jitter)
        low, high = 1 - width, 1 + width                        # factors are uniform in between
        low[:3] = np.maximum(0, low[:3])
        factors = rng.uniform(low, high, (*shape, 4)) - (0, 0, 0, 1)
        factors[~jittered] = (1, 1, 1, 0)
        sigma = rng.uniform(*BLUR_SIGMA, (views, 1) if self.simclr else shape)
        return {**chosen, "sigma": np.broadcast_to(sigma, shape).astype(np.float32),
                "factors": factors.astype(np.float32),
                "order": [rng.permutation(4).tolist() for _ in range(views)]}

    def draw(self, step, batch, views=1, rows=None):
        """The parameters of this process's images in a global batch: {(view, name): tensor}.

        `rows` are its images, a slice or indices, for each view (default: `ddp.rows(batch)`).
        `flip`, `gray` and `blur` are indices of images; `sigma` (n,) is in pixels. `factors` (n, 4)
        holds brightness, contrast, saturation (1 for none) and hue in turns (0 for none). `order`
        is that of the jitter, as a list.
        """
        sample, draws = self._sample(step, batch, views), {}
        for view, own in enumerate(rows or [ddp.rows(batch)] * views):
            for name in INDEXED:
                draws[view, name] = torch.from_numpy(np.flatnonzero(sample[name][view, own]))
            for name in ("sigma", "factors"):
                draws[view, name] = torch.from_numpy(sample[name][view, own])
            draws[view, "order"] = sample["order"][view]
        return draws

    def forward(self, x, step, batch=None):
        """x (V, n, 3, H, W) uint8 -> V views (n, 3, H, W) float32, channels_last.

        x is this process's part of a global batch of `batch` images (default: W n).
        """
        draws = self.draw(step, batch or x.shape[1] * ddp.world(), len(x))
        return self.transform_views(x, ddp.send(draws, x.device))

    def transform_views(self, x, draws):
        """Views (n, 3, H, W) float32 of x, V such uint8 tensors on the device of `draws`."""
        return [self._view(images, {name: value for (v, name), value in draws.items() if v == view})
                for view, images in enumerate(x)]

    def _view(self, x, draw):
        # On a CPU, a few images at a time, which fit in its cache: nearly twice as fast.
        size = max(1, CPU_CACHE // max(1, x[:1].numel()))
        if x.device.type != "cpu" or len(x) <= size:
            return self.transform(x, draw)
        out = []
        for start in range(0, len(x), size):
            end = start + size
            part = {"order": draw["order"], "sigma": draw["sigma"][start:end],
                    "factors": draw["factors"][start:end]}
            for name in INDEXED:
                index = draw[name]
                part[name] = index[(start <= index) & (index < end)] - start
            out.append(self.transform(x[start:end], part))
        return torch.cat(out)

    def transform(self, x, draw):
        """One view (n, 3, H, W) uint8 with its own parameters {name: tensor} -> float32.

        Raises UserError for other types, e.g. images that have been divided by 255 already.
        """
        if x.dtype != torch.uint8:
            raise UserError(f"images of type {x.dtype}: expected torch.uint8, 0 to 255")
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for name in self.operations:
            if name == "jitter":
                for i in draw["order"]:
                    x = JITTER[i](x, draw["factors"][:, i])
                continue
            index = draw[name]
            if not len(index):
                continue
            if name == "gray":
                x[index] = grayscale(x[index])
            elif name == "flip":
                x[index] = x[index].flip(3)
            else:
                simclr = (x.shape[3] // 20, "constant") if self.simclr else ()  # 23 taps at 224
                x[index] = blur(x[index], draw["sigma"][index], *simclr)
        return x.sub_(self.mean).div_(self.std).to(memory_format=torch.channels_last)
