"""Detection: the metric, the network in one process and two, VOC's files, runs, bad input."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import photo, refused, same, signal_handlers_restored, spawn
from PIL import Image

from common import ddp
from common.model import resnet
from reproduce import voc
from reproduce import voc_detection as script

CPU = torch.device("cpu")
TINY = dict(script.SCALES["scenes"], arch="resnet10", short_sides=[48, 64], test_side=64,
            batch_size=4, pool=4, roi_samples=6, rpn_samples=32, post_nms=(40, 12), bn_batches=2,
            anchors=(16, 32), iterations=2, test_batch=1)


def arguments(**changes):
    return SimpleNamespace(**{**TINY, "seed": 0, "workers": 0, **changes})


def detector(args=None, classes=10, dtype=torch.float32):
    torch.manual_seed(0)
    f = resnet((args or arguments()).arch, norm=script.GlobalBatchNorm)
    return script.Detector(f, classes, args or arguments()).to(dtype)


# The metric.

def row(box, image=0, label=1, last=.9):
    return np.array([[image, label, last, *box]], float)


def objects(*boxes, difficult=0):
    return np.concatenate([row(box, last=difficult) for box in boxes])


A, B, FAR = (1, 1, 10, 10), (31, 31, 50, 60), (81, 81, 90, 90)


def ap50(found, truth, classes=1):
    return voc.voc_ap(np.concatenate(found), truth, classes)[0]["AP50"]


def test_perfect_detections_have_an_ap_of_100():
    found = np.concatenate([row(A, last=.3), row(B, last=.1)])
    result, by_class = voc.voc_ap(found, objects(A, B), 1)
    assert result == {"AP": pytest.approx(100), "AP50": pytest.approx(100),
                      "AP75": pytest.approx(100)}
    assert by_class == [pytest.approx(100)]
    assert ap50([row(A, image=1)], objects(A)) == 0             # another image
    assert voc.voc_ap(np.zeros((0, 7)), objects(A), 1)[0]["AP"] == 0


def test_a_duplicate_is_an_error_and_a_miss_costs_recall():
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: six points of 1 and five of 2/3.
    found = [row(A, last=.9), row(A, last=.8), row(B, last=.7)]
    assert ap50(found, objects(A, B)) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert ap50([row(A)], objects(A, B)) == pytest.approx(100 * 6 / 11)
    assert ap50([row(FAR, last=.95), row(A)], objects(A)) == pytest.approx(50)
    # The order is that of the scores, not that of the rows.
    assert ap50([row(FAR, last=.1), row(A)], objects(A)) == pytest.approx(100)


def test_difficult_objects_neither_help_nor_hurt():
    truth = np.concatenate([objects(A), objects(B, difficult=1)])
    assert ap50([row(B, last=.99), row(B, last=.98), row(A)], truth) == pytest.approx(100)
    assert ap50([row(A)], truth) == pytest.approx(100)
    assert ap50([row(B)], truth) == 0


def test_a_class_without_objects_is_not_in_the_mean():
    truth = np.concatenate([objects(A), row(B, label=3, last=1)])   # class 3: difficult ones only
    found = np.concatenate([row(A), row(A, label=2), row(B, label=3)])
    result, by_class = voc.voc_ap(found, truth, 3)
    assert by_class == [pytest.approx(100), None, None]
    assert result["AP"] == pytest.approx(100)


def test_an_iou_at_the_threshold_is_no_match_and_pixels_are_counted_inclusively():
    """Of the 100 pixels of A, (1, 1, 10, 8) has 80: above .5 to .75, but not above .8."""
    result, _ = voc.voc_ap(row((1, 1, 10, 8)), objects(A), 1)
    assert result == {"AP": pytest.approx(60), "AP50": pytest.approx(100),
                      "AP75": pytest.approx(100)}
    assert ap50([row((1, 1, 10, 5))], objects(A)) == 0          # exactly .5
    assert ap50([row((1, 1, 2, 1))], objects((1, 1, 3, 1))) == pytest.approx(100)   # 2 of 3 pixels


def test_recall_is_compared_with_numpys_points_as_in_detectron2():
    """Three of ten objects: recall .3 is below np.arange's .30000000000000004."""
    boxes = [(20 * i + 1, 1, 20 * i + 10, 10) for i in range(10)]
    assert ap50([row(box) for box in boxes[:3]], objects(*boxes)) == pytest.approx(100 * 3 / 11)


