"""Does strong augmentation mix classes, but not instances? t-SNE of features. Sec. 4, Figure 3.

Maps by t-SNE (van der Maaten & Hinton 2008) of the logits of a supervised model, for 10 classes of
64 training images each, under no, weak (crop and flip) and strong augmentation (MoCo v2's). Scores
beside the maps say how well the classes are separated, in the logits and in the map. --compare adds
h of a contrastive model, which according to the paper strong augmentation does not harm; it is
scored by class and by instance.

    python tsne_aug.py                                  # a laptop: built-in images, a minute
    python tsne_aug.py IMAGENET --encoder torchvision   # Figure 3; downloads the weights
    python tsne_aug.py DATA --encoder FILE --compare FILE

The first command reads the run of `python linear_probe.py --train all`.

x (n, D): features. P, Q (n, n): similarities in x and in the map. y (n, 2): the map. labels (n,).
The classes of the model need not be those of the data.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import one_hot

from common import UserError, augment, data, ddp, run, train
from common.checkpoint import load_encoder

# {name: (an entry of augment.STACKS, the range of the crop's area)}; None: as in evaluation.
AUGMENTATIONS = {"no": ("none", None), "weak": ("weak", (.08, 1.)), "strong": ("moco_v2", (.2, 1.))}
KINDS = {"z": "logits of a supervised model", "h": "features h of a contrastive model"}
NEIGHBOURS = 10
# Ten pairs of colour and marker that colour-blind readers can tell apart (after Okabe & Ito).
COLOURS = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #000000 #999999 #8B5A2B".split()
MARKERS = "os^Dv<>PX*"


# t-SNE, exact.

def distances(x):
    """Euclidean distances (n, n) of x (n, D); exactly 0 between equal points."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def conditional(x, perplexity):
    """Conditional affinities p(j | i) (n, n) of x (n, D), with rows of sum 1.

    Each point has a Gaussian neighbourhood. Bisection finds the width that gives it `perplexity`.
    """
    square = distances(x).square()
    square = square / square.mean()                             # independent of the scale of x
    diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
    beta = torch.ones_like(x[:, 0])                             # 1 / (2 width^2)
    low, high = 0 * beta, math.inf * beta
    for _ in range(60):
        logits = (-beta[:, None] * square).masked_fill(diagonal, -math.inf)
        logp = torch.log_softmax(logits, 1)
        entropy = -(logp.exp() * logp.masked_fill(diagonal, 0)).sum(1)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        # Double as long as there is no upper bound.
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return logp.exp()


def affinities(x, perplexity):
    """Symmetric affinities P (n, n) of x (n, D), with sum 1."""
    P = conditional(x, perplexity)
    return (P + P.T) / (2 * len(x))


def gradient(P, y):
    """The gradient (n, 2) of KL(P|Q) with respect to the map y (n, 2), and KL(P|Q) in nats."""
    kernel = 1 / (1 + distances(y).square())                    # Student's t, one degree of freedom
    kernel.fill_diagonal_(0)
    Q = (kernel / kernel.sum()).clamp(min=1e-12)
    force = (P - Q) * kernel
    divergence = (P * (P.clamp(min=1e-12) / Q).log()).sum()
    return 4 * (force.sum(1, keepdim=True) * y - force @ y), divergence


def tsne(x, perplexity=30., seed=0, iterations=1000):
    """A map y (n, 2) of x (n, D), and KL(P|Q) in nats; deterministic on a given device.

    The map starts from the first two principal components. For the first 250 iterations, P is
    multiplied by 4, the factor of van der Maaten & Hinton, and momentum is .5; then .8. (A factor
    of 12, now usual, gave a divergence up to 9 % higher on the logits of Figure 3.) The step of a
    coordinate grows while its sign persists (Jacobs 1988).
    """
    P = affinities(x, perplexity)
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = U[:, :2] * S[:2]                                        # principal components
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y = y / y[:, 0].std() * 1e-4 + 1e-6 * noise.to(y)           # noise separates equal points
    rate = max(len(x) / 48, 50.)                                # as in scikit-learn
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for i in range(iterations):
        early = i < 250
        slope, _ = gradient(4 * P if early else P, y)
        gain = torch.where(slope * velocity < 0, gain + .2, gain * .8).clamp(min=.01)
        velocity = (.5 if early else .8) * velocity - rate * gain * slope
        y = y + velocity
    return y - y.mean(0), gradient(P, y)[1].item()


# How well labels (n,) are separated in x (n, D), in any space.

