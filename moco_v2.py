"""MoCo v2, and MoCo v1 as a preset: Sec. 3 (Table 1), Sec. 4 (Table 2), Sec. 5 (Table 3, Fig. 4).

A query encoder is trained by Eq. (1) to tell the other view of its image from a queue of K keys of earlier images,
which a slowly following copy of it, the momentum encoder, has made (He et al. 2020; Chen et al. 2020c).

    torchrun --nproc_per_node=8 moco_v2.py IMAGENET      # Table 1's first row: 100 epochs of ResNet-50
    python moco_v2.py                                    # a laptop: embedded textures, about two minutes
    python moco_v2.py DATA --preset table3a --K 512      # one cell of one table; K is a column of Table 3
    (under torchrun write --momentum for --m, which torchrun would take for one of its own)

x1, x2 (N, 3, H, W) two views of N images;  h = f(x) (N, width);  z = g(h) (N, D);  q, k (N, D) the z of the query and
the momentum encoder at unit length;  queue (K, D);  W processes of N images, groups of --bn-group images share
batch statistics. The paper's number for each row stands in PRESETS; none of them is ours.
"""

import copy
import functools
import math

import numpy as np
import torch

from common import augment, data, ddp, evaluate, train
from common.loss import info_nce, unit
from common.model import HEADS, Encoder, head, resnet, restore

MOCO_V2 = dict(stack="moco_v2", head="mlp", dim=128, crop=(.2, 1.), jitter=.5, schedule="cosine", bn_group=32,
               negatives="queue", skew=4., skew_scale=.25)
# A scale belongs to the kind of data; at each, the baseline is the paper's MoCo v2, with K, m, temperature and blur to suit
# small images (for cifar10 those of FAIR's demo). `long` times as many epochs where the paper's run is the longer one,
# about `looks` kNN accuracies in a run.
SCALES = {
    "imagenet": dict(MOCO_V2, arch="resnet50", size=224, epochs=100, long=2, batch_size=256, lr=.03, warmup=0,
                     weight_decay=1e-4, K=65536, m=.999, temperature=.2, blur=True, looks=20),
    "cifar10": dict(MOCO_V2, arch="resnet18-3x3", size=32, epochs=200, long=1, batch_size=256, lr=.03, warmup=0,
                    weight_decay=5e-4, K=4096, m=.99, temperature=.1, blur=False, looks=20),
    "textures": dict(MOCO_V2, arch="resnet10", size=32, epochs=9, long=1, batch_size=64, lr=.03, warmup=150,
                     weight_decay=5e-4, K=1024, m=.99, temperature=.2, blur=False, looks=4),
}
PRESETS = {  # a row of a table: what differs from the baseline, and the paper's ImageNet top-1 in percent (K = 512, 65536)
    "table1": dict(paper=64.4),
    "table1a": dict(head="none", paper=59.2),                 # without projection head
    "table1b": dict(head="fixed", paper=62.9),                # random and frozen
    "table1c": dict(head="deep", paper=63.9),                 # fc-ReLU-fc-ReLU
    "table1d": dict(head="narrow", paper=62.2),               # 2048 -> 128
    "table2a-baseline": dict(crop=(.2, 1.), paper=64.4),      # share of the image's area
    "table2a-medium": dict(crop=(.2, .5), paper=63.7),
    "table2a-extreme": dict(crop=(.02, .1), paper=47.1),
    "table2b-eighth": dict(jitter=1 / 8, paper=63.1),         # in units of SimCLR's strength, of which MoCo v2 has half
    "table2b-quarter": dict(jitter=1 / 4, paper=63.9),
    "table2b-half": dict(jitter=1 / 2, paper=64.2),
    "table2b-full": dict(jitter=1., paper=64.3),
    "table3": dict(long=True, paper=(67.3, 67.5)),
    "table3a": dict(head="none", long=True, paper=(61.7, 63.6)),
    "table3b": dict(blur=False, long=True, paper=(65.5, 66.4)),
    "table3c": dict(schedule="steps", long=True, paper=(67.2, 67.3)),
    "table3d": dict(m=.5, long=True, paper=(59.8, 64.5)),
    "moco-v1": dict(stack="moco_v1", head="none", temperature=.07, schedule="steps", long=True, paper="a curve of Fig. 4"),
    "section7": dict(m=0., long=True, paper="cannot converge"),  # no momentum encoder: the key encoder is the query's
    "fair-cifar10": dict(head="none", crop=(.08, 1.), batch_size=512, lr=.06, bn_group=64,
                         paper="none; FAIR's CIFAR-10 demo reports kNN 82.6 of z"),
}


