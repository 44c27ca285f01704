"""Each operation against torchvision's with the same parameter; the draws against their laws."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from scipy.stats import kstest
from torchvision.transforms import RandomResizedCrop

from common import UserError, augment
from common.model import head

GREY_LEVELS = 1.2                                               # of 255


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def assert_equals(ours, theirs, name, most=GREY_LEVELS):
    """Images in [0, 1] (n, 3, H, W) against a list of PIL images or tensors in [0, 1]."""
    theirs = [F.to_dtype(F.to_image(t), torch.float32, scale=True) for t in theirs]
    assert (ours - torch.stack(theirs)).abs().max() * 255 <= most, name


@pytest.mark.parametrize("name, theirs", [
    ("brightness", F.adjust_brightness), ("contrast", F.adjust_contrast),
    ("saturation", F.adjust_saturation)])
def test_jitter_equals_torchvision(photos, name, theirs):
    """On tensors for any factor; on PIL images, which round to grey levels, in MoCo v2's range."""
    factors = torch.tensor([0., .2, .6, .9, 1., 1.1, 1.4, 1.8])
    ours = getattr(augment, name)(photos / 255, factors)
    on_tensors = [theirs(x / 255, f.item()) for x, f in zip(photos, factors)]
    assert_equals(ours, on_tensors, name, most=.05)
    on_pil = [theirs(pil(x), f.item()) for x, f in zip(photos[2:7], factors[2:7])]
    assert_equals(ours[2:7], on_pil, name)


def test_hue_equals_torchvision_on_tensors(photos):
    shifts = torch.tensor([-.5, -.2, -.1, 0., .05, .1, .2, .5])
    photos[0, :, :5] = 100                                      # grey pixels have no hue
    ours = augment.hue(photos / 255, shifts)
    theirs = [F.adjust_hue(x / 255, s.item()) for x, s in zip(photos, shifts)]
    assert_equals(ours, theirs, "hue", most=.01)


def test_gray_equals_torchvision_on_pil_images(photos):
    theirs = [F.rgb_to_grayscale(pil(x), 3) for x in photos]
    assert_equals(augment.grayscale(photos / 255), theirs, "gray")


def test_blur_equals_torchvision_on_tensors(photos):
    sigma = torch.linspace(.1, 2, 8)
    size = 2 * augment.BLUR_RADIUS + 1
    theirs = [F.gaussian_blur(x / 255, [size, size], [s.item(), s.item()])
              for x, s in zip(photos, sigma)]
    assert_equals(augment.blur(photos / 255, sigma), theirs, "blur", most=.01)


@pytest.mark.parametrize("area", [(.2, 1.), (.02, .1)])
def test_crop_equals_torchvision_on_pil_images(photos, area):
    """In grey levels: PIL rounds between its two passes."""
    boxes = augment.crop_boxes(48, 40, augment.generator("test", 0).random((8, 22)), area)
    ours = augment.crop_resize(photos, torch.from_numpy(boxes), 32) / 255
    theirs = [F.resized_crop(pil(x), *box, [32, 32], antialias=True)
              for x, box in zip(photos, boxes.tolist())]
    assert_equals(ours, theirs, "crop")


def test_flip_and_normalisation_equal_torchvision(photos):
    stack = augment.Augment("weak", normalisation="imagenet")
    flip = torch.arange(8) % 2 == 0
    ours = stack.transform(photos, {"flip": flip.nonzero().flatten()})
    mean, std = augment.NORMALISE["imagenet"]
    flipped = [F.horizontal_flip(x) if f else x for x, f in zip(photos, flip)]
    theirs = torch.stack([F.normalize(x / 255, mean, std) for x in flipped])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_crops_are_drawn_as_stated():
    n, area = 40_000, (.2, 1.)
    boxes = augment.crop_boxes(300, 400, augment.generator("test", 1).random((n, 22)), area)
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 300).all() and (left + w <= 400).all()
    # Area, aspect ratio and position have the distributions of torchvision's own draws.
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 300, 400), area, (3 / 4, 4 / 3))
              for _ in range(8000)]
    their_top, their_left, their_h, their_w = np.array(theirs).T
    for ours, other in ((h * w, their_h * their_w), (w / h, their_w / their_h),
                        (top, their_top), (left, their_left)):
        assert kstest(ours, other).pvalue > 1e-4
    assert abs((h * w).min() / 120_000 - .2) < .01
    assert .74 < (w / h).min() and (w / h).max() < 1.35


