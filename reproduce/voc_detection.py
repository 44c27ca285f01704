"""Detection transfer to PASCAL VOC: Sec. 5's check that AP does not depend on K.

Fine-tunes the encoder f in Faster R-CNN with a C4 backbone, as in He et al. (2020, Sec. 4.2), on
VOC2007 and VOC2012 trainval. AP, AP50 and AP75 are those of VOC2007 test by the 11-point metric.

    torchrun --nproc_per_node=8 -m reproduce.voc_detection VOCDEVKIT --encoder FILE
    python -m reproduce.voc_detection --encoder FILE            # a laptop: synthetic scenes
    python -m reproduce.voc_detection --encoder random          # without pre-training

Settings are those of FAIR's configuration for detectron2. Differences: anchors have whole pixels;
images are padded to multiples of 16 pixels; a batch may hold portrait and landscape images; batch
statistics are those of all images, whereas naiveSyncBN gives each process the same weight; classes
without objects in the test images are left out of the mean. Everything is computed in fp32.

x (N, 3, H, W): padded images. h (n, width): layer4 of n regions, pooled. Boxes: see voc.py.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import _utils, faster_rcnn, roi_heads, rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import RoIAlign

from common import UserError, augment, data, ddp, train
from common.checkpoint import load_encoder
from common.layers import GlobalBatchNorm
from common.model import resnet
from common.run import Run, machine
from linear_probe import fingerprint
from reproduce import voc

STRIDE = 16                                     # pixels of the image per pixel of layer3
MAX_FOUND = 100                                 # detections per image


# The network: conv1 to layer3 as backbone, layer4 as head of each region.

class Sampler(_utils.BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or proposals, seeded for each image.

    `keys` [(seed, step, position in the global batch)] belong to the images of the next call. So
    the choice does not depend on the number of processes.
    """

    def __init__(self, purpose, n, positive_fraction):
        super().__init__(n, positive_fraction)
        self.purpose, self.keys = purpose, []

    def __call__(self, labels):
        positive, negative = [], []
        for key, one in zip(self.keys, labels, strict=True):
            torch.manual_seed(int(augment.generator(self.purpose, *key).integers(2 ** 32)))
            for masks, (mask,) in zip((positive, negative), super().__call__([one])):
                masks.append(mask.bool())
        return positive, negative


class RPN(rpn.RegionProposalNetwork):
    """With detectron2's loss: L1 for boxes, divided by the intended number of anchors."""

    def compute_loss(self, objectness, deltas, labels, wanted):
        positive, negative = map(torch.cat, self.fg_bg_sampler(labels))
        chosen, n = positive | negative, self.fg_bg_sampler.batch_size_per_image * len(labels)
        objectness, labels = objectness.flatten()[chosen], torch.cat(labels)[chosen]
        wanted = torch.cat(wanted)[positive]
        return (F.binary_cross_entropy_with_logits(objectness, labels, reduction="sum") / n,
                F.l1_loss(deltas[positive], wanted, reduction="sum") / n)


