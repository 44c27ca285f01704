"""Cells and commands of the paper's items; the rule for claims; results/README.md; Figure 5."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import refused, signal_handlers_restored, write_folder
from PIL import Image

import dip_inversion
import instdisc
import linear_probe
import moco_v2
import simclr
import tsne_aug
from common import UserError, ddp, train
from reproduce import __main__ as reproduce
from reproduce import claims, figure5, plan, report, verdicts, voc_detection

SCALES = ["imagenet", "cifar10", "textures"]
SCRIPTS = {f"{m.__name__}.py": m
           for m in (dip_inversion, instdisc, linear_probe, moco_v2, simclr, tsne_aug)}
SCRIPTS |= {"reproduce.figure5": figure5, "reproduce.voc_detection": voc_detection}
COMMAND = r"(\w+\.py|reproduce\.\w+) (.*)"


def call(*argv):
    with signal_handlers_restored():
        return reproduce.main(list(argv))


@pytest.mark.parametrize("gpus", [0, 8])
def test_every_command_is_printed_and_parses(capsys, monkeypatch, gpus):
    """At all three scales, with torchrun where there are GPUs; nothing runs.

    A batch divides into groups on the processes, which a script would refuse otherwise.
    """
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    monkeypatch.setattr(train, "has_bf16", lambda device=None: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    call("all", "--dry-run", "--seeds", "0", "1")
    lines, trained, drawn, worlds = capsys.readouterr().out.splitlines(), [], 0, set()
    for line in lines:
        if line.startswith("#"):
            scale = line.split()[2].rstrip(":")
            continue
        name, argv = re.search(COMMAND, line).groups()
        args = SCRIPTS[name].flags().parse_args(shlex.split(argv))
        if name in ("dip_inversion.py", "tsne_aug.py", "reproduce.figure5"):
            assert line.startswith("python ")                   # in one process
            drawn += 1
            continue
        n = int(re.match(r"(?:torchrun --standalone --nproc_per_node=(\d)|python) ", line)[1] or 1)
        worlds.add(n)
        monkeypatch.setattr(ddp, "world", lambda n=n: n)
        if name in ("moco_v2.py", "simclr.py", "instdisc.py") or "--train" in line:
            resolved = json.loads(plan.settings(name[:-3], shlex.split(argv), scale))
            train.check_batch(10 ** 6, resolved["batch_size"], resolved.get("bn_group", 1))
        trained += [args.out] if args.out else []
    assert worlds == ({2, 4, 8} if gpus else {1})
    counts = [int(line.split()[3]) for line in lines if line.startswith("#")]
    assert len(trained) == len(set(trained)) == sum(counts) > 200 and drawn == 9
    call("all", "--scale", "cifar10-laptop", "--dry-run", "--seeds", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# scale cifar10-laptop: ") and len(lines) > 80
    for line in lines[1:]:
        name, argv = re.search(COMMAND, line).groups()
        args = SCRIPTS[name].flags().parse_args(shlex.split(argv))
        if "--preset" in line or "--train" in line:
            assert (args.arch, args.seed) == ("resnet10", 2)
            assert args.epochs == 10 or f"epochs-{args.epochs}" in args.out


def test_cells_are_the_papers_and_one_setting_is_one_run():
    cells = plan.cells("imagenet")

    def name(*key):
        return cells[key].name
    assert name("table1", "MoCo v2", "MoCo v2") == name("table2b", "1/2", "MoCo v2") == \
        name("table2a", "20 % to 100 %", "MoCo v2")
    last = cells["table3", "MoCo v2", "K = 65536"], cells["figure4", "MoCo v2", "K = 65536"]
    assert last[0].name == last[1].name and last[0].flags == last[1].flags
    # 100 and 200 epochs
    assert name("table1", "(a) without head", "MoCo v2") != \
        name("table3", "(a) no MLP", "K = 65536")
    assert cells["table3", "(d) m = .5", "K = 512"].paper == 59.8
    assert cells["table2a", "2 % to 10 %", "supervised"].paper == 52.0
    flags = cells["figure4", "SimCLR", "K = 65536"].flags
    assert flags[-4:] == ["--batch-size", "32768", "--chunk", "2048"]
    # On small images, where the baseline has no blur, row (b) is the baseline.
    cells = plan.cells("cifar10")
    assert sum(item == "figure4" for item, _, _ in cells) == 30
    assert name("table3", "(b) no blur", "K = 64") == name("table3", "MoCo v2", "K = 64")
    # Supervised rows differ from MoCo's in nothing but supervision: no blur there either.
    for scale in SCALES:
        supervised, contrastive = (
            plan.cells(scale)["table2a", "2 % to 10 %", column]
            for column in ("supervised", "MoCo v2"))
        supervised, contrastive = (json.loads(plan.settings(cell.script, cell.flags, scale))
                                   for cell in (supervised, contrastive))
        for key in ("stack", "crop", "jitter", "blur", "arch", "size"):
            assert supervised[key] == contrastive[key], (scale, key)


def test_every_row_has_the_papers_number_of_its_column():
    """Against the numbers as the paper prints them, table by table."""
    printed = {"table1": [64.4, 59.2, 62.9, 63.9, 62.2],
               "table2a": [64.4, 75.5, 63.7, 74.8, 47.1, 52.0],
               "table2b": [63.1, 75.8, 63.9, 75.7, 64.2, 75.6, 64.3, 74.6],
               "table3": [67.3, 67.5, 61.7, 63.6, 65.5, 66.4, 67.2, 67.3, 59.8, 64.5]}
    for item, numbers in printed.items():
        for scale in SCALES:
            found = [cell.paper for (name, row, _), cell in plan.cells(scale).items()
                     if name == item and row != "with blur"]     # a row of ours
            assert found == numbers


def judged(text, samples, scale="textures"):
    """The verdict on the claim with `text`, from samples {cell: values}; others have n = 3."""
    cells, found = plan.cells(scale), {}
    for i, (key, cell) in enumerate(cells.items()):
        found[key] = [60.1, 60.6, 60.2]
        first = cells[key[0], next(iter(plan.ROWS[key[0]])), key[2]]
        if cell is not first and (cell.name, cell.feature) == (first.name, first.feature):
            found[key] = None
    claim, = [claim for claim in (*claims.PAPER, *claims.OURS) if claim.text == text]
    for cell, values in samples.items():
        row, _, column = cell.partition(" | ")
        found[claim.item, row, column or plan.columns(claim.item, scale)[0]] = values
    return claims.Judge(found, scale).verdict(claim)


def test_claims_are_judged_by_their_cells():
    """With the cells of each kind of claim; all other cells have equal means and spreads."""
    higher, lower, apart = [65.1, 65.5, 65.4], [55.2, 55.1, 55.6], [40., 62., 71.]
    head, none = "MoCo v2", "(a) without head"
    assert judged("a projection head helps", {head: higher}).verdict == "shown"
    assert judged("a projection head helps", {none: higher}).verdict == "contradicted"
    assert judged("a projection head helps", {}).verdict == "not resolved"
    assert judged("a projection head helps", {head: [60.]}).verdict == "not run"
    deep = "a deeper head does not help"
    assert judged(deep, {"(c) more hidden layers": lower}).verdict == "shown"
    assert judged(deep, {"(c) more hidden layers": higher}).verdict == "contradicted"
    flat = "MoCo v2 is flat from the smaller K of Table 3 upwards"
    assert judged(flat, {}).verdict == "shown" and len(judged(flat, {}).n) == 3
    assert judged(flat, {"MoCo v2 | K = 128": higher}).verdict == "contradicted"
    assert judged(flat, {"MoCo v2 | K = 128": apart}).verdict == "not resolved"
    # Supervised training against MoCo: (75 - 52) - (64 - 47).
    crops = judged("extreme crops hurt supervised training more than MoCo", {
        "20 % to 100 % | supervised": [75., 75.4, 75.2],
        "2 % to 10 % | supervised": [52., 52.2, 52.4],
        "20 % to 100 %": [64., 64.4, 64.2], "2 % to 10 %": [47., 47.4, 47.2]})
    assert crops.estimate == pytest.approx(6) and crops.verdict == "shown"
    # Blur adds 3 points and the head 5; the cell of the baseline counts twice.
    blur = judged("with few negatives, the head gains more than blur", {
        "MoCo v2 | K = 16": higher, "with blur | K = 16": [68.1, 68.5, 68.4],
        "(a) no MLP | K = 16": [60.1, 60.5, 60.4]})
    assert blur.estimate == pytest.approx(2) and blur.verdict == "shown"
    no_such_row = judged("with few negatives, removing the head costs more than removing blur", {})
    assert no_such_row is None


def test_a_collapse_is_the_loss_of_half_of_the_gain():
    text = "training fails without a momentum encoder, many negatives"
    for cell, verdict in ((62., "shown"), (64.5, "not resolved"), (68., "contradicted")):
        found = judged(text, {"MoCo v2 | K = 1024": [69.6, 70.2, 70.], "m = 0 | K = 1024":
                              [cell, cell + .4, cell + .2]})
        assert found.verdict == verdict, (cell, found)          # untrained: 60.3


def test_probes_of_the_same_runs_are_compared_in_pairs():
    """The same differences in every pair, however far the pairs lie apart."""
    found = judged("a probe of h beats one of z", {
        "MoCo v2, h | class": [60., 80., 70.], "MoCo v2, z | class": [58., 78.1, 68.05]})
    assert found.estimate == pytest.approx(1.95) and found.half < 1 and found.verdict == "shown"


def test_every_claim_names_cells_that_exist():
    for scale in (*SCALES, *plan.NAMED):
        for claim in (*claims.PAPER, *claims.OURS):
            every = claims.keys_of(claim, scale)
            assert every or claim.item in ("length", "detection")
            assert all(key in plan.cells(scale) for keys in every for key in keys), claim
            assert claim.kind in (*verdicts.KINDS, "collapse")


def keep(campaign, name, top1, flags=(), **features):
    """A run of 1000 images as `reproduce.keep` writes it, without what the report does not read."""
    batch = re.search(r"batch-size-(\d+)", name)
    answers = {feature: dict.fromkeys(plan.PREDICTIONS, value)
               for feature, value in {"h": top1, **features}.items()}
    if name.startswith("voc_detection"):
        answers = {"detection": {"AP": top1, "AP50": top1 + 30, "AP75": top1 - 5}}
    run = {"name": name, "data": "images", "features": answers, "flags": list(flags),
           "minutes": 30., "scale": campaign.scale,
           "settings": {"scale": campaign.scale, "images": 1000, "epochs": 3,
                        "batch_size": int(batch[1]) if batch else 64},
           "device": "a computer", "torch": "2.0", "commit": "abc",
           "commands": [f"python {name.split('-')[0]}.py --out x"]}
    path = campaign.folder / f"runs/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder in the place of the project's."""
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path