def literal_ap(found, truth, classes):
    """AP at each threshold, averaged over classes: one detection at a time, as VOC defines it."""
    means = []
    for threshold in (.5, .55, .6, .65, .7, .75, .8, .85, .9, .95):
        per_class = []
        for c in range(1, classes + 1):
            wanted = [list(map(float, r)) for r in truth if r[1] == c]
            n = sum(1 for r in wanted if r[2] == 0)
            if n == 0:
                continue
            taken, hits, errors, points = set(), 0, 0, []
            for r in sorted((list(map(float, r)) for r in found if r[1] == c),
                            key=lambda r: -r[2]):
                best, which = -1., None
                for j, o in enumerate(wanted):
                    if o[0] != r[0]:
                        continue
                    w = min(r[5], o[5]) - max(r[3], o[3]) + 1
                    h = min(r[6], o[6]) - max(r[4], o[4]) + 1
                    common = max(w, 0.) * max(h, 0.)
                    union = ((r[5] - r[3] + 1) * (r[6] - r[4] + 1)
                             + (o[5] - o[3] + 1) * (o[6] - o[4] + 1) - common)
                    if common / union > best:
                        best, which = common / union, j
                if best > threshold and wanted[which][2] == 1:
                    pass
                elif best > threshold and which not in taken:
                    taken.add(which)
                    hits += 1
                else:
                    errors += 1
                points.append((hits / n, hits / max(hits + errors, 1)))
            ap = 0.
            for i in range(11):
                ap += max([p for recall, p in points if recall >= i * .1], default=0.) / 11
            per_class.append(ap)
        means.append(100 * sum(per_class) / len(per_class))
    return means


def random_case(seed, images=12, classes=4):
    """Objects, and detections near them and elsewhere, some of them twice."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        low, side = rng.integers(1, 60, (n, 2)), rng.integers(4, 40, (n, 2))
        return np.c_[low, low + side]

    m, k = 40, 90
    truth = np.c_[rng.integers(0, images, m), rng.integers(1, classes + 1, m), rng.random(m) < .2,
                  boxes(m)].astype(float)
    near = truth[rng.integers(0, m, k)]
    near[:, 3:] += rng.integers(-3, 4, (k, 4))
    found = np.concatenate([near, np.c_[near[:30, :3], boxes(30)]])
    found[:, 2] = rng.permutation(len(found)) / len(found)
    return found, truth


def test_the_metric_equals_a_literal_loop_on_random_detections():
    for seed in range(5):
        found, truth = random_case(seed)
        expected = literal_ap(found, truth, 5)                  # class 5 has no objects
        result, _ = voc.voc_ap(found, truth, 5)
        assert 5 < expected[0] < 95
        assert abs(result["AP"] - np.mean(expected)) < 1e-9
        assert abs(result["AP50"] - expected[0]) < 1e-9
        assert abs(result["AP75"] - expected[5]) < 1e-9


# The network.

def test_backbone_and_head_give_the_features_of_the_plain_resnet():
    """With torchvision's layers and the same weights; the additional norm is at its start."""
    torch.manual_seed(0)
    plain = torchvision.models.resnet50().eval()
    for module in plain.modules():                              # statistics that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=.1)
            module.running_var.uniform_(.5, 1.5)
    f = resnet("resnet50", norm=script.GlobalBatchNorm)
    f.load_state_dict(plain.state_dict(), strict=False)
    plain.fc = torch.nn.Identity()
    network = script.Detector(f, 3, arguments()).eval()
    x = torch.randn(2, 3, 96, 128)
    h = network.roi_heads.box_head(network.backbone(x))
    assert ((h - plain(x)).norm() <= 1e-5 * plain(x).norm()).item()


