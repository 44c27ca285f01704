"""The paper's tables and figures as cells, the paper's numbers, and the commands that fill them."""

import collections
import dataclasses
import functools
import importlib
import itertools
import json
from pathlib import Path

import torch

from common import train

ROOT = Path(__file__).parent.parent
# The argument DATA in printed commands; the textures need none.
PLACEHOLDER = {"imagenet": ["IMAGENET"], "cifar10": ["CIFAR10"], "textures": []}
# Scales of this package: the kind of data, and the flags of each script (docs/choices.md).
LAPTOP = "--arch resnet10 --epochs 10 --batch-size 64 --n-evals 2 --precision bf16"
NAMED = {"cifar10-laptop": ("cifar10", {
    "moco_v2": f"{LAPTOP} --lr .02 --warmup 300",
    "instdisc": f"{LAPTOP} --lr .003 --warmup 300",
    "simclr": LAPTOP,
    "linear_probe": LAPTOP})}
TABLE3_K = {"imagenet": (512, 65536), "cifar10": (64, 4096), "textures": (16, 1024),
            "cifar10-laptop": (64, 4096)}
FIGURE4_K = {"imagenet": (256, 512, 1024, 4096, 16384, 65536),     # K of Figure 4
             "cifar10": (16, 64, 256, 1024, 4096, 16384),
             "textures": (16, 128, 1024),
             "cifar10-laptop": (64, 512, 4096)}
LENGTHS = {"cifar10-laptop": (5, 10, 20, 50, 100)}              # epochs
DETECTION = ("imagenet", "textures")            # scales whose encoders are fine-tuned for detection
PREDICTIONS = ("class", "grey", "hue", "noise", "rotation", "sobel")    # of linear_probe.py
CHUNK = 2048                    # SimCLR: 256 images of 224 pixels on each of 8 GPUs