def test_the_number_of_seeds_is_fixed_in_advance():
    cells = plan.cells("cifar10-laptop")
    for key, n in ((("table1", "MoCo v2", "MoCo v2"), 3), (("table2b", "1/4", "MoCo v2"), 2),
                   (("supervised", "one layer", "supervised"), 2),      # drawn in Figure 3 too
                   (("figure4", "MoCo v2", "K = 512"), 2),
                   (("figure4", "MoCo v2", "K = 64"), 3),       # a cell of Table 3 too
                   (("length", "MoCo v2", "50 epochs"), 3),
                   (("length", "MoCo v2", "100 epochs"), 2)):
        assert claims.n_seeds(cells[key].name, "cifar10-laptop") == n, key
    values = [60., 61., 62.]
    for n, used in ((3, values), (2, values[:2]), (None, values)):
        assert claims.complete(values, n) == used
    assert claims.complete(values[:2], 3) == claims.complete(values[:1], None) == []


@pytest.mark.parametrize("scale", SCALES)
def test_tables_claims_and_figure_4_are_written_from_the_runs_that_there_are(root, capsys, scale):
    """Every claim finds its cells at every scale; with all of them run, each has a verdict."""
    campaign = plan.Campaign("here", scale)
    runs = plan.runs(plan.TABLES, campaign, [10, 11, 12])
    report.write(plan.TABLES, campaign)
    no_blur = scale != "imagenet"               # there, the row changes nothing
    lines = claims.table(report.results(campaign), scale)
    n = len(claims.PAPER) - 3 + len(claims.OURS) - 2            # blur in two ways; none on length
    n += 2 * (scale in plan.DETECTION)
    missing = [line.split("; ") for line in lines if line.startswith("Runs are missing for: ")]
    assert len(missing) == 2 and sum(map(len, missing)) == n
    printed = capsys.readouterr().out
    assert "± " not in printed and "(c) more hidden layers" not in printed
    text = (root / "results/README.md").read_text()
    assert f"ITEM is one of\n{', '.join(plan.ROWS)}, or all." in text and "## results" not in text
    rng = np.random.default_rng(0)
    for i, name in enumerate(runs):
        top1 = 50 + i // 3 + rng.normal(0, .1)
        keep(campaign, name, top1, hidden=top1 - 20 + rng.normal(), z=top1 - 10 + rng.normal())
    report.write(plan.TABLES, campaign)
    text = (root / "results/README.md").read_text()
    row = r"\| \(a\) without head \| 5[01]\.\d\d ± 0\.\d\d \(\+[01]\.\d\d\), n = 3 \| 59\.2 \|"
    assert re.search(row, text), text
    row = r"\| MoCo v2, hidden \|( [23]\d\.\d\d ± \d\.\d\d, n = 3 \|){6}"
    assert re.search(row, text), text
    for row in ("untrained, h", "untrained, z"):
        assert re.search(rf"\| {row} \|( \d+\.\d\d ± \d\.\d\d, n = 3 \|){{6}}", text)
    assert ("(b) no blur" in text) != no_blur
    assert (", ours | K = 512, the paper |" in text) and ("| K = 512, ours" in text) != no_blur
    assert "ot complete" not in text.split("## results")[1]
    assert "contradicted" in text and "| 3/3 |" in text
    row = r"\| untrained \| \d\d.\d\d ± 0.\d\d, n = 3 \| \d\d\d?.\d\d ± "      # AP, AP50
    assert bool(re.search(row, text)) == (scale in plan.DETECTION), text
    assert f"{len(runs)} runs, {len(runs) / 2:.1f} hours of training; flags: none" in text
    assert re.search(r"a fixed random head beats none .* \| \+3.7 \| [-+]\d", text)
    each = ", ".join(f"{1000 // max(16, K // 2) * 3} at K = {K}" for K in plan.FIGURE4_K[scale])
    assert "Steps of training: MoCo v2 45; MoCo v2, hard negatives 45; " in text
    assert f"InstDisc 45; SimCLR {each}." in text
    table = "\n".join(claims.table(report.results(campaign, claims.FIRST_SEED), scale))
    assert table in text and table in (campaign.folder / "claims.md").read_text()
    (campaign.folder / f"runs/{list(runs)[0]}.json").unlink()      # a seed of Table 1's first row
    assert ("a projection head helps; " in report.page()) == (scale == "textures")
    for name in ("figure4.png", "section3.png"):
        with Image.open(campaign.folder / name) as picture:
            assert picture.size[0] > 700 and len(np.unique(np.asarray(picture))) > 50


