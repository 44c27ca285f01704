"""Data sets, recognised by what a folder holds, and batches of random crops.

Without a folder: the built-in textures. With one: class folders under train/ and val/ or test/, the
CIFAR-10 batches of torchvision, or images without classes, for pre-training only. Small images are
decoded once and kept in memory. For larger ones, a worker decodes a file once for all its views and
returns uint8 crops. The augmentation after the crop is in augment.py.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset

from common import UserError, augment, ddp, textures

EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # PIL would run Ghostscript for EPS
SMALL = 64                                      # images up to this side (pixels) stay in memory,
MAX_BYTES = 2 ** 32                             # if they all take at most this, in each process
TASK_SIZE = 256                                 # images per task of a worker
MAX_BROKEN = .01                                # share of unreadable images that stops a run


@dataclasses.dataclass
class Images:
    """`pixels` (n, 3, H, W) uint8 or `files` (n,) bytes, and `labels` (n,) int64 or None."""

    labels: torch.Tensor = None
    pixels: torch.Tensor = None
    files: np.ndarray = None

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def take(self, rows):
        """The images `rows`, a slice or a numpy array of indices, with their labels."""
        parts = (self.labels, self.pixels, self.files)
        return Images(*(None if part is None else part[rows] for part in parts))


@dataclasses.dataclass
class Data:
    """What a path holds. Without labels or test images, `test` and `classes` are None.

    `hash` covers the names of the training files and some of their sizes, so that a run is not
    continued with other images.
    """

    path: str
    description: str
    scale: str                                  # imagenet, cifar10 or textures
    train: Images
    test: Images = None
    classes: list = None
    hash: str = ""


def open_data(path=None):
    """Recognise and print what the folder `path` holds; None stands for the built-in textures.

    Raises UserError, which says what was expected, if it is not a folder of images, or not the same
    one on all machines.
    """
    dataset = _open(path)
    if not ddp.all_equal((len(dataset.train), dataset.hash)):
        raise UserError(f"{path}: the processes find different images there; all machines need "
                        "the same")
    ddp.say(f"data: {dataset.description}; scale {dataset.scale}")
    return dataset


def open_labelled(path=None, advice=""):
    """Like `open_data`, for tasks that need labels and test images.

    Raises UserError if they are missing; its message ends with `advice`.
    """
    dataset = open_data(path)
    if dataset.test is None:
        raise UserError(f"{path}: labels are needed; expected train/<class>/ and val/<class>/ or "
                        f"test/<class>/{advice}")
    return dataset


def _open(path):
    if path is None:
        splits = [Images(torch.from_numpy(labels), torch.from_numpy(pixels))
                  for pixels, labels in (textures.draw(10_000, seed=0), textures.draw(2_000, 1))]
        return Data(None, "built-in textures, 10000 + 2000 images of 32 pixels, 10 classes",
                    "textures", *splits, list(textures.CLASSES))
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{path}: {problem}; expected a folder of images")
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return _cifar10(folder)
    if (root / "train").is_dir():
        return _class_folders(root)
    # Like a single class whose folder is `root`.
    samples = torchvision.datasets.folder.make_dataset(root, {"": 0}, EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError(f"{path}: no images in this folder; expected train/<class>/ and "
                        f"val/<class>/, the CIFAR-10 batches, or files {' '.join(EXTENSIONS)}")
    return _read_files(root, "images without classes", [sorted(samples)])


def _cifar10(folder):
    """The pickles are read by torchvision, which verifies their checksums first."""
    class CIFAR10(torchvision.datasets.CIFAR10):
        base_folder = folder.name

    try:
        sets = [CIFAR10(folder.parent, train=train) for train in (True, False)]
    except RuntimeError:
        raise UserError(f"{folder}: a file of CIFAR-10 is missing or its checksum is wrong")
    splits = [Images(torch.tensor(found.targets),
                     torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous())
              for found in sets]
    return Data(str(folder), "CIFAR-10's batches, 50000 + 10000 images of 32 pixels, 10 classes",
                "cifar10", *splits, sets[0].classes)


def _class_folders(root):
    """train/<class>/, and val/<class>/ or test/<class>/ if there is one."""
    test = [name for name in ("val", "test") if (root / name).is_dir()][:1]
    splits = []
    for name in ("train", *test):
        try:
            splits.append(torchvision.datasets.ImageFolder(root / name))
        except FileNotFoundError as error:
            raise UserError(f"{root / name}: {str(error).rstrip('.')}; expected {name}/<class>/"
                            "*.jpg (ImageNet's validation images must be moved into folders of "
                            "their classes)")
    classes = splits[0].classes
    odd = sorted(set(classes) ^ set(splits[-1].classes))
    if odd:
        raise UserError(f"{root / test[0]}: its classes are not those of train/: {odd[0]} is only "
                        "in one of them")
    samples = [split.samples for split in splits]
    return _read_files(root, f"class folders, {len(classes)} classes", samples, classes)


def _read_files(root, what, splits, classes=None):
    """Data of `splits`, lists of (file, label); decoded if all images are small and of one size."""
    images = []
    for samples in splits:
        files, labels = zip(*samples)
        images.append(Images(torch.tensor(labels) if classes else None,
                             files=np.array([os.fsencode(name) for name in files])))
    files, sizes = images[0].files, []
    inside = len(os.path.join(os.fsencode(root), b""))          # os.path.relpath takes much longer
    digest = hashlib.sha256(b"\n".join(name[inside:] for name in files))
    for i in np.linspace(0, len(files) - 1, min(len(files), 32)).astype(int):
        try:
            digest.update(f" {os.path.getsize(files[i])}".encode())
            sizes.append(tuple(read_image(files[i]).shape[1:]))
        except Exception as caught:             # PIL raises many kinds of errors
            error = f"{os.fsdecode(files[i])}: {caught}"
    if not sizes:
        raise UserError(f"{root}: no image can be read; {error}")
    small = np.max(sizes) <= SMALL
    if small and len(set(sizes)) == 1 and len(files) * 3 * math.prod(sizes[0]) <= MAX_BYTES:
        images = [_decode(split, sizes[0]) for split in images]
    height, width = np.median(sizes, 0).astype(int)
    count = " + ".join(str(len(split)) for split in images)
    return Data(str(root), f"{what}, {count} images of about {width} x {height} pixels",
                "cifar10" if small else "imagenet", *images,
                classes=classes if len(images) == 2 else None, hash=digest.hexdigest()[:12])


def read_image(name):
    """A file as RGB (3, H, W) uint8; EXIF rotation and transparency are ignored.

    Of 16 bits, the upper 8 are kept. Raises what PIL raises, also for images above 179 million
    pixels, and ValueError for more than 16 bits.
    """
    with Image.open(os.fsdecode(name), formats=FORMATS) as image:
        # convert() would clip more than 8 bits.
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits; expected 8 or 16")
        if image.mode != "RGB":                 # convert() always copies
            image = image.convert("RGB")
        return torchvision.transforms.functional.pil_to_tensor(image)


def _decode(images, size):
    """Files in memory, as images of one size (height, width)."""
    make = functools.partial(_resized, size=size)
    workers = min(default_workers(), len(images) // 1000)       # each takes a while to start
    pixels, rows = torch.empty(len(images), 3, *size, dtype=torch.uint8), []
    for read, x in _read(images.files, make, _in_order(images, 500), workers):
        pixels[len(rows):len(rows) + len(x)] = x                # a copy: x is in shared memory
        rows += read.tolist()
    return Images(images.take(np.array(rows)).labels, pixels)


def _in_order(images, batch):
    return BatchSampler([(i, None) for i in range(len(images))], batch, drop_last=False)


def _read(files, make, tasks, workers, pin=False):
    """Yield, for each task, the indices that were read and what `make` returns for them.

    A task is a list of keys of `_Files`. An unreadable file is named when it is first replaced.
    Raises UserError if more than one file and more than MAX_BROKEN are unreadable.
    """
    tasks, requested = itertools.tee(tasks)
    loader = DataLoader(_Files(files, make), batch_sampler=tasks, num_workers=workers,
                        generator=torch.Generator(), pin_memory=pin,
                        prefetch_factor=4 if workers else None, worker_init_fn=worker_init())
    replaced = set()
    for task, (read, x) in zip(requested, loader):
        for (i, _), j in zip(task, read.tolist()):
            if i != j:
                replaced.add(i)
                _report(files[i], files[j])
        if len(replaced) > max(1, MAX_BROKEN * len(files)):
            raise UserError(f"{len(replaced)} of {len(files)} images cannot be read, more than "
                            f"{MAX_BROKEN:.0%}; the first is {os.fsdecode(files[min(replaced)])}; "
                            "remove or repair them")
        yield read, x


def worker_init():
    """The `worker_init_fn` of a DataLoader in this process."""
    return functools.partial(_start_worker, os.getpid())


def _start_worker(parent, _):
    """Prepare a loader process for the end of the script, whose process ID is `parent`.

    Ctrl-C and torchrun signal the script's process group. The loader process leaves it, because the
    script finishes its step first, for which it may need more images. A loader process ends when it
    loses its parent, but PyTorch does not notice that if the script is killed before this point.
    """
    if hasattr(os, "setpgrp"):                                  # not on Windows
        os.setpgrp()
    # The parent of processes from a fork server is that server.
    if os.getppid() != parent and multiprocessing.get_start_method() != "forkserver":
        os._exit(1)


@functools.cache                                # once in a process
def _report(broken, replacement):
    print(f"unreadable image {os.fsdecode(broken)}, replaced by {os.fsdecode(replacement)}",
          file=sys.stderr)


class _Files(Dataset):
    """The work of a loader process: key -> the index that was read, and `make(image, u)`.

    A key is (index, u). An unreadable file is replaced by the next readable one: a function of the
    index, not a random draw.
    """

    def __init__(self, files, make):
        self.files, self.make = files, make

    def __getitem__(self, key):
        index, u = key
        for i in itertools.chain(range(index, len(self.files)), range(index)):
            try:
                image = read_image(self.files[i])
            except Exception:                   # PIL raises many kinds of errors
                continue
            return i, self.make(image, u)
        raise UserError(f"{os.fsdecode(self.files[index])}: no image can be read")


def _crops(image, u, size, area):
    boxes = augment.crop_boxes(*image.shape[1:], u, area)
    return torch.stack([augment.resize(image[:, top:top + height, left:left + width], (size, size))
                        for top, left, height, width in boxes.tolist()])


def _resized(image, _, size):
    return image if image.shape[1:] == size else augment.resize(image, size)


def _centre(image, _, size):
    """For evaluation: short side to size * 8/7 (256 for 224), then the centre (He et al. 2020).

    `image` (3, H, W), or several of one size (n, 3, H, W).
    """
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    height, width = min(height, 4 * width), min(width, 4 * height)  # a long strip fills the memory
    factor = round(size * 8 / 7) / min(height, width)
    resized = round(height * factor), round(width * factor)
    return _middle(augment.resize(_middle(image, height, width), resized), size, size)


def _middle(image, height, width):
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top:top + height, left:left + width]


@functools.lru_cache(maxsize=2)                 # workers may be an epoch ahead
def permutation(n, seed, epoch):
    """The order (n,) of the images in an epoch."""
    return augment.generator("order", seed, epoch).permutation(n)


def steps_per_epoch(n, batch, drop_last=True):
    """The number of batches in n images, without or with the incomplete last one."""
    return n // batch if drop_last else -(-n // batch)


def default_workers():
    """The processor cores that this process may use, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)           # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def views(images, n_views, *, size, area, batch, seed, start, stop, device, workers,
          drop_last=True):
    """Yield `(step, x, index)` for the steps from `start` to `stop`: random crops of images.

    `x` (V, N, 3, size, size) uint8 on `device`: V crops, of `area` (lo, hi), of each image in this
    process's part of the global batch. `index` (N,) int64 on `device`: which images they are.
    Images and crops depend only on (seed, step). An unreadable image is reported and replaced by
    the next; raises UserError if more than 1 % are unreadable.
    """
    def own_batches():
        """This process's part of each global batch: indices (N,), uniform numbers (N, V, 22)."""
        n = len(images)
        for step in range(start, stop):
            epoch, i = divmod(step, steps_per_epoch(n, batch, drop_last))
            # A global batch is a contiguous slice of the epoch's permutation.
            index = permutation(n, seed, epoch)[i * batch:(i + 1) * batch]
            u = augment.generator("crops", seed, step).random((len(index), n_views, 22))
            mine = ddp.rows(len(index))
            yield index[mine], u[mine]
    if images.pixels is not None:
        pixels = images.pixels.to(device)
        for step, (index, u) in enumerate(own_batches(), start):
            yield step, *_crops_in_memory(pixels, index, u, size, area)
        return
    batches, planned = itertools.tee(own_batches())
    # Batches are split into tasks, so that all workers share a large one.
    tasks = (task for index, u in batches
             for task in BatchSampler(list(zip(index.tolist(), u)), TASK_SIZE, drop_last=False))
    pieces = _read(images.files, functools.partial(_crops, size=size, area=area), tasks, workers,
                   device.type == "cuda")
    # A part without images has no tasks.
    empty = torch.empty(0, dtype=torch.int64), torch.empty(0, n_views, 3, size, size).byte()
    for step, (index, _) in enumerate(planned, start):
        n_pieces = math.ceil(len(index) / TASK_SIZE)
        read, x = (torch.cat([part.to(device, non_blocking=True) for part in tensors])
                   for tensors in zip(empty, *itertools.islice(pieces, n_pieces)))
        yield step, x.transpose(0, 1), read


def _crops_in_memory(pixels, index, u, size, area):
    """A crop for each of the numbers u (N, V, 22): uint8 (V, N, 3, size, size), and the index."""
    n_views = u.shape[1]
    boxes = augment.crop_boxes(*pixels.shape[2:], np.concatenate(u.transpose(1, 0, 2)), area)
    chosen = torch.from_numpy(index).repeat(n_views)
    sent = ddp.send({"boxes": torch.from_numpy(boxes), "chosen": chosen}, pixels.device)
    parts = zip(sent["chosen"].split(8 * TASK_SIZE), sent["boxes"].split(8 * TASK_SIZE))
    x = torch.cat([augment.crop_resize(pixels[i], box, size) for i, box in parts])
    return x.unflatten(0, (n_views, -1)), sent["chosen"][:len(index)]


def whole(images, *, size, batch, device, workers):
    """Yield uint8 batches (n, 3, size, size) on `device` of all images, un-augmented, in order."""
    make = functools.partial(_centre, size=size)
    if images.pixels is not None:
        for part in images.pixels.split(batch):
            yield make(part.to(device), None)
        return
    for _, x in _read(images.files, make, _in_order(images, batch), workers, device.type == "cuda"):
        yield x.to(device, non_blocking=True)
