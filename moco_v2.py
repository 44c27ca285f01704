"""MoCo v2, and MoCo v1 as a preset: Sec. 3 (Table 1), Sec. 4 (Table 2), Sec. 5 (Table 3, Figure 4).

A query encoder learns to match two views of an image, Eq. (1), against a queue of K keys of earlier
images. The keys come from a momentum encoder, a slowly moving average of the query encoder (He et
al. 2020; Chen et al. 2020c).

    torchrun --nproc_per_node=8 moco_v2.py IMAGENET     # Table 1, first row: ResNet-50, 100 epochs
    python moco_v2.py                                   # a laptop: built-in images, two minutes
    python moco_v2.py DATA --preset table3a --K 512     # one cell of Table 3; K is its column
    (with torchrun, write --momentum instead of --m, which torchrun takes for a flag of its own)

FAIR reports 53 hours on 8 V100 for 200 epochs of its code; the rows of Table 1 have 100 epochs.

x1, x2 (N, 3, H, W): two views of N images. h = f(x) (N, width). z = g(h) (N, D). q, k (N, D): z of
the query and the momentum encoder at unit length. queue (K, D). W processes of N images each;
groups of --bn-group images share batch statistics. In one process, `ddp.all_gather(x)` is x, and
`ddp.rows(n)` selects all n rows.
"""

import argparse
import copy
import functools
import math

import numpy as np
import torch
from torch import nn

from common import UserError, augment, data, ddp, train
from common.loss import info_nce, unit
from common.model import HEADS, Encoder, head, resnet
from common.run import Run

# The method (Secs. 2, 3, 5): the positive pair is (q, k); the negatives are the queue.


class MoCo(nn.Module):
    """Query encoder, momentum encoder and queue. Only `encoder_q` is trained by gradients."""

    def __init__(self, encoder, K, dim, m, temperature):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", unit(torch.randn(K, dim)))
        self.m, self.temperature = m, temperature
        # The functions that compute z; main replaces them to add autocast, DDP or CUDA graphs.
        self.embed_q, self.embed_k = self.encoder_q.forward, self.encoder_k.forward

    @torch.no_grad()
    def encode_keys(self, x2, permutation):
        """k (W N, D) of all images, in order; x2 (N, 3, H, W) comes from `shuffle`."""
        k = unit(self.embed_k(x2))                              # (N, D)
        return ddp.all_gather(k)[permutation.argsort()]         # undo the shuffle

    @torch.no_grad()
    def momentum_update(self):
        """phi <- m phi + (1 - m) theta (He et al. 2020, Eq. (2)).

        Computed as phi + (1 - m) (theta - phi), which leaves equal parameters exactly equal,
        such as those of a fixed head. The momentum encoder keeps its own batch statistics.
        """
        phi, theta = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(phi, theta, 1 - self.m)

    @torch.no_grad()
    def enqueue(self, k, step):
        """Replace the oldest keys of the queue by k (W N, D): first in, first out.

        The position follows from `step`, so every batch must have the same size. K need not be a
        multiple of it.
        """
        K, batch = len(self.queue), len(k)
        position = (step * batch + torch.arange(batch, device=k.device)) % K
        self.queue[position[-K:]] = k[-K:].to(self.queue.dtype)         # a batch may exceed K


def shuffle(x2, permutation):
    """Shuffling BN (He et al. 2020, Sec. 3.3): the N images that this process encodes as keys.

    Gathers the images x2 (N, ...) of every process and reorders them by `permutation` (W N,). The
    batch statistics of a key then come from different images than those of its query, and do not
    reveal which q and k belong together. They are computed for groups of images, so that shuffling
    has an effect in one process, too.
    """
    return ddp.all_gather(x2)[permutation][ddp.rows(len(permutation))]


def train_step(moco, optimizer, x1, x2, permutation, step, ranks=None):
    """One step of MoCo on N images; returns the loss. Updates encoders, optimizer and queue.

    x1 (N, 3, H, W) are first views; x2 (N, 3, H, W) are second views after `shuffle`. `ranks`
    (N, K) are the ranks of the negatives to use when the keys of the queue are sorted by their
    similarity to the query (0: the most similar one). By default, all keys are used.
    The released code updates the momentum encoder before it computes the keys. Doing it after the
    optimizer step gives the same keys, because both encoders are equal before the first step.
    """
    q = unit(moco.embed_q(x1))                                  # (N, D)
    k = moco.encode_keys(x2, permutation)                       # (W N, D)
    positive = (q * k[ddp.rows(len(k))]).sum(1)                 # (N,), keys of the same images
    negatives = q @ moco.queue.T                                # (N, K)
    if ranks is not None:                       # Sec. 5: sort by similarity, then sample
        negatives = negatives.sort(1, descending=True).values.gather(1, ranks)
    loss = info_nce(positive, negatives, moco.temperature)      # Eq. (1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    moco.momentum_update()
    moco.enqueue(k, step)
    return loss.detach()


