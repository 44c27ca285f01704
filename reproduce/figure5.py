"""Figure 5: which negatives are sampled, from a checkpoint of moco_v2.py --negatives hard.

    python -m reproduce.figure5 runs/moco_v2-textures-table1-negatives=hard/checkpoint.pt [DATA]

Shows a query, the images in its queue of highest, middle and lowest similarity to it (white: a
random vector), and how often each rank is sampled. DATA is the folder of images on which the run
was trained.
"""

from pathlib import Path

import numpy as np
import torch

import moco_v2
from common import UserError, checkpoint, data, evaluate, train
from common.loss import unit

QUERIES = 256                                   # in the histogram of sampled ranks
CPU = torch.device("cpu")


def images_in_queue(n, settings, step):
    """The index (K,) of the image behind each key of the queue before `step`, out of n images.

    -1 where a slot still holds the random vector that it began with. The order of the images
    depends only on the seed.
    """
    K, batch = settings["K"], settings["batch_size"]
    owner, per_epoch = torch.full((K,), -1), data.steps_per_epoch(n, batch) * batch
    for i in range(max(0, step * batch - K), step * batch):
        epoch, position = divmod(i, per_epoch)
        owner[i % K] = data.permutation(n, settings["seed"], epoch)[position]
    return owner


def read(path, source):
    """`(encoder, checkpoint as a dict, images)` of the file `path` and its data `source`.

    Raises UserError if its negatives were not sampled, or if the images are not those of the run.
    """
    encoder, settings = checkpoint.load_encoder(path)
    saved = checkpoint.read(path, {**checkpoint.CONTENT, "queue": torch.Tensor})
    if settings["negatives"] == "queue":
        raise UserError(f"{path}: uses the whole queue; expected a run of moco_v2.py with "
                        "--negatives hard, hardest or random")
    dataset = data.open_data(source)
    here, there = (len(dataset.train), dataset.hash), (settings["images"], settings["images_hash"])
    if here != there:
        raise UserError(f"{source}: holds different images ({here[0]}) from those of the "
                        f"run ({there[0]})")
    return encoder, saved, dataset.train


def chosen(encoder, saved, images):
    """`(titles, indices)` of images: a query, and hard, semi-hard and easy negatives.

    An index is -1 where the negative is a random vector.
    """
    settings, queue = saved["settings"], saved["queue"]         # (K, D)
    K, owner = len(queue), images_in_queue(len(images), settings, saved["step"])
    outside = set(range(len(images))) - set(owner.tolist())     # images that are not in the queue
    query = min(outside, default=0)
    z = evaluate.features(encoder, images.take(np.array([query])), feature="z", device=CPU,
                          normalisation=settings["normalisation"], size=settings["size"],
                          workers=0)
    cosines, slots = (queue @ unit(z)[0]).sort(descending=True)
    ranks = np.r_[:5, K // 2 - 2:K // 2 + 3, K - 5:K]
    ranks = np.unique(ranks.clip(0, K - 1))                     # without repetition in short queues
    titles = ["query", *(f"rank {rank}\n{cosines[rank]:.2f}" for rank in ranks)]
    return titles, np.append(query, owner[slots[ranks]])


def draw(path, encoder, saved, images):
    """Write the picture `path`."""
    from matplotlib.figure import Figure                        # slow to import
    settings = saved["settings"]
    K, size = settings["K"], settings["size"]
    titles, indices = chosen(encoder, saved, images)
    x, = data.whole(images.take(indices), size=size, batch=len(indices), device=CPU, workers=0)
    x[indices < 0] = 255                                        # (n, 3, size, size)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    row, axis = figure.subplots(2, height_ratios=(1, 2))
    row.imshow(np.hstack(x.permute(0, 2, 3, 1).numpy()))
    row.set_xticks((np.arange(len(indices)) + .5) * size, titles)
    row.set_yticks([])
    cdf = moco_v2.rank_distribution(settings["negatives"], K, settings["skew"],
                                    settings["skew_scale"])
    ranks = moco_v2.draw_ranks(cdf, QUERIES, settings["seed"], saved["step"])
    axis.hist(ranks.flatten().numpy(), min(K, 64), range=(0, K), density=True)
    axis.set(xlabel="rank in the queue, by similarity to the query",
             ylabel=f"frequency, {QUERIES} queries",
             title=f"--negatives {settings['negatives']}, K = {K}")
    figure.savefig(path, dpi=100)


def flags():
    parser = train.Parser("python -m reproduce.figure5", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="folder of images (default: built-in textures)")
    parser.add_argument("--out", metavar="DIR", help="default: the folder of the checkpoint")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "figure5.png", *read(args.checkpoint, args.data))


if __name__ == "__main__":
    train.launch(main)
