"""Shared by the tests: run a script, call it in this process or in two, compare, make images."""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS = "moco_v2", "simclr", "instdisc", "linear_probe"
sys.path.insert(0, str(ROOT))

from common import ddp, textures, train  # noqa: E402
from common.run import Log, Run  # noqa: E402

textures.draw = functools.cache(textures.draw)                  # .7 s per script otherwise

# The tests run on the CPU: they compare results bit by bit, and processes that have no GPU of their
# own. test_gpu.py shows the GPU again to the scripts that it runs. (pytest-xdist reads this twice.)
VISIBLE = os.environ.setdefault("VISIBLE_GPU", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true",
                     help="many more faults, and two nodes; takes a quarter of an hour")


def run(*argv, cwd, torchrun=0, check=True, **env):
    """Run a script of the project in `cwd`, as a user would, and return the finished process."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    command += [str(ROOT / argv[0]), *map(str, argv[1:])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _enter(rank, world, path, function, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    # By a file instead of a port, which another process could take.
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    ddp.init()
    function(*args)
    ddp.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(function, *args, world=2, seconds=240):
    """Call `function(*args)` in `world` gloo processes; fail if they do not end in time."""
    # Forked from a server that has imported the slow packages once.
    multiprocessing.set_forkserver_preload(["torchvision", "scipy.stats", "matplotlib.figure",
                                            "pytest", *SCRIPTS])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_enter, (world, f"{folder}/meet", function, args),
                                     nprocs=world, start_method="forkserver", join=False)
        end = time.time() + seconds
        while not context.join(timeout=5):
            if time.time() > end:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{function.__name__}: {world} processes hang")


def wait_for(condition, job, seconds=90):
    """Wait until `condition()`, while `job` runs; if it does not come true, show its output."""
    end = time.time() + seconds
    while not condition():
        if time.time() > end or job.poll() is not None:
            job.kill()
            pytest.fail(job.communicate()[0][-5000:])
        time.sleep(.05)


def in_two_processes(script, *argv, cwd):
    """Call a script's `main` in two processes of one thread, without torchrun's start-up time."""
    spawn(_main, script.__name__, [str(a) for a in argv], cwd)


def _main(script, argv, cwd):
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)        # of loader processes, as usual
    assert importlib.import_module(script).main(argv) == 0


def entries(out, event):
    """The entries of a kind in the log of the run in the folder `out`."""
    return [entry for entry in Log(out / "log.jsonl").entries() if entry["event"] == event]


def close(a, b, most):
    """Whether the norm of a - b is at most `most` times that of b."""
    return ((a - b).norm() <= most * b.norm()).item()


def same(a, b):
    """Whether two checkpoints, or parts of them, are bit-identical."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def photo(rng, height, width):
    """An image with edges and gradients, (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.uniform(.02, .3) * x + rng.uniform(.02, .3) * y + rng.uniform(0, 6))
             for _ in range(3)]
    noise = rng.normal(0, 12, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, 2) + noise, 0, 255).astype(np.uint8)


def write_folder(root, n, size, classes=("cat", "dog"), splits=("train", "val")):
    """Class folders of `n` JPEGs each, of `size` (height, width)."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(photo(rng, *size))
                image.save(root / split / name / f"{i}.jpg", quality=92)
    return root


def image_files(folder):
    """The files of a folder of images in order, (n,) bytes, as in `data.Images`."""
    return np.array(sorted(os.fsencode(path) for path in folder.rglob("*.*")))


@contextlib.contextmanager
def signal_handlers_restored():
    """A script installs its own handlers; put pytest's back."""
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(module, *argv):
    """The one line on stderr with which a script ends when its input is bad.

    Calls the script's `main` through `train.launch`, in this process and the current folder.
    """
    err = io.StringIO()
    with signal_handlers_restored(), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            train.launch(module.main, [str(a) for a in argv])
    text = err.getvalue()
    assert end.value.code not in (0, None), (argv, text)
    assert len(text.splitlines()) == 1 and "Traceback" not in text, text
    return text.strip()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder of small class folders, which are kept in memory; for reading only."""
    return write_folder(tmp_path_factory.mktemp("images") / "small", 22, (32, 32))


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """Drawing curves.png takes most of a short run: only tests with "curves" in their names do it.

    Scripts that run in processes of their own draw it, too.
    """
    if "curves" not in request.node.name:
        monkeypatch.setattr(Run, "_draw", lambda run: None)


@pytest.fixture
def inside(monkeypatch, capsys):
    """`inside(module, *argv, cwd=...)` calls a script's `main` in this process; returns stdout."""
    def call(module, *argv, cwd):
        monkeypatch.chdir(cwd)
        with signal_handlers_restored():
            code = module.main([str(a) for a in argv])
        assert code in (0, None), code
        return capsys.readouterr().out
    return call


@pytest.fixture
def photos():
    """Eight images (8, 3, 48, 40) uint8."""
    rng = np.random.default_rng(1)
    images = np.stack([photo(rng, 48, 40) for _ in range(8)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
