import json
import math

import numpy as np
import pytest
import torch
from conftest import spawn

from common import augment, data, ddp, evaluate
from common.model import Encoder, head, load_encoder, resnet

HOW = dict(scale="textures", size=32, device=torch.device("cpu"), workers=0)


def clusters(n, seed, spread=1., classes=4, dim=12):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (classes, dim))
    y = rng.integers(0, classes, n)
    return torch.from_numpy(centres[y] + spread * rng.normal(0, 1, (n, dim))).float(), torch.from_numpy(y)


def test_knn_is_the_weighted_vote():
    """Against the formula, one query and one neighbour at a time."""
    (bank, y), (ask, t) = clusters(120, 0), clusters(40, 1)
    for k, temperature in ((7, .1), (200, .07)):
        right = 0
        for q, label in zip(ask, t):
            near = sorted(((q @ b / q.norm() / b.norm()).item(), c.item()) for b, c in zip(bank, y))[::-1][:k]
            votes = [sum(math.exp(s / temperature) for s, c in near if c == i) for i in range(4)]
            right += votes.index(max(votes)) == label
        assert evaluate.knn(bank, y, ask, t, k, temperature) == pytest.approx(100 * right / 40)


def test_logistic_regression_is_at_its_minimum():
    x, y = clusters(300, 0)
    weight = evaluate._logistic(x, y, 4, .01, x.var(0)).double().requires_grad_()
    logits = x.double() @ weight[:-1] + weight[-1]
    (torch.nn.functional.cross_entropy(logits, y) + .005 * weight[:-1].square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4


def test_quick_probe_reaches_the_best_linear_rule_and_ignores_scale():
    """Gaussian classes of one covariance: Bayes' rule is linear and known."""
    (x, y), (ask, t) = clusters(4000, 0), clusters(4000, 1)
    centres = torch.from_numpy(np.random.default_rng(99).normal(0, 1, (4, 12))).float()
    bayes = 100 * (torch.cdist(ask, centres).argmin(1) == t).double().mean().item()
    found = evaluate.quick_probe(x, y, ask, t)
    assert bayes < 99 and abs(found["top1"] - bayes) < .8
    scale = torch.logspace(-3, 3, 12)
    assert abs(evaluate.quick_probe(x * scale + 5, y, ask * scale + 5, t)["top1"] - found["top1"]) < .2


def test_penalty_is_chosen_on_training_data_alone():
    """With more dimensions than images a weak penalty over-fits; the test images have no say."""
    (x, y), (ask, t) = clusters(150, 0, 3., dim=200), clusters(500, 1, 3., dim=200)
    found = evaluate.quick_probe(x, y, ask, t)
    assert found["penalty"] == max(found["held_out"], key=found["held_out"].get)
    assert evaluate.quick_probe(x, y, ask.flip(0), t)["penalty"] == found["penalty"]


def small():
    textures = data.open_data(None)
    return data.Data(None, "", "textures", *(data.Images(i.labels[:n], i.pixels[:n]) for i, n in (
        (textures.train, 31), (textures.test, 17))))


def test_evaluating_leaves_no_trace():
    torch.manual_seed(0)
    encoder = Encoder(resnet("resnet10"), head("mlp", 512))
    encoder.train()
    before, state = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first = evaluate.monitor(encoder, small(), **HOW)
    assert evaluate.monitor(encoder, small(), **HOW) == first
    assert encoder.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_features_are_those_of_the_images_in_their_order():
    torch.manual_seed(0)
    encoder, images = Encoder(resnet("resnet10"), head("mlp", 512)).eval(), small().train
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in augment.NORMALISE["textures"])
    with torch.no_grad():
        expected = encoder.f((images.pixels / 255 - mean) / std)
    found = evaluate.features(encoder, images, batch=7, **HOW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    z = evaluate.features(encoder, images, feature="z", **HOW)
    torch.testing.assert_close(z, encoder.g(expected).detach(), rtol=1e-4, atol=1e-4)


def features_of(path):
    torch.manual_seed(0)
    encoder = Encoder(resnet("resnet10"), head("mlp", 512))
    torch.save(evaluate.features(encoder, small().train, **HOW), f"{path}/{ddp.world()}-{ddp.rank()}.pt")


def test_two_processes_evaluate_each_image_once(tmp_path):
    """31 images do not divide by two."""
    features_of(tmp_path)
    spawn(features_of, tmp_path)
    one, a, b = (torch.load(tmp_path / n) for n in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one.shape == a.shape == b.shape
    torch.testing.assert_close(a, one, rtol=1e-4, atol=1e-5)
    assert torch.equal(a, b)


def test_large_data_sets_are_thinned_for_the_monitor():
    images = data.Images(torch.arange(25), files=np.arange(25))
    assert evaluate.thin(images, 10).labels.tolist() == evaluate.thin(images, 10).files.tolist() == list(range(0, 25, 3))
    assert evaluate.thin(images, 25) is images


def checkpoint(path, change=lambda c: None):
    torch.manual_seed(0)
    encoder = Encoder(resnet("resnet18-3x3"), head("narrow", 512))
    made = {"f": encoder.f.state_dict(), "g": encoder.g.state_dict(),
            "settings": {"arch": "resnet18-3x3", "head": "narrow", "dim": 128}}
    change(made)
    torch.save(made, path)
    return encoder


def test_an_encoder_is_read_back_whole(tmp_path):
    saved = checkpoint(tmp_path / "c.pt")
    read, settings = load_encoder(str(tmp_path / "c.pt"))
    assert settings["head"] == "narrow"
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), read.state_dict().values()))


@pytest.mark.parametrize("change, message", [
    (lambda c: c["f"].pop("layer2.0.bn1.running_var"), "f: tensor layer2.0.bn1.running_var is missing"),
    (lambda c: c["f"].update(extra=torch.ones(1)), "f: tensor extra does not belong"),
    (lambda c: c["g"].update({"0.weight": torch.ones(3, 512)}), "g: tensor 0.weight has shape .3, 512., not .32, 512."),
    (lambda c: c.pop("f"), "holds no encoder"),
    (lambda c: c["settings"].pop("head"), "its settings lack head")])
def test_an_encoder_that_is_not_whole_is_refused_by_name(tmp_path, change, message):
    checkpoint(tmp_path / "c.pt", change)
    with pytest.raises(SystemExit, match=message):
        load_encoder(str(tmp_path / "c.pt"))


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


def test_a_file_that_would_run_code_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint("c.pt", lambda c: c.update(f=Evil()))
    with pytest.raises(SystemExit, match="c.pt: refused: reading it would run code .io.open."):
        load_encoder("c.pt")
    (tmp_path / "text.pt").write_text(json.dumps({}))
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        load_encoder("text.pt")
    with pytest.raises(SystemExit, match="no such file"):
        load_encoder("nothing.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt", "text.pt"]


def test_random_is_the_network_as_constructed():
    a, b = (load_encoder("random", "resnet10", seed)[0] for seed in (0, 0))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert a.f.bn1.running_mean.abs().max() == 0 and a.f.bn1.running_var.min() == 1
