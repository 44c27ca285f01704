"""What happens in runs of days: kills, lost processes, full disks, damaged files, hostile images, numbers out of bounds.

The README's table on reliability says how often each was tried; `--long` is how.
"""

import functools
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, photo, write_folder
from PIL import Image
from torch.utils.data import DataLoader

import instdisc
import linear_probe
import moco_v2
import simclr
from common import data, model, train

TINY = ("--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--K", "20", "--epochs", "3", "--out", "out")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}         # as the README says


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


def refused(module, *argv):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as error:
        module.main([str(a) for a in argv])
    text = str(error.value.code)
    assert error.value.code not in (0, None) and len(text.splitlines()) == 1, text
    return text


def wait_for(condition, job, seconds=90):
    """Until `condition()`, while `job` goes on; its output says why it did not."""
    end = time.time() + seconds
    while not condition():
        if time.time() > end or job.poll() is not None:
            job.kill()
            pytest.fail(job.communicate()[0][-5000:])
        time.sleep(.05)


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


# Kills and signals

def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(small, tmp_path, long):
    """With another number of workers at each start."""
    kills, large = 30 if long else 1, write_folder(tmp_path / "large", 12, (70, 90))
    done = subprocess.run([sys.executable, ROOT / "tests/kill.py", small, large, tmp_path / "k", "--kills", str(kills)],
                          text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 5 and all(t["kills"] == kills and t["repeated"] <= 6 for t in told)
    assert not long or all(t["while_saving"] for t in told)


def torchrun(small, tmp_path, *how):
    argv = [sys.executable, "-m", "torch.distributed.run", *how, ROOT / "moco_v2.py", small, *TINY]
    argv[argv.index("--epochs") + 1] = "400"
    return subprocess.Popen([*map(str, argv)], cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_torchrun_replaces_a_killed_process_stops_when_told_and_one_process_goes_on(small, tmp_path, inside):
    """The lock's file names the first process; all agree on the step at which they stop."""
    path = tmp_path / "out/checkpoint.pt"
    job = torchrun(small, tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    wait_for(path.exists, job)
    victim = int(re.search(r"process (\d+)", (tmp_path / "out/lock").read_text())[1])
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: str(victim) not in (tmp_path / "out/lock").read_text(), job)
    again = path.stat().st_mtime_ns
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns > again, job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode and re.search(r"going on in out at step \d+ of 2000", out), out
    step = step_of(path)
    assert f"stopped at step {step} of 2000, saved in out; the same command goes on" in out
    argv = [small, *TINY]
    argv[argv.index("--epochs") + 1] = "400"
    assert f"going on in out at step {step}" in inside(moco_v2, *argv, "--max-steps", step + 2, cwd=tmp_path)
    assert step_of(path) == step + 2


def test_of_two_nodes_one_is_killed_the_other_ends_and_both_go_on(small, tmp_path, long):
    if not long:
        pytest.skip("--long")
    path = tmp_path / "out/checkpoint.pt"

    def node():
        return torchrun(small, tmp_path, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=1",
                        f"--rdzv-endpoint=127.0.0.1:{port}")
    for last in (False, True):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        since, nodes = time.time_ns(), [node(), node()]
        wait_for(lambda: path.exists() and path.stat().st_mtime_ns > since, nodes[0])
        workers = subprocess.run(["pgrep", "-P", str(nodes[last].pid)], capture_output=True, text=True).stdout.split()
        for pid in (nodes[last].pid, *map(int, workers)):       # once the node that holds the rendezvous, once the other
            os.kill(pid, signal.SIGKILL)
        began = time.time()
        out, _ = nodes[not last].communicate(timeout=120)
        print(f"the other ended with {nodes[not last].returncode} after {time.time() - began:.0f} s")
        assert nodes[not last].returncode
        assert step_of(path) > 0
    starts = [e["step"] for e in map(json.loads, (tmp_path / "out/log.jsonl").open()) if e["event"] == "start"]
    print("went on at steps", starts)
    assert len(starts) > 1 and starts[-1] > 0


def test_a_folder_in_use_is_refused_also_with_fresh(small, tmp_path, inside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    code = ("import fcntl, time; f = open('out/lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on host'); "
            "f.flush(); print(flush=True); time.sleep(99)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    for more in ((), ("--fresh",)):
        assert "--out out: in use by process 7 on host;" in refused(moco_v2, small, *TINY, *more)
    holder.kill()
    holder.wait()
    assert "stopped at step 1" in inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)


SNIPPET = re.search(r"    #!/bin/bash\n.*?requeue[^\n]*\n\n", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_slurm_snippet_requeues_what_is_unfinished_and_only_that(tmp_path):
    """With stand-ins for SLURM's programs: srun leaves with torchrun's 1 and the log's last line that the run wrote."""
    script = "\n".join(line[4:] for line in SNIPPET[0].splitlines())
    for name, text in {"srun": 'mkdir -p runs/long; echo "{\\"event\\": \\"$EVENT\\"}" >> runs/long/log.jsonl; exit 1',
                       "scontrol": '[ "$1" = show ] && echo host1 || echo "$@" >> requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for event, count in (("unfinished", 1), ("step", 1), ("finished", 1), ("unfinished", 2)):
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "EVENT": event, "SLURM_JOB_ID": "5", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "host[1-2]"})
        assert (tmp_path / "requeued").read_text() == "requeue 5\n" * count


# Disk

def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(small, tmp_path):
    """On a real file system of 80 MB, where Linux lets us mount one: three checkpoints of 63 MB do not fit."""
    code = ("import subprocess, sys; sys.path.insert(0, sys.argv[1]); import moco_v2\n"
            "try: moco_v2.main(sys.argv[2:])\n"
            "except SystemExit as error: print('ended:', error)\n"
            "print(sorted(p.name for p in __import__('pathlib').Path('disk/out').iterdir()), flush=True)\n"
            "subprocess.run(['mount', '-o', 'remount,size=300m', 'disk'], check=True)\n"
            "moco_v2.main(sys.argv[2:])")
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    argv = [small, *TINY[:-1], "disk/out"]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=80m none disk && exec "$@"', "sh",
                           sys.executable, "-c", code, str(ROOT), *argv], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ended: disk/out/checkpoint.tmp: step 10 cannot be saved, with \d+ MiB free there: make", done.stdout)
    assert "['checkpoint.pt', 'curves.png', 'lock', 'log.jsonl']" in done.stdout
    assert "going on in disk/out at step 5 of 15" in done.stdout and "finished: checkpoint" in done.stdout


def test_a_full_disk_under_the_log_is_one_line():
    @train.guarded
    def main(argv):
        with open("/dev/full", "w") as file:
            file.write("x")
    with pytest.raises(SystemExit, match="cannot be written .No space left on device.: make room; what was saved is whole"):
        main([])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 3, "--save-minutes", 0, cwd=tmp_path)
    path, previous = tmp_path / "out/checkpoint.pt", tmp_path / "out/previous.pt"
    assert (step_of(path), step_of(previous)) == (3, 2)
    flip(path, random.Random(0))
    out = inside(moco_v2, small, *TINY, "--max-steps", 4, cwd=tmp_path)
    assert "out/checkpoint.pt: cannot be read as a checkpoint: cut short, damaged" in out
    assert "going on from the one before, out/previous.pt" in out and "going on in out at step 2" in out
    assert (step_of(path), step_of(previous)) == (4, 2)
    path.unlink()                                               # as a kill between the two renames leaves it
    assert "going on in out at step 2" in inside(moco_v2, small, *TINY, "--max-steps", 5, cwd=tmp_path)
    for file in (path, previous):
        os.truncate(file, 1000) if file.exists() else None
    held = path.read_bytes()
    assert "cut short" in refused(moco_v2, small, *TINY) and path.read_bytes() == held
    assert "writing to out" in inside(moco_v2, small, *TINY, "--fresh", "--max-steps", 1, cwd=tmp_path)


def test_what_is_no_damage_changes_nothing(small, tmp_path, inside, monkeypatch):
    """No memory for reading, a refused command: the folder stays as it is."""
    inside(moco_v2, small, *TINY, "--max-steps", 2, "--save-minutes", 0, cwd=tmp_path)
    path, previous = tmp_path / "out/checkpoint.pt", tmp_path / "out/previous.pt"
    held = path.read_bytes(), previous.read_bytes()

    def fails(error):
        def load(*_, **__):
            raise error
        return load
    for error, line in ((MemoryError(), "no memory left: lower"), (OSError(5, "Input/output error"), "cannot be opened")):
        monkeypatch.setattr(model.torch, "load", fails(error))
        assert line in refused(moco_v2, small, *TINY)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    flip(path, random.Random(0))
    damaged = path.read_bytes()
    assert "lr 0.0009375 there, 0.1 now" in refused(moco_v2, small, *TINY, "--lr", ".1")
    assert (path.read_bytes(), previous.read_bytes()) == (damaged, held[1])
    inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    assert (tmp_path / "out/damaged.pt").read_bytes() == damaged and path.read_bytes() == held[1]
    told = refused(linear_probe, small, "--encoder", path, "--out", "out", "--fresh")
    assert "holds the encoder that is probed" in told and path.exists()
    path.unlink()
    with (tmp_path / "out/log.jsonl").open("a") as log:
        log.write('3\n{"a": 1}\n{"event": "epoch", "step": 5}\n{"cut')
    out = inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    assert "has a log but no checkpoint: it begins anew" in out and (tmp_path / "out/log.old.jsonl").exists()


def test_images_may_move_but_not_change_in_number(small, tmp_path, inside):
    images = Path(shutil.copytree(small, tmp_path / "a"))
    inside(moco_v2, images, *TINY, "--max-steps", 1, cwd=tmp_path)
    moved = images.rename(tmp_path / "b")
    assert "going on in out at step 1" in inside(moco_v2, moved, *TINY, "--max-steps", 2, cwd=tmp_path)
    next((moved / "train/cat").iterdir()).unlink()
    assert "(images 44 there, 43 now)" in refused(moco_v2, moved, *TINY)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, long):
    f = model.resnet("resnet10")
    rng, path, whole = random.Random(0), tmp_path / "c.pt", io.BytesIO()
    torch.save({"step": 1, "settings": {}, "f": f.layer1.state_dict()}, whole)
    unnoticed = []
    for i in range(400 if long else 60):
        path.write_bytes(whole.getvalue())
        flip(path, rng)
        try:
            read = model.read_checkpoint(path, train.CHECKPOINT)
        except SystemExit:
            continue
        # a bit of the archive's padding or of a date changes nothing
        unnoticed.append(not all(torch.equal(v, read["f"][k]) for k, v in f.layer1.state_dict().items()))
    print(f"{i + 1} bits flipped, {len(unnoticed)} in what is not read")
    assert not any(unnoticed) and len(unnoticed) < .05 * i