def test_the_gain_over_the_length_of_training_is_drawn_and_judged(root):
    campaign = plan.Campaign("here", "cifar10-laptop")
    gains, rng = {"5": 0., "10": 0., "20": 1., "50": 2., "100": 4.}, np.random.default_rng(0)
    for name in plan.runs(["length"], campaign, [10, 11, 12]):
        epochs = re.search(r"epochs-(\d+)", name)
        gain = 0. if "table1a" in name else gains[epochs[1] if epochs else "10"]
        keep(campaign, name, 60 + gain + rng.normal(0, .1))
    report.write(["length"], campaign)
    with Image.open(campaign.folder / "length.png") as picture:
        assert picture.size[0] > 700
    text = (campaign.folder / "claims.md").read_text()
    assert re.search(r"the gain from the head grows .* \+[34]\.\d ± \d\.\d .* shown", text), text


def test_readme_cells_are_the_runs_of_their_setting(root):
    """One run under two names; Table 3's columns are each scale's; a row that changes nothing has
    no number of its own; what shows nothing is left out."""
    imagenet, textures = (plan.Campaign(scale, scale) for scale in ("imagenet", "textures"))
    short = plan.Campaign("short", "cifar10")
    keep(imagenet, "moco_v2-table1-seed0", 60., hidden=1., z=2.)
    keep(imagenet, "moco_v2-table1-seed1", 62., hidden=1., z=2.)
    keep(textures, "moco_v2-table1a-seed0", 70.)
    for seed, top1 in ((10, 50.), (2, 52.)):
        keep(short, f"moco_v2-table1a-seed{seed}", top1, flags=["--epochs", "2"])
    (root / "results/cifar10").mkdir()
    _, *split = re.split("^## results/(.*)$", report.page(), flags=re.M)
    parts = dict(zip(split[::2], split[1::2]))
    assert list(parts) == ["imagenet", "textures", "short"]
    assert "### Table 1" not in parts["imagenet"]               # one row is no comparison
    assert "| (a) without head | 70.00, n = 1 | 59.2 |" in parts["textures"]
    assert "### Table 3" not in parts["textures"]               # would repeat this one run
    assert "| (a) without head | 51.00 ± 1.41, n = 2 | 59.2 |" in parts["short"]
    assert "flags: moco_v2 --epochs 2;" in parts["short"] and "flags: none;" in parts["textures"]
    assert "### Table 2" not in "".join(parts.values())
    found = report.results(short)["table1", "(a) without head", "MoCo v2"]
    assert found == [52., 50.]                                  # seeds 2 and 10


