"""Feature inversion and t-SNE: the networks, the objective, the map, the measures, and both scripts to their pictures."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import dip_inversion
import tsne_aug
from common import data, textures
from common.model import Encoder, head, resnet


# Deep Image Prior

def test_r_has_the_released_size_and_makes_images():
    assert sum(p.numel() for p in dip_inversion.R(224).parameters()) == 2_606_763
    for size in (32, 64, 96):
        network = dip_inversion.R(size)
        x = network(torch.rand(1, 32, network.noise_size, network.noise_size) / 10)
        assert x.shape == (1, 3, size, size) and 0 < x.min() < x.max() < 1


def column(feature, seed=0):
    torch.manual_seed(seed)
    return dip_inversion.Column(Encoder(resnet("resnet10"), head("mlp", 512)), feature, "textures")


@pytest.fixture
def in_double():
    """Biases before a batch norm have no gradient but rounding's, which Adam makes large in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_many_r_at_once_equal_separate_ones(in_double):
    """A panel's network, noise and gradient are the same alone: beside others its batch norm sees no more than itself."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32)
    together, errors = dip_inversion.invert([column("h"), column("hidden")], images, 3, seed=5)
    assert together.shape == (2, 2, 3, 32, 32)
    panels = dip_inversion.Panels(4, 32, 5)
    one = dip_inversion.R(32)
    one.load_state_dict({name: weight[3] for name, weight in zip(panels.names, panels.weights)})
    assert torch.allclose(panels()[3], one(panels.noise[3:]), atol=1e-12)
    # the same panel, alone: the target's column and image, and plain modules and autograd
    target, optimizer = column("hidden"), torch.optim.Adam(one.parameters(), 1e-3)
    for _ in range(3):
        x = one(panels.noise[3:])
        loss = (target(x) - target(images[1:])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(together[1, 1], x[0].detach(), atol=1e-9)
    expected = (target(x) - target(images[1:])).square().sum() / target(images[1:]).square().sum()
    assert errors[1, 1].item() == pytest.approx(expected.item(), rel=1e-8)
    again, _ = dip_inversion.invert([column("h"), column("hidden")], images, 3, seed=5)
    assert torch.equal(together, again)


def test_the_gradient_reaches_only_r_and_the_error_falls():
    seen, columns = [], [column("h")]
    before = {k: v.clone() for k, v in columns[0].state_dict().items()}
    images = torch.from_numpy(textures.draw(8, 1)[0][:1]).float() / 255
    dip_inversion.invert(columns, images, 40, 0, lambda i, x, error: seen.append(error.item()))
    assert seen[-1] < .5 * seen[0]
    assert all(torch.equal(v, before[k]) for k, v in columns[0].state_dict().items())
    assert all(p.grad is None for p in columns[0].parameters())


def test_each_measure_orders_cases_as_its_name_promises():
    x = torch.from_numpy(np.stack([photo(np.random.default_rng(i), 64, 64) for i in range(3)])).permute(0, 3, 1, 2) / 255
    blurred = dip_inversion.augment.blur(x, torch.full((3,), 2.))
    exchanged, noise = x.flip(1) ** 2, torch.rand(3, 3, 64, 64)
    cases = [x, blurred, exchanged, noise]
    fidelity = torch.stack([dip_inversion.psnr(x, c) for c in cases])
    assert fidelity[0].isinf().all() and (fidelity[1] > fidelity[2:]).all() and (fidelity[1] > 10).all()
    colour = torch.stack([dip_inversion.colour_distance(x, c) for c in cases])
    assert (colour[0] == 0).all() and (colour[1] < colour[2]).all() and (colour[2] > .4).all() and (colour <= 1).all()
    assert (dip_inversion.colour_distance(x, x.flip(3)) == 0).all()             # where a colour is does not matter
    kept = torch.stack([dip_inversion.structure(x, c) for c in cases])
    assert torch.allclose(kept[0], torch.ones(3), atol=1e-4) and (kept[1] < .99).all()
    assert (kept[1] > kept[3]).all() and (kept[3].abs() < .2).all()
    assert torch.allclose(dip_inversion.structure(x, x * .5 + .2), torch.ones(3), atol=.05)     # blind to contrast
    swapped = x.mean(1, keepdim=True) * torch.tensor([.2, 1., .1]).view(3, 1, 1)
    grey = x.mean(1, keepdim=True).expand_as(x)
    assert (dip_inversion.structure(grey, swapped) > .95).all() and (dip_inversion.colour_distance(grey, swapped) > .8).all()


# t-SNE

def test_gradient_is_that_of_the_divergence():
    torch.manual_seed(0)
    P = tsne_aug.affinities(torch.randn(30, 5).double(), 8.)
    y = torch.randn(30, 2).double().requires_grad_()
    kernel = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    kernel = kernel * (1 - torch.eye(30))
    Q = kernel / kernel.sum()
    mask = ~torch.eye(30, dtype=bool)
    divergence = (P[mask] * (P[mask] / Q[mask]).log()).sum()
    expected, = torch.autograd.grad(divergence, y)
    found, value = tsne_aug.gradient(P, y.detach())
    assert (found - expected).abs().max() < 1e-12 and abs(value - divergence) < 1e-9


@pytest.mark.parametrize("perplexity", [5., 30.])
def test_every_points_perplexity_is_right(perplexity, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(200, 7).double() * torch.logspace(-2, 2, 200).double()[:, None]
    rows, softmax = [], torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda *a: rows.append(softmax(*a)) or rows[-1])
    P = tsne_aug.affinities(x, perplexity)
    logp = rows[-1]
    found = (-(logp.exp() * logp.clamp(min=-1e9)).sum(1)).exp()
    assert (found - perplexity).abs().max() < 1e-4
    assert abs(P.sum() - 1) < 1e-12 and torch.equal(P, P.T) and (P.diagonal() == 0).all()
    assert torch.allclose(P, (logp.exp() + logp.exp().T) / 400)


def test_a_map_keeps_clusters_apart_and_is_deterministic():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(25)
    x = torch.randn(4, 20)[labels] * 3 + torch.randn(100, 20)
    y, divergence = tsne_aug.tsne(x, 10., 0, 400)
    again, _ = tsne_aug.tsne(x, 10., 0, 400)
    assert torch.equal(y, again) and tsne_aug.agreement(y, labels) > 99 and tsne_aug.silhouette(y, labels) > .5
    assert divergence < tsne_aug.gradient(tsne_aug.affinities(x, 10.), x[:, :2])[1]
    shuffled = labels[torch.randperm(100)]
    assert abs(tsne_aug.silhouette(y, shuffled)) < .2 and tsne_aug.agreement(y, shuffled) < 45


def test_scores_are_their_definitions():
    x, labels = torch.tensor([[0.], [1.], [2.], [10.], [11.], [13.]]), torch.tensor([0, 0, 0, 1, 1, 1])
    expected = []
    for i in range(6):
        own = [abs(x[i] - x[j]).item() for j in range(6) if j != i and labels[j] == labels[i]]
        other = [abs(x[i] - x[j]).item() for j in range(6) if labels[j] != labels[i]]
        a, b = np.mean(own), np.mean(other)
        expected.append((b - a) / max(a, b))
    assert tsne_aug.silhouette(x, labels) == pytest.approx(np.mean(expected), abs=1e-6)
    assert tsne_aug.agreement(x, labels, 2) == 100
    assert tsne_aug.agreement(x, torch.tensor([0, 1, 0, 1, 0, 1]), 1) == pytest.approx(100 * 0 / 6)


# the scripts

SETTINGS = {"scale": "textures", "size": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project's folder with the checkpoints that the pictures take by default, untrained."""
    root = tmp_path_factory.mktemp("made")
    for name, kind, dim in (("moco_v2-textures-table1", "mlp", 128), ("moco_v2-textures-table1a", "none", 128),
                            ("linear_probe-textures-supervised", "none", 10)):
        save(root / f"runs/{name}", "resnet10", kind, dim, name.split("-")[0])
    return root


