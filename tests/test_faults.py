"""Faults in long runs: kills, lost processes, full disks, damaged files, bad images and numbers.

`--long` runs the longer trials that docs/reliability.md counts.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, free_port, image_files, photo, refused, spawn, wait_for, write_folder
from PIL import Image
from test_device import end_of_epochs
from torch.utils.data import DataLoader

import instdisc
import linear_probe
import moco_v2
import simclr
from common import UserError, checkpoint, data, ddp, train
from common.model import resnet
from common.run import Log, differences

TINY = ("--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--K", "20",
        "--epochs", "3", "--out", "out")
# The second as docs/reliability.md says.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


# Kills and signals

def test_a_run_killed_at_random_moments_ends_bit_identically(small, tmp_path, long):
    """With another number of workers at each start; without --long, MoCo v2 on files only."""
    kills, large = 30 if long else 1, write_folder(tmp_path / "large", 12, (70, 90))
    only = [] if long else ["--only", "files"]
    done = subprocess.run([sys.executable, ROOT / "tests/kill.py", small, large, tmp_path / "k",
                           "--kills", str(kills), *only], text=True, capture_output=True,
                          timeout=None if long else 240)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == (5 if long else 1)
    assert all(r["kills"] == kills and r["repeated"] <= 6 for r in results)
    assert not long or all(r["while_saving"] for r in results)


LONG_RUN = [*TINY[:-4], "--epochs", "400", "--out", "out"]      # of 2000 steps


def torchrun(small, tmp_path, *how):
    argv = [sys.executable, "-m", "torch.distributed.run", *how, ROOT / "moco_v2.py", small,
            *LONG_RUN]
    return subprocess.Popen([*map(str, argv)], cwd=tmp_path, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_torchrun_replaces_a_killed_process_stops_on_request_and_one_process_continues(
        small, tmp_path, inside):
    """The lock file names the first process. All processes agree on the step at which they stop."""
    path, lock = tmp_path / "out/checkpoint.pt", tmp_path / "out/lock"
    job = torchrun(small, tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    wait_for(path.exists, job)
    victim = int(re.search(r"process (\d+)", lock.read_text())[1])
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: (found := re.search(r"process (\d+)", lock.read_text()))
             and int(found[1]) != victim, job)
    saved = path.stat().st_mtime_ns
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns > saved, job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode and re.search(r"continuing at step \d+ of 2000 in out", out), out
    step = step_of(path)
    assert f"stopped at step {step} of 2000, saved in out; to continue, use the same command" in out
    out = inside(moco_v2, small, *LONG_RUN, "--max-steps", step + 2, cwd=tmp_path)
    assert f"continuing at step {step} of 2000 in out" in out
    assert step_of(path) == step + 2


def lose_the_other(path):
    """Process 0 writes to the file `path` what it says when process 1 has ended."""
    torch.distributed.barrier()                 # both are connected
    if ddp.rank():
        time.sleep(.5)
    else:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit):
            train.launch(lambda _: torch.distributed.all_reduce(torch.ones(1)))
        path.write_text(err.getvalue())
    os._exit(0)                                 # without the orderly end, as if killed


def test_a_process_says_in_one_line_that_another_has_ended(tmp_path):
    spawn(lose_the_other, tmp_path / "line")
    assert (tmp_path / "line").read_text() == (
        "another process of this run has ended: see its message, then run the same command again\n")


def test_if_one_of_two_nodes_is_killed_the_other_ends_and_both_continue(small, tmp_path, long):
    if not long:
        pytest.skip("--long")
    path = tmp_path / "out/checkpoint.pt"
    for last in (False, True):
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        how = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=1", endpoint)
        since, nodes = time.time_ns(), [torchrun(small, tmp_path, *how) for _ in range(2)]
        wait_for(lambda: path.exists() and path.stat().st_mtime_ns > since, nodes[0])
        workers = subprocess.run(["pgrep", "-P", str(nodes[last].pid)], capture_output=True,
                                 text=True).stdout.split()
        # First the node that holds the rendezvous, then the other one.
        for pid in (nodes[last].pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        began = time.time()
        out, _ = nodes[not last].communicate(timeout=120)
        seconds = time.time() - began
        print(f"the other ended with {nodes[not last].returncode} after {seconds:.0f} s")
        assert nodes[not last].returncode
        assert step_of(path) > 0
    lines = (tmp_path / "out/log.jsonl").read_text().splitlines()
    starts = [json.loads(line)["step"] for line in lines if '"event": "start"' in line]
    print("continued at steps", starts)
    assert len(starts) > 1 and starts[-1] > 0


def test_a_folder_in_use_is_refused_also_with_fresh(small, tmp_path, inside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    code = ("import fcntl, time; f = open('out/lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "f.write('process 7 on host'); f.flush(); print(flush=True); time.sleep(99)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    for more in ((), ("--fresh",)):
        assert "--out out: in use by process 7 on host;" in refused(moco_v2, small, *TINY, *more)
    holder.kill()
    holder.wait()
    assert "stopped at step 1" in inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)


def test_a_run_that_torchrun_restarts_continues_also_with_fresh(
        small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 1, "--fresh", cwd=tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = inside(moco_v2, small, *TINY, "--max-steps", 2, "--fresh", cwd=tmp_path)
    assert "continuing at step 1 of 15" in out


def test_a_folder_among_images_without_classes_is_refused(
        small, tmp_path, inside, monkeypatch):
    """Its curves.png would count as an image of the run when that is continued."""
    monkeypatch.chdir(tmp_path)
    photos = shutil.copytree(small / "train", tmp_path / "photos")
    for out in ("photos", "photos/runs/a"):
        line = refused(moco_v2, photos, *TINY[:-1], out)
        assert line == f"--out {out}: lies among the images of {photos}; expected another folder"
    assert not (photos / "runs").exists()
    labelled = write_folder(tmp_path / "labelled", 12, (70, 90))
    inside(moco_v2, labelled, *TINY[:-1], "labelled/runs", "--max-steps", 1, cwd=tmp_path)


def test_a_folder_that_one_process_cannot_see_is_refused(small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    monkeypatch.setattr("common.run.ddp.all_gather", lambda step: torch.cat([step, 0 * step]))
    line = refused(moco_v2, small, *TINY)
    assert "--out out: processes find checkpoints of steps [1, 0] there; it must be on a" in line


def test_a_folder_that_does_not_appear_on_another_machine_is_refused(
        small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin, now = time.time(), itertools.count()
    monkeypatch.setattr("common.run.time.sleep", lambda seconds: None)
    monkeypatch.setattr("common.run.time.time", lambda: begin + 20 * next(now))
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: path.name != "out")
    assert "--out out: other machines do not see this folder" in refused(moco_v2, small, *TINY)


RELIABILITY = (ROOT / "docs/reliability.md").read_text()
SNIPPET = re.search(r"    #!/bin/bash\n.*?requeue[^\n]*\n\n", RELIABILITY, re.DOTALL)


def test_the_slurm_snippet_requeues_an_unfinished_run_and_no_other(tmp_path):
    """With stand-ins for SLURM's programs.

    srun exits with torchrun's 1, after the run has written the last line of its log. Without EVENT
    the run fails before; then the log ends with the line of an earlier job.
    """
    script = "\n".join(line[4:] for line in SNIPPET[0].splitlines())
    srun = ('sleep .02; mkdir -p runs/long; [ "$EVENT" ] && echo "{\\"event\\": \\"$EVENT\\"}" '
            ">> runs/long/log.jsonl; exit 1")
    scontrol = '[ "$1" = show ] && echo host1 || echo "$@" >> requeued'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for event, count in (("unfinished", 1), ("", 1), ("step", 1), ("finished", 1),
                         ("unfinished", 2), ("", 2)):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "EVENT": event,
               "SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[1-2]"}
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env)
        assert (tmp_path / "requeued").read_text() == "requeue 5\n" * count


# The log

def events(log):
    return [(entry["event"], entry["step"]) for entry in log.entries()]


def test_a_later_start_supersedes_the_log_entries_after_its_step(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add("start", 0)
    for step in (1, 2, 3, 4):
        log.add("step", step, loss=10. + step)
    log.add("epoch", 4, knn=50.)
    assert len(events(log)) == 6
    log.add("start", 2)
    assert events(log) == [("start", 0), ("step", 1), ("step", 2), ("start", 2)]
    log.add("step", 3, loss=3.)
    assert events(log)[-2:] == [("start", 2), ("step", 3)]
    assert log.values("loss") == [11., 12., 3.] and log.values("knn") == []
    log.add("start", 0)                                         # --fresh
    assert events(log) == [("start", 0)] and log.values("loss") == []


def test_a_log_line_cut_off_by_a_kill_does_not_harm_the_lines_after_it(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add("start", 0)
    log.add("step", 1, loss=1.)
    with log.path.open("ab") as file:
        file.write(b'{"event": "step", "step": 2, "lo')
    assert events(log) == [("start", 0), ("step", 1)]
    log.add("start", 1)
    log.add("step", 2, loss=2.)
    assert events(log) == [("start", 0), ("step", 1), ("start", 1), ("step", 2)]
    assert log.values("loss") == [1., 2.]
    for odd in (b"3\n", b'{"a": 1}\n', b"null\n", b"\xff\xfe\n", b"\n", b'["step"]\n'):
        with log.path.open("ab") as file:
            file.write(odd)
    assert log.values("loss") == [1., 2.]


def test_the_log_is_only_ever_appended_to(small, tmp_path, inside):
    """Whatever is started again: continued, finished, from an earlier step, refused, anew."""
    path, before = tmp_path / "out/log.jsonl", b""
    run, every_step = [moco_v2, small, *TINY], ["--save-minutes", 0]
    for more in (["--max-steps", 3, *every_step], ["--max-steps", 4], ["--max-steps", 4],
                 ["--m", ".5"], ["--fresh", "--max-steps", 1]):
        if "--m" in more:
            refused(*run, *more)
        else:
            inside(*run, *more, cwd=tmp_path)
        text = path.read_bytes()
        assert text.startswith(before)
        before = text
    (tmp_path / "out/checkpoint.pt").unlink()
    out = inside(*run, "--max-steps", 2, cwd=tmp_path)
    assert "note: out has a log but no checkpoint; the run starts from scratch" in out
    assert path.read_bytes().startswith(before)
    found = events(Log(path))
    assert found[0] == ("start", 0) and [e for e, _ in found].count("start") == 1
    assert found[-1] == ("stopped", 2)
    assert path.read_text().count('"event": "start"') == 5


# Disk

def test_a_full_disk_is_named_and_the_run_continues_when_there_is_space(small, tmp_path):
    """On a real file system of 80 MB, if one can be mounted: a checkpoint has 63 MB."""
    code = ("import os, subprocess, sys; sys.path.insert(0, sys.argv[1]); import moco_v2\n"
            "from common import UserError\n"
            "try: moco_v2.main(sys.argv[2:])\n"
            "except UserError as error: print('ended:', error)\n"
            "print(sorted(os.listdir('disk/out')), flush=True)\n"
            "subprocess.run(['mount', '-o', 'remount,size=300m', 'disk'], check=True)\n"
            "moco_v2.main(sys.argv[2:])")
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path / "disk"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    script = 'mount -t tmpfs -o size=80m none disk && exec "$@"'
    argv = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", code, str(ROOT),
            small, *TINY[:-1], "disk/out"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=ENV, timeout=240)
    assert done.returncode == 0, done.stderr
    message = (r"ended: disk/out/checkpoint.tmp: cannot save step 10, with \d+ MiB free: free some "
               "space and run the same command again")
    assert re.search(message, done.stdout), done.stdout
    assert "['checkpoint.pt', 'lock', 'log.jsonl']" in done.stdout
    assert "continuing at step 5 of 15 in disk/out" in done.stdout
    assert "finished: checkpoint" in done.stdout


def test_a_full_disk_under_the_log_gets_one_line():
    def main(argv):
        with open("/dev/full", "w") as file:
            file.write("x")
    line = refused(SimpleNamespace(main=main))
    assert "cannot be written (No space left on device): free some space and run the same" in line


def flip(path, rng):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
        small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 3, "--save-minutes", 0, cwd=tmp_path)
    path, previous = tmp_path / "out/checkpoint.pt", tmp_path / "out/previous.pt"
    assert (step_of(path), step_of(previous)) == (3, 2)
    flip(path, random.Random(0))
    out = inside(moco_v2, small, *TINY, "--max-steps", 4, cwd=tmp_path)
    assert "out/checkpoint.pt: cannot be read as a checkpoint: truncated, damaged" in out
    assert "continuing from out/previous.pt" in out and "continuing at step 2 of 15 in out" in out
    assert (step_of(path), step_of(previous)) == (4, 2)
    path.unlink()                               # as a kill between the two renames leaves it
    out = inside(moco_v2, small, *TINY, "--max-steps", 5, cwd=tmp_path)
    assert "out/checkpoint.pt is missing: continuing from out/previous.pt" in out
    assert "continuing at step 2 of 15 in out" in out
    for file in (path, previous):
        if file.exists():
            os.truncate(file, 1000)
    kept = path.read_bytes()
    line = refused(moco_v2, small, *TINY)
    assert "out/checkpoint.pt: cannot be read" in line and "--fresh starts from scratch" in line
    assert path.read_bytes() == kept
    assert "writing to out" in inside(moco_v2, small, *TINY, "--fresh", "--max-steps", 1,
                                      cwd=tmp_path)


def test_errors_other_than_damage_change_no_file(small, tmp_path, inside, monkeypatch):
    """No memory for reading, a faulty disk, a refused command: the folder stays as it is."""
    inside(moco_v2, small, *TINY, "--max-steps", 2, "--save-minutes", 0, cwd=tmp_path)
    path, previous = tmp_path / "out/checkpoint.pt", tmp_path / "out/previous.pt"
    kept = path.read_bytes(), previous.read_bytes()

    def fails(error):
        def load(*_, **__):
            raise error
        return load
    for error, line in ((MemoryError(), "out of memory"),
                        (OSError(5, "Input/output error"),
                         "out/checkpoint.pt: cannot be opened (Input/output error); "
                         "--fresh starts from scratch")):
        monkeypatch.setattr(checkpoint.torch, "load", fails(error))
        assert refused(moco_v2, small, *TINY) == line
        assert (path.read_bytes(), previous.read_bytes()) == kept
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    flip(path, random.Random(0))
    damaged = path.read_bytes()
    assert "lr was 0.0009375, is now 0.1" in refused(moco_v2, small, *TINY, "--lr", ".1")
    assert (path.read_bytes(), previous.read_bytes()) == (damaged, kept[1])
    inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    assert (tmp_path / "out/damaged.pt").read_bytes() == damaged
    assert path.read_bytes() == kept[1]
    line = refused(linear_probe, small, "--encoder", path, "--out", "out", "--fresh")
    assert "--out out: holds the encoder that is probed" in line and path.exists()


def test_images_may_move_but_not_change_in_number(small, tmp_path, inside):
    images = Path(shutil.copytree(small, tmp_path / "a"))
    inside(moco_v2, images, *TINY, "--max-steps", 1, cwd=tmp_path)
    moved = images.rename(tmp_path / "b")
    out = inside(moco_v2, moved, *TINY, "--max-steps", 2, cwd=tmp_path)
    assert "continuing at step 1 of 15 in out" in out
    next((moved / "train/cat").iterdir()).unlink()
    assert "(images was 44, is now 43; images_hash " in refused(moco_v2, moved, *TINY)
    saved = {"script": "linear_probe", "encoder": "a.pt", "encoder_fingerprint": "1"}
    assert not differences(saved, {**saved, "encoder": "b.pt"})
    assert differences(saved, {**saved, "encoder_fingerprint": "2"})
    assert differences({"script": "x", "encoder": "a"}, {"script": "x", "encoder": "b"})


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, long):
    rng, path, content = random.Random(0), tmp_path / "c.pt", io.BytesIO()
    f = resnet("resnet10").layer1.state_dict()
    torch.save({"step": 1, "settings": {}, "f": f}, content)
    unnoticed = []
    for i in range(400 if long else 60):
        path.write_bytes(content.getvalue())
        flip(path, rng)
        try:
            read = checkpoint.read(path, checkpoint.CONTENT)
        except UserError:
            continue
        # A bit of the archive's padding or of a date changes nothing.
        unnoticed.append(any(not torch.equal(v, read["f"][name]) for name, v in f.items()))
    print(f"{i + 1} bits flipped, {len(unnoticed)} of them in what is not read")
    assert not any(unnoticed) and len(unnoticed) < .05 * i


# Numbers

def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
        small, tmp_path, inside, monkeypatch):
    inside(moco_v2, small, *TINY, "--max-steps", 2, cwd=tmp_path)
    path, train_step, build = tmp_path / "out/checkpoint.pt", moco_v2.train_step, moco_v2.build

    def with_nan_loss(moco, optimizer, x1, x2, permutation, step, ranks):
        loss = train_step(moco, optimizer, x1, x2, permutation, step, ranks)
        return loss * float("nan") if step == 3 else loss
    monkeypatch.setattr(moco_v2, "train_step", with_nan_loss)
    line = refused(moco_v2, small, *TINY)
    assert re.match(r"the loss is nan at step 4, learning rate \S+: start a new run with a smaller "
                    "--lr, .* was saved before this step", line), line
    assert step_of(path) == 2

    def with_infinite_gradient(*args):
        moco, optimizer = build(*args)
        calls = iter(range(9))
        moco.encoder_q.f.conv1.weight.register_hook(
            lambda g: g * float("inf") if next(calls) == 2 else g)
        return moco, optimizer
    monkeypatch.setattr(moco_v2, "train_step", train_step)
    monkeypatch.setattr(moco_v2, "build", with_infinite_gradient)
    line = refused(moco_v2, small, *TINY)
    assert "the loss is finite at step 5, but the weights are not, learning rate" in line
    assert step_of(path) == 2
    monkeypatch.setattr(moco_v2, "build", build)
    out = inside(moco_v2, small, *TINY, "--max-steps", 5, cwd=tmp_path)
    assert "continuing at step 2 of 15 in out" in out
    f = torch.load(path, weights_only=True)["f"]
    assert all(torch.isfinite(v).all() for v in f.values())


# Images

def write_odd(folder):
    """One image of every kind that can be read, and files that cannot; returns their names."""
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
    readable = sorted(p.name for p in folder.iterdir())
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "cut.jpg").write_bytes((folder / "ok.jpg").read_bytes()[:1200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                                        "%%EndComments\nshowpage\n")
    return readable, sorted({p.name for p in folder.iterdir()} - set(readable))


def test_odd_images_are_read_or_replaced_by_the_next_readable_one(tmp_path):
    """Which one replaces an image depends only on its index."""
    readable, unreadable = write_odd(tmp_path / "odd")
    files = image_files(tmp_path / "odd")
    names = [Path(os.fsdecode(f)).name for f in files]

    def make(image, u):
        return data._crops(image, u, 64, (.2, 1.)), data._centre(image, None, 64)
    loader = data._Files(files, make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # PIL's, on palettes and on large images
        found = [loader[i, np.random.default_rng(i).random((2, 22))] for i in range(len(files))]
        for i, (index, (crops, centre)) in enumerate(found):
            expected = next(n for n in names[i:] + names if n in readable)
            assert names[index] == expected
            assert crops.shape == (2, 3, 64, 64) and centre.shape == (3, 64, 64)
        deep, grey = (data.read_image(tmp_path / f"odd/{n}") for n in ("deep.png", "grey.jpg"))
    assert len(unreadable) == 5
    assert deep.float().std() > 20 and (grey[0] == grey[1]).all()
    with pytest.raises(Image.DecompressionBombError):
        data.read_image(tmp_path / "odd/bomb.png")
    Image.fromarray(np.full((8, 8), .5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="pixels of 32 bits; expected 8 or 16"):
        data.read_image(tmp_path / "float.tiff")


def mutated(content, rng, header):
    """A JPEG with 1 to 19 random changes, a third of the time in the header, or cut short."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 20)):
        at = int(rng.integers(700 if header else len(content)))
        kind = rng.integers(3)                  # a byte is added, replaced or removed
        content[at:at + (kind > 0)] = rng.bytes(int(kind < 2))
        if rng.random() < .02:
            del content[int(rng.integers(100, len(content))):]
    return content