def test_pictures_are_shown_if_they_are_there(root):
    (root / "results/textures").mkdir()
    (root / "results/textures/figure2.png").write_text("")
    measures = dict(zip(("feature_error", "structure"), ([.5, .25], [.1, .2])))
    (root / "results/textures/figure2.json").write_text(json.dumps({
        "columns": ["h", "z"], "images": ["cat", "dog"], "panels": [measures, measures],
        "differences": {"h": {"feature_error": [0, .5], "structure": [-.25, .125]}}}))
    text = report.page()
    assert """
| mean of 2 images | feature_error | structure |
| --- | --- | --- |
| h | 0.375 | 0.150 |
| z | 0.375 | 0.150 |
| (h) minus (z), 95 % intervals | +0.000 ± 0.500 | -0.250 ± 0.125 |
""" in text
    assert "## results/textures" in text and "(textures/figure2.png)" in text
    assert "figure3.png" not in text and "Claims" not in text


def test_results_readme_is_what_the_runs_say():
    path = plan.ROOT / "results/README.md"
    assert path.read_text() == report.page(), f"{path}: python -m reproduce table1 --collect"


def test_verdicts_in_the_projects_readme_are_those_of_the_results():
    number = r"([+-]?\d+\.\d+) ± (\d+\.\d+)"
    judged = [(*found.groups(), "*" if line.endswith("| yes |") else "",
               line.split(" | ")[5].split(";")[0])
              for line in report.page().splitlines() if line.startswith("| ")
              for found in [re.search(rf"\| {number} \| [\d/]+ \|", line)] if found]
    text = (plan.ROOT / "README.md").read_text()
    table = text.split("| ours | n | verdict |\n")[1].split("\n\n")[0]
    checked = 0
    for line in table.splitlines()[1:]:
        _, _, _, ours, _, said, _ = line.split("|")
        stated = re.findall(rf"{number}(\*?)", ours)
        said = said.strip().split("; ")
        said *= len(stated) if len(said) == 1 else 1        # one verdict for all
        for numbers, verdict in zip(stated, said):
            assert (*numbers, verdict) in judged, f"{line}: not in results/README.md"
            checked += 1
    assert checked > 5