def parse_args(argv=None):
    parser = train.Parser("moco_v2.py", description=__doc__.split("\n")[0])
    train.add_flags(parser, PRESETS)
    add = parser.add_argument
    add("--head", choices=HEADS, help="projection head g, Table 1")
    add("--K", type=int, metavar="n", help="negatives in the queue")
    add("--m", "--momentum", type=float, dest="m", help="momentum of the key encoder; under torchrun write --momentum")
    add("--temperature", type=float, help="of Eq. (1)")
    add("--crop", type=float, nargs=2, metavar=("LO", "HI"), help="share of the image's area, Table 2 (a)")
    add("--jitter", type=float, metavar="S", help="colour jitter (.8 S, .8 S, .8 S, .2 S), Table 2 (b)")
    add("--blur", action=train.argparse.BooleanOptionalAction, default=None)
    add("--schedule", choices=("cosine", "steps"))
    add("--negatives", choices=NEGATIVES, help="the queue as it is; K draws by similarity, hard and semi-hard ones "
        "more often (Fig. 5); K from the hardest tenth; K at random")
    add("--skew", type=float, metavar="a", help="shape of the skew-normal that --negatives hard draws ranks from")
    add("--skew-scale", type=float, metavar="w", help="its scale, as a share of the queue")
    return parser.parse_args(argv)


NEGATIVES = ("queue", "hard", "hardest", "random")


def check(s, n_images, args):
    """Raise SystemExit with one line if MoCo's own settings make no sense; say what is legal but odd."""
    train.check(s, n_images, args.max_steps, args.workers)
    train.check_augmentation(s)
    wrong = [text for bad, text in [
        (s.K < 1, f"--K {s.K}: expected 1 negative or more"),
        (not 0 <= s.m < 1, f"--m {s.m:g}: expected 0 <= m < 1"),
        (not s.temperature > 0, f"--temperature {s.temperature:g}: expected more than 0"),
        (not s.skew_scale > 0, f"--skew-scale {s.skew_scale:g}: expected more than 0"),
        (not math.isfinite(s.skew), f"--skew {s.skew:g}: expected a number"),
    ] if bad]
    if wrong:
        raise SystemExit(wrong[0])
    rank_distribution(s.negatives, s.K, s.skew, s.skew_scale)
    if s.K > n_images - s.batch_size:
        train.say(f"note: K = {s.K} of {n_images} images: most images have their own old keys among their negatives")
    if s.bn_group == s.batch_size:
        train.say("note: one group of batch statistics: shuffling BN changes nothing; --bn-group of half the batch gives two")


# Sec. 2: the positive pair is (q, k); the negatives are the queue.

def encode_keys(embed_k, x2, permutation):
    """k (W N, D) of all processes' x2 (N, 3, H, W), at unit length, in the images' order, by the momentum encoder.

    Shuffling BN: the global batch goes through in the order of `permutation` (W N,), so that a key's batch statistics
    are over other images than its query's; otherwise they would tell which pairs belong together (He et al. 2020,
    Sec. 3.3). Groups, not processes, share statistics, so it does its work in one process too.
    """
    shuffled = ddp.all_gather(x2)[permutation][ddp.rows(len(permutation))]
    with torch.no_grad():
        k = unit(embed_k(shuffled.contiguous(memory_format=torch.channels_last)))
    return ddp.all_gather(k)[permutation.argsort()]


