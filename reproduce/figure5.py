"""Figure 5: which negatives are sampled, from a checkpoint of moco_v2.py --negatives hard.

    python -m reproduce.figure5 runs/moco_v2-textures-table1-negatives=hard/checkpoint.pt [DATA]

Shows a query, the images in its queue that are most, averagely and least similar to it, and how
often each rank is sampled. DATA is the folder of images on which the run was trained.
"""

import math
from pathlib import Path

import numpy as np
import torch

import moco_v2
from common import UserError, checkpoint, data, evaluate, train
from common.loss import unit

QUERIES = 256                                   # whose sampled ranks are counted
CPU = torch.device("cpu")


def images_in_queue(n, settings, step):
    """The index (K,) of the image behind each key of the queue before `step`, out of n images.

    -1 where a slot still holds the random vector that it began with. The order of the images
    depends only on the seed.
    """
    K, batch = settings["K"], settings["batch_size"]
    owner, per_epoch = torch.full((K,), -1), data.steps_per_epoch(n, batch)
    for t in range(max(0, step - math.ceil(K / batch)), step):
        epoch, i = divmod(t, per_epoch)
        order = data.permutation(n, settings["seed"], epoch)
        index = torch.from_numpy(order[i * batch:(i + 1) * batch])
        position = (t * batch + torch.arange(batch)) % K
        owner[position[-K:]] = index[-K:]
    return owner


def read(path, source):
    """`(encoder, queue (K, D), settings, step, images)` of a checkpoint and its data `source`.

    Raises UserError if its negatives were not sampled, or if the images are not those of the run.
    """
    encoder, settings = checkpoint.load_encoder(path)
    saved = checkpoint.read(path, {**checkpoint.CONTENT, "queue": torch.Tensor})
    if settings["negatives"] == "queue":
        raise UserError(f"{path}: uses the whole queue; expected a run of moco_v2.py with "
                        "--negatives hard, hardest or random")
    dataset = data.open_data(source)
    if len(dataset.train) != settings["images"]:
        raise UserError(f"{source}: {len(dataset.train)} images; the run had {settings['images']}")
    return encoder, saved["queue"], settings, saved["step"], dataset.train


def chosen(encoder, queue, settings, step, images):
    """[(title, index of an image or -1)]: a query, and hard, semi-hard and easy negatives."""
    K, owner = len(queue), images_in_queue(len(images), settings, step)
    fresh = np.setdiff1d(np.arange(len(images)), owner)         # images that are not in the queue
    query = int(fresh[0]) if len(fresh) else 0
    z = evaluate.features(encoder, images.take(np.array([query])), feature="z", device=CPU,
                          normalisation=settings["normalisation"], size=settings["size"],
                          workers=0)
    cosines, slots = (queue @ unit(z)[0]).sort(descending=True)
    ranks = [*range(5), *range(K // 2 - 2, K // 2 + 3), *range(K - 5, K)]
    ranks = np.unique(np.clip(ranks, 0, K - 1))                 # without repetition in short queues
    return [("query", query)] + [
        (f"rank {rank}\n{cosines[rank]:.2f}", int(owner[slots[rank]])) for rank in ranks]


def draw(path, encoder, queue, settings, step, images):
    """Write the picture `path`."""
    from matplotlib.figure import Figure                        # slow to import
    panels = chosen(encoder, queue, settings, step, images)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=(1, 1.8))
    for column, (title, index) in enumerate(panels):
        axis = figure.add_subplot(grid[0, column])
        axis.set_title(title, fontsize=8)
        axis.axis("off")
        axis.set_box_aspect(1)
        if index < 0:
            axis.text(.5, .5, "random\nvector", ha="center", va="center", fontsize=8)
            continue
        x, = data.whole(images.take(np.array([index])), size=settings["size"], batch=1, device=CPU,
                        workers=0)
        axis.imshow(x[0].permute(1, 2, 0).numpy())
    K, axis = len(queue), figure.add_subplot(grid[1, :])
    F = moco_v2.rank_distribution(settings["negatives"], K, settings["skew"],
                                  settings["skew_scale"])
    ranks = moco_v2.draw_ranks(F, QUERIES, settings["seed"], step)
    edges = np.linspace(0, K, min(K, 64) + 1).astype(int)
    axis.hist(ranks.flatten().numpy(), edges, density=True, color="#56B4E9",
              label=f"sampled for {QUERIES} queries")
    axis.plot(np.arange(K) + .5, np.diff(F.numpy(), prepend=0), color="#D55E00", label="expected")
    axis.set(xlabel="rank in the queue, by similarity to the query", xlim=(0, K),
             ylabel="probability of a rank", title=f"--negatives {settings['negatives']}, K = {K}")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def flags():
    parser = train.Parser("python -m reproduce.figure5", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="folder of images (default: embedded textures)")
    parser.add_argument("--out", metavar="DIR", help="default: the folder of the checkpoint")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "figure5.png", *read(args.checkpoint, args.data))


if __name__ == "__main__":
    train.launch(main)
