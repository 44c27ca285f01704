"""InstDisc: the negatives come from a memory bank. Sec. 5, Figure 4.

A bank holds the latest feature of every image. A view of an image is compared with the image's own
slot, its positive, and with K slots drawn for this image and step, its negatives (Wu et al. 2018).
One view, one encoder, no queue.

    torchrun --nproc_per_node=8 instdisc.py IMAGENET --preset figure4 --K 4096
    python instdisc.py                                  # a laptop: built-in images, three minutes
    python instdisc.py DATA --loss infonce              # Eq. (1) instead of NCE

x (N, 3, H, W): one view of N images. z = g(f(x)) (N, D); v (N, D) is z at unit length. memory
(n, D): the bank of all n images. drawn (N, K): the slots drawn as an image's negatives. W processes
of N images each.
"""

import functools
import math

import torch
import torch.nn.functional as F

from common import augment, data, ddp, evaluate, train
from common.loss import info_nce, unit
from common.model import Encoder, head, resnet
from common.run import Run

# The method (Sec. 5): the positive is the image's own slot; the negatives are K drawn slots.


def draw_negatives(n, K, batch, seed, step, device):
    """K of n slots (N, K) for each image of this process's part of a batch, with replacement."""
    generator = augment.device_generator(device, "slots", seed, step)
    return torch.randint(n, (batch, K), device=device, generator=generator)[ddp.rows(batch)]


def similarities(v, memory, slots):
    """Row i: the dot products of v[i] with the slots `slots[i]` of the bank; (N, S).

    v (N, D), `memory` (n, D), `slots` (N, S). Copying the slots takes N S D numbers. If S D exceeds
    about 2 n, the products with the whole bank are faster.
    """
    if slots.shape[1] * memory.shape[1] < 2 * len(memory):
        return torch.bmm(memory[slots], v[:, :, None])[:, :, 0]
    return (v @ memory.T).gather(1, slots)


def nce(positive, negatives, Z, n):
    """Noise-contrastive estimation (Wu et al. 2018, Eqs. (4) to (7)), the mean over images.

    `positive` (N,) and `negatives` (N, K) are similarities s, divided by the temperature. With
    P = exp(s) / Z and uniform noise over n slots, the probability that a slot is the image's own is
    P / (P + K / n) = sigmoid(s - log(Z K / n)). The loss is the binary cross-entropy: -log of this
    for the positive, and of 1 minus this for each negative, in sum. If P = 1 / n everywhere, it is
    ln(K + 1) + K ln(1 + 1 / K).
    """
    noise = torch.log(Z * negatives.shape[1] / n)
    return -(F.logsigmoid(positive - noise) + F.logsigmoid(noise - negatives).sum(1)).mean()


def nce_loss(v, memory, slots, temperature, Z, step):
    """`nce` of v (N, D): the first of `slots` (N, 1 + K) is the image's own, the others are drawn.

    At step 0, the normalisation constant Z () is estimated, in place, as released: the mean of
    exp(s) over the first global batch, times n.
    """
    s, n = similarities(v, memory, slots) / temperature, len(memory)
    if step == 0:
        Z.copy_(ddp.mean(s.detach().exp().mean()) * n)
    return nce(s[:, 0], s[:, 1:], Z, n)


def infonce_loss(v, memory, slots, temperature, Z, step):
    """Eq. (1). Draws that hit the image's own slot are masked out."""
    s = similarities(v, memory, slots) / temperature
    own = slots[:, 1:] == slots[:, :1]
    return info_nce(s[:, 0], s[:, 1:].masked_fill(own, -math.inf), 1.)


def softmax_loss(v, memory, slots, temperature, Z, step):
    """Cross-entropy over the whole bank (Wu et al. 2018, Eq. (2)): all images are negatives."""
    return F.cross_entropy(v @ memory.T / temperature, slots[:, 0])


LOSSES = {"nce": nce_loss, "infonce": infonce_loss, "softmax": softmax_loss}


@torch.no_grad()
def update_bank(memory, index, v, momentum):
    """memory_i <- unit(momentum memory_i + (1 - momentum) v_i) for the images of all processes."""
    index, v = ddp.all_gather(index), ddp.all_gather(v)
    memory[index] = unit(momentum * memory[index] + (1 - momentum) * v).to(memory.dtype)


def train_step(embed, memory, Z, optimizer, x, index, drawn, step, loss_of, temperature,
               bank_momentum, proximal):
    """One step of InstDisc on N images; returns the loss. Updates the bank in place.

    `index` (N,) are the slots of the images, `drawn` (N, K) those of their negatives.
    """
    v = unit(embed(x))                                          # (N, D)
    slots = torch.cat([index[:, None], drawn], dim=1)           # (N, 1 + K)
    loss = loss_of(v, memory, slots, temperature, Z, step)
    # Proximal regularisation (Wu et al. 2018, Eq. (9)); the released code has none.
    loss = loss + proximal * (v - memory[index]).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_bank(memory, index, v, bank_momentum)
    return loss.detach()


# Settings, mostly those of InstDisc's released code for ImageNet and CIFAR-10 (docs/choices.md).

INSTDISC = dict(stack="moco_v1", head="none", dim=128, crop=(.2, 1.), batch_size=256, base_lr=.03,
                warmup=0, schedule="steps", bn_group=32, loss="nce", K=4096, bank_momentum=.5,
                proximal=0., n_evals=20)
