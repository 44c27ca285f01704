"""Linear evaluation of frozen features (Sec. 2), and the supervised rows of Table 2 (Sec. 4).

The paper freezes the encoder f, discards its head and trains a linear classifier on h = f(x) by SGD
on crops and flips (He et al. 2020, Sec. 4.1). `--feature` probes activations of the head instead of
h. `--quick` fits a logistic regression to features of whole images, in seconds; with `--predict`,
it predicts which transformation an image has undergone (Sec. 3). `--train all` trains f as well,
from random weights: the supervised rows.

    torchrun --nproc_per_node=8 linear_probe.py IMAGENET --encoder FILE
    python linear_probe.py                              # the newest checkpoint under runs/
    python linear_probe.py --quick --encoder random FILE        # beside the untrained encoder
    python linear_probe.py --quick --feature h hidden z --predict class rotation grey hue
    python linear_probe.py IMAGENET --train all --preset table2a-medium

x (N, 3, H, W): one view of N images. h (N, width). hidden: the activation after the head's first
ReLU. z (N, D): the output of the head. y (N,): labels; logits (N, classes).
"""

import functools
import hashlib
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, augment, data, ddp, evaluate, train
from common.checkpoint import load_encoder
from common.loss import precise
from common.model import Encoder, head, resnet
from common.run import Run, machine


class Frozen(nn.Module):
    """The features that are probed: x (N, 3, H, W) -> h, hidden or z, in eval mode."""

    def __init__(self, encoder, feature):
        super().__init__()
        self.encoder, self.feature = encoder.eval().requires_grad_(False), feature
        self.width = encoder.width(feature)

    @torch.no_grad()
    def forward(self, x):
        return precise(self.encoder.embed(x, self.feature))


def train_step(logits_of, optimizer, x, y, batch):
    """One step of cross-entropy on x (N, 3, H, W), y (N,); returns the loss.

    Its mean over processes is the mean over the global `batch`, which may be split unevenly: each
    process divides its sum by `batch`, and the factor W undoes DDP's averaging.
    """
    loss = F.cross_entropy(precise(logits_of(x)), y, reduction="sum") * ddp.world() / batch
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def test(model, dataset, **options):
    """Top-1, top-5 in percent and confusion matrix (true, predicted; None above 20 classes)."""
    h = evaluate.features(model, dataset.test, **options)
    logits = model.g(h)                                         # (n, classes), in float32
    y, classes = dataset.test.labels.to(h.device), logits.shape[1]
    right = logits.topk(min(5, classes), dim=1).indices == y[:, None]
    confusion = None
    if classes <= 20:
        pairs = torch.bincount(y * classes + logits.argmax(1), minlength=classes ** 2)
        confusion = pairs.view(classes, classes).tolist()
    return {"top1": 100 * right[:, 0].double().mean().item(),
            "top5": 100 * right.any(1).double().mean().item(), "confusion": confusion}


# Section 3: which transformation has an image undergone? According to the paper, the head removes
# what the loss does not need. Each function maps uint8 images x (n, 3, s, s) to transformed ones.

def grey(x):
    return augment.grayscale(x.float()).round().byte().expand_as(x)


def noise(x):
    """Gaussian noise of standard deviation .1, seeded by the content of each image."""
    seeds = [zlib.crc32(image.tobytes()) for image in x.cpu().numpy()]
    drawn = [augment.generator("noise", seed).standard_normal(x.shape[1:], np.float32)
             for seed in seeds]
    return (x + 25.5 * torch.from_numpy(np.stack(drawn)).to(x.device)).round().clamp(0, 255).byte()


def sobel(x):
    """Magnitude of the gradient of each channel; a step from black to white gives white."""
    weight = torch.tensor([[1., 0., -1.], [2., 0., -2.], [1., 0., -1.]], device=x.device) / 4
    weight = torch.stack([weight, weight.T])[:, None]                           # (2, 1, 3, 3)
    padded = F.pad(x.float().flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, weight).norm(dim=1).view(x.shape).round().clamp(0, 255).byte()


# The variants of each image that a probe must tell apart; None is the image itself.
TURNS = [functools.partial(torch.rot90, k=quarters, dims=(2, 3)) for quarters in (1, 2, 3)]
VARIANTS = {"rotation": (None, *TURNS), "grey": (None, grey), "noise": (None, noise),
            "sobel": (None, sobel)}
