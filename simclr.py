"""SimCLR: the negatives come from the batch itself. Sec. 5, Figure 4.

Each image of a batch gives two views. The other view of an image is its positive, and all views of
the other images are its negatives (Chen et al. 2020a): K = 2 (M - 1) for M images. The loss is
Eq. (1), as in moco_v2.py. There is no queue and no momentum encoder, so the batch size sets K.

    torchrun --nproc_per_node=8 simclr.py IMAGENET --preset figure4 --batch-size 2048   # K = 4094
    python simclr.py                                    # a laptop: built-in images, two minutes
    python simclr.py DATA --batch-size 32768 --chunk 512        # K = 65534, memory of 512 images

x1, x2 (N, 3, H, W): two views of N images; M = W N images on W processes. h = f(x) (N, width).
z = g(h) (N, D). The embeddings of all views are (2 M, D): the two views of an image are neighbours.
Batch statistics are taken over all images; there are no groups.
"""

import argparse
import contextlib
import math

import numpy as np
import torch
from torch import nn

from common import UserError, augment, data, ddp, train
from common.layers import GlobalBatchNorm
from common.loss import info_nce, unit
from common.model import Encoder, resnet
from common.run import Run

# The method (Sec. 5): the positive pair is the two views of an image; the negatives are all other
# views in the batch.


def nt_xent(z, rows, temperature):
    """2 times the mean of Eq. (1) over the views `rows` (n,), indices into z (2 M, D).

    z holds all views at unit length. The factor is that of the released code, which sums the means
    over first and over second views.
    """
    partner = rows ^ 1                                          # the other view of the same image
    similarity = z[rows] @ z.T                                  # (n, 2 M)
    positive = similarity.gather(1, partner[:, None])[:, 0]     # (n,)
    negatives = similarity.scatter(1, torch.stack([rows, partner], 1), -math.inf)
    return 2 * info_nce(positive, negatives, temperature)


def embed_pairs(embed, x1, x2):
    """Unit-length z (N, 2, D) of both views of N images; `embed` maps views x to z."""
    return unit(embed(torch.cat([x1, x2]))).unflatten(0, (2, -1)).transpose(0, 1)


def own_rows(z):
    """The indices (2 N,) of this process's views among all views z (2 M, D)."""
    return torch.arange(len(z), device=z.device)[ddp.rows(len(z))]


