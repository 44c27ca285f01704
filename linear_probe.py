"""What the frozen features know: Sec. 2's evaluation, on h = f(x) of an encoder that stays as it is.

So far the quick probe: features once, un-augmented, then a multinomial logistic regression on standardised features,
its penalty chosen on held-out training images; and the weighted kNN beside it. Seconds where the paper's protocol (SGD
on augmented images, Sec. 2) takes its hundred epochs, and its numbers are not that protocol's.

    python linear_probe.py --quick                                   # the newest checkpoint under runs/
    python linear_probe.py DATA --quick --encoder FILE               # FILE is a checkpoint.pt
    python linear_probe.py --quick --encoder random FILE             # beside the untrained encoder

h (N, width) for N images;  hidden (N, width) what the head's first ReLU makes of it;  z (N, D) the head's output.
"""

import json
from pathlib import Path

import torch

from common import data, ddp, evaluate, train
from common.model import load_encoder, read_checkpoint

# the network that `random` is, and the size of its images, for a kind of data
SCALES = {"imagenet": dict(arch="resnet50", size=224), "cifar10": dict(arch="resnet18-3x3", size=32),
          "textures": dict(arch="resnet10", size=32)}


def parse_args(argv=None):
    parser = train.Parser("linear_probe.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="labelled images; without it, the data that the checkpoint names")
    add("--encoder", nargs="+", metavar="FILE", help="checkpoints, or `random`; without it, the newest under runs/")
    add("--quick", action="store_true", required=True, help="the quick probe, the only mode so far")
    add("--feature", choices=("h", "hidden", "z"), default="h")
    add("--arch", metavar="NAME", help="the network of `random` (default: the other encoder's, or the scale's)")
    add("--seed", type=int, default=0, metavar="n")
    add("--workers", type=int, default=data.default_workers(), metavar="n")
    add("--precision", choices=("bf16", "fp32"), default="fp32")
    return parser.parse_args(argv)


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("no checkpoint under runs/: train one (python moco_v2.py), or name one with --encoder")
    train.say(f"encoder: {found[-1]}, the newest under runs/")
    return str(found[-1])


def quick(path, args, arch, dataset, device):
    """kNN and probe of one encoder on `dataset`, percent, as a dict."""
    encoder, settings = load_encoder(path, arch, args.seed)
    encoder.to(device, memory_format=torch.channels_last)
    how = dict(scale=settings.get("scale", dataset.scale), size=settings.get("size", SCALES[dataset.scale]["size"]),
               device=device, workers=args.workers, feature=args.feature, precision=args.precision)
    bank, queries = (evaluate.features(encoder, images, **how) for images in (dataset.train, dataset.test))
    labels, test_labels = dataset.train.labels, dataset.test.labels
    result = dict(encoder=path, feature=args.feature, data=dataset.description, seed=args.seed,
                  knn=evaluate.knn(bank, labels, queries, test_labels),
                  **evaluate.quick_probe(bank, labels, queries, test_labels, args.seed))
    if path != "random" and ddp.rank() == 0:
        folder = Path(path).parent / "probe"
        folder.mkdir(exist_ok=True)
        (folder / f"quick-{args.feature}.json").write_text(json.dumps({**result, **train.machine(device)}, indent=1))
    return result


def main(argv=None):
    args = parse_args(argv)
    device = ddp.init()
    encoders = args.encoder or [newest_checkpoint()]
    saved = next((read_checkpoint(path)["settings"] for path in reversed(encoders) if path != "random"), {})
    dataset = data.open_data(args.data or saved.get("data"))
    train.say(f"data: {dataset.description}")
    if dataset.test is None:
        raise SystemExit(f"{args.data or saved.get('data')}: the probe needs labels, in train/<class>/ and val/<class>/")
    arch = args.arch or saved.get("arch") or SCALES[dataset.scale]["arch"]
    results = [quick(path, args, arch, dataset, device) for path in encoders]
    train.say(f"{'kNN':>8} {'probe':>8}   top-1 in percent, of {args.feature}")
    for r in results:
        train.say(f"{r['knn']:8.2f} {r['top1']:8.2f}   {r['encoder']}  (penalty {r['penalty']:g})")
    train.say(f"top-1 {results[-1]['top1']:.2f} %")
    ddp.close()


if __name__ == "__main__":
    main()
