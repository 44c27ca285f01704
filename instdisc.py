"""Instance discrimination with a memory bank. Sec. 5, Fig. 4 (red).

Every image has a slot in a bank that holds its last features; an image's view is compared with its own slot, the positive,
and with K slots drawn anew for each image, the negatives (Wu et al. 2018). One view, one encoder, no queue.

    torchrun --nproc_per_node=8 instdisc.py IMAGENET --preset figure4 --K 4096
    python instdisc.py                                   # a laptop: embedded textures, about two minutes
    python instdisc.py DATA --loss infonce               # Eq. (1) in place of noise-contrastive estimation

x (N, 3, H, W) one view of N images;  z = g(f(x)) (N, D);  v (N, D) the same at unit length;  memory (n, D) the bank of all
n images;  draws (N, K) the slots that are an image's negatives;  W processes of N images.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from common import augment, data, ddp, evaluate, train
from common.loss import info_nce, unit
from common.model import Encoder, head, resnet, restore

INSTDISC = dict(stack="moco_v1", head="none", dim=128, crop=(.2, 1.), batch_size=256, lr=.03, warmup=0, schedule="steps",
                bn_group=32, loss="nce", K=4096, bank_momentum=.5, proximal=0.)
SCALES = {  # at each the released settings, of InstDisc's ImageNet and CIFAR-10 code, and textures to suit
    "imagenet": dict(INSTDISC, arch="resnet50", size=224, epochs=100, long=2, weight_decay=1e-4, temperature=.07, looks=20),
    "cifar10": dict(INSTDISC, stack="instdisc_cifar10", arch="resnet18-3x3", size=32, epochs=200, long=1, batch_size=128,
                    weight_decay=5e-4, temperature=.1, looks=20),
    # at the released .03 features move further in these short epochs than the bank can follow, and nothing is learned
    "textures": dict(INSTDISC, arch="resnet10", size=32, epochs=18, long=1, batch_size=64, lr=.003, warmup=150,
                     weight_decay=5e-4, K=1024, temperature=.2, looks=4),
}
PRESETS = {  # what differs from the scale, and what the paper shows
    "instdisc": dict(paper="none; its Fig. 4 has the curve over K, see figure4"),
    "figure4": dict(long=True, paper="a curve of Fig. 4, which falls with K"),      # a point: --K
}


def parse_args(argv=None):
    parser = train.Parser("instdisc.py", description=__doc__.split("\n")[0])
    train.add_flags(parser, PRESETS)
    add = parser.add_argument
    add("--loss", choices=LOSSES, help="nce: noise-contrastive, as released; infonce: Eq. (1); softmax: over the whole bank")
    add("--K", type=int, metavar="n", help="negatives drawn per image, with replacement")
    add("--temperature", type=float, help="by which similarities are divided")
    add("--bank-momentum", type=float, metavar="m", help="share of a slot that stays when it is updated")
    add("--proximal", type=float, metavar="w", help="weight of the proximal regularisation, Wu et al. 2018, Eq. (9)")
    add("--crop", type=float, nargs=2, metavar=("LO", "HI"), help="share of the image's area")
    return parser.parse_args(argv)


def check(s, n_images, args):
    """Raise SystemExit with one line if InstDisc's own settings make no sense; say what is legal but odd."""
    train.check(s, n_images, args.max_steps, args.workers)
    train.check_augmentation(s)
    wrong = [text for bad, text in [
        (s.K < 1, f"--K {s.K}: expected 1 negative or more"),
        (not 0 <= s.bank_momentum < 1, f"--bank-momentum {s.bank_momentum:g}: expected 0 <= m < 1"),
        (not s.temperature > 0, f"--temperature {s.temperature:g}: expected more than 0"),
        (not s.proximal >= 0, f"--proximal {s.proximal:g}: expected 0 or more"),
    ] if bad]
    if wrong:
        raise SystemExit(wrong[0])
    if s.K > n_images and s.loss != "softmax":
        train.say(f"note: K = {s.K} of {n_images} images: negatives are drawn with replacement, each several times")