def test_pooling_is_aligned_with_pixels():
    """On a map whose values are coordinates, pooled values are the centres of the bins."""
    pool = detector().roi_heads.box_roi_pool
    ramp = torch.arange(20.).expand(1, 1, 20, 20)               # centres of pixels at i + .5
    pooled = pool(ramp, [torch.tensor([[32., 48., 96., 112.]])])[0, 0]
    expected = (32 + (torch.arange(4) + .5) * 16) / 16 - .5
    assert torch.allclose(pooled, expected.expand(4, 4))


def batch_of(split, args, step=0, dtype=torch.float32):
    (_, (x, sizes, targets, keys)), = script.batches(split, args, step, step + 1, CPU)
    targets = [{"boxes": t["boxes"].to(dtype), "labels": t["labels"]} for t in targets]
    return x.to(dtype), sizes, targets, keys


def test_every_parameter_gets_a_gradient():
    network = detector()
    loss = sum(network(*batch_of(voc.scenes(8, 0, side=64), arguments())).values())
    loss.backward()
    assert network.backbone[0].weight.shape == (64, 3, 7, 7)    # conv1
    for name, p in network.named_parameters():
        assert p.grad.norm() > 0 or name.endswith("conv.bias"), name


def test_losses_are_those_of_detectron2():
    """Against loops: L1 for boxes; the class and the box of a proposal are those of its label."""
    torch.manual_seed(1)
    network = detector(dtype=torch.float64)
    rpn, heads = network.rpn, network.roi_heads
    rpn.fg_bg_sampler.keys = [(0, 0, 0), (0, 0, 1)]
    labels = [torch.randint(-1, 2, (60,)).double() for _ in range(2)]
    wanted = [torch.randn(60, 4).double() for _ in range(2)]
    objectness, deltas = torch.randn(120, 1).double(), torch.randn(120, 4).double()
    positive, negative = map(torch.cat, rpn.fg_bg_sampler(labels))
    expected = [0., 0.]
    for i in range(120):
        if positive[i] or negative[i]:
            sign = -1 if positive[i] else 1
            expected[0] += math.log1p(math.exp(sign * objectness[i])) / 64      # 2 x 32 anchors
        if positive[i]:
            expected[1] += (deltas[i] - torch.cat(wanted)[i]).abs().sum().item() / 64
    found = rpn.compute_loss(objectness, deltas, labels, wanted)
    assert [loss.item() for loss in found] == pytest.approx(expected)

    proposals = [torch.tensor([[0., 0., 60., 60.], [10., 10., 50., 40.]]).double()] * 2
    labels, wanted = [torch.tensor([1, 0]), torch.tensor([3, 0])], torch.randn(2, 2, 4).double()
    heads.select_training_samples = lambda *_: (proposals, None, labels, list(wanted))
    x = torch.randn(2, 256, 6, 6).double()
    _, found = heads({"0": x}, proposals, [(96, 96)] * 2, targets=[])
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(x, proposals)))
    expected = [0., 0.]
    for i, (label, own) in enumerate(zip(torch.cat(labels).tolist(), wanted.flatten(0, 1))):
        expected[0] -= logits[i].log_softmax(0)[label].item() / 4
        if label:
            expected[1] += (deltas[i, 4 * label:4 * label + 4] - own).abs().sum().item() / 4
    assert [found["class"].item(), found["box"].item()] == pytest.approx(expected)


class Perfect(torch.nn.Module):
    """A detector that finds the objects of `split`, image by image, in the resized image."""

    def __init__(self, split):
        super().__init__()
        self.left = iter(split)

    def forward(self, x, sizes):
        found = []
        for size, (_, (height, width), objects) in zip(sizes, self.left):
            factor = torch.tensor([size[1] / width, size[0] / height] * 2)
            found.append({"boxes": objects[:, :4] * factor, "labels": objects[:, 4].long(),
                          "scores": torch.ones(len(objects))})
        return found


