"""Encoders f and projection heads g: z = g(f(x)) (Sec. 2, Fig. 1), built, saved and read back.

f is torchvision's ResNet without its classifier, so its state dict has torchvision's names and nothing else. An
architecture is one word: torchvision's name (`resnet50`), `resnet10` for small machines (one BasicBlock a stage), and
`-3x3` behind it for images of 32 pixels (3x3 stem of stride 1, no max-pool).
"""

import functools
import pickle
import re
import zipfile

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
HEADS = ("mlp", "none", "fixed", "deep", "narrow", "identity")


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics are taken over groups of `group` images, not over a process's batch.

    The groups belong to the run (the paper's 256 images on 8 GPUs are groups of 32), so that shuffling BN (He et al.
    2020, Sec. 3.3) does its work in one process too, and W processes compute what one computes. The running
    statistics move once per step, by the mean over the groups. `group` None is ordinary batch normalisation.
    """

    def __init__(self, channels, group=None, **kwargs):
        super().__init__(channels, **kwargs)
        self.group = group

    def forward(self, x):                                       # (N, C, H, W)
        if not self.training or self.group is None or len(x) <= self.group:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        parts = x.split(self.group)
        n, m, out = len(parts), self.momentum, []
        for i, part in enumerate(parts):
            # this momentum, in turn, gives every group the weight m / n and leaves 1 - m of what was there before
            out.append(F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias,
                                    True, m / (n - m * (n - 1 - i)), self.eps))
        return torch.cat(out)


def check_arch(arch):
    """`(torchvision's name, whether the stem is 3x3)`. Raises SystemExit for an unknown `arch`."""
    name = arch.removesuffix("-3x3")
    if name not in ARCHS:
        raise SystemExit(f"--arch {arch}: unknown; known are {', '.join(ARCHS)}, each also with -3x3 behind it")
    return name, name != arch


def resnet(arch, bn_group=None, norm=None):
    """The encoder f: images (N, 3, H, W) -> h (N, width), pooled, width 512 or 2048 (Sec. 2).

    Batch normalisation over groups of `bn_group` images, or by the class `norm` that is given in its place. Initialised
    as torchvision does, from torch's global generator. Raises SystemExit for an unknown `arch`.
    """
    name, small = check_arch(arch)
    norm = norm or functools.partial(GroupBatchNorm2d, group=bn_group)
    if name == "resnet10":
        f = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    else:
        f = getattr(torchvision.models, name)(weights=None, norm_layer=norm)
    f.width, f.fc = f.fc.in_features, nn.Identity()
    if small:
        f.conv1, f.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(f.conv1.weight, mode="fan_out", nonlinearity="relu")
    return f


def head(kind, width, dim=128, norm=nn.BatchNorm1d):
    """The projection head g: h (N, width) -> z (N, dim). Table 1; each row keeps the last layer, which maps to dim.

    `mlp` fc-ReLU-fc; (a) `none` fc, the released code without its MLP; (b) `fixed` the MLP, its hidden layer frozen as
    initialised, uniform in +-1/sqrt(width); (c) `deep` fc-ReLU-fc-ReLU-fc; (d) `narrow` a hidden layer of width/16
    (2048 -> 128). `identity` compares h itself. The paper's g is what stands before the last layer; see the README.
    SimCLR's `simclr2` and `simclr3` have two and three layers without bias, each with batch normalisation by `norm`.
    """
    relu, last = functools.partial(nn.ReLU, inplace=True), nn.Linear(width, dim)
    if kind == "identity":
        return nn.Identity()
    if kind == "none":
        return nn.Sequential(last)
    if kind in ("mlp", "fixed"):
        g = nn.Sequential(nn.Linear(width, width), relu(), last)
        g[0].requires_grad_(kind != "fixed")
        return g
    if kind == "deep":
        return nn.Sequential(nn.Linear(width, width), relu(), nn.Linear(width, width), relu(), last)
    if kind == "narrow":
        return nn.Sequential(nn.Linear(width, width // 16), relu(), nn.Linear(width // 16, dim))
    if kind in ("simclr2", "simclr3"):
        hidden = [m for _ in range(int(kind[-1]) - 1) for m in (nn.Linear(width, width, bias=False), norm(width), relu())]
        g = nn.Sequential(*hidden, nn.Linear(width, dim, bias=False), norm(dim))
        g[-1].bias.requires_grad_(False)                        # the last has a scale and no shift
        return g
    raise SystemExit(f"--head {kind}: unknown; known are {', '.join(HEADS)}")


class Encoder(nn.Module):
    """z = g(f(x)): (N, 3, H, W) -> (N, D)."""

    def __init__(self, f, g):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x):
        return self.g(self.f(x))

    def check_feature(self, feature):
        """Raises SystemExit for `hidden` where g has no hidden layer."""
        if feature == "hidden" and not any(isinstance(m, nn.ReLU) for m in self.g.modules()):
            raise SystemExit("--feature hidden: the head of this encoder has no hidden layer")

    def width(self, feature="h"):
        """The number of dimensions of `feature`, as in `embed`."""
        self.check_feature(feature)
        if feature == "h" or isinstance(self.g, nn.Identity):
            return self.f.width
        return [m for m in self.g if isinstance(m, nn.Linear)][0 if feature == "hidden" else -1].out_features

    def embed(self, x, feature="h"):
        """`h` = f(x) (N, width), `hidden` the activation after g's first ReLU, which Fig. 2 (d) calls z, or `z`."""
        self.check_feature(feature)
        h = self.f(x)
        if feature != "hidden":
            return h if feature == "h" else self.g(h)
        return self.g[:next(i for i, m in enumerate(self.g, 1) if isinstance(m, nn.ReLU))](h)


