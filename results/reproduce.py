"""Any table or figure of the paper with one command, beside the paper's numbers.

    python results/reproduce.py table1                          # on the embedded textures
    python results/reproduce.py table3 CIFAR10 --seeds 0 1 --jobs 2
    python results/reproduce.py all --dry-run                   # the commands, at all three scales
    python results/reproduce.py table1 CIFAR10 --as cifar10-short --flags "--arch resnet10 --epochs 20"

Runs the presets through the scripts (under torchrun where there are several GPUs), probes each run, and writes
results/SCALE/ITEM.json, .md and .png from results/SCALE/runs/*.json, one file per run, which it makes once: killed and
started again, it goes on. What is one setting in several tables is run once. What was not run says so, with its command.
"""

import contextlib
import fcntl
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import instdisc  # noqa: E402
import linear_probe  # noqa: E402
import moco_v2  # noqa: E402
import simclr  # noqa: E402
from common import data, train  # noqa: E402
from results import claims, report  # noqa: E402

MODULES = {"moco_v2": moco_v2, "simclr": simclr, "instdisc": instdisc, "linear_probe": linear_probe}
COLUMNS = {"imagenet": (512, 65536), "cifar10": (64, 4096), "textures": (16, 1024)}     # K of Table 3
LADDER = {"imagenet": (256, 512, 1024, 4096, 16384, 65536), "cifar10": (16, 64, 256, 1024, 4096, 16384),
          "textures": (16, 128, 1024)}                          # K of Figure 4
PLACEHOLDER = {"imagenet": "IMAGENET", "cifar10": "CIFAR10", "textures": None}
PROBE = {"imagenet": [], "cifar10": ["--quick"], "textures": ["--quick"]}       # the paper's protocol; its quick substitute
TABLES = {  # item: rows of (what, preset)
    "table1": (("MoCo v2", "table1"), ("(a) without head", "table1a"), ("(b) fixed head", "table1b"),
               ("(c) more hidden layers", "table1c"), ("(d) narrow", "table1d")),
    "table2a": (("20 % to 100 %", "table2a-baseline"), ("20 % to 50 %", "table2a-medium"), ("2 % to 10 %", "table2a-extreme")),
    "table2b": (("jitter 1/8", "table2b-eighth"), ("1/4", "table2b-quarter"), ("1/2", "table2b-half"), ("1", "table2b-full")),
    "table3": (("MoCo v2", "table3"), ("(a) no MLP", "table3a"), ("(b) no blur", "table3b"), ("(c) no cosine", "table3c"),
               ("(d) m = .5", "table3d")),
    "section3": (("h", "table1"), ("hidden", "table1"), ("z", "table1")),                   # one run, three probes
    "section7": (("MoCo v2", "table3"), ("m = 0", "section7")),
    "section5": (("MoCo v2", "table3"), ("hardest negatives only", "table3 hardest"), ("random ones", "table3 random")),
}
CURVES = (("MoCo v2", "moco_v2", ["--preset", "table3"]), ("MoCo v2, hard negatives", "moco_v2",
          ["--preset", "table3", "--negatives", "hard"]), ("MoCo", "moco_v2", ["--preset", "moco-v1"]),
          ("InstDisc", "instdisc", ["--preset", "figure4"]), ("SimCLR", "simclr", ["--preset", "figure4"]))
PICTURES = {"figure2": ("moco_v2 table1", "moco_v2 table1a"), "figure3": ("linear_probe supervised", "moco_v2 table1"),
            "figure5": ("moco_v2 hard",)}
ITEMS = (*TABLES, "figure4", *PICTURES)
stopped = threading.Event()                                     # Ctrl-C, or a run that was told to stop: start no more
CLAIMED = (*TABLES, "figure4")                                  # what `claims` needs, beside the pictures that there are


