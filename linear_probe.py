"""Evaluation: what frozen features know (Sec. 2), and the supervised rows of Table 2 (Sec. 4).

The paper freezes the encoder f, discards its head and trains a linear classifier on h = f(x) by SGD
on crops and flips (He et al. 2020, Sec. 4.1). `--feature` probes what the head makes of h. With
`--quick`, it is a logistic regression on features of whole images, in seconds. `--train all` trains
f too, from random weights: the supervised rows.

    torchrun --nproc_per_node=8 linear_probe.py IMAGENET --encoder FILE
    python linear_probe.py                              # the newest checkpoint under runs/
    python linear_probe.py --quick --encoder random FILE        # beside the untrained encoder
    python linear_probe.py IMAGENET --train all --preset table2a-medium

x (N, 3, H, W): one view of N images. h (N, width). hidden: the activation after the head's first
ReLU. z (N, D): the output of the head. y (N,): labels; logits (N, classes).
"""

import functools
import hashlib
import json
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

    It is the mean over the global `batch`, which may be uneven over processes: each divides its sum
    by `batch`, and the factor W undoes DDP's mean over processes.
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
    pairs = torch.bincount(y * classes + logits.argmax(1), minlength=classes ** 2)
    return {"top1": 100 * right[:, 0].double().mean().item(),
            "top5": 100 * right.any(1).double().mean().item(),
            "confusion": pairs.view(classes, classes).tolist() if classes <= 20 else None}


def fingerprints(module):
    """{name: short hash} of all parameters and buffers."""
    return {name: hashlib.sha1(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]
            for name, tensor in module.state_dict().items()}


def check_unchanged(module, before):
    """Raises UserError with the first parameter or buffer that differs from fingerprints before."""
    for name, fingerprint in fingerprints(module).items():
        if fingerprint != before[name]:
            raise UserError(f"the encoder is not frozen: {name} has changed; the accuracy is not "
                            "that of a linear probe")


# Settings. The probe: learning rate 30 for 256 images, divided by 10 at .6 and .8 of the epochs.
# Supervised: PyTorch's ImageNet recipe. Table 2: the augmentation of MoCo v2 at the same scale.

PROBE = dict(stack="weak", jitter=.5, blur=False, crop=(.08, 1.), batch_size=256, base_lr=30.,
             warmup=0, weight_decay=0., drops=(.6, .8), bn_group=32, n_evals=1000)
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
    "supervised": {},                                   # all others need --train all
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
    add("--feature", choices=("h", "hidden", "z"), default="h", help="what is probed; paper: h")
    add("--quick", action="store_true", help="kNN and logistic regression on frozen features")
    add("--train", choices=("linear", "all"), default="linear", help="all: supervised training")
    add("--bn-group", type=train.SEVERAL, metavar="n", help="images that share batch statistics")
    return parser


def check(args):
    """Raises UserError if flags exclude each other."""
    if args.train == "linear" and args.preset != "probe":
        raise UserError(f"--preset {args.preset}: a supervised row; it needs --train all")
    if args.train == "all" and (args.encoder or args.quick or args.feature != "h"):
        raise UserError("--train all starts anew: it excludes --encoder, --quick and --feature")
    if len(args.encoder or []) > 1 and not args.quick:
        raise UserError("--encoder: expected one, or several with --quick")


def newest_checkpoint():
    """The path of the newest checkpoint under runs/. Raises UserError if there is none."""
    found = Path("runs").glob("*/checkpoint.pt")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError("no checkpoint under runs/: run moco_v2.py, or name one with --encoder")
    ddp.say(f"encoder: {newest}, the newest under runs/")
    return str(newest)


def read_encoders(args):
    """[(name, encoder, settings)] of --encoder, and the data set: DATA, or the last encoder's."""
    names = args.encoder or [newest_checkpoint()]
    found = {name: load_encoder(name) for name in names if name != "random"}
    saved = next((found[name][1] for name in reversed(names) if name in found), {})
    dataset = data.open_labelled(args.data or saved.get("data"))
    scale = SCALES[dataset.scale]
    if "random" in names:
        arch = args.arch or saved.get("arch") or scale["arch"]
        found["random"] = load_encoder("random", arch, args.seed)
    encoders, missing = [], {"scale": dataset.scale, "size": scale["size"]}
    for name in names:
        encoder, settings = found[name][0], {**missing, **found[name][1]}
        encoder.check_feature(args.feature)
        encoders.append((name, encoder, {"normalisation": settings["scale"], **settings}))
    return encoders, dataset