MAX_IMAGES = 5000                               # per split, training or test
MAX_QUICK = 200_000                             # training images of the quick probe of the class


def hues(images, **options):
    """Labels (n,): the hue of the mean colour of each image, in six bins."""
    means = torch.cat([x.float().mean((2, 3)) for x in data.whole(images, batch=500, **options)])
    red, green, blue = means.cpu().unbind(1)
    turn = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    return (turn.remainder(1) * 6).long().clamp(max=5)


def split(dataset, seed):
    """Training and test images of the predictions. Without test images, a fifth is held out."""
    rng, train, test = augment.generator("predictions", seed), dataset.train, dataset.test
    if test is None:
        parts = np.split(rng.permutation(len(train)), [len(train) // 5])
        test, train = (train.take(part) for part in parts)
    return [part.take(rng.permutation(len(part))[:MAX_IMAGES]) for part in (train, test)]


def examples(what, feature, encoder, images, cache, options):
    """Features (n, D) and labels (n,) for a prediction. `cache` {change: h} is filled here."""
    changes = VARIANTS.get(what, [None])
    for change in changes:
        if change not in cache:
            cache[change] = evaluate.features(encoder, images, change=change, **options)
    labels = torch.arange(len(changes)).repeat_interleave(len(images))
    if what == "class":
        labels = images.labels
    if what == "hue":
        labels = hues(images, **{name: options[name] for name in ("size", "device", "workers")})
    with torch.no_grad():
        return encoder.project(torch.cat([cache[change] for change in changes]), feature), labels


def predict(what, feature, encoder, splits, options, seed):
    """The quick probe of a feature for the target `what`, as a dict like `evaluate.quick_probe`'s.

    It also holds `guess`, the accuracy of a constant guess in percent, and `knn` for `class`.
    `splits` are two pairs (images, cache), for training and for the test.
    """
    (x, y), (queries, t) = (examples(what, feature, encoder, *side, options) for side in splits)
    found = evaluate.quick_probe(x, y, queries, t, seed, copies=len(VARIANTS.get(what, [None])))
    if what == "class":
        found["knn"] = evaluate.knn(x, y, queries, t)
    return {**found, "guess": 100 * t.bincount().max().item() / len(t)}


def fingerprints(module):
    """{name: short hash} of all parameters and buffers."""
    return {name: hashlib.sha1(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]
            for name, tensor in module.state_dict().items()}


def fingerprint(module):
    """A short hash of a module, by which a resumed run detects that its encoder has changed."""
    return hashlib.sha1("".join(fingerprints(module).values()).encode()).hexdigest()[:12]


def check_unchanged(module, before):
    """Raises UserError that names the first parameter or buffer that differs from `before`."""
    for name, now in fingerprints(module).items():
        if now != before[name]:
            raise UserError(f"the encoder is not frozen: {name} has changed; the accuracy is not "
                            "that of a linear probe")


# Settings. The probe: learning rate 30 at batch size 256, divided by 10 at .6 and .8 of the epochs.
# Supervised: PyTorch's ImageNet recipe. Table 2: the augmentation of MoCo v2 at the same scale.

PROBE = dict(head="none", stack="weak", jitter=.5, blur=False, crop=(.08, 1.), batch_size=256,
             base_lr=30., warmup=0, weight_decay=0., drops=(.6, .8), bn_group=32, n_evals=1000)
SCALES = {
    "imagenet": dict(PROBE, arch="resnet50", size=224, epochs=100),
    "cifar10": dict(PROBE, arch="resnet18-3x3", size=32, epochs=100),
    "textures": dict(PROBE, arch="resnet10", size=32, epochs=50),
}
RECIPE = dict(train="all", base_lr=.1, weight_decay=5e-4, drops=(.3, .6, .9))
SUPERVISED = {
    "imagenet": dict(SCALES["imagenet"], **RECIPE | dict(weight_decay=1e-4, blur=True)),
    "cifar10": dict(SCALES["cifar10"], **RECIPE | dict(epochs=200)),
    "textures": dict(SCALES["textures"], **RECIPE | dict(epochs=10, base_lr=.05, batch_size=64,
                                                         warmup=50)),
}
STRONG = dict(stack="moco_v2", crop=(.2, 1.))
PRESETS = {
    "probe": {},
    "supervised": {},           # this and all below need --train all
    "supervised-mlp": dict(head="mlp"),
    "table2a-baseline": dict(STRONG),
    "table2a-medium": dict(STRONG, crop=(.2, .5)),
    "table2a-extreme": dict(STRONG, crop=(.02, .1)),
    "table2b-eighth": dict(STRONG, jitter=1 / 8),
    "table2b-quarter": dict(STRONG, jitter=1 / 4),
    "table2b-half": dict(STRONG, jitter=1 / 2),
    "table2b-full": dict(STRONG, jitter=1.),
}


def flags():
    parser = train.parser("linear_probe", __doc__, PRESETS)
    add = parser.add_argument
    add("--encoder", nargs="+", metavar="FILE", help="checkpoint of ours, FAIR's or torchvision's; "
        "torchvision[:NAME]; random; several with --quick (default: the newest under runs/)")
    add("--feature", choices=("h", "hidden", "z"), nargs="+", default=["h"],
        help="what is probed (default, and the paper: h); several with --quick")
    add("--quick", action="store_true", help="kNN and logistic regression on frozen features")
    add("--predict", choices=("class", *VARIANTS, "hue"), nargs="+", metavar="WHAT",
        help="with --quick: class (default), or a transformation of the image: rotation, grey, "
        "noise, sobel; or the hue of its mean colour")
    add("--head", choices=("none", "mlp"), help="with --train all: the classifier is one layer "
        "(default), or an MLP like MoCo v2's head")
    add("--train", choices=("linear", "all"), default="linear", help="all: supervised training")
    add("--bn-group", type=train.SEVERAL, metavar="n", help="images that share batch statistics")
    return parser


def check(args):
    """Raises UserError if flags exclude each other."""
    if args.train == "linear" and args.preset != "probe":
        raise UserError(f"--preset {args.preset}: a supervised row; it needs --train all")
    if args.train == "all" and (args.encoder or args.quick or args.feature != ["h"]):
        raise UserError("--train all starts from random weights: it excludes --encoder, --quick "
                        "and --feature")
    if args.train == "linear" and args.head:
        raise UserError(f"--head {args.head}: the head of supervised training; it needs "
                        "--train all")
    for name in ("encoder", "feature"):
        if len(getattr(args, name) or []) > 1 and not args.quick:
            raise UserError(f"--{name}: expected one, or several with --quick")
    if args.predict and not args.quick:
        raise UserError("--predict: needs --quick")
    if args.quick and args.out and len(args.encoder or []) > 1:
        raise UserError("--out: expected one encoder; without --out, the results of each are "
                        "written to probe/ beside it")


def newest_checkpoint():
    """The path of the newest encoder under runs/. Raises UserError if there is none."""
    found = [path for path in Path("runs").glob("*/checkpoint.pt")
             if not re.match("linear_probe-[a-z0-9]+-probe|voc_detection", path.parent.name)]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError("no checkpoint under runs/: run moco_v2.py, or name one with --encoder")
    ddp.say(f"encoder: {newest}, the newest under runs/")
    return str(newest)


def read_encoders(args):
    """[(name, encoder, settings)] of --encoder, and the data set: DATA, or the last encoder's."""
    names = args.encoder or [newest_checkpoint()]
    found = {name: load_encoder(name, args.arch) for name in names if name != "random"}
    saved = next((found[name][1] for name in reversed(names) if name in found), {})
    path, advice = args.data or saved.get("data"), ""
    if args.quick:
        advice = "; `--predict rotation grey hue noise` needs none"
    if not args.predict or "class" in args.predict:
        dataset = data.open_labelled(path, advice)
    else:
        dataset = data.open_data(path)
    scale = SCALES[dataset.scale]
    if "random" in names:
        arch = args.arch or saved.get("arch") or scale["arch"]
        found["random"] = load_encoder("random", arch, args.seed)
    encoders, missing = [], {"scale": dataset.scale, "size": scale["size"]}
    for name in names:
        encoder, settings = found[name][0], {**missing, **found[name][1]}
        settings["size"] = args.size or settings["size"]
        for feature in args.feature:
            encoder.width(feature)              # raises UserError if it has none
        encoders.append((name, encoder, {"normalisation": settings["scale"], **settings}))
    return encoders, dataset


def quick(args):
    """Run the quick probe on every encoder and feature; print a table, write quick-FEATURE.json.

    The files go to --out, or to probe/ beside the encoder's file.
    """
    device, targets = ddp.init(args.device), args.predict or ["class"]
    encoders, dataset = read_encoders(args)
    sampled = split(dataset, args.seed)
    few = evaluate.thin(dataset.train, MAX_QUICK)
    if "class" in targets and len(few) < len(dataset.train):
        ddp.say(f"note: the quick probe uses {len(few)} of {len(dataset.train)} training images")
    columns = ["kNN"] * ("class" in targets) + targets
    ddp.say(f"top-1 accuracy in percent\n{''.join(f'{name:>10}' for name in columns)}   encoder")
    for name, encoder, settings in encoders:
        encoder.eval().to(device, memory_format=torch.channels_last)
        options = dict(normalisation=settings["normalisation"], size=settings["size"],
                       device=device, workers=args.workers, precision=args.precision or "fp32")
        # Training and test images, each with the cache of its features.
        whole = [(part, {}) for part in (few, dataset.test)]
        parts = [(part, {}) for part in sampled]
        for feature in args.feature:
            found = {what: predict(what, feature, encoder, whole if what == "class" else parts,
                                   options, args.seed) for what in targets}
            row = f"random ({settings['arch']})" if name == "random" else name
            say_row(found, "top1", f"{row}, {feature}")
            file, stem = Path(name), "quick"
            out = args.out or file.is_file() and file.parent / "probe"
            if file.is_file() and file.name != "checkpoint.pt":     # such as FAIR's, side by side
                stem += f"-{file.name.split('.')[0]}"
            if out and ddp.rank() == 0:
                path = Path(out) / f"{stem}-{feature}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(
                    {"encoder": name, "feature": feature, "data": dataset.description,
                     "seed": args.seed, **found.get("class", {}), "predictions": found,
                     **machine(device)}, indent=1))
    say_row(found, "guess", "(a constant guess)")
    ddp.say(f"top-1 {found[targets[0]]['top1']:.2f} %: {targets[0]}, {row}, {feature}")
    ddp.close()