class Damaged(SystemExit):
    """A file that was a checkpoint once, as far as one can tell."""


def load_state(module, state, what):
    """Load `state` into `module`; every tensor must be there in its shape, and nothing else.

    Raises SystemExit with `what` and the name of the first tensor that is missing, has another shape or is unknown.
    """
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise SystemExit(f"{what}: tensor {name} is missing")
        shape = getattr(state[name], "shape", "none")
        if shape != tensor.shape:
            raise SystemExit(f"{what}: tensor {name} has shape {tuple(shape)}, not {tuple(tensor.shape)}")
    for name in state:
        if name not in wanted:
            raise SystemExit(f"{what}: tensor {name} does not belong to this network")
    module.load_state_dict(state)


def restore(state, optimizer, **parts):
    """Load a checkpoint's `parts`, modules and tensors by their names in it, and the optimiser's state.

    Raises SystemExit with the first part that is missing or of another shape.
    """
    for name, part in {**parts, "optimizer": optimizer}.items():
        saved = state.get(name)
        if not isinstance(saved, torch.Tensor if isinstance(part, torch.Tensor) else dict):
            raise SystemExit(f"checkpoint: {name} is missing, or no {'tensor' if isinstance(part, torch.Tensor) else 'state'}")
        if isinstance(part, nn.Module):
            load_state(part, saved, f"checkpoint: {name}")
        elif part is not optimizer:
            if saved.shape != part.shape:
                raise SystemExit(f"checkpoint: {name} has shape {tuple(saved.shape)}, not {tuple(part.shape)}")
            part.copy_(saved)
    try:
        optimizer.load_state_dict(state["optimizer"])
        fits = all(v.shape == p.shape for group in optimizer.param_groups for p in group["params"]
                   for v in (optimizer.state[p] or {"none": None}).values())
    except (ValueError, KeyError, TypeError, AttributeError):   # torch raises many kinds for another optimiser's state
        fits = False
    if not fits:
        raise SystemExit("checkpoint: optimizer is that of another network or method")