TITLES = {
    "table1": "Table 1: projection heads",
    "table2a": "Table 2 (a): crop area",
    "table2b": "Table 2 (b): strength of the colour jitter",
    "table3": "Table 3: number of negatives",
    "supervised": "Sections 1 and 3: an MLP head in supervised training",
    "section3": "Section 3: what the features know",
    "section5": "Section 5: sampling of negatives",
    "section7": "Section 7: no momentum encoder",
    "detection": "Section 5: detection transfer",
    "figure4": "Figure 4: accuracy against the number of negatives",
    "length": "Table 1 (a) against the length of training",
    "figure2": "Figure 2: images reconstructed from features",
    "figure3": "Figure 3: features of augmented images",
    "figure5": "Figure 5: sampling of hard negatives",
}
# item: {row: (script and flags, the paper's result in each column)}. The paper's numbers are top-1
# accuracies in percent of a ResNet-50 on ImageNet.
ROWS = {
    "table1": {
        "MoCo v2": ("moco_v2 --preset table1", 64.4),
        "(a) without head": ("moco_v2 --preset table1a", 59.2),
        "(b) fixed head": ("moco_v2 --preset table1b", 62.9),
        "(c) more hidden layers": ("moco_v2 --preset table1c", 63.9),
        "(d) narrow": ("moco_v2 --preset table1d", 62.2),
    },
    "table2a": {                                                # MoCo v2, supervised
        "20 % to 100 %": ("moco_v2 --preset table2a-baseline", 64.4, 75.5),
        "20 % to 50 %": ("moco_v2 --preset table2a-medium", 63.7, 74.8),
        "2 % to 10 %": ("moco_v2 --preset table2a-extreme", 47.1, 52.0),
    },
    "table2b": {
        "jitter 1/8": ("moco_v2 --preset table2b-eighth", 63.1, 75.8),
        "1/4": ("moco_v2 --preset table2b-quarter", 63.9, 75.7),
        "1/2": ("moco_v2 --preset table2b-half", 64.2, 75.6),
        "1": ("moco_v2 --preset table2b-full", 64.3, 74.6),
    },
    "table3": {                                                 # K = 512, K = 65536
        "MoCo v2": ("moco_v2 --preset table3", 67.3, 67.5),
        "(a) no MLP": ("moco_v2 --preset table3a", 61.7, 63.6),
        "(b) no blur": ("moco_v2 --preset table3b", 65.5, 66.4),
        "with blur": ("moco_v2 --preset table3 --blur",),       # where the baseline has none
        "(c) no cosine": ("moco_v2 --preset table3c", 67.2, 67.3),
        "(d) m = .5": ("moco_v2 --preset table3d", 59.8, 64.5),
    },
    "supervised": {
        "one layer": ("linear_probe --train all",),
        "MLP head": ("linear_probe --train all --preset supervised-mlp",),
    },
    "section3": {                                               # row: network, feature
        "MoCo v2, h": ("moco_v2 --preset table1", 64.4),
        "MoCo v2, hidden": ("moco_v2 --preset table1",),
        "MoCo v2, z": ("moco_v2 --preset table1",),
        "(a) without head, h": ("moco_v2 --preset table1a", 59.2),
        "(b) fixed head, h": ("moco_v2 --preset table1b", 62.9),
        "(c) more hidden layers, h": ("moco_v2 --preset table1c", 63.9),
        "(d) narrow head, h": ("moco_v2 --preset table1d", 62.2),
        "untrained, h": ("linear_probe --encoder random --quick",),
        "untrained, hidden": ("linear_probe --encoder random --quick",),
        "untrained, z": ("linear_probe --encoder random --quick",),
    },
    "section5": {
        "MoCo v2": ("moco_v2 --preset table3", 67.3, 67.5),
        "hardest negatives only": ("moco_v2 --preset table3 --negatives hardest",),
        "random negatives": ("moco_v2 --preset table3 --negatives random",),
    },
    "section7": {
        "MoCo v2": ("moco_v2 --preset table3", 67.3, 67.5),
        "m = 0": ("moco_v2 --preset section7",),       # the paper: "cannot converge", for no K
    },
    "detection": {                                              # row: the encoder
        "untrained": ("linear_probe --encoder random --quick",),
        "supervised": ("linear_probe --train all",),
        "MoCo v2, few negatives": ("moco_v2 --preset table3",),
        "MoCo v2, many negatives": ("moco_v2 --preset table3",),
    },
    "figure4": {
        "MoCo v2": ("moco_v2 --preset table3",),
        "MoCo v2, hard negatives": ("moco_v2 --preset table3 --negatives hard",),
        "MoCo": ("moco_v2 --preset moco-v1",),
        "InstDisc": ("instdisc --preset figure4",),
        "SimCLR": ("simclr --preset figure4",),
    },
    "length": {
        "MoCo v2": ("moco_v2 --preset table1",),
        "(a) without head": ("moco_v2 --preset table1a",),
    },
    # For pictures, a row is a flag of the script that draws it: a network's checkpoint.
    "figure2": {"--head": ("moco_v2 --preset table1",), "--no-head": ("moco_v2 --preset table1a",)},
    "figure3": {"--encoder": ("linear_probe --train all",),
                "--compare": ("moco_v2 --preset table1",)},
    "figure5": {"": ("moco_v2 --preset table3 --negatives hard",)},
}
# Which K of Table 3 these encoders have.
DETECTION_ROWS = {"MoCo v2, few negatives": 0, "MoCo v2, many negatives": -1}
PICTURES = {"figure2": "dip_inversion.py", "figure3": "tsne_aug.py",
            "figure5": "-m reproduce.figure5"}
TABLES = [item for item in ROWS if item not in PICTURES]

# The run `name` is made by `script` with `flags`; `question` is predicted from its `feature`. For
# detection, flags are the encoder's script and flags, the feature "detection", the question an AP.
# `paper` is a number, a text or None.
Cell = collections.namedtuple("Cell", "name script flags paper feature question")


