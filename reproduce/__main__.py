"""Runs any table or figure of the paper with one command, beside the paper's numbers.

    python -m reproduce table1                          # on the embedded textures
    python -m reproduce table3 CIFAR10 --seeds 0 1 --jobs 2
    python -m reproduce all --dry-run                   # the commands, at all three scales
    python -m reproduce table1 CIFAR10 --as cifar10-short --flags "--arch resnet10 --epochs 20"

Trains each missing run (under torchrun if there are several GPUs), probes it, and keeps it as one
file, results/PLACE/runs/NAME.json. Then writes results/README.md from these files. If it is stopped
or killed, the same command continues. A setting that occurs in several tables is run once.
"""

import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from common import UserError, data, train
from common.run import UNFINISHED, Log, duration
from reproduce import plan, report


def parse(argv):
    """The flags as a Namespace; errors exit with code 2."""
    parser = train.Parser("python -m reproduce", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("item", choices=(*plan.ROWS, "claims", "all"))
    add("data", nargs="?", metavar="DATA", help="folder of images (default: embedded textures)")
    add("--seeds", type=train.NATURAL, nargs="+", default=[0], metavar="n")
    add("--jobs", type=train.COUNT, default=1, metavar="n",
        help="runs at a time, which share the cores")
    add("--flags", type=shlex.split, default=[], metavar="'--epochs n ...'",
        help="flags that are added to every run; needs --as")
    add("--as", dest="place", metavar="NAME",
        help="folder under results/ for these runs (default: named after the scale)")
    add("--collect", action="store_true", help="run nothing; only write results/README.md")
    add("--dry-run", action="store_true",
        help="print the commands; without DATA, those of all three scales")
    args = parser.parse_args(argv)
    if args.flags and args.place in (None, *plan.PLACEHOLDER):
        parser.error("--flags: these runs differ from the scale's own; name another folder for "
                     "them with --as")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds}: expected different ones")
    return args


def dry_run(items, place, seeds):
    """Print all commands of a place."""
    runs = plan.runs(items, place, seeds)
    print(f"# scale {place.scale}: {len(runs)} runs")
    commands = [words for name, run in runs.items() for words in plan.commands(name, *run, place)]
    commands += [plan.draw_command(item, place, seeds[0])
                 for item in items if item in plan.PICTURES]
    for words in commands:
        print(shlex.join(words))


def check(place, description):
    """Raises UserError if the place holds runs on other data, or with other flags."""
    for path in place.folder.glob("runs/*.json"):
        kept = json.loads(path.read_text())
        for what, now in (("data", description), ("flags", place.flags)):
            if kept.get(what, []) != now:
                raise UserError(f"results/{place.name} holds runs with other {what} "
                                f"({kept.get(what, [])}), not {now}; choose another --as")


def call(words, log):
    """Run a command and append its output to the file `log`; returns the exit code.

    The command inherits a lock on `log`. So if this process is killed and started again, it waits
    for a command that is still running instead of starting it twice.
    """
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return subprocess.run([sys.executable, *module, *words[1:]], cwd=plan.ROOT, stdout=file,
                              stderr=file).returncode


def execute(name, script, flags, place, description):
    """Train, probe and keep a run. Returns the exit code of the last command, 0 if all is well."""
    out = plan.ROOT / place.out(name)
    for words in plan.commands(name, script, flags, place):
        code = call(words, out / "output.txt")
        if code:
            return code
    shown = dataclasses.replace(place, path=plan.PLACEHOLDER[place.scale])
    commands = [shlex.join(words) for words in plan.commands(name, script, flags, shown)]
    run = {"name": name, "data": description, "flags": place.flags, "commands": commands,
           **record(out, script, flags, place.scale)}
    kept = place.run_file(name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.with_suffix(".tmp").write_text(json.dumps(run, indent=1) + "\n")
    os.replace(kept.with_suffix(".tmp"), kept)
    return 0


def record(out, script, flags, scale):
    """What a finished run in the folder `out` has found, and on which machine, as a dict."""
    found = {feature: json.loads((out / path).read_text())
             for feature, path in plan.probes(script, flags, scale).items()}
    events, seconds = Log(out / "log.jsonl").entries(), 0.
    for before, after in zip(events, events[1:]):
        if after["event"] != "start":                           # else it was stopped in between
            seconds += after["time"] - before["time"]
    start = next(entry for entry in events if entry["event"] == "start")
    machine = ("device", "processes", "threads", "torch", "python", "commit")
    return {"protocol": "supervised" if script == "linear_probe" else plan.PROTOCOL[scale],
            "top1": found["h"]["top1"], "knn": found["h"].get("knn"),
            "features": {feature: result["top1"] for feature, result in found.items()},
            "minutes": round(seconds / 60, 2),
            "settings": {k: v for k, v in start["settings"].items() if k != "data"},
            **{name: start[name] for name in machine}}


def execute_all(runs, place, description, jobs):
    """Execute what is missing of `runs`, `jobs` at a time, and print a line for each.

    Returns the failures [(name, output file)], or None if a run or this process was told to stop.
    """
    missing = [name for name in runs if not place.run_file(name).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    began, codes, stopped = time.time(), {}, threading.Event()
    # The terminal sends Ctrl-C to the runs too: they save, and no more are started.
    signal.signal(signal.SIGINT, lambda *_: stopped.set())

    def one(name):
        if stopped.is_set():
            return
        code = execute(name, *runs[name], place, description)
        if code == UNFINISHED:
            stopped.set()
        codes[name] = code
        left = (time.time() - began) / len(codes) * (len(missing) - len(codes))
        result = f"failed, see {place.out(name)}/output.txt" if code else "done"
        print(f"{len(codes)}/{len(missing)}  {name}  {result}  {duration(left)} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing))
    if stopped.is_set():
        return None
    return [(name, plan.ROOT / place.out(name) / "output.txt") for name in missing if codes[name]]


def draw(items, place, seed):
    """Draw the pictures among `items`. Returns the failures as `execute_all` does."""
    failed = []
    for item in items:
        output = plan.ROOT / place.out(f"{item}.txt")
        if item in plan.PICTURES and call(plan.draw_command(item, place, seed), output):
            failed.append((item, output))
    return failed


def main(argv=None):
    args = parse(argv)
    tables = [item for item in plan.ROWS if item not in plan.PICTURES]
    items = {"all": list(plan.ROWS), "claims": tables}.get(args.item, [args.item])
    if args.dry_run and not args.data:
        for scale, path in plan.PLACEHOLDER.items():
            dry_run(items, plan.Place(args.place or scale, scale, path, args.flags), args.seeds)
        return 0
    dataset = data.open_labelled(args.data)
    scale = dataset.scale
    place = plan.Place(args.place or scale, scale, dataset.path, args.flags)
    if args.dry_run:
        dry_run(items, place, args.seeds)
        return 0
    check(place, dataset.description)
    failed = []
    if not args.collect:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.jobs)))
        runs = plan.runs(items, place, args.seeds)
        failed = execute_all(runs, place, dataset.description, args.jobs)
        if failed is None:
            print("stopped; the same command continues")
            return UNFINISHED
        failed += draw(items, place, args.seeds[0])
    report.write(items, place)
    for name, output in failed:
        print(f"failed: {name}, see {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    train.launch(main)
