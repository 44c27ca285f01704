"""What is recognised in a folder; batches, for any number of workers and processes; bad files."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as F
from conftest import image_files, photo, spawn, write_folder
from PIL import Image

from common import UserError, data, ddp, evaluate, textures

CPU = torch.device("cpu")


def batches(images, start=0, stop=6, workers=0, batch=4, size=16, n_views=2, seed=0):
    found = data.views(images, n_views, size=size, area=(.2, 1.), batch=batch, seed=seed,
                       start=start, stop=stop, device=CPU, workers=workers)
    return [(step, x.clone(), index) for step, x, index in found]


def equal(a, b):
    return len(a) == len(b) and all(
        s == t and torch.equal(x, y) and torch.equal(i, j) for (s, x, i), (t, y, j) in zip(a, b))


def test_textures_are_the_same_everywhere():
    images, labels = textures.draw(200, 0)
    assert images.shape == (200, 3, 32, 32) and np.bincount(labels).tolist() == [20] * 10
    # To a grey level: another machine may round the last bit of a sine differently.
    sums = images.reshape(200, -1).astype(np.int64).sum(1)[:5]
    assert abs(sums - [418853, 425127, 298475, 387455, 428144]).max() <= 100, sums.tolist()
    again, _ = textures.draw.__wrapped__(200, 0)                # conftest caches
    other, _ = textures.draw(200, 1)
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_mean_colour_does_not_separate_the_textures():
    """A nearest-neighbour vote over the mean colour is near chance (10 %)."""
    (bank, y), (queries, t) = textures.draw(2000, 0), textures.draw(500, 1)
    colour = [torch.from_numpy(x.reshape(len(x), 3, -1).mean(2)).float() - 128
              for x in (bank, queries)]
    y, t = torch.from_numpy(y), torch.from_numpy(t)
    assert evaluate.knn(colour[0], y, colour[1], t, k=20) < 25


def test_class_folders_are_recognised_and_their_scale_follows_from_the_image_size(tmp_path):
    small = data.open_data(write_folder(tmp_path / "small", 3, (32, 32)))
    assert (small.scale, small.classes) == ("cifar10", ["cat", "dog"])
    assert (len(small.train), len(small.test)) == (6, 6)
    assert small.train.pixels.shape == (6, 3, 32, 32)
    assert small.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "small/train/dog/1.jpg") as image:
        assert np.array_equal(small.train.pixels[4].permute(1, 2, 0), np.asarray(image))
    large = write_folder(tmp_path / "large", 3, (90, 120), splits=("train", "test"))
    large = data.open_data(large)
    assert (large.scale, len(large.test)) == ("imagenet", 6) and large.train.pixels is None
    assert "train" in os.fsdecode(large.train.files[0])
    assert "test" in os.fsdecode(large.test.files[0])


def test_images_without_classes_are_enough_for_pre_training(tmp_path):
    for i in range(5):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        image = Image.fromarray(photo(np.random.default_rng(i), 80, 100))
        image.save(tmp_path / str(i % 2) / f"{i}.png")
    found = data.open_data(tmp_path)
    assert (len(found.train), found.test, found.train.labels) == (5, None, None)
    assert batches(found.train, stop=1)[0][1].shape == (2, 4, 3, 16, 16)
    with pytest.raises(UserError, match="labels are needed; expected train/<class>/ and val/"):
        data.open_labelled(tmp_path)


def test_cifar10_is_read_by_torchvision_which_verifies_checksums(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng, sums = np.random.default_rng(0), {}

    def checksum(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
        sums[name] = checksum(name)
    meta = {"label_names": list("abcdefghij")}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="cifar-10-batches-py: .*checksum"):
        data.open_data(tmp_path)
    dataset, test_sum = torchvision.datasets.CIFAR10, sums.pop("test_batch")
    monkeypatch.setattr(dataset, "train_list", [list(item) for item in sums.items()])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", test_sum]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": checksum("batches.meta")})
    for path in (tmp_path, folder):
        found = data.open_data(path)
        assert (len(found.train), len(found.test), found.scale) == (20, 4, "cifar10")
        assert torch.equal(found.test.pixels[3].flatten(), torch.from_numpy(pixels[3]))
        assert found.test.labels.tolist() == [0, 1, 2, 9]
    assert len(data.open_data(folder.rename(tmp_path / "renamed")).train) == 20


@pytest.mark.parametrize("memory", [True, False])
def test_batches_depend_only_on_seed_and_step(tmp_path, memory):
    """Not on the number of workers or on resuming. Each image once per epoch, the rest dropped."""
    if memory:
        images = data.open_data().train.take(slice(14))
    else:
        images = data.open_data(write_folder(tmp_path, 7, (70, 80))).train
    whole = batches(images)
    assert equal(batches(images, workers=2), whole)
    assert equal(batches(images, start=2), whole[2:])
    assert not equal(batches(images, seed=1), whole)
    epochs = [torch.cat([index for _, _, index in whole[3 * e:3 * e + 3]]).tolist()
              for e in (0, 1)]
    assert all(len(set(e)) == 12 for e in epochs) and epochs[0] != epochs[1]
    x = whole[0][1]
    assert x.dtype == torch.uint8
    assert not torch.equal(x[0], x[1])                          # two crops of an image differ
    one, later = batches(images, n_views=1)[0][1], whole[3][1]
    assert one.shape == (1, 4, 3, 16, 16) and not torch.equal(later, x)


def test_crops_from_memory_equal_crops_from_files(tmp_path):
    """The fast path of small images against a worker's, to the rounding between two passes."""
    root = write_folder(tmp_path, 7, (40, 56))
    memory = data.open_data(root).train
    files = data.Images(memory.labels, files=image_files(root / "train"))
    for (_, a, i), (_, b, j) in zip(batches(memory), batches(files), strict=True):
        assert torch.equal(i, j) and (a.int() - b.int()).abs().max() <= 2


