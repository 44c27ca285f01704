"""Images from what a path holds, and batches of random crops of them.

Nothing given: the embedded textures. A folder: class folders under train/ and val/ or test/; the CIFAR-10 batches of
torchvision; or images without classes, for pre-training only. Small images are decoded once and stay in memory; of
others a worker decodes the file, once for all views, and hands over uint8 crops. What follows the crop is augment.py's.
"""

import dataclasses
import functools
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common import augment, ddp, textures

EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # of what PIL knows; for EPS it would start a program
SMALL = 64                                                      # pixels: up to this side, images are kept in memory
PIECE = 256                                                     # images that a worker makes, or memory gives, at once
BROKEN = .01                                                    # share of unreadable images that stops a run


@dataclasses.dataclass
class Images:
    """Images as `pixels` (n, 3, H, W) uint8 or as `files` (n,) bytes, and their `labels` (n,) int64 or None."""

    labels: torch.Tensor = None
    pixels: torch.Tensor = None
    files: np.ndarray = None

    def __len__(self):
        return len(self.files) if self.pixels is None else len(self.pixels)

    def take(self, rows):
        """The images `rows`, a slice or a numpy array of indices, with their labels."""
        return Images(*(None if v is None else v[rows] for v in (self.labels, self.pixels, self.files)))


@dataclasses.dataclass
class Data:
    """What a path holds. `scale` is imagenet, cifar10 or textures; `test` and `classes` are None without labels."""

    path: str
    description: str
    scale: str
    train: Images
    test: Images = None
    classes: list = None


def open_data(path=None):
    """Recognise what `path` holds; None is the textures. Raises SystemExit with one line that says what was expected."""
    if path is None:
        train, test = (Images(torch.from_numpy(labels), torch.from_numpy(pixels))
                       for pixels, labels in (textures.draw(10_000, 0), textures.draw(2_000, 1)))
        return Data(None, "embedded textures, 10000 + 2000 images of 32 pixels, 10 classes", "textures", train, test,
                    list(textures.CLASSES))
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise SystemExit(f"{path}: {'not a folder' if root.exists() else 'no such folder'}; expected a folder of images")
    batches = root / "cifar-10-batches-py" if (root / "cifar-10-batches-py").is_dir() else root
    if (batches / "data_batch_1").is_file():
        return _cifar10(batches)
    if (root / "train").is_dir():
        return _class_folders(root)
    files = _find(root)
    if not len(files):
        raise SystemExit(f"{path}: no images in this folder; expected train/<class>/ and val/<class>/, the CIFAR-10 "
                         f"batches, or image files ({' '.join(EXTENSIONS)})")
    return _from_files(root, "images without classes", files, None)


