"""PASCAL VOC: images with objects, batches of them, and the metric of VOC 2007.

Without a download: scenes of the same form, drawn from the textures of common/textures.py.

Boxes are xmin, ymin, xmax, ymax in pixels from the corner of the image, so that xmax - xmin is a
width. VOC's files, and the metric, count pixels from 1 and include both ends: there, xmin and ymin
are larger by 1.
"""

import itertools
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import VOCDetection

from common import UserError, augment, data, ddp, textures

CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
           "motorbike person pottedplant sheep sofa train tvmonitor").split()
THRESHOLDS = np.arange(50, 100, 5) / 100
RECALLS = np.arange(0., 1.1, .1)        # numpy's, slightly above .3, .6 and .7, as in detectron2


# The metric. Rows of `found` (k, 7) are detections: image, class, score, box. Rows of `objects`
# (m, 7) have difficult (1 or 0) in place of the score.

def best_overlap(found, objects):
    """The largest IoU (k,) of each detection with an object of its image, and which one (k,)."""
    overlap, nearest = np.zeros(len(found)), np.zeros(len(found), int)
    for image in np.unique(found[:, 0]):
        rows, here = np.flatnonzero(found[:, 0] == image), np.flatnonzero(objects[:, 0] == image)
        if len(here):
            a, b = found[rows, None, 3:], objects[here, 3:]
            low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
            common = (high - low + 1).clip(0).prod(-1)          # (detections, objects)
            area_a, area_b = ((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b))
            iou = common / (area_a + area_b - common)
            overlap[rows], nearest[rows] = iou.max(1), here[iou.argmax(1)]
    return overlap, nearest


def average_precision(over, nearest, difficult):
    """11-point AP, 0 to 1, of the detections of a class in the order of their scores.

    over (k,): whether the IoU exceeds the threshold; nearest (k,): with which object; difficult
    (m,): detections of these objects are ignored. Of several detections of an object, only the
    first is correct.
    """
    counted = ~(over & difficult[nearest])
    candidates = np.flatnonzero(over & counted)
    first = np.unique(nearest[candidates], return_index=True)[1]
    correct = np.zeros(len(over))
    correct[candidates[first]] = 1
    recall = correct.cumsum() / (~difficult).sum()
    precision = correct.cumsum() / counted.cumsum().clip(1)
    return np.mean([precision[recall >= r].max(initial=0) for r in RECALLS])


def voc_ap(found, objects, classes):
    """{"AP", "AP50", "AP75"} in percent, and a list of the AP50 of each class.

    AP is the mean over the IoU thresholds .5, .55, ..., .95, as in detectron2's pascal_voc
    evaluation. A class whose objects are all difficult has no AP: it is None, and not in the mean.
    """
    table = np.full((classes, len(THRESHOLDS)), np.nan)
    for c in range(classes):
        truth, mine = (rows[rows[:, 1] == c + 1].astype(float) for rows in (objects, found))
        difficult = truth[:, 2] == 1
        if not difficult.all():
            mine = mine[np.argsort(-mine[:, 2], kind="stable")]
            overlap, nearest = best_overlap(mine, truth)
            table[c] = [average_precision(overlap > t, nearest, difficult) for t in THRESHOLDS]
    mean = 100 * np.nanmean(table, 0)
    by_class = [None if np.isnan(ap) else 100 * ap for ap in table[:, 0]]
    return {"AP": mean.mean(), "AP50": mean[0], "AP75": mean[5]}, by_class


# Images and objects.

class Sample(NamedTuple):
    """An image of a split, which is a list of them."""

    image: str | torch.Tensor                   # a file, or (3, H, W) uint8
    size: tuple                                 # (H, W)
    # Rows (n, 6) float32: four coordinates of the box, the label (from 1 on), and whether it is
    # difficult
    objects: torch.Tensor


def sample(image, size, objects):
    """A `Sample` whose objects are a list."""
    return Sample(image, size, torch.tensor(objects, dtype=torch.float32).view(-1, 6))