def test_mutated_jpegs_do_no_harm(tmp_path, long):
    """Read by worker processes: no crash, no hang, bounded memory."""
    rng, count = np.random.default_rng(0), 20000 if long else 4000
    originals = []
    for i in range(8):
        out = io.BytesIO()
        image = Image.fromarray(photo(rng, *rng.integers(60, 200, 2)))
        image.save(out, "jpeg", quality=int(rng.integers(40, 95)), progressive=bool(i % 2))
        originals.append(out.getvalue())
    for i in range(count):
        content = mutated(originals[i % 8], rng, header=i % 3 == 0)
        (tmp_path / f"{i:05}.jpg").write_bytes(content)
    make = functools.partial(data._crops, size=32, area=(.2, 1.))
    files = data._Files(image_files(tmp_path), make)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.time()
    replaced = seen = 0
    keys = [[(i, rng.random((1, 22))) for i in range(start, min(start + 50, count))]
            for start in range(0, count, 50)]
    for index, _ in DataLoader(files, batch_sampler=keys, num_workers=2, timeout=60):
        replaced += int((index != torch.arange(seen, seen + len(index))).sum())
        seen += len(index)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 10
    print(f"{count} mutated, {replaced} replaced, {time.time() - began:.0f} s, at most "
          f"{memory:.0f} MiB in a worker")
    assert seen == count and .02 * count < replaced < .9 * count
    assert memory < max(4000, before / 2 ** 10 + 1)


