"""The loop around a training step: log, evaluate, save, stop, resume. `Run` combines the parts."""

import datetime
import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import UserError, checkpoint, ddp

UNFINISHED = 75                                 # exit code: saved, start again to continue
LOG_EVERY = 50                                  # steps between log entries
SHOW_EVERY = 10                                 # seconds between lines on the terminal
PANELS = ("knn", "ratio", "lr")                 # of curves.png
TITLES = {"knn": "kNN top-1 of h, %", "ratio": "loss / loss of a guess", "lr": "learning rate",
          "top1": "top-1 on the test images, %"}


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
        return [entry[name] for entry in self.entries() if entry.get(name) is not None]


def lock(folder):
    """Create and lock `folder`, for as long as the returned file is open.

    Raises UserError if it cannot be written or is locked by another process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").open("a").close()
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})")
    try:
        import fcntl                                            # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"--out {folder}: in use by {file.read() or 'another process'}; choose "
                        "another --out or stop it")
    except (ImportError, OSError):                              # a file system without locks
        pass
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


def differences(saved, settings):
    """The settings in which two runs differ, as text; empty if there are none."""
    names = ["script"] if saved.get("script") != settings["script"] else {*saved, *settings}
    return "; ".join(f"{name} {saved.get(name)} there, {settings.get(name)} here"
                     for name in sorted(names)
                     if name != "data" and saved.get(name) != settings.get(name))


class Run:
    """A training run in the folder `out`: checkpoint.pt, log.jsonl, curves.png.

    `settings` {name: value} identify the run; a run with other settings is refused. `state` {name:
    module, optimizer or tensor} is restored here, and saved. `total` and `epoch` are the numbers of
    steps of the run and of an epoch. `evaluate()` returns {name: number}; it is called on the
    untrained network (unless `eval_first` is False), every `eval_every` epochs and at the end.
    `chance` is the loss of a guess: the log shows `ratio`, the loss divided by it. On GPUs,
    processes agree on stopping every `stop_every` steps.

    Raises UserError if `out` cannot be written, is in use, holds a run with other settings, or if
    all its checkpoints are damaged.
    """

    def __init__(self, state, *, out, settings, total, epoch, device, evaluate, eval_every=1,
                 eval_first=True, chance=None, panels=PANELS, fresh=False, max_steps=None,
                 save_minutes=30., stop_every=10):
        self.out, self.settings, self.state = Path(out), json.loads(json.dumps(settings)), state
        self.total, self.epoch, self.end = total, epoch, min(total, max_steps or total)
        self.evaluate, self.eval_every, self.eval_first = evaluate, eval_every, eval_first
        self.device, self.panels, self.save_minutes = device, panels, save_minutes
        self.stop_every = 1 if device.type == "cpu" else stop_every
        self.path, self.events = self.out / "checkpoint.pt", Log(self.out / "log.jsonl")
        self.losses, self.values, self.chance, self.shown_loss = [], {}, chance, {}
        self.stop_requested = False
        self.step = self.start = self._restore(fresh)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)

    def _request_stop(self, number, frame):
        self.stop_requested = True

    def _restore(self, fresh):
        """Lock the folder and restore the newest checkpoint; returns its step, or 0."""
        saved = error = None
        try:
            if ddp.rank() == 0:                                 # it decides for all processes
                self.lock = lock(self.out)
                saved = self._newest(fresh)
        except UserError as caught:
            error = caught
        if ddp.any_process(error is not None, self.device):
            raise error or UserError("see the message of process 0")
        if ddp.rank() and self.path.exists():
            saved = checkpoint.read(self.path, checkpoint.CONTENT)
        if saved is None:
            return 0
        checkpoint.restore(saved, self.state)
        return saved["step"]

    def _newest(self, fresh):
        if fresh:
            checkpoint.remove(self.path)
        try:
            saved, where, damage = checkpoint.newest(self.path)
        except UserError as error:
            raise UserError(f"{error}; --fresh starts anew")
        if saved is None:
            if self.events.entries() and not fresh:
                ddp.say(f"note: {self.out} has a log but no checkpoint; the run starts anew")
            return None
        different = differences(saved["settings"], self.settings)
        if not 0 <= saved["step"] <= self.total:
            different = f"step {saved['step']} there, {self.total} in all here"
        if different:
            raise UserError(f"--out {self.out}: holds a run with other settings ({different}); "
                            "choose another, or --fresh to overwrite it")
        if where != self.path:
            ddp.say(f"{damage or f'{self.path} is missing'}: continuing from {where}")
            checkpoint.make_current(self.path, where)
        return saved

    def steps(self, batches):
        """Iterate over `batches`, tuples that begin with the step; do what is due after each."""
        if self.start == self.total:
            return
        ddp.say("  ".join(f"{name}={value}" for name, value in self.settings.items()))
        how = f"continuing at step {self.start} of {self.total} in" if self.start else "writing to"
        ddp.say(f"{how} {self.out}")
        self.events.add("start", self.start, settings=self.settings, **machine(self.device))
        if self.start == 0 and self.eval_first:
            self._end_epoch()                                   # the untrained network
        self.began = self.shown = self.saved = self.since = before = time.time()
        self.since_step, self.waited, self.save_seconds = self.start, 0., 0.
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
        epoch_ends = self.step % self.epoch == 0
        due = epoch_ends and self._evaluation_due()
        # Saving takes at most 5 % of the time; and is not put off beyond save_minutes.
        since = time.time() - self.saved
        late = since >= 60 * self.save_minutes or epoch_ends and since >= 20 * self.save_seconds
        ask = epoch_ends or self.step % self.stop_every == 0
        stop = self.step == self.end or ask and ddp.any_process(self.stop_requested, self.device)
        save = stop or due or ask and ddp.any_process(late, self.device)
        logged = save or epoch_ends or self.step % LOG_EVERY == 0
        if logged or time.time() - self.shown > SHOW_EVERY:
            self._report(logged)
        if save:
            for part in self.state.values():
                if isinstance(part, nn.Module):
                    ddp.average_buffers(part)
        if epoch_ends:
            self._end_epoch()
        if save:
            began = time.time()
            if ddp.rank() == 0:                 # random draws depend on the step: no state to save
                checkpoint.save(self.path, self.step, self.settings, self.state)
            self.saved = time.time()
            self.save_seconds = self.saved - began
        if epoch_ends or save:                  # do not count this as time of the next steps
            self.since, self.since_step, self.waited = time.time(), self.step, 0.
        return stop

    def _evaluation_due(self):
        epoch = self.step // self.epoch
        return epoch % self.eval_every == 0 or self.step == self.total

    def _report(self, logged):
        """Print a line if one is due. If `logged`, check and log the losses of all processes."""
        loss = self.losses[-1]
        if logged:
            losses, self.losses = ddp.mean(torch.stack(self.losses)), []
            self._check_finite(losses)
            loss = losses[-1]
            self.shown_loss = {"loss": loss.item()}
        now, steps = time.time(), self.step - self.since_step
        seconds = max(now - self.since, 1e-9)
        values = {"loss": loss.item(), "epoch": self.step / self.epoch, **self.values,
                  "images_per_s": steps * self.settings["batch_size"] / seconds,
                  "waiting": self.waited / seconds}
        if self.chance:
            values["ratio"] = values["loss"] / self.chance
        if logged:
            self.events.add("step", self.step, **values)
            self.since, self.since_step, self.waited = now, self.step, 0.
        if now - self.shown > SHOW_EVERY:
            self.shown = now
            left = (now - self.began) / (self.step - self.start) * (self.end - self.step)
            ddp.say(f"step {self.step}/{self.total}  {describe(values)}  {duration(left)} left")

    def _check_finite(self, losses):
        """Raises UserError if a loss or a weight is not finite, before that could be saved."""
        optimizer = self.state["optimizer"]
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + int(bad[0])
            what = f"the loss is {losses[bad[0]].item()} at step {step}"
        elif not torch.isfinite(torch.stack(torch._foreach_norm(weights))).all():
            what = f"the loss is finite at step {self.step}, but the weights are not"
        else:
            return
        raise UserError(
            f"{what}, learning rate {optimizer.param_groups[0]['lr']:g}: try a smaller --lr, a "
            "longer --warmup, a larger --temperature or --precision fp32, as a new run; "
            f"{self.path} is from before, if there is one")

    def _end_epoch(self):
        """Evaluate if due, log it, print a line, draw the curves."""
        epoch = self.step // self.epoch
        values = self.evaluate() if self._evaluation_due() else {}
        self.events.add("epoch", self.step, epoch=epoch, **values)
        shown = describe({**self.shown_loss, **values})
        ddp.say(f"epoch {epoch}/{self.total // self.epoch}  {shown}")
        if values:
            self._draw()

    def _draw(self):
        if ddp.rank() == 0:
            draw_curves(self.out / "curves.png", self.events.entries(), self.panels)

    def close(self, result=None):
        """Print how the run ended and the line `result`, by default the kNN accuracy.

        Returns the exit code: 0, or UNFINISHED after a stop request.
        """
        unfinished = self.step < self.total
        stopped = unfinished and ddp.any_process(self.stop_requested, self.device)
        if self.start < self.total:
            event = "unfinished" if stopped else "stopped" if unfinished else "finished"
            self.events.add(event, self.step)
            self._draw()
        if unfinished:
            how = "the same command" if stopped else "a larger --max-steps, or none,"
            ddp.say(f"stopped at step {self.step} of {self.total}, saved in {self.out}; {how} "
                    "continues")
        else:
            already = "" if self.start < self.total else " already, nothing to do"
            ddp.say(f"finished{already}: checkpoint and curves in {self.out}")
            ddp.say(result or self._knn_result())
        ddp.close()
        return UNFINISHED if stopped else 0

    def _knn_result(self):
        knn = self.events.values("knn")
        if not knn:
            return "no labels, no kNN accuracy"
        return f"kNN of h {knn[-1]:.2f} %, untrained {knn[0]:.2f} %"


def draw_curves(path, entries, panels):
    """A picture of log entries: a panel for each name of `panels`; the first with its baseline."""
    from matplotlib.figure import Figure                        # slow to import
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(panels)), panels):
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        axis.plot(*np.reshape(points, (-1, 2)).T, "o-" if name == panels[0] else "-", markersize=4)
        if name == panels[0] and points and points[0][0] == 0:
            axis.axhline(points[0][1], color="gray", linestyle="--", label="untrained network")
            axis.legend(frameon=False)
        axis.set(title=TITLES.get(name, name), xlabel="step")
    figure.suptitle(path.parent.name, fontsize=10)
    figure.savefig(path, dpi=110)


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
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(": ")[1].strip() for line in file if "model name" in line)
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True,
                                         cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    except (OSError, StopIteration, subprocess.CalledProcessError):
        pass
    name = f"{name}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "processes": ddp.world(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "commit": commit.strip()}
