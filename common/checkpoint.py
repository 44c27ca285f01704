"""Checkpoints: atomic writing, checked reading, and weights from elsewhere.

Nothing that is read can run code (`weights_only`), and checksums are verified.
"""

import contextlib
import os
import pickle
import re
import shutil
import zipfile

import torch
import torchvision
from torch import nn

from common import UserError
from common.model import ARCHS, Encoder, head, mlp_from, resnet

CONTENT = {"step": int, "settings": dict}       # in every checkpoint of a training script


class Damaged(UserError):
    """A file that cannot be read as a checkpoint."""


def save(path, step, settings, state):
    """Write a checkpoint atomically; the one before it stays as previous.pt.

    `state` {name: module, optimizer or tensor}. At any moment an intact checkpoint is on disk.
    Raises UserError, and leaves the files as they were, if it cannot be written.
    """
    content = {"step": step, "settings": settings}
    for name, part in state.items():
        content[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
    new = path.with_suffix(".tmp")
    try:
        torch.save(content, new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:    # torch.save raises RuntimeError on a full disk
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        with contextlib.suppress(OSError):
            new.unlink()
        raise UserError(
            f"{new}: cannot save step {step}, with {free:.0f} MiB free: free some space and run "
            "the same command again; it continues from the last checkpoint "
            f"({str(error).splitlines()[0]})")
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(new, path)


def newest(path):
    """The newest intact checkpoint of `path` and its previous.pt: `(state, where, error)`.

    `error` is the Damaged error of a file that was skipped, or None. `state` and `where` are None
    if no file exists. Raises Damaged if files exist and none is intact.
    """
    damage = None
    for where in (path, path.with_name("previous.pt")):
        try:
            if where.exists():
                return read(where, CONTENT), where, damage
        except Damaged as error:
            damage = damage or error
    if damage:
        raise damage
    return None, None, None


def make_current(path, where):
    """Move the intact checkpoint `where` to `path`; a damaged one there becomes damaged.pt."""
    if where != path:
        if path.exists():
            os.replace(path, path.with_name("damaged.pt"))
        os.replace(where, path)


def remove(path):
    """Delete the checkpoint `path` and its previous.pt."""
    for file in (path, path.with_name("previous.pt")):
        file.unlink(missing_ok=True)


def read(path, content):
    """A checkpoint as a dict, on the CPU, without running any code that it may contain.

    Raises UserError if the file is missing, would run code, or lacks an entry of `content`
    {name: type}; Damaged if it cannot be read or its checksums are wrong.
    """
    checkpoint = _load(path)
    complete = isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(name), kind) for name, kind in content.items())
    if not complete:
        raise UserError(f"{path}: not the expected checkpoint (it lacks one of "
                        f"{', '.join(content)})")
    return checkpoint


def _load(path):
    try:
        # torch.load does not verify the checksums of the archive.
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the checkpoint.pt of a training script")
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected the checkpoint.pt in it")
    except OSError as error:                    # a fault of the disk, not of the file
        raise UserError(f"{path}: cannot be opened ({error.strerror})")
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path}: refused: reading it would run code ({code[1]}); nothing was "
                            "loaded")
    except Exception:                           # torch and zipfile raise many kinds of errors
        pass
    raise Damaged(f"{path}: cannot be read as a checkpoint: truncated, damaged or another kind of "
                  "file; nothing was loaded")