def save(folder, arch, kind, dim=128, script="moco_v2"):
    torch.manual_seed(0)
    f = resnet(arch)
    settings = {"script": script, "arch": arch, "head": kind, "dim": dim, "scale": "textures", "size": 32}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"f": f.state_dict(), "g": head(kind, f.width, dim).state_dict(), "settings": settings},
               folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_figure_2_and_figure_3_are_drawn_from_the_default_runs(made, inside):
    out = inside(dip_inversion, "--iterations", "3", cwd=made)
    assert "12 panels of 32 pixels, 517615 weights each" in out and "hidden (the paper's z), MLP head: feature_error" in out
    found = json.loads((made / "runs/dip_inversion/figure2.json").read_text())
    assert len(found["panels"]) == 3 and len(found["panels"][0]["psnr"]) == 4 and found["iterations"] == 3
    assert all(math.isfinite(v) for p in found["panels"] for values in p.values() for v in values)
    out = inside(tsne_aug, "--per-class", "6", "--perplexity", "8", "--compare", "runs/moco_v2-textures-table1/checkpoint.pt",
                 cwd=made)
    assert out.count("silhouette") == 9
    rows = json.loads((made / "runs/tsne_aug/figure3.json").read_text())["rows"]
    assert [len(r["panels"]) for r in rows] == [3, 3, 3] and rows[0]["what"].startswith("10 logits of a supervised model")
    for name in ("dip_inversion/figure2", "tsne_aug/figure3"):
        with Image.open(made / f"runs/{name}.png") as picture:
            assert picture.size[0] > 900 and len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 100


