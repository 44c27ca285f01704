"""Speed compared with a straightforward implementation in the same run. This is not a test.

    python tests/benchmark.py [DATA] [--markdown] [--tiny]

DATA is a folder of images: large ones are used for the input rows, small ones for the rows of whole
runs. Without it, both are generated. It takes about five minutes on two cores. Rows on a GPU are
measured if there is one. --tiny runs every row with tiny sizes.
"""

import argparse
import contextlib
import functools
import io
import json
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image, ImageFilter
from torchvision import transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import test_device  # noqa: E402 (conftest, which hides the GPU, must not be imported)

import instdisc  # noqa: E402
import moco_v2  # noqa: E402
from common import augment, data, ddp, evaluate, train  # noqa: E402
from common.loss import info_nce, unit  # noqa: E402
from common.run import machine  # noqa: E402

rows = []


def row(work, against, goal, ours, theirs=None, unit="", form="{:.2f} times"):
    """Print and keep a row: ours and theirs in `unit`, the larger the better, and their ratio."""
    ratio = form.format(ours if theirs is None else ours / theirs)
    values = "" if theirs is None else f"{ours:,.4g} to {theirs:,.4g} {unit}"
    rows.append([work, against, goal, ratio, values])
    print(f"{work:58}  {ratio:>12}  goal {goal:14}  {values}  ({against})", flush=True)


def rates(works, rounds, device="cpu", warm=1):
    """Median calls per second of each of `works`, timed in turn: noise is the same for all."""
    seconds = [[] for _ in works]
    for _ in range(warm + rounds):
        for work, took in zip(works, seconds):
            begin = time.perf_counter()
            work()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
    return [1 / np.median(took[warm:]) for took in seconds]


# The input

def jpegs(folder, n):
    """Write n made-up JPEGs of ImageNet's usual size (500 x 375 pixels, 100 KB)."""
    rng = np.random.default_rng(0)
    for i in range(n):
        noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        smooth = np.asarray(noise.resize((500, 375), Image.BICUBIC))
        image = np.clip(smooth + rng.normal(0, 8, (375, 500, 1)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(f"{folder}/{i}.jpg", quality=95)


def released_stack(size):
    """The PIL pipeline of MoCo v2's release: torchvision's, and Pillow's faster Gaussian blur."""
    def gaussian(image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(.1, 2)))
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (.2, 1)),
        transforms.RandomApply([transforms.ColorJitter(.4, .4, .4, .1)], .8),
        transforms.RandomGrayscale(.2),
        transforms.RandomApply([transforms.Lambda(gaussian)], .5),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(*augment.NORMALISE["imagenet"])])