def load_state(module, state, what):
    """Load `state` into `module`, which must have exactly these tensors with these shapes.

    Raises UserError with `what` and the name of the first tensor that does not fit.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{what}: tensor {name} is missing")
        _check_shape(state[name], tensor, f"{what}: tensor {name}")
    for name in state:
        if name not in expected:
            raise UserError(f"{what}: tensor {name} does not belong to this network")
    module.load_state_dict(state)


def _check_shape(saved, tensor, what):
    shape = tuple(saved.shape) if isinstance(saved, torch.Tensor) else type(saved).__name__
    if shape != tuple(tensor.shape):
        raise UserError(f"{what} has shape {shape}, not {tuple(tensor.shape)}")


def restore(saved, state):
    """Load the checkpoint `saved` into `state` {name: module, optimizer or tensor}, in place.

    Raises UserError with the name of the first part that is missing or does not fit.
    """
    for name, part in state.items():
        kind = torch.Tensor if isinstance(part, torch.Tensor) else dict
        if not isinstance(saved.get(name), kind):
            raise UserError(f"checkpoint: {name} is missing or not a {kind.__name__.lower()}")
        if isinstance(part, nn.Module):
            load_state(part, saved[name], f"checkpoint: {name}")
        elif isinstance(part, torch.Tensor):
            _check_shape(saved[name], part, f"checkpoint: {name}")
            part.copy_(saved[name])
        elif not _load_optimizer(part, saved[name]):
            raise UserError(f"checkpoint: {name} belongs to another network or method")


def _load_optimizer(optimizer, saved):
    try:
        optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            for p in group["params"]:
                buffers = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
                if not buffers or any(v.ndim and v.shape != p.shape for v in buffers):
                    return False
    except (ValueError, KeyError, TypeError, AttributeError):   # what torch raises for bad states
        return False
    return True


def load_encoder(path, arch=None, seed=0):
    """Read an encoder: `(encoder, settings)`. `path` is one of:

    * `random`: an untrained `arch` with an MLP head, drawn from `seed`; batch norm statistics as
      constructed.
    * `torchvision` or `torchvision:NAME`: ImageNet weights, the only case that downloads.
    * a file: a checkpoint of these scripts, FAIR's MoCo v1 or v2, or torchvision's weights.

    g is the projection head; for supervised networks it is the classifier, and z are the logits.
    Raises UserError with the first tensor that is missing or has another shape, and as `read`.
    """
    path = str(path)
    if path == "random":
        if arch is None:
            raise UserError("--encoder random: name the architecture with --arch")
        torch.manual_seed(seed)
        f = resnet(arch)
        return Encoder(f, head("mlp", f.width)), {"arch": arch, "head": "mlp"}
    kind, _, name = path.partition(":")
    if kind == "torchvision":
        name = name or "resnet50"
        if name not in ARCHS[1:]:
            raise UserError(f"--encoder {path}: expected torchvision:NAME, NAME one of "
                            f"{', '.join(ARCHS[1:])}")
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        saved = weights.get_state_dict(progress=True, weights_only=True)
    else:
        saved = _load(path)
    if not isinstance(saved, dict) or not {"f", "settings"} & saved.keys():
        saved = _from_elsewhere(saved, path)
    if not all(isinstance(saved.get(name), dict) for name in ("f", "g", "settings")):
        raise UserError(f"{path}: holds no encoder (it lacks f, g or settings)")
    settings = saved["settings"]
    if "arch" not in settings:
        raise UserError(f"{path}: its settings lack arch")
    f = resnet(settings["arch"])
    encoder = Encoder(f, mlp_from(saved["g"], f.width))
    load_state(encoder.f, saved["f"], f"{path}: f")
    load_state(encoder.g, saved["g"], f"{path}: g")
    return encoder, settings


def _from_elsewhere(saved, path):
    """FAIR's or torchvision's file as one of our checkpoints."""
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    state = state if isinstance(state, dict) else {}
    state = {str(name): tensor for name, tensor in state.items()
             if isinstance(tensor, torch.Tensor)}
    prefix = "module.encoder_q."
    query = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    state = query or state
    f = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    g = {name.removeprefix("fc."): state[name] for name in state.keys() - f.keys()}
    if not f.keys() & {"conv1.weight", "layer1.0.conv1.weight", "bn1.weight"}:
        raise UserError(f"{path}: holds no encoder: expected a checkpoint of these scripts, FAIR's "
                        "MoCo (module.encoder_q.*), or torchvision's ResNet weights")
    if not any(name.endswith("weight") for name in g):
        raise UserError(f"{path}: tensor fc.weight is missing")
    if "weight" in g:                           # one layer: MoCo v1 and torchvision
        g = {f"0.{name}": tensor for name, tensor in g.items()}
    with torch.device("meta"):                  # the architecture that has most names in common
        names = {arch: resnet(arch).state_dict().keys() for arch in ARCHS}
    arch = min(ARCHS, key=lambda arch: len(names[arch] ^ f.keys()))
    kind = "mlp" if "2.weight" in g else "none"
    return {"f": f, "g": g,
            "settings": {"arch": arch, "head": kind, "scale": "imagenet", "size": 224}}