class RoIHeads(roi_heads.RoIHeads):
    """With detectron2's L1 loss, divided by the number of proposals in all processes."""

    def forward(self, features, proposals, sizes, targets=None):
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        h = self.box_head(self.box_roi_pool(features["0"], proposals))     # (n, width)
        logits, deltas = self.box_predictor(h)          # (n, classes + 1), (n, 4 (classes + 1))
        if self.training:
            labels, wanted = torch.cat(labels), torch.cat(wanted)
            n, = ddp.mean(torch.full_like(h[:1, 0], len(labels)))
            positive = labels.nonzero()[:, 0]
            deltas = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
            return [], {"class": F.cross_entropy(logits, labels, reduction="sum") / n,
                        "box": F.l1_loss(deltas, wanted[positive], reduction="sum") / n}
        found = self.postprocess_detections(logits, deltas, proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": y} for b, s, y in zip(*found)], {}


class Detector(nn.Module):
    """Faster R-CNN with a C4 backbone, the encoder `f`, of which all layers are trained.

    The settings `s` are those of SCALES.
    """

    def __init__(self, f, classes, s):
        super().__init__()
        self.backbone = nn.Sequential(f.conv1, f.bn1, f.relu, f.maxpool, f.layer1, f.layer2,
                                      f.layer3)
        width = f.layer4[0].conv1.in_channels
        anchors = rpn.AnchorGenerator((tuple(s.anchors),), ((.5, 1., 2.),))
        names = "training", "testing"
        self.rpn = RPN(anchors, rpn.RPNHead(width, anchors.num_anchors_per_location()[0]), .7, .3,
                       s.rpn_samples, .5, dict(zip(names, s.pre_nms)), dict(zip(names, s.post_nms)),
                       nms_thresh=.7)
        # With MoCo's additional batch normalisation, features of any scale fit the learning rate.
        head = nn.Sequential(f.layer4, GlobalBatchNorm(f.width), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten())
        predictor = faster_rcnn.FastRCNNPredictor(f.width, classes + 1)
        for layer, std in ((predictor.cls_score, .01), (predictor.bbox_pred, .001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        pool = RoIAlign(s.pool, 1 / STRIDE, sampling_ratio=0, aligned=True)
        self.roi_heads = RoIHeads(pool, head, predictor, .5, .5, s.roi_samples, .25, None,
                                  score_thresh=.05, nms_thresh=.5, detections_per_img=MAX_FOUND)
        self.rpn.fg_bg_sampler = Sampler("anchors", s.rpn_samples, .5)
        self.roi_heads.fg_bg_sampler = Sampler("proposals", s.roi_samples, .25)

    def forward(self, x, sizes, targets=None, keys=()):
        """In training mode the losses, as a dict; otherwise a dict of detections for each image.

        x (N, 3, H, W); sizes [(height, width)] without padding; targets [{boxes, labels}], in
        which label 0 is background; keys: see `Sampler`.
        """
        self.rpn.fg_bg_sampler.keys = self.roi_heads.fg_bg_sampler.keys = keys
        features = {"0": self.backbone(x)}
        proposals, losses = self.rpn(ImageList(x, sizes), features, targets)
        found, more = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **more} if self.training else found


def train_step(detector, optimizer, batch):
    """One step on `batch`, the arguments of `Detector.forward`; returns the loss."""
    loss = sum(detector(*batch).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def precise_bn(detector, batches):
    """Replace the running statistics by the means over `batches`, with the final weights."""
    norms = [module for module in detector.modules() if isinstance(module, GlobalBatchNorm)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for _, batch in batches:
        detector(*batch)
    for norm in norms:
        norm.momentum = momentum


# Batches, and the test.

def batches(split, args, start, stop, device):
    """Yield `(step, arguments of Detector.forward)`, which depend only on (seed, step)."""
    n, N = len(split), args.batch_size

    def plans():
        for step in range(start, stop):
            epoch, i = divmod(step, n // N)
            index = data.permutation(n, args.seed, epoch)[i * N:(i + 1) * N].tolist()
            rng = augment.generator("detection", args.seed, step)
            shorts, flips = rng.choice(args.short_sides, N), rng.random(N) < .5
            views = [(i, voc.resized(split[i].size, short, args.longest), flip)
                     for i, short, flip in zip(index, shorts, flips)]
            yield views, ddp.rows(N)

    parts = voc.load(split, plans(), normalisation=args.normalisation, stride=STRIDE,
                     device=device, workers=args.workers)
    for step, (x, sizes, targets) in enumerate(parts, start):
        yield step, (x, sizes, targets, [(args.seed, step, i) for i in range(N)[ddp.rows(N)]])


@torch.no_grad()
def detect(detector, split, args, device):
    """Detections in all images as rows of the metric (k, 7), in numpy; processes share the work."""
    detector.eval()
    n = len(split)
    mine = range(n)[ddp.rows(n)]
    views = [(i, voc.resized(split[i].size, args.test_side, args.longest), False) for i in mine]
    parts = [views[i:i + args.test_batch] for i in range(0, len(views), args.test_batch)]
    rows = torch.zeros(-(-n // ddp.world()), MAX_FOUND, 7)      # class 0: no detection
    loaded = voc.load(split, [(part, slice(None)) for part in parts], stride=STRIDE,
                      normalisation=args.normalisation, device=device, workers=args.workers)
    for part, (x, sizes, _) in zip(parts, loaded):
        for (i, (height, width), _), found in zip(part, detector(x, sizes)):
            boxes, scores, labels = (found[name].cpu() for name in ("boxes", "scores", "labels"))
            old_height, old_width = split[i].size
            boxes = boxes * torch.tensor([old_width / width, old_height / height] * 2)
            image = torch.full_like(scores, i)
            rows[i - mine[0], :len(boxes)] = torch.cat(
                [torch.stack([image, labels, scores], 1), voc.voc_boxes(boxes)], 1)
    detector.train()
    rows = ddp.all_gather(rows.to(device)).cpu().flatten(0, 1)
    rows = rows[rows[:, 1] > 0].double().numpy()
    # Rounded as in detectron2, which writes detections to a file and reads them again.
    return np.hstack([rows[:, :2], rows[:, 2:3].round(3), rows[:, 3:].round(1)])


# Settings. A scale belongs to a kind of data; `voc` is FAIR's configuration. Pairs are for training
# and test.

SCALES = {
    "voc": dict(arch="resnet50", iterations=24_000, batch_size=16, base_lr=.02, warmup=100,
                short_sides=[*range(480, 801, 32)], test_side=800, longest=1333,
                anchors=(32, 64, 128, 256, 512), pre_nms=(12_000, 6000), post_nms=(2000, 1000),
                rpn_samples=256, pool=14, roi_samples=512, bn_batches=200, test_batch=1,
                normalisation="imagenet"),
    "scenes": dict(arch="resnet10", iterations=1000, batch_size=8, base_lr=.02, warmup=50,
                   short_sides=(112, 128, 144), test_side=128, longest=256,
                   anchors=(32, 48, 72), pre_nms=(500, 500), post_nms=(200, 50),
                   rpn_samples=64, pool=4, roi_samples=16, bn_batches=50, test_batch=10,
                   normalisation="textures"),
}


def flags():
    parser = train.Parser("python -m reproduce.voc_detection", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", nargs="?", metavar="VOC", help="the folder VOCdevkit (default: synthetic scenes)")
    add("--encoder", required=True, metavar="FILE", help="checkpoint of ours, FAIR's or "
        "torchvision's; torchvision[:NAME]; random")
    add("--arch", metavar="NAME", help="architecture of --encoder random")
    add("--out", metavar="DIR", help="folder of the run (default: detection/ beside the encoder, "
        "or under runs/)")
    train.add_run_flags(parser)
    add("--iterations", type=train.COUNT, metavar="n")
    add("--short-sides", type=train.COUNT, nargs="+", metavar="n",
        help="lengths of an image's short side, one of which is drawn for each training image")
    add("--test-side", type=train.COUNT, metavar="n", help="short side of test images")
    add("--roi-samples", type=train.COUNT, metavar="n", help="proposals per image to train on")
    return parser


def settings(argv, scale):
    """The flags, with the defaults of the scale, and the encoder f: `(args, f)`."""
    parser, defaults = flags(), dict(SCALES[scale])
    given, arch, base_lr = parser.parse_args(argv), defaults.pop("arch"), defaults.pop("base_lr")
    lr = base_lr * (given.batch_size or defaults["batch_size"]) / defaults["batch_size"]
    parser.set_defaults(script="voc_detection", scale=scale, lr=lr, **defaults)
    args = parser.parse_args(argv)
    arch = args.arch or (arch if args.encoder == "random" else None)
    encoder, saved = load_encoder(args.encoder, arch, args.seed)
    if saved["arch"].endswith("-3x3"):
        raise UserError(f"--encoder {args.encoder}: {saved['arch']} has a stride of 4 pixels; "
                        "expected a network with a 7x7 stem, whose stride is 16")
    args.arch, file = saved["arch"], Path(args.encoder)
    args.normalisation = saved.get("normalisation", saved.get("scale", args.normalisation))
    args.encoder_fingerprint = fingerprint(encoder.f)
    with torch.device("meta"):                  # no initial weights
        f = resnet(args.arch, norm=GlobalBatchNorm)
    f.load_state_dict(encoder.f.state_dict(), assign=True)
    if file.is_file():
        args.out, args.encoder = args.out or file.parent / "detection", str(file.resolve())
    args.out = args.out or f"runs/voc_detection-{scale}-{args.encoder}".replace(":", "-")
    return args, f


def main(argv=None):
    first = flags().parse_args(argv)
    device = ddp.init(first.device)
    torch.backends.cudnn.benchmark = False      # every size of images would be timed
    scale, classes, train_split, test_split = voc.open_data(first.data)
    args, f = settings(argv, scale)
    # These are settings, because other images or boxes make a different run.
    args.images = len(train_split)
    args.objects_hash = f"{zlib.crc32(voc.object_rows(train_split).tobytes()):08x}"
    train.check_batch(args.images, args.batch_size, bn_group=1)
    torch.manual_seed(args.seed)
    detector = Detector(f, len(classes), args)
    detector.to(device, memory_format=torch.channels_last)
    # As in detectron2, batch normalisation has no weight decay.
    norms = [p for m in detector.modules() if isinstance(m, GlobalBatchNorm)
             for p in m.parameters()]
    others = [p for p in detector.parameters() if not any(p is norm for norm in norms)]
    optimizer = torch.optim.SGD([{"params": others, "weight_decay": 1e-4}, {"params": norms}],
                                args.lr, momentum=.9, fused=True)

    def evaluation():
        total = args.iterations
        precise_bn(detector, batches(train_split, args, total, total + args.bn_batches, device))
        found = detect(detector, test_split, args, device)
        result, by_class = voc.voc_ap(found, voc.object_rows(test_split), len(classes))
        if ddp.rank() == 0:
            content = {**result, "AP50_by_class": dict(zip(classes, by_class)),
                       "settings": run.settings, **machine(device)}
            (run.out / "result.json").write_text(json.dumps(content, indent=1))
            name = file.parent.name if (file := Path(args.encoder)).is_file() else args.encoder
            draw(run.out / "detections.png", test_split, found, classes, name)
        return result

    part = args.iterations // 10 if args.iterations % 10 == 0 else args.iterations
    known = {name: value for name, value in vars(args).items() if name not in train.RUN_FLAGS}
    run = Run({"detector": detector, "optimizer": optimizer}, args.out, known, args.iterations,
              part, device, evaluation, eval_every=args.iterations, eval_first=False,
              panels=("loss", "lr"), fresh=args.fresh, max_steps=args.max_steps,
              save_minutes=args.save_minutes)
    learning_rate = functools.partial(
        train.learning_rate, lr=args.lr, schedule="steps", drops=(18 / 24, 22 / 24),
        warmup=args.warmup, epochs=args.iterations, steps_per_epoch=1)
    wrapped = ddp.wrap(detector)
    for step, batch in run.steps(batches(train_split, args, run.start, run.end, device)):
        lr = train.set_lr(optimizer, learning_rate(step))
        run.log(train_step(wrapped, optimizer, batch), lr=lr)
    last = [(name, run.events.values(name)[-1:]) for name in ("AP", "AP50", "AP75")]
    return run.close("  ".join(f"{name} {value:.2f}" for name, values in last for value in values))


def draw(path, split, found, classes, name, n=6):
    """Write the picture `path`: detections with a score of .5 or more; objects are dashed.

    `name` is the name of the encoder, for the title.
    """
    from matplotlib.figure import Figure                        # slow to import
    from matplotlib.patches import Rectangle
    figure, objects = Figure(figsize=(7.2, 5.4), layout="constrained"), voc.object_rows(split)

    def outline(axis, box, **style):
        xmin, ymin, xmax, ymax = box            # pixels from 1; matplotlib counts centres from 0
        corner, sides = (xmin - 1.5, ymin - 1.5), (xmax - xmin + 1, ymax - ymin + 1)
        axis.add_patch(Rectangle(corner, *sides, fill=False, linewidth=1.5, **style))

    for i, axis in enumerate(figure.subplots(2, n // 2).flat[:len(split)]):
        image = split[i].image
        image = image if isinstance(image, torch.Tensor) else data.read_image(image)
        axis.imshow(image.permute(1, 2, 0).numpy())
        for box in objects[objects[:, 0] == i, 3:]:
            outline(axis, box, color="white", linestyle="--")
        for _, label, score, *box in found[(found[:, 0] == i) & (found[:, 2] >= .5)]:
            outline(axis, box, color="yellow")
            axis.text(*box[:2], f"{classes[int(label) - 1]} {score:.2f}", fontsize=8, va="top",
                      clip_on=True, bbox=dict(facecolor="yellow", edgecolor="none", pad=1))
    for axis in figure.axes:
        axis.axis("off")
    figure.suptitle(f"{name}\ndetections with a score of .5 or more (yellow), objects (dashed)",
                    fontsize=10)
    figure.savefig(path, dpi=75)


if __name__ == "__main__":
    train.launch(main, less_memory=f"a smaller --batch-size or --roi-samples {train.NEW_RUN}",
                 workers=True)