def test_means_in_the_walkthrough_are_those_of_the_results():
    """Those with a standard deviation, and those in tables; all are rounded to one decimal."""
    page, text = report.page(), (plan.ROOT / "docs/walkthrough.md").read_text()
    means = np.array(re.findall(r"\| (\d+\.\d\d) ± (\d+\.\d\d)", page), float)
    stated = np.array(re.findall(r"(\d+\.\d) ± (\d+\.\d)\b", text), float)
    assert len(stated) > 5
    assert (abs(stated[:, None] - means).max(2).min(1) < .056).all()
    papers = np.array(re.findall(r"\| (\d\d\.\d) \|", page), float)
    tables = "".join(line for line in text.splitlines() if line.startswith("|"))
    stated, known = np.array(re.findall(r"\b\d\d\.\d\b", tables), float), [*papers, *means[:, 0]]
    assert len(stated) > 30
    assert (abs(stated[:, None] - known).min(1) < .056).all()
    losses = [line.split("|")[2:-1] for line in text.splitlines()
              if line.startswith(("| lost from h", "| the same without training"))]
    campaign = plan.Campaign("cifar10-laptop", "cifar10-laptop")
    found = report.results(campaign, claims.FIRST_SEED)
    rows = [(row, feature) for feature in ("hidden", "z") for row in ("MoCo v2", "untrained")]
    for line, (row, feature) in zip(losses, rows, strict=True):
        for what, lost in zip(("class", "grey", "hue", "noise", "rotation"), line, strict=True):
            h, layer = (np.mean(found["section3", f"{row}, {name}", what])
                        for name in ("h", feature))
            assert abs(h - layer - float(lost)) < .0501
    by_length = report.known_by_length(campaign.scale, report.kept_runs(campaign))
    for what in "rotation", "grey":
        h, z = (by_length[f"{what} from {name}"] for name in ("h", "z"))
        assert h[10] == found["section3", "MoCo v2, h", what]
        assert z[10] == found["section3", "MoCo v2, z", what]
        *first, last = (f"{np.mean(h[epochs]) - np.mean(z[epochs]):.1f}" for epochs in h)
        assert f"{', '.join(first)} and {last}" in " ".join(text.split())


TRAINING = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
if "table1c" in sys.argv:
    print("lost")
    sys.exit(1)
start = dict(event="start", step=0, time=0, settings=dict(scale="textures", data="/a"), device="",
             processes=1, threads=1, torch="", python="", commit="")
log = [start, dict(event="step", step=50, time=60), dict(start, step=50, time=900),
       dict(event="step", step=60, time=930),
       dict(event="epoch", step=60, time=930, epoch=1, loss=6.5, knn=40.)]
