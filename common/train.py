"""Flags, settings and schedules of the training scripts, and the launcher of every script."""

import argparse
import errno
import functools
import math
import sys
import warnings
from pathlib import Path

import torch

from common import UserError, data, ddp, evaluate, model

DEVICES = ("cuda", "cpu")
# Flags that do not change what is computed. All others are settings: they identify a run.
RUN_FLAGS = ("out", "fresh", "max_steps", "save_minutes", "workers", "compile", "graphs", "device")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error messages are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, expected, valid):
    """A type for argparse: an int or float (`kind`) for which `valid` holds, as in `expected`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value
    return parse


COUNT = number(int, "a whole number, 1 or more", lambda v: v >= 1)
NATURAL = number(int, "a whole number, 0 or more, below 2^32", lambda v: 0 <= v < 2 ** 32)
SIDE = number(int, "pixels, 16 or more", lambda v: v >= 16)
SEVERAL = number(int, "2 images or more, which share batch statistics", lambda v: v >= 2)
POSITIVE = number(float, "a number above 0", lambda v: 0 < v < math.inf)
NON_NEGATIVE = number(float, "a number, 0 or more", lambda v: 0 <= v < math.inf)
MOMENTUM = number(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)
AREA = number(float, "a share of the image's area, above 0 and at most 1", lambda v: 0 < v <= 1)
# Beyond a strength of 2.5, the hue would turn by more than half a circle.
STRENGTH = number(float, "a number from 0 to 2.5", lambda v: 0 <= v <= 2.5)


def parser(script, description, presets):
    """A parser with the flags that training scripts share; `settings` supplies the defaults."""
    flags = Parser(f"{script}.py", description=description.split("\n")[0])
    add = flags.add_argument
    add("data", nargs="?", metavar="DATA",
        help="folder of images (default: the built-in textures)")
    add("--preset", default=next(iter(presets)), choices=presets, metavar="ROW",
        help=f"row of a table of the paper: {', '.join(presets)}")
    add("--out", metavar="DIR",
        help="folder of the run (default: under runs/, named after script, data, preset and the "
        "settings given as flags)")
    add_run_flags(flags)
    add("--epochs", type=COUNT, metavar="n")
    add("--n-evals", type=COUNT, metavar="n", help="evaluations in a run, at most one per epoch")
    add("--arch", metavar="NAME",
        help=f"{', '.join(model.ARCHS)}; with suffix -3x3 for small images")
    add("--size", type=SIDE, metavar="PIXELS", help="side of the crops that the encoder reads")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    add("--compile", action="store_true", help="use torch.compile for the encoders")
    add("--graphs", action=argparse.BooleanOptionalAction, default=True,
        help="on a single GPU, record the encoders as CUDA graphs")
    return flags


def add_run_flags(parser):
    """Add the flags that every run of `run.Run` has."""
    add = parser.add_argument
    add("--fresh", action="store_true", help="overwrite the run that --out holds")
    add("--seed", type=NATURAL, default=0, metavar="n")
    add("--max-steps", type=COUNT, metavar="n", help="stop after step n; keep the full schedule")
    add("--save-minutes", type=NON_NEGATIVE, default=30., metavar="t",
        help="save at least every t minutes (default: 30; 0: as often as possible)")
    add("--batch-size", type=COUNT, metavar="n", help="images per step, over all processes")
    add("--lr", type=POSITIVE, help="learning rate (default: scaled with the batch size)")
    add("--warmup", type=NATURAL, metavar="STEPS", help="steps of linear warm-up")
    add("--workers", type=NATURAL, metavar="n", default=data.default_workers(),
        help="processes that read files")
    add("--device", choices=DEVICES, help="default: cuda if there is a GPU, else cpu")


def settings(flags, argv, scale, scales, presets):
    """Parse `argv` with the defaults of `scales[scale]` and of the preset; returns a Namespace.

    Flags override presets, presets override scales. A scale's `base_lr` is the learning rate at its
    `batch_size`; `lr` follows from it by the rule `scaling`. Its `long_epochs`, if given, is
    the length of presets with `long`. Raises UserError if the range `crop` is empty.
    """
    defaults = {"script": flags.prog.removesuffix(".py"), "scale": scale, "normalisation": scale,
                "scaling": "linear", **scales[scale], **presets[flags.parse_args(argv).preset]}
    base_lr, base_batch = defaults.pop("base_lr"), scales[scale]["batch_size"]
    long_epochs = defaults.pop("long_epochs", defaults["epochs"])
    if defaults.pop("long", False):
        defaults["epochs"] = long_epochs
    flags.set_defaults(**defaults)
    args = flags.parse_args(argv)
    if args.crop[0] > args.crop[1]:
        raise UserError(f"--crop {args.crop[0]:g} {args.crop[1]:g}: expected LO <= HI")
    ratio = args.batch_size / base_batch
    lr = base_lr * (ratio if args.scaling == "linear" else math.sqrt(ratio))
    flags.set_defaults(lr=lr, precision="bf16" if has_bf16(args.device) else "fp32")
    args = flags.parse_args(argv)
    if not args.out:
        given = [f"{name}={plain(value)}" for name, value in vars(args).items()
                 if name not in (*RUN_FLAGS, "data", "preset")
                 and plain(value) != plain(flags.get_default(name))]
        args.out = "-".join([f"runs/{args.script}-{scale}-{args.preset}", *given])
    if args.data:
        args.data = str(Path(args.data).expanduser().resolve())
    return args


def plain(value):
    """A setting as text for the name of a folder; the items of a list are joined by commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def begin(flags, argv, scales, presets):
    """Join the process group, open the data, resolve the settings: `(args, dataset, device)`.

    Raises UserError if `--out` lies among images without classes, because curves.png would be taken
    for one of them.
    """
    first = flags.parse_args(argv)              # reports wrong flags before anything is opened
    device, dataset = ddp.init(first.device), data.open_data(first.data)
    args = settings(flags, argv, dataset.scale, scales, presets)
    among = args.data and Path(args.out).resolve().is_relative_to(args.data)
    if among and dataset.test is None and not (Path(args.data) / "train").is_dir():
        raise UserError(f"--out {args.out}: lies among the images of {args.data}; expected another "
                        "folder")
    # These are settings, because other images make a different run.
    args.images, args.images_hash = len(dataset.train), dataset.hash
    return args, dataset, device