def train_step(embed, optimizer, x1, x2, temperature):
    """One step of SimCLR on N images; returns the loss. `embed` maps views x to z."""
    z = ddp.all_gather_with_grad(embed_pairs(embed, x1, x2)).flatten(0, 1)      # (2 M, D)
    loss = nt_xent(z, own_rows(z), temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


BLOCK = 2 ** 23                                 # similarities in memory at once in a chunked step
BN_MOMENTUM = .1


def chunked_step(encoder, embed, no_sync, optimizer, views, N, parts, temperature):
    """`train_step` on N images in `parts` parts, with the memory of one part (gradient caching).

    It computes the embeddings of all parts without gradient; then the gradient of the loss with
    respect to them, by blocks of rows; then each part again, with gradient, to propagate it to the
    weights. The only difference from `train_step` is that batch statistics are those of a part.

    `views(part)` returns x1, x2 of the images `part`, a slice of this process's N, and must return
    the same at both calls. `no_sync` is DDP's context without gradient synchronisation.
    """
    # Part i holds each process's images i, i + parts, ...: over all processes, the same images as
    # with one process.
    slices, z = [slice(i, None, parts) for i in range(parts)], None
    statistics = running_statistics(encoder)
    before, mean = [s.clone() for s in statistics], [torch.zeros_like(s) for s in statistics]
    set_bn_momentum(encoder, 1.)                # each part replaces the running statistics
    for part in slices:
        with torch.no_grad():
            pairs = embed_pairs(embed, *views(part))
        for total, s in zip(mean, statistics):
            total.add_(s, alpha=1 / parts)
        z = pairs.new_empty(N, *pairs.shape[1:]) if z is None else z
        z[part] = pairs                                         # (N, 2, D)
    for s, old, new in zip(statistics, before, mean):
        s.copy_(old.lerp(new, BN_MOMENTUM))
    z = ddp.all_gather(z).flatten(0, 1).requires_grad_()        # (2 M, D)
    rows, loss = own_rows(z), 0.
    for block in rows.split(max(1, BLOCK // len(z))):
        share = nt_xent(z, block, temperature) * len(block) / len(rows)
        share.backward()
        loss += share.detach()
    # Each loss depends on all embeddings: sum over processes, as `all_gather_with_grad` does.
    gradient = ddp.total(z.grad)[rows].unflatten(0, (-1, 2))    # (N, 2, D)
    optimizer.zero_grad()
    set_bn_momentum(encoder, 0.)                # the first pass has moved the running statistics
    for i, part in enumerate(slices):
        with no_sync() if i < parts - 1 else contextlib.nullcontext():
            pairs = embed_pairs(embed, *views(part))
            (pairs * gradient[part]).sum().backward()
    set_bn_momentum(encoder, BN_MOMENTUM)
    optimizer.step()
    return loss


def batch_norms(encoder):
    return [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def set_bn_momentum(encoder, momentum):
    for norm in batch_norms(encoder):
        norm.momentum = momentum


def running_statistics(encoder):
    return [s for norm in batch_norms(encoder) for s in (norm.running_mean, norm.running_var)]


def head(layers, width, dim, norm):
    """The projection head g with 2 or 3 linear layers: h (N, width) -> z (N, dim).

    Each layer is without bias and followed by batch normalisation; the last of these has no shift.
    """
    g = []
    for _ in range(layers - 1):
        g += [nn.Linear(width, width, bias=False), norm(width), nn.ReLU(inplace=True)]
    g = nn.Sequential(*g, nn.Linear(width, dim, bias=False), norm(dim))
    for layer in g:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=.01)
    g[-1].bias.requires_grad_(False)
    return g


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a layer-wise trust ratio (You et al. 2017), as in SimCLR's code.

    trust = eta |w| / |g + wd w|, and 1 if either norm is 0. The learning rate is applied before
    the momentum. Biases and batch normalisation have neither weight decay nor trust ratio.
    """

    def __init__(self, params, lr, momentum=.9, weight_decay=0., eta=.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, decayed = group["params"], [w for w in group["params"] if w.ndim > 1]
            for w in params:
                if not self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            # With _foreach functions, a step is a few kernel launches for all tensors together.
            g = torch._foreach_add([w.grad for w in decayed], decayed, alpha=group["weight_decay"])
            w_norm, g_norm = (torch.stack(torch._foreach_norm(v)) for v in (decayed, g))
            trust = torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1.)
            torch._foreach_mul_(g, trust.unbind())
            g = dict(zip(decayed, g))
            velocity = [self.state[w]["momentum"] for w in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, [g.get(w, w.grad) for w in params], alpha=group["lr"])
            torch._foreach_sub_(params, velocity)


def learning_rate(step, *, lr, warmup, total):
    """Linear from 0 over `warmup` steps, then half a cosine down to 0, as released."""
    if step < warmup:
        return lr * step / warmup
    return lr * .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# Settings. The released rules for the learning rate, .3 M / 256 and .075 sqrt(M), give 4.8 at 4096.

SIMCLR = dict(stack="simclr", normalisation="unit", layers=2, dim=128, crop=(.08, 1.),
              warmup_epochs=10, scaling="sqrt")
SCALES = {
    "imagenet": dict(SIMCLR, arch="resnet50", size=224, epochs=100, long_epochs=200,
                     batch_size=4096, base_lr=4.8, weight_decay=1e-4, temperature=.1, jitter=1.,
                     blur=True, n_evals=20),
    "cifar10": dict(SIMCLR, arch="resnet18-3x3", size=32, epochs=200, batch_size=512,
                    base_lr=2., weight_decay=1e-4, temperature=.5, jitter=.5,
                    blur=False, n_evals=20),
    "textures": dict(SIMCLR, arch="resnet10", size=32, epochs=12, batch_size=64,
                     base_lr=.5, weight_decay=1e-4, temperature=.2, jitter=.5, blur=False,
                     n_evals=4, warmup_epochs=1),
}
PRESETS = {
    "simclr": {},
    "figure4": dict(long=True),                 # a point of the curve: --batch-size K / 2
}


def flags():
    parser = train.parser("simclr", __doc__, PRESETS)
    add = parser.add_argument
    add("--layers", type=int, choices=(2, 3),
        help="layers of the projection head: 2 in SimCLR's paper, 3 in its code today")
    add("--temperature", type=train.POSITIVE, help="temperature of Eq. (1)")
    add("--scaling", choices=("linear", "sqrt"),
        help="how the default learning rate grows with the batch size")
    add("--chunk", type=train.SEVERAL, metavar="n",
        help="embed n images at a time, over all processes, for batches larger than memory")
    add("--crop", type=train.AREA, nargs=2, metavar=("LO", "HI"),
        help="range of the crop's share of the image's area")
    add("--jitter", type=train.STRENGTH, metavar="S",
        help="jitter of brightness, contrast and saturation by .8 S, of hue by .2 S")
    add("--blur", action=argparse.BooleanOptionalAction, help="Gaussian blur")
    return parser


def check(args):
    """Raises UserError if settings do not fit together; prints notes on unusual ones."""
    train.check_batch(args.images, args.batch_size, bn_group=1)
    if args.batch_size < 2:
        raise UserError("--batch-size 1: expected 2 or more; the negatives are the other images")
    if not args.chunk:
        return
    parts, own = n_parts(args), args.batch_size // ddp.world()
    if parts > own:
        raise UserError(f"--chunk {args.chunk}: expected {ddp.world()} or more, an image for each "
                        "process")
    if args.batch_size % args.chunk or own % parts:
        ddp.say(f"note: {parts} chunks do not divide the {own} images of a process evenly; their "
                "batch statistics depend on the number of processes")


def n_parts(args):
    """The number of chunks of a batch."""
    return math.ceil(args.batch_size / args.chunk)


def build(args, device):
    """The encoder and its optimizer, initialised from the seed."""
    torch.manual_seed(args.seed)
    norm = nn.SyncBatchNorm if device.type == "cuda" else GlobalBatchNorm
    f = resnet(args.arch, norm=norm, zero_init_residual=True)
    encoder = Encoder(f, head(args.layers, f.width, args.dim, norm))
    encoder.to(device, memory_format=torch.channels_last)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    return encoder, LARS(trained, args.lr, weight_decay=args.weight_decay)


def main(argv=None):
    args, dataset, device = train.begin(flags(), argv, SCALES, PRESETS)
    check(args)
    if args.warmup is None:
        epochs = min(args.warmup_epochs, args.epochs / 2)
        args.warmup = round(epochs * args.images / args.batch_size)
    steps_per_epoch = data.steps_per_epoch(args.images, args.batch_size)
    K = 2 * (args.batch_size - 1)
    ddp.say(f"K = 2 ({args.batch_size} - 1) = {K} negatives")
    encoder, optimizer = build(args, device)
    augmentation = augment.Augment(args.stack, augment.jitter_strength(args.jitter), args.blur,
                                   args.normalisation, args.seed).to(device)
    run = Run({"f": encoder.f, "g": encoder.g, "optimizer": optimizer},
              evaluate=train.monitor(args, dataset, encoder, augmentation, device),
              chance_loss=math.log(K + 1), stop_every=1 if args.chunk else 10,
              **train.run_options(args, steps_per_epoch, device))
    wrapped = ddp.wrap(encoder)
    embed = train.embedder(wrapped, args, device, None if args.chunk else 2 * args.batch_size)
    no_sync = wrapped.no_sync if ddp.world() > 1 else contextlib.nullcontext
    batches = train.views(args, dataset.train, 2, run, device)
    batch, mine = args.batch_size, np.arange(args.batch_size)[ddp.rows(args.batch_size)]

    def plain(x, step):
        return train_step(embed, optimizer, *augmentation(x, step), args.temperature)

    def chunked(x, step):
        def views(part):
            """Two views of this process's images `part`, (n, 3, H, W) each."""
            draws = augmentation.draw(step, batch, views=2, rows=[mine[part]] * 2)
            return augmentation.transform_views(x[:, part], ddp.send(draws, device))
        return chunked_step(encoder, embed, no_sync, optimizer, views, x.shape[1], n_parts(args),
                            args.temperature)

    take_step = chunked if args.chunk else plain
    for step, x, _ in run.steps(batches):
        lr = train.set_lr(optimizer, learning_rate(step, lr=args.lr, warmup=args.warmup,
                                                   total=run.total_steps))
        loss = take_step(x, step)
        run.log(loss / 2, lr=lr)                                # Eq. (1), the mean over views
    return run.close()


if __name__ == "__main__":
    train.launch(main, less_memory=f"a smaller --chunk or --batch-size {train.NEW_RUN}",
                 workers=True)