def silhouette(x, labels):
    """Mean silhouette, -1 to 1, by Euclidean distance (Rousseeuw 1987).

    The silhouette of a point is (b - a) / max(a, b), where a is its mean distance to the other
    points of its label, and b that to the points of the nearest other label. It is 0 if its label
    has no other point, or if a = b = 0.
    """
    member = one_hot(labels).to(x)
    count = member.sum(0)
    total = distances(x) @ member                               # (n, labels): sums of distances
    a = total.gather(1, labels[:, None])[:, 0] / (count[labels] - 1).clamp(min=1)
    b = (total / count).scatter(1, labels[:, None], math.inf).amin(1)
    largest = torch.maximum(a, b)
    undefined = (count[labels] == 1) | (largest == 0)
    return torch.where(undefined, 0, (b - a) / largest).mean().item()


def agreement(x, labels, k=NEIGHBOURS):
    """Accuracy in percent of a vote of the k nearest other points on a point's label."""
    others = distances(x).fill_diagonal_(math.inf)
    nearest = others.topk(min(k, len(x) - 1), largest=False).indices            # (n, k)
    votes = one_hot(labels[nearest]).sum(1)                     # (n, labels)
    return 100 * (votes.argmax(1) == labels).double().mean().item()


# Images and features.

def choose(dataset, classes, per_class, seed):
    """`per_class` training images of each of `classes` random classes: `(names, images, labels)`.

    Labels are 0 to classes - 1. Raises UserError if there are not enough.
    """
    if len(dataset.classes) < classes:
        raise UserError(f"--classes {classes}: the data has {len(dataset.classes)} classes")
    rng = augment.generator("classes", seed)
    chosen, rows = np.sort(rng.permutation(len(dataset.classes))[:classes]), []
    for c in chosen:
        members = np.flatnonzero(dataset.train.labels.numpy() == c)
        if len(members) < per_class:
            raise UserError(f"--per-class {per_class}: class {dataset.classes[c]} has "
                            f"{len(members)} training images")
        rows.append(rng.permutation(members)[:per_class])
    names = [dataset.classes[c] for c in chosen]
    labels = torch.arange(classes).repeat_interleave(per_class)
    return names, dataset.train.take(np.concatenate(rows)), labels


@torch.no_grad()
def features(model, feature, images, augmentation, seed, device):
    """Features (n, D) of the images, in their order, under one of AUGMENTATIONS.

    `model` is (encoder, settings); `feature` is named as in `Encoder.embed`.
    """
    (encoder, settings), (stack, area) = model, AUGMENTATIONS[augmentation]
    n, size = len(images), settings["size"]
    module = augment.Augment(stack, blur=size > data.SMALL, seed=seed,
                             normalisation=settings["normalisation"])
    options = dict(size=size, batch=n, device=device, workers=data.default_workers())
    if area is None:
        order = np.arange(n)
        x = torch.stack(list(data.whole(images, **options)))    # (1, n, 3, size, size)
    else:
        # `views` yields the images in this order. The indices that it returns do not say which row
        # belongs to which image, because another image is read in place of an unreadable one.
        order = data.permutation(n, seed, epoch=0)
        _, x, _ = next(data.views(images, 1, area=area, seed=seed, start=0, stop=1, **options))
    encoder.to(device).eval()
    x, = module.to(device)(x, step=0)                           # (n, 3, size, size) float32
    found = torch.cat([encoder.embed(part, feature) for part in x.split(128)])
    return found[order.argsort()]


# Flags and the picture.

