"""SimCLR: negatives from the batch itself. Sec. 5, Fig. 4 (green).

Of a batch, each image in two views, an image's other view is its positive and all views of the other images are its
negatives (Chen et al. 2020a): K = 2 (M - 1) for M images. Eq. (1) as in moco_v2.py, but no queue and no second encoder:
few negatives is a small batch.

    torchrun --nproc_per_node=8 simclr.py IMAGENET --preset figure4 --batch-size 2048      # K = 4094
    python simclr.py                                     # a laptop: embedded textures, about two minutes
    python simclr.py DATA --batch-size 32768 --chunk 512 # K = 65534 in the memory of 512 images

x1, x2 (N, 3, H, W) two views of N images, of all W processes M = W N;  h = f(x) (N, width);  z = g(h) (N, D), at unit
length after `unit`. All views of all images are kept as (2 M, D), first views first. Batch statistics are over all
images: there are no groups.
"""

import contextlib
import functools
import math

import torch
from torch import nn

from common import augment, data, ddp, evaluate, train
from common.loss import info_nce, unit
from common.model import Encoder, head, resnet, restore

SIMCLR = dict(stack="simclr", normalisation="unit", layers=2, dim=128, crop=(.08, 1.), warmup=None, warmup_epochs=10,
              scaling="sqrt", chunk=None)
# `long` times as many epochs where the paper's run is the longer one, about `looks` kNN accuracies in a run. lr is that of
# the scale's batch; of the released rules .3 N / 256 and .075 sqrt(N) both give 4.8 at 4096.
SCALES = {
    "imagenet": dict(SIMCLR, arch="resnet50", size=224, epochs=100, long=2, batch_size=4096, lr=4.8, weight_decay=1e-4,
                     temperature=.1, jitter=1., blur=True, looks=20),
    "cifar10": dict(SIMCLR, arch="resnet18-3x3", size=32, epochs=200, long=1, batch_size=512, lr=2., weight_decay=1e-4,
                    temperature=.5, jitter=.5, blur=False, looks=20),
    "textures": dict(SIMCLR, arch="resnet10", size=32, epochs=9, long=1, batch_size=64, lr=.5, weight_decay=1e-4,
                     temperature=.2, jitter=.5, blur=False, looks=4, warmup_epochs=1),
}
PRESETS = {  # what differs from the scale, and what the paper shows
    "simclr": dict(paper="none; its Fig. 4 has the curve over K, see figure4"),
    "figure4": dict(long=True, paper="a curve of Fig. 4: 65536 and 4096 alike, 256 far below"),    # a point: --batch-size
}
ROWS = 2 ** 23                                                  # similarities in memory at once in a chunked step


def parse_args(argv=None):
    parser = train.Parser("simclr.py", description=__doc__.split("\n")[0])
    train.add_flags(parser, PRESETS, without=("--bn-group",))
    add = parser.add_argument
    add("--layers", type=int, choices=(2, 3), help="of the projection head g: 2 in the paper of SimCLR, 3 in its code now")
    add("--temperature", type=float, help="of Eq. (1)")
    add("--scaling", choices=("linear", "sqrt"), help="of the learning rate with the batch")
    add("--chunk", type=int, metavar="n", help="embed n images of the batch at a time, for batches larger than memory")
    add("--crop", type=float, nargs=2, metavar=("LO", "HI"), help="share of the image's area")
    add("--jitter", type=float, metavar="S", help="colour jitter (.8 S, .8 S, .8 S, .2 S)")
    add("--blur", action=train.argparse.BooleanOptionalAction, default=None)
    return parser.parse_args(argv)


def check(s, n_images, args):
    """Raise SystemExit with one line if SimCLR's own settings make no sense; say what is legal but odd."""
    train.check(s, n_images, args.max_steps, args.workers)
    train.check_augmentation(s)
    per_process = s.batch_size // ddp.world()
    wrong = [text for bad, text in [
        (s.batch_size < 2, f"--batch-size {s.batch_size}: expected 2 or more; the negatives are the batch's other images"),
        (not s.temperature > 0, f"--temperature {s.temperature:g}: expected more than 0"),
        (s.chunk is not None and s.chunk < 2, f"--chunk {s.chunk}: expected 2 images or more, whose statistics are taken"),
    ] if bad]
    if wrong:
        raise SystemExit(wrong[0])
    if s.chunk and s.batch_size % s.chunk:
        n, c = s.batch_size, chunks(s)
        train.say(f"note: --chunk {s.chunk} does not divide the batch of {n}: {c} chunks of {n // c} to {-(-n // c)} images")
    if s.chunk and per_process % chunks(s) and ddp.world() > 1:
        train.say(f"note: {chunks(s)} chunks do not divide a process's {per_process} images: the batch statistics differ from "
                  "those of one process")