def test_rows_are_taken_with_their_labels():
    images = data.Images(torch.arange(5), pixels=torch.arange(5).view(5, 1, 1, 1))
    for rows in (slice(1, 4, 2), np.array([1, 3])):
        part = images.take(rows)
        assert len(part) == 2 and part.files is None
        assert part.labels.tolist() == part.pixels.flatten().tolist() == [1, 3]
    files = data.Images(files=np.array([b"a", b"b", b"c"])).take(slice(1, None))
    assert files.labels is None and files.files.tolist() == [b"b", b"c"]


def record_batches(folder, files):
    """What this process sees of even batches, and of epochs of 5 images in batches of 2.

    The last batch of such an epoch has one image for two processes.
    """
    textures = data.open_data().train
    seen = {"even": batches(textures, stop=3)}
    for kind, images in (("memory", textures.take(slice(5))), ("files", data.Images(files=files))):
        found = data.views(images, 1, size=16, area=(.2, 1.), batch=2, seed=0, start=0, stop=6,
                           device=CPU, workers=0, drop_last=False)
        seen[kind] = list(found)
    torch.save(seen, folder / f"{ddp.world()}-{ddp.rank()}.pt")


def test_two_processes_see_the_global_batches_of_one(tmp_path):
    """Also if the last batch is smaller than the number of processes."""
    files = image_files(write_folder(tmp_path / "images", 3, (70, 80), splits=("train",)))[:5]
    record_batches(tmp_path, files)
    spawn(record_batches, tmp_path, files)
    one, a, b = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for kind in ("memory", "files"):
        assert len(one[kind]) == 6 and [len(index) for _, _, index in a[kind]] == [1, 1, 0] * 2
    for kind in one:
        for (_, x, index), (_, xa, i), (_, xb, j) in zip(one[kind], a[kind], b[kind], strict=True):
            assert torch.equal(torch.cat([i, j]), index)
            assert torch.equal(torch.cat([xa, xb], 1), x)


def test_a_broken_image_is_named_counted_and_replaced_by_the_next(tmp_path, capfd):
    root = write_folder(tmp_path, 60, (70, 80))
    (root / "train/cat/3.jpg").write_bytes(b"no image")
    images = data.open_data(root).train
    bad = next(i for i, f in enumerate(images.files) if f.endswith(b"cat/3.jpg"))
    for workers in (0, 2):
        found = batches(images, stop=29, workers=workers)
        seen = torch.cat([index for _, _, index in found]).tolist()
        err = capfd.readouterr().err
        assert bad not in seen and seen.count(bad + 1) == 2
        assert err.count("unreadable image") == (not workers)   # once in a process
        assert workers or "cat/3.jpg" in err
    (root / "train/cat/50.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 120 images cannot be read, more than 1%; the first "
                                        "is .*cat/.*.jpg"):
        batches(images, stop=29)


def open_own_folder(folder):
    """The message with which a process refuses a folder of its own machine."""
    with pytest.raises(UserError) as error:
        data.open_data(folder / str(ddp.rank()))
    (folder / f"{ddp.rank()}.txt").write_text(str(error.value))


def test_processes_with_different_images_are_refused(tmp_path):
    for rank in range(2):
        write_folder(tmp_path / str(rank), 3 + rank, (70, 80))
    spawn(open_own_folder, tmp_path)
    for rank in range(2):
        assert "the processes find different images" in (tmp_path / f"{rank}.txt").read_text()


def test_one_broken_image_is_allowed_in_a_small_folder(tmp_path, capfd):
    root = write_folder(tmp_path, 8, (70, 80))
    (root / "val/dog/1.jpg").write_bytes(b"")
    x = torch.cat(list(data.whole(data.open_data(root).test, size=32, batch=8, device=CPU,
                                  workers=0)))
    assert len(x) == 16 and torch.equal(x[9], x[10]) and "dog/1.jpg" in capfd.readouterr().err


def test_a_broken_small_image_takes_the_label_of_its_replacement(tmp_path, capfd):
    root = write_folder(tmp_path, 60, (32, 32))
    last = sorted((root / "train/cat").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:40])
    images = data.open_data(root).train
    assert "unreadable" in capfd.readouterr().err
    assert torch.equal(images.pixels[59], images.pixels[60]) and images.labels[59] == 1


def test_evaluation_sees_the_centre_of_each_image_once(tmp_path):
    root = write_folder(tmp_path, 4, (300, 200))
    images = data.open_data(root).test
    x = torch.cat(list(data.whole(images, size=112, batch=3, device=CPU, workers=0)))
    assert len(x) == len(images.files) == 8
    for ours, name in zip(x, images.files):
        theirs = F.pil_to_tensor(F.center_crop(F.resize(Image.open(name), 128), 112))
        assert (ours.int() - theirs.int()).abs().max() <= 2
    pixels = torch.stack([data.read_image(name) for name in images.files])
    memory = data.whole(data.Images(pixels=pixels), size=112, batch=3, device=CPU, workers=0)
    assert torch.equal(torch.cat(list(memory)), x)
