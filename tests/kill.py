"""Kill a script at random moments, start it again, and compare its end, bit for bit, with that of a run left alone.

    python tests/kill.py --kills 30 SMALL LARGE FOLDER          # each script of pre-training, and the probe

SMALL and LARGE are folders of small images, which stay in memory, and of large ones, which processes read from their files.

Half of the kills come at any moment, half while a checkpoint is being written. Each attempt is a process of its own,
forked from this one, which has only imported the scripts. Prints a JSON object of what was done; it fails where a
restart does, where more than the work since the last save (`repeated` steps) is lost, or where the end is another one.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                             # bit for bit holds at one number of threads
sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402
from conftest import same  # noqa: E402

import instdisc  # noqa: E402
import linear_probe  # noqa: E402
import moco_v2  # noqa: E402
import simclr  # noqa: E402

TINY = ("--arch", "resnet10", "--batch-size", "8", "--epochs", "4")
RUNS = {"moco_v2": (moco_v2, *TINY, "--bn-group", "4", "--K", "20"), "simclr": (simclr, *TINY),
        "instdisc": (instdisc, *TINY, "--bn-group", "4", "--K", "20"),
        "files": (moco_v2, *TINY, "--epochs", "2", "--bn-group", "4", "--K", "20"),
        "linear_probe": (linear_probe, "--encoder", "{folder}/moco_v2-alone/checkpoint.pt", *TINY[2:])}


def fork(module, argv, output):
    """The pid of a process that runs a script's `main`, with what it prints in the file `output`."""
    pid = os.fork()
    if pid:
        return pid
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = 1
        try:
            module.main([*argv])
            code = 0
        except SystemExit as error:
            print(error.code)
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            print(repr(error))
        file.flush()
        os._exit(code)


def state(path):
    return torch.load(path, weights_only=True) if path.exists() else {"step": 0}


def looks(out):
    """What the log says of each epoch's end, but for times."""
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "time"} for e in events if e["event"] == "epoch"]


def trial(name, data, folder, kills, rng):
    """`kills` kills of one script; returns {kills, while_saving, repeated}, the last the most steps done again."""
    module, *argv = RUNS[name]
    argv = [data, *(word.format(folder=folder) for word in argv)]
    alone, out, output = folder / f"{name}-alone", folder / name, folder / f"{name}.txt"
    began = time.time()
    assert os.waitpid(fork(module, [*argv, "--out", str(alone)], output), 0)[1] == 0, output.read_text()
    takes, done, whole = time.time() - began, {"kills": 0, "while_saving": 0, "repeated": 0}, state(alone / "checkpoint.pt")
    epoch = whole["step"] // whole["settings"]["epochs"]
    while done["kills"] < kills:
        each = rng.random() < .5                                # saving at each step, or at each epoch's end only
        before = max(state(out / name)["step"] for name in ("checkpoint.pt", "previous.pt"))
        more = ["--workers", str(rng.randrange(3)), *(["--save-minutes", "0"] if each else [])]
        if before > .7 * whole["step"]:                         # nearly at the end: from the beginning
            more.append("--fresh")
        pid = fork(module, [*argv, "--out", str(out), *more], output)
        saving, tmp = rng.random() < .5, out / "checkpoint.tmp"
        until = time.time() + rng.random() * takes
        while time.time() < until and not (saving and tmp.exists()):
            time.sleep(.0005)
        saving = saving and tmp.exists()
        time.sleep(rng.random() * .03 * saving)                 # at its beginning, its middle, or between the renames
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):                                # it was faster
            assert os.WEXITSTATUS(status) == 0, output.read_text()
            continue                                            # the next begins anew
        done["kills"] += 1
        done["while_saving"] += saving
        went = re.search(r"going on in .* at step (\d+)", output.read_text())
        assert not went or "--fresh" not in more and int(went[1]) == before, output.read_text()
        after = max(state(out / name)["step"] for name in ("checkpoint.pt", "previous.pt"))     # each is whole
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        # an attempt killed before it went on has left the log of the one before
        again = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0) - after
        assert again <= (1 if each and went else epoch) and (after >= before or "--fresh" in more)
        done["repeated"] = max(done["repeated"], again)
    pid = fork(module, [*argv, "--out", str(out)], output)
    assert os.waitpid(pid, 0)[1] == 0, output.read_text()
    assert same(whole, state(out / "checkpoint.pt")), f"{name}: another end"
    assert looks(alone) == looks(out), f"{name}: another log"
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS, nargs="+", default=RUNS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)                             # a new one
    for name in args.only:
        began = time.time()
        with contextlib.redirect_stdout(io.StringIO()):
            where = args.large if name == "files" else args.small
            done = trial(name, where, args.folder, args.kills, random.Random(f"{args.seed} {name}"))
        print(json.dumps({"script": name, "seed": args.seed, **done, "seconds": round(time.time() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