def say_row(found, value, name):
    """Print a row of the table of `quick`; for the class, the accuracy of kNN comes first."""
    values = [answers[value] for answers in found.values()]
    if "class" in found:
        values.insert(0, found["class"]["knn" if value == "top1" else value])
    ddp.say("".join(f"{number:10.2f}" for number in values) + f"   {name}")


def prepare_probe(argv, first):
    """Settings, data set and the frozen features of a linear probe."""
    [(name, encoder, saved)], dataset = read_encoders(first)
    args = train.settings(flags(), argv, dataset.scale, SCALES, PRESETS)
    args.arch, args.size, args.normalisation = saved["arch"], saved["size"], saved["normalisation"]
    args.encoder_fingerprint = fingerprint(encoder)
    n = len(dataset.train)
    if args.batch_size > n:
        args.lr, args.batch_size = first.lr or args.lr * n / args.batch_size, n
        ddp.say(f"note: fewer images than --batch-size: batch size {n}, learning rate {args.lr:g}")
    args.encoder, [args.feature] = name, first.feature
    if Path(name).is_file():
        folder = "probe" if args.feature == "h" else f"probe-{args.feature}"
        args.encoder, args.out = str(Path(name).resolve()), first.out or Path(name).parent / folder
    if Path(args.out).resolve() == Path(name).resolve().parent:
        raise UserError(f"--out {args.out}: holds the encoder that is probed; choose another")
    return args, dataset, Frozen(encoder, args.feature)