def test_the_three_panels_show_the_same_images():
    torch.manual_seed(0)
    dataset = data.open_data()
    names, images, labels = tsne_aug.choose(dataset, 3, 4, 0)
    assert [dataset.classes[i] for i in images.labels[::4]] == names and len(set(names)) == 3
    assert torch.equal(labels, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    encoder = Encoder(resnet("resnet10"), head("none", 512, 10)).eval()
    plain = tsne_aug.features(encoder, images, "no augmentation", SETTINGS, "z", torch.device("cpu"), 0, 0)
    assert torch.allclose(plain, encoder((images.pixels / 255 - .5) / .17), atol=1e-4)


def test_features_of_views_come_in_the_images_order():
    """Of images of one grey each, of which every view has that grey."""
    class Grey:
        def embed(self, x, feature):
            return x.mean((2, 3)) * .17 + .5
    greys = torch.arange(0, 240, 12, dtype=torch.uint8)
    images = data.Images(pixels=greys.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous())
    found = tsne_aug.features(Grey(), images, "weak augmentation", SETTINGS, "h", torch.device("cpu"), 3, 0)
    assert (found * 255 - greys[:, None]).abs().max() < .01


def test_bad_input_gets_one_line(made, tmp_path, inside, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("small.png", "photos/one.png"):
        Image.fromarray(photo(np.random.default_rng(0), 20, 40)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    none, wide = "runs/moco_v2-textures-table1a/checkpoint.pt", save(tmp_path / "wide", "resnet50", "mlp")
    given = ("--head", "runs/moco_v2-textures-table1/checkpoint.pt", "--no-head", none)
    for script, argv, line in [
            (dip_inversion, ["--no-head", "gone.pt"], "python moco_v2.py [DATA] --preset table1a"),
            (dip_inversion, [*given, "--images", tmp_path / "text.png"], "cannot be read as an image"),
            (dip_inversion, [*given, "--images", tmp_path / "small.png"], "40 x 20 pixels; these encoders take 32"),
            (dip_inversion, ["--head", wide], "h has 512 and 2048 dimensions"),
            (dip_inversion, ["--head", none], "--head: the head of this encoder is `none`; expected one with a hidden layer"),
            (dip_inversion, ["--no-head", "runs/moco_v2-textures-table1/checkpoint.pt"], "expected one without hidden layer"),
            (tsne_aug, ["--encoder", none], "a run of moco_v2.py, which has no classes"),
            (dip_inversion, ["--iterations", "0"], "--iterations 0"),
            (tsne_aug, ["--per-class", "2000"], "has 1000 training images"),
            (tsne_aug, [tmp_path / "photos"], "labels are needed"),
            (tsne_aug, ["--classes", "11"], "--classes 11: expected 2 to 10"),
            (tsne_aug, ["--perplexity", "300"], "below a third of the 640 points"),
            (tsne_aug, ["--encoder", "gone.pt"], "gone.pt: no such file")]:
        with pytest.raises(SystemExit) as error:
            inside(script, *argv, cwd=made)
        message = str(error.value) if error.value.code not in (0, 2) else capsys.readouterr().err
        assert error.value.code not in (0, None) and line in message and len(message.strip().splitlines()) == 1, message