@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """phi <- m phi + (1 - m) theta, for what is trained; He et al. 2020, Eq. (2). Batch statistics are phi's own.

    As phi + (1 - m)(theta - phi), which leaves equal parameters equal to the bit.
    """
    pairs = [(p, q) for p, q in zip(encoder_k.parameters(), encoder_q.parameters()) if q.requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - m)


def enqueue(queue, k, step):
    """Overwrite the oldest of the queue's K keys with the batch's. First in, first out; the place follows from `step`.

    K need be no multiple of the batch; of a batch larger than K the newest K stay.
    """
    K, batch = len(queue), len(k)
    place = (step * batch + torch.arange(batch, device=queue.device)) % K
    queue[place[-K:]] = k[-K:].to(queue.dtype)


def rank_distribution(kind, K, skew, scale):
    """Sec. 5, Fig. 5: F (K,) float32, the probability that a drawn negative is among the queue's r + 1 most similar keys.

    `hard` is a skew-normal of shape `skew` and scale `scale` K, cut to the queue: hard and semi-hard keys often, easy ones
    now and then. `hardest` is uniform over the most similar tenth, `random` over all; None for the whole `queue` as it
    is. The paper gives no numbers: 4 and 1/4 are ours. Raises SystemExit if the cut leaves nothing.
    """
    edges = np.arange(K + 1)
    if kind == "queue":
        return None
    if kind == "hard":
        from scipy.stats import skewnorm                        # here: it takes a second to import
        F = skewnorm.cdf(edges, skew, scale=scale * K)
        if not F[-1] - F[0] > 1e-6:
            raise SystemExit(f"--skew {skew:g} --skew-scale {scale:g}: leave no rank of the queue to draw; try 4 and .25")
    else:
        F = np.minimum(edges / (math.ceil(K / 10) if kind == "hardest" else K), 1.)
    return torch.from_numpy(((F[1:] - F[0]) / (F[-1] - F[0])).astype(np.float32))


def draw_ranks(F, rows, seed, step):
    """K ranks (N, K) for each of the images `rows` (a slice) of the global batch, with replacement, distributed as F (K,)."""
    u = np.stack([augment.generator(seed, step, 5, row).random(len(F), np.float32) for row in range(rows.start, rows.stop)])
    return torch.searchsorted(F, torch.from_numpy(u).to(F.device), right=True).clamp_(max=len(F) - 1)


@torch.no_grad()
def log_counts(negatives, ranks):
    """How often each of `negatives` (N, K) is drawn, by its rank in its row, the largest first: log counts (N, K).

    Drawing with replacement only sets how often an exponential counts in Eq. (1), so the log of it, added to the similarity
    over the temperature, is the loss of the drawn ones; -inf where a key is not drawn.
    """
    count = torch.zeros_like(negatives).scatter_add_(1, ranks, torch.ones_like(negatives))
    order = negatives.argsort(1, descending=True)
    return torch.empty_like(negatives).scatter_(1, order, count.log_())


def images_in_queue(n, s, step):
    """The image (K,) behind each slot of the queue before `step`, of n: the order of images is a function of the seed."""
    owner, per_epoch = torch.full((s.K,), -1), data.steps_per_epoch(n, s.batch_size)
    for t in range(max(0, step - math.ceil(s.K / s.batch_size)), step):
        epoch, i = divmod(t, per_epoch)
        order = augment.generator(s.seed, epoch, 0).permutation(n)
        enqueue(owner, torch.from_numpy(order[i * s.batch_size:(i + 1) * s.batch_size]), t)
    return owner


