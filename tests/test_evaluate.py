"""kNN, the quick probe and features against their formulas; encoders read from checkpoints."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import spawn
from torch import nn

import simclr
from common import UserError, augment, data, ddp, evaluate, train
from common.checkpoint import load_encoder
from common.model import HEADS, Encoder, head, mlp_from, resnet

OPTIONS = dict(normalisation="textures", size=32, device=torch.device("cpu"), workers=0)


def clusters(n, seed, spread=1., classes=4, dim=12):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (classes, dim))
    y = rng.integers(0, classes, n)
    x = centres[y] + spread * rng.normal(0, 1, (n, dim))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def test_knn_is_the_weighted_vote():
    """Against the formula, one query and one neighbour at a time."""
    (bank, y), (queries, t) = clusters(120, 0), clusters(40, 1)
    for k, temperature in ((7, .1), (200, .07), (7, .002)):     # exp(1 / .002) is finite in double
        right = 0
        for q, label in zip(queries, t):
            cosines = [((q @ b / q.norm() / b.norm()).item(), c.item()) for b, c in zip(bank, y)]
            votes = [0.] * 4
            for cosine, c in sorted(cosines)[::-1][:k]:
                votes[c] += math.exp(cosine / temperature)
            right += votes.index(max(votes)) == label
        found = evaluate.knn(bank, y, queries, t, k, temperature)
        assert found == pytest.approx(100 * right / 40)


def test_logistic_regression_is_at_its_minimum():
    x, y = clusters(300, 0)
    weight = evaluate._logistic(x, y, 4, .01, x.var(0)).double().requires_grad_()
    logits = x.double() @ weight[:-1] + weight[-1]
    loss = nn.functional.cross_entropy(logits, y) + .005 * weight[:-1].square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4


def test_quick_probe_reaches_the_best_linear_rule_and_ignores_the_scale_of_features():
    """Gaussian classes of one covariance: Bayes' rule is linear and known."""
    (x, y), (test, t) = clusters(4000, 0), clusters(4000, 1)
    centres = torch.from_numpy(np.random.default_rng(99).normal(0, 1, (4, 12))).float()
    bayes = 100 * (torch.cdist(test, centres).argmin(1) == t).double().mean().item()
    found = evaluate.quick_probe(x, y, test, t)
    assert bayes < 99 and abs(found["top1"] - bayes) < .8
    factor = torch.logspace(-3, 3, 12)
    scaled = evaluate.quick_probe(x * factor + 5, y, test * factor + 5, t)
    assert abs(scaled["top1"] - found["top1"]) < .2


def test_the_penalty_is_chosen_on_training_data_alone():
    """With more dimensions than images a weak penalty over-fits. Test images are not used."""
    (x, y), (test, t) = clusters(150, 0, 3., dim=200), clusters(500, 1, 3., dim=200)
    found = evaluate.quick_probe(x, y, test, t)
    assert found["penalty"] == max(found["held_out"], key=found["held_out"].get)
    assert evaluate.quick_probe(x, y, test.flip(0), t)["penalty"] == found["penalty"]


def few_textures():
    textures = data.open_data()
    return data.Data(None, "", "textures", textures.train.take(slice(31)),
                     textures.test.take(slice(17)))


def untrained(kind="mlp"):
    torch.manual_seed(0)
    return Encoder(resnet("resnet10"), head(kind, 512))


def test_evaluating_changes_neither_the_encoder_nor_the_random_state():
    encoder, dataset = untrained(), few_textures()
    encoder.train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    numpy_state = np.random.get_state()[1].copy()
    crops = torch.randint(256, (2, 9, 3, 32, 32), dtype=torch.uint8)
    signals = augment.Augment("moco_v2", blur=False, normalisation="textures")
    state = torch.get_rng_state()
    first = evaluate.monitor(encoder, dataset, crops, signals, **OPTIONS)
    assert evaluate.monitor(encoder, dataset, crops, signals, **OPTIONS) == first
    assert 0 <= first["knn"] <= 100
    assert encoder.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(v, before[name]) for name, v in encoder.state_dict().items())
    without_labels = data.Data(None, "", "textures", dataset.train)
    found = evaluate.monitor(encoder, without_labels, crops, signals, **OPTIONS)
    assert found == {name: value for name, value in first.items() if name != "knn"}
    assert list(found) == ["alignment", "uniformity", "rank"]
    with torch.no_grad():
        z1, z2 = (encoder.eval()(x) for x in signals(crops, 0))
    assert found["alignment"] == pytest.approx(evaluate.alignment(z1, z2))
    assert found["uniformity"] == pytest.approx(evaluate.uniformity(z1))