def _find(folder):
    found = (os.path.join(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names
             if name.lower().endswith(EXTENSIONS))
    return np.array(sorted(map(os.fsencode, found)), dtype=np.bytes_)


def _cifar10(folder):
    """Through torchvision, whose checksums come before its pickles: a stranger's pickle would run code."""
    sets = []
    for train in (True, False):
        try:
            found = torchvision.datasets.CIFAR10(folder.parent, train=train)
        except RuntimeError:
            raise SystemExit(f"{folder}: not CIFAR-10's batches: a file is missing or its checksum is wrong")
        sets.append(Images(torch.tensor(found.targets), torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()))
    return Data(str(folder), "CIFAR-10's batches, 50000 + 10000 images of 32 pixels, 10 classes", "cifar10", *sets,
                found.classes)


def _class_folders(root):
    """train/<class>/ and val/<class>/ or test/<class>/; train/ alone serves pre-training."""
    splits, classes = [], None
    for split in (root / "train", next((root / s for s in ("val", "test") if (root / s).is_dir()), None)):
        if split is None:
            splits.append((None, None))
            continue
        names = sorted(d.name for d in split.iterdir() if d.is_dir())
        if not names and len(_find(split)):
            raise SystemExit(f"{split}: images without class folders, as ImageNet's validation set comes; move each into "
                             f"{split.name}/<class>/, the class being the one that its list of labels names")
        if not names:
            raise SystemExit(f"{split}: no class folders; expected {split.name}/<class>/*.jpg")
        if classes not in (None, names):
            odd = sorted(set(classes) ^ set(names))[0]
            raise SystemExit(f"{split}: its classes are not those of train/: {odd} is in one of them only")
        classes = names
        files = [_find(split / name) for name in names]
        empty = next((name for name, f in zip(names, files) if not len(f)), None)
        if empty is not None:
            raise SystemExit(f"{split / empty}: no images in this class folder; expected {' '.join(EXTENSIONS)}")
        splits.append((np.concatenate(files), torch.arange(len(names)).repeat_interleave(
            torch.tensor([len(f) for f in files]))))
    return _from_files(root, f"class folders, {len(classes)} classes", *splits[0], *splits[1], classes)


def _from_files(root, what, files, labels, test_files=None, test_labels=None, classes=None):
    sample = files[np.linspace(0, len(files) - 1, min(len(files), 32)).astype(int)]
    sizes, reason = [], None
    for name in sample:
        try:
            sizes.append(tuple(read_image(name).shape[1:]))
        except Exception as error:                              # PIL raises many kinds for a broken file
            reason = f"{os.fsdecode(name)}: {error}"
    if not sizes:
        raise SystemExit(f"{root}: none of {len(sample)} sampled images can be read; {reason}")
    small = max(map(max, sizes)) <= SMALL
    # in memory only where all have one size: crops of them are one matrix product
    keep = small and len(set(sizes)) == 1
    train, test = (None if f is None else _decode(f, y, sizes[0]) if keep else Images(y, files=f)
                   for f, y in ((files, labels), (test_files, test_labels)))
    height, width = np.median(sizes, 0).astype(int)
    count = f"{len(train)}" + (f" + {len(test)}" if test else "")
    return Data(str(root), f"{what}, {count} images of about {width} x {height} pixels",
                "cifar10" if small else "imagenet", train, test, classes)


def read_image(name):
    """The decoded image of a file as RGB (3, H, W) uint8, whatever its mode; neither turned by EXIF nor blended by alpha.

    Raises what PIL raises, among others for images above 179 million pixels.
    """
    with Image.open(name, formats=FORMATS) as image:
        if image.mode.startswith("I;16"):                       # convert() would clip 16 bits to 8
            return torch.from_numpy((np.array(image) >> 8).astype(np.uint8)).expand(3, -1, -1)
        # no convert() where there is nothing to convert: it would copy
        return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def _decode(files, labels, size):
    """All files in memory, as images of one size (height, width)."""
    loader = DataLoader(_Files(files, functools.partial(_resized, size=size)), batch_size=500,
                        num_workers=default_workers(), generator=torch.Generator())
    pixels, index, broken, done = torch.empty(len(files), 3, *size, dtype=torch.uint8), [], {}, 0
    for read, images in loader:
        pixels[done:done + len(read)] = images
        _count_broken(broken, range(done, done + len(read)), read.tolist(), files)
        index.append(read)
        done += len(read)
    return Images(None if labels is None else labels[torch.cat(index)], pixels)


def _count_broken(broken, asked, read, files):
    """Add to the dict `broken` what was replaced, and name it once. Raises SystemExit above 1 % of the files."""
    for i, j in zip(asked, read):
        if i != j and i not in broken:
            broken[i] = j
            print(f"unreadable image {os.fsdecode(files[i])}, replaced by {os.fsdecode(files[j])}", file=sys.stderr)
    if len(broken) > BROKEN * len(files):
        raise SystemExit(f"{len(broken)} of {len(files)} images cannot be read, more than {BROKEN:.0%}; "
                         f"the first is {os.fsdecode(files[min(broken)])}; remove or repair them")


class _Files(Dataset):
    """What a worker does: an index, or (index, u), -> the index that was read, and `make` of its decoded image.

    A file that cannot be read is replaced by the next one that can: a function of the index, not a draw.
    """

    def __init__(self, files, make):
        self.files, self.make = files, make

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        index, u = key if isinstance(key, tuple) else (key, None)
        for at in itertools.chain(range(index, len(self.files)), range(index)):
            try:
                image = read_image(self.files[at])
                break
            except Exception:                                   # PIL raises many kinds for a broken file
                continue
        return at, self.make(image, u)


def _crops(image, u, size, area):
    boxes = augment.crop_boxes(*image.shape[1:], u, area)
    return torch.stack([resize(image[:, t:t + h, l:l + w], (size, size)) for t, l, h, w in boxes.tolist()])


def _resized(image, _, size):
    return image if image.shape[1:] == size else resize(image, size)


def _centre(image, _, size):
    """For evaluation: short side to size * 8/7 (256 for 224), then the centre, as He et al. 2020."""
    height, width = image.shape[1:]
    if height == width == size:
        return image
    if max(height, width) > 4 * min(height, width):             # of a long strip only the middle, or memory runs out
        height, width = min(height, 4 * width), min(width, 4 * height)
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        image = image[:, top:top + height, left:left + width]
    factor = round(size * 8 / 7) / min(height, width)
    image = resize(image, (round(height * factor), round(width * factor)))
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top:top + size, left:left + size]


