"""The table of items against the scripts' flags; the rule for claims; what is written from the runs that there are."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import dip_inversion
import instdisc
import linear_probe
import moco_v2
import simclr
import tsne_aug
from results import claims, readme, reproduce

SCRIPTS = {f"{m.__name__}.py": m for m in (dip_inversion, instdisc, linear_probe, moco_v2, simclr, tsne_aug)}


def test_every_command_is_printed_and_parses(capsys, monkeypatch):
    """At all three scales, also as torchrun's; nothing runs."""
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    monkeypatch.setattr(reproduce.train, "_good_at_bf16", lambda: True)
    for gpus in (0, 8):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        reproduce.main(["all", "--dry-run", "--seeds", "0", "1"])
        lines, outs = capsys.readouterr().out.splitlines(), []
        for line in lines:
            if not line.startswith("#"):
                assert line.startswith("torchrun --standalone --nproc_per_node=8" if gpus else "python")
                name, argv = re.search(r"(\w+\.py) (.*)", line).groups()
                args = SCRIPTS[name].parse_args(shlex.split(argv))
                outs.append(getattr(args, "out", None))
        trained = [out for out in outs if out]
        assert len(trained) == len(set(trained)) == sum(int(line.split()[3]) for line in lines if line.startswith("#")) > 200


def test_cells_are_the_papers_and_one_setting_is_one_run():
    runs, names = reproduce.plan(reproduce.CLAIMED, "imagenet", [0])
    one = {names["table1", "MoCo v2", "MoCo v2"][0], names["table2a", "20 % to 100 %", "MoCo v2"][0],
           names["table2b", "1/2", "MoCo v2"][0]}
    assert len(one) == 1
    assert names["table3", "MoCo v2", "K = 65536"] == names["figure4", "MoCo v2", "K = 65536"]
    # 100 and 200 epochs
    assert names["table1", "(a) without head", "MoCo v2"] != names["table3", "(a) no MLP", "K = 65536"]
    assert reproduce.cells("table3", "imagenet")["(d) m = .5", "K = 512"][2] == 59.8
    assert reproduce.cells("table2a", "imagenet")["2 % to 10 %", "supervised"][2] == 52.0
    _, flags, _ = reproduce.cells("figure4", "imagenet")["SimCLR", "K = 65536"]
    assert flags[-4:] == ["--batch-size", "32768", "--chunk", "4096"] and len(reproduce.cells("figure4", "cifar10")) == 30
    # at cifar10, where the baseline has no blur, (b) is the baseline
    _, names = reproduce.plan(["table3"], "cifar10", [0])
    assert names["table3", "(b) no blur", "K = 64"] == names["table3", "MoCo v2", "K = 64"]


def test_the_rule_for_claims():
    sd, df = claims.pooled([[60., 61.], [70., 71.], []])
    assert sd == pytest.approx(np.sqrt(.5)) and df == 2
    half = 4.3027 * sd                                          # t of 95 % with 2 degrees of freedom, 1/2 + 1/2
    value, found, verdict = claims.judge("positive", (1, -1), ([70., 71.], [60., 61.]), sd, df)
    assert value == 10 and found == pytest.approx(half, rel=1e-4) and verdict == "shown"
    assert claims.judge("positive", (-1, 1), ([70., 71.], [60., 61.]), sd, df)[2] == "contradicted"
    assert claims.judge("positive", (1, -1), ([61., 62.], [60., 61.]), sd, df)[2] == "not resolved"
    assert claims.judge("zero", (1, -1), ([60., 60.2], [60., 60.1]), .1, 20)[2] == "shown"
    assert claims.judge("zero", (1, -1), ([65., 65.2], [60., 60.1]), .1, 20)[2] == "contradicted"
    assert claims.judge("zero", (1, -1), ([60., 60.2], [60., 60.1]), 3., 2)[2] == "not resolved"
    assert claims.judge("not above", (1, -1), ([50., 50.2], [60., 60.1]), .1, 20)[2] == "shown"
    assert claims.judge("not above", (1, -1), ([65., 65.2], [60., 60.1]), .1, 20)[2] == "contradicted"
    assert claims.judge("large", (1, -1), ([65., 65.2], [60., 60.1]), .1, 20)[2] == "contradicted"
    assert claims.judge("large", (1, -1), ([75., 75.2], [60., 60.1]), .1, 20)[2] == "shown"
    # the same differences in every pair, however far the pairs lie apart
    assert claims.judge("positive", *claims.paired((1, -1), ([60., 80.], [58., 78.1])))[2] == "shown"
    assert claims.judge("positive", (1, -1), ([60.], []), 3., 2)[2] == "not run"
    assert claims.judge("positive", (1, -1), ([61.], [60.]), None, 0)[2] == "not resolved (one seed)"