@dataclasses.dataclass
class Campaign:
    """Runs on the images DATA, with the folder results/NAME and added `flags` for each script.

    `data` is the argument DATA, as a list, and `voc` the folder VOCdevkit for detection (default:
    synthetic scenes). The result of a run is kept as runs/RUN.json.
    """

    name: str
    scale: str                                  # one of the scripts' scales or of NAMED
    data: list = ()
    added: list = ()                            # flags for all scripts
    voc: list = ()

    def flags(self, script):
        """The flags that are added to a command."""
        named = NAMED[self.scale][1][script].split() if self.scale in NAMED else []
        return [*named, *self.added]

    def run(self, script, flags, seed):
        """(script, flags) of a cell with a seed; this campaign's flags come after the preset."""
        if script == "voc_detection":
            encoder, flags = self.run(flags[0], flags[1:], seed)
            return script, [encoder, *flags]
        return script, [*flags[:2], *self.flags(script), *flags[2:], "--seed", str(seed)]

    @property
    def folder(self):
        return ROOT / "results" / self.name

    def run_folder(self, name):
        """The folder of a run's checkpoint, relative to the project's root."""
        return f"runs/reproduce/{self.name}/{name}"

    def output_file(self, name):
        """The file with the output of a run's commands."""
        return ROOT / self.run_folder(name) / "output.txt"


def base_scale(scale):
    """The scripts' own scale on which `scale` is based."""
    return NAMED[scale][0] if scale in NAMED else scale


def columns(item, scale):
    """The names of an item's columns."""
    if item == "section3":
        return list(PREDICTIONS)
    if item == "supervised":
        return ["supervised"]
    if item == "length":
        return [f"{epochs} epochs" for epochs in LENGTHS.get(scale, ())]
    if item == "detection":
        return ["AP", "AP50", "AP75"] if scale in DETECTION else []
    if item in ("table3", "section5", "section7", "figure4"):
        return [f"K = {K}" for K in (FIGURE4_K if item == "figure4" else TABLE3_K)[scale]]
    return ["MoCo v2", "supervised"] if item.startswith("table2") else ["MoCo v2"]