def test_a_crop_is_centred_if_no_try_fits():
    box = augment.crop_boxes(10, 1000, augment.generator("test", 0).random((50, 22)), (.9, 1.))
    assert (box == [0, 493, 10, 13]).all()


def mask(index, n):
    """Indices as a mask (n,)."""
    return torch.zeros(n, dtype=torch.bool).index_fill(0, index, True)


@pytest.mark.parametrize("stack, jitter, gray, blur, flip", [
    ("moco_v2", .8, .2, .5, .5), ("moco_v1", 1., .2, 0., .5), ("weak", 0., 0., 0., .5),
    ("simclr", .8, .2, .5, .5), ("instdisc_cifar10", 1., .2, 0., 0.), ("none", 0., 0., 0., 0.)])
def test_operations_have_the_stated_frequency_and_range(stack, jitter, gray, blur, flip):
    n, strength = 20_000, (.4, .4, .4, .1)
    draws = augment.Augment(stack, strength).draw(0, n, views=2)
    draw = {name: torch.stack([mask(draws[view, name], n) for view in (0, 1)])
            for name in ("flip", "gray", "blur")}
    factors = torch.stack([draws[view, "factors"] for view in (0, 1)])
    jittered = (factors != torch.tensor([1., 1., 1., 0.])).any(2)
    for name, chosen, p in (("jitter", jittered, jitter), ("gray", draw["gray"], gray),
                            ("blur", draw["blur"], blur), ("flip", draw["flip"], flip)):
        assert abs(chosen.float().mean() - p) <= 5 * math.sqrt(p * (1 - p) / (2 * n)), name
    for i, (low, high) in enumerate([(.6, 1.4)] * 3 + [(-.1, .1)]):
        values = factors[..., i][jittered].numpy()
        assert not jitter or kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
    sigma = torch.cat([draws[view, "sigma"] for view in (0, 1)]).numpy()
    one_per_batch = not blur or stack == "simclr"
    assert one_per_batch or kstest(sigma, "uniform", (.1, 1.9)).pvalue > 1e-4
    # The choices are independent of one another, and of those of the other view.
    chosen = torch.stack([jittered[0], jittered[1], draw["gray"][0], draw["blur"][0],
                          draw["flip"][0], draw["flip"][1]])
    chosen = chosen[chosen.any(1) & ~chosen.all(1)].float()
    correlation = torch.corrcoef(chosen) - torch.eye(len(chosen))
    assert len(chosen) < 2 or correlation.abs().max() < .05


def test_jitter_strength_is_that_of_table_2b():
    for s, expected in ((1., (.8, .8, .8, .2)), (.5, (.4, .4, .4, .1)),
                        (.125, (.1, .1, .1, .025))):
        assert augment.jitter_strength(s) == pytest.approx(expected)
    strong = augment.Augment("moco_v1", augment.jitter_strength(2.))
    factors = strong.draw(0, 5000)[0, "factors"]
    assert factors[..., :3].min() >= 0                # as torchvision: U(max(0, 1 - b), 1 + b)


