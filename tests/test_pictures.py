"""Feature inversion and t-SNE: networks, objective, maps, scores, and both pictures."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import image_files, photo, refused
from PIL import Image

import dip_inversion
import tsne_aug
from common import UserError, augment, data, textures
from common.checkpoint import FAIR, load_encoder
from common.model import Encoder, head, resnet

CPU = torch.device("cpu")


# Deep Image Prior.

def test_r_has_the_released_size_and_makes_images():
    assert sum(p.numel() for p in dip_inversion.R(224).parameters()) == 2_606_763
    for size in (32, 64, 96):
        network = dip_inversion.R(size)
        x = network(torch.rand(1, 32, network.noise_size, network.noise_size) / 10)
        assert x.shape == (1, 3, size, size)
        assert 0 < x.min() < x.max() < 1


def small_encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder(resnet("resnet10"), head("mlp", 512))


def column(feature, seed=0):
    return dip_inversion.feature_function(small_encoder(seed), feature, "textures", CPU)


def inverted(columns, x, iterations, seed):
    """x_rec and error after the last iteration."""
    *_, (_, x_rec, error) = dip_inversion.invert(columns, x, iterations, seed)
    return x_rec, error


@pytest.fixture
def in_double():
    """The gradient of a bias before a batch norm is only rounding error.

    In float32, Adam would make it large.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_many_r_at_once_equal_separate_ones(in_double):
    """A panel's network, noise and gradient are the same alone: its batch norm sees no other."""
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 32)
    together, errors = inverted([column("h"), column("hidden")], x, 3, seed=5)
    assert together.shape == (2, 2, 3, 32, 32)
    assert errors.shape == (2, 2)
    panels = dip_inversion.Panels(2, 2, 32, 5)
    one = dip_inversion.R(32)
    one.load_state_dict({name: weight[3] for name, weight in zip(panels.names, panels.weights)})
    assert torch.allclose(panels()[1, 1], one(panels.noise[3:]), atol=1e-12)
    # The same panel alone: the last column and image, with plain modules and autograd.
    target, optimizer = column("hidden"), torch.optim.Adam(one.parameters(), 1e-3)
    for _ in range(3):
        x_rec = one(panels.noise[3:])
        loss = (target(x_rec) - target(x[1:])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(together[1, 1], x_rec[0].detach(), atol=1e-9)
    difference = (target(x_rec) - target(x[1:])).square().sum()
    expected = difference / target(x[1:]).square().sum()
    assert errors[1, 1].item() == pytest.approx(expected.item(), rel=1e-8)
    again, _ = inverted([column("h"), column("hidden")], x, 3, seed=5)
    assert torch.equal(together, again)


def test_all_columns_of_an_image_start_from_the_same_network_and_noise():
    """So that differences between columns are paired; other images start from other networks."""
    panels = dip_inversion.Panels(3, 2, 32, 0)
    for start in (*panels.weights, panels.noise):
        by_column = start.detach().unflatten(0, (3, 2))
        assert torch.equal(by_column[0], by_column[1])
        assert torch.equal(by_column[0], by_column[2])
    noise = panels.noise.unflatten(0, (3, 2))
    assert not torch.equal(noise[0, 0], noise[0, 1])
    first = panels()
    assert not torch.allclose(first[0, 0], first[0, 1], atol=.01)
    # An image starts from the same network whatever else is inverted beside it.
    alone = dip_inversion.Panels(1, 1, 32, 0)
    assert torch.equal(alone.noise[0], panels.noise[0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone.weights, panels.weights))
    assert not torch.equal(dip_inversion.Panels(1, 1, 32, 1).noise, alone.noise)


def test_equal_columns_give_equal_pre_images(in_double):
    x_rec, error = inverted([column("h"), column("h")], torch.rand(2, 3, 32, 32), 3, seed=0)
    assert torch.allclose(x_rec[0], x_rec[1], atol=1e-9)
    assert torch.allclose(error[0], error[1], rtol=1e-9)


def test_the_gradient_reaches_only_r_and_the_error_falls():
    encoder = small_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = torch.from_numpy(textures.draw(8, 1)[0][:1]).float() / 255
    columns = [dip_inversion.feature_function(encoder, "h", "textures", CPU)]
    errors = [error.item() for _, _, error in dip_inversion.invert(columns, x, 40, 0)]
    assert len(errors) == 40
    assert errors[-1] < .5 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_each_measure_orders_cases_as_its_name_promises():
    photos = np.stack([photo(np.random.default_rng(i), 64, 64) for i in range(3)])
    x = torch.from_numpy(photos).permute(0, 3, 1, 2) / 255
    blurred = augment.blur(x, torch.full((3,), 2.))
    exchanged, noise = x.flip(1) ** 2, torch.rand(3, 3, 64, 64)
    cases = [x, blurred, exchanged, noise]
    fidelity = torch.stack([dip_inversion.psnr(x, case) for case in cases])
    assert fidelity[0].isinf().all()
    assert (fidelity[1] > fidelity[2:]).all()
    assert (fidelity[1] > 10).all()
    colour = torch.stack([dip_inversion.colour_distance(x, case) for case in cases])
    assert (colour[0] == 0).all()
    assert (colour[1] < colour[2]).all()
    assert (colour[2] > .4).all()
    assert (colour <= 1).all()
    assert (dip_inversion.colour_distance(x, x.flip(3)) == 0).all()     # position does not matter
    kept = torch.stack([dip_inversion.structure(x, case) for case in cases])
    assert torch.allclose(kept[0], torch.ones(3), atol=1e-4)
    assert (kept[1] < .99).all()
    assert (kept[1] > kept[3]).all()
    assert (kept[3].abs() < .2).all()
    less_contrast = dip_inversion.structure(x, x * .5 + .2)
    assert torch.allclose(less_contrast, torch.ones(3), atol=.05)
    grey = x.mean(1, keepdim=True)
    coloured = grey * torch.tensor([.2, 1., .1]).view(3, 1, 1)
    grey = grey.expand_as(x)
    assert (dip_inversion.structure(grey, coloured) > .95).all()
    assert (dip_inversion.colour_distance(grey, coloured) > .8).all()


def test_colour_distance_and_structure_are_their_definitions():
    """Literal loops over pixels and windows, in float64."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 14, 13, dtype=torch.float64)
    cells = []
    for image in (x[0], y[0]):
        counts = {}
        for pixel in image.flatten(1).T.tolist():
            cell = tuple(min(3, math.floor(4 * value)) for value in pixel)
            counts[cell] = counts.get(cell, 0) + 1
        cells.append(counts)
    every = cells[0].keys() | cells[1].keys()
    expected = sum(abs(cells[0].get(c, 0) - cells[1].get(c, 0)) for c in every) / 2 / (14 * 13)
    assert dip_inversion.colour_distance(x, y, bins=4).item() == pytest.approx(expected)
    gray = [(image[0].permute(1, 2, 0) @ torch.tensor(augment.GRAY).double()) for image in (x, y)]
    offset = np.arange(-5, 6)
    weight = np.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    weight = torch.from_numpy(weight / weight.sum())
    found = []
    for top in range(4):
        for left in range(3):
            a, b = (image[top:top + 11, left:left + 11] for image in gray)
            a, b = a - (weight * a).sum(), b - (weight * b).sum()
            spread = ((weight * a * a).sum() * (weight * b * b).sum()).sqrt()
            found.append(((weight * a * b).sum() + .02 ** 2) / (spread + .02 ** 2))
    expected = torch.stack(found).mean().item()
    assert dip_inversion.structure(x, y).item() == pytest.approx(expected, abs=1e-9)


# t-SNE.

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
    assert (found - expected).abs().max() < 1e-12
    assert abs(value - divergence) < 1e-9


@pytest.mark.parametrize("perplexity", [5., 30.])
def test_every_points_perplexity_is_right(perplexity):
    torch.manual_seed(0)
    x = torch.randn(200, 7).double() * torch.logspace(-2, 2, 200).double()[:, None]
    rows = tsne_aug.conditional(x, perplexity)
    assert (torch.special.entr(rows).sum(1).exp() - perplexity).abs().max() < 1e-4
    P = tsne_aug.affinities(x, perplexity)
    assert abs(P.sum() - 1) < 1e-12
    assert torch.equal(P, P.T)
    assert (P.diagonal() == 0).all()
    assert torch.allclose(P, (rows + rows.T) / 400)


def test_a_map_keeps_clusters_apart_and_is_deterministic():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(25)
    x = torch.randn(4, 20)[labels] * 3 + torch.randn(100, 20)
    y, divergence = tsne_aug.tsne(x, 10., 0, 400)
    again, _ = tsne_aug.tsne(x, 10., 0, 400)
    assert torch.equal(y, again)
    assert tsne_aug.agreement(y, labels) > 99
    assert tsne_aug.silhouette(y, labels) > .5
    assert divergence < tsne_aug.gradient(tsne_aug.affinities(x, 10.), x[:, :2])[1]
    shuffled = labels[torch.randperm(100)]
    assert abs(tsne_aug.silhouette(y, shuffled)) < .2
    assert tsne_aug.agreement(y, shuffled) < 45


def literal_silhouette(x, labels):
    """Rousseeuw (1987), point by point in float64."""
    x, labels, values = x.double(), labels.tolist(), []
    for i, label in enumerate(labels):
        to = {other: [(x[i] - x[j]).norm().item() for j in range(len(x))
                      if j != i and labels[j] == other] for other in labels}
        own = to.pop(label)
        if not own:
            values.append(0.)
            continue
        a, b = np.mean(own), min(np.mean(distances) for distances in to.values())
        values.append((b - a) / max(a, b) if max(a, b) > 0 else 0.)
    return np.mean(values)


def test_scores_are_their_definitions():
    x = torch.tensor([[0.], [1.], [2.], [10.], [11.], [13.]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = literal_silhouette(x, labels)
    assert tsne_aug.silhouette(x, labels) == pytest.approx(expected, abs=1e-6)
    assert tsne_aug.agreement(x, labels, 2) == 100
    assert tsne_aug.agreement(x, torch.tensor([0, 1, 0, 1, 0, 1]), 1) == 0
    torch.manual_seed(0)
    x, labels = torch.randn(40, 6), torch.arange(40) % 3
    expected = literal_silhouette(x, labels)
    assert tsne_aug.silhouette(x, labels) == pytest.approx(expected, abs=1e-6)


def test_the_silhouette_of_a_label_with_a_single_point_is_0():
    x, labels = torch.tensor([[0.], [1.], [5.]]), torch.tensor([0, 0, 1])
    assert tsne_aug.silhouette(x, labels) == pytest.approx((4 / 5 + 3 / 4 + 0) / 3)
    assert tsne_aug.silhouette(x, labels) == pytest.approx(literal_silhouette(x, labels))
    assert tsne_aug.silhouette(x, torch.arange(3)) == 0


@pytest.mark.parametrize("n", [4, 40])          # cdist uses another algorithm above 25 points
def test_the_silhouette_of_identical_points_is_0(n):
    labels = torch.arange(n) % 2
    assert tsne_aug.silhouette(torch.full((n, 3), .1), labels) == 0
    # Identical points of two labels, and far away a third label, whose points are identical too.
    x = torch.cat([torch.full((n, 3), .1), torch.full((2, 3), 9.)])
    labels = torch.cat([labels, torch.tensor([2, 2])])
    assert tsne_aug.silhouette(x, labels) == pytest.approx(2 / (n + 2))
    assert tsne_aug.silhouette(x, labels) == pytest.approx(literal_silhouette(x, labels))


# The scripts.

SETTINGS = {"size": 32, "normalisation": "textures"}            # of README's checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the runs, of untrained encoders, that both scripts read by default."""
    root = tmp_path_factory.mktemp("made")
    runs = (("moco_v2-textures-table1", "mlp", 128), ("moco_v2-textures-table1a", "none", 128),
            ("linear_probe-textures-supervised", "none", 10))
    for seed, (name, kind, dim) in enumerate(runs):
        save(root / f"runs/{name}", "resnet10", kind, dim, name.split("-")[0], seed)
    return root


def save(folder, arch, kind, dim=128, script="moco_v2", seed=0):
    torch.manual_seed(seed)
    f = resnet(arch)
    settings = {"script": script, "arch": arch, "head": kind, "dim": dim, "scale": "textures",
                "data": "/a/path", **SETTINGS}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"f": f.state_dict(), "g": head(kind, f.width, dim).state_dict(),
               "settings": settings}
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_figure_2_and_figure_3_are_drawn_from_the_default_runs(made, inside):
    out = inside(dip_inversion, "--iterations", "3", cwd=made)
    assert "12 panels of 32 pixels, 517615 weights each" in out
    assert "hidden (the paper's z), with MLP head, mean of 4 images: feature error" in out
    assert ("(h, without MLP head) minus (h, with MLP head), 95 % intervals: "
            "feature_error ") in out
    found = json.loads((made / "runs/dip_inversion/figure2.json").read_text())
    assert len(found["panels"]) == 3
    assert [*found["differences"]] == [found["columns"][0], found["columns"][2]]
    assert len(found["panels"][0]["psnr"]) == 4
    assert found["iterations"] == 3
    for panel in found["panels"]:
        assert panel.keys() == {"feature_error", "psnr", "colour_distance", "structure"}
        assert all(math.isfinite(value) for values in panel.values() for value in values)
    dataset, h = data.open_data(), "runs/moco_v2-textures-table1/checkpoint.pt"
    with_head, without = (load_encoder(made / path)[0] for path in (h, h.replace("1/", "1a/")))
    functions = [dip_inversion.feature_function(encoder, feature, "textures", CPU)
                 for encoder, feature in ((without, "h"), (with_head, "h"), (with_head, "hidden"))]
    x = dip_inversion.choose(dataset, 4)[1].pixels / 255
    _, error = inverted(functions, x, 3, 0)
    for panel, own in zip(found["panels"], error, strict=True):
        assert panel["feature_error"] == pytest.approx(own.tolist(), rel=1e-2)
    out = inside(tsne_aug, "--per-class", "6", "--perplexity", "8",
                 "--compare", h, cwd=made)
    assert out.count("silhouette") == 9
    rows = json.loads((made / "runs/tsne_aug/figure3.json").read_text())["rows"]
    assert [len(row["panels"]) for row in rows] == [3, 3, 3]
    assert rows[0]["what"].startswith("10 logits of a supervised model")
    _, images, labels = tsne_aug.choose(dataset, 10, 6, 0)
    for how, panel in zip(("no", "weak", "strong"), rows[1]["panels"], strict=True):
        own = tsne_aug.features((with_head, SETTINGS), "h", images, how, 0, CPU)
        assert panel["silhouette"][0] == pytest.approx(tsne_aug.silhouette(own, labels), abs=1e-3)
    assert tsne_aug.AUGMENTATIONS == {"no": ("none", None), "weak": ("weak", (.08, 1.)),
                                      "strong": ("moco_v2", (.2, 1.))}
    for name in ("dip_inversion/figure2", "tsne_aug/figure3"):
        assert "/a/path" not in (made / f"runs/{name}.json").read_text()
        with Image.open(made / f"runs/{name}.png") as picture:
            assert picture.size[0] > 900
            assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 100