def simclr_batch(K):
    """SimCLR has K = 2 (N - 1) negatives: about K for a batch of N = K / 2 images, at least 16."""
    return max(16, K // 2)


def k_flags(script, K):
    """The flags that set the number of negatives."""
    if script != "simclr":
        return ["--K", str(K)]
    batch = simclr_batch(K)
    return ["--batch-size", str(batch)] + (["--chunk", str(CHUNK)] if batch > CHUNK else [])


def settings(script, flags, scale):
    """What a command resolves to, as text: equal for equal settings, whatever their preset."""
    if script == "voc_detection":
        return settings(flags[0], flags[1:], scale)
    module = importlib.import_module(script)
    if scale in NAMED:
        flags = [*flags[:2], *NAMED[scale][1][script].split(), *flags[2:]]
    scales = getattr(module, "SUPERVISED", module.SCALES)
    args = vars(train.settings(module.flags(), flags, base_scale(scale), scales, module.PRESETS))
    for name in (*train.RUN_FLAGS, "preset"):
        del args[name]
    return json.dumps(args, sort_keys=True)


@functools.cache
def cells(scale):
    """{(item, row, column): Cell} of the paper, in its order.

    Cells with equal settings are one run, whichever item is asked for.
    """
    found, known = {}, {}
    for item, rows in ROWS.items():
        for row, (command, *numbers) in rows.items():
            for column, paper in itertools.zip_longest(columns(item, scale), numbers):
                script, *flags = command.split()
                if column == "supervised" and script != "linear_probe":
                    script, flags = "linear_probe", ["--train", "all", *flags]
                if column.startswith("K = "):
                    flags += k_flags(script, int(column[4:]))
                if row in DETECTION_ROWS:
                    flags += k_flags(script, TABLE3_K[scale][DETECTION_ROWS[row]])
                if column.endswith(" epochs"):
                    flags += ["--epochs", column.split()[0]]
                words = [flag.lstrip("-") for flag in flags
                         if flag not in ("--preset", "--train", "--encoder", "--quick")]
                run = "-".join([script, *words]), script, flags
                run = known.setdefault(settings(script, flags, scale), run)
                feature, question = "h", "class"
                if item == "section3":
                    feature, question = row.split(", ")[-1], column
                if item == "detection":
                    feature, question = "detection", column
                    name, script, flags = run
                    run = f"voc_detection-{name}", "voc_detection", [script, *flags]
                found[item, row, column] = Cell(*run, paper, feature, question)
    return found


def runs(items, campaign, seeds, rows=None):
    """{name: (script, flags)}: the runs that `items`, or some rows of them, need, each once.

    If a cell and the campaign set the same flag, the cell's value is used. Exits with one line if a
    script does not take the campaign's flags.
    """
    found = {}
    for (item, row, _), (name, script, flags, *_) in cells(campaign.scale).items():
        for seed in seeds if item in items and row in (rows or [row]) else ():
            if f"{name}-seed{seed}" not in found:
                run = found[f"{name}-seed{seed}"] = campaign.run(script, flags, seed)
                settings(*run, base_scale(campaign.scale))      # parses the flags
    return found


def features(flags):
    """The features that are probed: all three for the preset table1 and quick probes, else h."""
    return ["h", "hidden", "z"] if "table1" in flags or "--quick" in flags else ["h"]


def questions(flags, scale):
    """What the quick probe predicts: Section 3's questions for the rows of Table 1.

    On ImageNet, the paper's linear probe predicts the class instead.
    """
    asked = ["class"] if scale != "imagenet" or "--quick" in flags else []
    if "--quick" in flags or any(flag.startswith("table1") for flag in flags):
        asked += PREDICTIONS[1:]
    return asked


def probes(script, flags, scale):
    """{feature: [result files in the run's folder]}; supervised training has its own result."""
    if script == "voc_detection":
        return {"detection": ["result.json"]}
    if "--train" in flags:
        return {"h": ["result.json"]}
    found = {}
    for feature in features(flags):
        quick = f"quick-{feature}.json" if "--quick" in flags else f"probe/quick-{feature}.json"
        found[feature] = [quick] if questions(flags, scale) else []
        if scale == "imagenet" and "--quick" not in flags:
            found[feature].append(f"probe{'' if feature == 'h' else f'-{feature}'}/result.json")
    return found


def processes(script, flags, scale):
    """The largest number of GPUs over which a batch divides into whole groups; 1 without GPUs."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return 1
    if script == "voc_detection":
        args = importlib.import_module("reproduce.voc_detection").SCALES[
            "voc" if scale == "imagenet" else "scenes"]
    else:
        args = json.loads(settings(script, flags, base_scale(scale)))
    return max((n for n in range(1, gpus + 1)
                if args["batch_size"] % (n * args.get("bn_group", 1)) == 0), default=1)


def commands(name, script, flags, campaign):
    """The training command, then the probes': lists of words.

    For detection, those of the encoder, which another item may have trained already, and of the
    fine-tuning.
    """
    n = processes(script, flags, campaign.scale)
    python = ["torchrun", "--standalone", f"--nproc_per_node={n}"] if n > 1 else ["python"]
    if script == "voc_detection":
        out = campaign.run_folder(name)
        name, (script, *flags) = name.removeprefix("voc_detection-"), flags
        training, encoder = [], "random"
        if "random" not in flags:
            training = commands(name, script, flags, campaign)[:1]
            encoder = f"{campaign.run_folder(name)}/checkpoint.pt"
        return [*training, [*python, "-m", "reproduce.voc_detection", *campaign.voc, "--encoder",
                            encoder, "--seed", flags[-1], "--out", out]]
    command = [*python, f"{script}.py", *campaign.data, *flags, "--out", campaign.run_folder(name)]
    if "--train" in flags:
        return [command]
    probed, asked = features(flags), questions(flags, campaign.scale)
    quick = ["--feature", *probed, "--predict", *asked]
    if "--quick" in flags:
        return [[*command, *quick]]
    probe = [*python, "linear_probe.py", *campaign.data, "--encoder",
             f"{campaign.run_folder(name)}/checkpoint.pt"]
    found = [command, [*probe, "--quick", *quick]] if asked else [command]
    if campaign.scale == "imagenet":
        found += [[*probe, "--feature", feature] for feature in probed]
    return found


def pictures(items, campaign, seed):
    """The commands that draw Figures 2, 3 and 5 from the runs of a seed: {item: [word]}."""
    found = {}
    for item in items:
        if item in PICTURES:
            words = ["python", *PICTURES[item].split()]
            for flag in ROWS[item]:
                name = cells(campaign.scale)[item, flag, "MoCo v2"].name
                words += [*flag.split(), f"{campaign.run_folder(name)}-seed{seed}/checkpoint.pt"]
            if item == "figure2" and base_scale(campaign.scale) != "imagenet":
                words += ["--n-images", "16"]                   # cheap where images are small
            found[item] = [*words, *campaign.data, "--out", f"results/{campaign.name}"]
    return found
