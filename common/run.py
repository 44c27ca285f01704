"""The loop around a training step: log, evaluate, save, stop, resume. `Run` combines the parts."""

import contextlib
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import UserError, checkpoint, ddp

UNFINISHED = 75                                 # exit code: saved, start again to continue
LOG_EVERY = 50                                  # steps between log entries
SHOW_EVERY = 10                                 # seconds between lines on the terminal
DRAW_EVERY = 60                                 # seconds, or more, between drawings of the curves
PANELS = ("knn", "ratio", "lr", "alignment", "uniformity", "rank")      # of curves.png
TITLES = {"knn": "kNN top-1 of h, %", "ratio": "loss / loss at chance level", "lr": "learning rate",
          "top1": "top-1 on the test images, %", "alignment": "alignment of z, two views",
          "uniformity": "uniformity of z", "rank": "effective rank of h"}
SIGNALS = ("alignment", "uniformity", "rank")   # what a run without labels ends with


class Log:
    """log.jsonl: one JSON object per line, only ever appended to, by rank 0."""

    def __init__(self, path):
        self.path = path

    def add(self, event, step, **values):
        if ddp.rank() == 0:
            entry = {"event": event, "step": step, "time": round(time.time(), 2), **values}
            with self.path.open("a") as file:
                # A newline first: a kill may have cut off the line before.
                file.write("\n" * (event == "start") + json.dumps(entry) + "\n")

    def entries(self):
        """All entries as dicts. A `start` event supersedes the entries after its step."""
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                event, step = entry["event"], int(entry["step"])
            except (ValueError, TypeError, KeyError):           # empty or cut off
                continue
            if event == "start":
                found = [e for e in found if e["step"] <= step and step > 0]
            found.append(entry)
        return found

    def values(self, name):
        """All values of `name`, in order."""
        return [entry[name] for entry in self.entries() if name in entry]


def differences(saved, settings):
    """The settings in which two runs differ, as text; empty if there are none.

    Paths may change: `data`, if the images are the same, and `encoder`, if it has a fingerprint.
    """
    paths = ("data", "encoder") if "encoder_fingerprint" in settings else ("data",)
    names = ["script"] if saved.get("script") != settings["script"] else {*saved, *settings}
    return "; ".join(f"{name} was {saved.get(name)}, is now {settings.get(name)}"
                     for name in sorted(names)
                     if name not in paths and saved.get(name) != settings.get(name))


