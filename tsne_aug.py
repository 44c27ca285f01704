"""Strong augmentation merges classes, not instances: the semantic label shift, seen. Sec. 4, Fig. 3.

The logits of a supervised model for 10 classes of 64 training images each, under no, weak (crop and flip) and strong
augmentation (MoCo v2's), as maps by t-SNE (van der Maaten & Hinton 2008), with scores beside them: what a map shows may be
the map's doing. --compare adds what the paper says does not suffer: h of a contrastive model, by class and by instance.

    python tsne_aug.py                                   # the embedded textures; the supervised run under runs/
    python tsne_aug.py DATA --encoder FILE --compare FILE
    python tsne_aug.py IMAGENET --encoder torchvision    # the paper's picture (downloads the weights)

x (n, 3, H, W) images;  logits (n, classes of the model), which need not be those of the data;  P, Q (n, n) similarities;
y (n, 2) the map;  labels (n,).
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from common import augment, data, ddp, train
from common.model import load_encoder

AUGMENTATIONS = {  # stack, and the crop's share of the area; None: no crop but the centre's
    "no augmentation": ("none", None), "weak augmentation": ("weak", (.08, 1.)), "strong augmentation": ("moco_v2", (.2, 1.))}
NEIGHBOURS = 10
# ten colours that the colour-blind can tell apart in pairs of colour and marker (Okabe & Ito, and two greys)
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000", "#999999", "#8B5A2B")
MARKERS = "os^Dv<>PX*"


def parse_args(argv=None):
    parser = train.Parser("tsne_aug.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="a folder of images with classes; without it, the embedded textures")
    add("--encoder", metavar="FILE", help="a checkpoint of linear_probe.py --train all (default: the one under runs/), "
        "torchvision's weights as a file, or `torchvision` (downloads)")
    add("--compare", metavar="FILE", help="a contrastive model's checkpoint, of which h is shown too")
    add("--classes", type=int, default=10, metavar="n")
    add("--per-class", type=int, default=64, metavar="n", help="training images a class; with --compare, views an image too")
    add("--perplexity", type=float, default=30.)
    add("--seed", type=int, default=0, metavar="n")
    add("--out", default="runs/tsne_aug", metavar="DIR")
    args = parser.parse_args(argv)
    n = args.classes * args.per_class
    for bad, line in ((not 2 <= args.classes <= 10, f"--classes {args.classes}: expected 2 to 10"),
                      (args.per_class < 2, f"--per-class {args.per_class}: expected 2 or more"),
                      (args.seed < 0, f"--seed {args.seed}: expected 0 or more"),
                      (not 1 < args.perplexity < n / 3, f"--perplexity {args.perplexity:g}: expected above 1 and below a third "
                                                        f"of the {n} points")):
        if bad:
            parser.error(line)
    return args


# t-SNE, exact

def affinities(x, perplexity):
    """P (n, n), symmetric, sum 1, of x (n, D): Gaussian neighbours, each point's width such that its perplexity is right."""
    square = torch.cdist(x, x).square()
    square = square / square.mean()                             # the scale of x does not matter
    inner = torch.eye(len(x), dtype=torch.bool, device=x.device)
    low, high = x.new_zeros(len(x)), x.new_full((len(x),), math.inf)
    beta = x.new_ones(len(x))                                   # 1 / (2 width^2)
    for _ in range(60):                                         # bisection, after doubling for as long as there is no upper end
        logp = torch.log_softmax((-beta[:, None] * square).masked_fill(inner, -math.inf), 1)
        entropy = -(logp.exp() * logp.masked_fill(inner, 0)).sum(1)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    P = logp.exp()
    return (P + P.T) / (2 * len(x))


def gradient(P, y):
    """Gradient (n, 2) of KL(P|Q) with respect to the map y (n, 2), and that divergence."""
    kernel = 1 / (1 + torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square())
    kernel.fill_diagonal_(0)
    Q = (kernel / kernel.sum()).clamp(min=1e-12)
    force = (P - Q) * kernel
    divergence = (P * (P.clamp(min=1e-12) / Q).log()).sum()
    return 4 * (force.sum(1, keepdim=True) * y - force @ y), divergence