def input_rows(files, rounds, size=224):
    """Two views of each of `files` on one core: by PIL, and by a worker with the device's part."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                    # as in DataLoader's workers
    stack, device_part = released_stack(size), augment.Augment("moco_v2")
    u = np.random.default_rng(0).random((len(files), 2, 22))
    worker = data._Files(files, functools.partial(data._crops, size=size, area=(.2, 1)))

    def pil():
        for name in files:
            image = Image.open(name).convert("RGB")
            stack(image), stack(image)

    def crops():
        return torch.stack([worker[i, u[i]][1] for i in range(len(files))])

    def decode():
        for name in files:
            Image.open(name).convert("RGB")

    def both():
        device_part(crops().transpose(0, 1), 0)

    found = rates([pil, crops, decode, both], rounds)
    slow, ours, decoded, complete = (len(files) * rate for rate in found)
    torch.set_num_threads(threads)
    pil_stack = "torchvision's PIL stack"
    row(f"two views at {size}, a worker core", pil_stack, "4.0 times", ours, slow, "images/s")
    row("the same", "decoding the JPEG alone", "0.5 times", ours, decoded, "images/s")
    row("the same, augmentation on that core too", pil_stack, "1.5 times", complete, slow,
        "images/s")


# The step

def plain_step(s, device):
    """A straightforward step of MoCo.

    Eager fp32, default layout, ordinary batch norm, loops over parameters.
    """
    moco, _ = moco_v2.build(SimpleNamespace(**{**vars(s), "bn_group": None}), device)
    q, k = (encoder.to(memory_format=torch.contiguous_format)
            for encoder in (moco.encoder_q, moco.encoder_k))
    optimizer = torch.optim.SGD(q.parameters(), s.lr, .9, weight_decay=1e-4, foreach=False)
    queue, position = moco.queue, 0

    def step(x1, x2):
        nonlocal position
        order = torch.randperm(len(x2), device=device)
        with torch.no_grad():
            keys = unit(k(x2[order]))[order.argsort()]
        z = unit(q(x1))
        loss = info_nce((z * keys).sum(1), z @ queue.T, s.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop_momentum(q, k, s.m)
        queue[position:position + len(keys)] = keys
        position = (position + len(keys)) % s.K
    return step


@torch.no_grad()
def loop_momentum(q, k, m):
    for a, b in zip(k.parameters(), q.parameters()):
        a.copy_(a * m + b * (1 - m))


def our_step(s, device, graphs=True):
    moco, optimizer = moco_v2.build(s, device)
    s = SimpleNamespace(**{**vars(s), "graphs": graphs})
    moco.embed_q = train.embedder(moco.encoder_q, s, device, s.batch_size)
    moco.embed_k = train.embedder(moco.encoder_k, s, device, s.batch_size)
    done = 0

    def step(x1, x2):
        nonlocal done
        order = torch.randperm(len(x2)).to(device)
        moco_v2.train_step(moco, optimizer, x1, moco_v2.shuffle(x2, order), order, done)
        done += 1
    return step


def settings(scale, **other):
    """The settings of moco_v2.py at a scale, with `other` values."""
    s = train.settings(moco_v2.flags(), [], scale, moco_v2.SCALES, moco_v2.PRESETS)
    return SimpleNamespace(**{**vars(s), **other})


def serve(make, s, device, end):
    """Time one step per request and send back its seconds.

    Runs in a process of its own, because `our_step` configures the allocator.
    """
    x = torch.randn(2, s.batch_size, 3, s.size, s.size, device=device)
    if make is our_step:
        ddp.init()
        x = [view.contiguous(memory_format=torch.channels_last) for view in x]
    step = make(s, device)
    while end.recv():
        end.send(1 / rates([lambda: step(*x)], 1, device, warm=0)[0])


def step_row(s, goal, rounds, device):
    ends, context = [], mp.get_context("spawn")
    for make in (our_step, plain_step):
        here, there = Pipe()
        context.Process(target=serve, args=(make, s, device, there), daemon=True).start()
        ends.append(here)
    took = []
    for _ in range(rounds + 1):
        for end in ends:
            end.send(True)
            took.append(end.recv())
    for end in ends:
        end.send(False)
    fast, slow = s.batch_size / np.median(np.reshape(took[2:], (-1, 2)), axis=0)
    row(f"MoCo step, {s.arch}, {s.size} pixels, batch {s.batch_size}, {s.precision}",
        "eager fp32, default layout", goal, fast, slow, "images/s")


def momentum_row(arch, device, goal, rounds):
    moco, _ = moco_v2.build(settings("imagenet", arch=arch, K=128), device)

    def loop():
        loop_momentum(moco.encoder_q, moco.encoder_k, .999)
    fast, slow = rates([moco.momentum_update, loop], rounds, device)
    row(f"momentum update, {arch}, {device.type}", "loop over parameters", goal, fast, slow,
        "a second")


def gpu_rows(s, rounds, device):
    """The paper's setting with images in memory and the device's augmentation in the step."""
    x = torch.randint(0, 256, (2, s.batch_size, 3, s.size, s.size), dtype=torch.uint8,
                      device=device)
    stack = augment.Augment("moco_v2").to(device)
    wide, narrow = s.batch_size // 2, 32 * s.batch_size // 256  # images per group
    steps = [our_step(SimpleNamespace(**{**vars(s), "bn_group": group}), device)
             for group in (wide, narrow)]
    steps += [our_step(s, device, graphs=False), plain_step(s, device)]
    calls = [lambda step=step: step(*stack(x, 0)) for step in steps]
    calls.append(lambda: stack(x, 0))
    ours, grouped, eager, plain, augmentation = (
        rate * s.batch_size for rate in rates(calls, rounds, device))
    what = f"MoCo v2 step, {s.arch}, {s.size} pixels, batch {s.batch_size}, {device.type}"
    row(f"{what}, groups of {wide}", "images/s", "2000", ours, form="{:,.0f}")
    row("the same", "eager fp32", "2.5 times", ours, plain, "images/s")
    row(f"the same, groups of {narrow}", f"groups of {wide}", "0.75 times", grouped, ours,
        "images/s")
    row(f"the same, groups of {narrow}", "--no-graphs", "1.0 times", grouped, eager, "images/s")
    row("the same, augmentation on the device", "share of the step", "under 10 %",
        100 * ours / augmentation, form="{:.1f} %")


# Whole runs

def start(folder, path, *flags):
    argv = [sys.executable, ROOT / "moco_v2.py", *([path] if path else []), "--out", folder, *flags]
    return subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL)


def steady(folder, name):
    """The median of `name` over the log's step entries, without the first."""
    lines = (Path(folder) / "log.jsonl").read_text().split("\n")
    entries = [json.loads(line) for line in lines if line]
    values = [entry[name] for entry in entries if entry["event"] == "step"]
    return float(np.median(values[1:]))