def test_detections_are_in_pixels_of_the_original_image():
    split = mixed_split()
    found = script.detect(Perfect(split), split, arguments(test_side=96), CPU)
    assert voc.voc_ap(found, voc.object_rows(split), 10)[0]["AP"] == pytest.approx(100)


def test_draws_depend_on_seed_step_and_image_only():
    sampler = script.Sampler("anchors", 8, .5)
    labels = [torch.arange(100) % 3 - 1, torch.arange(100) % 2]
    sampler.keys = [(0, 5, 0), (0, 5, 1)]
    both = sampler(labels)
    sampler.keys = [(0, 5, 1)]
    torch.rand(3)
    alone = sampler(labels[1:])
    assert torch.equal(both[0][1], alone[0][0]) and torch.equal(both[1][1], alone[1][0])
    assert both[0][0].sum() == both[1][0].sum() == 4
    sampler.keys = [(0, 6, 1)]
    assert not torch.equal(sampler(labels[1:])[0][0], alone[0][0])
    split = voc.scenes(8, 0, side=64)
    x, *_ = batch_of(split, arguments(), step=3)
    assert torch.equal(x, batch_of(split, arguments(), step=3)[0])
    assert not torch.equal(x, batch_of(split, arguments(seed=1), step=3)[0])


def mixed_split():
    """Images of several sizes, without objects that are cut."""
    return voc.scenes(5, 0, side=64) + voc.scenes(3, 1, side=80)


def step_and_test(path):
    """Gradients, running statistics and detections, in float64, as a file of rank 0.

    More proposals are asked for than there are, so that processes have different numbers of them.
    """
    args, split = arguments(batch_size=4, roi_samples=64), mixed_split()
    network = detector(args, dtype=torch.float64)
    wrapped = ddp.wrap(network)
    sum(wrapped(*batch_of(split, args, 3, torch.float64)).values()).backward()     # 84 and 82
    gradients = {name: p.grad for name, p in network.named_parameters()}
    script.precise_bn(network, [(i, batch_of(split, args, i, torch.float64)) for i in (1, 2)])
    statistics = dict(network.named_buffers())
    found = script.detect(network.float(), split, args, CPU)
    if ddp.rank() == 0:
        torch.save([gradients, statistics, torch.from_numpy(found)], path)