def rank_distribution(kind, K, skew, skew_scale):
    """Cumulative distribution (K,) of the ranks of sampled negatives (Sec. 5, Figure 5).

    Rank 0 is the key most similar to the query. `hard`: a skew-normal distribution with shape
    `skew` and scale `skew_scale` K, truncated to the queue: mostly hard and semi-hard keys.
    `hardest`: uniform over the most similar tenth. `random`: uniform. `queue`: returns None, all
    keys are used. The paper gives no parameters; 4 and 1/4 are our choice. Raises UserError if
    almost all of the skew-normal distribution lies outside the queue.
    """
    edges = np.arange(K + 1)
    if kind == "queue":
        return None
    if kind == "hard":
        from scipy.stats import skewnorm                        # slow to import
        cdf = skewnorm.cdf(edges, skew, scale=skew_scale * K)
        if not cdf[-1] - cdf[0] > 1e-6:
            raise UserError(f"--skew {skew:g} --skew-scale {skew_scale:g}: no rank of the queue "
                            "is left to sample; try 4 and .25")
    else:
        cdf = np.minimum(edges / (math.ceil(K / 10) if kind == "hardest" else K), 1.)
    return torch.from_numpy(((cdf[1:] - cdf[0]) / (cdf[-1] - cdf[0])).astype(np.float32))


def draw_ranks(cdf, batch, seed, step):
    """Ranks (N, K) for this process's N images of a global batch, drawn from `cdf` (K,).

    K ranks per image, with replacement, so that the number of negatives stays K.
    """
    u = augment.uniform((batch, len(cdf)), cdf.device, "ranks", seed, step)
    return torch.searchsorted(cdf, u[ddp.rows(batch)], right=True)     # u < 1 = cdf[-1]


# Settings. SCALES has the defaults for each kind of data; a preset, a table's row, changes some.

MOCO_V2 = dict(stack="moco_v2", head="mlp", dim=128, crop=(.2, 1.), jitter=.5, schedule="cosine",
               bn_group=32, negatives="queue", skew=4., skew_scale=.25)
SCALES = {
    "imagenet": dict(MOCO_V2, arch="resnet50", size=224, epochs=100, long_epochs=200,
                     batch_size=256, base_lr=.03, warmup=0, weight_decay=1e-4, K=65536, m=.999,
                     temperature=.2, blur=True, n_evals=20),
    # K, m, temperature and weight decay of FAIR's CIFAR-10 demo
    "cifar10": dict(MOCO_V2, arch="resnet18-3x3", size=32, epochs=200, batch_size=256,
                    base_lr=.03, warmup=0, weight_decay=5e-4, K=4096, m=.99,
                    temperature=.1, blur=False, n_evals=20),
    "textures": dict(MOCO_V2, arch="resnet10", size=32, epochs=12, batch_size=64,
                     base_lr=.03, warmup=150, weight_decay=5e-4, K=1024, m=.99, temperature=.2,
                     blur=False, n_evals=4),
}
PRESETS = {
    "table1": {},                                       # MoCo v2
    "table1a": dict(head="none"),                       # no MLP; the last layer remains
    "table1b": dict(head="fixed"),                      # random and frozen
    "table1c": dict(head="deep"),                       # fc-ReLU-fc-ReLU
    "table1d": dict(head="narrow"),                     # 2048 -> 128
    "table2a-baseline": dict(crop=(.2, 1.)),            # share of the image's area
    "table2a-medium": dict(crop=(.2, .5)),
    "table2a-extreme": dict(crop=(.02, .1)),
    "table2b-eighth": dict(jitter=1 / 8),               # in units of SimCLR's strength
    "table2b-quarter": dict(jitter=1 / 4),
    "table2b-half": dict(jitter=1 / 2),                 # MoCo v2's own strength
    "table2b-full": dict(jitter=1.),
    "table3": dict(long=True),                          # 200 epochs, as in Figure 4
    "table3a": dict(head="none", long=True),
    "table3b": dict(blur=False, long=True),
    "table3c": dict(schedule="steps", long=True),
    "table3d": dict(m=.5, long=True),
    "moco-v1": dict(stack="moco_v1", blur=False, head="none", temperature=.07, schedule="steps",
                    long=True),
    "section7": dict(m=0., long=True),                  # no momentum encoder
    # FAIR's CIFAR-10 demo; it reports a kNN accuracy of z of 82.6 %
    "fair-cifar10": dict(head="none", crop=(.08, 1.), batch_size=512, bn_group=64),
}