def draw_negatives(n, K, rows, seed, step):
    """Slots (N, K) int64 of n, uniform and with replacement, for the images `rows` (a slice) of the global batch."""
    return torch.from_numpy(np.stack([augment.generator(seed, step, 5, row).integers(n, size=K)
                                      for row in range(rows.start, rows.stop)]))


# Sec. 5: the positive is the image's own slot; the negatives are K others, drawn from the bank.

def nce(positive, negatives, Z, n):
    """Noise-contrastive estimation (Wu et al. 2018, Eqs. 4 to 7), the mean over images.

    `positive` (N,) and `negatives` (N, K) are similarities over the temperature; P = exp(s) / Z, noise is uniform over n
    slots, and h = P / (P + K / n) the probability that a slot is the image's own. -log h of the positive - the sum of
    log(1 - h) of the negatives, by way of log-odds. With P = 1 / n everywhere it is ln(K + 1) + K ln(1 + 1 / K).
    """
    shift = torch.log(Z * negatives.shape[1] / n)
    return (F.softplus(shift - positive) + F.softplus(negatives - shift).sum(1)).mean()


def nce_loss(similarity, index, draws, Z):
    """`nce` of the slots `draws` (N, K). Z (), if still 0, becomes the global batch's mean of exp(s), times n, for good."""
    n = similarity.shape[1]
    positive, negatives = similarity.gather(1, index[:, None]), similarity.gather(1, draws)
    estimate = ddp.mean(torch.cat([positive, negatives], 1).detach().exp().mean()) * n
    Z.copy_(torch.where(Z > 0, Z, estimate))
    return nce(positive[:, 0], negatives, Z, n)


def infonce_loss(similarity, index, draws, Z):
    """Eq. (1). An image's own slot, where it is drawn, is no negative."""
    negatives = similarity.gather(1, draws).masked_fill(draws == index[:, None], -math.inf)
    return info_nce(similarity.gather(1, index[:, None])[:, 0], negatives, 1.)


def softmax_loss(similarity, index, draws, Z):
    """Cross-entropy over the whole bank (Wu et al. 2018, Eq. 2): all other images are negatives."""
    return F.cross_entropy(similarity, index)


LOSSES = {"nce": nce_loss, "infonce": infonce_loss, "softmax": softmax_loss}


@torch.no_grad()
def update_bank(memory, index, v, momentum):
    """memory_i <- unit(momentum memory_i + (1 - momentum) v_i), for the images of all processes, the same on each."""
    index, v = ddp.all_gather(index), ddp.all_gather(v)
    memory[index] = unit(momentum * memory[index] + (1 - momentum) * v).to(memory.dtype)


def train_step(embed, memory, Z, optimizer, x, index, draws, loss_of, temperature, bank_momentum, proximal):
    """One step of InstDisc; returns the loss of this process's N images. Changes the bank in place.

    `index` (N,) are the images' slots, `draws` (N, K) their negatives'. The similarities to all n slots are computed and
    K of them taken, which needs N n + N K numbers where copies of the slots would need N K D.
    """
    v = unit(embed(x))                                          # (N, D)
    similarity = v @ memory.T / temperature                     # (N, n)
    # proximal regularisation holds v near its slot (Wu et al. 2018, Eq. 9); the release has none
    loss = loss_of(similarity, index, draws, Z) + proximal * (v - memory[index]).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_bank(memory, index, v, bank_momentum)
    return loss.detach()


