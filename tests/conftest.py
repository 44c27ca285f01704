"""Shared by the tests: where the project is, running a script, running a function in two processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more faults, and two nodes: a quarter of an hour")


def run(*argv, cwd, torchrun=0, check=True, **env):
    """Run a script of the project in `cwd`, as a user would, and return the finished process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] \
        if torchrun else [sys.executable]
    done = subprocess.run([*launch, str(ROOT / argv[0]), *map(str, argv[1:])], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _enter(rank, world, port, function, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    from common import ddp
    ddp.init()
    function(*args)
    ddp.close()


def spawn(function, *args, world=2):
    """Call `function(*args)` in `world` gloo processes."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_enter, (world, port, function, args), nprocs=world, start_method="spawn")


def close(a, b, most):
    """Whether a differs from b by at most `most` of b's length."""
    return ((a - b).norm() <= most * b.norm()).item()


def same(a, b):
    """Whether two checkpoints, or what is in them, are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def photo(rng, height, width):
    """An image with edges and gradients, (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.uniform(.02, .3) * x + rng.uniform(.02, .3) * y + rng.uniform(0, 6)) for _ in range(3)]
    return np.clip(128 + 90 * np.stack(waves, 2) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_folder(root, n, size, classes=("cat", "dog"), splits=("train", "val")):
    """Class folders of `n` JPEGs each."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(photo(rng, *size)).save(root / split / name / f"{i}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder of small class folders, which are kept in memory; for reading only."""
    return write_folder(tmp_path_factory.mktemp("images") / "small", 22, (32, 32))


@pytest.fixture
def inside(monkeypatch, capsys):
    """Call a script's `main` in this process, which saves its start-up: `inside(module, *argv, cwd=...)` -> stdout."""
    def call(module, *argv, cwd):
        monkeypatch.chdir(cwd)
        numbers = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.getsignal(n) for n in numbers]
        try:
            module.main([str(a) for a in argv])
        finally:
            for n, handler in zip(numbers, handlers):
                signal.signal(n, handler)
        return capsys.readouterr().out
    return call


@pytest.fixture
def photos():
    """Eight images (8, 3, 48, 40) uint8."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(np.stack([photo(rng, 48, 40) for _ in range(8)])).permute(0, 3, 1, 2).contiguous()