def object_rows(split):
    """All objects, one row of the metric each: (m, 7)."""
    found = []
    for i, (_, _, objects) in enumerate(split):
        image = torch.full_like(objects[:, :1], i)
        found.append(torch.cat([image, objects[:, 4:], voc_boxes(objects[:, :4])], 1))
    return torch.cat(found).numpy()


def voc_boxes(boxes):
    """Convert boxes (n, 4) to the convention of VOC's files, which count pixels from 1."""
    return boxes + torch.tensor([1, 1, 0, 0])


def open_data(path):
    """`(scale, classes, training split, test split)` of a VOCdevkit; of the scenes if it is None.

    Training images without objects are left out, as in detectron2. Raises UserError with the file
    at fault, or if there are no objects.
    """
    if path is None:
        scale, classes, train, test = "scenes", textures.CLASSES, scenes(1000, 2), scenes(250, 3)
    else:
        folder = Path(path).expanduser().resolve()
        if (folder / "VOCdevkit").is_dir():
            folder = folder / "VOCdevkit"
        train = _read_voc(folder, "2007", "trainval") + _read_voc(folder, "2012", "trainval")
        scale, classes, test = "voc", CLASSES, _read_voc(folder, "2007", "test")
    for name, split in (("training", train), ("test", test)):
        if not any((objects[:, 5] == 0).any() for _, _, objects in split):
            raise UserError(f"{path}: no objects in the {name} images, or only difficult ones")
    train = [each for each in train if len(each.objects)]
    ddp.say(f"data: {path or 'synthetic scenes'}, {len(train)} training images with objects and "
            f"{len(test)} test images; scale {scale}")
    return scale, classes, train, test


def _read_voc(folder, year, image_set):
    """The split of a set of the folder VOCdevkit."""
    try:
        files = VOCDetection(folder.parent, year, image_set)
    except (RuntimeError, FileNotFoundError):
        files = None
    if files is None or folder.name != "VOCdevkit":
        raise UserError(f"{folder}: not a VOCdevkit, or VOC{year}/ImageSets/Main/{image_set}.txt "
                        "is missing; expected a folder VOCdevkit with VOC2007 and VOC2012")
    split = []
    for image, xml in zip(files.images, files.annotations):
        try:
            with Image.open(image) as opened:
                width, height = opened.size
            tree = VOCDetection.parse_voc_xml(ElementTree.parse(xml).getroot())
            objects = [_object(entry) for entry in tree["annotation"]["object"]]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; VOC{year}'s {image_set}.txt names it")
        except (UnidentifiedImageError, ElementTree.ParseError, LookupError, TypeError,
                ValueError) as error:
            raise UserError(f"{xml}: this file or its image is not valid VOC data: {error}")
        for xmin, ymin, xmax, ymax, *_ in objects:
            if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):
                raise UserError(f"{xml}: a box is empty or outside of the image of {width} x "
                                f"{height} pixels: xmin {xmin + 1:g}, ymin {ymin + 1:g}, "
                                f"xmax {xmax:g}, ymax {ymax:g}")
        split.append(sample(image, (height, width), objects))
    return split


def _object(entry):
    """An object of VOC's XML as in `Sample`. detectron2 moves xmin and ymin in the same way."""
    box = entry["bndbox"]
    return (float(box["xmin"]) - 1, float(box["ymin"]) - 1, float(box["xmax"]), float(box["ymax"]),
            CLASSES.index(entry["name"]) + 1, int(entry.get("difficult", 0)))