def read_checkpoint(path, needs):
    """A checkpoint as a dict, on the CPU, without running any code that it may hold.

    Raises SystemExit where the file is missing, would run code, or lacks one of `needs`, {name: type}; Damaged where its
    checksums are wrong or it cannot be read for another reason of its own.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), of) for k, of in needs.items()):
        raise SystemExit(f"{path}: not the checkpoint that is needed here (it lacks one of {', '.join(needs)})")
    return checkpoint


def _read(path):
    try:
        # torch.load itself does not look at the archive's checksums
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file; expected a checkpoint.pt of one of the training scripts")
    except IsADirectoryError:
        raise SystemExit(f"{path}: a folder; name the checkpoint.pt in it")
    except OSError as error:                                    # the disk's fault, which says nothing of the file
        raise SystemExit(f"{path}: cannot be opened ({error.strerror})")
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise SystemExit(f"{path}: refused: reading it would run code ({code[1]}); nothing of it was used")
    except Exception:                                           # torch and zipfile raise many kinds for a file that is none
        pass
    raise Damaged(f"{path}: cannot be read as a checkpoint: cut short, damaged or none at all; nothing of it was used")


def load_encoder(path, arch=None, seed=0):
    """`(encoder, settings)`, in the order in which `path` is tried:

    `random`: the untrained `arch` with an MLP head, its batch statistics as constructed; settings say only that.
    `torchvision` or `torchvision:resnet18`: torchvision's ImageNet weights, the only case in which it downloads.
    A checkpoint of ours; FAIR's released MoCo files, query encoder and head; torchvision's weights, as a file. For
    torchvision's and for supervised ones g is the classifier, and z the logits.
    Raises SystemExit with the first tensor that is missing or has another shape, and as `read_checkpoint` does.
    """
    if path == "random":
        torch.manual_seed(seed)
        f = resnet(arch)
        return Encoder(f, head("mlp", f.width)), {"arch": arch, "head": "mlp", "dim": 128}
    if path.partition(":")[0] == "torchvision":
        name = path.partition(":")[2] or "resnet50"
        check_arch(name)
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=True, weights_only=True)
        saved = _foreign(weights, path)
    else:
        saved = _read(path)
        try:
            if "f" not in saved and "settings" not in saved:
                saved = _foreign(saved, path)
            named = all(isinstance(saved[k], dict) for k in ("f", "g", "settings"))
        except (AttributeError, TypeError, KeyError):           # not even dicts of tensors
            named = False
        if not named:
            raise SystemExit(f"{path}: holds no encoder (it lacks f, g or settings)")
    settings = saved["settings"]
    for name in ("arch", "head", "dim"):
        if name not in settings:
            raise SystemExit(f"{path}: its settings lack {name}")
    f = resnet(settings["arch"])
    encoder = Encoder(f, head(settings["head"], f.width, settings["dim"]))
    load_state(encoder.f, saved["f"], f"{path}: f")
    load_state(encoder.g, saved["g"], f"{path}: g")
    return encoder, settings


def _foreign(saved, path):
    """FAIR's or torchvision's file as a checkpoint of ours: f and g under our names, settings as far as they follow."""
    state = saved.get("state_dict", saved)
    query = {k.removeprefix("module.encoder_q."): v for k, v in state.items() if k.startswith("module.encoder_q.")}
    state = {k: v for k, v in (query or state).items() if isinstance(v, torch.Tensor)}
    f = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if not f.keys() & {"conv1.weight", "layer1.0.conv1.weight", "bn1.weight"}:
        raise SystemExit(f"{path}: holds no encoder: neither a checkpoint of these scripts, nor FAIR's MoCo "
                         "(module.encoder_q.*), nor torchvision's ResNet weights")
    with torch.device("meta"):                                  # the architecture whose tensors these are, or nearly
        arch = min(ARCHS, key=lambda name: len(resnet(name).state_dict().keys() ^ f.keys()))
    g = {k.removeprefix("fc."): v for k, v in state.items() if k.startswith("fc.")}
    mlp = "0.weight" in g                                       # FAIR's v2: fc.0, fc.2; v1 and torchvision: one layer
    g = g if mlp else {f"0.{k}": v for k, v in g.items()}
    last = "2.weight" if mlp else "0.weight"
    if last not in g:
        raise SystemExit(f"{path}: tensor fc.{last if mlp else 'weight'} is missing")
    settings = {"arch": arch, "head": "mlp" if mlp else "none", "dim": len(g[last]), "scale": "imagenet", "size": 224}
    return {"f": f, "g": g, "settings": settings}
