"""What the projection head lets h keep: natural pre-images of features. Sec. 3, Fig. 2.

For an image x and an encoder, an image x_rec = R(noise) is sought whose features are those of x. R is a convolutional
network that is trained for this one image from a fixed noise, and only makes images that look natural (Deep Image Prior,
Ulyanov et al. 2018): what the features have lost, x_rec has lost or made up.

    python dip_inversion.py                              # the embedded textures; two encoders under runs/, see below
    python dip_inversion.py DATA --no-head FILE --head FILE
    python dip_inversion.py --no-head moco_v1.pth.tar --head moco_v2.pth.tar --images PHOTO PHOTO     # FAIR's, at 224

Columns: the image; h of an encoder trained without the MLP head; h of one trained with it; that one's `hidden`, the
activation after the head's ReLU, which the paper's Fig. 2 (d) calls z. P panels are sought at once, each with its own R:
x_rec (P, 3, H, W), noise (P, 32, H', W'), features (P, width).
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import augment, data, ddp, train
from common.model import load_encoder

WIDTHS, KERNELS = (16, 32, 64, 128, 128, 128), (7, 7, 5, 5, 3, 3)      # of R, from the image's size down
NOISE, SKIP, SLOPE, LR = 32, 4, .2, 1e-3                        # as released: channels of noise and skips, LeakyReLU, Adam
COLUMNS = ("h, no MLP head", "h, MLP head", "hidden (the paper's z), MLP head")


def parse_args(argv=None):
    parser = train.Parser("dip_inversion.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="a folder of images; without it, the embedded textures")
    add("--no-head", metavar="FILE", help="trained without MLP head (default: runs/moco_v2-SCALE-table1a/checkpoint.pt)")
    add("--head", metavar="FILE", help="trained with it (default: runs/moco_v2-SCALE-table1/checkpoint.pt)")
    add("--images", nargs="+", metavar="FILE", help="image files in place of four of DATA's")
    add("--iterations", type=int, metavar="n", help="of Adam (default: the released notebook's 3100; 1000 for small images)")
    add("--seed", type=int, default=0, metavar="n")
    add("--out", default="runs/dip_inversion", metavar="DIR")
    args = parser.parse_args(argv)
    if args.iterations is not None and args.iterations < 1 or args.seed < 0:
        parser.error(f"--iterations {args.iterations} --seed {args.seed}: expected 1 or more, 0 or more")
    return args


# Deep Image Prior: a U-Net from noise to an image.

def layer(channels, out, kernel, *after):
    """Convolution, batch norm over the one image that there is, LeakyReLU; `after` comes behind the convolution."""
    return [nn.Conv2d(channels, out, kernel, padding=kernel // 2), *after, norm(out), nn.LeakyReLU(SLOPE, inplace=True)]


def norm(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


class R(nn.Module):
    """noise (1, 32, S', S') -> x_rec (1, 3, size, size) in [0, 1]: the U-Net of the released inversion.

    A scale halves the size; there are as many as leave 4 to 8 pixels, six for 224, three for 32. S' is `size` rounded up
    to a multiple of 2^scales, and the image its upper left corner. 2,606,763 parameters at 224.
    """

    def __init__(self, size):
        super().__init__()
        scales = max(1, min(len(WIDTHS), math.ceil(math.log2(size)) - 2))
        self.size, self.noise_size = size, math.ceil(size / 2 ** scales) * 2 ** scales
        self.down, self.skip, self.up, channels = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), NOISE
        for i, (width, kernel) in enumerate(zip(WIDTHS[:scales], KERNELS)):
            self.skip.append(nn.Sequential(*layer(channels, SKIP, 1)))
            self.down.append(nn.Sequential(*layer(channels, width, kernel, nn.AvgPool2d(2)), *layer(width, width, kernel)))
            below = WIDTHS[i + 1] if i + 1 < scales else width
            self.up.append(nn.Sequential(norm(SKIP + below), *layer(SKIP + below, width, kernel), *layer(width, width, 1)))
            channels = width
        self.last = nn.Conv2d(WIDTHS[0], 3, 1)

    def forward(self, x):
        skips = []
        for skip, down in zip(self.skip, self.down):
            skips.append(skip(x))
            x = down(x)
        for skipped, up in zip(reversed(skips), reversed(self.up)):
            x = up(torch.cat([skipped, F.interpolate(x, scale_factor=2, mode="nearest")], 1))
        return torch.sigmoid(self.last(x))[..., :self.size, :self.size]


class Panels(nn.Module):
    """P networks R at once, `(P, 3, size, size)` from their own noise: to each, and its batch norm, there is only itself.

    Panel p is drawn from (seed, p), so that it is the same whatever is beside it.
    """

    def __init__(self, panels, size, seed):
        super().__init__()
        networks, noise = [], []
        for panel in range(panels):
            torch.manual_seed(int(augment.generator(seed, panel, 6).integers(2 ** 32)))
            networks.append(R(size))
            noise.append(torch.rand(NOISE, *[networks[0].noise_size] * 2) / 10)         # uniform in [0, .1]
        stacked, _ = torch.func.stack_module_state(networks)
        self.names = list(stacked)
        self.weights = nn.ParameterList(stacked[name].detach() for name in self.names)
        self.register_buffer("noise", torch.stack(noise))
        self.one = [networks[0].to("meta")]                     # in a list, so that it is no part of this module

    def forward(self):
        def one(weights, noise):
            return torch.func.functional_call(self.one[0], weights, (noise[None],))[0]
        return torch.vmap(one)(dict(zip(self.names, self.weights)), self.noise)


# the objective

class Column(nn.Module):
    """What an encoder makes of images in [0, 1]: `feature` (n, width) in float32, frozen, in eval mode."""

    def __init__(self, encoder, feature, normalisation):
        super().__init__()
        encoder.check_feature(feature)
        self.encoder, self.feature = encoder.eval().requires_grad_(False), feature
        for name, value in zip(("mean", "std"), augment.NORMALISE[normalisation]):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, x):
        return self.encoder.embed((x - self.mean) / self.std, self.feature)


def invert(columns, images, iterations, seed, watch=None):
    """x_rec (C, n, 3, S, S) for C columns and `images` (n, 3, S, S) in [0, 1], and the relative errors (C, n).

    Minimises the mean squared difference of features for each panel, over R's weights alone; the error reported is
    |f(x_rec) - f(x)|^2 / |f(x)|^2. `watch(iteration, x_rec, error)` is called after each iteration.
    """
    C, n = len(columns), len(images)
    with torch.no_grad():
        targets = [column(images) for column in columns]
    panels = Panels(C * n, images.shape[-1], seed).to(images.device)
    optimizer = torch.optim.Adam(panels.parameters(), LR)
    for iteration in range(1, iterations + 1):
        x_rec = panels().unflatten(0, (C, n))
        squares = [(column(x) - target).square().sum(1) for column, x, target in zip(columns, x_rec, targets)]
        loss = sum((s / target.shape[1]).sum() for s, target in zip(squares, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        error = torch.stack([s.detach() / target.square().sum(1) for s, target in zip(squares, targets)])
        if watch:
            watch(iteration, x_rec.detach(), error)
    return x_rec.detach(), error


# how much of the image is left: measures of x_rec against x, both (n, 3, S, S) in [0, 1]

def psnr(x, y):
    """Peak signal-to-noise ratio in dB, (n,); equal images have infinity."""
    return -10 * (x - y).square().mean((1, 2, 3)).log10()


def colour_distance(x, y, bins=8):
    """Total variation distance, 0 to 1, of the two histograms of colours, `bins` to a channel, (n,)."""
    def histogram(x):
        place = ((x * bins).long().clamp(max=bins - 1) * torch.tensor([bins * bins, bins, 1], device=x.device).view(3, 1, 1))
        return torch.stack([torch.bincount(p.flatten(), minlength=bins ** 3) for p in place.sum(1)]) / place[0, 0].numel()
    return (histogram(x) - histogram(y)).abs().sum(1) / 2


def structure(x, y, sigma=1.5, noise=.02):
    """Mean local correlation of the grey images, up to 1, (n,): the structure term of SSIM (Wang et al. 2004, Eq. 10).

    Of 11 x 11 Gaussian windows; blind to brightness and contrast. `noise` is the deviation under which a window is flat.
    """
    weight = torch.tensor(augment.GRAY, device=x.device).view(3, 1, 1)
    kernel = torch.softmax(-.5 * (torch.arange(-5., 6, device=x.device) / sigma) ** 2, 0)
    kernel = (kernel[:, None] * kernel)[None, None]

    def local(v):
        return F.conv2d(v, kernel)
    x, y = ((v * weight).sum(1, keepdim=True) for v in (x, y))
    spread = [(local(v * v) - local(v) ** 2).clamp(min=0).sqrt() for v in (x, y)]
    covariance = local(x * y) - local(x) * local(y)
    return ((covariance + noise ** 2) / (spread[0] * spread[1] + noise ** 2)).mean((1, 2, 3))


# around it

def default(path, scale, preset, flag):
    """`path`, or where that row of Table 1 is written. Raises SystemExit with the command that makes it."""
    path = path or f"runs/moco_v2-{scale}-{preset}/checkpoint.pt"
    if not Path(path).exists():
        raise SystemExit(f"{flag} {path}: no such file; make it with `python moco_v2.py [DATA] --preset {preset}`")
    return path


def read_images(args, dataset, size, device):
    """Names, and images (n, 3, size, size) in [0, 1]: the files of --images, or four of DATA's, of unlike classes."""
    if args.images:
        for name in args.images:
            try:
                found = data.read_image(name)
            except Exception as error:                          # PIL raises many kinds for a broken file
                raise SystemExit(f"--images {name}: cannot be read as an image ({error})")
            if min(found.shape[1:]) < size:
                raise SystemExit(f"--images {name}: {found.shape[2]} x {found.shape[1]} pixels; these encoders take {size}")
        images, names = data.Images(files=np.array([str(name).encode() for name in args.images])), args.images
    else:
        images = dataset.test or dataset.train
        if images.labels is None:
            chosen = torch.linspace(0, len(images) - 1, min(4, len(images))).long()
        else:
            every = max(1, len(dataset.classes) // 4)
            chosen = torch.stack([(images.labels == c).nonzero()[0, 0] for c in range(0, len(dataset.classes), every)][:4])
        names = [f"image {i}" if images.labels is None else dataset.classes[images.labels[i]] for i in chosen]
        images = images.take(chosen.numpy())
    x = torch.cat(list(data.whole(images, size=size, batch=64, device=device, workers=0)))
    return [Path(str(name)).stem for name in names], x.float() / 255


def differences(a, b):
    """What else the two encoders' settings differ in, in words."""
    if not ("script" in a and "script" in b):
        return "The encoders are not runs of this project: MoCo v1 and v2 differ in augmentation and temperature too."
    names = ("stack", "temperature", "crop", "jitter", "blur", "K", "m", "lr", "epochs", "batch_size", "seed")
    other = [f"{k} {a[k]} and {b[k]}" for k in names if k in a and k in b and a[k] != b[k]]
    return f"The encoders differ also in {', '.join(other)}." if other else ""


def measure(images, x_rec, error):
    """Per column: a dict of lists over images, `feature_error`, `psnr` (dB), `colour_distance` and `structure`."""
    return [dict(feature_error=e.tolist(), psnr=psnr(images, x).tolist(), colour_distance=colour_distance(images, x).tolist(),
                 structure=structure(images, x).tolist()) for x, e in zip(x_rec, error)]


def draw(path, images, names, x_rec, found, title):
    from matplotlib.figure import Figure                        # here: it takes a while to import
    figure = Figure(figsize=(10.5, 2.75 * len(images) + 1), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(COLUMNS), squeeze=False)
    for row, (image, name) in enumerate(zip(images, names)):
        for column, axis in enumerate(axes[row]):
            axis.imshow((image if column == 0 else x_rec[column - 1, row]).permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_title(f"{'(a) image' if row == 0 else ''}\n{name}", fontsize=9)
                continue
            one = {key: values[row] for key, values in found[column - 1].items()}
            head = f"({'abcd'[column]}) {COLUMNS[column - 1]}" if row == 0 else ""
            axis.set_title(f"{head}\nfeature error {one['feature_error']:.3f}, PSNR {one['psnr']:.1f} dB\n"
                           f"colour {one['colour_distance']:.2f}, structure {one['structure']:.2f}", fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=100)


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    dataset = None if args.images else data.open_data(args.data)
    scale = dataset.scale if dataset else "imagenet"
    (without, a), (with_head, b) = (load_encoder(default(path, scale, preset, flag)) for path, preset, flag in (
        (args.no_head, "table1a", "--no-head"), (args.head, "table1", "--head")))
    if without.f.width != with_head.f.width or a["size"] != b["size"]:
        raise SystemExit(f"--no-head and --head: h has {without.f.width} and {with_head.f.width} dimensions, of images of "
                         f"{a['size']} and {b['size']} pixels; expected two encoders of one kind")
    for flag, s, wanted in (("--no-head", a, False), ("--head", b, True)):
        if (s["head"] not in ("none", "identity")) != wanted:
            raise SystemExit(f"{flag}: the head of this encoder is `{s['head']}`; expected one "
                             f"{'with a' if wanted else 'without'} hidden layer")
    columns = [Column(encoder, feature, s.get("normalisation", s["scale"])).to(device)
               for encoder, feature, s in ((without, "h", a), (with_head, "h", b), (with_head, "hidden", b))]
    names, images = read_images(args, dataset, a["size"], device)
    args.iterations = args.iterations or (1000 if a["size"] <= data.SMALL else 3100)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began = shown = drawn = time.time()
    weights = sum(p.numel() for p in R(a["size"]).parameters())
    print(f"{len(columns) * len(images)} panels of {a['size']} pixels, {weights} weights each, {args.iterations} iterations; "
          f"writing to {out}", flush=True)

    def title(iteration):
        return (f"pre-images of features after {iteration} of {args.iterations} iterations, {a['arch']}, "
                f"{dataset.description if dataset else 'image files'}\n{differences(a, b)}")

    def watch(iteration, x_rec, error):
        nonlocal shown, drawn
        now = time.time()
        if now - shown > 10 or iteration in (1, args.iterations):
            shown, left = now, (now - began) / iteration * (args.iterations - iteration)
            each = "  ".join(f"{e:.4f}" for e in error.mean(1).tolist())
            print(f"iteration {iteration}/{args.iterations}  feature error {each}  {(now - began) / iteration:.2f} s each  "
                  f"{train.clock(left)} left", flush=True)
        if now - drawn > 60:
            draw(out / "figure2.png", images, names, x_rec, measure(images, x_rec, error), title(iteration))
            drawn = time.time()

    x_rec, error = invert(columns, images, args.iterations, args.seed, watch)
    found = measure(images, x_rec, error)
    draw(out / "figure2.png", images, names, x_rec, found, title(args.iterations))
    summary = [{key: [np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0.] for key, v in f.items()} for f in found]
    for name, values in zip(COLUMNS, summary):
        print(f"{name}: " + "  ".join(f"{key} {mean:.3f} ± {sd:.3f}" for key, (mean, sd) in values.items()))
    (out / "figure2.json").write_text(json.dumps(
        {"columns": COLUMNS, "images": names, "panels": found, "mean_and_sd": summary, "iterations": args.iterations,
         "seed": args.seed,
         "encoders": [{k: v for k, v in e.items() if k != "data"} for e in (a, b)],
         "minutes": (time.time() - began) / 60, **train.machine(device)}, indent=1))
    print(f"figure2.png and figure2.json in {out}")


if __name__ == "__main__":
    main()