def scenes(n, seed, side=128):
    """A split of n drawn images (3, side, side): up to four textures on a texture of another class.

    Objects have .25 to .6 of the side. They may overlap, but none hides more than half of
    another.
    """
    split, rng = [], augment.generator("scenes", seed)
    pixels, labels = textures.draw(5 * n, seed)
    for background, *others in rng.permutation(5 * n).reshape(n, 5):
        scene = augment.resize(torch.from_numpy(pixels[background]), (side, side))
        objects = []
        for i in others[:rng.integers(1, 5)]:
            size, ratio = np.exp(rng.uniform(np.log([.25, .6]), np.log([.6, 1 / .6])))
            height, width = round(side * size * ratio ** .5), round(side * size / ratio ** .5)
            top, left = rng.integers((side - height + 1, side - width + 1)).tolist()
            box = left, top, left + width, top + height
            if labels[i] == labels[background] or any(_hides(box, o) for o in objects):
                continue
            texture = augment.resize(torch.from_numpy(pixels[i]), (height, width))
            scene[:, top:top + height, left:left + width] = texture
            objects.append((*box, labels[i] + 1, 0))
        split.append(sample(scene, (side, side), objects))
    return split


def _hides(box, o):
    """Whether `box` covers more than half of the object `o`."""
    width, height = min(box[2], o[2]) - max(box[0], o[0]), min(box[3], o[3]) - max(box[1], o[1])
    return max(width, 0) * max(height, 0) > .5 * (o[2] - o[0]) * (o[3] - o[1])


# Batches of views. A view (index, (height, width), flip) is an image, resized and flipped or not.

def resized(size, short, longest):
    """(height, width) whose short side is `short`, or less if the other would exceed `longest`."""
    factor = min(short / min(size), longest / max(size))
    return tuple(round(side * factor) for side in size)


class Batches(Dataset):
    """The work of a loader process: (views, rows) -> x (N, 3, H, W) uint8, boxes [(n, 4)].

    x holds views[rows], padded with 0. H and W fit all of `views` and are multiples of `stride`.
    """

    def __init__(self, split, stride):
        self.split, self.stride = split, stride

    def __getitem__(self, batch):
        views, rows = batch
        sides = -(-np.max([size for _, size, _ in views], 0) // self.stride) * self.stride
        x, all_boxes = torch.zeros(len(views[rows]), 3, *sides.tolist(), dtype=torch.uint8), []
        for padded, (index, (height, width), flip) in zip(x, views[rows]):
            image, (old_height, old_width), objects = self.split[index]
            if not isinstance(image, torch.Tensor):
                image = data.read_image(image)
            image = augment.resize(image, (height, width))
            boxes = objects[:, :4] * torch.tensor([width / old_width, height / old_height] * 2)
            if flip:
                image = image.flip(2)
                boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            padded[:, :height, :width] = image
            all_boxes.append(boxes.numpy())     # a tensor would take a file descriptor
        return x, all_boxes


def load(split, batches, *, normalisation, stride, device, workers):
    """Yield `(x, sizes, targets)` for each of `batches`, pairs (views, rows), of the views[rows].

    x (N, 3, H, W) is normalised, then padded with 0, so that H and W fit all views, also those of
    other processes, and are multiples of `stride`; sizes are [(height, width)] without padding;
    targets [{"boxes" (n, 4), "labels" (n,)}].
    """
    mean, std = (torch.tensor(values, device=device)[:, None, None]
                 for values in augment.NORMALISE[normalisation])
    batches, planned = itertools.tee(batches)
    in_memory = isinstance(split[0].image, torch.Tensor)
    loader = DataLoader(Batches(split, stride), batch_size=None, sampler=batches,
                        num_workers=0 if in_memory else workers, collate_fn=tuple,
                        pin_memory=device.type == "cuda", generator=torch.Generator(),
                        worker_init_fn=data.worker_init())
    for (views, rows), (x, all_boxes) in zip(planned, loader):
        x = (x.to(device, non_blocking=True) / 255 - mean) / std
        targets = []
        for padded, (index, (height, width), _), boxes in zip(x, views[rows], all_boxes):
            padded[:, height:] = 0
            padded[:, :, width:] = 0
            targets.append({"boxes": torch.as_tensor(boxes, device=device),
                            "labels": split[index].objects[:, 4].long().to(device)})
        yield x, [size for _, size, _ in views[rows]], targets
