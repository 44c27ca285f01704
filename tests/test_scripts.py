"""The scripts as users run them: whole, stopped and resumed, under torchrun, with bad input, as the README says."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import benchmark
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, photo, run, same
from PIL import Image

import dip_inversion
import instdisc
import linear_probe
import moco_v2
import simclr
import tsne_aug
from common import data
from common.model import resnet
from results import reproduce

SCRIPTS = {"moco_v2.py": moco_v2, "simclr.py": simclr, "instdisc.py": instdisc,
           "linear_probe.py": linear_probe, "dip_inversion.py": dip_inversion, "tsne_aug.py": tsne_aug,
           "benchmark.py": benchmark, "reproduce.py": reproduce}
TINY = ("--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--K", "20", "--epochs", "3", "--out", "out")
ONE = {"OMP_NUM_THREADS": "1"}                                  # bit for bit holds at one number of threads


def load(path):
    return torch.load(path, weights_only=True)


def events(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_from_images_to_accuracy_and_again(small, tmp_path, inside):
    """Train, probe, start again; what a user sees and finds."""
    first = run("moco_v2.py", small, *TINY, cwd=tmp_path)
    assert "class folders, 2 classes, 44 + 44 images" in first.stdout and "kNN of h" in first.stdout.splitlines()[-1]
    looks = [e for e in events(tmp_path / "out") if e["event"] == "epoch"]
    assert [e["epoch"] for e in looks] == [0, 1, 2, 3] and all(0 <= e["knn"] <= 100 for e in looks)
    losses = [(e["step"], e["loss"]) for e in events(tmp_path / "out") if e["event"] == "step"]
    assert [step for step, _ in losses] == [5, 10, 15] and all(0 < loss < 10 for _, loss in losses)
    start = events(tmp_path / "out")[0]
    assert start["settings"]["K"] == 20 and start["torch"] == torch.__version__
    with Image.open(tmp_path / "out/curves.png") as picture:
        assert picture.size[0] > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 20
    again = run("moco_v2.py", small, *TINY, cwd=tmp_path)
    assert "finished already" in again.stdout and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert "finished already" in inside(moco_v2, small, *TINY, "--compile", "--workers", "0", cwd=tmp_path)
    other = run("moco_v2.py", small, *TINY, "--m", ".5", cwd=tmp_path, check=False)
    assert other.returncode == 1 and "holds a run of other settings (m 0.99 there, 0.5 now)" in other.stderr
    probe = run("linear_probe.py", "--quick", "--encoder", "random", "out/checkpoint.pt", cwd=tmp_path)
    last = re.fullmatch(r"top-1 (\d+\.\d\d) %", probe.stdout.splitlines()[-1])
    saved = json.loads((tmp_path / "out/probe/quick-h.json").read_text())
    assert last and abs(float(last[1]) - saved["top1"]) < .006
    assert "random" in probe.stdout.splitlines()[-3] and "out/checkpoint.pt" in probe.stdout.splitlines()[-2]


def test_f_loads_into_a_plain_torchvision_resnet50(small, tmp_path, inside):
    """And gives its features; the newest checkpoint under runs/ is the one that is probed, by name."""
    argv = ["--arch", "resnet50", "--batch-size", "8", "--bn-group", "8", "--max-steps", "1", "--K", "16"]
    inside(moco_v2, small, *argv, cwd=tmp_path)
    saved = load(tmp_path / "runs/moco_v2-cifar10-table1-K16/checkpoint.pt")
    plain = torchvision.models.resnet50()
    missing, unexpected = plain.load_state_dict(saved["f"], strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    plain.fc, f = torch.nn.Identity(), resnet("resnet50")
    f.load_state_dict(saved["f"])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(x), f.eval()(x))
    assert linear_probe.newest_checkpoint() == "runs/moco_v2-cifar10-table1-K16/checkpoint.pt"


def test_sigterm_finishes_the_step_and_leaves_unfinished(small, tmp_path):
    argv = [sys.executable, ROOT / "moco_v2.py", small, *TINY, "--epochs", "2000"]
    process = subprocess.Popen(list(map(str, argv)), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "out/checkpoint.pt").exists():
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    step = load(tmp_path / "out/checkpoint.pt")["step"]
    assert process.returncode == 75 and f"stopped at step {step} of 10000" in out


def test_torchrun_with_two_processes_ends_like_one(small, tmp_path):
    """The real command. In fp32, so to what rounding becomes in 3 epochs; test_moco.py compares in float64."""
    argv = [small, *TINY, "--batch-size", "32", "--bn-group", "16", "--precision", "fp32", "--lr", ".01",
            "--momentum", ".9"]                                 # torchrun would take --m for one of its own
    run("moco_v2.py", *argv, cwd=tmp_path, **ONE)
    (tmp_path / "out").rename(tmp_path / "one")
    run("moco_v2.py", *argv, cwd=tmp_path, torchrun=2, **ONE)
    one, two = load(tmp_path / "one/checkpoint.pt"), load(tmp_path / "out/checkpoint.pt")
    assert one["settings"] == two["settings"] and events(tmp_path / "out")[0]["processes"] == 2
    for name in ("f", "g", "encoder_k"):
        for key, tensor in one[name].items():
            assert (two[name][key] - tensor).float().norm() <= 3e-2 * tensor.float().norm(), (name, key)
    assert (two["queue"] - one["queue"]).norm() <= 3e-2 * one["queue"].norm()


BRIEF = ("--arch", "resnet10", "--batch-size", "8", "--epochs", "3")
OTHERS = {"simclr": (simclr, *BRIEF), "chunk": (simclr, *BRIEF, "--chunk", "4"),
          "instdisc": (instdisc, *BRIEF, "--bn-group", "4", "--K", "20"),
          "hard": (moco_v2, *BRIEF, "--bn-group", "4", "--K", "20", "--negatives", "hard")}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_go_on_where_they_stopped_and_are_probed(small, tmp_path, inside, kind):
    script, *argv = OTHERS[kind]
    inside(script, small, *argv, "--out", "whole", cwd=tmp_path)
    assert "stopped at step 7 of 15" in inside(script, small, *argv, "--out", "out", "--max-steps", "7", cwd=tmp_path)
    end = inside(script, small, *argv, "--out", "out", cwd=tmp_path)
    assert "going on in out at step 7" in end and "kNN of h" in end.splitlines()[-1]
    a, b = load(tmp_path / "whole/checkpoint.pt"), load(tmp_path / "out/checkpoint.pt")
    assert same(a, b)
    assert "finished already" in inside(script, small, *argv, "--out", "out", cwd=tmp_path)
    assert "top-1" in inside(linear_probe, "--quick", "--encoder", "out/checkpoint.pt", cwd=tmp_path)
    if kind == "instdisc":
        assert {"bank", "knn"} <= events(tmp_path / "out")[1].keys()
        assert a["memory"].shape == (44, 128) and a["Z"] > 0
    if kind == "hard":
        with Image.open(tmp_path / "out/figure5.png") as picture:
            assert picture.size[0] > 1000 and len(np.unique(np.asarray(picture))) > 50


@pytest.mark.parametrize("kind", ["chunk", "instdisc"])
def test_other_methods_under_torchrun_end_like_one_process(small, tmp_path, inside, kind):
    script, *argv = OTHERS[kind]
    argv = [small, *argv, "--precision", "fp32", "--lr", ".001", "--max-steps", "2"]
    inside(script, *argv, "--out", "one", cwd=tmp_path)
    run(f"{script.__name__}.py", *argv, "--out", "two", cwd=tmp_path, torchrun=2, **ONE)
    one, two = load(tmp_path / "one/checkpoint.pt"), load(tmp_path / "two/checkpoint.pt")
    for key, tensor in one["f"].items():
        assert (two["f"][key] - tensor).float().norm() <= 2e-3 * tensor.float().norm(), key


def test_bad_input_of_other_methods_gets_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inst, tiny = [small, *OTHERS["instdisc"][1:]], [small, *BRIEF]
    instdisc.main([*map(str, inst), "--max-steps", "1", "--out", "bank"])
    saved = load(tmp_path / "bank/checkpoint.pt")
    saved["memory"] = saved["memory"][:7]
    torch.save(saved, tmp_path / "bank/checkpoint.pt")
    capsys.readouterr()
    for script, argv, line in [
            (instdisc, [*inst, "--K", "0"], "--K 0: expected 1"),
            (instdisc, [*inst, "--bank-momentum", "1"], "--bank-momentum 1"),
            (instdisc, [*inst, "--out", "bank"], "memory has shape (7, 128), not (44, 128)"),
            (instdisc, [*inst, "--proximal", "-1"], "--proximal -1"),
            (instdisc, [*inst, "--loss", "mse"], "invalid choice: 'mse'"),
            (simclr, [*tiny, "--batch-size", "1"], "--batch-size 1: expected 2"),
            (simclr, [*tiny, "--chunk", "1"], "--chunk 1:"),
            (simclr, [*tiny, "--temperature", "0"], "--temperature 0"), (simclr, [*tiny, "--bn-group", "4"], "unrecognized"),
            (simclr, [small], "larger than the data set of 44 images; --batch-size 44 would fit"),
            (moco_v2, [small, *TINY, "--negatives", "hard", "--skew", "-1000000000"], "leave no rank"),
            (moco_v2, [small, *TINY, "--negatives", "hard", "--skew-scale", "0"], "--skew-scale 0: expected")]:
        with pytest.raises(SystemExit) as error:
            script.main(list(map(str, argv)))
        message = str(error.value) if error.value.code not in (0, 2) else capsys.readouterr().err
        assert error.value.code not in (0, None) and line in message and len(message.strip().splitlines()) == 1, message
    simclr.main([*map(str, tiny), "--chunk", "3", "--max-steps", "1"])
    assert "3 does not divide the batch of 8: 3 chunks of 2 to 3 images" in capsys.readouterr().out


def test_images_without_labels_are_trained_on_and_not_probed(tmp_path, inside):
    (tmp_path / "photos").mkdir()
    for i in range(9):
        Image.fromarray(photo(np.random.default_rng(i), 40, 40)).save(tmp_path / f"photos/{i}.png")
    out = inside(moco_v2, "photos", *TINY, "--epochs", "1", cwd=tmp_path)
    assert "no labels, no kNN" in out and (tmp_path / "out/curves.png").exists()
    with pytest.raises(SystemExit, match="labels are needed"):
        inside(linear_probe, "--quick", "--encoder", "out/checkpoint.pt", cwd=tmp_path)


@pytest.mark.parametrize("row", ["moco-v1", "table1b", "table2a-extreme", "section7", "fair-cifar10"])
def test_a_row_trains_with_its_settings(small, tmp_path, inside, row):
    inside(moco_v2, small, *TINY, "--preset", row, "--max-steps", "1", cwd=tmp_path)
    saved = load(tmp_path / "out/checkpoint.pt")["settings"]
    for key in set(moco_v2.PRESETS[row]) & {"head", "stack", "temperature", "schedule", "crop", "m"}:
        assert tuple(np.atleast_1d(saved[key])) == tuple(np.atleast_1d(moco_v2.PRESETS[row][key])), key


def bad(tmp_path, small):
    """Bad input, and what the one line must name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(3):
        (broken / f"{i}.jpg").write_bytes(b"no image")
    (tmp_path / "hollow/train").mkdir(parents=True)
    return [
        (["nowhere"], "nowhere: no such folder"),
        (["notes.txt"], "notes.txt: not a folder"),
        (["empty"], "empty: no images in this folder"),
        (["hollow"], "train: no class folders"),
        (["broken"], "none of 3 sampled images can be read"),
        ([small, *TINY, "--K", "0"], "--K 0: expected 1"),
        ([small, "--batch-size", "64"], "larger than the data set of 44 images; --bn-group 22 --batch-size 44 would fit"),
        ([small, "--batch-size", "256", "--bn-group", "64"], "--bn-group 22 --batch-size 44 would fit"),
        ([small, "--batch-size", "40"], "groups of 32 images; --bn-group 20 --batch-size 40 would fit"),
        ([small, "--preset", "table9"], "invalid choice: 'table9'"),
        ([small, *TINY, "--out", "notes.txt/out"], "--out notes.txt/out: cannot be written"),
        ([small, *TINY, "--m", "1"], "--m 1: expected 0 <= m < 1"),
        ([small, *TINY, "--temperature", "0"], "--temperature 0"),
        ([small, *TINY, "--temperature", "nan"], "--temperature nan"),
        ([small, *TINY, "--lr", "nan"], "--lr nan"),
        ([small, *TINY, "--crop", ".5", ".2"], "--crop 0.5 0.2"),
        ([small, *TINY, "--jitter", "-1"], "--jitter -1"),
        ([small, *TINY, "--arch", "vgg16"], "--arch vgg16: unknown"),
        ([small, *TINY, "--epochs", "0"], "--epochs 0"),
        ([small, *TINY, "--max-steps", "0"], "--max-steps 0"),
        ([small, *TINY, "--lr", "-1"], "--lr -1"),
        ([small, *TINY, "--workers", "-1"], "--workers -1: expected"),
    ]