def prepare_supervised(argv, first):
    """Settings and data set of supervised training; nothing is frozen."""
    dataset, parser = data.open_labelled(first.data), flags()
    parser.set_defaults(preset="supervised")
    args = train.settings(parser, argv, dataset.scale, SUPERVISED, PRESETS)
    train.check_batch(len(dataset.train), args.batch_size, args.bn_group)
    return args, dataset, None


def build(args, device, frozen=None):
    """`(model, logits_of, optimizer)`; with `frozen`, only the classifier is trained."""
    torch.manual_seed(args.seed)
    f = frozen or resnet(args.arch, args.bn_group)
    # f gives the features; g is not a projection head here, but the classifier.
    model = Encoder(f, head(args.head, f.width, args.classes))
    model.to(device, memory_format=torch.channels_last)
    if frozen:
        nn.init.normal_(model.g[0].weight, std=.01)
        nn.init.zeros_(model.g[0].bias)
        embed = train.embedder(f, args, device)
        classify = ddp.wrap(model.eval().g)

        def logits_of(x):
            return classify(embed(x))
    else:
        logits_of = train.embedder(ddp.wrap(model), args, device, args.batch_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, .9, weight_decay=args.weight_decay, fused=True)
    return model, logits_of, optimizer


def main(argv=None):
    first = flags().parse_args(argv)
    check(first)
    if first.quick:
        return quick(first)
    device = ddp.init(first.device)
    prepare = prepare_supervised if first.train == "all" else prepare_probe
    args, dataset, frozen = prepare(argv, first)
    args.images, args.classes, args.data = len(dataset.train), len(dataset.classes), dataset.path
    args.images_hash = dataset.hash
    model, logits_of, optimizer = build(args, device, frozen)
    before = fingerprints(frozen) if frozen else None
    options = train.feature_options(args, device)

    def evaluation():
        if frozen:
            check_unchanged(frozen, before)
        return test(model, dataset, **options)

    drop_last = frozen is None          # batch statistics of an incomplete batch would be poor
    steps_per_epoch = data.steps_per_epoch(args.images, args.batch_size, drop_last)
    state = {"g": model.g, "optimizer": optimizer} | ({} if frozen else {"f": model.f})
    run = Run(state, evaluate=evaluation, eval_first=False, panels=("top1", "loss", "lr"),
              **train.run_options(args, steps_per_epoch, device))
    if frozen:
        few = evaluate.features(model, evaluate.thin(dataset.test, 256), **options)
        norm = few.norm(dim=1).mean()
        ddp.say(f"mean norm of {args.feature}: {norm:.2f}; large ones need a small --lr")
    augmentation = augment.Augment(args.stack, augment.jitter_strength(args.jitter), args.blur,
                                   args.normalisation, args.seed).to(device)
    learning_rate = functools.partial(
        train.learning_rate, lr=args.lr, schedule="steps", drops=args.drops, warmup=args.warmup,
        epochs=args.epochs, steps_per_epoch=steps_per_epoch)
    batches = train.views(args, dataset.train, 1, run, device, drop_last)
    labels = dataset.train.labels.to(device)
    for step, x, index in run.steps(batches):
        done = step % steps_per_epoch * args.batch_size
        batch = min(args.batch_size, args.images - done)        # the last batch may be smaller
        x, = augmentation(x, step, batch)                       # (N, 3, H, W)
        lr = train.set_lr(optimizer, learning_rate(step))
        loss = train_step(logits_of, optimizer, x, labels[index], batch)
        run.log(loss, lr=lr)
    if run.step == run.total_steps and ddp.rank() == 0:
        report(run, dataset.classes)
    top1 = run.events.values("top1")
    return run.close(f"top-1 {top1[-1]:.2f} %" if top1 else "")


