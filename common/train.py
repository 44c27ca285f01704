"""What every training script needs and no reader of the paper would miss: settings, schedules, logs, checkpoints."""

import argparse
import contextlib
import errno
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from common import data, ddp, model

UNFINISHED = 75                                                 # exit code: saved, start again to go on
EVERY = 50                                                      # steps between lines of the log
HEARD = 10                                                      # steps between questions to all GPUs, which makes them wait
CHECKPOINT = {"step": int, "settings": dict}                    # what every checkpoint holds
PICTURES = (("knn", "kNN top-1 of h, %"), ("ratio", "loss / ln(K + 1)"), ("lr", "learning rate"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser, presets, without=()):
    """The data argument and the flags that training scripts share. What is not given comes from preset or scale."""
    def add(name, **how):
        if name not in without:
            parser.add_argument(name, **how)
    add("data", nargs="?", metavar="DATA", help="a folder of images; without it, the embedded textures")
    add("--preset", default=next(iter(presets)), choices=presets, metavar="ROW",
        help=f"a row of the paper's tables: {', '.join(presets)}")
    add("--out", metavar="DIR", help="where the run is written (default: runs/SCRIPT-SCALE-PRESET, and K and the seed "
        "where they are given, as SimCLR's batch, InstDisc's loss, --negatives; a probe: probe/ beside the encoder's file)")
    add("--fresh", action="store_true", help="start anew where --out holds a run already")
    add("--seed", type=int, metavar="n")
    add("--epochs", type=int, metavar="n")
    add("--max-steps", type=int, metavar="n", help="stop after this step of the run; the schedule stays as it is")
    add("--save-minutes", type=minutes, default=30., metavar="t", help="save this often, and after each epoch (default: 30)")
    add("--batch-size", type=int, metavar="n", help="images of all processes together")
    add("--lr", type=float, help="learning rate of this batch (default: the scale's, scaled with the batch)")
    add("--warmup", type=int, metavar="STEPS", help="steps of linear warm-up")
    add("--arch", metavar="NAME", help=f"{', '.join(model.ARCHS)}; -3x3 behind it for small images")
    add("--bn-group", type=int, metavar="n", help="images that share batch statistics (the paper's 32)")
    add("--workers", type=int, metavar="n", default=data.default_workers(), help="processes that read files")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the processor is good at it")
    add("--compile", action="store_true", help="torch.compile the encoders")


def minutes(text):
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 (every step) or more")
    return float(text)


def guarded(main):
    """`main`, which in one line instead of a traceback says what a user can mend: memory, disk, killed workers."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (OSError, RuntimeError, MemoryError) as error:
            why = _mendable(error)
            if why is None:
                raise
        raise SystemExit(f"{why}; what was saved is whole, and the same command goes on from there")
    return run


def _mendable(error):
    text, fewer = str(error), "lower --batch-size (of simclr.py: --chunk)"
    if isinstance(error, torch.OutOfMemoryError):
        return f"no GPU memory left: {fewer}, or take more GPUs"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"no memory left: {fewer}, or --workers"
    if "DataLoader worker" in text:
        return "a process that reads images has died, mostly for want of memory: lower --workers or --batch-size"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return f"{error.filename or 'a file'}: cannot be written ({error.strerror}): make room"


def resolve(script, args, scales, presets, scale, named=(), aside=()):
    """Settings of a run, scale < preset < flags, as a SimpleNamespace, and its folder.

    `aside` are flags that are no settings; `named` are flags that become part of the folder's name where they are given.
    Says what it decided by itself.
    """
    preset = {k: v for k, v in presets[args.preset].items() if k not in ("paper", "long")}
    settings = {"script": script, "scale": scale, "preset": args.preset, "seed": 0, **scales[scale], **preset}
    long = settings.pop("long", 1)
    if presets[args.preset].get("long"):
        settings["epochs"] *= long
    if preset and all(scales[scale].get(k) == v for k, v in preset.items()):
        say(f"note: at the scale {scale}, {args.preset} has the baseline's settings")
    flags = {k: v for k, v in vars(args).items() if v is not None and k not in (
        "data", "out", "fresh", "max_steps", "save_minutes", "workers", "compile", "preset", *aside)}
    base_lr, base_batch = settings["lr"], settings["batch_size"]
    settings |= flags
    if "lr" not in flags and settings["batch_size"] != base_batch:
        rule = settings.get("scaling", "linear")
        factor = settings["batch_size"] / base_batch
        settings["lr"] = base_lr * (factor if rule == "linear" else math.sqrt(factor))
        say(f"note: learning rate {settings['lr']:g} from {base_lr:g} at batch {base_batch}, by the {rule} rule")
    settings["precision"] = args.precision or ("bf16" if _good_at_bf16() else "fp32")
    settings["data"] = args.data and str(Path(args.data).expanduser().resolve())
    name = [f"{flag}{getattr(args, flag)}" for flag in (*named, "seed") if getattr(args, flag) is not None]
    out = Path(args.out or "-".join([f"runs/{script}-{scale}-{args.preset}", *name]))
    return SimpleNamespace(**settings), out


def paper_says(row):
    """A line with the paper's number for a row of PRESETS."""
    value = row["paper"]
    value = f"{value[0]} at K = 512, {value[1]} at 65536" if isinstance(value, tuple) else value
    return f"the paper's top-1 for this row, on ImageNet: {value}"


def _good_at_bf16():
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return any(getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile"))


def check(s, n_images, max_steps=None, workers=0, drop_last=True):
    """Raise SystemExit with one line if settings `s` make no sense.

    With `drop_last`, also if a batch cannot be made of `n_images` images, processes and groups. Their number becomes a
    setting: with more or fewer images it is another run.
    """
    s.images = n_images
    world, bn_group = ddp.world(), getattr(s, "bn_group", 1)
    unit = bn_group * world
    for name in ("epochs", "batch_size", "bn_group"):
        if getattr(s, name, 1) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(s, name)}: expected 1 or more")
    if max_steps is not None and max_steps < 1 or workers < 0:
        raise SystemExit(f"--max-steps {max_steps} --workers {workers}: expected 1 or more steps, 0 or more workers")
    model.check_arch(s.arch)
    if not s.lr > 0 or s.warmup < 0 or s.seed < 0:
        raise SystemExit(f"--lr {s.lr:g} --warmup {s.warmup} --seed {s.seed}: expected lr above 0, the others 0 or more")
    if drop_last and (s.batch_size > n_images or s.batch_size % unit):
        most = min(s.batch_size, n_images)
        why = (f"larger than the data set of {n_images} images" if s.batch_size > n_images else
               f"does not divide into {world} processes with groups of {bn_group} images")
        group = bn_group if most >= 2 * unit else max(1, most // (2 * world))     # two groups, or shuffling does nothing
        flag = "" if group == bn_group else f"--bn-group {group} "
        raise SystemExit(f"--batch-size {s.batch_size}: {why}; {flag}--batch-size "
                         f"{max(1, most // (group * world)) * group * world} would fit")


def check_augmentation(s):
    """Raise SystemExit with one line if the crops' area or the jitter's strength in `s` make no sense."""
    lo, hi = s.crop
    if not 0 < lo <= hi <= 1:
        raise SystemExit(f"--crop {lo:g} {hi:g}: expected 0 < LO <= HI <= 1")
    if not 0 <= getattr(s, "jitter", 0) <= 2.5:
        raise SystemExit(f"--jitter {s.jitter:g}: expected 0 to 2.5 (beyond, the hue turns by more than half)")


def say(text):
    """Print on one process."""
    if ddp.rank() == 0:
        print(text, flush=True)


def learning_rate(step, *, lr, schedule, warmup, epochs, steps_per_epoch, drops=(.6, .8)):
    """The learning rate of a step, as MoCo releases it: constant within an epoch.

    `cosine`: lr/2 (1 + cos(pi epoch / epochs)); `steps`: a tenth of it from each of `drops` on, shares of the epochs
    (120 and 160 of 200); before, `warmup` steps of linear growth.
    """
    epoch = step // steps_per_epoch
    if schedule == "cosine":
        lr *= .5 * (1 + math.cos(math.pi * epoch / epochs))
    else:
        lr *= .1 ** sum(epoch >= round(part * epochs, 6) for part in drops)
    return lr * min(1, (step + 1) / (warmup + 1))


def embedder(module, device, precision, compiled=False):
    """How a step calls a module: in bf16 autocast if `precision` says so, and compiled if `compiled`."""
    call = torch.compile(module) if compiled else module

    def embed(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return call(x)
    return embed


class Run:
    """A folder `out` with checkpoint.pt, log.jsonl and curves.png, the live line, and the wish to stop.

    `state` is the checkpoint to go on from, or None. `args` are the flags --fresh, --max-steps and --save-minutes.
    Raises SystemExit if `out` cannot be written, is in use, holds a run of other settings, or checkpoints of which none
    is whole. `chance` is the loss of a guess, ln(K + 1), if it is worth showing beside the loss; `pictures` are what
    curves.png shows, the result first.
    """

    def __init__(self, out, settings, total, device, args, chance=None, pictures=PICTURES):
        self.out, self.settings, self.total, self.device, self.chance = Path(out), vars(settings), total, device, chance
        self.path, self.previous = self.out / "checkpoint.pt", self.out / "previous.pt"
        self.stop, self.save_seconds = min(total, args.max_steps or total), 60 * args.save_minutes
        self.pictures, self.batch, self.state, self.asked, self.losses = pictures, settings.batch_size, None, False, []
        self.live, self.shown, self.width = sys.stdout.isatty(), time.time(), 0
        self.saved, self.waited, self.mark, self.began = time.time(), 0., None, None
        refusal = self._claim(args.fresh) if ddp.rank() == 0 else None
        if ddp.any_process(refusal is not None, device):        # the others wait for the first here
            raise SystemExit(refusal or 1)
        if ddp.rank() and self.path.exists():
            self.state = model.read_checkpoint(self.path, CHECKPOINT)
        self.start = self.state["step"] if self.state else 0
        for number in (signal.SIGTERM, signal.SIGINT):          # finish the step
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def _claim(self, fresh):
        """What one process does: lock `out`, find the newest whole checkpoint, cut the log. Returns why not, or None."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / "lock").open("a+")          # held, and so locked, as long as this process lives
            (self.out / "log.jsonl").open("a").close()
        except OSError as error:
            return f"--out {self.out}: cannot be written ({error.strerror})"
        try:
            import fcntl                                        # not on Windows; some file systems know no locks
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            return f"--out {self.out}: in use by {self.lock.read() or 'another process'}; choose another --out, or stop it"
        except (ImportError, OSError):
            pass
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=self.lock, flush=True)
        try:
            path, refusal = (None, None) if fresh else self._newest()
        except SystemExit as error:
            return f"{error}; --fresh starts anew"
        if self.state and (other := self._other_settings()):
            return f"--out {self.out}: holds a run of other settings ({other}); choose another, or --fresh to overwrite it"
        if path == self.previous:                               # or the next save would put the damaged one in its place
            say(f"{refusal or f'{self.path} is missing'}: going on from the one before, {path}")
            if self.path.exists():
                os.replace(self.path, self.out / "damaged.pt")
            os.replace(path, self.path)
        for path in (self.path, self.previous) if fresh else ():
            path.unlink(missing_ok=True)
        if not (fresh or self.state) and any(e["event"] == "epoch" and e["step"] for e in self.events()):
            say(f"note: {self.out} has a log but no checkpoint: it begins anew, and that log is kept as log.old.jsonl")
            shutil.copy(self.out / "log.jsonl", self.out / "log.old.jsonl")
        # what the log says of steps to be done again, goes
        kept = [e for e in self.events() if self.state and e["step"] <= self.state["step"]]
        _replace(self.out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in kept))

    def _newest(self):
        """`(path, refusal)` of the newest whole checkpoint, which becomes `state`, and of a damaged one, or None."""
        refusal = None
        for path in (self.path, self.previous):
            try:
                if path.exists():
                    self.state = model.read_checkpoint(path, CHECKPOINT)
                    return path, refusal
            except model.Damaged as error:
                refusal = refusal or error
        if refusal:
            raise refusal
        return None, None

    def _other_settings(self):
        saved = self.state["settings"]
        plain = json.loads(json.dumps(self.settings))
        if not 0 <= self.state["step"] <= self.total:
            return f"step {self.state['step']} there, of {self.total} now"
        # where the images lie is no setting; of another script its name is enough
        keys = ("script",) if saved.get("script") != plain["script"] else {**saved, **plain, "data": 0}.keys() - {"data"}
        return "; ".join(f"{k} {saved.get(k)} there, {plain.get(k)} now" for k in sorted(keys) if saved.get(k) != plain.get(k))

    def open(self, optimizer, *lines):
        """Say how the run begins, and write it to the log. Of what `optimizer` trains, nothing is saved that is not finite."""
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        say("  ".join(f"{k}={_short(v)}" for k, v in self.settings.items() if k not in ("script", "data")))
        for text in lines:
            say(text)
        say(f"going on in {self.out} at step {self.start} of {self.total}" if self.start else f"writing to {self.out}")
        self.log("start", self.start, settings=self.settings, **machine(self.device))

    def timed(self, batches):
        """`batches`, with the time spent waiting for them counted."""
        self.began = self.mark = (time.time(), self.start)
        batches = iter(batches)
        while True:
            since = time.time()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.time() - since
            yield batch

    def tell(self, step, loss, last=False, **more):
        """After a step: refresh the live line; log it every 50 steps, and the `last` before the state is saved.

        `loss` is a tensor of this process. Raises SystemExit if a loss or what a gradient has made of a weight is not
        finite, before that could be saved.
        """
        now, every = time.time(), last or step % EVERY == 0
        self.losses.append(loss)
        if every:
            losses, self.losses = ddp.mean(torch.stack(self.losses)), []
            self._refuse_infinite(step, losses, more["lr"])
            loss = losses[-1]
        # a wait of .5 s on a terminal, 30 s in a file: .item() makes a GPU wait
        if not every and (ddp.rank() or now - self.shown < (.5 if self.live else 30)):
            return
        seconds = max(now - self.mark[0], 1e-9)
        rate = (step - self.mark[1]) * self.batch / seconds
        ratio = loss.item() / self.chance if self.chance else None
        facts = {"loss": loss.item(), "ratio": ratio, **more, "images_per_s": rate, "waiting": self.waited / seconds}
        if every:
            self.log("step", step, **facts)
            self.waited, self.mark = 0., (now, step)
        if now - self.shown >= (.5 if self.live else 30):
            self.shown = now
            left = (now - self.began[0]) / max(1, step - self.began[1]) * (self.total - step)
            self.line(f"step {step}/{self.total}  {describe(facts)}  {clock(left)} left", self.live)

    def _refuse_infinite(self, step, losses, lr):
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            first = int(bad[0])
            what = f"the loss is {losses[first].item()} at step {step - len(losses) + 1 + first}"
        elif not torch.isfinite(torch.stack(torch._foreach_norm(self.trained))).all():
            what = f"the loss is finite at step {step}, but its gradient was not"
        else:
            return
        kept = f"{self.path} is of before" if self.path.exists() else f"{self.out} has no checkpoint"
        raise SystemExit(f"{what}, learning rate {lr:g}: try a smaller --lr, more --warmup, a larger --temperature, or "
                         f"--precision fp32, each a run of its own; {kept}")

    def line(self, text, live=False):
        """A line that the next one overwrites (`live`), or one that stays."""
        if ddp.rank() == 0:
            end = "" if live else "\n"
            print(("\r" if self.width else "") + text.ljust(self.width), end=end, flush=True)
            self.width = len(text) if live else 0

    def log(self, event, step, **facts):
        if ddp.rank() == 0:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps({"event": event, "step": step, "time": round(time.time(), 2), **facts}) + "\n")

    def events(self):
        """The log's events; a line that a kill or a full disk has cut is none."""
        found = []
        for line in (self.out / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                event = json.loads(line)
                found += [event] if {"event", "step"} <= event.keys() else []
        return found

    def value(self, name, which=0):
        """The first, or the `which`-th, value of `name` in the log, or None."""
        found = [e[name] for e in self.events() if e.get(name) is not None]
        return found[which] if found else None

    def epoch(self, epoch, **found):
        """At the end of an epoch: a line that stays, an event, the curves."""
        step = epoch * self.total // self.settings["epochs"]
        self.log("epoch", step, epoch=epoch, **found)
        loss = {name: self.value(name, -1) if epoch else None for name in ("loss", "ratio")}
        self.line(f"epoch {epoch}/{self.settings['epochs']}  " + describe({**loss, **found}))
        self.curves()
        self.waited, self.mark = 0., (time.time(), step)

    def stopping(self, step, epoch_ends):
        """`(leave, save)`: whether the run stops after this step, and whether it is saved; the same on every process."""
        hear = ddp.world() == 1 or self.device.type == "cpu" or step % HEARD == 0
        leave = step == self.stop or hear and ddp.any_process(self.asked, self.device)
        late = time.time() - self.saved >= self.save_seconds
        return leave, leave or epoch_ends or hear and ddp.any_process(late, self.device)

    def save(self, step, **state):
        """Write checkpoint.pt: to a temporary file, then renamed; the one before stays as previous.pt.

        So a whole one is on disk at any moment. No random state is in it: whatever is drawn while training is a function
        of the seed and the step. Raises SystemExit, and leaves what there was, if it cannot be written.
        """
        self.saved, new = time.time(), self.out / "checkpoint.tmp"
        if ddp.rank():
            return
        try:
            torch.save({"settings": json.loads(json.dumps(self.settings)), "step": step, **state}, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:                # torch makes a RuntimeError of a full disk
            free = shutil.disk_usage(self.out).free / 2 ** 20
            with contextlib.suppress(OSError):
                new.unlink()
            raise SystemExit(f"{new}: step {step} cannot be saved, with {free:.0f} MiB free there: make room; what was saved "
                             f"is whole, and the same command goes on from there ({str(error).splitlines()[0]})")
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(new, self.path)

    def knn_line(self):
        """The first and the last kNN of the log, as the last line of a pre-training script."""
        first, last = self.value("knn"), self.value("knn", -1)
        return "no labels, no kNN" if last is None else f"kNN of h {last:.2f} %, untrained {first:.2f} %"

    def close(self, step, result):
        """Say how the run ended, last the line `result`; leave with the code for unfinished where it was asked to stop."""
        asked = step < self.total and ddp.any_process(self.asked, self.device)
        if self.start < self.total:
            self.log("finished" if step == self.total else "unfinished" if asked else "stopped", step)
        if step < self.total:
            how = "the same command goes on" if asked else "without --max-steps, or with a larger one, it goes on"
            self.line(f"stopped at step {step} of {self.total}, saved in {self.out}; {how}")
            self.curves()
        else:
            self.line(f"finished{' already, nothing to do' * (step == self.start)}: checkpoint and curves in {self.out}")
            self.line(result)
        ddp.close()
        if asked:
            sys.exit(UNFINISHED)

    def curves(self):
        """Draw curves.png from the log."""
        if ddp.rank():
            return
        from matplotlib.figure import Figure                    # here: it takes a while to import
        events = self.events()
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, len(self.pictures)), self.pictures):
            points = [(e["step"], e[name]) for e in events if e.get(name) is not None]
            if not points:
                axis.text(.5, .5, "nothing to show", ha="center", transform=axis.transAxes)
            else:
                axis.plot(*zip(*points), marker="o" if name == self.pictures[0][0] else None, markersize=4, color="#0072B2")
            if name == "knn" and points:
                axis.axhline(points[0][1], color="gray", linestyle="--", linewidth=1)
                axis.annotate("random encoder", (points[-1][0], points[0][1]), (0, 4), ha="right",
                              textcoords="offset points", color="gray")
            axis.set(title=title, xlabel="step")
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self.out.name, fontsize=10)
        figure.savefig(self.out / "curves.png", dpi=110)


def _replace(path, text):
    """Write a small file whole or not at all."""
    new = path.with_suffix(".tmp")
    new.write_text(text)
    os.replace(new, path)


def _short(value):
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def describe(facts):
    """The usual words for what a line tells."""
    words = {"epoch": "epoch {:.1f}", "loss": "loss {:.3f}", "ratio": "({:.2f} of chance)", "queue": "queue {:.0%}",
             "lr": "lr {:.4f}", "knn": "kNN {:.2f} %", "bank": "bank kNN {:.2f} %", "top1": "top-1 {:.2f} %",
             "top5": "top-5 {:.2f} %", "images_per_s": "{:.0f} images/s", "waiting": "waiting {:.1%}"}
    return "  ".join(words[k].format(v) for k, v in facts.items() if k in words and v is not None)


def clock(seconds):
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else (
        f"{minutes // 60} h {minutes % 60:02d} min")


def machine(device):
    """What a number was measured on: hardware, versions, commit."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip()
    except OSError:
        commit = ""
    try:
        models = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = f"{models[0]}, {len(models)} cores"
    except (OSError, IndexError):
        cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"device": name, "processes": ddp.world(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit}