def tsne(x, perplexity=30., seed=0, iterations=1000):
    """A map y (n, 2) of x (n, D), and its divergence KL(P|Q) in nats. The same for the same seed, on one device.

    Starts from the first two principal components, made small; P is exaggerated fourfold, as in the paper of t-SNE, for the
    first 250 iterations (twelvefold, now usual, ended up to 9 % higher on Figure 3's logits); momentum is .5 in them and
    .8 after; each coordinate's step grows while its sign persists (Jacobs 1988).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    P = affinities(x, perplexity).to(x.dtype)
    centred = x - x.mean(0)
    generator = torch.Generator().manual_seed(seed)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    y = centred @ axes[:2].T
    y = y / y[:, 0].std() * 1e-4 + 1e-6 * torch.randn(y.shape, generator=generator).to(y)       # equal points must part
    rate, velocity, gain = max(len(x) / 12 / 4, 50.), torch.zeros_like(y), torch.ones_like(y)
    for i in range(iterations):
        early = i < 250
        slope, _ = gradient(4 * P if early else P, y)
        gain = torch.where(slope * velocity < 0, gain + .2, gain * .8).clamp(min=.01)
        velocity = (.5 if early else .8) * velocity - rate * gain * slope
        y = y + velocity
    return y - y.mean(0), gradient(P, y)[1].item()


# how well classes are told apart, in any space

def silhouette(x, labels):
    """Mean silhouette, -1 to 1, of labels (n,) in x (n, D) by Euclidean distance (Rousseeuw 1987)."""
    distance, onehot = torch.cdist(x, x), torch.nn.functional.one_hot(labels).to(x)
    count = onehot.sum(0)
    to_class = distance @ onehot                                # (n, classes), sums
    own = to_class.gather(1, labels[:, None])[:, 0] / (count[labels] - 1).clamp(min=1)
    other = (to_class / count).scatter(1, labels[:, None], math.inf).amin(1)
    return ((other - own) / torch.maximum(other, own)).mean().item()


def agreement(x, labels, k=NEIGHBOURS):
    """Share of points, in percent, whose k nearest others vote for their own label; the point itself is left out."""
    nearest = torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(k, len(x) - 1), largest=False).indices
    votes = torch.nn.functional.one_hot(labels[nearest]).sum(1)
    return 100 * (votes.argmax(1) == labels).double().mean().item()


# the picture

def choose(dataset, classes, per_class, seed):
    """`classes` random classes and `per_class` training images of each: (names, images, labels 0 to classes - 1)."""
    labels = dataset.train.labels
    if len(dataset.classes) < classes:
        raise SystemExit(f"--classes {classes}: the data has {len(dataset.classes)} classes")
    rng = augment.generator(seed, 7)
    which, chosen = np.sort(rng.permutation(len(dataset.classes))[:classes]), []
    for c in which:
        of_class = (labels == int(c)).nonzero()[:, 0].numpy()
        if len(of_class) < per_class:
            raise SystemExit(f"--per-class {per_class}: class {dataset.classes[c]} has {len(of_class)} training images")
        chosen.append(rng.permutation(of_class)[:per_class])
    images = dataset.train.take(np.concatenate(chosen))
    return [dataset.classes[c] for c in which], images, torch.arange(classes).repeat_interleave(per_class)


def repeated(images, n, times):
    """`times` copies of n of the images, the first of each class, and which copy is whose: for views of one image."""
    which = torch.arange(n).repeat_interleave(times)
    return images.take((which * (len(images) // n)).numpy()), which


@torch.no_grad()
def features(encoder, images, how, settings, feature, device, seed, workers):
    """Features (n, D) of the images in their order under the augmentation `how` (AUGMENTATIONS)."""
    (stack, area), n = AUGMENTATIONS[how], len(images)
    module = augment.Augment(stack, scale=settings.get("normalisation", settings["scale"]), blur=settings["size"] > data.SMALL)
    if area is None:
        x = torch.cat(list(data.whole(images, size=settings["size"], batch=n, device=device, workers=workers)))[None]
        index = torch.arange(n)
    else:
        _, x, index = next(data.views(images, 1, size=settings["size"], area=area, batch=n, seed=seed, start=0, stop=1,
                                      device=device, workers=workers, drop_last=False))
    x, = module.to(device)(x, seed, 0, n)
    found = torch.cat([encoder.embed(part, feature) for part in x.split(128)]).float()
    return torch.empty_like(found).index_copy_(0, index.to(device), found)


def read(path, scale, device):
    """`(encoder, settings)`, in eval mode on `device`."""
    encoder, settings = load_encoder(path)
    return encoder.to(device).eval(), {"scale": scale, **settings}


def panel(name, x, labels, args):
    """A map and its scores in the features and in the plane, as a dict."""
    y, divergence = tsne(x, args.perplexity, args.seed)
    return dict(name=name, y=y.cpu(), labels=labels.tolist(), divergence=divergence, dimensions=x.shape[1],
                silhouette=[silhouette(v, labels.to(v.device)) for v in (x, y)],
                agreement=[agreement(v, labels.to(v.device)) for v in (x, y)])


def draw(path, rows, title):
    """`rows` of (what, legend's title, names, panels)."""
    from matplotlib.figure import Figure                        # here: it takes a while to import
    figure = Figure(figsize=(13.5, 4.7 * len(rows) + .4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(len(rows), squeeze=False)[:, 0]
    for part, (what, legend, names, panels) in zip(parts, rows):
        axes = part.subplots(1, len(panels))
        for axis, found in zip(axes, panels):
            labels = np.array(found["labels"])
            for i, name in enumerate(names):
                axis.scatter(*found["y"][labels == i].T.numpy(), s=16, c=COLOURS[i], marker=MARKERS[i], label=name,
                             linewidths=0)
            axis.set(xticks=[], yticks=[])
            axis.set_title(found["name"], fontsize=10)
            axis.set_xlabel(f"in the {found['dimensions']} features | in the plane\n"
                            "silhouette {:.2f} | {:.2f}   {}-NN {:.0f} % | {:.0f} %".format(
                                *found["silhouette"], NEIGHBOURS, *found["agreement"]), fontsize=9)
        part.suptitle(what, fontsize=10)
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title=legend, fontsize=8, markerscale=1.5)
    figure.savefig(path, dpi=90)


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device, began = ddp.init(), time.time()
    dataset = data.open_data(args.data)
    print(f"data: {dataset.description}; scale {dataset.scale}")
    if dataset.train.labels is None:
        raise SystemExit(f"{args.data}: labels are needed, in train/<class>/")
    names, images, labels = choose(dataset, args.classes, args.per_class, args.seed)
    path = args.encoder or f"runs/linear_probe-{dataset.scale}-supervised/checkpoint.pt"
    if not args.encoder and not Path(path).exists():
        raise SystemExit(f"{path}: no such file; make it with `python linear_probe.py [DATA] --train all`, or name another "
                         "with --encoder")
    models = [(*read(path, dataset.scale, device), "z", path)]
    if models[0][1].get("script", "linear_probe") != "linear_probe":
        raise SystemExit(f"--encoder {path}: a run of {models[0][1]['script']}.py, which has no classes; expected a supervised "
                         "model (linear_probe.py --train all), and contrastive ones as --compare")
    if args.compare:
        models.append((*read(args.compare, dataset.scale, device), "h", args.compare))
    rows, workers = [], data.default_workers()
    for encoder, settings, feature, name in models:
        panels = []
        for how in AUGMENTATIONS:
            x = features(encoder, images, how, settings, feature, device, args.seed, workers)
            panels.append(panel(how, x, labels, args))
            print(f"{name}, {how}: " + scores(panels[-1]), flush=True)
        what = "logits of a supervised model" if feature == "z" else "dimensions of h of a contrastive model"
        rows.append((f"{x.shape[1]} {what} ({settings['arch']}), {len(images)} images, by class", "class", names, panels))
    if args.compare:
        many, instance = repeated(images, args.classes, args.per_class)
        panels = []
        for (encoder, settings, feature, name), how in ((models[1], "weak augmentation"), (models[1], "strong augmentation"),
                                                        (models[0], "strong augmentation")):
            x = features(encoder, many, how, settings, feature, device, args.seed, workers)
            panels.append(panel(f"{'h' if feature == 'h' else 'logits'}, {how}", x, instance, args))
            print(f"{name}, by instance, {how}: " + scores(panels[-1]), flush=True)
        rows.append((f"{args.classes} images, {args.per_class} views of each, by instance", "image of", names, panels))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "figure3.png", rows, f"t-SNE, perplexity {args.perplexity:g}: {dataset.description}")
    kept = [{"what": what, "names": names, "panels": [{k: v for k, v in p.items() if k not in ("y", "labels")} for p in panels]}
            for what, _, names, panels in rows]
    (out / "figure3.json").write_text(json.dumps(
        {"rows": kept, "classes": args.classes, "per_class": args.per_class, "perplexity": args.perplexity, "seed": args.seed,
         "data": dataset.description, "encoders": [{k: v for k, v in m[1].items() if k != "data"} for m in models],
         "minutes": (time.time() - began) / 60, **train.machine(device)}, indent=1))
    print(f"figure3.png and figure3.json in {out}")


def scores(found):
    return "silhouette {:.3f} (plane {:.3f})  {}-NN {:.1f} % (plane {:.1f} %)  KL {:.3f}".format(
        *found["silhouette"], NEIGHBOURS, *found["agreement"], found["divergence"])


if __name__ == "__main__":
    main()
