"""What the frozen features know (Sec. 2), and the supervised half of Table 2 (Sec. 4).

The paper's evaluation: the encoder f stays as it is, its head is discarded, and a linear classifier is trained on
h = f(x) with SGD on crops and flips (He et al. 2020, Sec. 4.1). `--feature` asks the same of what the head makes of h.
With `--train all` the same loop trains f too, from random weights, with labels: the supervised rows of Table 2, which
augment as MoCo v2 does, and the usual recipe. `--quick` is a substitute in seconds: features once, a logistic regression.

    torchrun --nproc_per_node=8 linear_probe.py IMAGENET --encoder runs/moco_v2-imagenet-table1/checkpoint.pt
    python linear_probe.py                                           # a laptop: the newest checkpoint under runs/
    python linear_probe.py --quick --encoder random FILE             # kNN and quick probe, beside the untrained encoder
    python linear_probe.py IMAGENET --train all --preset table2a-medium

x (N, 3, H, W) one view of N images;  h (N, width);  hidden (N, .) what the head's first ReLU makes of it;
z (N, D) the head's output;  logits (N, classes);  y (N,) labels. The paper's number for each row stands in PRESETS.
"""

import functools
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import augment, data, ddp, evaluate, train
from common.loss import precise
from common.model import Encoder, head, load_encoder, resnet, restore

# a probe: lr 30 for 256 images, a tenth at .6 and .8 of the epochs, no weight decay, crops from 8 %, flips
PROBE = dict(stack="weak", jitter=.5, blur=False, crop=(.08, 1.), batch_size=256, lr=30., warmup=0, weight_decay=0.,
             drops=(.6, .8), bn_group=32)
SCALES = {
    "imagenet": dict(PROBE, arch="resnet50", size=224, epochs=100),
    "cifar10": dict(PROBE, arch="resnet18-3x3", size=32, epochs=100),
    "textures": dict(PROBE, arch="resnet10", size=32, epochs=50),
}
# supervised from random weights: pytorch's ImageNet recipe, lr .1 for 256 images, a tenth at 30, 60 and 90 of 100 epochs
SUPERVISED = {
    "imagenet": dict(SCALES["imagenet"], lr=.1, weight_decay=1e-4, drops=(.3, .6, .9)),
    "cifar10": dict(SCALES["cifar10"], lr=.1, weight_decay=5e-4, drops=(.3, .6, .9), epochs=200),
    "textures": dict(SCALES["textures"], lr=.05, weight_decay=5e-4, drops=(.3, .6, .9), epochs=10, batch_size=64, warmup=50),
}
STRONG = dict(stack="moco_v2", crop=(.2, 1.), blur=True)        # Table 2: the MoCo v2 stack, one view, one operation varied
PRESETS = {  # what differs from the scale, and the paper's ImageNet top-1 in percent; all but the first want --train all
    "probe": dict(paper="see the row that the encoder was trained with"),
    "supervised": dict(paper="none; torchvision's ResNet-50 of this recipe has 76.1"),
    "table2a-baseline": dict(STRONG, paper=75.5),
    "table2a-medium": dict(STRONG, crop=(.2, .5), paper=74.8),
    "table2a-extreme": dict(STRONG, crop=(.02, .1), paper=52.0),
    "table2b-eighth": dict(STRONG, jitter=1 / 8, paper=75.8),
    "table2b-quarter": dict(STRONG, jitter=1 / 4, paper=75.7),
    "table2b-half": dict(STRONG, jitter=1 / 2, paper=75.6),
    "table2b-full": dict(STRONG, jitter=1., paper=74.6),
}
FEW = 20                                                        # classes of which a confusion matrix is legible


def parse_args(argv=None):
    parser = train.Parser("linear_probe.py", description=__doc__.split("\n")[0])
    train.add_flags(parser, PRESETS)
    add = parser.add_argument
    add("--encoder", nargs="+", metavar="FILE", help="a checkpoint of ours, FAIR's MoCo file, torchvision's weights as a "
        "file, `torchvision` (downloads), or `random`; without it, the newest under runs/; several with --quick")
    add("--feature", choices=("h", "hidden", "z"), default="h", help="what is probed; the paper: h")
    add("--quick", action="store_true", help="logistic regression on un-augmented features, and kNN")
    add("--train", choices=("linear", "all"), default="linear", help="all: f too, from random weights")
    args = parser.parse_args(argv)
    if args.train == "all" and args.preset == "probe":
        args.preset = "supervised"
    if args.train == "linear" and args.preset != "probe":
        parser.error(f"--preset {args.preset} is a supervised row: add --train all")
    if args.train == "all" and (args.encoder or args.quick or args.feature != "h"):
        parser.error("--train all starts from random weights: --encoder, --quick and --feature do not go with it")
    if len(args.encoder or []) > 1 and not args.quick:
        parser.error("--encoder: one at a time, several with --quick")
    return args