# Untrusted files

class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_file_that_would_run_code_is_refused(small, tmp_path, monkeypatch):
    """As a checkpoint to continue from, as an encoder of ours, as FAIR's file, as torchvision's.

    In the new and the old file format.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    good = torchvision.models.resnet18().state_dict()
    for zipped in (True, False):
        for i, content in enumerate((
                {"step": 1, "settings": {}, "f": Evil(), "g": {}},
                {"state_dict": {**good, "x": Evil()}},
                {"module.encoder_q.conv1.weight": Evil()}, {**good, "x": Evil()}, Evil())):
            torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
            line = refused(linear_probe, small, "--quick", "--encoder", "evil.pt")
            message = r"evil.pt: refused: reading it would run code \(\w+\.system\)"
            assert re.match(message, line), line
            if i == 0:
                shutil.copy("evil.pt", "out/checkpoint.pt")
                line = refused(moco_v2, small, *TINY)
                assert "out/checkpoint.pt: refused: reading it would run code" in line
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    assert "evil.pt: " in refused(linear_probe, small, "--quick", "--encoder", "evil.pt")
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_run_is_refused(small, tmp_path, inside):
    inside(moco_v2, small, *TINY, "--max-steps", 1, cwd=tmp_path)
    path = tmp_path / "out/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    f, optimizer, settings = saved["f"], saved["optimizer"], saved["settings"]
    momentum = {i: {"momentum_buffer": torch.zeros(3)} for i in optimizer["state"]}
    foreign = "checkpoint: optimizer belongs to another network or method"
    for change, message in [
            ({"f": None}, "checkpoint: f is missing or not a dict"),
            ({"queue": None}, "checkpoint: queue is missing or not a tensor"),
            ({"queue": torch.zeros(7, 128)}, "queue has shape (7, 128), not (20, 128)"),
            ({"f": {**f, "conv1.weight": torch.zeros(1)}},
             "f: tensor conv1.weight has shape (1,), not (64, "),
            ({"f": {**f, "conv1.weight": 3}}, "f: tensor conv1.weight has shape int, not (64, "),
            ({"encoder_k": f}, "encoder_k: tensor f.conv1.weight is missing"),
            ({"optimizer": {}}, foreign),
            ({"optimizer": {**optimizer, "state": momentum}}, foreign),
            ({"optimizer": {**optimizer, "state": {}}}, foreign),
            ({"step": -1}, "it is at step -1, this one ends at 15"),
            ({"step": 16}, "it is at step 16, this one ends at 15"),
            ({"step": "1"}, "it lacks one of step, settings"),
            ({"settings": None}, "it lacks one of step, settings"),
            ({"settings": {**settings, "script": "simclr"}},
             "(script was simclr, is now moco_v2)")]:
        changed = {name: v for name, v in {**saved, **change}.items() if v is not None}
        torch.save(changed, path)
        kept = path.read_bytes()
        assert message in refused(moco_v2, small, *TINY)
        assert path.read_bytes() == kept
    torch.save(saved, path)
    other = write_folder(tmp_path / "other", 22, (32, 32))      # as many images, the same names
    (other / "train/cat/0.jpg").write_bytes((other / "train/dog/0.jpg").read_bytes())
    assert re.search(r"\(images_hash was \w+, is now \w+\)", refused(moco_v2, other, *TINY))
    torch.save({**saved, "step": 99}, path)
    assert "(epochs was 3, is now 4)" in refused(moco_v2, small, *TINY, "--epochs", "4")
    for content in ({"f": 1, "g": 2, "settings": {}}, {"state_dict": 3},
                    {"settings": 3, "f": {}, "g": {}}, {1: torch.ones(1)}):
        torch.save(content, "stranger.pt")
        line = refused(linear_probe, small, "--quick", "--encoder", "stranger.pt")
        assert "stranger.pt: holds no encoder" in line
    torch.save(saved, path)
    argv = [small, "--arch", "resnet10", "--batch-size", "8", "--epochs", "3", "--out", "out"]
    for script, more in ((simclr, []), (instdisc, ["--bn-group", "4"])):
        assert "(script was moco_v2, " in refused(script, *argv, *more)


def count_saves(folder):
    """Epochs of one empty step, with saving that takes long; a file says how often it was done."""
    saves, save = [], checkpoint.save

    def slow(*args):
        time.sleep(.1)
        save(*args)
        saves.append(args)
    checkpoint.save = slow                      # of this process, which ends with the function
    end_of_epochs(folder, n=10)
    if ddp.rank() == 0:
        (folder / "saves").write_text(str(len(saves)))


def test_the_process_that_saves_decides_when(tmp_path):
    """The others do not know how long it takes."""
    spawn(count_saves, tmp_path)
    assert (tmp_path / "saves").read_text() in ("1", "2")       # the first epoch's, and the end's


# Memory

NEW_RUN = "(a new run: it needs another --out or --fresh)"


@pytest.mark.parametrize("script, argv, workers, advice", [
    ("moco_v2", [], True, f"a smaller --batch-size or --K {NEW_RUN}"),
    ("instdisc", [], True, f"a smaller --batch-size or --K {NEW_RUN}"),
    ("simclr", [], True, f"a smaller --chunk or --batch-size {NEW_RUN}"),
    ("linear_probe", ["--train", "all"], True, f"a smaller --batch-size {NEW_RUN}"),
    ("dip_inversion", [], False, "a smaller --n-images or fewer --images"),
    ("tsne_aug", [], False, "a smaller --per-class")])
def test_if_memory_runs_out_the_line_says_what_to_reduce(
        script, argv, workers, advice, tmp_path, monkeypatch, capsys):
    """Started as a user does. Workers take no memory of a GPU; Figures 2 and 3 have none."""
    def gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def cpu(*_):
        torch.empty(2 ** 50, dtype=torch.uint8)

    def worker(*_):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    killed = "a process that reads images was killed, probably for lack of memory"
    fewer = "fewer --workers, or " if workers else ""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.chdir(tmp_path)
    for fails, expected in ((gpu, f"out of GPU memory: use {advice}\n"),
                            (cpu, f"out of memory: use {fewer}{advice}\n"),
                            (worker, f"{killed}: use {fewer}{advice}\n")):
        monkeypatch.setattr(data, "open_data", fails)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        assert (end.value.code, capsys.readouterr().err) == (1, expected)


def test_a_worker_ends_if_the_script_is_killed_while_it_starts(tmp_path):
    """Otherwise it keeps its memory, and whoever reads the script's output waits for ever."""
    files = image_files(write_folder(tmp_path, 2, (8, 8)))
    ended, alive = os.pipe()
    script = os.fork()
    if not script:                              # PyTorch calls set_num_threads in each new worker
        torch.set_num_threads = lambda _: (signal.alarm(30), time.sleep(.5))
        threading.Timer(.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        next(data._read(files, torch.stack, [[(0, None)]], 2))
        os._exit(0)
    os.close(alive)
    assert os.WTERMSIG(os.waitpid(script, 0)[1]) == signal.SIGKILL
    assert select.select([ended], [], [], 10)[0]                # all copies of `alive` are closed
    os.close(ended)


def test_a_killed_worker_ends_the_run(tmp_path, monkeypatch):
    large = write_folder(tmp_path / "large", 5, (70, 90))
    monkeypatch.chdir(tmp_path)
    train_step = moco_v2.train_step

    def with_a_kill(moco, optimizer, x1, x2, permutation, step, ranks):
        if step == 3:                           # as the kernel does if memory runs out
            for worker in active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return train_step(moco, optimizer, x1, x2, permutation, step, ranks)
    monkeypatch.setattr(moco_v2, "train_step", with_a_kill)
    alarm = threading.Timer(60, os._exit, (9,))
    alarm.start()
    line = refused(moco_v2, large, *TINY, "--epochs", "50", "--workers", "1")
    alarm.cancel()
    assert line == "a process that reads images was killed, probably for lack of memory"