def test_bad_input_gets_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, line in bad(tmp_path, small):
        with pytest.raises(SystemExit) as error:
            moco_v2.main(list(map(str, argv)))
        message = str(error.value) if error.value.code not in (0, 2) else capsys.readouterr().err
        assert error.value.code not in (0, None) and line in message, (argv, message)
        assert len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "out").exists()


def test_bad_input_of_the_probe_gets_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, line in [(["--quick"], "no checkpoint under runs/"), (["--quick", "--encoder", "nothing.pt"], "no such file"),
                       (["nowhere", "--quick", "--encoder", "random"], "no such folder"),
                       ([str(small), "--quick", "--encoder", "random", "--arch", "x"], "--arch x: unknown")]:
        with pytest.raises(SystemExit) as error:
            linear_probe.main(argv)
        message = str(error.value) if error.value.code not in (0, 2) else capsys.readouterr().err
        assert error.value.code not in (0, None) and line in message and len(message.strip().splitlines()) == 1


def test_a_message_reaches_the_user_without_a_traceback(tmp_path):
    done = run("moco_v2.py", "nowhere", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.startswith("nowhere: no such folder") and done.stderr.count("\n") == 1


def readme_commands():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"(?:^    |`)((?:python|torchrun) [^`\n]*?\w+\.py[^`\n#]*)", text, re.MULTILINE)
    return [(c, SCRIPTS[m[1]], shlex.split(m[2])) for c in found if (m := re.search(r"(\w+\.py)(.*)", c)) and
            m[1] != "readme.py"]                                # which takes none; test_reproduce.py runs it


def test_every_command_of_the_readme_parses_with_its_script():
    commands = readme_commands()
    for text, script, argv in commands:
        script.parse_args(argv)                                 # leaves with 2 where a flag is unknown
    rows = {script.parse_args(argv).preset for _, script, argv in commands if script is moco_v2}
    assert set(moco_v2.PRESETS) - {"fair-cifar10"} <= rows and len(commands) > 30
    for target in re.findall(r"make (\w+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_help_is_quick_to_import():
    """pyplot and scipy.stats take seconds; they are imported where they are used."""
    code = ("import sys, moco_v2, simclr, instdisc, linear_probe, dip_inversion, tsne_aug\n"
            "print([m for m in sys.modules if m in ('matplotlib', 'scipy.stats')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_benchmark_still_runs(tmp_path, capsys):
    benchmark.jpegs(tmp_path, 2)
    benchmark.input_rows(data._find(tmp_path), 1, 32)
    benchmark.momentum_row("resnet10", torch.device("cpu"), "", 1)
    benchmark.quick_probe_row("resnet10", 32, 600, 60, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.search(r"\d\.\d+ (times|%)", line) for line in lines)
