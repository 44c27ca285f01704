"""The scripts on a GPU against the same scripts on the CPU; skipped on a machine without one.

The other tests run on the CPU everywhere (conftest.py).
"""

import json
import shutil
import statistics

import pytest
import torch
from conftest import ROOT, VISIBLE, entries, run

import dip_inversion
import instdisc
import linear_probe
import moco_v2
import simclr
import tsne_aug
from reproduce import voc_detection

pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs an NVIDIA GPU")

GPU = {"CUDA_VISIBLE_DEVICES": VISIBLE, "NVIDIA_TF32_OVERRIDE": "0",        # plain fp32
       "PYTHONPATH": str(ROOT)}
TINY = ("--arch", "resnet10", "--batch-size", "32", "--lr", ".001", "--epochs", "4")
MOCO, GROUPS = ("--K", "64", "--bn-group", "16"), ("--bn-group", "16")
RUNS = {
    "moco": (moco_v2, *TINY, *MOCO),
    "moco, fixed head, blur": (moco_v2, *TINY, *MOCO, "--preset", "table1b", "--blur"),
    "moco without graphs": (moco_v2, *TINY, *MOCO, "--no-graphs"),
    "moco v1": (moco_v2, *TINY, *MOCO, "--preset", "moco-v1"),
    "simclr": (simclr, *TINY),
    "simclr in chunks": (simclr, *TINY, "--chunk", "16"),
    "instdisc": (instdisc, *TINY, *GROUPS, "--loss", "softmax"),
    "supervised": (linear_probe, *TINY, *GROUPS, "--train", "all"),
}


def on_gpu(module, *argv, cwd, **options):
    """The output of a script, run where it sees the GPU."""
    path = module.__name__.replace(".", "/")
    return run(f"{path}.py", *argv, cwd=cwd, **options, **GPU).stdout


def tensors(folder):
    """{name: tensor} of all tensors in a checkpoint."""
    found = {}

    def collect(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}.{key}", part)
        elif isinstance(value, torch.Tensor):
            found[name] = value.double()
    collect("", torch.load(folder / "checkpoint.pt", weights_only=True))
    return found


def assert_close(a, b):
    """Two folders hold the same tensors, but for rounding, which a step after a ReLU multiplies.

    On an H200, four steps of ResNet-18 gave a median difference of 6e-7 and at most 2e-2.
    """
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 60
    far = {name: ((a[name] - b[name]).norm() / (b[name].norm() + 1e-9)).item() for name in a}
    assert statistics.median(far.values()) < 1e-4 and max(far.values()) < .1, far


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_on_the_gpu_equal_those_on_the_cpu(small, tmp_path, inside, name):
    """Weights, gradients (in the optimizer's momentum), batch statistics, queue and bank."""
    module, *argv = RUNS[name]
    argv = [small, *argv, "--precision", "fp32", "--max-steps", "2"]
    inside(module, *argv, "--out", "cpu", cwd=tmp_path)
    on_gpu(module, *argv, "--out", "gpu", cwd=tmp_path)
    assert_close(tmp_path / "gpu", tmp_path / "cpu")
    start, = entries(tmp_path / "gpu", "start")
    assert "cores" not in start["device"], "the CPU was used"
    if module is not linear_probe:
        a, b = (entries(tmp_path / name, "epoch")[0] for name in ("gpu", "cpu"))
        assert abs(a["knn"] - b["knn"]) < 100 * 2 / 44          # two images, before the first step
        assert a["uniformity"] == pytest.approx(b["uniformity"], rel=1e-2)
        assert a["rank"] == pytest.approx(b["rank"], rel=1e-2)


