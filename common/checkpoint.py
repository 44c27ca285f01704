"""Checkpoints: atomic writing, checked reading, a lock, and weights from elsewhere.

Nothing that is read can run code (`weights_only`), and checksums are verified.
"""

import os
import pickle
import platform
import re
import shutil
import zipfile

import torch
import torchvision
from torch import nn

from common import UserError
from common.model import ARCHS, Encoder, head, mlp_from, resnet

CONTENT = {"step": int, "settings": dict}       # in every checkpoint of a training script
FAIR = "FAIR's MoCo"                            # the `script` in the settings of its files


class Damaged(UserError):
    """A file that cannot be read as a checkpoint."""


def lock(folder):
    """Create and lock `folder`, for as long as the returned file is open.

    Raises UserError if it cannot be written or is locked by another process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})")
    try:
        import fcntl                                            # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"--out {folder}: in use by {file.read() or 'another process'}; choose "
                        "another --out or stop it")
    except (ImportError, OSError):                              # a file system without locks
        pass
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


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
        with new.open("r+b") as file:                           # Windows cannot sync "rb"
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:    # torch.save raises RuntimeError on a full disk
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        new.unlink(missing_ok=True)
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
                return read(where), where, damage
        except Damaged as error:
            damage = damage or error
    if damage:
        raise damage
    return None, None, None


def read(path, content=CONTENT):
    """A checkpoint as a dict, on the CPU, without running any code that it may contain.

    Raises UserError if the file is missing, would run code, or lacks an entry of `content`
    {name: type}; Damaged if it cannot be read or its checksums are wrong.
    """
    saved = _load(path)
    if not all(isinstance(saved.get(name), kind) for name, kind in content.items()):
        raise UserError(f"{path}: not the expected checkpoint (it lacks one of "
                        f"{', '.join(content)})")
    return saved


def _load(path):
    """The dict in a file; errors as in `read`."""
    try:
        # torch.load does not verify the checksums of the archive.
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(saved, dict):
                return saved
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
    for name in {**expected, **state}:
        tensor = f"{what}: tensor {name}"
        if name not in state:
            raise UserError(f"{tensor} is missing")
        if name not in expected:
            raise UserError(f"{tensor} does not belong to this network")
        _check_shape(state[name], expected[name], tensor)
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
        what, found = f"checkpoint: {name}", saved.get(name)
        kind = torch.Tensor if isinstance(part, torch.Tensor) else dict
        if not isinstance(found, kind):
            raise UserError(f"{what} is missing or not a {kind.__name__.lower()}")
        if isinstance(part, nn.Module):
            load_state(part, found, what)
        elif isinstance(part, torch.Tensor):
            _check_shape(found, part, what)
            part.copy_(found)
        else:
            _load_optimizer(part, found, what)


def _load_optimizer(optimizer, state, what):
    try:
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            for p in group["params"]:
                shapes = {buffer.shape for buffer in optimizer.state[p].values()}
                if not shapes or shapes - {p.shape, torch.Size()}:
                    raise ValueError("not the state of this parameter")
    except (ValueError, KeyError, TypeError, AttributeError):   # what torch raises for bad states
        raise UserError(f"{what} belongs to another network or method")


def load_encoder(path, arch=None, seed=0):
    """Read an encoder: `(encoder, settings)`. `path` is one of:

    * `random`: an untrained `arch` with an MLP head, drawn from `seed`; batch norm statistics as
      constructed.
    * `torchvision` or `torchvision:NAME`: ImageNet weights, the only case that downloads.
    * a file: a checkpoint of these scripts, FAIR's MoCo v1 or v2, or torchvision's weights.

    g is the projection head; for supervised networks it is the classifier, and z are the logits.
    Raises UserError if a tensor is missing or has another shape (it names the first), if a file
    holds a network other than `arch`, and in the cases of `read`.
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
        saved = weights.get_state_dict(weights_only=True)
    else:
        saved = _load(path)
    if not all(isinstance(saved.get(part), dict) for part in ("f", "g", "settings")):
        saved = _from_elsewhere(saved, path)
    settings = saved["settings"]
    if "arch" not in settings:
        raise UserError(f"{path}: its settings lack arch")
    if arch not in (None, settings["arch"]):
        raise UserError(f"{path}: is a {settings['arch']}, not --arch {arch}")
    with torch.device("meta"):                  # no initial weights: all are loaded
        f = resnet(settings["arch"])
        encoder = Encoder(f, mlp_from(saved["g"], f.width))
    encoder.to_empty(device="cpu")
    load_state(f, saved["f"], f"{path}: f")
    load_state(encoder.g, saved["g"], f"{path}: g")
    return encoder, settings


def _from_elsewhere(saved, path):
    """FAIR's or torchvision's file as one of our checkpoints."""
    state = saved.get("state_dict")
    state = state if isinstance(state, dict) else saved
    state = {str(name): tensor for name, tensor in state.items()
             if isinstance(tensor, torch.Tensor)}
    for name in [*state]:                       # torchvision's files are older than this buffer
        if name.endswith("running_var"):
            state.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    prefix = "module.encoder_q."
    query = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    state = query or state
    g = {name.removeprefix("fc."): state.pop(name) for name in [*state] if name.startswith("fc.")}
    if not any(name.endswith("conv1.weight") for name in state):
        raise UserError(f"{path}: holds no encoder: expected a checkpoint of these scripts, FAIR's "
                        "MoCo (module.encoder_q.*), or torchvision's ResNet weights")
    if not any(name.endswith("weight") for name in g):
        raise UserError(f"{path}: tensor fc.weight is missing")
    if "weight" in g:                           # one layer: MoCo v1 and torchvision
        g = {f"0.{name}": tensor for name, tensor in g.items()}

    def differing_names(arch):
        return len(resnet(arch).state_dict().keys() ^ state.keys())
    with torch.device("meta"):
        arch = min(ARCHS, key=differing_names)
    settings = {"arch": arch, "head": "mlp" if "2.weight" in g else "none", "scale": "imagenet",
                "normalisation": "imagenet", "size": 224}
    return {"f": state, "g": g, "settings": {**settings, "script": FAIR} if query else settings}