@pytest.mark.parametrize("scale", ["imagenet", "cifar10", "textures"])
def test_tables_and_figure_4_are_written_from_the_runs_that_there_are(tmp_path, monkeypatch, scale):
    """Every claim finds its cells at every scale, and with all of them run there is a verdict for each."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    runs, names = reproduce.plan(reproduce.CLAIMED, scale, [0, 1])
    reproduce.write(reproduce.CLAIMED, runs, names, scale, "here")
    out = tmp_path / "results/here"
    no_blur = scale != "imagenet"                               # there the row changes nothing
    assert (out / "claims.md").read_text().count("| not run |") == 21 - no_blur + 3 + 3
    assert "± " not in (out / "table1.md").read_text()
    left = re.findall(r"Not run: `(?:python|torchrun .*) \w+\.py (.*)`", (out / "table1.md").read_text())
    assert len(left) == 10 and "--preset table1c --seed 1 --out runs/reproduce/here/moco_v2-table1c-seed1" in " ".join(left)
    rng = np.random.default_rng(0)
    (out / "runs").mkdir()
    for i, name in enumerate(runs):
        top1 = 50 + i // 2 + rng.normal(0, .1)
        features = {"h": top1, "hidden": top1 - 20, "z": top1 - 10}
        (out / f"runs/{name}.json").write_text(json.dumps({"top1": top1, "features": features}))
    reproduce.write(reproduce.CLAIMED, runs, names, scale, "here")
    table = (out / "table1.md").read_text()
    assert re.search(r"\| \(a\) without head \| 51\.\d\d ± 0\.\d\d \(\+[01]\.\d\d\), n = 2 \| 59\.2 \|", table), table
    assert "Not run" not in table and re.search(r"hidden .*-20.00.*\| +\|", (out / "section3.md").read_text())
    assert ("n/a" in (out / "table3.md").read_text()) == no_blur
    assert ("the paper's, K = 512" in (out / "table3.md").read_text()) == no_blur
    text = (out / "claims.md").read_text()
    assert text.count("| not run |") == 3 + 3 and "contradicted" in text and "n = 2/2" in text
    assert re.search(r"a fixed random head beats none .* \+\d", text)
    with Image.open(out / "figure4.png") as picture:
        assert picture.size[0] > 700


def test_a_run_is_kept_once_and_a_failed_one_is_named(tmp_path, monkeypatch, capsys):
    """By a script that stands in for training: its files are those of a run."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "moco_v2.py").write_text(
        "import json, sys, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "if 'table1c' in sys.argv: print('lost'); sys.exit(1)\n"
        "start = dict(event='start', time=0, settings={}, device='', processes=1, threads=1, torch='', python='', commit='')\n"
        "log = [start, dict(event='step', time=60), dict(event='start', time=900), dict(event='step', time=930)]\n"
        "(out / 'log.jsonl').write_text(''.join(json.dumps(e) + '\\n' for e in log) + '{cut')\n"
        "(out / 'probe').mkdir(exist_ok=True)\n")
    (tmp_path / "linear_probe.py").write_text(
        "import json, sys, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--encoder') + 1]).parent\n"
        "with open('calls', 'a') as f: f.write('x')\n"
        "feature = sys.argv[sys.argv.index('--feature') + 1] if '--feature' in sys.argv else 'h'\n"
        "(out / f'probe/quick-{feature}.json').write_text(json.dumps(dict(top1=70.5 - len(feature), knn=60.)))\n")
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            reproduce.main(["table1", "--jobs", "2"])
        out = capsys.readouterr().out
        assert error.value.code == 1 and "failed: moco_v2-table1c-seed0, see" in out
        assert "| (c) more hidden layers | not run" in out
        assert "| (d) narrow | 69.50 (+0.00), n = 1 | 62.2 |" in out
        assert "Not run: `python moco_v2.py --preset table1c --seed 0 --out" in out
    assert "there already" in out and (tmp_path / "calls").read_text() == "xxxxxx"       # the baseline is probed on z too
    kept = json.loads((tmp_path / "results/textures/runs/moco_v2-table1a-seed0.json").read_text())
    assert kept["commands"][0].startswith("python moco_v2.py --preset table1a --seed 0 --out runs/reproduce/textures/")
    assert kept["data"].startswith("embedded textures") and kept["minutes"] == 1.5
    reproduce.main(["section3", "--collect"])
    assert "| hidden | 64.50 (-5.00), n = 1 |" in capsys.readouterr().out
    for argv, line in ((["table1", "--flags", "--epochs 2"], "name a folder for them with --as"),
                       (["table1", "--jobs", "0"], "--jobs 0: expected 1"),
                       (["table1", "--seeds", "0", "0"], "--seeds 0 0: expected different ones"),
                       (["table1", "--seeds", "-1"], "--seeds -1: expected"),
                       (["table1", "--flags", "--epochs 2", "--as", "textures"], "is for that scale's own runs")):
        with pytest.raises(SystemExit):
            reproduce.main(argv)
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(["table1", "--flags", "--epochs 2", "--as", "short"])
    assert "--preset table1 --epochs 2 --seed 0 --out runs/reproduce/short/" in json.loads(
        (tmp_path / "results/short/runs/moco_v2-table1-seed0.json").read_text())["commands"][0]
    with pytest.raises(SystemExit, match="holds runs of other flags .*--epochs.*, not of"):
        reproduce.main(["table1", "--flags", "--epochs 3", "--as", "short"])
    (tmp_path / "moco_v2.py").write_text("raise SystemExit(75)")
    with pytest.raises(SystemExit) as error:
        reproduce.main(["table2a"])
    assert error.value.code == 75 and "stopped; the same command goes on" in capsys.readouterr().out
    reproduce.stopped.clear()
    (tmp_path / "results/textures/runs/other.json").write_text(json.dumps({"data": "photographs"}))
    with pytest.raises(SystemExit, match="holds runs of other data .photographs., not of embedded textures"):
        reproduce.main(["table1"])
    assert "lost" in (tmp_path / "runs/reproduce/textures/moco_v2-table1c-seed0/output.txt").read_text()