def flags():
    parser = train.parser("moco_v2", __doc__, PRESETS)
    add = parser.add_argument
    add("--head", choices=HEADS, help="projection head g (Table 1)")
    add("--K", type=train.COUNT, metavar="n", help="number of negatives in the queue")
    add("--m", "--momentum", type=train.MOMENTUM, help="momentum of the key encoder")
    add("--temperature", type=train.POSITIVE, help="temperature of Eq. (1)")
    add("--crop", type=train.AREA, nargs=2, metavar=("LO", "HI"),
        help="range of the crop's share of the image's area (Table 2 (a))")
    add("--jitter", type=train.STRENGTH, metavar="S",
        help="jitter of brightness, contrast and saturation by .8 S, of hue by .2 S (Table 2 (b))")
    add("--blur", action=argparse.BooleanOptionalAction, help="Gaussian blur")
    add("--schedule", choices=("cosine", "steps"), help="learning rate schedule")
    add("--bn-group", type=train.SEVERAL, metavar="n", help="images that share batch statistics")
    add("--negatives", choices=("queue", "hard", "hardest", "random"),
        help="queue: all keys; the others sample K of them: hard: mostly hard and semi-hard ones; "
        "hardest: from the most similar tenth; random: uniformly")
    add("--skew", type=train.number(float, "a number", math.isfinite), metavar="a",
        help="shape of the skew-normal distribution of --negatives hard")
    add("--skew-scale", type=train.POSITIVE, metavar="w",
        help="scale of the skew-normal distribution, as a share of K")
    return parser


def check(args):
    """Raises UserError if settings do not fit together; prints notes on unusual ones."""
    train.check_batch(args.images, args.batch_size, args.bn_group)
    if args.stack == "moco_v1" and (args.blur or args.jitter != MOCO_V2["jitter"]):
        raise UserError("--preset moco-v1: expected neither --jitter nor --blur; its augmentation "
                        "is fixed")
    if args.K > args.images - args.batch_size:
        ddp.say(f"note: K = {args.K} with {args.images} images: most images have their own old "
                "keys among their negatives")
    if args.bn_group == args.batch_size:
        ddp.say("note: with one group of batch statistics, shuffling BN has no effect; set "
                "--bn-group to half of the batch or less")


def build(args, device):
    """The MoCo module and its optimizer, initialised from the seed."""
    torch.manual_seed(args.seed)
    f = resnet(args.arch, args.bn_group)
    encoder = Encoder(f, head(args.head, f.width, args.dim))
    moco = MoCo(encoder, args.K, encoder.width("z"), args.m, args.temperature)
    moco.to(device, memory_format=torch.channels_last)
    # Without the frozen layer of Table 1 (b), which gets no gradient and no optimizer state.
    trained = [p for p in moco.encoder_q.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=.9, weight_decay=args.weight_decay,
                                fused=True)
    return moco, optimizer


def main(argv=None):
    args, dataset, device = train.begin(flags(), argv, SCALES, PRESETS)
    check(args)
    cdf = rank_distribution(args.negatives, args.K, args.skew, args.skew_scale)
    steps_per_epoch = data.steps_per_epoch(args.images, args.batch_size)
    moco, optimizer = build(args, device)
    jitter = (.4,) * 4 if args.stack == "moco_v1" else augment.jitter_strength(args.jitter)
    augmentation = augment.Augment(args.stack, jitter, args.blur, args.normalisation,
                                   args.seed).to(device)
    run = Run({"f": moco.encoder_q.f, "g": moco.encoder_q.g, "encoder_k": moco.encoder_k,
               "queue": moco.queue, "optimizer": optimizer},
              evaluate=train.monitor(args, dataset, moco.encoder_q, augmentation, device),
              chance_loss=math.log(args.K + 1), **train.run_options(args, steps_per_epoch, device))
    moco.embed_q = train.embedder(ddp.wrap(moco.encoder_q), args, device, args.batch_size)
    moco.embed_k = train.embedder(moco.encoder_k, args, device, args.batch_size)
    learning_rate = functools.partial(
        train.learning_rate, lr=args.lr, schedule=args.schedule, warmup=args.warmup,
        epochs=args.epochs, steps_per_epoch=steps_per_epoch)
    cdf = cdf if cdf is None else cdf.to(device)
    batch, mine = args.batch_size, ddp.rows(args.batch_size)
    for step, x, _ in run.steps(train.views(args, dataset.train, 2, run, device)):
        order = augment.generator("shuffle", args.seed, step).permutation(batch)
        # The second views of this process are those of the images that `shuffle` gives it.
        draws = augmentation.draw(step, batch, views=2, rows=[mine, order[mine]])
        draws = ddp.send({**draws, "permutation": torch.from_numpy(order)}, device)
        permutation = draws.pop("permutation")
        # Second views travel between processes before the augmentation, as uint8.
        x = x[0], shuffle(x[1], permutation)
        x1, x2 = augmentation.transform_views(x, draws)         # (N, 3, H, W) each
        ranks = None if cdf is None else draw_ranks(cdf, batch, args.seed, step)
        lr = train.set_lr(optimizer, learning_rate(step))
        loss = train_step(moco, optimizer, x1, x2, permutation, step, ranks)
        run.log(loss, lr=lr, queue=min(1, (step + 1) * args.batch_size / args.K))
    return run.close()


if __name__ == "__main__":
    train.launch(main, less_memory=f"a smaller --batch-size or --K {train.NEW_RUN}",
                 workers=True)