# Numbers

def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_is_saved(small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 2, cwd=tmp_path)
    path, step, build = tmp_path / "out/checkpoint.pt", moco_v2.train_step, moco_v2.build

    def infinite_loss(*args):
        loss = step(*args)
        return loss * float("nan") if args[9] == 3 else loss
    monkeypatch.setattr(moco_v2, "train_step", infinite_loss)
    told = refused(moco_v2, small, *TINY)
    assert re.match(r"the loss is nan at step 4, learning rate \S+: try a smaller --lr, .* is of before", told)
    assert step_of(path) == 2

    def infinite_gradient(*args):
        built, calls = build(*args), iter(range(9))
        built[0].f.conv1.weight.register_hook(lambda g: g * float("inf") if next(calls) == 2 else g)
        return built
    monkeypatch.setattr(moco_v2, "train_step", step)
    monkeypatch.setattr(moco_v2, "build", infinite_gradient)
    assert "the loss is finite at step 5, but its gradient was not, learning rate" in refused(moco_v2, small, *TINY)
    assert step_of(path) == 2
    monkeypatch.setattr(moco_v2, "build", build)
    assert "going on in out at step 2" in inside(moco_v2, small, *TINY, "--max-steps", 5, cwd=tmp_path)
    assert all(torch.isfinite(v).all() for v in torch.load(path, weights_only=True)["f"].values())