@pytest.mark.parametrize("name", ["moco", "simclr", "simclr in chunks", "instdisc"])
def test_a_process_group_of_one_gpu_changes_nothing(small, tmp_path, name):
    """torchrun with NCCL: DDP, the gathered keys, SyncBatchNorm."""
    module, *argv = RUNS[name]
    argv = [small, *argv, "--precision", "fp32", "--max-steps", "2"]
    on_gpu(module, *argv, "--out", "plain", cwd=tmp_path)
    on_gpu(module, *argv, "--out", "torchrun", cwd=tmp_path, torchrun=1)
    assert_close(tmp_path / "torchrun", tmp_path / "plain")


def test_a_run_on_a_gpu_continues_and_its_features_are_those_of_the_cpu(small, tmp_path, inside):
    module, *argv = RUNS["moco"]
    argv = [small, *argv, "--out", "out"]
    assert "stopped at step 2 of 4" in on_gpu(module, *argv, "--max-steps", "2", cwd=tmp_path)
    assert "continuing at step 2 of 4" in on_gpu(module, *argv, cwd=tmp_path)
    start, _ = entries(tmp_path / "out", "start")
    assert start["settings"]["precision"] == "bf16"
    probe = ["--quick", "--encoder", "out/checkpoint.pt", "--precision", "fp32", small]
    top1 = []
    for call in (inside, on_gpu):
        call(linear_probe, *probe, cwd=tmp_path)
        top1.append(json.loads((tmp_path / "out/probe/quick-h.json").read_text())["top1"])
    assert abs(top1[0] - top1[1]) < 100 * 2 / 44, top1          # two of 44 test images


@pytest.mark.parametrize("argv", [
    (moco_v2, *TINY, *MOCO, "--negatives", "hard"),
    (moco_v2, *TINY, *MOCO, "--compile"),
    (instdisc, *TINY, *GROUPS, "--K", "64", "--loss", "nce"),
    (instdisc, *TINY, *GROUPS, "--K", "64", "--loss", "infonce")],
    ids=["hard negatives", "compiled", "nce", "infonce"])
def test_sampling_and_compilation_run_on_the_gpu(small, tmp_path, argv):
    module, *argv = argv
    on_gpu(module, small, *argv, "--out", "out", cwd=tmp_path)
    losses = [event["loss"] for event in entries(tmp_path / "out", "step")]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)


def test_probes_pictures_and_detection_run(small, tmp_path):
    """Section 3's questions, the paper's linear probe, Figures 2 and 3, detection."""
    for name, argv in (("h", RUNS["moco"]), ("a", (*RUNS["moco"], "--preset", "table1a")),
                       ("s", RUNS["supervised"])):
        module, *argv = argv
        on_gpu(module, small, *argv, "--out", name, cwd=tmp_path)
    found = on_gpu(linear_probe, small, "--quick", "--encoder", "random", "h/checkpoint.pt",
                   "--feature", "h", "hidden", "z", "--predict", "class", "rotation", "hue",
                   cwd=tmp_path)
    assert "top-1" in found.splitlines()[-1]
    on_gpu(linear_probe, small, "--quick", "--encoder", "h/checkpoint.pt", "--size", "48",
           cwd=tmp_path)                        # images in memory are resized on the GPU
    found = on_gpu(linear_probe, small, "--encoder", "h/checkpoint.pt", "--epochs", "2",
                   "--batch-size", "22", cwd=tmp_path)
    assert "top-1" in found
    on_gpu(dip_inversion, small, "--head", "h/checkpoint.pt", "--no-head", "a/checkpoint.pt",
           "--iterations", "3", "--out", "pictures", cwd=tmp_path)
    on_gpu(tsne_aug, small, "--encoder", "s/checkpoint.pt", "--compare", "h/checkpoint.pt",
           "--classes", "2", "--per-class", "20", "--perplexity", "5", "--out", "pictures",
           cwd=tmp_path)
    assert {"figure2.png", "figure3.png"} <= {f.name for f in (tmp_path / "pictures").iterdir()}
    found = on_gpu(voc_detection, "--encoder", "random", "--arch", "resnet10",
                   "--iterations", "3", "--out", "detection", cwd=tmp_path)
    assert found.splitlines()[-1].startswith("AP ")