def chunks(s):
    """Into how many parts the batch is embedded."""
    return -(-s.batch_size // min(s.chunk, s.batch_size)) if s.chunk else 1


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes, with what lies between the processes' means.

    What nn.SyncBatchNorm does on GPUs and refuses to do elsewhere, by two means over processes. x is (N, C) or (N, C, H, W).
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or ddp.world() == 1:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        wide, count = x.to(self.running_mean.dtype), x.numel() // x.shape[1] * ddp.world()
        mean = ddp.mean_with_grad(wide.mean(dims))
        variance = ddp.mean_with_grad((wide - mean.view(shape)).square().mean(dims))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


# Sec. 5: the positive pair is an image's two views; the negatives are all other views of the batch.

def nt_xent(z, rows, temperature):
    """Eq. (1) for the views `rows` (n,) of all views z (2 M, D) at unit length, K = 2 (M - 1) negatives each.

    Twice the mean over rows: as released, the sum of the two directions' means.
    """
    partner = (rows + len(z) // 2) % len(z)
    similarity = z[rows] @ z.T                                  # (n, 2 M)
    positive = similarity.gather(1, partner[:, None])[:, 0]     # (n,)
    negatives = similarity.scatter(1, torch.stack([rows, partner], 1), -math.inf)
    return 2 * info_nce(positive, negatives, temperature)


def own_rows(M, device):
    """Which of all 2 M views are this process's: (2 N,)."""
    mine = torch.arange(M, device=device)[ddp.rows(M)]
    return torch.cat([mine, mine + M])


def train_step(embed, optimizer, x1, x2, temperature):
    """One step of SimCLR; returns the loss of this process's N images. `embed` is how the encoder is called."""
    z = unit(embed(torch.cat([x1, x2]))).unflatten(0, (2, -1))                  # (2, N, D)
    z = ddp.all_gather_with_grad(z.transpose(0, 1)).transpose(0, 1).flatten(0, 1)       # (2 M, D)
    loss = nt_xent(z, own_rows(len(z) // 2, z.device), temperature)             # Eq. (1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def chunked_step(encoder, embed, no_sync, optimizer, views, n, parts, temperature):
    """The same step with the memory of a part of the batch; batch statistics are those of a part.

    The embeddings of all parts first, without gradient; then the loss's gradient with respect to them, once, by blocks of
    rows; then each part again, with gradient, to carry it on to the weights. `views(part)` gives x1, x2 of the images
    `part`, a slice of this process's n, the same at both calls. `no_sync` is a context in which gradients stay here.
    """
    # every parts-th image, so that W processes' parts are together those of one process
    part = [slice(i, None, parts) for i in range(parts)]
    z = None
    for i in range(parts):
        average_over(encoder, parts, i)
        with torch.no_grad():
            found = unit(embed(torch.cat(views(part[i])))).unflatten(0, (2, -1))
        z = found.new_empty(2, n, found.shape[2]) if z is None else z
        z[:, part[i]] = found                                   # (2, N, D)
    everyone = ddp.all_gather(z.transpose(0, 1)).transpose(0, 1).flatten(0, 1).requires_grad_()         # (2 M, D)
    rows, loss = own_rows(len(everyone) // 2, z.device), 0.
    for block in rows.split(max(1, ROWS // len(everyone))):
        share = nt_xent(everyone, block, temperature) * len(block) / len(rows)
        share.backward()
        loss += share.detach()
    gradient = ddp.total(everyone.grad)[rows].unflatten(0, (2, -1))             # (2, N, D), of the sum of all losses
    optimizer.zero_grad()
    average_over(encoder, None)
    for i in range(parts):
        with no_sync() if i < parts - 1 else contextlib.nullcontext():
            z = unit(embed(torch.cat(views(part[i])))).unflatten(0, (2, -1))
            (z * gradient[:, part[i]]).sum().backward()
    average_over(encoder, 1)
    optimizer.step()
    return loss


def average_over(encoder, parts, i=0, momentum=.1):
    """Running batch statistics move by the mean over `parts`: the momentum for part i. None: they stay as they are."""
    value = momentum / (parts - momentum * (parts - 1 - i)) if parts else 0.
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = value


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is as long as a share `eta` of each tensor's own length (You et al. 2017).

    As SimCLR releases it: trust = eta |w| / |g + wd w|, 1 where either is 0; the learning rate is inside the momentum;
    biases and batch normalisation (one dimension) have neither weight decay nor trust.
    """

    def __init__(self, params, lr, momentum=.9, weight_decay=0., eta=.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                g = w.grad
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    long, length = w.norm(), g.norm()
                    g = g * torch.where((long > 0) & (length > 0), group["eta"] * long / length, 1)
                state = self.state[w]
                if not state:
                    state["momentum"] = torch.zeros_like(w)
                state["momentum"].mul_(group["momentum"]).add_(g * group["lr"])
                w.sub_(state["momentum"])


def learning_rate(step, *, lr, warmup, total):
    """Linear from 0 over `warmup` steps, then half a cosine down to 0, per step, as released."""
    if step < warmup:
        return lr * step / warmup
    return lr * .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build(s, device, state=None):
    """The encoder and its optimiser: from the seed, or a checkpoint."""
    torch.manual_seed(s.seed)
    norm = nn.SyncBatchNorm if device.type == "cuda" else GlobalBatchNorm
    f = resnet(s.arch, norm=norm)
    for name, parameter in f.named_parameters():                # each residual branch begins as nothing
        if name.endswith("bn3.weight" if hasattr(f.layer1[0], "bn3") else "bn2.weight"):
            nn.init.zeros_(parameter)
    encoder = Encoder(f, head(s.head, f.width, s.dim, norm))
    for layer in encoder.g:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=.01)
    encoder.to(device, memory_format=torch.channels_last)
    optimizer = LARS([p for p in encoder.parameters() if p.requires_grad], s.lr, weight_decay=s.weight_decay)
    if state:
        restore(state, optimizer, f=encoder.f, g=encoder.g)
    return encoder, optimizer


@train.guarded
def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    dataset = data.open_data(args.data)
    train.say(f"data: {dataset.description}; scale {dataset.scale}")
    s, out = train.resolve("simclr", args, SCALES, PRESETS, dataset.scale, named=("batch_size",))
    s.head = f"simclr{s.layers}"
    if s.warmup is None:
        s.warmup = round(min(s.warmup_epochs, s.epochs / 2) * len(dataset.train) / max(1, s.batch_size))
    check(s, len(dataset.train), args)
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), s.batch_size)
    total, K = s.epochs * steps_per_epoch, 2 * (s.batch_size - 1)
    run = train.Run(out, s, total, device, args, chance=math.log(K + 1))
    if run.start == run.total:
        return run.close(run.total, run.knn_line())

    encoder, optimizer = build(s, device, run.state)
    wrapped = ddp.wrap(encoder)
    embed = train.embedder(wrapped, device, s.precision, args.compile)
    no_sync = wrapped.no_sync if ddp.world() > 1 else contextlib.nullcontext
    augmented = augment.Augment(s.stack, augment.jitter_strength(s.jitter), s.blur, s.normalisation).to(device)
    monitor = functools.partial(evaluate.monitor, encoder, dataset, scale=s.normalisation, size=s.size, device=device,
                                workers=args.workers, precision=s.precision)
    run.open(optimizer, f"K = 2 ({s.batch_size} - 1) = {K} negatives", train.paper_says(PRESETS[args.preset]))
    if run.start == 0:
        run.epoch(0, knn=monitor())                             # the untrained encoder, to compare with

    batches = data.views(dataset.train, 2, size=s.size, area=s.crop, batch=s.batch_size, seed=s.seed, start=run.start,
                         stop=run.stop, device=device, workers=args.workers)
    done, mine = run.start, torch.arange(s.batch_size)[ddp.rows(s.batch_size)]
    for step, x, _ in run.timed(batches):
        draws = augmented.draw(2, s.batch_size, s.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, lr=s.lr, warmup=s.warmup, total=run.total)
        if s.chunk:
            loss = chunked_step(encoder, embed, no_sync, optimizer, lambda part: augmented.apply(x[:, part], draws, mine[part]),
                                x.shape[1], chunks(s), s.temperature)
        else:
            x1, x2 = augmented.apply(x, draws, mine)            # (N, 3, H, W) each
            loss = train_step(embed, optimizer, x1, x2, s.temperature)
        done = step + 1
        epoch, inside = divmod(done, steps_per_epoch)
        leave, save = run.stopping(done, not inside)
        run.tell(done, loss / 2, save, epoch=done / steps_per_epoch, lr=lr)      # Eq. (1) of a view
        if save:
            ddp.average_buffers(encoder)
            if not inside:
                run.epoch(epoch, knn=monitor() if epoch % max(1, s.epochs // s.looks) == 0 or done == run.total else None)
            run.save(done, f=encoder.f.state_dict(), g=encoder.g.state_dict(), optimizer=optimizer.state_dict())
        if leave:
            break
    run.close(done, run.knn_line())


if __name__ == "__main__":
    main()
