"""Ten classes of drawn patterns, so that every script runs with nothing to download.

Colour must not tell two images apart: all are drawn in two nearly fixed greys with a slight tint, of either
polarity. What tells the classes apart is the pattern; what tells two images of a class apart is its angle, scale,
phase and warp. Drawn from a seed, equal on every machine to a grey level.
"""

import numpy as np

CLASSES = ("stripes", "checks", "dots", "rings", "grid", "zigzag", "smooth noise", "fine noise", "rays", "bricks")
SIZE = 32                                                       # pixels
TWO_PI = 2 * np.pi


def draw(n, seed):
    """Return `n` images (n, 3, 32, 32) uint8 and their labels (n,) int64, as many of each class as n allows."""
    labels = np.arange(n) % len(CLASSES)
    images = np.empty((n, 3, SIZE, SIZE), np.uint8)
    for label in range(len(CLASSES)):
        index = np.flatnonzero(labels == label)
        rng = np.random.default_rng([seed, label])
        images[index] = _paint(_pattern(CLASSES[label], len(index), rng), rng)
    return images, labels


def _uniform(rng, n, low, high):
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _pattern(name, n, rng):
    """Signed pattern values (n, 32, 32), about -1 to 1."""
    grid = (np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    period = _uniform(rng, n, 5, 10)                            # pixels
    angle, phase_s, phase_t = (_uniform(rng, n, 0, TWO_PI) for _ in range(3))

    if name == "fine noise":
        white = rng.standard_normal((n, SIZE + 1, SIZE + 1), np.float32)
        return (white[:, 1:, 1:] + white[:, 1:, :-1] + white[:, :-1, 1:] + white[:, :-1, :-1]) / 2
    if name == "smooth noise":                                  # waves of all directions, about one period
        total = np.zeros((n, SIZE, SIZE), np.float32)
        for _ in range(6):
            direction, phase, stretch = _uniform(rng, n, 0, TWO_PI), _uniform(rng, n, 0, TWO_PI), _uniform(rng, n, .8, 1.6)
            wave = TWO_PI / (period * stretch)
            total += np.sin(wave * np.cos(direction) * x + wave * np.sin(direction) * y + phase)
        return total / 2

    # every other pattern is a function of warped, rotated coordinates s, t in radians (one period is 2 pi)
    for _ in range(2):                                          # bend x by y, then y by x
        bend = _uniform(rng, n, .5, 1.6) * np.sin(TWO_PI / _uniform(rng, n, 16, 40) * y + _uniform(rng, n, 0, TWO_PI))
        x, y = y, x + bend
    if name in ("rings", "rays"):                               # around a centre inside the image
        x, y = x - _uniform(rng, n, -9, 9), y - _uniform(rng, n, -9, 9)
        if name == "rings":
            return np.sin(TWO_PI / period * np.hypot(x, y) + phase_s)
        return np.sin(np.round(_uniform(rng, n, 5, 10)) * np.arctan2(y, x) + phase_s)
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
    if name == "bricks":                                        # rows of cells, every second row shifted by a half
        row = np.floor(t / TWO_PI)
        return 2 * np.maximum(np.cos(t), np.cos(.5 * s + np.pi * (row % 2))) - 1.5
    raise ValueError(f"unknown texture {name}")


def _paint(pattern, rng):
    """Signed patterns (n, 32, 32) as images (n, 3, 32, 32) uint8: two greys, a slight tint, a little noise."""
    n = len(pattern)
    value = np.tanh(2.5 * pattern * np.sign(_uniform(rng, n, -1, 1)))           # either polarity
    tint = rng.uniform(-.03, .03, (2, n, 3, 1, 1)).astype(np.float32)
    middle, swing = .5 + _uniform(rng, n, -.04, .04), _uniform(rng, n, .14, .2)
    image = (middle + swing * value)[:, None] + np.where(value[:, None] > 0, tint[0], tint[1])
    image += .02 * rng.standard_normal((n, 1, SIZE, SIZE), np.float32)
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)