def resize(image, size):
    """Antialiased bilinear: (3, H, W) uint8 -> (3, *size) uint8."""
    image = image[None].contiguous(memory_format=torch.channels_last)           # in which torch's resize is fastest
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)[0]


class _Steps:
    """A batch sampler over steps, not epochs, so that workers never wait at the end of one.

    Yields this process's part of each global batch: a list of (index, u), u (V, 22) uniform draws behind its crops.
    """

    def __init__(self, n, batch, seed, start, stop, views, drop_last):
        self.n, self.batch, self.seed, self.start, self.stop, self.views = n, batch, seed, start, stop, views
        self.per_epoch = steps_per_epoch(n, batch, drop_last)

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            now, i = divmod(step, self.per_epoch)
            if now != epoch:
                epoch, order = now, augment.generator(self.seed, now, 0).permutation(self.n)
            indices = order[i * self.batch:(i + 1) * self.batch]
            u = augment.generator(self.seed, step, 1).random((len(indices), self.views, 22))
            mine = ddp.rows(len(indices))
            yield list(zip(indices[mine].tolist(), u[mine]))


def steps_per_epoch(n, batch, drop_last=True):
    """Batches of `batch` in n images, without or with the incomplete last one."""
    return n // batch if drop_last else -(-n // batch)


def default_workers():
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def views(images, n_views, *, size, area, batch, seed, start, stop, device, workers, drop_last=True):
    """Yield `(step, x, index)` for the steps from `start` to `stop`: crops of this process's part of each global batch.

    `x` (V, N, 3, size, size) uint8 on `device`, V crops of `area` (lo, hi) of each image; `index` (N,) int64 on the CPU,
    the images they are from. Which images and crops, is a function of (seed, step) alone. An image that cannot be read
    is named and replaced by the next one; more than 1 % of them raise SystemExit.
    """
    steps = _Steps(len(images), batch, seed, start, stop, n_views, drop_last)
    if images.pixels is not None:
        pixels = images.pixels.to(device)
        for step, keys in zip(range(start, stop), steps):
            index = torch.tensor([i for i, _ in keys])
            u = np.stack([u for _, u in keys], 1).reshape(n_views * len(keys), 22)
            boxes = torch.from_numpy(augment.crop_boxes(*pixels.shape[2:], u, area))
            x = torch.empty(n_views * len(keys), 3, size, size, dtype=torch.uint8, device=device)
            chosen = index.to(device).repeat(n_views)
            for part, i, box in zip(x.split(8 * PIECE), chosen.split(8 * PIECE), boxes.split(8 * PIECE)):
                part.copy_(augment.crop_resize(pixels[i], box, size))
            yield step, x.view(n_views, len(keys), 3, size, size), index
        return
    crops, broken = _Files(images.files, functools.partial(_crops, size=size, area=area)), {}
    # a batch in pieces: of a large one every worker makes some
    pieces = (keys[i:i + PIECE] for keys in steps for i in range(0, len(keys), PIECE))
    loader = iter(DataLoader(crops, batch_sampler=pieces, num_workers=workers, pin_memory=device.type == "cuda",
                             generator=torch.Generator(), prefetch_factor=4 if workers else None))
    for step, keys in zip(range(start, stop), steps):
        read, x = zip(*(next(loader) for _ in range(0, len(keys), PIECE)))
        index = torch.cat(read)
        _count_broken(broken, [i for i, _ in keys], index.tolist(), images.files)
        yield step, torch.cat([part.to(device, non_blocking=True) for part in x]).transpose(0, 1), index


def whole(images, *, size, batch, device, workers, rows=None):
    """Yield uint8 batches (n, 3, size, size) on `device` of the un-augmented images `rows` (a slice), each once."""
    rows, make = rows or slice(0, len(images)), functools.partial(_centre, size=size)
    if images.pixels is not None:
        for part in images.pixels[rows].to(device).split(batch):
            yield part if part.shape[2:] == (size, size) else torch.stack([make(image, None) for image in part])
        return
    files, broken, done = images.files[rows], {}, 0
    for index, x in DataLoader(_Files(files, make), batch_size=batch, num_workers=workers,
                               generator=torch.Generator(), pin_memory=device.type == "cuda"):
        _count_broken(broken, range(done, done + len(index)), index.tolist(), files)
        done += len(index)
        yield x.to(device, non_blocking=True)
