"""How fast this is here, as ratios in one run against what a user would do otherwise; not a test, nothing fails.

    python tests/benchmark.py [DATA] [--markdown] [--tiny]

DATA is a folder of images: large ones serve the input rows, small ones the rows of whole runs. Without it both are made
up. About five minutes on two cores. Rows on a GPU are measured where there is one; --tiny runs every row in small.
"""

import argparse
import functools
import json
import os
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

import moco_v2  # noqa: E402
from common import augment, data, ddp, evaluate, train  # noqa: E402
from common.loss import info_nce, unit  # noqa: E402

rows = []


def row(work, against, at_least, ours, theirs=None, unit="", say="{:.2f} times"):
    """Print and keep a row: ours and theirs in `unit`, both the larger the better, and their ratio."""
    ratio = say.format(ours if theirs is None else ours / theirs)
    cells = [work, against, at_least, ratio, "" if theirs is None else f"{ours:,.4g} | {theirs:,.4g} {unit}".replace("|", "to")]
    rows.append(cells)
    print(f"{cells[0]:58}  {ratio:>12}  at least {at_least:11}  {cells[4]}  ({against})", flush=True)


def rates(works, rounds, device="cpu", warm=1):
    """Median calls per second of each of `works`, timed in turn, so that a noisy machine is noisy for all."""
    seconds = [[] for _ in works]
    for _ in range(warm + rounds):
        for work, took in zip(works, seconds):
            begin = time.perf_counter()
            work()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
    return [1 / np.median(took[warm:]) for took in seconds]


# the input

def jpegs(folder, n):
    """n made-up JPEGs of ImageNet's usual size and weight (500 x 375, 100 KB)."""
    rng = np.random.default_rng(0)
    for i in range(n):
        noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = rng.normal(0, 8, (375, 500, 1))
        Image.fromarray(np.clip(np.asarray(noise) + grain, 0, 255).astype(np.uint8)).save(f"{folder}/{i}.jpg", quality=95)


def released_stack(size):
    """The PIL pipeline of MoCo v2's release: what torchvision offers, and Pillow's own (faster) Gaussian blur."""
    def gaussian(image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(.1, 2)))
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (.2, 1)), transforms.RandomApply([transforms.ColorJitter(.4, .4, .4, .1)], .8),
        transforms.RandomGrayscale(.2), transforms.RandomApply([transforms.Lambda(gaussian)], .5),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*augment.NORMALISE["imagenet"])])