def test_added_flags_do_not_undo_what_a_cell_is():
    """A point of Figure 4 keeps its K or its batch; a flag need be known only to the scripts that the item runs."""
    runs, names = reproduce.plan(["figure4"], "textures", [0], ["--batch-size", "32"])
    sizes = {simclr.parse_args(flags).batch_size for script, flags in runs.values() if script == "simclr"}
    assert len(names["figure4", "SimCLR", "K = 16"]) == 1 and sizes == {16, 64, 512}
    assert reproduce.plan(["table1"], "textures", [0], ["--K", "20"])[0]


def test_the_readme_says_what_was_run():
    text = (ROOT / "README.md").read_text()
    assert readme.fill(text) == text, "python results/readme.py"
    line = "| Table 3, MoCo v2, K = 65536 | `python moco_v2.py IMAGENET --preset table3 --K 65536` | 67.5 |"
    assert readme.fill(line) == readme.fill(f"{line} 99.9 | | |") != line


def test_readme_cells_are_the_runs_of_their_setting(tmp_path, monkeypatch):
    """One run under two names; Table 3's columns are each scale's; a row that changes nothing has no number of its own."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for place, name, top1 in (("imagenet", "moco_v2-table1-seed0", 60.), ("imagenet", "moco_v2-table1-seed1", 62.),
                              ("textures", "moco_v2-table1a-seed0", 70.)):
        (tmp_path / f"results/{place}/runs").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"results/{place}/runs/{name}.json").write_text(json.dumps({"top1": top1}))
    assert readme.ours("moco_v2", ["--preset", "table2b-half"]) == ["61.00 ± 1.41, n = 2", "not run", "not run"]
    assert readme.ours("moco_v2", ["--preset", "table3a", "--K", "65536"])[2] == "70.00, n = 1"
    assert readme.ours("moco_v2", ["--preset", "table3b", "--K", "512"])[2] == "n/a"
    (tmp_path / "results/a.md").write_text("# a\n\n| x |\n|---|\nNot run: y\n")
    block = "<!-- results/a.md -->\nold\n<!-- end -->\n"
    assert readme.fill(block) == "<!-- results/a.md -->\n| x |\n|---|\n<!-- end -->\n"