(out / "log.jsonl").write_text("".join(json.dumps(entry) + "\\n" for entry in log) + "{cut")
(out / "probe").mkdir(exist_ok=True)
"""
PROBE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--encoder") + 1]).parent
with open("calls", "a") as file:
    file.write("x")
first, last = sys.argv.index("--feature") + 1, sys.argv.index("--predict")
for feature in sys.argv[first:last]:
    answers = {name: dict(top1=70.5 - len(feature)) for name in sys.argv[last + 1:]}
    result = dict(**answers["class"], knn=60., predictions=answers)
    (out / f"probe/quick-{feature}.json").write_text(json.dumps(result))
"""


@pytest.fixture
def fake(root):
    """A root in which scripts stand in for training and probing: their files are those of a run."""
    (root / "moco_v2.py").write_text(TRAINING)
    (root / "linear_probe.py").write_text(PROBE)
    return root


def test_a_run_is_kept_once_and_a_failed_one_is_named(fake, capsys):
    for _ in range(2):
        assert call("table1", "--jobs", "2") == 1
        out = capsys.readouterr().out
        assert "failed: moco_v2-table1c-seed0: lost; see" in out
        assert "(c) more hidden layers" not in out
        assert "| (d) narrow | 69.50 (+0.00), n = 1 | 62.2 |" in out
    assert "4 of 5 runs exist already" in out
    assert "(c) more hidden layers" not in (fake / "results/README.md").read_text()
    assert (fake / "calls").read_text() == "xxxx"
    kept = json.loads((fake / "results/textures/runs/moco_v2-table1a-seed0.json").read_text())
    assert kept["commands"][0].startswith(
        "python moco_v2.py --preset table1a --seed 0 --out runs/reproduce/textures/")
    assert kept["data"].startswith("built-in textures") and kept["minutes"] == 1.5
    assert kept["settings"] == {"scale": "textures"}
    assert "--quick" in kept["commands"][1]
    assert kept["features"] == {"h": dict.fromkeys(plan.PREDICTIONS, 69.5)} and kept["knn"] == 60
    assert kept["epochs"] == [{"epoch": 1, "loss": 6.5, "knn": 40.0}]
    assert call("section3", "--collect") == 0
    out = capsys.readouterr().out
    assert "| MoCo v2, hidden |" + " 64.50, n = 1 |" * 6 in out
    assert "untrained, h" not in out
    output = fake / "runs/reproduce/textures/moco_v2-table1c-seed0/output.txt"
    assert "lost" in output.read_text()


FINE_TUNING = """
import json, pathlib, sys
encoder = pathlib.Path(sys.argv[sys.argv.index("--encoder") + 1])
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert encoder.parent.is_dir() and ("K-16" in str(encoder)) == ("K-16" in str(out))
start = dict(event="start", step=0, time=0, device="", processes=1, threads=1,
             settings=dict(scale="scenes", encoder=str(encoder.resolve())),
             torch="", python="", commit="")
(out / "log.jsonl").write_text(json.dumps(start))
(out / "result.json").write_text(json.dumps(dict(AP=41.5, AP50=70., AP75=40., AP50_by_class={})))
(out / "detections.png").write_text(str(out))
"""


def test_detection_trains_the_encoder_and_keeps_the_ap(fake, capsys):
    (fake / "reproduce").mkdir()
    (fake / "reproduce/voc_detection.py").write_text(FINE_TUNING)
    rows = ["MoCo v2, few negatives", "MoCo v2, many negatives"]
    assert call("detection", "--rows", *rows, "--seeds", "3") == 0
    out = capsys.readouterr().out
    assert out.count("| 41.50, n = 1 | 70.00, n = 1 | 40.00, n = 1 |") == 2, out
    run = "voc_detection-moco_v2-table3-K-16-seed3"
    kept = json.loads((fake / f"results/textures/runs/{run}.json").read_text())
    assert kept["features"] == {"detection": {"AP": 41.5, "AP50": 70., "AP75": 40.}}
    encoder = "runs/reproduce/textures/moco_v2-table3-K-16-seed3/checkpoint.pt"
    assert kept["settings"]["encoder"] == encoder               # without the path of a machine
    assert [command.split()[1] for command in kept["commands"]] == ["moco_v2.py", "-m"]
    picture = (fake / "results/textures/detection.png").read_text()
    assert "many" in rows[-1] and picture.endswith("voc_detection-moco_v2-table1-seed3")
    assert call("detection", "--rows", *rows, "--seeds", "3") == 0
    assert "2 of 2 runs exist already" in capsys.readouterr().out


def test_on_imagenet_detection_needs_voc(root, tmp_path, capsys):
    """Without it, other items are still run and the detections that there are are still shown."""
    images = str(write_folder(tmp_path / "images", 2, (70, 80)))
    assert "detection: expected --voc FOLDER" in refused(reproduce, "detection", images)
    assert call("claims", images, "--collect") == 0
    assert "note: no detection, which needs --voc FOLDER" in capsys.readouterr().out
    assert "detection" in plan.TABLES


