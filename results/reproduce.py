"""Any table or figure of the paper with one command, beside the paper's numbers.

    python results/reproduce.py table1                          # on the embedded textures
    python results/reproduce.py table3 CIFAR10 --seeds 0 1 --jobs 2
    python results/reproduce.py all --dry-run                   # the commands, at all three scales

Runs the presets through the scripts (under torchrun where there are several GPUs), probes each run, and writes
results/SCALE/ITEM.json, .md and .png from results/SCALE/runs/*.json, one file per run, which it makes once: killed and
started again, it goes on. What is one setting in several tables is run once. What was not run says so.
"""

import contextlib
import fcntl
import io
import json
import os
import shlex
import statistics
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
from results import claims  # noqa: E402

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
    "section7": (("MoCo v2", "table3"), ("m = 0", "section7")),
    "section5": (("MoCo v2", "table3"), ("hardest negatives only", "table3 hardest"), ("random ones", "table3 random")),
}
CURVES = (("MoCo v2", "moco_v2", ["--preset", "table3"]), ("MoCo v2, hard negatives", "moco_v2",
          ["--preset", "table3", "--negatives", "hard"]), ("MoCo", "moco_v2", ["--preset", "moco-v1"]),
          ("InstDisc", "instdisc", ["--preset", "figure4"]), ("SimCLR", "simclr", ["--preset", "figure4"]))
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73")
PICTURES = {"figure2": ("moco_v2 table1", "moco_v2 table1a"), "figure3": ("linear_probe supervised", "moco_v2 table1"),
            "figure5": ("moco_v2 hard",)}
ITEMS = (*TABLES, "figure4", *PICTURES)
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
            found[what, "MoCo v2"] = ("moco_v2", ["--preset", preset], paper)
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
    args = module.parse_args(flags)
    scales = module.SCALES if script != "linear_probe" else {k: module.SCALES[k] | module.SUPERVISED[k] for k in module.SCALES}
    with contextlib.redirect_stdout(io.StringIO()):
        s, _ = train.resolve(script, args, scales, module.PRESETS, scale, aside=("encoder", "quick", "train", "feature"))
    return json.dumps({k: v for k, v in vars(s).items() if k != "preset"}, sort_keys=True)


def plan(items, scale, seeds):
    """`(runs, names)`: runs {name: (script, flags)}, each setting once; names {(item, row, column): [a name per seed]}."""
    runs, names, known = {}, {}, {}
    for item in items:
        for (row, column), (script, flags, _) in cells(item, scale).items():
            names[item, row, column] = []
            for seed in seeds:
                seeded = [*flags, "--seed", str(seed)]
                name = "-".join([script, *(f.lstrip("-") for f in flags if f not in ("--preset", "--train")), f"seed{seed}"])
                name = known.setdefault(settings(script, seeded, scale), name)
                runs.setdefault(name, (script, seeded))
                names[item, row, column].append(name)
    return runs, names