def newest_checkpoint():
    """Path of the newest checkpoint under runs/, which it names. Raises SystemExit if there is none."""
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("no checkpoint under runs/: train one (python moco_v2.py), or name one with --encoder")
    train.say(f"encoder: {found[-1]}, the newest under runs/")
    return str(found[-1])


def open_labelled(path):
    """What `path` holds. Raises SystemExit if it has no labels."""
    dataset = data.open_data(path)
    train.say(f"data: {dataset.description}; scale {dataset.scale}")
    if dataset.test is None:
        raise SystemExit(f"{path}: labels are needed, in train/<class>/ and in val/<class>/ or test/<class>/")
    return dataset


def read_encoders(args):
    """[(name, encoder, settings)] of --encoder, and the data to probe: DATA, or what the last checkpoint names."""
    names = args.encoder or [newest_checkpoint()]
    read = {name: load_encoder(name) for name in names if name != "random"}
    saved = next((read[name][1] for name in reversed(names) if name in read), {})
    dataset = open_labelled(args.data or saved.get("data"))
    if "random" in names:
        arch = args.arch or saved.get("arch") or SCALES[dataset.scale]["arch"]
        read["random"] = load_encoder("random", arch, args.seed or 0)
    for encoder, _ in read.values():
        encoder.check_feature(args.feature)
    defaults = {"scale": dataset.scale, "size": SCALES[dataset.scale]["size"]}
    settings = {name: {**defaults, **read[name][1]} for name in names}
    return [(name, read[name][0], {"normalisation": settings[name]["scale"], **settings[name]}) for name in names], dataset


def quick(args, device):
    """kNN and quick probe of every encoder, in a table; the last line is the last one's probe."""
    encoders, dataset = read_encoders(args)
    labels, test_labels = dataset.train.labels, dataset.test.labels
    train.say(f"{'kNN':>8} {'probe':>8}   top-1 in percent, of {args.feature}")
    for name, encoder, settings in encoders:
        encoder.to(device, memory_format=torch.channels_last)
        bank, queries = (evaluate.features(encoder, images, scale=settings["normalisation"], size=settings["size"],
                                           device=device, workers=args.workers, feature=args.feature,
                                           precision=args.precision or "fp32")
                         for images in (dataset.train, dataset.test))
        result = dict(encoder=name, feature=args.feature, data=dataset.description, seed=args.seed or 0,
                      knn=evaluate.knn(bank, labels, queries, test_labels),
                      **evaluate.quick_probe(bank, labels, queries, test_labels, args.seed or 0))
        train.say(f"{result['knn']:8.2f} {result['top1']:8.2f}   {name}  (penalty {result['penalty']:g})")
        if ddp.rank() == 0 and Path(name).is_file():
            folder = Path(name).parent / "probe"
            folder.mkdir(exist_ok=True)
            (folder / f"quick-{args.feature}.json").write_text(json.dumps({**result, **train.machine(device)}, indent=1))
    train.say(f"top-1 {result['top1']:.2f} %")
    ddp.close()