def waiting_row(what, path, flags):
    with tempfile.TemporaryDirectory() as folder:
        assert start(folder, path, *flags).wait() == 0
        row(f"data waiting, {what}", "share of the time", "under 5 %",
            100 * steady(folder, "waiting"), form="{:.1f} %")


def epoch_rows(path, n, flags, processes=(1, 2, 4)):
    """Seconds per epoch of n images by the script, then of several at once on the same device."""
    alone = None
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            runs = [start(f"{folder}/{i}", path, *flags, "--seed", i) for i in range(count)]
            assert not any([run.wait() for run in runs])
            rate = sum(steady(f"{folder}/{i}", "images_per_s") for i in range(count))
        if alone is None:
            alone = rate
            row(f"MoCo v2 {' '.join(flags)}, {n} images", "an epoch", "under 3 s", n / rate,
                form="{:.2f} s")
        else:
            row(f"the same, {count} processes at once", "one", "no goal", rate, alone, "images/s")


def start_up_row(rounds):
    def call(*argv):
        subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    ours, bare = rates([lambda: call("moco_v2.py", "--help"),
                        lambda: call("-c", "import torch, torchvision")], rounds)
    row("python moco_v2.py --help", "import torch, torchvision", "within 1 s",
        1 / ours - 1 / bare, form="{:+.2f} s")