def run_options(args, steps_per_epoch, device):
    """The arguments of `run.Run` that follow from `args`, as a dict."""
    settings = {name: value for name, value in vars(args).items() if name not in RUN_FLAGS}
    return dict(out=args.out, settings=settings, total_steps=args.epochs * steps_per_epoch,
                steps_per_epoch=steps_per_epoch, eval_every=max(1, args.epochs // args.n_evals),
                device=device, fresh=args.fresh, max_steps=args.max_steps,
                save_minutes=args.save_minutes)


def feature_options(args, device):
    """The arguments of `evaluate.features` that follow from `args`, as a dict."""
    return dict(normalisation=args.normalisation, size=args.size, device=device,
                workers=args.workers, precision=args.precision)


def monitor(args, dataset, encoder, augmentation, device, n=256):
    """`evaluate.monitor` as a function without arguments, with n images for alignment."""
    batch = max(1, min(n, len(dataset.train)) // ddp.world()) * ddp.world()

    @functools.cache
    def crops():
        [(_, x, _)] = data.views(dataset.train, 2, size=args.size, area=args.crop, batch=batch,
                                 seed=args.seed, start=0, stop=1, device=device,
                                 workers=args.workers)
        return x

    return lambda: evaluate.monitor(encoder, dataset, crops(), augmentation,
                                    **feature_options(args, device))


def views(args, images, n_views, run, device, drop_last=True):
    """`data.views` for the steps of `run`, with the settings `args`."""
    return data.views(images, n_views, size=args.size, area=args.crop, batch=args.batch_size,
                      seed=args.seed, start=run.start, stop=run.end, device=device,
                      workers=args.workers, drop_last=drop_last)


def has_bf16(device=None):
    """Whether the hardware computes in bf16 natively. `device` as in `ddp.init`."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = ("avx512_bf16", "amx_tile")
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in features)


def check_batch(n_images, batch_size, bn_group=2):
    """Raises UserError if a batch exceeds the data set or does not divide into groups on processes.

    The message proposes settings that fit.
    """
    world, most = ddp.world(), min(n_images, batch_size)
    if batch_size <= n_images and batch_size % (world * bn_group) == 0:
        return
    group, flag = bn_group, ""
    if bn_group > 2 and most < 2 * world * bn_group:
        group = max(2, most // (2 * world))     # shuffling needs two groups or more
        flag = f"--bn-group {group} "
    problem = f"does not divide into groups of {bn_group} images on {world} process(es)"
    if batch_size > n_images:
        problem = f"larger than the data set of {n_images} images"
    fits = max(1, most // (group * world)) * group * world
    advice = f"{flag}--batch-size {fits}" if fits <= n_images else "fewer processes"
    raise UserError(f"--batch-size {batch_size}: {problem}; {advice} would fit")


def learning_rate(step, *, lr, schedule, warmup, epochs, steps_per_epoch, drops=(.6, .8)):
    """The learning rate of a step; constant within an epoch, as in MoCo's released code.

    `cosine`: lr/2 (1 + cos(pi epoch / epochs)). `steps`: divided by 10 at each of `drops`, shares
    of the epochs (120 and 160 of 200). It grows linearly over the first `warmup` steps.
    """
    epoch = step // steps_per_epoch
    if schedule == "cosine":
        lr *= .5 * (1 + math.cos(math.pi * epoch / epochs))
    else:
        lr *= .1 ** sum(epoch >= round(part * epochs, 6) for part in drops)
    return lr * min(1, (step + 1) / (warmup + 1))


def set_lr(optimizer, lr):
    """Set and return the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def embedder(module, args, device, batch=None):
    """A callable that applies `module` as `args` say: in bf16, compiled, or as CUDA graphs.

    `batch` is the number of images N of every call, if it is always the same and there is one
    backward pass per step. Then a single GPU records the module's passes: a step launches two
    graphs instead of hundreds of kernels, whose launches take longer than small kernels run.
    """
    # CUDA graphs do not support autocast's weight cache; each weight is used only once anyway.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16",
                              cache_enabled=False)
    if args.compile:
        module = torch.compile(module)
    elif batch and args.graphs and device.type == "cuda" and ddp.world() == 1:
        with autocast:
            module = record(module, torch.zeros(batch, 3, args.size, args.size, device=device))
    return autocast(module)


def record(module, x):
    """Record the forward and backward pass of a module as CUDA graphs, for inputs shaped like x.

    PyTorch runs the module several times to warm up; its buffers are restored afterwards. PyTorch
    also replaces the forward pass of the module that it is given: here, of a wrapper.
    """
    # PyTorch records on a stream of its own, which costs a few synchronisations.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    before = [buffer.clone() for buffer in module.buffers()]
    x = x.contiguous(memory_format=torch.channels_last)
    recorded = torch.cuda.make_graphed_callables(torch.nn.Sequential(module), (x,))
    for buffer, value in zip(module.buffers(), before):
        buffer.copy_(value)
    return recorded


NEW_RUN = "(a new run: it needs another --out or --fresh)"


def launch(main, argv=None, less_memory=None, workers=False):
    """Call `main(argv)` and exit with its return value as exit code.

    Errors that the user can fix are printed as one line, with exit code 1. If memory runs out, the
    line advises `less_memory`, the flags of the script that reduce it. If it is the memory of the
    host and the script has the flag --workers (`workers`), it also advises fewer of them.
    """
    try:
        code = main(argv)
    except Exception as error:
        message = _explain(error, less_memory, workers)
        if message is None:
            raise
        print(message, file=sys.stderr)
        code = 1
    sys.exit(code)


def _explain(error, less_memory, workers):
    """One line for an error that the user can do something about, or None."""
    text, full = str(error), (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    gpu = ": use " + less_memory if less_memory else ""
    host = ": use fewer --workers, or " + less_memory if workers else gpu
    if isinstance(error, UserError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory" + gpu
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory" + host
    if "DataLoader worker" in text:
        return "a process that reads images was killed, probably for lack of memory" + host
    if "gloo/transport" in text and "by peer" in text:          # on the CPU
        return ("another process of this run has ended: see its message, then run the same command "
                "again")
    if isinstance(error, PermissionError):
        return f"{error.filename}: permission denied"
    if isinstance(error, BrokenPipeError):                      # as in `... | head`
        ddp.discard_output()                                    # what is not written yet
        return "the program that read the output has ended"
    if isinstance(error, OSError) and error.errno in full:
        return (f"{error.filename or 'a file'}: cannot be written ({error.strerror}): free some "
                "space and run the same command again")
    return None
