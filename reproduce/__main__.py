"""Runs any table or figure of the paper and shows the results beside the paper's numbers.

    python -m reproduce table1                          # on the built-in textures
    python -m reproduce table3 CIFAR10 --seeds 0 1 --jobs 2
    python -m reproduce all --dry-run                   # the commands, at all three scales
    python -m reproduce table1 CIFAR10 --scale cifar10-laptop --as mine --seeds 10 11 12
    python -m reproduce table1 CIFAR10 --as short --flags "--arch resnet10 --epochs 6"

Trains each missing run (under torchrun if there are several GPUs), probes it, and keeps it as one
file, results/CAMPAIGN/runs/RUN.json. Then writes results/README.md from these files. If it is
stopped or killed, the same command continues. A setting that occurs in several tables is run once.
"""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from common import UserError, data, train
from common.run import UNFINISHED, Log
from reproduce import claims, plan, report

try:
    import fcntl
except ImportError:                             # on Windows
    fcntl = None


def parse(argv):
    """The flags as a Namespace; errors exit with code 2."""
    parser = train.Parser("python -m reproduce", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("item", choices=(*plan.ROWS, "claims", "all"),
        help="a table, figure or section; claims: all tables; all: everything")
    add("data", nargs="?", metavar="DATA", help="folder of images (default: built-in textures)")
    add("--scale", choices=plan.NAMED,
        help="settings for DATA other than the scripts' own (docs/choices.md)")
    add("--rows", nargs="+", metavar="ROW", help="only these rows of the item")
    add("--seeds", type=train.NATURAL, nargs="+", default=[0], metavar="n",
        help="default: 0; verdicts use seeds from 10 on")
    add("--jobs", type=train.COUNT, default=1, metavar="n",
        help="runs at a time, which share the cores")
    add("--voc", metavar="VOC", help="the folder VOCdevkit for detection (default on the textures: "
        "synthetic scenes)")
    add("--flags", type=shlex.split, default=[], metavar="'--epochs n ...'",
        help="flags that are added to every run; needs --as")
    add("--as", dest="campaign", metavar="NAME",
        help="folder under results/ for these runs (default: named after the scale)")
    add("--collect", action="store_true", help="run nothing; only write results/README.md")
    add("--dry-run", action="store_true",
        help="print the commands; without DATA, those of all three scales")
    args = parser.parse_args(argv)
    if args.flags and args.campaign in (None, "", *plan.PLACEHOLDER, *plan.NAMED):
        parser.error("--flags: these runs differ from the scale's own; name another folder for "
                     "them with --as")
    return args


def dry_run(campaign, runs, pictures):
    """Print all commands of a campaign, each once."""
    print(f"# scale {campaign.scale}: {len(runs)} runs; only those with seeds from "
          f"{claims.FIRST_SEED} on are judged")
    commands = [words for name, run in runs.items()
                for words in plan.commands(name, *run, campaign)]
    for line in dict.fromkeys(map(shlex.join, [*commands, *pictures.values()])):
        print(line)


def check(campaign, dataset):
    """Raises UserError if the campaign holds runs on other data, or with other flags."""
    for run in report.kept_runs(campaign):
        images = run["settings"].get("images_hash", dataset.hash)       # some runs have none
        if (run["data"], images, run["flags"]) != (dataset.description, dataset.hash,
                                                   campaign.flags(report.script(run))):
            raise UserError(f"results/{campaign.name} holds runs with other data or flags "
                            f"({run['data']}; {run['flags']}); choose another --as")


def call(commands, log):
    """Run commands, up to the first that fails, and append their output to the file `log`.

    Returns the last exit code. The commands inherit a lock on `log`. So if this process is killed
    and started again, it waits for a command that is still running instead of starting it twice.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        for program, *words in commands:
            module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
            code = subprocess.run([sys.executable, *module, *words], cwd=plan.ROOT, stdout=file,
                                  stderr=file).returncode
            if code:
                break
    return code


def keep(name, script, flags, campaign, description):
    """Write what a finished run has found, and on which machine, to its file in results/."""
    out = campaign.output_file(name).parent
    found, knn = {}, None
    for feature, paths in plan.probes(script, flags, campaign.scale).items():
        found[feature] = {}
        for path in paths:                                      # the last counts for the class
            result = json.loads((out / path).read_text())
            for question, answer in result.get("predictions", {}).items():
                found[feature][question] = answer["top1"]
            if "top1" in result:
                found[feature]["class"] = result["top1"]
            if feature == "detection":
                found[feature] = {name: result[name] for name in ("AP", "AP50", "AP75")}
            if feature == "h":
                knn = result.get("knn", knn)
    events = Log(out / "log.jsonl").entries() if (out / "log.jsonl").exists() else []
    seconds = sum(after["time"] - before["time"] for before, after in zip(events, events[1:])
                  if after["event"] != "start")                 # else it was stopped in between
    scale = plan.base_scale(campaign.scale)
    start = events[0] if events else {**result, "settings": {"scale": scale}}
    settings = start["settings"]
    settings.pop("data", None)                                  # a path of this machine
    if settings.get("encoder"):
        settings["encoder"] = settings["encoder"].removeprefix(f"{plan.ROOT}/")
    shown = dataclasses.replace(campaign, data=plan.PLACEHOLDER[scale],
                                voc=["VOCDEVKIT"] if campaign.voc else [])
    commands = [shlex.join(words) for words in plan.commands(name, script, flags, shown)]
    run = {"name": name, "scale": campaign.scale, "data": description,
           "flags": campaign.flags(script), "commands": commands,
           "top1": found.get("h", {}).get("class"), "knn": knn, "features": found,
           "minutes": round(seconds / 60, 2)}
    for field in ("settings", "device", "processes", "threads", "torch", "python", "commit"):
        run[field] = start[field]
    run["epochs"] = [{field: value for field, value in event.items()
                      if isinstance(value, (int, float)) and field not in ("step", "time")}
                     for event in events if event["event"] == "epoch"]
    kept = campaign.folder / f"runs/{name}.json"
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(report.dumps(run) + "\n")
    temporary.replace(kept)


def execute_all(runs, drawn, campaign, dataset, jobs):
    """Train, probe and keep what is missing of `runs`, `jobs` at a time.

    Prints a line when a run starts and when it ends. The pictures need the checkpoints of the runs
    `drawn`, even if their results exist. Returns the names of those that failed, or None if a run
    or this process was told to stop.
    """
    kept = campaign.folder / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=kept).close()                    # fail now if it is read-only
    missing = [name for name in runs if not (kept / f"{name}.json").exists() or name in drawn
               and not (plan.ROOT / campaign.run_folder(name) / "checkpoint.pt").exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs exist already")
    stopped, failed = threading.Event(), []
    # The terminal sends Ctrl-C to the runs too: they save, and no more are started.
    signal.signal(signal.SIGINT, lambda *_: stopped.set())

    def one(name):
        if stopped.is_set():
            return
        output = campaign.output_file(name)
        print(f"{name}: started, output in {output.relative_to(plan.ROOT)}", flush=True)
        code = call(plan.commands(name, *runs[name], campaign), output)
        if code == UNFINISHED:
            stopped.set()
        elif code:
            failed.append(name)
        elif not (kept / f"{name}.json").exists():
            check(campaign, dataset)                               # another command may write there
            keep(name, *runs[name], campaign, dataset.description)
        print(f"{name}: exit code {code}", flush=True)

    # Detection comes last, because it trains its encoder unless another run has done so.
    detection = [name for name in missing if runs[name][0] == "voc_detection"]
    others = [name for name in missing if name not in detection]
    with ThreadPoolExecutor(jobs) as pool:
        for part in (others, detection):
            list(pool.map(one, part))                           # raises what `one` raises
    return None if stopped.is_set() else failed


def show_detections(campaign, seed):
    """Copy the picture of the last row of the item `detection` to the folder of the campaign."""
    *_, row = plan.ROWS["detection"]
    cell = plan.cells(campaign.scale).get(("detection", row, "AP"))
    if cell:
        picture = campaign.output_file(f"{cell.name}-seed{seed}").parent / "detections.png"
        if picture.exists():
            shutil.copy(picture, campaign.folder / "detection.png")


def main(argv=None):
    args = parse(argv)
    items = {"all": list(plan.ROWS), "claims": plan.TABLES}.get(args.item, [args.item])
    known = [row for item in items for row in plan.ROWS[item]]
    for row in args.rows or []:
        if row not in known:
            raise UserError(f"--rows {row}: expected rows of {args.item}: {', '.join(known)}")
    paths = plan.PLACEHOLDER
    if args.data or not args.dry_run:
        dataset = data.open_labelled(args.data)
        paths = {dataset.scale: [dataset.path] if dataset.path else []}
    if args.scale:
        kind = plan.base_scale(args.scale)
        if kind not in paths:
            raise UserError(f"--scale {args.scale}: for images of scale {kind}; expected a folder "
                            "of them as DATA")
        paths = {args.scale: paths[kind]}
    for scale, path in paths.items():
        folder = args.voc or ("VOCDEVKIT" if scale == "imagenet" and args.dry_run else None)
        if scale == "imagenet" and "detection" in items and not folder:
            if args.item == "detection":
                raise UserError("detection: expected --voc FOLDER, a VOCdevkit")
            print("note: no detection, which needs --voc FOLDER")
            items = [item for item in items if item != "detection"]
        campaign = plan.Campaign(args.campaign or scale, scale, path, args.flags,
                                 [folder] if folder else [])
        runs = plan.runs(items, campaign, args.seeds, args.rows)
        pictures = plan.pictures(items, campaign, args.seeds[0])
        if args.dry_run:
            dry_run(campaign, runs, pictures)
    if args.dry_run:
        return 0
    if not runs and not pictures:
        raise UserError(f"{args.item}: does not exist at the scale {campaign.scale}")
    check(campaign, dataset)
    failed = []
    if not args.collect:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.jobs)))
        drawn = plan.runs(pictures, campaign, args.seeds[:1])
        failed = execute_all(runs, drawn, campaign, dataset, args.jobs)
        if failed is None:
            print("stopped; the same command continues")
            return UNFINISHED
        for item, words in pictures.items():
            if call([words], campaign.output_file(item)):
                failed.append(item)
    if "detection" in items and not args.collect:
        show_detections(campaign, args.seeds[0])
    report.write(items, campaign)
    for name in failed:
        output = campaign.output_file(name)
        last_line = output.read_text(errors="replace").strip().rpartition("\n")[-1]
        print(f"failed: {name}: {last_line}; see {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    train.launch(main)