def draw_figure5(path, encoder_q, queue, F, images, s, step, device):
    """Like Fig. 5: a query, images from the top, the middle and the end of its queue, and how often each rank is drawn."""
    from matplotlib.figure import Figure                        # here: it takes a while to import
    owner = images_in_queue(len(images), s, step)
    how = dict(size=s.size, device=device, workers=0)

    def picture(i):
        return next(data.whole(images, batch=1, rows=slice(i, i + 1), **how))[0].permute(1, 2, 0).cpu()
    query = int(set(range(len(images))).difference(owner.tolist()).pop()) if len(images) > s.K else 0
    one = data.Images(pixels=picture(query).permute(2, 0, 1)[None])
    q = unit(evaluate.features(encoder_q, one, scale=s.scale, batch=1, feature="z", **how))[0]
    similarity, order = (queue @ q).sort(descending=True)
    middle = s.K // 2
    shown = [r for start in (0, middle - 2, s.K - 5) for r in range(max(0, start), max(0, start) + min(5, s.K))]
    counts = torch.bincount(draw_ranks(F, slice(0, 256), s.seed, step).flatten(), minlength=s.K).double() / 256
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 1 + len(shown), height_ratios=(1, 1.8))
    for column, rank in enumerate([None, *shown]):
        axis = figure.add_subplot(grid[0, column])
        index = query if rank is None else int(owner[order[rank]])
        if index >= 0:                                          # a slot may still hold the random vector it began with
            axis.imshow(picture(index).numpy())
        axis.set_title("query" if rank is None else f"rank {rank}\n{similarity[rank]:.2f}", fontsize=8)
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    bins = np.linspace(0, s.K, min(s.K, 64) + 1).astype(int)
    heights = [counts[a:b].mean().item() for a, b in zip(bins, bins[1:])]
    axis.bar(bins[:-1], heights, np.diff(bins), align="edge", color="#56B4E9",
             label="drawn, mean of 256 queries")
    axis.plot(np.arange(s.K) + .5, s.K * np.diff(F.cpu().numpy(), prepend=0), color="#D55E00", label="expected")
    axis.set(xlabel="rank in the queue, by similarity to the query", ylabel="times drawn per query", xlim=(0, s.K))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle(f"--negatives {s.negatives}: K = {s.K} draws; above, ranks and cosines to the query", fontsize=10)
    figure.savefig(path, dpi=100)


def train_step(encoder_q, encoder_k, embed_q, embed_k, queue, optimizer, x1, x2, permutation, step, m, temperature,
               ranks=None):
    """One step of MoCo; returns the loss of this process's N images. Changes encoders, optimizer and queue in place.

    `ranks` (N, K), if given, are the negatives' among the queue by similarity; else all are used, each once.
    `embed_q`, `embed_k` are how the encoders are called (autocast, compiled, under DDP); the rest is the method. The
    key encoder starts equal to the query's and follows after each step: the keys equal those of the released order,
    which follows before (its first update changes nothing).
    """
    q = unit(embed_q(x1))                                       # (N, D)
    k = encode_keys(embed_k, x2, permutation)                   # (W N, D)
    positive = (q * k[ddp.rows(len(k))]).sum(1)                 # (N,)
    negatives = q @ queue.T                                     # (N, K)
    if ranks is not None:
        negatives = negatives + temperature * log_counts(negatives, ranks)
    loss = info_nce(positive, negatives, temperature)           # Eq. (1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    momentum_update(encoder_q, encoder_k, m)
    enqueue(queue, k, step)
    return loss.detach()


