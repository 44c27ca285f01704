"""Which information do features keep? Inversion with a Deep Image Prior. Sec. 3, Figure 2.

For an image x and an encoder f, a network R is trained to turn fixed noise into an image x_rec
whose features are those of x. R is a Deep Image Prior (Ulyanov et al. 2018): it favours images that
look natural, so x_rec shows what the features have kept of x. The paper writes
x' for x_rec and Z for the noise.

    python dip_inversion.py                     # a laptop: built-in images, three minutes
    python dip_inversion.py IMAGENET            # encoders: the runs of table1a and table1
    python dip_inversion.py --no-head moco_v1.pth.tar --head moco_v2.pth.tar --images PHOTO PHOTO

The last command inverts FAIR's encoders. One image at 224 pixels takes two hours on 2 cores.

C = 3 columns: h of an encoder trained without the MLP head; h of one trained with it; `hidden` of
the latter, the activation after its head's first ReLU, which Figure 2 (d) calls z. All columns of
an image start from the same R and noise, drawn from (seed, image): their comparisons are paired.
x (n, 3, S, S): images in [0, 1]. x_rec (C, n, 3, S, S). noise (C n, 32, S', S').
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, augment, data, ddp, run, train
from common.checkpoint import FAIR, load_encoder

# Values of the release of Ulyanov et al.: channels and kernel sizes of R's levels, finest first;
# channels of the noise and of the skip connections; slope of LeakyReLU; learning rate of Adam.
WIDTHS, KERNELS = (16, 32, 64, 128, 128, 128), (7, 7, 5, 5, 3, 3)
NOISE, SKIP, SLOPE, LR = 32, 4, .2, 1e-3
COLUMNS = ("h, without MLP head", "h, with MLP head", "hidden (the paper's z), with MLP head")
LABEL = ("feature error {feature_error:.3f}\nPSNR {psnr:.1f} dB\n"
         "colour distance {colour_distance:.2f}\nkept structure {structure:.2f}")
REPORT_EVERY = 30                               # seconds between progress reports and pictures
SHOWN = 4                                       # images in the picture


# R: a U-Net from noise to an image. Its batch norm always uses the statistics of that one image.

def layer(channels, out, kernel, *after):
    """Modules: convolution, the modules `after` it, batch norm and LeakyReLU."""
    return [nn.Conv2d(channels, out, kernel, padding=kernel // 2), *after,
            nn.BatchNorm2d(out, track_running_stats=False), nn.LeakyReLU(SLOPE, inplace=True)]


class R(nn.Module):
    """noise (1, 32, S', S') -> x_rec (1, 3, size, size) in [0, 1]: the released U-Net.

    Each level halves the size, until at most 4 pixels or six levels are reached. S' is `size`
    rounded up to a multiple of 2^levels; x_rec is its upper left part. At 224: 2,606,763 weights.
    """

    def __init__(self, size):
        super().__init__()
        levels = max(1, min(len(WIDTHS), math.ceil(math.log2(size)) - 2))
        self.size, channels = size, NOISE
        self.noise_size = math.ceil(size / 2 ** levels) * 2 ** levels
        self.down, self.skip, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (width, kernel) in enumerate(zip(WIDTHS[:levels], KERNELS)):
            below = WIDTHS[i + 1] if i + 1 < levels else width
            self.skip.append(nn.Sequential(*layer(channels, SKIP, 1)))
            self.down.append(nn.Sequential(*layer(channels, width, kernel, nn.AvgPool2d(2)),
                                           *layer(width, width, kernel)))
            self.up.append(nn.Sequential(nn.BatchNorm2d(SKIP + below, track_running_stats=False),
                                         *layer(SKIP + below, width, kernel),
                                         *layer(width, width, 1)))
            channels = width
        self.last = nn.Conv2d(WIDTHS[0], 3, 1)

    def forward(self, x):
        skips = []
        for skip, down in zip(self.skip, self.down):
            skips.append(skip(x))
            x = down(x)
        for skipped, up in zip(reversed(skips), reversed(self.up)):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = up(torch.cat([skipped, x], 1))
        return torch.sigmoid(self.last(x))[..., :self.size, :self.size]


class Panels(nn.Module):
    """C x n independent networks R, evaluated together with vmap: x_rec (C, n, 3, size, size).

    The network and the noise of image i are drawn from (seed, i) and copied to all C columns. vmap
    turns many small kernels into few large ones.
    """

    def __init__(self, columns, images, size, seed):
        super().__init__()
        self.shape = columns, images
        networks, noise = [], []
        for image in range(images):
            torch.manual_seed(int(augment.generator("R", seed, image).integers(2 ** 32)))
            networks.append(R(size))
            noise.append(torch.rand(NOISE, networks[0].noise_size, networks[0].noise_size) / 10)
        stacked, _ = torch.func.stack_module_state(networks * columns)          # (C n, ...) each
        self.names = list(stacked)
        self.weights = nn.ParameterList(stacked.values())
        self.register_buffer("noise", torch.stack(noise * columns))
        # In a list, so that its parameters are not those of this module.
        self.template = [networks[0].to("meta")]

    def forward(self):
        def one(weights, noise):
            return torch.func.functional_call(self.template[0], weights, (noise[None],))[0]
        x_rec = torch.vmap(one)(dict(zip(self.names, self.weights)), self.noise)
        return x_rec.unflatten(0, self.shape)


# The objective: min |f(x_rec) - f(x)|^2 over the weights of R.

def feature_function(encoder, feature, normalisation, device):
    """The function x (n, 3, S, S) in [0, 1] -> `feature` (n, width) of a frozen `encoder`."""
    encoder.to(device).eval().requires_grad_(False)
    mean, std = torch.tensor(augment.NORMALISE[normalisation], device=device).view(2, 3, 1, 1)
    return lambda x: encoder.embed((x - mean) / std, feature)


def invert(functions, x, iterations, seed):
    """Yield `(iteration, x_rec, error)` for iterations 1 to `iterations` of Adam.

    For C `functions` (see `feature_function`) and images x (n, 3, S, S): x_rec (C, n, 3, S, S) and
    its relative error (C, n), |f(x_rec) - f(x)|^2 / |f(x)|^2. The loss of a panel is the mean
    squared difference of features.
    """
    with torch.no_grad():
        targets = [f(x) for f in functions]                     # (n, width) each
    panels = Panels(len(functions), len(x), x.shape[-1], seed).to(x.device)
    optimizer = torch.optim.Adam(panels.parameters(), LR)
    for iteration in range(1, iterations + 1):
        x_rec = panels()                                        # (C, n, 3, S, S)
        loss, errors = 0, []
        for f, images, target in zip(functions, x_rec, targets):
            square = (f(images) - target).square()              # (n, width)
            loss = loss + square.mean(1).sum()
            errors.append(square.detach().sum(1) / target.square().sum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield iteration, x_rec.detach(), torch.stack(errors)


# Measures of what x_rec, here y, has kept of x; both (n, 3, S, S) in [0, 1].

def psnr(x, y):
    """Peak signal-to-noise ratio (n,) in dB; infinite for equal images."""
    return -10 * (x - y).square().mean((1, 2, 3)).log10()


def colour_distance(x, y, bins=8):
    """Total variation distance (n,), 0 to 1, of the colour histograms with `bins` per channel."""
    def histogram(x):                                           # (n, bins^3): shares of the pixels
        red, green, blue = (x * bins).long().clamp(max=bins - 1).unbind(1)
        cell = ((red * bins + green) * bins + blue).flatten(1)                  # (n, S S)
        one = x.new_ones(1).expand_as(cell)
        return x.new_zeros(len(x), bins ** 3).scatter_add_(1, cell, one) / cell.shape[1]
    return (histogram(x) - histogram(y)).abs().sum(1) / 2


def structure(x, y, flat=.02):
    """Mean local correlation (n,) of the grey images, at most 1; ignores brightness and contrast.

    The structure term of SSIM (Wang et al. 2004, Eq. (10)) in Gaussian windows of 11 x 11 pixels
    with a sigma of 1.5. Windows in which both deviate by less than `flat` count as equal.
    """
    sigma = x.new_full((len(x),), 1.5)

    def local_mean(v):
        return augment.blur(v, sigma, radius=5)[..., 5:-5, 5:-5]                # whole windows only

    def deviation(v):
        return (local_mean(v * v) - local_mean(v) ** 2).clamp(min=0).sqrt()

    x, y = augment.grayscale(x), augment.grayscale(y)           # (n, 1, S, S)
    covariance = local_mean(x * y) - local_mean(x) * local_mean(y)
    correlation = (covariance + flat ** 2) / (deviation(x) * deviation(y) + flat ** 2)
    return correlation.mean((1, 2, 3))


def measure(x, x_rec, error):
    """A list of C dicts, {measure: list over the n images}; `psnr` is in dB."""
    return [{"feature_error": e.tolist(), "psnr": psnr(x, y).tolist(),
             "colour_distance": colour_distance(x, y).tolist(),
             "structure": structure(x, y).tolist()} for y, e in zip(x_rec, error)]


def choose(dataset, n):
    """At most n test images (or training images), from different classes: `(names, images)`."""
    images = dataset.test or dataset.train
    n = min(n, len(images))
    if dataset.classes is None:
        chosen = np.linspace(0, len(images) - 1, n).astype(int)
        return [f"image {i}" for i in chosen], images.take(chosen)
    names, chosen, classes = [], [], len(dataset.classes)
    for i in range(n):
        c = i * max(1, classes // n) % classes
        members = np.flatnonzero(images.labels.numpy() == c)
        names.append(dataset.classes[c])
        chosen.append(members[i // classes % len(members)])
    return names, images.take(np.array(chosen))


def paired_differences(values, reference):
    """{measure: [mean difference of two columns, half the width of its 95 % interval]}.

    Both are from `measure`, for the same two or more images.
    """
    from scipy.stats import t                                   # slow to import
    compared = {}
    for name in values:
        pairs = np.subtract(values[name], reference[name])
        half = t.ppf(.975, len(pairs) - 1) * pairs.std(ddof=1) / math.sqrt(len(pairs))
        compared[name] = [pairs.mean(), half]
    return compared


def image_files(paths, size):
    """The files of --images: `(names, images)`. Raises UserError if one is broken or too small."""
    for path in paths:
        try:
            height, width = data.read_image(path).shape[1:]
        except Exception as error:              # PIL raises many kinds of errors
            raise UserError(f"--images {path}: cannot be read as an image ({error})")
        if min(height, width) < size:
            raise UserError(f"--images {path}: {width} x {height} pixels; expected {size} or more")
    files = np.array([str(path).encode() for path in paths])
    return [Path(path).stem for path in paths], data.Images(files=files)


def read_encoder(path, flag, scale, preset, hidden):
    """`(encoder, settings)` of `path`, by default of the run of `preset`.

    Raises UserError if there is no such file, or if its head has a hidden layer and `hidden` is
    False, or the other way round.
    """
    path = path or f"runs/moco_v2-{scale}-{preset}/checkpoint.pt"
    if not Path(path).exists():
        raise UserError(f"{flag} {path}: no such file; make it with "
                        f"`python moco_v2.py [DATA] --preset {preset}`")
    encoder, settings = load_encoder(path)
    settings.pop("data", None)                  # a path of this machine
    if hidden != any(isinstance(module, nn.ReLU) for module in encoder.g.modules()):
        problem = "a hidden layer is needed" if hidden else "no hidden layer is expected"
        raise UserError(f"{flag} {path}: {problem} in the projection head of this encoder")
    return encoder, settings


def flags():
    parser = train.Parser("dip_inversion.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="folder of images (default: the built-in textures)")
    add("--no-head", metavar="FILE", help="encoder without an MLP head (default: run of table1a)")
    add("--head", metavar="FILE", help="encoder with an MLP head (default: run of table1)")
    add("--n-images", type=train.COUNT, default=4, metavar="n",
        help="images of DATA; the picture shows four")
    add("--images", nargs="+", metavar="FILE", help="image files to use instead of DATA")
    add("--iterations", type=train.COUNT, metavar="n", help="(default: 3100; small images: 1000)")
    add("--seed", type=train.NATURAL, default=0, metavar="n")
    add("--device", choices=train.DEVICES, help="default: cuda if there is a GPU, else cpu")
    add("--out", type=Path, default="runs/dip_inversion", metavar="DIR")
    return parser


def differences(a, b):
    """What else the settings of the two encoders differ in, as a sentence."""
    if a.get("script") == b.get("script") == FAIR:
        return "FAIR's MoCo v1 and v2 also differ in augmentation, temperature and schedule."
    names = sorted(a.keys() & b.keys() - {"head", "preset"})
    found = [f"{name} ({a[name]} and {b[name]})" for name in names if a[name] != b[name]]
    return f"The encoders also differ in {', '.join(found)}." if found else ""


def draw(path, x, names, x_rec, found, title):
    from matplotlib.figure import Figure                        # slow to import
    figure = Figure(figsize=(10.5, 3.3 * len(x) + .8), layout="constrained")
    axes = figure.subplots(len(x), 1 + len(COLUMNS), squeeze=False)
    for row, name in enumerate(names):
        labels = [name]
        for values in found:
            labels.append(LABEL.format(**{key: value[row] for key, value in values.items()}))
        for axis, image, label in zip(axes[row], [x[row], *x_rec[:, row]], labels):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=8)
    for axis, letter, kind in zip(axes[0], "abcd", ("image", *COLUMNS)):
        axis.set_title(f"({letter}) {kind}", fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv=None):
    args = flags().parse_args(argv)
    device = ddp.init(args.device)
    dataset = None if args.images else data.open_data(args.data)
    scale = dataset.scale if dataset else "imagenet"
    no_head, a = read_encoder(args.no_head, "--no-head", scale, "table1a", hidden=False)
    with_head, b = read_encoder(args.head, "--head", scale, "table1", hidden=True)
    size = a["size"]
    if no_head.f.width != with_head.f.width or size != b["size"]:
        raise UserError(f"--no-head and --head: h has {no_head.f.width} and {with_head.f.width} "
                        f"dimensions, images have {size} and {b['size']} pixels; expected the same")
    kinds = (no_head, "h", a), (with_head, "h", b), (with_head, "hidden", b)
    functions = [feature_function(encoder, feature, settings["normalisation"], device)
                 for encoder, feature, settings in kinds]
    names, chosen = (image_files(args.images, size) if args.images
                     else choose(dataset, args.n_images))
    x = torch.cat(list(data.whole(chosen, size=size, batch=64, device=device, workers=0))) / 255
    iterations = args.iterations or (1000 if size <= data.SMALL else 3100)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = sum(p.numel() for p in R(size).parameters())
    ddp.say(f"{len(functions) * len(x)} panels of {size} pixels, {weights} weights each, "
            f"{iterations} iterations; writing to {args.out}")
    began = shown = time.time()
    for iteration, x_rec, error in invert(functions, x, iterations, args.seed):
        if time.time() - shown < REPORT_EVERY and iteration not in (1, iterations):
            continue
        shown = time.time()
        each = (shown - began) / iteration                      # seconds
        errors = " ".join(f"{value:.4f}" for value in error.mean(1).tolist())
        ddp.say(f"iteration {iteration}/{iterations}  feature error {errors}  {each:.2f} s each  "
                f"{run.duration(each * (iterations - iteration))} left")
        found = measure(x, x_rec, error)
        title = (f"Natural pre-images after {iteration} of {iterations} iterations, {a['arch']}, "
                 f"{dataset.description if dataset else 'image files'}\n{differences(a, b)}")
        draw(args.out / "figure2.png", x[:SHOWN], names[:SHOWN], x_rec[:, :SHOWN], found,
             title)
    for name, values in zip(COLUMNS, found):
        means = LABEL.format(**{key: np.mean(value) for key, value in values.items()})
        ddp.say(f"{name}, mean of {len(x)} images: {means}".replace("\n", ", "))
    compared, reference = {}, COLUMNS[1]        # which keeps most, according to the paper
    for name, values in zip(COLUMNS, found):
        if name == reference or len(x) == 1:
            continue
        compared[name] = paired_differences(values, found[1])
        pairs = ", ".join(f"{key} {mean:+.3f} ± {half:.3f}"
                          for key, (mean, half) in compared[name].items())
        ddp.say(f"({name}) minus ({reference}), 95 % intervals: {pairs}")
    content = {"columns": COLUMNS, "images": names, "panels": found,
               "differences": compared, "iterations": iterations, "seed": args.seed,
               "encoders": [a, b], "minutes": (time.time() - began) / 60, **run.machine(device)}
    (args.out / "figure2.json").write_text(json.dumps(content, indent=1))
    ddp.say(f"figure2.png and figure2.json in {args.out}")


if __name__ == "__main__":
    train.launch(main, less_memory="a smaller --n-images or fewer --images")