def input_rows(files, rounds, size=224):
    """Two views of each of `files` on one core: by PIL, by a worker, by a worker and the device's part on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                    # as DataLoader's workers have
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
        device_part(crops().transpose(0, 1), 0, 0, len(files))

    slow, ours, decoded, whole = (len(files) * rate for rate in rates([pil, crops, decode, both], rounds))
    torch.set_num_threads(threads)
    row(f"two views at {size}, a worker core", "torchvision's PIL stack", "4.0 times", ours, slow, "images/s")
    row("the same", "decoding the JPEG alone", "0.5 times", ours, decoded, "images/s")
    row("the same, device's part on that core too", "torchvision's PIL stack", "1.5 times", whole, slow, "images/s")


# the step

def plain_step(s, device):
    """A step of MoCo as one writes it first: eager fp32, default layout, ordinary batch norm, loops over parameters."""
    q, k, queue, _ = moco_v2.build(SimpleNamespace(**{**vars(s), "bn_group": None}), device)
    q, k = (e.to(memory_format=torch.contiguous_format) for e in (q, k))
    optimizer, place = torch.optim.SGD(q.parameters(), s.lr, .9, weight_decay=1e-4, foreach=False), 0

    def step(x1, x2):
        nonlocal place
        order = torch.randperm(len(x2), device=device)
        with torch.no_grad():
            keys = unit(k(x2[order]))[order.argsort()]
        z = unit(q(x1))
        loss = info_nce((z * keys).sum(1), z @ queue.T, s.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop_momentum(q, k, s.m)
        queue[place:place + len(keys)] = keys
        place = (place + len(keys)) % s.K
    return step


@torch.no_grad()
def loop_momentum(q, k, m):
    for a, b in zip(k.parameters(), q.parameters()):
        a.copy_(a * m + b * (1 - m))


def our_step(s, device, compiled=False):
    q, k, queue, optimizer = moco_v2.build(s, device)
    embed_q, embed_k = (train.embedder(e, device, s.precision, compiled) for e in (q, k))
    done = 0

    def step(x1, x2):
        nonlocal done
        order = torch.randperm(len(x2)).to(device)
        moco_v2.train_step(q, k, embed_q, embed_k, queue, optimizer, x1, x2, order, done, s.m, s.temperature)
        done += 1
    return step


def settings(scale, **other):
    precision = "bf16" if train._good_at_bf16() else "fp32"
    return SimpleNamespace(**{**moco_v2.SCALES[scale], "seed": 0, "precision": precision, **other})


def serve(make, s, device, end):
    """In a process of its own, since ours sets up the allocator: a step whenever asked, answered by its seconds."""
    if make is our_step:
        ddp.init()
    x = torch.randn(2, s.batch_size, 3, s.size, s.size, device=device)
    step, x = make(s, device), [v.contiguous(memory_format=torch.channels_last) for v in x] if make is our_step else x
    while end.recv():
        end.send(1 / rates([lambda: step(*x)], 1, device, warm=0)[0])


def step_row(s, at_least, rounds, device):
    ours, slow = Pipe(), Pipe()
    context = mp.get_context("spawn")
    for make, (_, end) in ((our_step, ours), (plain_step, slow)):
        context.Process(target=serve, args=(make, s, device, end), daemon=True).start()
    took = []
    for _ in range(rounds + 1):
        took.append([(end.send(True), end.recv())[1] for end, _ in (ours, slow)])
    for end, _ in (ours, slow):
        end.send(False)
    fast, slow = s.batch_size / np.median(took[1:], axis=0)
    row(f"MoCo step, {s.arch}, {s.size} pixels, batch {s.batch_size}, {s.precision}", "eager fp32, default layout", at_least,
        fast, slow, "images/s")


def momentum_row(arch, device, at_least, rounds):
    q, k, _, _ = moco_v2.build(settings("imagenet", arch=arch, K=128), device)
    fast, slow = rates([lambda: moco_v2.momentum_update(q, k, .999), lambda: loop_momentum(q, k, .999)], rounds, device)
    row(f"momentum update, {arch}, {device.type}", "loop over parameters", at_least, fast, slow, "a second")


def gpu_rows(s, rounds, device):
    """The paper's setting with images in memory and the device's augmentation in the step."""
    x = torch.randint(0, 256, (2, s.batch_size, 3, s.size, s.size), dtype=torch.uint8, device=device)
    stack = augment.Augment("moco_v2").to(device)
    steps = {}
    for group in (s.batch_size // 2, 32 * s.batch_size // 256):
        steps[group] = our_step(SimpleNamespace(**{**vars(s), "bn_group": group}), device)
    compiled, plain = our_step(s, device, compiled=True), plain_step(s, device)
    names = (*(f"groups of {group}" for group in steps), "compiled", "plain", "augmentation")
    calls = [lambda step=step: step(*stack(x, 0, 0, s.batch_size)) for step in (*steps.values(), compiled, plain)]
    found = dict(zip(names, rates([*calls, lambda: stack(x, 0, 0, s.batch_size)], rounds, device)))
    found = {name: rate * s.batch_size for name, rate in found.items()}
    wide, narrow = list(found)[:2]
    what = f"MoCo v2 step, {s.arch}, {s.size} pixels, batch {s.batch_size}, {device.type}"
    row(f"{what}, {wide}", "images/s", "2000", found[wide], say="{:,.0f}")
    row("the same", "eager fp32", "2.5 times", found[wide], found["plain"], "images/s")
    row(f"the same, {narrow}", wide, "0.75 times", found[narrow], found[wide], "images/s")
    row(f"the same, {narrow}, --compile", narrow, "no floor", found["compiled"], found[narrow], "images/s")
    row("the same, augmentation on the device", "share of the step", "under 10 %", 100 * found[wide] / found["augmentation"],
        say="{:.1f} %")


# whole runs

def start(folder, path, *flags):
    argv = [sys.executable, ROOT / "moco_v2.py", *([path] if path else []), "--out", folder, *flags]
    return subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL)


def steady(folder, name):
    """The median of `name` over the log's lines of steps, the first left out."""
    events = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return float(np.median([e[name] for e in events if e["event"] == "step"][1:]))


def waiting_row(what, path, flags):
    with tempfile.TemporaryDirectory() as folder:
        assert start(folder, path, *flags).wait() == 0
        row(f"data waiting, {what}", "share of the time", "under 5 %", 100 * steady(folder, "waiting"), say="{:.1f} %")