def flags():
    parser = train.Parser("tsne_aug.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="class folders (default: the built-in textures)")
    add("--encoder", metavar="FILE", help="supervised model: a run of linear_probe.py --train all "
        "(default), torchvision's weights, or `torchvision`, which downloads them")
    add("--compare", metavar="FILE", help="a contrastive model, of which h is shown too")
    add("--classes", type=int, choices=range(2, 11), default=10)
    add("--per-class", type=train.COUNT, default=64, metavar="n",
        help="training images per class; in the row by instance, views per image")
    add("--perplexity", type=train.POSITIVE, default=30.)
    add("--seed", type=train.NATURAL, default=0, metavar="n")
    add("--device", choices=train.DEVICES, help="default: cuda if there is a GPU, else cpu")
    add("--out", type=Path, default="runs/tsne_aug", metavar="DIR")
    return parser


def row(what, names, labels, named_features, args):
    """Maps [y (n, 2)] of the features {name: x (n, D)}, and what figure3.json says about them.

    Each score is a list of two: in the features, and in the map.
    """
    ddp.say(f"{what}:")
    maps, panels = [], []
    for name, x in named_features.items():
        y, divergence = tsne(x, args.perplexity, args.seed)
        own = labels.to(x.device)
        scores = {"name": name, "dimensions": x.shape[1], "divergence": divergence,
                  "silhouette": [silhouette(x, own), silhouette(y, own)],
                  "agreement": [agreement(x, own), agreement(y, own)]}
        maps.append(y.cpu())
        panels.append(scores)
        ddp.say(f"  {name}: {describe(scores)}".replace("\n", ", "))
    return maps, {"what": what, "names": names, "panels": panels}


def describe(scores):
    return ("silhouette {:.2f} in the features, {:.2f} in the map\n"
            "{}-NN agreement {:.0f} % in the features, {:.0f} % in the map").format(
                *scores["silhouette"], NEIGHBOURS, *scores["agreement"])


def draw(path, rows, labels, title):
    from matplotlib.figure import Figure                        # slow to import
    figure = Figure(figsize=(13.5, 5 * len(rows)), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(len(rows), squeeze=False)[:, 0]
    for part, (maps, found) in zip(parts, rows):
        axes = part.subplots(1, 3)
        for axis, y, scores in zip(axes, maps, found["panels"]):
            for i, name in enumerate(found["names"]):
                axis.scatter(*y[labels == i].T, s=9, c=COLOURS[i], marker=MARKERS[i], label=name)
            axis.set(xticks=[], yticks=[], title=scores["name"])
            axis.set_xlabel(describe(scores), fontsize=9)
        part.suptitle(found["what"])
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=75)


def read_supervised(path, scale):
    """`(encoder, settings)` of --encoder. Raises UserError if it is missing or not supervised."""
    default = f"runs/linear_probe-{scale}-supervised/checkpoint.pt"
    if path is None and not Path(default).exists():
        raise UserError(f"{default}: no such file; make it with `python linear_probe.py [DATA] "
                        "--train all`, or name another with --encoder")
    encoder, settings = load_encoder(path or default)
    script = settings.get("script", "linear_probe")
    if script != "linear_probe":
        raise UserError(f"--encoder {path}: a run of {script}, which has no classes; expected a "
                        "supervised model, and contrastive ones as --compare")
    return encoder, settings


def main(argv=None):
    args = flags().parse_args(argv)
    n, began = args.classes * args.per_class, time.time()
    if not 1 < args.perplexity < n / 3:
        raise UserError(f"--perplexity {args.perplexity:g}: expected above 1 and below a third of "
                        f"the {n} points")
    device, dataset = ddp.init(args.device), data.open_labelled(args.data)
    names, images, labels = choose(dataset, args.classes, args.per_class, args.seed)
    models = {"z": read_supervised(args.encoder, dataset.scale)}
    if args.compare:
        models["h"] = load_encoder(args.compare)
    rows = []
    for feature, model in models.items():
        what = (f"{model[0].width(feature)} {KINDS[feature]} ({model[1]['arch']}), {n} images, by "
                "class")
        named = {f"{how} augmentation": features(model, feature, images, how, args.seed, device)
                 for how in AUGMENTATIONS}
        rows.append(row(what, names, labels, named, args))
    if args.compare:
        # The first image of each class, `per_class` times: now the labels tell images apart.
        repeated = images.take((labels * args.per_class).numpy())
        named = {}
        for feature, how in (("h", "weak"), ("h", "strong"), ("z", "strong")):
            name = "h" if feature == "h" else "logits"
            named[f"{name}, {how} augmentation"] = features(
                models[feature], feature, repeated, how, args.seed, device)
        what = (f"{args.classes} images, {args.per_class} views of each, by instance (h of the "
                "contrastive, logits of the supervised model)")
        rows.append(row(what, names, labels, named, args))
    for _, settings in models.values():
        settings.pop("data", None)              # a path of this machine
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "figure3.png", rows, labels,
         f"t-SNE maps with perplexity {args.perplexity:g}: {dataset.description}")
    content = {"rows": [found for _, found in rows], "classes": args.classes,
               "per_class": args.per_class, "perplexity": args.perplexity, "seed": args.seed,
               "data": dataset.description, "minutes": (time.time() - began) / 60,
               "encoders": [settings for _, settings in models.values()], **run.machine(device)}
    (args.out / "figure3.json").write_text(json.dumps(content, indent=1))
    ddp.say(f"figure3.png and figure3.json in {args.out}")


if __name__ == "__main__":
    train.launch(main, less_memory="a smaller --per-class")