@dataclass
class Run:
    """A training run in the folder `out`: checkpoint.pt, log.jsonl, curves.png.

    Raises UserError if `out` cannot be written, is in use, holds a run with other settings, or if
    all its checkpoints are damaged.
    """

    state: dict                     # {name: module, optimizer or tensor}: restored here, and saved
    out: Path
    settings: dict                  # {name: value}: a run with other settings is refused
    total_steps: int
    steps_per_epoch: int
    device: torch.device
    # () -> {name: number}; called on the untrained network (unless `eval_first` is False), every
    # `eval_every` epochs and at the end
    evaluate: Callable
    eval_every: int = 1
    eval_first: bool = True
    chance_loss: float = None       # if all similarities are equal; `ratio` is the loss over it
    panels: tuple = PANELS
    fresh: bool = False             # overwrite the run that `out` holds
    max_steps: int = None
    save_minutes: float = 30.
    stop_every: int = 10            # steps between the blocking checks for a stop request, on GPUs

    def __post_init__(self):
        self.out, self.settings = Path(self.out), json.loads(json.dumps(self.settings))
        self.path, self.events = self.out / "checkpoint.pt", Log(self.out / "log.jsonl")
        self.end = min(self.total_steps, self.max_steps or self.total_steps)
        if self.device.type == "cpu":
            self.stop_every = 1
        self.loss, self.losses, self.values, self.stop_requested = None, [], {}, False
        self.last_draw = time.time()
        self.step = self.start = self._restore()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        hangup = getattr(signal, "SIGHUP", None)                # not on Windows; nohup ignores it
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
            signal.signal(hangup, self._request_stop)

    def _request_stop(self, number, frame):
        first, self.stop_requested = not self.stop_requested, True
        if ddp.rank() == 0 and first:
            with contextlib.suppress(OSError):                  # stderr may have been closed
                os.write(2, b"stopping after this step\n")      # print is not safe in a handler

    def _restore(self):
        """Lock the folder and restore the newest checkpoint; returns its step, or 0."""
        saved = error = None
        try:
            if ddp.rank() == 0:                                 # it decides for all processes
                self.lock = checkpoint.lock(self.out)
                saved = self._recover()
        except UserError as caught:
            error = caught
        if ddp.any_process(error is not None, self.device):
            raise error or UserError("see the message of process 0")
        if ddp.any_process(not appears(self.out), self.device):
            raise UserError(f"--out {self.out}: other machines do not see this folder; it must be "
                            "on a disk that all share")
        if ddp.rank() and self.path.exists():
            saved = checkpoint.read(self.path)
        step = saved["step"] if saved else 0
        steps = ddp.all_gather(torch.tensor([step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(f"--out {self.out}: processes find checkpoints of steps {steps} there; "
                            "it must be on a disk that all machines share")
        if saved:
            checkpoint.restore(saved, self.state)
        return step

    def _recover(self):
        """Leave the newest intact checkpoint of this run at `path`; returns it, or None."""
        # torchrun restarts a run with the same flags, which must not delete its checkpoints.
        if self.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            for name in ("checkpoint.pt", "previous.pt"):
                (self.out / name).unlink(missing_ok=True)
            return None
        try:
            saved, where, damage = checkpoint.newest(self.path)
        except UserError as error:
            raise UserError(f"{error}; --fresh starts from scratch")
        if saved is None:
            if self.events.entries():
                ddp.say(f"note: {self.out} has a log but no checkpoint; the run starts from "
                        "scratch")
            return None
        different = differences(saved["settings"], self.settings)
        if not different and not 0 <= saved["step"] <= self.total_steps:
            different = f"it is at step {saved['step']}, this one ends at {self.total_steps}"
        if different:
            raise UserError(f"--out {self.out}: holds a run with other settings ({different}); "
                            "choose another, or --fresh to overwrite it")
        if where != self.path:
            ddp.say(f"{damage or f'{self.path} is missing'}: continuing from {where}")
            if damage:
                os.replace(self.path, self.out / "damaged.pt")
            os.replace(where, self.path)
        return saved

    def _say(self, text):
        """Print `text` on rank 0. If stdout has been closed, request a stop."""
        try:
            ddp.say(text)
        except BrokenPipeError:                 # as after `| head`, or if Ctrl-C ends `| tee`
            ddp.discard_output()
            self._request_stop(None, None)

    def steps(self, batches):
        """Iterate over `batches`, tuples that begin with the step; do what is due after each."""
        if self.start == self.total_steps:
            return
        self._say("  ".join(f"{name}={value}" for name, value in self.settings.items()))
        how = f"continuing at step {self.start} of {self.total_steps} in"
        self._say(f"{how if self.start else 'writing to'} {self.out}")
        self.events.add("start", self.start, settings=self.settings, **machine(self.device))
        if self.start == 0 and self.eval_first:
            self._end_epoch(True)                               # the untrained network
        self.began = self.last_print = self.last_save = self.last_log = before = time.time()
        self.waited = self.save_seconds = 0.
        for batch in batches:
            self.waited += time.time() - before
            yield batch
            self.step = batch[0] + 1
            if self._after_step():
                return
            before = time.time()

    def log(self, loss, **values):
        """Record the loss (a tensor) of this process and other numbers of the current step."""
        self.losses.append(loss)
        self.values = values

    def _after_step(self):
        """Log, evaluate and save where due; returns whether to stop."""
        epoch_ends = self.step % self.steps_per_epoch == 0
        epoch, at_end = self.step // self.steps_per_epoch, self.step == self.total_steps
        due = epoch_ends and (epoch % self.eval_every == 0 or at_end)
        # Saving takes at most 5 % of the time, and is due after `save_minutes` at the latest. Only
        # rank 0 knows how long saving takes, so it decides.
        unsaved = time.time() - self.last_save                  # seconds
        overdue = unsaved >= 60 * self.save_minutes
        overdue |= epoch_ends and unsaved >= 20 * self.save_seconds
        overdue &= ddp.rank() == 0
        # All processes have the same values here, except for `overdue` and stop requests. So they
        # exchange these at the same steps.
        exchange = epoch_ends or self.step % self.stop_every == 0
        stop = exchange and ddp.any_process(self.stop_requested, self.device)
        stop = stop or self.step == self.end
        save = stop or due or (exchange and ddp.any_process(overdue, self.device))
        logged = save or epoch_ends or self.step % LOG_EVERY == 0
        if logged or time.time() - self.last_print > SHOW_EVERY:
            self._report(logged)
        if save:
            for part in self.state.values():
                if isinstance(part, nn.Module):
                    ddp.average_buffers(part)
        if epoch_ends:
            self._end_epoch(due)
        if save:
            began = time.time()
            if ddp.rank() == 0:                 # random draws depend on the step: no state to save
                checkpoint.save(self.path, self.step, self.settings, self.state)
            self.last_save = time.time()
            self.save_seconds = self.last_save - began
        if logged:                              # leave saving out of the speed shown next
            self.last_log, self.waited = time.time(), 0.
        return stop

    def _report(self, logged):
        """Print a line if one is due. If `logged`, check and log the losses of all processes."""
        steps, self.loss = len(self.losses), self.losses[-1].item()
        if logged:
            losses, self.losses = ddp.mean(torch.stack(self.losses)).tolist(), []
            self._check_finite(losses)
            self.loss = losses[-1]
        now = time.time()
        seconds = max(now - self.last_log, 1e-9)
        values = {"loss": self.loss, "epoch": self.step / self.steps_per_epoch, **self.values,
                  "images_per_s": steps * self.settings["batch_size"] / seconds,
                  "waiting": self.waited / seconds}
        if self.chance_loss:
            values["ratio"] = self.loss / self.chance_loss
        if logged:
            self.events.add("step", self.step, **values)
        if now - self.last_print > SHOW_EVERY:
            self.last_print = now
            left = (now - self.began) / (self.step - self.start) * (self.end - self.step)
            self._say(f"step {self.step}/{self.total_steps}  {describe(values)}  "
                      f"{duration(left)} left")

    def _check_finite(self, losses):
        """Raises UserError if a loss or a weight is not finite, before that could be saved."""
        groups, first = self.state["optimizer"].param_groups, self.step - len(losses) + 1
        problems = [f"the loss is {loss} at step {step}" for step, loss in enumerate(losses, first)
                    if not math.isfinite(loss)]
        norms = [norm for group in groups for norm in torch._foreach_norm(group["params"])]
        if not torch.stack(norms).isfinite().all():
            problems.append(f"the loss is finite at step {self.step}, but the weights are not")
        if problems:
            raise UserError(
                f"{problems[0]}, learning rate {groups[0]['lr']:g}: start a new run with a smaller "
                "--lr, a longer --warmup or, if the script has it, a larger --temperature; "
                f"{self.path}, if it exists, was saved before this step")

    def _end_epoch(self, due):
        """Evaluate if `due`, log it, print a line, draw the curves from time to time."""
        epoch = self.step // self.steps_per_epoch
        values = self.evaluate() if due else {}
        self.events.add("epoch", self.step, epoch=epoch, loss=self.loss, **values)
        shown = describe({"loss": self.loss, **values})
        self._say(f"epoch {epoch}/{self.total_steps // self.steps_per_epoch}  {shown}")
        if values and time.time() - self.last_draw > DRAW_EVERY:
            self._draw()

    def _draw(self):
        """curves.png: a panel for each name of `panels`, with the untrained network's value."""
        if ddp.rank():
            return
        from matplotlib.figure import Figure                    # slow to import
        entries = self.events.entries()
        panels = [name for name in self.panels if any(name in entry for entry in entries)]
        rows = -(-len(panels) // 3)
        height = 3.4 * rows                                     # inches
        figure = Figure(figsize=(12, height))
        # Fixed margins: a layout that fits the labels takes as long as all else.
        figure.subplots_adjust(.05, .5 / height, .98, 1 - .7 / height, hspace=.4)
        axes = figure.subplots(rows, 3, squeeze=False).flat
        for axis in axes[len(panels):]:
            axis.axis("off")
        for axis, name in zip(axes, panels):
            points = [(e["step"], e[name]) for e in entries if name in e]
            axis.plot(*np.reshape(points, (-1, 2)).T, "o-", markersize=2)
            if points and points[0][0] == 0:
                axis.axhline(points[0][1], color="gray", linestyle="--", label="untrained network")
                axis.legend(frameon=False)
            axis.set(title=TITLES.get(name, name), xlabel="step")
        figure.suptitle(self.out.name, fontsize=10)
        figure.savefig(self.out / "curves.png", dpi=110)
        self.last_draw = time.time()

    def close(self, result=None):
        """Print how the run ended and the line `result`, by default the kNN accuracy or SIGNALS.

        Returns the exit code: 0, or UNFINISHED after a stop request.
        """
        if self.step == self.total_steps:
            event, knn = "finished", self.events.values("knn")
            if knn and not result:
                result = f"kNN of h {knn[-1]:.2f} %, untrained {knn[0]:.2f} %"
            if not result:
                values = {TITLES[name]: self.events.values(name) for name in SIGNALS}
                result = "; ".join(f"{title} {found[-1]:.4g}, untrained {found[0]:.4g}"
                                   for title, found in values.items() if found)
            already = "" if self.start < self.total_steps else " already, nothing to do"
            self._say(f"finished{already}: checkpoint and curves in {self.out}")
            self._say(result)
        else:
            event, how = "stopped", "a larger --max-steps or none"
            if ddp.any_process(self.stop_requested, self.device):
                event, how = "unfinished", "the same command"
                how += " without --fresh" if self.fresh else ""
            self._say(f"stopped at step {self.step} of {self.total_steps}, saved in {self.out}; to "
                      f"continue, use {how}")
        if self.start < self.total_steps:
            self.events.add(event, self.step)
            self._draw()
        ddp.close()
        return UNFINISHED if event == "unfinished" else 0


def appears(folder, seconds=60):
    """Whether a folder exists. On network disks, a new one may take some seconds to appear."""
    end = time.time() + seconds
    while not folder.is_dir() and time.time() < end:
        time.sleep(1)
    return folder.is_dir()


def describe(values):
    """The numbers among `values` as a line of text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                     if isinstance(value, (int, float)))


def duration(seconds):
    """h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def machine(device):
    """What a number was measured on: hardware, versions, commit."""
    name, commit = platform.machine(), ""
    with contextlib.suppress(OSError, StopIteration):
        commit, changed = (subprocess.run(["git", *words], text=True, capture_output=True,
                                          cwd=Path(__file__).parent.parent).stdout.strip()
                           for words in (["describe", "--always"],
                                         ["status", "--porcelain", "-uno", "--", ":!results"]))
        commit += "-dirty" * bool(changed)
        with open("/proc/cpuinfo") as file:
            name = next(line.split(": ")[1].strip() for line in file if "model name" in line)
    name = f"{name}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "processes": ddp.world(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit}
