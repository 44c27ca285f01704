import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as F
from conftest import photo, spawn, write_folder
from PIL import Image

from common import data, ddp, textures

CPU = torch.device("cpu")


def batches(images, start=0, stop=6, workers=0, batch=4, size=16, n_views=2, seed=0):
    return [(step, x.clone(), index) for step, x, index in data.views(
        images, n_views, size=size, area=(.2, 1.), batch=batch, seed=seed, start=start, stop=stop, device=CPU,
        workers=workers)]


def equal(a, b):
    return len(a) == len(b) and all(s == t and torch.equal(x, y) and torch.equal(i, j)
                                    for (s, x, i), (t, y, j) in zip(a, b))


def test_textures_are_the_same_everywhere():
    images, labels = textures.draw(200, 0)
    assert images.shape == (200, 3, 32, 32) and np.bincount(labels).tolist() == [20] * 10
    # to a grey level: another machine may round the last bit of a sine the other way
    sums = images.reshape(200, -1).astype(np.int64).sum(1)[:5]
    assert abs(sums - [360489, 414673, 345081, 374114, 382945]).max() <= 100, sums.tolist()
    again, _ = textures.draw(200, 0)
    other, _ = textures.draw(200, 1)
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_colour_does_not_tell_textures_apart():
    """A nearest-neighbour vote over the mean colour is near chance (10 %)."""
    from common.evaluate import knn
    (bank, y), (ask, t) = textures.draw(2000, 0), textures.draw(500, 1)
    colour = [torch.from_numpy(x.reshape(len(x), 3, -1).mean(2)).float() - 128 for x in (bank, ask)]
    assert knn(colour[0], torch.from_numpy(y), colour[1], torch.from_numpy(t), k=20) < 25


def test_class_folders_are_recognised_and_scaled_by_their_size(tmp_path):
    small = data.open_data(write_folder(tmp_path / "small", 3, (32, 32)))
    assert (small.scale, small.classes, len(small.train), len(small.test)) == ("cifar10", ["cat", "dog"], 6, 6)
    assert small.train.pixels.shape == (6, 3, 32, 32) and small.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "small/train/dog/1.jpg") as image:
        assert np.array_equal(small.train.pixels[4].permute(1, 2, 0), np.asarray(image))
    large = data.open_data(write_folder(tmp_path / "large", 3, (90, 120), splits=("train", "test")))
    assert (large.scale, len(large.test)) == ("imagenet", 6) and large.train.pixels is None
    assert "train" in os.fsdecode(large.train.files[0]) and "test" in os.fsdecode(large.test.files[0])


def test_images_without_classes_serve_pre_training(tmp_path):
    for i in range(5):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(photo(np.random.default_rng(i), 80, 100)).save(tmp_path / str(i % 2) / f"{i}.png")
    found = data.open_data(tmp_path)
    assert (len(found.train), found.test, found.train.labels) == (5, None, None)
    assert batches(found.train, stop=1)[0][1].shape == (2, 4, 3, 16, 16)


def test_cifar10_batches_go_through_torchvisions_checksums(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng, sums = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(SystemExit, match="checksum"):
        data.open_data(tmp_path)
    C = torchvision.datasets.CIFAR10
    monkeypatch.setattr(C, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(C, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(C, "meta", {**C.meta, "md5": hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()})
    for path in (tmp_path, folder):
        found = data.open_data(path)
        assert (len(found.train), len(found.test), found.scale) == (20, 4, "cifar10")
        assert torch.equal(found.test.pixels[3].flatten(), torch.from_numpy(batch["data"][3]))
        assert found.test.labels.tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("memory", [True, False])
def test_batches_are_a_function_of_seed_and_step(tmp_path, memory):
    """Not of the number of workers, nor of where a run was resumed; each image once an epoch, the rest dropped."""
    images = data.open_data(None if memory else write_folder(tmp_path, 7, (70, 80))).train
    if memory:
        images = data.Images(images.labels[:14], images.pixels[:14])
    whole = batches(images)
    assert equal(batches(images, workers=2), whole) and equal(batches(images, start=2), whole[2:])
    assert not equal(batches(images, seed=1), whole)
    epochs = [torch.cat([index for _, _, index in whole[3 * e:3 * e + 3]]).tolist() for e in (0, 1)]
    assert all(len(set(e)) == 12 for e in epochs) and epochs[0] != epochs[1]
    x = whole[0][1]
    assert x.dtype == torch.uint8 and not torch.equal(x[0], x[1])                   # two crops of an image differ
    one, seven = batches(images, n_views=1)[0][1], whole[3][1]
    assert one.shape == (1, 4, 3, 16, 16) and not torch.equal(seven, x)


def test_crops_from_memory_equal_crops_from_files(tmp_path):
    """The fast path of small images against the worker's, to what rounding between two passes gives."""
    root = write_folder(tmp_path, 7, (40, 56))
    memory = data.open_data(root).train
    files = data.Images(memory.labels, files=data._find(root / "train"))
    for (_, a, i), (_, b, j) in zip(batches(memory), batches(files)):
        assert torch.equal(i, j) and (a.int() - b.int()).abs().max() <= 2


def rows_of(folder):
    torch.save(batches(data.open_data(None).train, stop=3), folder / f"{ddp.rank()}.pt")


def test_two_processes_see_the_global_batches_of_one(tmp_path):
    spawn(rows_of, tmp_path)
    whole, parts = batches(data.open_data(None).train, stop=3), [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    for (_, x, index), (_, xa, a), (_, xb, b) in zip(whole, *parts):
        assert torch.equal(torch.cat([a, b]), index) and torch.equal(torch.cat([xa, xb], 1), x)


def test_a_broken_image_is_named_counted_and_replaced_by_the_next(tmp_path, capfd):
    root = write_folder(tmp_path, 60, (70, 80))
    (root / "train/cat/3.jpg").write_bytes(b"no image")
    images = data.open_data(root).train
    bad = next(i for i, f in enumerate(images.files) if f.endswith(b"cat/3.jpg"))
    for workers in (0, 2):
        seen = torch.cat([index for _, _, index in batches(images, stop=29, workers=workers)]).tolist()
        err = capfd.readouterr().err
        assert bad not in seen and seen.count(bad + 1) == 2
        assert err.count("unreadable image") == 1 and "cat/3.jpg" in err
    (root / "train/cat/50.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match="2 of 120 images cannot be read, more than 1%"):
        batches(images, stop=29)


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
    for ours, name in zip(x, images.files):
        theirs = F.pil_to_tensor(F.center_crop(F.resize(Image.open(name), 128), 112))
        assert (ours.int() - theirs.int()).abs().max() <= 2
    assert len(x) == 8