def fingerprint(module):
    """A short hash of all parameters and buffers: a probe goes on only with the encoder that it began with."""
    digest = hashlib.sha1()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def copy_of(module):
    """All parameters and buffers, to prove at the end that none has changed."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_unchanged(module, before):
    """Raises SystemExit with the first tensor of `module`, buffers included, that is not what it was to the bit."""
    for name, tensor in module.state_dict().items():
        if not torch.equal(tensor, before[name]):
            raise SystemExit(f"the encoder is not frozen: {name} has changed; this accuracy is not a probe's")


def train_step(logits_of, optimizer, x, y, batch):
    """One step of cross-entropy on x (N, 3, H, W), y (N,); returns the loss, this process's share of it times W.

    The loss is the mean over the global `batch`, of which the last of an epoch may be uneven over processes: each takes
    its sum, over `batch`, and DDP's mean over processes is put right by W.
    """
    loss = F.cross_entropy(precise(logits_of(x)), y, reduction="sum") * ddp.world() / batch
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def test(model, dataset, s, device, workers):
    """Top-1 and top-5 in percent on the test images, each once, and the confusion matrix (true, said), as a dict."""
    h = evaluate.features(model, dataset.test, scale=s.normalisation, size=s.size, device=device, workers=workers,
                          precision=s.precision)
    logits = model.g(h)                                         # (n, classes), in float32
    y, classes = dataset.test.labels.to(device), logits.shape[1]
    ranked = logits.topk(min(5, classes), dim=1).indices == y[:, None]
    confusion = torch.bincount(y * classes + logits.argmax(1), minlength=classes ** 2).view(classes, classes)
    return dict(top1=100 * ranked[:, 0].double().mean().item(), top5=100 * ranked.any(1).double().mean().item(),
                confusion=confusion.tolist() if classes <= FEW else None)


def draw_confusion(confusion, classes, path):
    from matplotlib.figure import Figure                        # here: it takes a while to import
    share = torch.tensor(confusion).double()
    share = (100 * share / share.sum(1, keepdim=True)).numpy()
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(share.tolist()):
        for j, value in enumerate(row):
            if value >= 1:
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else "black")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="said", ylabel="true", title="images of a class, % said to be of each")
    figure.savefig(path, dpi=110)


class Frozen(nn.Module):
    """What is probed: x (N, 3, H, W) -> h, hidden or z of an encoder in eval mode, without gradient."""

    def __init__(self, encoder, feature):
        super().__init__()
        self.encoder, self.feature, self.width = encoder.eval().requires_grad_(False), feature, encoder.width(feature)

    @torch.no_grad()
    def forward(self, x):
        return precise(self.encoder.embed(x, self.feature))


def build(s, device, compiled, frozen=None, state=None):
    """The model f, classifier (its z are logits), how a step calls it, and the optimiser of what is trained.

    With `frozen` only the classifier is trained, drawn from N(0, .01); without, f too. From the seed, or a checkpoint.
    """
    torch.manual_seed(s.seed)
    f = frozen or resnet(s.arch, s.bn_group)
    model = Encoder(f, head("none", f.width, s.dim)).to(device, memory_format=torch.channels_last)
    if frozen:
        torch.nn.init.normal_(model.g[0].weight, std=.01)
        torch.nn.init.zeros_(model.g[0].bias)
        see, classify = train.embedder(f, device, s.precision, compiled), ddp.wrap(model.eval().g)

        def logits_of(x):
            return classify(see(x))
    else:
        logits_of = train.embedder(ddp.wrap(model), device, s.precision, compiled)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], s.lr, momentum=.9,
                                weight_decay=s.weight_decay, fused=True)
    if state:
        restore(state, optimizer, g=model.g, **({} if frozen else {"f": model.f}))
    return model, logits_of, optimizer


def prepare(args):
    """Settings, folder, data and what is frozen, or None: of a probe, or of supervised training."""
    aside = ("encoder", "quick", "train", "feature")
    if args.train == "all":
        dataset = open_labelled(args.data)
        s, out = train.resolve("linear_probe", args, SUPERVISED, PRESETS, dataset.scale, aside=aside)
        train.check(s, len(dataset.train), args.max_steps, args.workers)
        s.head, s.normalisation, frozen = "none", s.scale, None
    else:
        [(name, encoder, saved)], dataset = read_encoders(args)
        s, out = train.resolve("linear_probe", args, SCALES, PRESETS, dataset.scale, aside=aside)
        train.check(s, len(dataset.train), args.max_steps, args.workers, drop_last=False)
        s.encoder, s.feature = str(Path(name).resolve()) if Path(name).is_file() else name, args.feature
        s.arch, s.size, s.normalisation = saved["arch"], saved["size"], saved["normalisation"]
        s.encoder_fingerprint = fingerprint(encoder)            # of another one, or trained since: the run is refused
        if s.batch_size > len(dataset.train):
            s.batch_size, s.lr = len(dataset.train), s.lr * len(dataset.train) / s.batch_size
            train.say(f"note: batch {s.batch_size}, all images there are; learning rate {s.lr:g} by the linear rule")
        frozen = Frozen(encoder, s.feature)
        folder = "probe" if s.feature == "h" else f"probe-{s.feature}"
        if not args.out:
            out = Path(name).parent / folder if Path(name).is_file() else Path(f"{out}-{name.replace(':', '-')}-{s.feature}")
        if out.resolve() == Path(name).resolve().parent:
            raise SystemExit(f"--out {out}: holds the encoder that is probed; choose another")
    s.dim, s.data = len(dataset.classes), dataset.path
    return s, out, dataset, frozen


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    if args.quick:
        return quick(args, device)
    s, out, dataset, frozen = prepare(args)
    n, labels, drop_last = len(dataset.train), dataset.train.labels.to(device), frozen is None
    steps_per_epoch = data.steps_per_epoch(n, s.batch_size, drop_last)
    run = train.Run(out, s, s.epochs * steps_per_epoch, device, args, pictures=(
        ("top1", "top-1 on the test images, %"), ("loss", "loss"), ("lr", "learning rate")))
    if run.start == run.total:
        return run.close(run.total, f"top-1 {run.value('top1', -1):.2f} %")

    model, logits_of, optimizer = build(s, device, args.compile, frozen, run.state)
    before = copy_of(frozen) if frozen else None
    augmented = augment.Augment(s.stack, augment.jitter_strength(s.jitter), s.blur, s.normalisation).to(device)
    learning_rate = functools.partial(train.learning_rate, lr=s.lr, schedule="steps", drops=s.drops, warmup=s.warmup,
                                      epochs=s.epochs, steps_per_epoch=steps_per_epoch)
    lines = [train.paper_says(PRESETS[args.preset])]
    if frozen:
        few = evaluate.features(model, evaluate.thin(dataset.test, 256), scale=s.normalisation, size=s.size, device=device,
                                workers=args.workers, precision=s.precision)
        lines.append(f"mean length of {s.feature}: {few.norm(dim=1).mean():.2f}; the larger, the smaller the --lr that suits")
    run.open(optimizer, *lines)

    done = run.start
    batches = data.views(dataset.train, 1, size=s.size, area=s.crop, batch=s.batch_size, seed=s.seed, start=done,
                         stop=run.stop, device=device, workers=args.workers, drop_last=drop_last)
    for step, x, index in run.timed(batches):
        batch = min(s.batch_size, n - step % steps_per_epoch * s.batch_size)    # the last of a probe's epoch is smaller
        x, = augmented(x, s.seed, step, batch, ddp.rows(batch))                 # (N, 3, H, W)
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step)
        loss = train_step(logits_of, optimizer, x, labels[index.to(device)], batch)
        done = step + 1
        epoch, inside = divmod(done, steps_per_epoch)
        leave, save = run.stopping(done, not inside)
        run.tell(done, loss, save, epoch=done / steps_per_epoch, lr=lr)
        if save:
            if not frozen:
                ddp.average_buffers(model)
            if not inside:
                found = test(model, dataset, s, device, args.workers)
                run.epoch(epoch, top1=found["top1"], top5=found["top5"])
            if done == run.total:
                if frozen:
                    check_unchanged(frozen, before)
                report(run, found, dataset)
            f = {} if frozen else {"f": model.f.state_dict()}
            run.save(done, g=model.g.state_dict(), optimizer=optimizer.state_dict(), **f)
        if leave:
            break
    run.close(done, f"top-1 {run.value('top1', -1) or 0:.2f} %")


def report(run, found, dataset):
    """result.json, of the last epoch, and confusion.png where the classes are few."""
    if ddp.rank():
        return
    best = max(e["top1"] for e in run.events() if "top1" in e)
    result = {**found, "best_top1": best, "settings": run.settings, **train.machine(run.device)}
    (run.out / "result.json").write_text(json.dumps(result, indent=1))
    if found["confusion"]:
        draw_confusion(found["confusion"], dataset.classes, run.out / "confusion.png")
    run.line(f"last epoch: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % (the best epoch, were it chosen on the "
             f"test images: {best:.2f} %); result.json and pictures in {run.out}")


if __name__ == "__main__":
    main()