def build(s, device, state=None):
    """encoder_q, encoder_k (equal), queue (K, D) of random unit vectors, optimiser: from the seed, or a checkpoint."""
    torch.manual_seed(s.seed)
    f = resnet(s.arch, s.bn_group)
    encoder_q = Encoder(f, head(s.head, f.width, s.dim)).to(device, memory_format=torch.channels_last)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    queue = unit(torch.randn(s.K, f.width if s.head == "identity" else s.dim)).to(device)
    # weight decay on everything that is trained, as released; what is frozen must stay out of the optimiser
    optimizer = torch.optim.SGD([p for p in encoder_q.parameters() if p.requires_grad], s.lr, momentum=.9,
                                weight_decay=s.weight_decay, fused=True)
    if state:
        restore(state, optimizer, f=encoder_q.f, g=encoder_q.g, encoder_k=encoder_k, queue=queue)
    return encoder_q, encoder_k, queue, optimizer


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    dataset = data.open_data(args.data)
    train.say(f"data: {dataset.description}; scale {dataset.scale}")
    s, out = train.resolve("moco_v2", args, SCALES, PRESETS, dataset.scale, named=("negatives", "K"))
    check(s, len(dataset.train), args)
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), s.batch_size)
    run = train.Run(out, s, s.epochs * steps_per_epoch, device, args, chance=math.log(s.K + 1))
    if run.start == run.total:
        return run.close(run.total, run.knn_line())

    encoder_q, encoder_k, queue, optimizer = build(s, device, run.state)
    embed_q = train.embedder(ddp.wrap(encoder_q), device, s.precision, args.compile)
    embed_k = train.embedder(encoder_k, device, s.precision, args.compile)
    jitter = (.4, .4, .4, .4) if s.stack == "moco_v1" else augment.jitter_strength(s.jitter)
    augmented = augment.Augment(s.stack, jitter, s.blur, s.scale).to(device)
    learning_rate = functools.partial(train.learning_rate, lr=s.lr, schedule=s.schedule, warmup=s.warmup,
                                      epochs=s.epochs, steps_per_epoch=steps_per_epoch)
    monitor = functools.partial(evaluate.monitor, encoder_q, dataset, scale=s.scale, size=s.size, device=device,
                                workers=args.workers, precision=s.precision)
    F = rank_distribution(s.negatives, s.K, s.skew, s.skew_scale)
    rows, F = ddp.rows(s.batch_size), F if F is None else F.to(device)
    run.open(optimizer, train.paper_says(PRESETS[args.preset]))
    if run.start == 0:
        run.epoch(0, knn=monitor())                             # the untrained encoder, to compare with

    batches = data.views(dataset.train, 2, size=s.size, area=s.crop, batch=s.batch_size, seed=s.seed, start=run.start,
                         stop=run.stop, device=device, workers=args.workers)
    done = run.start
    for step, x, _ in run.timed(batches):
        x1, x2 = augmented(x, s.seed, step, s.batch_size, rows)                 # (N, 3, H, W) each
        permutation = torch.from_numpy(augment.generator(s.seed, step, 4).permutation(s.batch_size)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step)
        loss = train_step(encoder_q, encoder_k, embed_q, embed_k, queue, optimizer, x1, x2, permutation, step, s.m,
                          s.temperature, None if F is None else draw_ranks(F, rows, s.seed, step))
        done = step + 1
        epoch, inside = divmod(done, steps_per_epoch)
        leave, save = run.stopping(done, not inside)
        run.tell(done, loss, save, epoch=done / steps_per_epoch, lr=lr, queue=min(1, done * s.batch_size / s.K))
        if save:
            ddp.average_buffers(encoder_q)
            ddp.average_buffers(encoder_k)
            if not inside:
                run.epoch(epoch, knn=monitor() if epoch % max(1, s.epochs // s.looks) == 0 or done == run.total else None)
            if done == run.total and F is not None and not ddp.rank():
                draw_figure5(run.out / "figure5.png", encoder_q, queue, F, dataset.train, s, done, device)
            run.save(done, f=encoder_q.f.state_dict(), g=encoder_q.g.state_dict(), encoder_k=encoder_k.state_dict(),
                     queue=queue, optimizer=optimizer.state_dict())
        if leave:
            break
    run.close(done, run.knn_line())


if __name__ == "__main__":
    main()