def test_precise_statistics_are_means_over_batches():
    split, args, network = voc.scenes(8, 0, side=64), arguments(), detector()
    batches = [(i, batch_of(split, args, i)) for i in range(3)]
    script.precise_bn(network, batches)
    conv1, norm = network.backbone[:2]
    expected = torch.stack([conv1(x).mean((0, 2, 3)) for _, (x, *_) in batches]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    assert norm.momentum == .1


# Images and objects.

def write_voc(root):
    """A VOCdevkit with images of several sizes, one of them grey; returns its folder."""
    rng, shapes = np.random.default_rng(0), [(60, 80), (90, 64), (64, 64)]
    root = root / "VOCdevkit"
    for year, image_set, n in (("2007", "trainval", 3), ("2012", "trainval", 2),
                               ("2007", "test", 3)):
        folder, names = root / f"VOC{year}", [f"{image_set}{i}" for i in range(n)]
        for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Main/{image_set}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            height, width = shapes[i % 3]
            pixels = photo(rng, height, width)
            xml = [("dog", (1, 1, width, height // 2), 0), ("person", (11, 21, 30, 50), 1)]
            for _, (xmin, ymin, xmax, ymax), _ in xml[:1 + i % 2]:
                pixels[ymin - 1:ymax, xmin - 1:xmax] //= 3
            image = Image.fromarray(pixels if i != 1 else pixels[:, :, 0])
            image.save(folder / f"JPEGImages/{name}.jpg")
            (folder / f"Annotations/{name}.xml").write_text(annotation(xml[:1 + i % 2], i))
    return root


def annotation(objects, i):
    """VOC's XML. The first object has parts with boxes of their own, as people have in VOC2012."""
    text = f"<annotation><filename>{i}</filename>"
    for name, box, difficult in objects:
        sides = "".join(f"<{side}>{value}</{side}>"
                        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += (f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>"
                 f"<difficult>{difficult}</difficult><bndbox>{sides}</bndbox>"
                 f"<part><name>head</name><bndbox>{sides}</bndbox></part></object>")
    return text + "</annotation>"


def test_a_vocdevkit_is_read_as_it_is_written(tmp_path):
    scale, classes, train, test = voc.open_data(write_voc(tmp_path))
    assert scale == "voc" and len(classes) == 20 and (len(train), len(test)) == (5, 3)
    assert [sample.size for sample in test] == [(60, 80), (90, 64), (64, 64)]
    dog, person = classes.index("dog") + 1, classes.index("person") + 1
    assert test[1].objects.tolist() == [[0, 0, 64, 45, dog, 0], [10, 20, 30, 50, person, 1]]
    assert voc.object_rows(test)[2].tolist() == [1, person, 1, 11, 21, 30, 50]    # as in the file
    views = [([(1, (90, 64), False)], slice(None))]
    (x, sizes, targets), = voc.load(test, views, stride=16, normalisation="unit", device=CPU,
                                    workers=0)
    assert x.shape == (1, 3, 96, 64) and torch.equal(x[:, 0], x[:, 2])  # grey
    assert sizes == [(90, 64)]
    (x, _, _), = voc.load(test, views, stride=16, normalisation="imagenet", device=CPU, workers=0)
    assert x[0, :, 90:].abs().max() == 0    # padded after normalisation
    assert targets[0]["labels"].tolist() == [dog, person]


def test_boxes_follow_the_image_when_it_is_resized_and_flipped():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 8:24, 6:36] = 255
    split = [voc.sample(image, (40, 60), [(6, 8, 36, 24, 1, 0)])]
    for flip, expected in ((False, [12, 16, 72, 48]), (True, [48, 16, 108, 48])):
        x, boxes = voc.Batches(split, 16)[[(0, (80, 120), flip)], slice(None)]
        assert x.shape == (1, 3, 80, 128) and x[..., 120:].max() == 0
        assert boxes[0].tolist() == [expected]
        bright = (x[0, 0] > 127).nonzero()
        found = [*bright.amin(0).flip(0).tolist(), *(bright.amax(0) + 1).flip(0).tolist()]
        assert found == expected
    assert split[0].objects[0, :4].tolist() == [6, 8, 36, 24]   # unchanged
    assert voc.resized((375, 500), 800, 1333) == (800, 1067)
    assert voc.resized((200, 500), 800, 1333) == (533, 1333)


def test_scenes_are_drawn_from_a_seed_with_objects_inside():
    split = voc.scenes(60, 0)
    images, objects = ([getattr(each, name) for each in split] for name in ("image", "objects"))
    assert all(map(torch.equal, images, [each.image for each in voc.scenes(60, 0)]))
    assert not torch.equal(images[0], voc.scenes(60, 1)[0].image)
    table = np.concatenate([found.numpy() for found in objects])
    sides = table[:, 2:4] - table[:, :2]
    assert table[:, :4].min() >= 0 and table[:, :4].max() <= 128
    assert 20 < sides.min() < 32 and 70 < sides.max() < 100
    assert set(table[:, 4]) == set(range(1, 11))
    assert 1 <= np.mean([len(found) for found in objects]) <= 3
    overlapping = 0
    for found in objects:
        for i, a in enumerate(found):
            for b in found[i + 1:]:
                common = (torch.minimum(a[2:4], b[2:4]) - torch.maximum(a[:2], b[:2])).clamp(0)
                overlapping += int(common.prod() > 0)
                assert common.prod() <= .5 * (a[2:4] - a[:2]).prod()
    assert overlapping > 0


# Runs.

@pytest.fixture
def devkit(tmp_path, monkeypatch):
    """A VOCdevkit, and small settings for it."""
    small = {**TINY, "normalisation": "imagenet", "warmup": 1, "batch_size": 2, "pool": 14}
    monkeypatch.setitem(script.SCALES, "voc", small)
    return write_voc(tmp_path)


def test_resnet50_is_trained_on_a_vocdevkit_tested_and_resumed(devkit, tmp_path, inside):
    argv = [devkit, "--encoder", "random", "--arch", "resnet50", "--workers", "0"]
    whole = inside(script, *argv, "--out", "whole", cwd=tmp_path)
    line = whole.splitlines()[-1]
    assert re.fullmatch(r"AP \d+\.\d\d  AP50 \d+\.\d\d  AP75 \d+\.\d\d", line)
    assert "stopped at step 1 of 2" in inside(script, *argv, "--max-steps", "1", "--out", "out",
                                              cwd=tmp_path)
    end = inside(script, *argv, "--out", "out", cwd=tmp_path)
    assert "continuing at step 1 of 2 in out" in end and end.splitlines()[-1] == line
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
            for name in ("whole", "out"))
    assert same(a, b)
    again = inside(script, *argv, "--out", "out", cwd=tmp_path)
    assert "finished already" in again and again.splitlines()[-1] == line
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert f"AP50 {result['AP50']:.2f}" in line and result["settings"]["arch"] == "resnet50"
    assert result["AP50_by_class"]["cat"] is None
    assert {"device", "torch", "commit"} <= result.keys()
    with Image.open(tmp_path / "out/detections.png") as picture:
        assert picture.size[0] > 500 and len(np.unique(np.asarray(picture))) > 50
    xml = devkit / "VOC2012/Annotations/trainval0.xml"
    xml.write_text(xml.read_text().replace("<xmax>80<", "<xmax>79<"))
    assert "out: holds a run with other settings (objects_hash" in refused(
        script, *argv, "--out", tmp_path / "out")


def everything(folder, devkit):
    """What is compared: `step_and_test`, then the whole script, in `folder`."""
    step_and_test(folder / "step.pt")
    script.SCALES["voc"] = {**TINY, "normalisation": "imagenet", "warmup": 1, "batch_size": 2}
    script.main([str(devkit), "--encoder", "random", "--workers", "0", "--lr", "1e-4", "--out",
                 str(folder / "run")])


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """Two folders: that of one process, and that of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    devkit = write_voc(one)
    with signal_handlers_restored(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.SCALES, "voc", None)               # `everything` sets it
        everything(one, devkit)
    spawn(everything, two, devkit)
    return one, two


def test_two_processes_give_the_gradients_of_one(one_and_two):
    """In float64, with images of several sizes; statistics of batch normalisation included."""
    one, two = (torch.load(folder / "step.pt", weights_only=True) for folder in one_and_two)
    for a, b in zip(one[:2], two[:2]):
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name].double() - b[name].double()).norm()
            assert difference <= 1e-9 * a[name].double().norm() + 1e-12, name
    assert len(one[2]) == len(two[2]) > 0
    assert torch.allclose(one[2], two[2], rtol=1e-4, atol=.11)  # boxes are rounded to .1


def test_two_processes_end_as_one_does(one_and_two):
    """The whole script, in fp32 with a small learning rate."""
    one, two = (torch.load(folder / "run/checkpoint.pt", weights_only=True)
                for folder in one_and_two)
    assert one["settings"] == two["settings"] and two["step"] == 2
    for name, tensor in one["detector"].items():
        difference = (two["detector"][name] - tensor).float().norm()
        assert difference <= 1e-3 * tensor.float().norm() + 1e-6, name
    found = [json.loads((folder / "run/result.json").read_text()) for folder in one_and_two]
    assert found[1]["processes"] == 2 and abs(found[0]["AP50"] - found[1]["AP50"]) < 5


def checkpoint(path, arch, **settings):
    torch.manual_seed(1)
    f, g = resnet(arch), torch.nn.Linear(512, 8)
    path.parent.mkdir(exist_ok=True)
    torch.save({"f": f.state_dict(), "g": {f"0.{n}": t for n, t in g.state_dict().items()},
                "settings": {"arch": arch, "scale": "textures", **settings}}, path)
    return f


def test_training_starts_from_the_encoders_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f = checkpoint(tmp_path / "run/checkpoint.pt", "resnet10", normalisation="cifar10")
    args, loaded = script.settings(["--encoder", "run/checkpoint.pt"], "scenes")
    assert same(dict(f.state_dict()), dict(loaded.state_dict()))
    assert str(args.out) == "run/detection" and args.normalisation == "cifar10"
    assert args.lr == pytest.approx(script.SCALES["scenes"]["base_lr"])
    other, _ = script.settings(["--encoder", "random", "--batch-size", "2"], "voc")
    assert other.out == "runs/voc_detection-voc-random" and other.normalisation == "imagenet"
    assert other.lr == pytest.approx(.0025) and other.arch == "resnet50"
    assert other.encoder_fingerprint != args.encoder_fingerprint


def test_bad_input_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, argv = write_voc(tmp_path), ["--encoder", "random", "--arch", "resnet10"]
    (tmp_path / "empty").mkdir()
    checkpoint(tmp_path / "a/small.pt", "resnet10-3x3")
    checkpoint(tmp_path / "a/other.pt", "resnet18")
    for arguments_, line in [
            ([], "the following arguments are required: --encoder"),
            (["empty", *argv], "empty: not a VOCdevkit, or VOC2007/ImageSets/Main/trainval.txt is "
                               "missing; expected a folder VOCdevkit with VOC2007 and VOC2012"),
            (["nowhere", *argv], "nowhere: not a VOCdevkit"),
            ([root, "--encoder", "a/none.pt"], "a/none.pt: no such file"),
            ([root, "--encoder", "a/small.pt"], "a/small.pt: resnet10-3x3 has a stride of 4"),
            ([root, "--encoder", "a/other.pt", "--arch", "resnet50"],
             "a/other.pt: is a resnet18, not --arch resnet50"),
            ([root, *argv, "--batch-size", "6"], "larger than the data set of 5 images"),
            ([root, *argv, "--short-sides", "0"], "argument --short-sides: 0: expected")]:
        assert line in refused(script, *arguments_)
    xml = root / "VOC2007/Annotations/test1.xml"
    text = xml.read_text()
    for old, new, line in [
            ("<xmax>64<", "<xmax>65<", "test1.xml: a box is empty or outside of the image of 64 "
                                       "x 90 pixels: xmin 1, ymin 1, xmax 65, ymax 45"),
            ("<xmin>1<", "<xmin>0<", "a box is empty or outside of the image"),
            ("<name>dog<", "<name>wolf<", "'wolf' is not in list"),
            ("</annotation>", "", "test1.xml: this file or its image is not valid VOC data")]:
        xml.write_text(text.replace(old, new, 1))
        assert line in refused(script, root, *argv)
    xml.unlink()
    assert "test1.xml: no such file; VOC2007's test.txt names it" in refused(script, root, *argv)
    for file in (root / "VOC2007/Annotations").glob("test*"):
        file.write_text("<annotation></annotation>")
    xml.write_text("<annotation><filename>1</filename></annotation>")
    assert "test0.xml" in refused(script, root, *argv)          # an empty annotation is no tree
    for file in (root / "VOC2007/Annotations").glob("test*"):
        file.write_text("<annotation><filename>1</filename></annotation>")
    assert "no objects in the test images" in refused(script, root, *argv)