def epoch_rows(path, n, flags, processes=(1, 2, 4)):
    """Seconds an epoch of n images by the script itself, then several of them at once on the same device."""
    alone = None
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            runs = [start(f"{folder}/{i}", path, *flags, "--seed", i) for i in range(count)]
            assert not any(r.wait() for r in runs)
            rate = sum(steady(f"{folder}/{i}", "images_per_s") for i in range(count))
        if alone is None:
            alone = rate
            row(f"MoCo v2 {' '.join(flags)}, {n} images", "an epoch", "under 3 s", n / rate, say="{:.2f} s")
        else:
            row(f"the same, {count} processes at once", "one", "no floor", rate, alone, "images/s")


def start_up_row(rounds):
    def call(*argv):
        subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    ours, bare = rates([lambda: call("moco_v2.py", "--help"), lambda: call("-c", "import torch, torchvision")], rounds)
    row("python moco_v2.py --help", "import torch, torchvision", "within 1 s", 1 / ours - 1 / bare, say="{:+.2f} s")


def quick_probe_row(arch, size, n, sample, device):
    """Of n features, beside extracting them with the network of that scale; extrapolated from `sample` images."""
    encoder = moco_v2.build(settings("cifar10", arch=arch, K=128), device)[0]
    images = data.Images(torch.zeros(sample).long(), torch.randint(0, 256, (sample, 3, size, size), dtype=torch.uint8))
    begin = time.perf_counter()
    evaluate.features(encoder, images, scale="cifar10", size=size, device=device, workers=0)
    extracting = (time.perf_counter() - begin) * n / sample
    y, rng = torch.randint(0, 10, (n,)), torch.Generator().manual_seed(0)
    x = (torch.randn(10, 512, generator=rng)[y] * .2 + torch.randn(n, 512, generator=rng)).to(device)
    begin = time.perf_counter()
    evaluate.quick_probe(x[n // 6:], y[n // 6:], x[:n // 6], y[:n // 6])
    took = time.perf_counter() - begin
    row(f"quick probe, {n} x 512", f"extracting them, {arch} ({extracting:.0f} s)", "under 10 %", 100 * took / extracting,
        say="{:.1f} %")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", metavar="DATA")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README at the end")
    parser.add_argument("--tiny", action="store_true", help="every row, those for a GPU too, with tiny sizes")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    cuda, tiny, cpu = torch.cuda.is_available(), args.tiny, torch.device("cpu")
    device = ddp.init()
    print(", ".join(f"{k} {v}" for k, v in train.machine(device).items()), f"cores {os.cpu_count()}", sep=", ")
    dataset = data.open_data(args.data)
    small = dataset.train.pixels is not None
    with tempfile.TemporaryDirectory() as folder:
        jpegs(folder, 4 if tiny else 64)
        files = data._find(folder) if small else dataset.train.files[::max(1, len(dataset.train) // 64)][:64]
        input_rows(files[:4] if tiny else files, 1 if tiny else 5)
    if not cuda or tiny:
        step_row(settings("imagenet", **(dict(arch="resnet10", size=32, batch_size=8, K=64) if tiny else dict(batch_size=32))),
                 "3.3 times", 1 if tiny else 5, cpu)
        step_row(settings("cifar10", batch_size=8 if tiny else 128), "2.0 times", 1 if tiny else 7, cpu)
    momentum_row("resnet10" if tiny else "resnet50", cpu, "1.0 times", 20)
    run = ("--max-steps", "150") if tiny else ("--max-steps", "1000" if cuda else "300")
    waiting_row("textures", None, run)
    if small and args.data:
        waiting_row(f"{len(dataset.train)} small images, ResNet-10", args.data,
                    ("--arch", "resnet10", "--batch-size", "64", *run))
    start_up_row(1 if tiny else 5)
    quick_probe_row("resnet10" if tiny else "resnet18-3x3", 32, 600 if tiny else 50_000,
                    600 if tiny else 25_000 if cuda else 1500, device)
    if cuda or tiny:
        momentum_row("resnet10" if tiny else "resnet50", device, "2.0 times", 20)
        gpu_rows(settings("imagenet", **(dict(arch="resnet10", size=32, batch_size=16, K=64, bn_group=2) if tiny else {})),
                 1 if tiny else 10, device)
        run = ("--arch", "resnet10" if tiny else "resnet18-3x3", "--batch-size", "64" if tiny else "256", "--max-steps",
               "150" if tiny else "600")
        epoch_rows(args.data if small else None, len(dataset.train) if small else 10_000, run, (1, 2) if tiny else (1, 2, 4))
    if args.markdown:
        print("\n| work | measured against | at least | here | |\n|---|---|---|---|---|")
        print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main()