def cells(item, scale):
    """{(row, column): (script, flags, the paper's number or None)} of an item."""
    found = {}
    for what, preset in TABLES.get(item, ()):
        preset, *negatives = preset.split()
        paper = moco_v2.PRESETS[preset]["paper"]
        if item in ("table3", "section5", "section7"):
            more = ["--negatives", *negatives] if negatives else []
            for K, number in zip(COLUMNS[scale], paper if type(paper) is tuple and not more else (None, None)):
                found[what, f"K = {K}"] = ("moco_v2", ["--preset", preset, *more, "--K", str(K)], number)
        else:
            found[what, "MoCo v2"] = ("moco_v2", ["--preset", preset], None if what in ("hidden", "z") else paper)
        if item.startswith("table2"):
            found[what, "supervised"] = ("linear_probe", ["--train", "all", "--preset", preset],
                                         linear_probe.PRESETS[preset]["paper"])
    if item == "figure4":
        for what, script, flags in CURVES:
            for K in LADDER[scale]:
                n = max(16, K // 2)                             # SimCLR has K = 2 (N - 1)
                size = ["--batch-size", str(n), *(["--chunk", "4096"] if n > 4096 else [])]
                found[what, f"K = {K}"] = (script, [*flags, *(size if script == "simclr" else ["--K", str(K)])], None)
    for name in PICTURES.get(item, ()):
        script, row = name.split()
        flags = {"hard": ["--preset", "table3", "--negatives", "hard"], "supervised": ["--train", "all"]}
        found[name, ""] = (script, flags.get(row, ["--preset", row]), None)
    return found


def settings(script, flags, scale):
    """What a command resolves to, without the row's name: equal for what is one setting under two names."""
    module = MODULES[script]
    with contextlib.redirect_stdout(io.StringIO()):
        s, _ = train.resolve(script, module.parse_args(flags), getattr(module, "SUPERVISED", module.SCALES), module.PRESETS,
                             scale, aside=("encoder", "quick", "train", "feature"))
    return json.dumps({k: v for k, v in vars(s).items() if k != "preset"}, sort_keys=True)


def plan(items, scale, seeds, more=()):
    """`(runs, names)`: runs {name: (script, flags)}, each setting once; names {(item, row, column): [a name per seed]}.

    `more` flags are added to each run's; where a cell has the same flag, its own counts.
    """
    runs, names, known = {}, {}, {}
    for item in ITEMS:                                          # all, so that a setting has one name whatever is asked for
        for key, (script, flags, _) in cells(item, scale).items():
            same = known.setdefault(settings(script, flags, scale), (script, flags))
            name = "-".join([script, *(f.lstrip("-") for f in same[1] if f not in ("--preset", "--train"))])
            for seed in seeds if item in items else ():
                runs.setdefault(f"{name}-seed{seed}", (script, [*same[1][:2], *more, *same[1][2:], "--seed", str(seed)]))
                names.setdefault((item, *key), []).append(f"{name}-seed{seed}")
    return runs, names


def commands(name, script, flags, scale, place, path):
    """The training command and the probes', but for supervised runs: lists of words, from the project's root."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    launch = ["torchrun", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"]
    where, out = [path] if path else [], f"runs/reproduce/{place}/{name}"
    probes = [] if script == "linear_probe" else ["h", "hidden", "z"] if flags[1] == "table1" else ["h"]
    return [[*launch, f"{script}.py", *where, *flags, "--out", out]] + [
        [*launch, "linear_probe.py", *where, *PROBE[scale], "--encoder", f"{out}/checkpoint.pt",
         *([] if feature == "h" else ["--feature", feature])] for feature in probes]


def execute(name, script, flags, more, scale, place, path, description):
    """Train and probe one run, unless its JSON is there. Returns None, or the log's path if a command did not finish."""
    kept = ROOT / f"results/{place}/runs/{name}.json"
    if kept.exists():
        return None
    out, found = ROOT / f"runs/reproduce/{place}/{name}", {}
    out.mkdir(parents=True, exist_ok=True)
    for words in commands(name, script, flags, scale, place, path):
        real = [sys.executable] + (["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:])
        with (out / "output.txt").open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)                     # the child of a reproduce.py that was killed holds it: wait
            code = subprocess.run(real, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
            if code == train.UNFINISHED:
                stopped.set()
            if code:
                return out / "output.txt"
        feature = words[-1] if "--feature" in words else "h"
        probe = f"probe/quick-{feature}.json" if PROBE[scale] else f"probe{f'-{feature}' * (feature != 'h')}/result.json"
        if script == "linear_probe" or "--encoder" in words:
            found[feature] = json.loads((out / ("result.json" if script == "linear_probe" else probe)).read_text())
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    start = next(e for e in events if e["event"] == "start")
    seconds = sum(b["time"] - a["time"] for a, b in zip(events, events[1:]) if b["event"] != "start")
    protocol = "supervised" if script == "linear_probe" else "quick probe" if PROBE[scale] else "linear probe"
    text = {"name": name, "data": description, "flags": more, "top1": found["h"]["top1"], "protocol": protocol,
            "knn": found["h"].get("knn"),
            "features": {k: v["top1"] for k, v in found.items()}, "minutes": round(seconds / 60, 2),
            "commands": [shlex.join(words) for words in commands(name, script, flags, scale, place, PLACEHOLDER[scale])],
            "settings": {k: v for k, v in start["settings"].items() if k != "data"},
            **{k: start[k] for k in ("device", "processes", "threads", "torch", "python", "commit")}}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.with_suffix(".tmp").write_text(json.dumps(text, indent=1) + "\n")
    os.replace(kept.with_suffix(".tmp"), kept)
    return None


def results(names, place):
    """{(item, row, column): [top-1 of the runs that there are]}."""
    found = {}
    for key, runs in names.items():
        kept = [json.loads(p.read_text()) for p in (ROOT / f"results/{place}/runs/{name}.json" for name in runs) if p.exists()]
        found[key] = [run["features"][key[1]] if key[0] == "section3" else run["top1"] for run in kept]
    return found


def pictures(item, place, path, names):
    """Draw Figure 2, 3 or 5 from the first seed's runs; returns the exit code."""
    out, where = ROOT / f"results/{place}", [path] if path else []

    def file(name):
        return ROOT / f"runs/reproduce/{place}/{names[item, name, ''][0]}/checkpoint.pt"
    if item == "figure5":
        drawn = file("moco_v2 hard").with_name("figure5.png")
        return 0 if drawn.exists() and shutil.copy(drawn, out) else 1
    script, flags = {"figure2": ("dip_inversion.py", {"--head": "moco_v2 table1", "--no-head": "moco_v2 table1a"}),
                     "figure3": ("tsne_aug.py", {"--encoder": "linear_probe supervised", "--compare": "moco_v2 table1"})}[item]
    words = [script, *where, *(str(word) for flag, name in flags.items() for word in (flag, file(name)))]
    return subprocess.run([sys.executable, *words, "--out", str(out)], cwd=ROOT).returncode


def write(items, runs, names, scale, place):
    """ITEM.json, ITEM.md and figure4.png from the runs that there are."""
    found, out = results(names, place), ROOT / f"results/{place}"
    out.mkdir(parents=True, exist_ok=True)
    for item in (i for i in items if i not in PICTURES):
        table, mine = cells(item, scale), {key: of for key, of in names.items() if key[0] == item}
        left = dict.fromkeys(name for of in mine.values() for name in of if not (out / f"runs/{name}.json").exists())
        missing = [commands(name, *runs[name], scale, place, PLACEHOLDER[scale])[0] for name in left]
        kept = {f"{row} | {column}": dict(runs=of, top1=found[item, row, column]) for (_, row, column), of in mine.items()}
        (out / f"{item}.json").write_text(json.dumps({"item": item, "scale": scale, "cells": kept}, indent=1) + "\n")
        labels = {f"K = {a}": f"K = {b}" for a, b in zip(COLUMNS[scale], COLUMNS["imagenet"])}
        (out / f"{item}.md").write_text(report.markdown(item, table, names, found, missing, bool(PROBE[scale]), labels))
        print((out / f"{item}.md").read_text())
        if item == "figure4":
            paper = moco_v2.PRESETS["table3"]["paper"] if scale == "imagenet" else None
            report.figure4(out / "figure4.png", place, found, COLUMNS[scale], paper)
    if set(CLAIMED) <= set(items):
        (out / "claims.md").write_text(f"# The paper's claims, {place}\n\n{claims.table(found, names, out)}")
        print((out / "claims.md").read_text())


def parse_args(argv=None):
    parser = train.Parser("reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("item", choices=(*ITEMS, "claims", "all"))
    parser.add_argument("data", nargs="?", metavar="DATA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="n")
    parser.add_argument("--jobs", type=int, default=1, metavar="n", help="runs at a time, which share the cores")
    parser.add_argument("--flags", type=shlex.split, default=[], metavar="'--epochs n ...'", help="for every run; wants --as")
    parser.add_argument("--as", dest="place", metavar="NAME", help="a folder under results/ for it, instead of the scale's")
    parser.add_argument("--collect", action="store_true", help="run nothing; write the tables from the runs that there are")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; without DATA, those of all three scales")
    args = parser.parse_args(argv)
    if args.flags and not args.place:
        parser.error("--flags: these runs are not the scale's own; name a folder for them with --as")
    if args.place in PLACEHOLDER and args.flags:
        parser.error(f"--as {args.place}: is for that scale's own runs; choose another name")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: expected different ones, 0 or more")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: expected 1 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    items = {"all": ITEMS, "claims": CLAIMED}.get(args.item, (args.item,))
    if args.dry_run and not args.data:
        for scale, path in PLACEHOLDER.items():
            dry(plan(items, scale, args.seeds, args.flags)[0], scale, args.place or scale, path)
        return
    path = args.data and str(Path(args.data).expanduser().resolve())
    dataset = data.open_data(path)
    scale, place = dataset.scale, args.place or dataset.scale
    if dataset.test is None:
        raise SystemExit(f"{args.data}: labels are needed, in train/<class>/ and in val/<class>/ or test/<class>/")
    runs, names = plan(items, scale, args.seeds, args.flags)
    if args.dry_run:
        return dry(runs, scale, place, path)
    for kept in (ROOT / f"results/{place}/runs").glob("*.json"):
        there = json.loads(kept.read_text())
        for what, now in (("data", dataset.description), ("flags", args.flags)):
            if there.get(what, []) != now:
                raise SystemExit(f"results/{place} holds runs of other {what} ({there.get(what, [])}), not of {now}; "
                                 "choose another --as, or move it away")
    if args.collect:
        return write(items, runs, names, scale, place)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.jobs)))
    began, done, failed, lock = time.time(), 0, [], threading.Lock()
    there = {name for name in runs if (ROOT / f"results/{place}/runs/{name}.json").exists()}

    def one(entry):
        nonlocal done
        name, (script, flags) = entry
        if stopped.is_set():
            return
        log = execute(name, script, flags, args.flags, scale, place, path, dataset.description)
        with lock:
            done += 1
            failed.extend([(name, log)] if log else [])
            left = (time.time() - began) / max(1, done - len(there)) * (len(runs) - done)
            print(f"{done}/{len(runs)}  {name}  {f'failed, see {log}' if log else 'there already' if name in there else 'done'}"
                  f"  {train.clock(left)} left", flush=True)
    signal.signal(signal.SIGINT, lambda *_: stopped.set())      # the terminal sends it to the runs too, which save
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, sorted(runs.items(), key=lambda entry: entry[0] not in there)))
    if stopped.is_set():
        print("stopped; the same command goes on")
        sys.exit(train.UNFINISHED)
    failed += [(item, "its output above") for item in items if item in PICTURES and pictures(item, place, path, names)]
    write(items, runs, names, scale, place)
    for name, log in failed:
        print(f"failed: {name}, see {log}")
    sys.exit(1 if failed else 0)


def dry(runs, scale, place, path):
    print(f"# scale {scale}: {len(runs)} runs")
    for name, (script, flags) in runs.items():
        for words in commands(name, script, flags, scale, place, path):
            print(shlex.join(words))


if __name__ == "__main__":
    main()
