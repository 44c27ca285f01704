"""Built-in images: ten classes of drawn patterns, so that every script runs without a download.

Classes differ in their pattern. Images of a class differ in angle, period, phase, distortion,
contrast and colour. Each image has two colours: a grey level and a chroma of random hue and
strength, which tell nothing about the class. Images are drawn from a seed, and are equal on all
machines up to one grey level. `python -m common.textures FILE` draws some of each class.
"""

import sys

import numpy as np

CLASSES = ("stripes", "checks", "dots", "rings", "grid", "zigzag", "smooth noise", "fine noise",
           "rays", "bricks")
SIZE = 32                                       # pixels
TWO_PI = 2 * np.pi
CONTRAST = .16, .32                             # half the difference of the two grey levels
CHROMA = .17                                    # length of the strongest chroma, RGB in [0, 1]
# Orthonormal directions of colour at constant luminance (weights of ITU-R 601).
LUMINANCE = np.array([.299, .587, .114])
RED_GREEN = np.array([.587, -.299, 0.]) / np.hypot(.587, .299)
BLUE_YELLOW = np.cross(LUMINANCE, RED_GREEN) / np.linalg.norm(LUMINANCE)


def draw(n, seed):
    """`n` images (n, 3, 32, 32) uint8 and their labels (n,) int64; classes take turns."""
    labels = np.arange(n) % len(CLASSES)
    images = np.empty((n, 3, SIZE, SIZE), np.uint8)
    for label, name in enumerate(CLASSES):
        index = np.flatnonzero(labels == label)
        rng = np.random.default_rng([seed, label])
        images[index] = _paint(_pattern(name, len(index), rng), rng)
    return images, labels


def _uniform(rng, n, low, high):
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _pattern(name, n, rng):
    """Signed pattern values (n, 32, 32), from about -1 to 1."""
    grid = (np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    period = _uniform(rng, n, 5, 10)                            # pixels
    angle, phase_s, phase_t = (_uniform(rng, n, 0, TWO_PI) for _ in range(3))

    if name == "fine noise":
        white = rng.standard_normal((n, SIZE + 1, SIZE + 1), np.float32)
        return (white[:, 1:, 1:] + white[:, 1:, :-1] + white[:, :-1, 1:] + white[:, :-1, :-1]) / 2
    if name == "smooth noise":                                  # waves in random directions
        total = np.zeros((n, SIZE, SIZE), np.float32)
        for _ in range(6):
            direction, phase = _uniform(rng, n, 0, TWO_PI), _uniform(rng, n, 0, TWO_PI)
            wave = TWO_PI / (period * _uniform(rng, n, .8, 1.6))
            total += np.sin(wave * np.cos(direction) * x + wave * np.sin(direction) * y + phase)
        return total / 2

    # All other patterns are functions of distorted coordinates: bend x along y, then y along x.
    for _ in range(2):
        strength, length = _uniform(rng, n, .5, 1.6), _uniform(rng, n, 16, 40)
        bend = strength * np.sin(TWO_PI / length * y + _uniform(rng, n, 0, TWO_PI))
        x, y = y, x + bend
    if name in ("rings", "rays"):                               # around a centre in the image
        x, y = x - _uniform(rng, n, -9, 9), y - _uniform(rng, n, -9, 9)
        if name == "rings":
            return np.sin(TWO_PI / period * np.hypot(x, y) + phase_s)
        return np.sin(np.round(_uniform(rng, n, 5, 10)) * np.arctan2(y, x) + phase_s)
    # Rotated coordinates s, t in radians; one period is 2 pi.
    s = TWO_PI / period * (np.cos(angle) * x + np.sin(angle) * y) + phase_s
    t = TWO_PI / period * (np.cos(angle) * y - np.sin(angle) * x) + phase_t
    if name == "stripes":
        return np.sin(s)
    if name == "checks":
        return 1.5 * np.sin(.7 * s) * np.sin(.7 * t)
    if name == "dots":
        return np.cos(s) + np.cos(t) - .6
    if name == "grid":
        return 2 * np.maximum(np.cos(s), np.cos(t)) - 1.3
    if name == "zigzag":
        return np.sin(s + 1.6 * np.arcsin(np.sin(.8 * t)))
    # Bricks: rows of cells, every second row shifted by half a cell.
    row = np.floor(t / TWO_PI)
    return 2 * np.maximum(np.cos(t), np.cos(.5 * s + np.pi * (row % 2))) - 1.5


def _paint(pattern, rng):
    """Patterns (n, 32, 32) as images (n, 3, 32, 32) uint8: two colours and some noise."""
    n = len(pattern)
    value = np.tanh(2.5 * pattern * np.sign(_uniform(rng, n, -1, 1)))           # either polarity
    middle, swing = .5 + _uniform(rng, n, -.04, .04), _uniform(rng, n, *CONTRAST)
    grey = middle + swing * value + .02 * rng.standard_normal(value.shape, np.float32)
    angle, strength = rng.uniform(0, TWO_PI, (2, n, 1)), rng.uniform(0, CHROMA, (2, n, 1))
    chroma = strength * (np.cos(angle) * RED_GREEN + np.sin(angle) * BLUE_YELLOW)   # (2, n, 3)
    first, second = chroma.astype(np.float32)[..., None, None]
    share = (1 + value[:, None]) / 2                            # of the first colour
    image = grey[:, None] + share * first + (1 - share) * second
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)


def contact_sheet(path, n=8):
    """Write a picture of `n` images of each class, in columns, at twice their size."""
    import torch                                                # nothing else needs these
    from torchvision.utils import save_image
    images, _ = draw(n * len(CLASSES), seed=0)
    twice = torch.from_numpy(images.repeat(2, 2).repeat(2, 3)) / 255
    save_image(twice, path, nrow=len(CLASSES), padding=0)


if __name__ == "__main__":
    contact_sheet(sys.argv[1])