def test_operations_come_in_the_released_order(photos):
    """One image with known parameters, operation by operation with torchvision's functions."""
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    first = torch.tensor([0])
    draw = {"flip": first, "gray": first, "blur": first, "sigma": torch.tensor([1.3]),
            "factors": torch.tensor([[.7, 1.3, 1.2, .1]]), "order": [2, 0, 3, 1]}

    def jitter(x):
        for i in (2, 0, 3, 1):
            x = adjust[i](x, draw["factors"][0, i].item())
        return x
    operations = {"jitter": jitter, "gray": lambda x: F.rgb_to_grayscale(x, 3),
                  "blur": lambda x: F.gaussian_blur(x, [17, 17], [1.3, 1.3]),
                  "flip": F.horizontal_flip}
    for stack, order in (("moco_v2", "jitter gray blur flip"), ("moco_v1", "gray jitter flip"),
                         ("simclr", "flip jitter gray"), ("instdisc_cifar10", "jitter gray")):
        # SimCLR's blur, with another border, is compared in test_negatives.py.
        module = augment.Augment(stack, blur=stack != "simclr", normalisation="textures")
        x = photos[:1] / 255
        for name in order.split():
            x = operations[name](x)
        ours = module.transform(photos[:1], draw) * module.std + module.mean
        assert (ours - x).abs().max() * 255 < .05, stack


def test_processes_take_their_rows_of_one_draw(photos):
    x = torch.stack([photos, photos.flip(0)])
    module = augment.Augment("moco_v2", seed=3)
    whole = module(x, 5)
    for rows in (slice(0, 4), slice(4, 8), [1, 6]):
        draws = module.draw(5, 8, views=2, rows=[rows, rows])
        for part, view in zip(module.transform_views(x[:, rows], draws), whole, strict=True):
            torch.testing.assert_close(part, view[rows], rtol=0, atol=1e-5)
    assert torch.equal(module(x, 5)[0], whole[0])
    assert torch.equal(module(x, 5, batch=8)[0], whole[0])
    assert not torch.equal(augment.Augment("moco_v2", seed=3 + 2 ** 32)(x, 5)[0], whole[0])
    assert not torch.equal(module(x, 6)[0], whole[0])


def test_a_few_images_at_a_time_are_augmented_like_all_at_once(photos, monkeypatch):
    """As a CPU does for its cache; also if a part has nothing to blur or to flip."""
    x = photos.expand(2, *photos.shape)
    stack = augment.Augment("moco_v2")
    whole = stack(x, 5)
    monkeypatch.setattr(augment, "CPU_CACHE", photos[0].numel())
    for a, b in zip(whole, stack(x, 5), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_process_without_images_gets_empty_views(photos):
    """Its part of a last batch that is smaller than the number of processes."""
    stack, x = augment.Augment("moco_v2"), photos.expand(2, *photos.shape)
    draws = stack.draw(5, 1, views=2, rows=[slice(0, 0)] * 2)
    views = stack.transform_views(x[:, :0], draws)
    assert [view.shape for view in views] == [(0, 3, 48, 40)] * 2


def test_augmenting_shuffled_images_is_shuffling_augmented_ones(photos):
    """MoCo distributes uint8 images in another order before it augments them."""
    module, order = augment.Augment("moco_v2"), torch.randperm(8)
    whole = module(photos[None], 5)[0]
    draws = module.draw(5, 8, rows=[order.numpy()])
    torch.testing.assert_close(module.transform_views([photos[order]], draws)[0], whole[order])


def test_images_other_than_uint8_and_unknown_names_are_refused(photos):
    """Images that have been divided by 255 already would all become nearly black."""
    with pytest.raises(UserError, match="images of type torch.float32: expected torch.uint8"):
        augment.Augment("moco_v2")(photos[None] / 255, 0)
    with pytest.raises(UserError, match="normalisation mean: expected one of imagenet, "):
        augment.Augment("moco_v2", normalisation="mean")
    with pytest.raises(UserError, match="head foo: expected one of mlp, "):
        head("foo", 512)


def test_streams_of_different_purpose_or_key_differ():
    """numpy ignores trailing zeros: without a purpose, (seed, 3) and (seed, 3, 0) would collide."""
    keys = [("order", 0, 3), ("order", 0, 4), ("order", 3, 0), ("crops", 0, 3), ("augment", 0, 3),
            ("shuffle", 0, 3), ("order", 0, 0)]
    draws = {augment.generator(*key).random() for key in keys}
    assert len(draws) == len(keys)
    device = torch.device("cpu")
    draws = {torch.rand((), generator=augment.device_generator(device, *key)).item()
             for key in keys}
    assert len(draws) == len(keys)