# Images

def write_odd(folder):
    """One image of every kind that is read, and files that are none; returns their names."""
    folder.mkdir()
    pixels = photo(np.random.default_rng(0), 90, 110)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x112] = 6
    image.save(folder / "ok.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("P").save(folder / "palette.png", transparency=b"\0\x80")
    image.convert("1").save(folder / "bits.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    image.crop((0, 0, 1, 1)).save(folder / "one.png")
    Image.new("RGB", (20000, 1)).save(folder / "line.png")
    Image.new("RGB", (20000, 4000)).save(folder / "wide.jpg")
    read = sorted(p.name for p in folder.iterdir())
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "cut.jpg").write_bytes((folder / "ok.jpg").read_bytes()[:1200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return read, sorted({p.name for p in folder.iterdir()} - set(read))


def test_odd_images_are_read_or_replaced_by_a_function_of_their_index(tmp_path):
    read, not_read = write_odd(tmp_path / "odd")
    files = data._find(tmp_path / "odd")
    names = [Path(os.fsdecode(f)).name for f in files]
    loader = data._Files(files, lambda image, u: (data._crops(image, u, 64, (.2, 1.)), data._centre(image, None, 64)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # PIL's, on palettes and on large images
        found = [loader[i, np.random.default_rng(i).random((2, 22))] for i in range(len(files))]
        # a replaced image is the next one that can be read
        assert [names[at] for at, _ in found] == [next(n for n in names[i:] + names if n in read) for i in range(len(names))]
        deep, grey = (data.read_image(tmp_path / f"odd/{n}") for n in ("deep.png", "grey.jpg"))
    assert all(crops.shape == (2, 3, 64, 64) and centre.shape == (3, 64, 64) for _, (crops, centre) in found)
    assert len(not_read) == 5 and deep.float().std() > 20 and (grey[0] == grey[1]).all()
    with pytest.raises(Image.DecompressionBombError):
        data.read_image(tmp_path / "odd/bomb.png")


def test_mutated_jpegs_do_no_harm(tmp_path, long):
    """Through a worker process: no crash, no hang, bounded memory."""
    rng, count = np.random.default_rng(0), 20000 if long else 4000
    wholes = []
    for i in range(8):
        out = io.BytesIO()
        Image.fromarray(photo(rng, *rng.integers(60, 200, 2))).save(out, "jpeg", quality=int(rng.integers(40, 95)),
                                                                    progressive=bool(i % 2))
        wholes.append(out.getvalue())
    for i in range(count):
        b = bytearray(wholes[i % 8])
        for _ in range(rng.integers(1, 20)):
            at = int(rng.integers(len(b) if i % 3 else 700))    # a third of them in the header, where sizes stand
            kind = rng.integers(3)
            b[at:at + (kind > 0)] = rng.bytes(int(kind < 2))    # a byte more, another one, or one less
            del b[int(rng.integers(100, len(b))) if rng.random() < .02 else len(b):]        # or cut short
        (tmp_path / f"{i:05}.jpg").write_bytes(b)
    files = data._find(tmp_path)
    loader = data._Files(files, functools.partial(data._crops, size=32, area=(.2, 1.)))
    before, began, replaced = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.time(), 0
    seen = 0
    crops = [[(i, rng.random((1, 22))) for i in range(at, min(at + 50, count))] for at in range(0, count, 50)]
    for at, _ in DataLoader(loader, batch_sampler=crops, num_workers=1, timeout=60):
        replaced += int((at != torch.arange(seen, seen + len(at))).sum())
        seen += len(at)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 10
    print(f"{count} mutated, {replaced} replaced, {time.time() - began:.0f} s, at most {memory:.0f} MiB in a worker")
    assert seen == count and .02 * count < replaced < .9 * count and memory < max(4000, before / 2 ** 10 + 1)


# Files from strangers

class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_what_would_run_code_is_refused(small, tmp_path, monkeypatch):
    """As a checkpoint to go on from, as an encoder of ours, as FAIR's file and torchvision's; new and old format."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    good = torchvision.models.resnet18().state_dict()
    for zipped in (True, False):
        for i, content in enumerate((
                {"step": 1, "settings": {}, "f": Evil(), "g": {}}, {"state_dict": {**good, "x": Evil()}},
                {"module.encoder_q.conv1.weight": Evil()}, {**good, "x": Evil()}, Evil())):
            torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
            told = refused(linear_probe, small, "--quick", "--encoder", "evil.pt")
            assert re.match(r"evil.pt: refused: reading it would run code \(\w+\.system\)", told), told
            if not i:
                shutil.copy("evil.pt", "out/checkpoint.pt")
                assert "refused: reading it would run code" in refused(moco_v2, small, *TINY)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    assert "evil.pt: " in refused(linear_probe, small, "--quick", "--encoder", "evil.pt")
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_run_is_refused(small, tmp_path, inside):
    inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    path = tmp_path / "out/checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    momentum = {"state": {i: {"momentum_buffer": torch.zeros(3)} for i in whole["optimizer"]["state"]}}
    for change, line in [
            ({"f": None}, "checkpoint: f is missing"), ({"queue": None}, "checkpoint: queue is missing, or no tensor"),
            ({"queue": torch.zeros(7, 128)}, "queue has shape (7, 128), not (20, 128)"),
            ({"f": {**whole["f"], "conv1.weight": torch.zeros(1)}}, "f: tensor conv1.weight has shape (1,)"),
            ({"encoder_k": whole["f"]}, "encoder_k: tensor f.conv1.weight is missing"),
            ({"optimizer": {}}, "optimizer is that of another"),
            ({"optimizer": {**whole["optimizer"], **momentum}}, "optimizer is that of another"),
            ({"step": -1}, "step -1 there, of 15 now"),
            ({"f": {**whole["f"], "conv1.weight": 3}}, "tensor conv1.weight has shape"),
            ({"optimizer": {**whole["optimizer"], "state": {}}}, "optimizer is that of another"),
            ({"step": "1"}, "it lacks one of step, settings"), ({"settings": None}, "it lacks one of step, settings"),
            ({"settings": {**whole["settings"], "script": "simclr"}}, "(script simclr there, moco_v2 now)")]:
        torch.save({k: v for k, v in {**whole, **change}.items() if v is not None}, path)
        held = path.read_bytes()
        told = refused(moco_v2, small, *TINY)
        assert line in told and path.read_bytes() == held, told
    for content in ({"f": 1, "g": 2, "settings": {}}, {"state_dict": 3}, {"settings": 3, "f": {}, "g": {}}, {1: torch.ones(1)}):
        torch.save(content, "stranger.pt")
        assert "holds no encoder" in refused(linear_probe, small, "--quick", "--encoder", "stranger.pt")
    torch.save(whole, path)
    for script in (simclr, instdisc):
        argv = [small, "--arch", "resnet10", "--batch-size", "8", "--epochs", "3", "--out", "out"]
        assert "(script moco_v2 there, " in refused(script, *argv, *(["--bn-group", "4"] if script is instdisc else []))


# Memory

def test_no_memory_left_says_what_to_lower(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def cpu(*_):
        torch.empty(2 ** 50, dtype=torch.uint8)
    for module, argv in ((moco_v2, TINY), (simclr, [a for a in TINY if a not in ("--bn-group", "4", "--K", "20")])):
        for step, line in ((gpu, "no GPU memory left: lower --batch-size"), (cpu, "no memory left: lower --batch-size")):
            monkeypatch.setattr(module, "train_step", step)
            assert line in refused(module, small, *argv, "--fresh")


def test_a_killed_worker_ends_the_run(tmp_path, monkeypatch):
    large = write_folder(tmp_path / "large", 5, (70, 90))
    monkeypatch.chdir(tmp_path)
    step = moco_v2.train_step

    def slow(*args):
        if args[9] == 3:                                       # as the kernel does where memory runs out
            for worker in active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return step(*args)
    monkeypatch.setattr(moco_v2, "train_step", slow)
    alarm = threading.Timer(60, os._exit, (9,))
    alarm.start()
    told = refused(moco_v2, large, *TINY, "--epochs", "50", "--workers", "1")
    alarm.cancel()
    assert "a process that reads images has died, mostly for want of memory: lower --workers or --batch-size" in told
