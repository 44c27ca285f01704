"""Kill a script at random moments, start it again, and compare its end with an undisturbed run.

    python tests/kill.py --kills 30 SMALL LARGE FOLDER      # each training script, and the probe

SMALL and LARGE are folders of small images, which stay in memory, and of large ones, which worker
processes read from their files. Half of the kills come at any moment, half while a checkpoint is
being written. Each attempt is its own process, forked from this one, which has only imported the
scripts. Prints a JSON object of what was done. Fails if a restart fails, if more than the work
since the last save (`repeated` steps) is lost, if log.jsonl is changed other than by appending, or
if the end is not bit-identical.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # runs are bit-identical with the same number of threads
sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402
from conftest import same  # noqa: E402

import instdisc  # noqa: E402
import linear_probe  # noqa: E402
import moco_v2  # noqa: E402
import simclr  # noqa: E402
from common import train  # noqa: E402
from common.run import Log  # noqa: E402

TINY = ("--arch", "resnet10", "--batch-size", "8", "--epochs", "4")
MOCO = ("--bn-group", "4", "--K", "20")
RUNS = {"moco_v2": (moco_v2, *TINY, *MOCO), "simclr": (simclr, *TINY),
        "instdisc": (instdisc, *TINY, *MOCO),
        "files": (moco_v2, *TINY, "--epochs", "2", *MOCO, "--size", "64"),
        "linear_probe": (linear_probe, "--encoder", "{folder}/moco_v2-alone/checkpoint.pt",
                         *TINY[2:])}


def fork(module, argv, output):
    """The pid of a process that runs a script; what it prints goes to the file `output`."""
    pid = os.fork()
    if pid:
        return pid
    with (open(output, "w") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        code = 1
        try:
            train.launch(module.main, argv)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            print(repr(error))
        file.flush()
        os._exit(code)


def finish(module, argv, output):
    """Run a script to its end, which must be without error."""
    assert os.waitpid(fork(module, argv, output), 0)[1] == 0, output.read_text()


def newest_step(out):
    """The step of the newest checkpoint; checkpoints must always be intact."""
    paths = [out / name for name in ("checkpoint.pt", "previous.pt")]
    return max((torch.load(path, weights_only=True)["step"] for path in paths if path.exists()),
               default=0)


def attempts(log):
    """The steps of the entries of each attempt, from the raw lines of a log (bytes)."""
    found = []
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:                                      # empty, or cut off by a kill
            continue
        if entry["event"] == "start":
            found.append([])
        found[-1].append(entry["step"])
    return found


def epochs(out):
    """What the log says of each epoch's end, without times."""
    return [{name: value for name, value in entry.items() if name != "time"}
            for entry in Log(out / "log.jsonl").entries() if entry["event"] == "epoch"]


def kill(pid, out, latest, while_saving, rng):
    """Kill a process within `latest` seconds; returns whether it was saving.

    If `while_saving`, at the beginning or in the middle of saving, or between the two renames.
    """
    temporary, until = out / "checkpoint.tmp", time.time() + rng.random() * latest
    while time.time() < until and not (while_saving and temporary.exists()):
        time.sleep(.0005)
    saving = while_saving and temporary.exists()
    if saving:
        time.sleep(rng.random() * .03)
    os.kill(pid, signal.SIGKILL)
    return saving


def trial(name, data, folder, kills, rng):
    """Kill one script `kills` times. Returns {kills, while_saving, repeated}.

    `repeated` is the largest number of steps that had to be repeated.
    """
    module, *argv = RUNS[name]
    argv = [data, *(word.format(folder=folder) for word in argv)]
    alone, out, output = folder / f"{name}-alone", folder / name, folder / f"{name}.txt"
    path = out / "log.jsonl"
    began = time.time()
    finish(module, [*argv, "--out", str(alone)], output)
    duration = time.time() - began
    expected = torch.load(alone / "checkpoint.pt", weights_only=True)
    epoch = expected["step"] // expected["settings"]["epochs"]
    done = {"kills": 0, "while_saving": 0, "repeated": 0}
    while done["kills"] < kills:
        every_step = rng.random() < .5          # whether to save at each step, or each epoch's end
        before, log = newest_step(out), path.read_bytes() if path.exists() else b""
        more = ["--workers", str(rng.randrange(3))]
        if every_step:
            more += ["--save-minutes", "0"]
        fresh = before > .7 * expected["step"]  # nearly at the end: start anew
        if fresh:
            more.append("--fresh")
        pid = fork(module, [*argv, "--out", str(out), *more], output)
        saving = kill(pid, out, duration, rng.random() < .5, rng)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):                                # it had ended before
            assert os.WEXITSTATUS(status) == 0, output.read_text()
            continue
        done["kills"] += 1
        done["while_saving"] += saving
        continued = re.search(r"continuing at step (\d+) of", output.read_text())
        if continued:
            assert not fresh and int(continued[1]) == before, output.read_text()
        after, text = newest_step(out), path.read_bytes() if path.exists() else b""
        assert text.startswith(log), f"{name}: the log was rewritten"
        repeated, steps = 0, attempts(text)
        if len(steps) > len(attempts(log)):                     # this attempt has begun its work
            repeated = max(steps[-1]) - after
        assert repeated <= (1 if every_step and continued else epoch)
        assert after >= before or fresh
        done["repeated"] = max(done["repeated"], repeated)
    finish(module, [*argv, "--out", str(out)], output)
    found = torch.load(out / "checkpoint.pt", weights_only=True)
    assert same(expected, found), f"{name}: the checkpoints differ"
    assert epochs(alone) == epochs(out), f"{name}: the logs differ"
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
        began, rng = time.time(), random.Random(f"{args.seed} {name}")
        data = args.large if name == "files" else args.small
        done = trial(name, data, args.folder, args.kills, rng)
        result = {"script": name, "seed": args.seed, **done,
                  "seconds": round(time.time() - began, 1)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