def test_alignment_and_uniformity_are_the_literal_means():
    """In float64 loops (Wang and Isola 2020), and in closed form."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 7, 5, dtype=torch.float64)
    a, b = ([row / math.sqrt(sum(v * v for v in row)) for row in z] for z in (z1, z2))
    apart = [sum((u - v) ** 2 for u, v in zip(x, y)).item() for x, y in zip(a, b)]
    assert evaluate.alignment(z1, z2) == pytest.approx(sum(apart) / 7, rel=1e-12)
    pairs = [math.exp(-2 * sum((u - v) ** 2 for u, v in zip(a[i], a[j])).item())
             for i in range(7) for j in range(i)]
    assert evaluate.uniformity(z1) == pytest.approx(math.log(sum(pairs) / 21), rel=1e-12)
    equal, axes = torch.ones(6, 8) * 3, torch.eye(8)
    assert evaluate.alignment(equal, 2 * equal) == 0 and evaluate.uniformity(equal) == 0
    assert evaluate.alignment(axes, axes.roll(1, 0)) == pytest.approx(2)
    assert evaluate.uniformity(axes) == pytest.approx(-4)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    torch.manual_seed(0)
    scales = torch.tensor([9., 3., 1., 1., .1, 0.], dtype=torch.float64)
    h = torch.randn(30, 6, dtype=torch.float64) * scales
    values = torch.linalg.svdvals(h).tolist()
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares if share > 1e-12))
    assert evaluate.effective_rank(h) == pytest.approx(expected, rel=1e-6)
    assert evaluate.effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert evaluate.effective_rank(torch.eye(8)[:5]) == pytest.approx(5)


def test_copies_of_an_image_are_held_out_together():
    """Labels are random for each image, and features name the image: nothing can be predicted.

    Were a copy of a held-out image among the others, its label would be known.
    """
    rng, n, copies = np.random.default_rng(0), 200, 4
    x = torch.from_numpy(rng.normal(size=(n, 300))).float().repeat(copies, 1)
    y = torch.from_numpy(rng.integers(2, size=n)).repeat(copies)
    error = 300 / 2 / math.sqrt(n / 10)                         # three standard errors, in percent
    together = evaluate.quick_probe(x, y, x[:50], y[:50], copies=copies)["held_out"]
    assert all(abs(value - 50) < error for value in together.values())
    assert max(evaluate.quick_probe(x, y, x[:50], y[:50])["held_out"].values()) > 95


def test_features_are_those_of_the_images_in_their_order():
    encoder, images = untrained().eval(), few_textures().train
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in augment.NORMALISE["textures"])
    with torch.no_grad():
        expected = encoder.f((images.pixels / 255 - mean) / std)
    found = evaluate.features(encoder, images, batch=7, **OPTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    z = evaluate.features(encoder, images, feature="z", **OPTIONS)
    torch.testing.assert_close(z, encoder.g(expected).detach(), rtol=1e-4, atol=1e-4)


def save_features(folder):
    """Of 31 images, and of one image."""
    images = few_textures().train
    found = [evaluate.features(untrained(), part, **OPTIONS)
             for part in (images, images.take(slice(1)))]
    torch.save(found, f"{folder}/{ddp.world()}-{ddp.rank()}.pt")


def test_two_processes_evaluate_each_image_once(tmp_path):
    """31 images do not divide by two; one image is less than the number of processes."""
    save_features(tmp_path)
    spawn(save_features, tmp_path)
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for n, x, xa, xb in zip((31, 1), one, a, b, strict=True):
        assert len(x) == n and x.shape == xa.shape == xb.shape
        torch.testing.assert_close(xa, x, rtol=1e-4, atol=1e-5)
        assert torch.equal(xa, xb)


def test_large_data_sets_are_thinned_for_the_monitor():
    images = data.Images(torch.arange(25), files=np.arange(25))
    thin = evaluate.thin(images, 10)
    assert thin.labels.tolist() == thin.files.tolist() == list(range(0, 25, 3))
    assert evaluate.thin(images, 25).files.tolist() == list(range(25))


# Reading encoders

def checkpoint(path, change=lambda saved: None, kind="narrow"):
    torch.manual_seed(0)
    encoder = Encoder(resnet("resnet18-3x3"), head(kind, 512))
    saved = {"f": encoder.f.state_dict(), "g": encoder.g.state_dict(),
             "settings": {"arch": "resnet18-3x3", "head": kind}}
    change(saved)
    torch.save(saved, path)
    return encoder


def test_an_encoder_is_read_back_completely(tmp_path):
    saved = checkpoint(tmp_path / "c.pt")
    read, settings = load_encoder(tmp_path / "c.pt")
    assert settings["head"] == "narrow"
    assert [*saved.state_dict()] == [*read.state_dict()]
    for a, b in zip(saved.state_dict().values(), read.state_dict().values()):
        assert torch.equal(a, b)


def test_every_head_is_rebuilt_from_its_state_dict():
    """Table 1's heads, SimCLR's, and one as in BYOL, which is not in the paper."""
    torch.manual_seed(0)
    heads = {kind: head(kind, 64, 16) for kind in HEADS}
    for layers in (2, 3):
        heads[f"simclr{layers}"] = simclr.head(layers, 64, 16, simclr.GlobalBatchNorm)
    heads["byol"] = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(),
                                  nn.Linear(48, 16))
    x = torch.randn(32, 64)
    for name, g in heads.items():
        g(x + 1)                                                # moves the running statistics
        copy = mlp_from(g.state_dict(), 64)
        assert [*copy.state_dict()] == [*g.state_dict()], name
        copy.load_state_dict(g.state_dict())
        for training in (False, True):
            assert torch.equal(copy.train(training)(x), g.train(training)(x)), name


@pytest.mark.parametrize("change, message", [
    (lambda c: c["f"].pop("layer2.0.bn1.running_var"),
     "f: tensor layer2.0.bn1.running_var is missing"),
    (lambda c: c["f"].update(extra=torch.ones(1)), "f: tensor extra does not belong"),
    (lambda c: c["f"].update({"conv1.weight": torch.ones(3, 512)}),
     "f: tensor conv1.weight has shape .3, 512., not .64, 3, 3, 3."),
    (lambda c: c["g"].update({"0.weight": torch.ones(3, 512)}),
     "g: tensor 0.bias has shape .32,., not .3,."),
    (lambda c: c["g"].update({"0.weight": torch.ones(32, 77)}), "g: tensor 0.weight has shape"),
    (lambda c: c["g"].update({"2.weight": torch.ones(128, 77)}), "g: tensor 2.weight has shape"),
    (lambda c: c["g"].update({"0.bias": torch.ones(3)}),
     "g: tensor 0.bias has shape .3,., not .32,."),
    (lambda c: c["g"].pop("0.bias"), "g: tensor 0.bias is missing"),
    (lambda c: c["g"].pop("2.bias"), "g: tensor 2.bias is missing"),
    (lambda c: c["g"].pop("2.weight"), "g: tensor 2.bias does not belong"),
    (lambda c: c.pop("f"), "holds no encoder"),
    (lambda c: c["settings"].pop("arch"), "its settings lack arch")])
def test_an_incomplete_encoder_is_refused_by_name(tmp_path, change, message):
    checkpoint(tmp_path / "c.pt", change)
    with pytest.raises(UserError, match=f"c.pt: .*{message}"):
        load_encoder(tmp_path / "c.pt")


def test_a_library_error_in_a_notebook_has_the_message_of_the_script(tmp_path):
    """`except Exception` catches it; a script prints the same line and exits with 1."""
    path = tmp_path / "nothing.pt"
    try:
        load_encoder(path)
    except Exception as error:
        caught = error
    assert isinstance(caught, UserError)
    assert str(caught).startswith(f"{path}: no such file; expected the checkpoint.pt")
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        train.launch(lambda argv: load_encoder(argv[0]), [path])
    assert end.value.code == 1 and err.getvalue() == f"{caught}\n"


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


def test_a_file_that_would_run_code_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint("c.pt", lambda c: c.update(f=Evil()))
    with pytest.raises(UserError, match="c.pt: refused: reading it would run code ._?io.open."):
        load_encoder("c.pt")
    (tmp_path / "text.pt").write_text(json.dumps({}))
    with pytest.raises(UserError, match="text.pt: cannot be read as a checkpoint"):
        load_encoder("text.pt")
    with pytest.raises(UserError, match="nothing.pt: no such file"):
        load_encoder("nothing.pt")
    with pytest.raises(UserError, match="is a folder; expected the checkpoint.pt in it"):
        load_encoder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt", "text.pt"]


def test_random_is_the_network_as_constructed():
    a, b = (load_encoder("random", "resnet10", seed)[0] for seed in (0, 0))
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert a.f.bn1.running_mean.abs().max() == 0 and a.f.bn1.running_var.min() == 1