SCALES = {
    "imagenet": dict(INSTDISC, arch="resnet50", size=224, epochs=100, long_epochs=200,
                     weight_decay=1e-4, temperature=.07),
    "cifar10": dict(INSTDISC, stack="instdisc_cifar10", arch="resnet18-3x3", size=32, epochs=200,
                    batch_size=128, weight_decay=5e-4, temperature=.1),
    # With the released learning rate of .03 nothing is learned here: an epoch has 156 steps, and
    # features change faster than the bank is updated.
    "textures": dict(INSTDISC, arch="resnet10", size=32, epochs=24, batch_size=64,
                     base_lr=.003, warmup=150, weight_decay=5e-4, K=1024, temperature=.2,
                     n_evals=4),
}
PRESETS = {
    "instdisc": {},
    "figure4": dict(long=True),                 # a point of the curve: --K
}


def flags():
    parser = train.parser("instdisc", __doc__, PRESETS)
    add = parser.add_argument
    add("--loss", choices=LOSSES, help="nce: noise-contrastive estimation, as released; infonce: "
        "Eq. (1); softmax: cross-entropy over the whole bank")
    add("--K", type=train.COUNT, metavar="n", help="negatives drawn for each image")
    add("--temperature", type=train.POSITIVE, help="temperature that divides the similarities")
    add("--bank-momentum", type=train.MOMENTUM, metavar="m", help="momentum of the bank's slots")
    add("--proximal", type=train.NON_NEGATIVE, metavar="w",
        help="weight of the proximal regularisation (Wu et al. 2018, Eq. (9))")
    add("--crop", type=train.AREA, nargs=2, metavar=("LO", "HI"),
        help="range of the crop's share of the image's area")
    add("--bn-group", type=train.SEVERAL, metavar="n", help="images that share batch statistics")
    return parser


def check(args):
    """Raises UserError if settings do not fit together; prints notes on unusual ones."""
    train.check_batch(args.images, args.batch_size, args.bn_group)
    if args.K > args.images and args.loss != "softmax":
        ddp.say(f"note: K = {args.K} with {args.images} images: slots are drawn several times")


def build(args, device):
    """Encoder, bank (n, D), Z () and optimizer, from the seed; step 0 estimates Z for NCE."""
    torch.manual_seed(args.seed)
    f = resnet(args.arch, args.bn_group)
    encoder = Encoder(f, head(args.head, f.width, args.dim))
    encoder.to(device, memory_format=torch.channels_last)
    bound = math.sqrt(3 / args.dim)                             # rows of about unit length
    memory = (torch.rand(args.images, args.dim) * 2 - 1) * bound
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=.9,
                                weight_decay=args.weight_decay, fused=True)
    return encoder, memory.to(device), torch.zeros((), device=device), optimizer


def chance_loss(args):
    """The loss if all similarities are equal."""
    if args.loss == "softmax":
        return math.log(args.images)
    return math.log(args.K + 1) + (args.loss == "nce")


def main(argv=None):
    args, dataset, device = train.begin(flags(), argv, SCALES, PRESETS)
    check(args)
    n, steps_per_epoch = args.images, data.steps_per_epoch(args.images, args.batch_size)
    encoder, memory, Z, optimizer = build(args, device)
    augmentation = augment.Augment(args.stack, (.4, .4, .4, .4), normalisation=args.normalisation,
                                   seed=args.seed).to(device)
    options = train.feature_options(args, device)
    signals = train.monitor(args, dataset, encoder, augmentation, device)

    def monitor():
        """`train.monitor`, and `bank_knn`, the kNN accuracy of z in the bank, in percent."""
        found = signals()
        if dataset.test:
            z = evaluate.features(encoder, dataset.test, feature="z", **options)
            found["bank_knn"] = evaluate.knn(memory, dataset.train.labels, z, dataset.test.labels,
                                             temperature=args.temperature)
        return found

    run = Run({"f": encoder.f, "g": encoder.g, "memory": memory, "Z": Z, "optimizer": optimizer},
              evaluate=monitor, chance_loss=chance_loss(args),
              **train.run_options(args, steps_per_epoch, device))
    embed = train.embedder(ddp.wrap(encoder), args, device, args.batch_size)
    learning_rate = functools.partial(
        train.learning_rate, lr=args.lr, schedule=args.schedule, warmup=args.warmup,
        epochs=args.epochs, steps_per_epoch=steps_per_epoch)
    batches = train.views(args, dataset.train, 1, run, device)
    n_draws = 0 if args.loss == "softmax" else args.K           # softmax needs no draws
    for step, x, index in run.steps(batches):
        x, = augmentation(x, step)                              # (N, 3, H, W)
        drawn = draw_negatives(n, n_draws, args.batch_size, args.seed, step, device)
        lr = train.set_lr(optimizer, learning_rate(step))
        loss = train_step(embed, memory, Z, optimizer, x, index, drawn, step, LOSSES[args.loss],
                          args.temperature, args.bank_momentum, args.proximal)
        run.log(loss, lr=lr)
    return run.close()


if __name__ == "__main__":
    train.launch(main, less_memory=f"a smaller --batch-size or --K {train.NEW_RUN}",
                 workers=True)
