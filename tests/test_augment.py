"""Each operation against torchvision's with the same parameter; what is drawn against what is stated."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from scipy.stats import kstest

from common import augment

GREY_LEVELS = 1.2                                               # of 255


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def assert_equals(ours, theirs, name, most=GREY_LEVELS):
    """Images in [0, 1] (n, 3, H, W) against a list of PIL images or tensors in [0, 1]."""
    theirs = torch.stack([F.to_dtype(F.to_image(t), torch.float32, scale=True) for t in theirs])
    assert (ours - theirs).abs().max() * 255 <= most, name


@pytest.mark.parametrize("name, theirs", [("brightness", F.adjust_brightness), ("contrast", F.adjust_contrast),
                                          ("saturation", F.adjust_saturation)])
def test_jitter_equals_torchvision(photos, name, theirs):
    """On tensors for any factor; on PIL images, which round to grey levels, in the range of MoCo v2."""
    factors = torch.tensor([0., .2, .6, .9, 1., 1.1, 1.4, 1.8])
    ours = getattr(augment, name)(photos / 255, factors)
    assert_equals(ours, [theirs(x / 255, f.item()) for x, f in zip(photos, factors)], name, most=.05)
    assert_equals(ours[2:7], [theirs(pil(x), f.item()) for x, f in zip(photos[2:7], factors[2:7])], name)


def test_hue_equals_torchvision_on_tensors(photos):
    shifts = torch.tensor([-.5, -.2, -.1, 0., .05, .1, .2, .5])
    photos[0, :, :5] = 100                                      # grey pixels have no hue
    ours = augment.hue(photos / 255, shifts)
    assert_equals(ours, [F.adjust_hue(x / 255, s.item()) for x, s in zip(photos, shifts)], "hue", most=.01)


def test_gray_equals_torchvision_on_pil_images(photos):
    assert_equals(augment.grayscale(photos / 255), [F.rgb_to_grayscale(pil(x), 3) for x in photos], "gray")


def test_blur_equals_torchvision_on_tensors(photos):
    sigma = torch.linspace(.1, 2, 8)
    size = 2 * augment.BLUR_RADIUS + 1
    theirs = [F.gaussian_blur(x / 255, [size, size], [s.item(), s.item()]) for x, s in zip(photos, sigma)]
    assert_equals(augment.blur(photos / 255, sigma), theirs, "blur", most=.01)


@pytest.mark.parametrize("area", [(.2, 1.), (.02, .1)])
def test_crop_equals_torchvision_on_pil_images(photos, area):
    """In grey levels: PIL rounds between its two passes."""
    boxes = augment.crop_boxes(48, 40, augment.generator(0).random((8, 22)), area)
    ours = augment.crop_resize(photos, torch.from_numpy(boxes), 32) / 255
    theirs = [F.resized_crop(pil(x), *box, [32, 32], antialias=True) for x, box in zip(photos, boxes.tolist())]
    assert_equals(ours, theirs, "crop")


def test_flip_and_normalisation(photos):
    stack = augment.Augment("weak", scale="imagenet")
    flip = torch.arange(8) % 2 == 0
    ours = stack.apply_draws(photos, {"flip": flip})
    mean, std = augment.NORMALISE["imagenet"]
    theirs = [F.normalize((F.horizontal_flip(x) if f else x) / 255, mean, std) for x, f in zip(photos, flip)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-5)


def test_crops_are_drawn_as_stated():
    n, area = 40_000, (.2, 1.)
    top, left, h, w = augment.crop_boxes(300, 400, augment.generator(1).random((n, 22)), area).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 400).all()
    # as torchvision's own draws, in area, aspect ratio and place
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(torch.empty(3, 300, 400), area, (3 / 4, 4 / 3)) for _ in range(8000)]).T
    for ours, other in ((h * w, theirs[2] * theirs[3]), (w / h, theirs[3] / theirs[2]), (top, theirs[0]), (left, theirs[1])):
        assert kstest(ours, other).pvalue > 1e-4
    assert abs((h * w).min() / 120_000 - .2) < .01 and .74 < (w / h).min() and (w / h).max() < 1.35


def test_crop_falls_back_to_the_centre_where_no_try_fits():
    box = augment.crop_boxes(10, 1000, augment.generator(0).random((50, 22)), (.9, 1.))
    assert (box == [0, 493, 10, 13]).all()


@pytest.mark.parametrize("stack, jitter, gray, blur, flip", [
    ("moco_v2", .8, .2, .5, .5), ("moco_v1", 1., .2, 0., .5), ("weak", 0., 0., 0., .5), ("none", 0., 0., 0., 0.)])
def test_operations_are_drawn_with_the_stated_frequency_and_range(stack, jitter, gray, blur, flip):
    n, strength = 20_000, (.4, .4, .4, .1)
    draw = augment.Augment(stack, strength).draw(2, n, 0, 0)
    applied = (draw["factors"] != torch.tensor([1., 1., 1., 0.])).any(2)
    for name, chosen, p in (("jitter", applied, jitter), ("gray", draw["gray"], gray), ("blur", draw["sigma"] > 0, blur),
                            ("flip", draw["flip"], flip)):
        assert abs(chosen.float().mean() - p) <= 5 * math.sqrt(p * (1 - p) / (2 * n)), name
    for i, (low, high) in enumerate([(.6, 1.4)] * 3 + [(-.1, .1)]):
        values = draw["factors"][..., i][applied].numpy()
        assert not jitter or kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
    assert not blur or kstest(draw["sigma"][draw["sigma"] > 0].numpy(), "uniform", (.1, 1.9)).pvalue > 1e-4
    # the choices are independent of one another, and of the two views
    chosen = torch.stack([applied[0], applied[1], draw["gray"][0], draw["sigma"][0] > 0, draw["flip"][0], draw["flip"][1]])
    chosen = chosen[chosen.any(1) & ~chosen.all(1)].float()
    assert len(chosen) < 2 or (torch.corrcoef(chosen) - torch.eye(len(chosen))).abs().max() < .05


def test_jitter_strength_is_table_2b():
    for s, expected in ((1., (.8, .8, .8, .2)), (.5, (.4, .4, .4, .1)), (.125, (.1, .1, .1, .025))):
        assert augment.jitter_strength(s) == pytest.approx(expected)
    factors = augment.Augment("moco_v1", augment.jitter_strength(2.)).draw(1, 5000, 0, 0)["factors"]
    assert factors[..., :3].min() >= 0                          # as torchvision: U(max(0, 1 - b), 1 + b)


def test_operations_come_in_the_released_order(photos):
    """One image under known draws, step by step with torchvision's tensor functions."""
    for stack, order in (("moco_v2", "jitter gray blur flip"), ("moco_v1", "gray jitter flip")):
        module = augment.Augment(stack, scale="textures")
        one = torch.tensor([True])
        draw = {"flip": one, "gray": one, "sigma": torch.tensor([1.3]), "factors": torch.tensor([[.7, 1.3, 1.2, .1]]),
                "order": torch.tensor([2, 0, 3, 1])}
        x = photos[:1] / 255
        for name in order.split():
            if name == "jitter":
                for i in (2, 0, 3, 1):
                    change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[i]
                    x = change(x, draw["factors"][0, i].item())
            x = {"gray": lambda x: F.rgb_to_grayscale(x, 3), "blur": lambda x: F.gaussian_blur(x, [17, 17], [1.3, 1.3]),
                 "flip": F.horizontal_flip}.get(name, lambda x: x)(x)
        ours = module.apply_draws(photos[:1], draw) * module.std + module.mean
        assert (ours - x).abs().max() * 255 < .05, stack


def test_processes_take_their_rows_of_one_draw(photos):
    x, module = torch.stack([photos, photos.flip(0)]), augment.Augment("moco_v2")
    whole = module(x, 3, 5, batch=8)
    for rows in (slice(0, 4), slice(4, 8)):
        for part, view in zip(module(x[:, rows], 3, 5, 8, rows), whole):
            torch.testing.assert_close(part, view[rows], rtol=0, atol=1e-5)
    assert torch.equal(module(x, 3, 5, 8)[0], whole[0])
    assert not torch.equal(module(x, 3 + 2 ** 32, 5, 8)[0], whole[0])
    assert not torch.equal(module(x, 3, 6, 8)[0], whole[0])


def test_a_few_images_at_a_time_are_augmented_like_all_at_once(photos, monkeypatch):
    """What a CPU does for the sake of its cache; also where a part has nothing to blur or to flip."""
    x = photos.expand(2, *photos.shape)
    stack = augment.Augment("moco_v2")
    whole = stack(x, 0, 5, 8)
    monkeypatch.setattr(augment, "CACHED", photos[0].numel())
    for a, b in zip(whole, stack(x, 0, 5, 8)):
        assert torch.allclose(a, b, atol=1e-5)