def test_bad_flags_get_one_line(fake):
    flags, other = ["table1", "--flags", "--epochs 2"], ["table1", "--as", "short", "--flags"]
    for argv, line in ((flags, "name another folder for them with --as"),
                       ([*flags, "--as", "textures"], "name another folder for them with --as"),
                       (["table1", "--jobs", "0"], "--jobs: 0: expected a whole number, 1 or more"),
                       ([*other, "--nope 1"], "moco_v2.py: unrecognized arguments: --nope"),
                       ([*other, "--epochs 0"], "--epochs: 0: expected a whole number, 1 or more"),
                       (["table1", "--seeds", "-1"], "--seeds: -1: expected a whole number, 0"),
                       (["table1", fake / "none"], "no such folder"),
                       (["table1", "--scale", "cifar10-laptop"],
                        "--scale cifar10-laptop: for images of scale cifar10; expected a folder"),
                       (["table1", "--rows", "(e)"], "--rows (e): expected rows of table1: MoCo"),
                       (["table4"], "invalid choice")):
        assert line in refused(reproduce, *argv)


def test_runs_with_other_flags_or_data_are_kept_apart(fake):
    assert call("table1", "--flags", "--epochs 2", "--as", "short") == 1        # (c) fails
    kept = json.loads((fake / "results/short/runs/moco_v2-table1-seed0.json").read_text())
    assert "--preset table1 --epochs 2 --seed 0 --out runs/reproduce/short/" in kept["commands"][0]
    with pytest.raises(UserError, match="holds runs with other data or flags .*--epochs"):
        call("table1", "--flags", "--epochs 3", "--as", "short")
    kept["settings"]["images_hash"] = "another"
    (fake / "results/short/runs/moco_v2-table1-seed0.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="holds runs with other data or flags"):
        call("table1", "--flags", "--epochs 2", "--as", "short")
    keep(plan.Campaign("textures", "textures"), "other", 50.)
    with pytest.raises(UserError, match="runs with other data or flags .images; "):
        call("table1")


def test_a_result_is_not_put_beside_those_of_other_flags_that_were_kept_meanwhile(fake):
    """Two commands at once with one --as: the folder is empty when both of them start."""
    other = "import pathlib\npath = pathlib.Path('results/short/runs/other-seed0.json')\n"
    run = {"name": "moco_v2-other-seed0", "data": "built-in textures", "flags": ["--epochs", "3"],
           "settings": {}}
    (fake / "moco_v2.py").write_text(TRAINING + other + f"path.write_text({json.dumps(run)!r})")
    line = refused(reproduce, "table1", "--rows", "MoCo v2", "--flags", "--epochs 2", "--as",
                   "short")
    assert "results/short holds runs with other data or flags" in line and "--epochs" in line
    assert not (fake / "results/short/runs/moco_v2-table1-seed0.json").exists()


def test_a_stopped_run_ends_with_exit_code_75_and_continues(fake, capsys):
    (fake / "moco_v2.py").write_text("raise SystemExit(75)")
    assert call("table2a") == 75
    assert "stopped; the same command continues" in capsys.readouterr().out
    assert not list((fake / "results/textures/runs").iterdir())
    (fake / "moco_v2.py").write_text(TRAINING)
    failing = "import sys\nif '--train' in sys.argv:\n    sys.exit(1)\n"
    (fake / "linear_probe.py").write_text(failing + PROBE)
    assert call("table2a") == 1                                 # the supervised rows fail
    assert len(list((fake / "results/textures/runs").glob("moco_v2-*"))) == 3


DRAWING = """
import pathlib, sys
print("drawn from", *(pathlib.Path(sys.argv[sys.argv.index(flag) + 1]).read_text()
                      for flag in ("--head", "--no-head")))
"""


def test_a_picture_has_its_checkpoints_trained_again_without_changing_their_results(fake):
    """As in a fresh clone, which has results but no checkpoints."""
    (fake / "moco_v2.py").write_text(TRAINING + '(out / "checkpoint.pt").write_text("weights")')
    (fake / "dip_inversion.py").write_text(DRAWING)
    campaign = plan.Campaign("textures", "textures")
    assert call("figure2") == 0
    kept = fake / "results/textures/runs/moco_v2-table1-seed0.json"
    before = kept.read_text().replace("69.5", "12.5")
    kept.write_text(before)
    shutil.rmtree(fake / "runs")
    assert call("figure2") == 0
    assert "drawn from weights weights" in campaign.output_file("figure2").read_text()
    assert kept.read_text() == before


def test_a_damaged_result_is_named(fake):
    assert call("table1", "--rows", "MoCo v2") == 0
    kept = fake / "results/textures/runs/moco_v2-table1-seed0.json"
    kept.write_text(kept.read_text()[:-9])
    line = refused(reproduce, "table1")
    assert line.startswith(f"{kept}: not a result (") and "remove it to run it again" in line


ORPHAN = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(1)
    file.write("first\\n")
"""


def test_a_command_that_is_still_running_is_waited_for(tmp_path):
    """It was started by a process that has been killed since, and holds the lock on its output."""
    log = tmp_path / "output.txt"
    with subprocess.Popen([sys.executable, "-c", ORPHAN, log], stdout=subprocess.PIPE) as orphan:
        assert orphan.stdout.readline() == b"locked\n"
        assert reproduce.call([["python", "-c", "print('second')"]], log) == 0
    assert log.read_text() == "first\nsecond\n"


def test_supervised_runs_and_the_papers_protocol_are_read_where_they_are(fake, tmp_path):
    """linear_probe.py writes result.json: in the run's folder, in probe/ or in probe-FEATURE/."""
    for script, flags, scale, feature, path in (
            ("linear_probe", ["--train", "all"], "textures", "h", ["result.json"]),
            ("linear_probe", ["--quick"], "textures", "z", ["quick-z.json"]),
            ("moco_v2", ["--preset", "table1"], "imagenet", "h",
             ["probe/quick-h.json", "probe/result.json"]),
            ("moco_v2", ["--preset", "table1"], "imagenet", "z",
             ["probe/quick-z.json", "probe-z/result.json"]),
            ("moco_v2", ["--preset", "table3"], "imagenet", "h", ["probe/result.json"]),
            ("moco_v2", ["--preset", "table1"], "cifar10", "z", ["probe/quick-z.json"])):
        assert plan.probes(script, flags, scale)[feature] == path
    campaign = plan.Campaign("imagenet", "imagenet", "IMAGENET")
    commands = plan.commands("a", "moco_v2", ["--preset", "table1b"], campaign)
    assert "--quick" in commands[1] and "class" not in commands[1]
    assert "--quick" not in commands[2] and len(commands) == 3
    assert len(plan.commands("a", "moco_v2", ["--preset", "table3"], campaign)) == 2
    assert len(plan.commands("a", "linear_probe", ["--train", "all"], campaign)) == 1


def test_added_flags_do_not_override_those_of_a_cell():
    """A point of Figure 4 keeps its K or batch size; only scripts that run must accept a flag."""
    campaign = plan.Campaign("here", "textures", added=["--batch-size", "32"])
    runs = plan.runs(["figure4"], campaign, [0])
    sizes = {simclr.flags().parse_args(flags).batch_size
             for script, flags in runs.values() if script == "simclr"}
    assert sizes == {16, 64, 512}
    assert {moco_v2.flags().parse_args(flags).batch_size
            for script, flags in runs.values() if script == "moco_v2"} == {32}
    assert plan.runs(["table1"], plan.Campaign("here", "textures", added=["--K", "20"]), [0])


# Figure 5

HARD = ("--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--epochs", "3", "--K", "20",
        "--negatives", "hard")


def test_figure_5_labels_slots_without_an_image_and_refuses_other_runs(small, tmp_path, inside):
    one = [small, *HARD, "--max-steps", "1"]
    inside(moco_v2, *one, "--out", "out", cwd=tmp_path)
    titles, indices = figure5.chosen(*figure5.read("out/checkpoint.pt", str(small)))
    assert len(titles) == len(indices) == 16 and titles[0] == "query" and indices[0] >= 0
    assert -1 in indices and 0 < len([i for i in indices[1:] if i >= 0]) <= 8
    assert indices[0] not in indices[1:]
    cosines = [float(title.split("\n")[1]) for title in titles[1:]]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] > cosines[-1]
    # test_scripts.py looks at the picture of a run of two processes.
    figure5.main(["out/checkpoint.pt", str(small), "--out", "picture"])
    assert (tmp_path / "picture/figure5.png").stat().st_size > 10_000
    assert not (tmp_path / "out/figure5.png").exists()          # the run draws nothing itself
    assert "44 images" not in refused(figure5, "out/checkpoint.pt")
    inside(moco_v2, *one, "--negatives", "queue", "--out", "queue", cwd=tmp_path)
    assert "uses the whole queue; expected" in refused(figure5, "queue/checkpoint.pt", small)
    assert "no such file" in refused(figure5, "none.pt", small)
    others = shutil.copytree(small, tmp_path / "others")
    next(others.rglob("*.*")).rename(others / "renamed.png")
    assert "holds different images (" in refused(figure5, "out/checkpoint.pt", others)