def commands(name, script, flags, scale, path):
    """The training command and, but for supervised runs, the probe's: lists of words, from the project's root."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    launch = ["torchrun", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"]
    where, out = [path] if path else [], f"runs/reproduce/{scale}/{name}"
    found = [[*launch, f"{script}.py", *where, *flags, "--out", out]]
    if script != "linear_probe":
        found.append([*launch, "linear_probe.py", *where, *PROBE[scale], "--encoder", f"{out}/checkpoint.pt"])
    return found


def execute(name, script, flags, scale, path, description):
    """Train and probe one run, unless its JSON is there. Returns None, or the log's path if a command failed."""
    kept = ROOT / f"results/{scale}/runs/{name}.json"
    if kept.exists():
        return None
    out, began = ROOT / f"runs/reproduce/{scale}/{name}", time.time()
    out.mkdir(parents=True, exist_ok=True)
    todo = commands(name, script, flags, scale, path)
    for words in todo:
        real = [sys.executable] + (["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:])
        with (out / "output.txt").open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)                     # the child of a reproduce.py that was killed holds it: wait
            if subprocess.run(real, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
                return out / "output.txt"
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    start = next(e for e in events if e["event"] == "start")
    probe = out / ("result.json" if script == "linear_probe" else "probe/quick-h.json" if PROBE[scale] else "probe/result.json")
    found = json.loads(probe.read_text())
    protocol = "supervised" if script == "linear_probe" else "quick probe" if PROBE[scale] else "linear probe"
    kept.parent.mkdir(parents=True, exist_ok=True)
    text = {"name": name, "data": description, "top1": found["top1"], "protocol": protocol, "knn": found.get("knn"),
            "minutes": round((time.time() - began) / 60, 2),
            "commands": [shlex.join(words) for words in commands(name, script, flags, scale, PLACEHOLDER[scale])],
            "settings": {k: v for k, v in start["settings"].items() if k != "data"},
            **{k: start[k] for k in ("device", "processes", "threads", "torch", "python", "commit")}}
    kept.with_suffix(".tmp").write_text(json.dumps(text, indent=1) + "\n")
    os.replace(kept.with_suffix(".tmp"), kept)
    return None


def results(names, scale):
    """{(item, row, column): [top-1 of the runs that there are]}."""
    found = {}
    for key, runs in names.items():
        paths = [ROOT / f"results/{scale}/runs/{name}.json" for name in runs]
        found[key] = [json.loads(path.read_text())["top1"] for path in paths if path.exists()]
    return found


def show(values, against=None):
    if not values:
        return "not run"
    text = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    if against and against is not values:
        text += f" ({statistics.mean(values) - statistics.mean(against):+.2f})"
    return f"{text}, n = {len(values)}"


def markdown(item, scale, found, protocol):
    """The item as a table: mean ± sd over seeds, the difference to the first row, and the paper's ImageNet number."""
    table = cells(item, scale)
    rows, columns = ([*dict.fromkeys(key[i] for key in table)] for i in (0, 1))
    head = [f"{c}, ours | the paper's" if any(table[r, c][2] for r in rows) else f"{c}, ours" for c in columns]
    lines = [f"# {item}, scale {scale}", "", f"Top-1 in percent ({protocol}); in brackets the difference to the first row. The "
             "paper's numbers are for ResNet-50 on ImageNet.", "", f"| | {' | '.join(head)} |",
             "|---" * (1 + sum(h.count("|") + 1 for h in head)) + "|"]
    for row in rows:
        line = [row]
        for column, title in zip(columns, head):
            script, flags, paper = table[row, column]
            base = table[rows[0], column]
            same = row != rows[0] and settings(script, flags, scale) == settings(*base[:2], scale)
            first = found[item, rows[0], column] if item != "figure4" else None
            line.append("n/a (the baseline's setting)" if same else show(found[item, row, column], first))
            if "|" in title:
                line.append("" if paper is None else f"{paper}")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def figure4(path, scale, found):
    """Accuracy over K, a line a method, bars of one standard deviation, labelled at their ends."""
    from matplotlib.figure import Figure                        # here: it takes a while to import
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for (what, _, _), colour in zip(CURVES, COLOURS):
        points = [(K, found["figure4", what, f"K = {K}"]) for K in LADDER[scale]]
        points = [(max(30, 2 * (max(16, K // 2) - 1)) if what == "SimCLR" else K, v) for K, v in points if v]
        if points:
            x, y = [K for K, _ in points], [statistics.mean(v) for _, v in points]
            bars = [statistics.stdev(v) if len(v) > 1 else 0 for _, v in points]
            axis.errorbar(x, y, bars, marker="o", color=colour, capsize=3)
            axis.annotate(f" {what}", (x[-1], y[-1]), (6, 0), textcoords="offset points", color=colour, va="center")
    for K in COLUMNS[scale]:                                    # the paper states MoCo v2 at 512 and 65536
        axis.axvline(K, color="gray", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.margins(x=.25)
    axis.set(xlabel="K negatives (dotted: Table 3's columns)", ylabel="top-1, %", title=f"Figure 4 at the scale {scale}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def pictures(item, scale, path, names):
    """Draw Figure 2, 3 or 5 from the first seed's runs; returns the exit code."""
    out, where = ROOT / f"results/{scale}", [path] if path else []

    def file(name):
        return f"runs/reproduce/{scale}/{names[item, name, ''][0]}/checkpoint.pt"
    if item == "figure5":
        (out / "figure5.png").write_bytes((ROOT / file("moco_v2 hard")).with_name("figure5.png").read_bytes())
        return 0
    script, flags = {"figure2": ("dip_inversion.py", {"--head": "moco_v2 table1", "--no-head": "moco_v2 table1a"}),
                     "figure3": ("tsne_aug.py", {"--encoder": "linear_probe supervised", "--compare": "moco_v2 table1"})}[item]
    words = [script, *where, *(word for flag, name in flags.items() for word in (flag, file(name)))]
    return subprocess.run([sys.executable, *words, "--out", str(out)], cwd=ROOT).returncode


def write(items, names, scale):
    """ITEM.json, ITEM.md and figure4.png from the runs that there are."""
    found, out = results(names, scale), ROOT / f"results/{scale}"
    out.mkdir(parents=True, exist_ok=True)
    protocol = "supervised rows: their own test accuracy; else the " + ("quick probe" if PROBE[scale] else "linear probe")
    for item in (i for i in items if i not in PICTURES):
        kept = {f"{row} | {column}": dict(runs=runs, top1=found[key]) for key, runs in names.items() if key[0] == item
                for _, row, column in [key]}
        (out / f"{item}.json").write_text(json.dumps({"item": item, "scale": scale, "cells": kept}, indent=1) + "\n")
        (out / f"{item}.md").write_text(markdown(item, scale, found, protocol))
        print((out / f"{item}.md").read_text())
        if item == "figure4":
            figure4(out / "figure4.png", scale, found)
    if set(CLAIMED) <= set(items):
        (out / "claims.md").write_text(f"# The paper's claims, scale {scale}\n\n{claims.table(found, out)}")
        print((out / "claims.md").read_text())


def parse_args(argv=None):
    parser = train.Parser("reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("item", choices=(*ITEMS, "claims", "all"))
    parser.add_argument("data", nargs="?", metavar="DATA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="n")
    parser.add_argument("--jobs", type=int, default=1, metavar="n", help="runs at a time")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; without DATA, those of all three scales")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    items = {"all": ITEMS, "claims": CLAIMED}.get(args.item, (args.item,))
    if args.dry_run and not args.data:
        for scale, path in PLACEHOLDER.items():
            dry(items, scale, args.seeds, path)
        return
    path = args.data and str(Path(args.data).expanduser().resolve())
    dataset = data.open_data(path)
    scale = dataset.scale
    if dataset.test is None:
        raise SystemExit(f"{args.data}: labels are needed, in train/<class>/ and in val/<class>/ or test/<class>/")
    if args.dry_run:
        return dry(items, scale, args.seeds, path)
    runs, names = plan(items, scale, args.seeds)
    for kept in (ROOT / f"results/{scale}/runs").glob("*.json"):
        there = json.loads(kept.read_text())["data"]
        if there != dataset.description:
            raise SystemExit(f"results/{scale} holds runs of other data ({there}), not of {dataset.description}; move it away")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // max(1, args.jobs))))  # shared by the jobs
    began, done, failed, lock = time.time(), 0, [], threading.Lock()

    def one(entry):
        nonlocal done
        name, (script, flags) = entry
        there = (ROOT / f"results/{scale}/runs/{name}.json").exists()
        log = execute(name, script, flags, scale, path, dataset.description)
        with lock:
            done += 1
            failed.extend([(name, log)] if log else [])
            left = (time.time() - began) / done * (len(runs) - done)
            print(f"{done}/{len(runs)}  {name}  {f'failed, see {log}' if log else 'there already' if there else 'done'}  "
                  f"{train.clock(left)} left", flush=True)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        list(pool.map(one, runs.items()))
    failed += [(item, "its output above") for item in items if item in PICTURES and pictures(item, scale, path, names)]
    write(items, names, scale)
    for name, log in failed:
        print(f"failed: {name}, see {log}")
    sys.exit(1 if failed else 0)


def dry(items, scale, seeds, path):
    runs, _ = plan(items, scale, seeds)
    print(f"# scale {scale}: {len(runs)} runs")
    for name, (script, flags) in runs.items():
        for words in commands(name, script, flags, scale, path):
            print(shlex.join(words))


if __name__ == "__main__":
    main()