def quick(args):
    """kNN and quick probe of every encoder, as a table; the last line is the last one's probe."""
    device = ddp.init(args.device)
    encoders, dataset = read_encoders(args)
    labels, test_labels = dataset.train.labels, dataset.test.labels
    ddp.say(f"top-1 accuracy of {args.feature} in percent\n{'kNN':>8} {'probe':>8}   encoder")
    for name, encoder, settings in encoders:
        encoder.to(device, memory_format=torch.channels_last)
        options = dict(normalisation=settings["normalisation"], size=settings["size"],
                       device=device, workers=args.workers, feature=args.feature,
                       precision=args.precision or "fp32")
        bank = evaluate.features(encoder, dataset.train, **options)
        queries = evaluate.features(encoder, dataset.test, **options)
        result = {"encoder": name, "feature": args.feature, "data": dataset.description,
                  "seed": args.seed, "knn": evaluate.knn(bank, labels, queries, test_labels),
                  **evaluate.quick_probe(bank, labels, queries, test_labels, args.seed)}
        ddp.say(f"{result['knn']:8.2f} {result['top1']:8.2f}   {name}")
        if ddp.rank() == 0 and Path(name).is_file():
            path = Path(name).parent / f"probe/quick-{args.feature}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({**result, **machine(device)}, indent=1))
    ddp.say(f"top-1 {result['top1']:.2f} %")
    ddp.close()


def prepare_probe(argv, first):
    """Settings, data set and the frozen features of a linear probe."""
    [(name, encoder, saved)], dataset = read_encoders(first)
    args = train.settings(flags(), argv, dataset.scale, SCALES, PRESETS)
    args.arch, args.size, args.normalisation = saved["arch"], saved["size"], saved["normalisation"]
    # If the encoder has been trained since, it is another run.
    every = "".join(fingerprints(encoder).values())
    args.encoder_fingerprint = hashlib.sha1(every.encode()).hexdigest()[:12]
    n = len(dataset.train)
    if args.batch_size > n:
        args.lr, args.batch_size = args.lr * n / args.batch_size, n
        ddp.say(f"note: batch size {n}, all images; learning rate {args.lr:g} by the linear rule")
    args.encoder = name
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
    model = Encoder(f, head("none", f.width, args.classes))
    model.to(device, memory_format=torch.channels_last)
    if frozen:
        nn.init.normal_(model.g[0].weight, std=.01)
        nn.init.zeros_(model.g[0].bias)
        embed = train.embedder(f, device, args.precision, args.compile)
        classify = ddp.wrap(model.eval().g)

        def logits_of(x):
            return classify(embed(x))
    else:
        logits_of = train.embedder(ddp.wrap(model), device, args.precision, args.compile)
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
        length = few.norm(dim=1).mean()
        ddp.say(f"mean length of {args.feature}: {length:.2f}; long ones need a small --lr")
    augmented = augment.Augment(args.stack, augment.jitter_strength(args.jitter), args.blur,
                                args.normalisation, args.seed).to(device)
    learning_rate = functools.partial(
        train.learning_rate, lr=args.lr, schedule="steps", drops=args.drops, warmup=args.warmup,
        epochs=args.epochs, steps_per_epoch=steps_per_epoch)
    batches = train.views(args, dataset.train, 1, run, device, drop_last)
    labels = dataset.train.labels.to(device)
    for step, x, index in run.steps(batches):
        done = step % steps_per_epoch * args.batch_size
        batch = min(args.batch_size, args.images - done)        # an epoch's last may be smaller
        draws = ddp.send({**augmented.draw(step, batch), "index": index}, device)
        index = draws.pop("index")
        x, = augmented.apply(x, draws)                          # (N, 3, H, W)
        lr = train.set_lr(optimizer, learning_rate(step))
        loss = train_step(logits_of, optimizer, x, labels[index], batch)
        run.log(loss, lr=lr)
    if run.step == run.total and ddp.rank() == 0:
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
    train.launch(main)