def quick_probe_row(arch, size, n, sample, device):
    """Of n features, beside extracting them; the latter is extrapolated from `sample` images."""
    encoder = moco_v2.build(settings("cifar10", arch=arch, K=128), device)[0].encoder_q
    pixels = torch.randint(0, 256, (sample, 3, size, size), dtype=torch.uint8)
    begin = time.perf_counter()
    evaluate.features(encoder, data.Images(pixels=pixels), normalisation="cifar10", size=size,
                      device=device, workers=0)
    extracting = (time.perf_counter() - begin) * n / sample
    y, rng = torch.randint(0, 10, (n,)), torch.Generator().manual_seed(0)
    centres = torch.randn(10, 512, generator=rng)
    x = (centres[y] * .2 + torch.randn(n, 512, generator=rng)).to(device)
    begin = time.perf_counter()
    evaluate.quick_probe(x[n // 6:], y[n // 6:], x[:n // 6], y[:n // 6])
    took = time.perf_counter() - begin
    row(f"quick probe, {n} x 512", f"extracting them, {arch} ({extracting:.0f} s)", "under 10 %",
        100 * took / extracting, form="{:.1f} %")


# Counts, which are the same on every machine, and the draws and epochs around the step

def counted_rows():
    draws = augment.Augment("moco_v2").draw(0, 8, views=2)
    with test_device.Operators() as seen:
        ddp.send(draws, torch.device("meta"))
    row("host-to-device copies of a step, non-blocking", "one more for the images", "at most 2",
        1 + seen.transfers, form="{:.0f}")
    row("launches of a MoCo step, resnet18-3x3, graphs", "1310 before", "25 %",
        100 * test_device.launches_of_moco() / test_device.LAUNCHES_BEFORE, form="{:.0f} %")
    row("launches of a LARS step, resnet50", "about 1200 before", "at most 60",
        test_device.launches_of_lars(), form="{:.0f}")


def draw_rows(batch, K, device, rounds):
    """Large draws on the device, against a numpy generator per image on the CPU."""
    def numpy_rows(draw):
        rows = [draw(np.random.default_rng((0, row))) for row in range(batch)]
        return torch.from_numpy(np.stack(rows)).to(device)

    def uniform():
        return augment.uniform((batch, K), device, "ranks", 0, 0)
    pairs = {
        "uniform numbers for hard negatives":
            (uniform, lambda: numpy_rows(lambda rng: rng.random(K, np.float32))),
        "slots of the memory bank":
            (lambda: instdisc.draw_negatives(50_000, K, batch, 0, 0, device),
             lambda: numpy_rows(lambda rng: rng.integers(50_000, size=K)))}
    for what, (ours, theirs) in pairs.items():
        fast, slow = rates([ours, theirs], rounds, device)
        row(f"{what}, {batch} x {K}, {device.type}", "numpy, a generator per image", "1.0 times",
            fast, slow, "a second")


def epoch_end_row():
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            seconds = test_device.end_of_epochs(folder)
        row("end of an epoch without evaluation", "", "under 0.05 s", seconds, form="{:.3f} s")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", metavar="DATA")
    parser.add_argument("--markdown", action="store_true", help="print the rows as a table too")
    parser.add_argument("--tiny", action="store_true",
                        help="every row, those for a GPU too, with tiny sizes")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    cuda, tiny, cpu = torch.cuda.is_available(), args.tiny, torch.device("cpu")
    device = ddp.init()
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    dataset = data.open_data(args.data)
    images = dataset.train
    in_memory = images.pixels is not None
    small = args.data if in_memory else None                    # a folder of small images
    with tempfile.TemporaryDirectory() as folder:
        jpegs(folder, 4 if tiny else 64)
        files = data.open_data(folder).train.files
        if not in_memory:
            files = images.files[::max(1, len(images) // 64)][:64]
        input_rows(files[:4] if tiny else files, 1 if tiny else 5)
    if not cuda or tiny:
        sizes = dict(batch_size=32)
        if tiny:
            sizes = dict(arch="resnet10", size=32, batch_size=8, K=64)
        step_row(settings("imagenet", **sizes), "3.3 times", 1 if tiny else 5, cpu)
        step_row(settings("cifar10", batch_size=8 if tiny else 128), "2.0 times", 1 if tiny else 7,
                 cpu)
    momentum_row("resnet10" if tiny else "resnet50", cpu, "1.0 times", 20)
    flags = ("--max-steps", "1000" if cuda else "300")
    if tiny:
        flags = ("--max-steps", "150")
    waiting_row("textures", None, flags)
    if small:
        waiting_row(f"{len(images)} small images, ResNet-10", small,
                    ("--arch", "resnet10", "--batch-size", "64", *flags))
    start_up_row(1 if tiny else 5)
    counted_rows()
    epoch_end_row()
    draw_rows(8 if tiny else 256, 64 if tiny else 65536, device, 1 if tiny else 5)
    if tiny:
        quick_probe_row("resnet10", 32, 600, 600, device)
    else:
        quick_probe_row("resnet18-3x3", 32, 50_000, 25_000 if cuda else 1500, device)
    if cuda or tiny:
        momentum_row("resnet10" if tiny else "resnet50", device, "2.0 times", 20)
        sizes, flags = {}, ("--arch", "resnet18-3x3", "--batch-size", "256", "--max-steps", "600")
        if tiny:
            sizes = dict(arch="resnet10", size=32, batch_size=16, K=64, bn_group=2)
            flags = ("--arch", "resnet10", "--batch-size", "64", "--max-steps", "150")
        gpu_rows(settings("imagenet", **sizes), 1 if tiny else 10, device)
        epoch_rows(small, len(images) if in_memory else 10_000, flags,
                   (1, 2) if tiny else (1, 2, 4))
    if args.markdown:
        print("\n| work | compared with | goal | measured | |\n|---|---|---|---|---|")
        print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main()