def build(s, n, device, state=None):
    """Encoder, bank (n, D), Z () (0: not known yet), optimiser: from the seed, or a checkpoint.

    Raises SystemExit if the checkpoint is another network's, or its bank of another number of images.
    """
    torch.manual_seed(s.seed)
    f = resnet(s.arch, s.bn_group)
    encoder = Encoder(f, head(s.head, f.width, s.dim)).to(device, memory_format=torch.channels_last)
    memory = ((torch.rand(n, s.dim) * 2 - 1) * math.sqrt(3 / s.dim)).to(device)         # rows of about unit length
    Z = torch.zeros((), device=device)
    optimizer = torch.optim.SGD(encoder.parameters(), s.lr, momentum=.9, weight_decay=s.weight_decay, fused=True)
    if state:
        restore(state, optimizer, f=encoder.f, g=encoder.g, memory=memory, Z=Z)
    return encoder, memory, Z, optimizer


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    dataset = data.open_data(args.data)
    train.say(f"data: {dataset.description}; scale {dataset.scale}")
    s, out = train.resolve("instdisc", args, SCALES, PRESETS, dataset.scale, named=("loss", "K"))
    n = len(dataset.train)
    check(s, n, args)
    steps_per_epoch = data.steps_per_epoch(n, s.batch_size)
    run = train.Run(out, s, s.epochs * steps_per_epoch, device, args,
                    chance={"nce": math.log(s.K + 1) + 1, "infonce": math.log(s.K + 1), "softmax": math.log(n)}[s.loss])
    if run.start == run.total:
        return run.close(run.total, run.knn_line())

    encoder, memory, Z, optimizer = build(s, n, device, run.state)
    embed = train.embedder(ddp.wrap(encoder), device, s.precision, args.compile)
    augmented = augment.Augment(s.stack, (.4, .4, .4, .4), scale=s.scale).to(device)
    learning_rate = functools.partial(train.learning_rate, lr=s.lr, schedule=s.schedule, warmup=s.warmup,
                                      epochs=s.epochs, steps_per_epoch=steps_per_epoch)
    how = dict(scale=s.scale, size=s.size, device=device, workers=args.workers, precision=s.precision)

    def monitor():
        """kNN accuracies in percent: of h, as everywhere, and of z among the bank, as released; None without labels."""
        if dataset.test is None:
            return {"knn": None}
        z = evaluate.features(encoder, dataset.test, feature="z", **how)
        return {"knn": evaluate.monitor(encoder, dataset, **how),
                "bank": evaluate.knn(memory, dataset.train.labels, z, dataset.test.labels, temperature=s.temperature)}

    run.open(optimizer, train.paper_says(PRESETS[args.preset]))
    if run.start == 0:
        run.epoch(0, **monitor())                               # the untrained encoder, to compare with

    batches = data.views(dataset.train, 1, size=s.size, area=s.crop, batch=s.batch_size, seed=s.seed, start=run.start,
                         stop=run.stop, device=device, workers=args.workers)
    done, rows = run.start, ddp.rows(s.batch_size)
    for step, x, index in run.timed(batches):
        x, = augmented(x, s.seed, step, s.batch_size, rows)     # (N, 3, H, W)
        draws = draw_negatives(n, s.K, rows, s.seed, step).to(device) if s.loss != "softmax" else None
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step)
        loss = train_step(embed, memory, Z, optimizer, x, index.to(device), draws, LOSSES[s.loss], s.temperature,
                          s.bank_momentum, s.proximal)
        done = step + 1
        epoch, inside = divmod(done, steps_per_epoch)
        leave, save = run.stopping(done, not inside)
        run.tell(done, loss, save, epoch=done / steps_per_epoch, lr=lr)
        if save:
            ddp.average_buffers(encoder)
            if not inside:
                run.epoch(epoch, **(monitor() if epoch % max(1, s.epochs // s.looks) == 0 or done == run.total else {}))
            run.save(done, f=encoder.f.state_dict(), g=encoder.g.state_dict(), memory=memory, Z=Z,
                     optimizer=optimizer.state_dict())
        if leave:
            break
    run.close(done, run.knn_line())


if __name__ == "__main__":
    main()