def test_figure_2_is_drawn_from_image_files_and_from_folders_without_test_images(
        made, tmp_path, inside, small):
    photos, classes = tmp_path / "photos", tmp_path / "classes"
    photos.mkdir()
    for name in ("one", "two"):
        Image.fromarray(photo(np.random.default_rng(0), 40, 48)).save(photos / f"{name}.png")
    classes.mkdir()
    (classes / "train").symlink_to(small / "train")             # 44 images, no test images
    given = ["--head", "runs/moco_v2-textures-table1/checkpoint.pt",
             "--no-head", "runs/moco_v2-textures-table1a/checkpoint.pt", "--iterations", "1"]
    for argv, names in [
            (["--images", photos / "one.png", photos / "two.png"], ["one", "two"]),
            ([photos], ["image 0", "image 1"]),
            ([small], ["cat", "dog", "cat", "dog"]),
            ([small, "--n-images", "1"], ["cat"]),
            ([classes], ["image 0", "image 14", "image 28", "image 43"])]:
        inside(dip_inversion, *given, "--out", tmp_path / "out", *argv, cwd=made)
        assert json.loads((tmp_path / "out/figure2.json").read_text())["images"] == names


def test_the_three_panels_show_the_same_images():
    torch.manual_seed(0)
    dataset = data.open_data()
    names, images, labels = tsne_aug.choose(dataset, 3, 4, 0)
    assert [dataset.classes[i] for i in images.labels[::4]] == names
    assert len(set(names)) == 3
    assert torch.equal(labels, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    encoder = Encoder(resnet("resnet10"), head("none", 512, 10)).eval()
    plain = tsne_aug.features((encoder, SETTINGS), "z", images, "no", 0, CPU)
    assert torch.allclose(plain, encoder((images.pixels / 255 - .5) / .21), atol=1e-4)


class Grey(torch.nn.Module):
    """An encoder whose feature is the mean colour of an image, in [0, 1]."""

    def embed(self, x, feature):
        return x.mean((2, 3)) * .21 + .5


def test_features_of_views_come_in_the_order_of_the_images():
    """For images that are grey all over, so every view has the grey of its image."""
    greys = torch.arange(0, 240, 12, dtype=torch.uint8)
    images = data.Images(pixels=greys.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous())
    found = tsne_aug.features((Grey(), SETTINGS), "h", images, "weak", 3, CPU)
    assert (found * 255 - greys[:, None]).abs().max() < .01


@pytest.mark.parametrize("augmentation", ["no", "weak"])
@pytest.mark.parametrize("broken, replacement", [(50, 51), (119, 0)])
def test_features_of_an_unreadable_image_are_those_of_the_next_one(
        broken, replacement, augmentation, tmp_path, monkeypatch):
    """No row is left out, and all others are those of their images."""
    monkeypatch.setattr(data, "default_workers", lambda: 0)
    greys = np.arange(120, dtype=np.uint8) * 2
    for i, grey in enumerate(greys):
        Image.fromarray(np.full((32, 32, 3), grey)).save(tmp_path / f"{i:03d}.png")
    (tmp_path / f"{broken:03d}.png").write_text("not an image")
    images = data.Images(files=image_files(tmp_path))
    found = tsne_aug.features((Grey(), SETTINGS), "h", images, augmentation, 3, CPU)
    greys[broken] = greys[replacement]
    assert (found * 255 - torch.from_numpy(greys)[:, None]).abs().max() < .01


def test_bad_input_gets_one_line(made, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in ("small.png", "photos/one.png"):
        Image.fromarray(photo(np.random.default_rng(0), 20, 40)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("not an image")
    wide, fair = save(tmp_path / "wide", "resnet50", "mlp"), tmp_path / "fair.pth.tar"
    state = {f"module.encoder_q.{name}": value
             for name, value in torchvision.models.resnet18(num_classes=128).state_dict().items()}
    torch.save({"state_dict": state}, fair)
    none = "runs/moco_v2-textures-table1a/checkpoint.pt"
    mlp = "runs/moco_v2-textures-table1/checkpoint.pt"
    given = ("--head", mlp, "--no-head", none)
    monkeypatch.chdir(made)
    for script, argv, line in [
            (dip_inversion, ["--no-head", "gone.pt"], "python moco_v2.py [DATA] --preset table1a"),
            (dip_inversion, [*given, "--images", tmp_path / "text.png"],
             "cannot be read as an image"),
            (dip_inversion, [*given, "--images", tmp_path / "small.png"],
             "40 x 20 pixels; expected 32 or more"),
            (dip_inversion, ["--head", wide], "h has 512 and 2048 dimensions"),
            (dip_inversion, ["--head", none], f"--head {none}: a hidden layer is needed"),
            (dip_inversion, ["--no-head", mlp], f"--no-head {mlp}: no hidden layer is expected"),
            (dip_inversion, ["--iterations", "0"], "argument --iterations: 0: expected"),
            (dip_inversion, ["--seed", "-1"], "argument --seed: -1: expected"),
            (tsne_aug, ["--encoder", none], "a run of moco_v2, which has no classes"),
            (tsne_aug, ["--encoder", fair], "a run of FAIR's MoCo, which has no classes"),
            (tsne_aug, ["--per-class", "2000"], "has 1000 training images"),
            (tsne_aug, [tmp_path / "photos"], "labels are needed"),
            (tsne_aug, ["--classes", "11"], "argument --classes: invalid choice: 11"),
            (tsne_aug, ["--perplexity", "300"], "below a third of the 640 points"),
            (tsne_aug, ["--encoder", "gone.pt"], "gone.pt: no such file")]:
        assert line in refused(script, *argv)
    monkeypatch.chdir(tmp_path)
    assert "python linear_probe.py [DATA] --train all" in refused(tsne_aug)
    with pytest.raises(UserError):              # not SystemExit, which a notebook cannot catch
        tsne_aug.main([])
    with pytest.raises(UserError):
        dip_inversion.main([])


def test_columns_of_figure_2_are_compared_in_pairs():
    first, other = {"psnr": [10., 11., 15.]}, {"psnr": [12., 12., 18.]}
    compared = dip_inversion.paired_differences(other, first)
    # 2, 1 and 3: mean 2, standard deviation 1; the 97.5 % quantile of t with 2 degrees is 4.303
    assert compared["psnr"] == pytest.approx([2., 4.30265 / 3 ** .5], rel=1e-5)


def test_figure_2_says_what_else_differs_between_the_encoders():
    ours, fair = {"script": "moco_v2", "head": "mlp", "seed": 0}, {"script": FAIR, "head": "mlp"}
    differences = dip_inversion.differences
    assert differences(ours, {**ours, "head": "none"}) == ""
    assert differences(ours, {**ours, "seed": 1}) == "The encoders also differ in seed (0 and 1)."
    assert differences(ours, SETTINGS) == ""                    # without a name of its script
    assert differences(fair, fair).startswith("FAIR's MoCo v1 and v2 also differ")
    assert differences(ours, fair).startswith("The encoders also differ in script (moco_v2 and ")