def report(run, classes):
    """Write result.json, of the last epoch, and a picture of the confusion matrix."""
    evaluations = [entry for entry in run.events.entries() if "top1" in entry]
    last = {name: evaluations[-1][name] for name in ("top1", "top5", "confusion")}
    best = max(entry["top1"] for entry in evaluations)
    (run.out / "result.json").write_text(json.dumps(
        {**last, "best_top1": best, "settings": run.settings, **machine(run.device)}, indent=1))
    if last["confusion"]:
        draw_confusion(run.out / "confusion.png", torch.tensor(last["confusion"]), classes)
    ddp.say(f"last epoch: top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} % (best epoch, if "
            f"it were selected on the test images: {best:.2f} %); see result.json in {run.out}")


def draw_confusion(path, confusion, classes):
    from matplotlib.figure import Figure                        # slow to import
    share = (100 * confusion / confusion.sum(1, keepdim=True)).numpy()
    axis = Figure(figsize=(7, 6.2), layout="constrained").subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=200)          # pale enough for black text
    for (i, j), value in np.ndenumerate(share):
        axis.text(j, i, f"{value:.0f}" if value >= 1 else "", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted class", ylabel="true class", title="predictions per class, %")
    axis.figure.savefig(path, dpi=110)


if __name__ == "__main__":
    train.launch(main, less_memory=f"a smaller --batch-size {train.NEW_RUN}", workers=True)
