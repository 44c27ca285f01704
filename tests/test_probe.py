"""The protocol of Sec. 2, supervised training, and weights from elsewhere."""

import colorsys
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import in_two_processes, refused, signal_handlers_restored, spawn, write_folder
from PIL import Image

import linear_probe
import moco_v2
from common import UserError, augment, data, ddp, evaluate, train
from common.checkpoint import load_encoder
from common.model import Encoder, head, resnet
from common.run import Log

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Class folders of small images, and a MoCo v2 checkpoint trained on them for an epoch."""
    root = tmp_path_factory.mktemp("made")
    write_folder(root / "images", 22, (32, 32))
    argv = [root / "images", "--arch", "resnet10", "--batch-size", "8", "--bn-group", "4",
            "--K", "20", "--epochs", "1", "--out", root / "moco"]
    with signal_handlers_restored():
        moco_v2.main([str(a) for a in argv])
    return root


def probe_settings(**other):
    defaults = dict(linear_probe.SCALES["textures"], seed=0, precision="fp32", lr=30., classes=3,
                    compile=False, graphs=False)
    return SimpleNamespace(**{**defaults, **other})


def resolved(module, scales, *argv, scale):
    return train.settings(module.flags(), argv, scale, scales, module.PRESETS)


def test_a_probe_runs_reports_and_continues(made, inside):
    """Last epoch, top-1 and top-5, confusion; stopped inside an epoch it ends bit-identically."""
    argv = ["--encoder", "moco/checkpoint.pt", "--batch-size", "16", "--epochs", "4"]
    out = inside(linear_probe, *argv, cwd=made).splitlines()
    result = json.loads((made / "moco/probe/result.json").read_text())
    logged = Log(made / "moco/probe/log.jsonl").values("top1")
    assert out[-1] == f"top-1 {logged[-1]:.2f} %" and len(logged) == 4
    assert result["top1"] == logged[-1] and result["best_top1"] == max(logged)
    assert result["top5"] == 100
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [22, 22]
    assert 100 * np.trace(confusion) / 44 == pytest.approx(result["top1"])
    with Image.open(made / "moco/probe/confusion.png") as picture:
        assert min(picture.size) > 400
    # An epoch has 44 images, so its last batch has 12.
    inside(linear_probe, *argv, "--out", "parts", "--max-steps", "5", cwd=made)
    inside(linear_probe, *argv, "--out", "parts", cwd=made)
    a, b = (torch.load(made / name / "checkpoint.pt", weights_only=True)
            for name in ("moco/probe", "parts"))
    assert a["step"] == 12 and all(torch.equal(a["g"][k], b["g"][k]) for k in a["g"])
    assert "finished already" in inside(linear_probe, *argv, cwd=made)
    out = inside(linear_probe, "--encoder", "moco/checkpoint.pt", "--epochs", "1", "--out", "one",
                 cwd=made)
    assert "note: fewer images than --batch-size: batch size 44, learning rate 5.15625" in out


def test_classes_that_differ_are_told_apart(tmp_path, inside):
    """Dark and bright images, by the probe, the quick probe, kNN and a supervised network."""
    for split in ("train", "val"):
        for low, name in ((0, "dark"), (200, "bright")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(20):
                rng = np.random.default_rng([low, i])
                pixels = rng.integers(low, low + 50, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"images/{split}/{name}/{i}.png")
    argv = ["images", "--arch", "resnet10"]
    train_all = ["--train", "all", "--bn-group", "10", "--lr", ".01"]
    for how in (["--encoder", "random", "--lr", "1"], train_all):
        inside(linear_probe, *argv, *how, "--batch-size", 20, "--epochs", 5, "--out", how[1],
               cwd=tmp_path)
        assert json.loads((tmp_path / how[1] / "result.json").read_text())["top1"] == 100
    inside(linear_probe, *argv, "--encoder", "random", "--quick", "--out", "quick", cwd=tmp_path)
    found = json.loads((tmp_path / "quick/quick-h.json").read_text())
    assert found["top1"] == found["knn"] == 100


def test_the_probe_is_sgd_at_lr_30_divided_by_10_at_60_and_80_epochs():
    s = linear_probe.SCALES["imagenet"]
    assert (s["base_lr"], s["batch_size"], s["epochs"], s["weight_decay"]) == (30, 256, 100, 0)
    assert s["crop"] == (.08, 1.) and s["stack"] == "weak"

    def rates(epochs, lr, drops):
        return [train.learning_rate(10 * e, lr=lr, schedule="steps", drops=drops, warmup=0,
                                    epochs=100, steps_per_epoch=10) for e in epochs]
    found = rates((0, 59, 60, 79, 80, 99), 30, s["drops"])
    assert found == pytest.approx([30, 30, 3, 3, .3, .3])
    frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h")
    model, _, optimizer = linear_probe.build(probe_settings(classes=1000), CPU, frozen)
    group, = optimizer.param_groups
    assert group["momentum"] == .9 and len(group["params"]) == 2
    assert model.g[0].weight.std().item() == pytest.approx(.01, rel=.02)
    assert model.g[0].bias.abs().max() == 0
    s = linear_probe.SUPERVISED["imagenet"]
    assert (s["base_lr"], s["batch_size"], s["epochs"], s["weight_decay"]) == (.1, 256, 100, 1e-4)
    assert rates((29, 30, 60, 90), .1, s["drops"]) == pytest.approx([.1, .01, .001, .0001])


@pytest.mark.parametrize("scale", ["imagenet", "cifar10", "textures"])
def test_the_supervised_rows_of_table_2_have_the_augmentation_of_mocos(scale):
    """Operations (blur or not), crop, strengths and normalisation, as both resolve them."""
    rows = [name for name in linear_probe.PRESETS if name.startswith("table2")]
    assert rows == [name for name in moco_v2.PRESETS if name.startswith("table2")]
    assert len(rows) == 7
    for row in rows:
        theirs = resolved(moco_v2, moco_v2.SCALES, "--preset", row, scale=scale)
        ours = resolved(linear_probe, linear_probe.SUPERVISED, "--preset", row, "--train", "all",
                        scale=scale)
        assert (ours.crop, ours.size) == (theirs.crop, theirs.size), row
        a, b = (augment.Augment(s.stack, augment.jitter_strength(s.jitter), s.blur,
                                s.normalisation) for s in (ours, theirs))
        assert a.operations == b.operations and a.jitter == b.jitter, row
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
        assert ("blur" in dict(a.operations)) == (scale == "imagenet")


def steps_of_a_probe(frozen, change=lambda model: None):
    model, logits_of, optimizer = linear_probe.build(probe_settings(), CPU, frozen)
    before = linear_probe.fingerprints(frozen)
    change(model)
    torch.manual_seed(0)
    for _ in range(2):
        x, y = torch.randn(8, 3, 32, 32), torch.randint(3, (8,))
        linear_probe.train_step(logits_of, optimizer, x, y, 8)
    linear_probe.check_unchanged(frozen, before)


@pytest.mark.parametrize("feature", ["h", "hidden", "z"])
def test_the_encoder_is_bit_identical_after_the_probe(feature):
    encoder = Encoder(resnet("resnet10"), head("mlp", 512))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    frozen = linear_probe.Frozen(encoder, feature)
    steps_of_a_probe(frozen)
    assert all(torch.equal(v, before[name]) for name, v in encoder.state_dict().items())
    expected = encoder.embed(torch.ones(1, 3, 32, 32), feature)
    assert torch.equal(frozen(torch.ones(1, 3, 32, 32)), expected)
    assert not expected.requires_grad


def test_one_batch_norm_that_is_not_frozen_is_noticed():
    frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h")
    with pytest.raises(UserError, match="not frozen: encoder.f.layer2.0.bn1.running_mean"):
        steps_of_a_probe(frozen, lambda model: model.f.encoder.f.layer2[0].bn1.train())


def gradients(kind):
    """Of one step in float64. The probe's batch does not divide by two."""
    torch.manual_seed(1)
    x, y = torch.randn(11, 3, 32, 32, dtype=torch.float64), torch.randint(3, (11,))
    s, frozen = probe_settings(bn_group=4, arch="resnet10"), None
    if kind == "all":
        x, y = x[:8], y[:8]
    else:
        torch.manual_seed(2)
        frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h").double()
    torch.set_default_dtype(torch.float64)
    try:
        model, logits_of, optimizer = linear_probe.build(s, CPU, frozen)
    finally:
        torch.set_default_dtype(torch.float32)
    mine = ddp.rows(len(x))
    linear_probe.train_step(logits_of, optimizer, x[mine], y[mine], len(x))
    return [p.grad for p in model.parameters() if p.requires_grad]


def accuracy():
    """On 31 test images, of an untrained model."""
    textures = data.open_data()
    few = data.Data(None, "", "textures", textures.train, textures.test.take(slice(31)))
    torch.manual_seed(0)
    model = Encoder(resnet("resnet10"), head("none", 512, 10)).eval()
    return linear_probe.test(model, few, normalisation="textures", size=32, device=CPU, workers=0)


def save_steps(folder):
    seen = {"linear": gradients("linear"), "all": gradients("all"), "accuracy": accuracy()}
    torch.save(seen, folder / f"{ddp.world()}-{ddp.rank()}.pt")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """What `save_steps` sees in one process, and in each of two."""
    folder = tmp_path_factory.mktemp("processes")
    save_steps(folder)
    spawn(save_steps, folder)
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("kind", ["linear", "all"])
def test_two_processes_give_the_gradients_of_one(one_and_two, kind):
    one, *two = (seen[kind] for seen in one_and_two)
    parameters = len(list(resnet("resnet10").parameters()))
    assert len(one) == (2 if kind == "linear" else parameters + 2)
    for other in two:
        for a, b in zip(other, one, strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm()


def test_two_processes_count_each_test_image_once(one_and_two):
    one, *two = (seen["accuracy"] for seen in one_and_two)
    assert one == two[0] == two[1] and sum(map(sum, one["confusion"])) == 31
    top1 = 100 * np.trace(np.array(one["confusion"])) / 31
    assert one["top5"] >= one["top1"] == pytest.approx(top1)


def test_a_probe_in_two_processes_ends_as_in_one(made, inside):
    """Also if an epoch's last batch, of 44 - 43 images, is smaller than the number of processes."""
    argv = ["--encoder", "moco/checkpoint.pt", "--batch-size", "43", "--epochs", "3",
            "--precision", "fp32"]
    inside(linear_probe, *argv, "--out", "plain", cwd=made)
    in_two_processes(linear_probe, *argv, "--out", "two", cwd=made)
    a, b = (torch.load(made / name / "checkpoint.pt", weights_only=True)["g"]
            for name in ("plain", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


def test_supervised_rows_train_everything_and_their_encoder_is_read_back(made, inside):
    """And the classifier is their g: z are the logits."""
    argv = ["images", "--arch", "resnet10", "--batch-size", "8", "--bn-group", "4",
            "--epochs", "2", "--train", "all"]
    for row in ("table2a-extreme", "supervised"):
        inside(linear_probe, *argv, "--preset", row, "--out", row, cwd=made)
    encoder, settings = load_encoder(made / "table2a-extreme/checkpoint.pt")
    assert settings["crop"] == [.02, .1] and settings["stack"] == "moco_v2"
    assert not settings["blur"]                                 # as MoCo's row on small images
    assert encoder.embed(torch.randn(2, 3, 32, 32), "z").shape == (2, 2)
    torch.manual_seed(0)
    untrained = resnet("resnet10").layer1[0].conv1.weight
    assert not torch.equal(encoder.f.layer1[0].conv1.weight, untrained)
    assert load_encoder(made / "supervised/checkpoint.pt")[1]["stack"] == "weak"
    probed = inside(linear_probe, "--quick", "--encoder", "supervised/checkpoint.pt", cwd=made)
    assert "supervised/checkpoint.pt" in probed


def test_a_supervised_network_with_an_mlp_head(made, inside):
    """Its classifier is fc-ReLU-fc, all of it trained; the hidden layer can be probed."""
    out = inside(linear_probe, "images", "--arch", "resnet10", "--batch-size", "8", "--bn-group",
                 "4", "--epochs", "1", "--train", "all", "--preset", "supervised-mlp", "--out",
                 "with-mlp", cwd=made)
    assert "head=mlp" in out
    g = torch.load(made / "with-mlp/checkpoint.pt", weights_only=True)["g"]
    assert [g[name].shape for name in ("0.weight", "2.weight")] == [(512, 512), (2, 512)]
    torch.manual_seed(0)
    untrained = Encoder(resnet("resnet10", 4), head("mlp", 512, 2)).g.state_dict()
    assert not any(torch.equal(g[name], untrained[name]) for name in g)
    inside(linear_probe, "--quick", "--encoder", "with-mlp/checkpoint.pt", "--feature", "hidden",
           cwd=made)


# Predictions (Sec. 3)

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 9, 9))).byte()


def test_rotation_grey_and_sobel_equal_literal_loops():
    for turns, change in enumerate(linear_probe.VARIANTS["rotation"][1:], 1):
        expected = np.rot90(IMAGES.numpy(), turns, (2, 3))
        assert np.array_equal(change(IMAGES).numpy(), expected)
    _, grey = linear_probe.VARIANTS["grey"]
    expected = np.tensordot(augment.GRAY, IMAGES.double().numpy(), (0, 1))
    assert abs(grey(IMAGES).numpy() - expected[:, None]).max() <= .51
    _, sobel = linear_probe.VARIANTS["sobel"]
    found, padded = sobel(IMAGES), np.pad(IMAGES.double().numpy(), [(0, 0)] * 2 + [(1, 1)] * 2,
                                             mode="edge")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    for image, channel, y, x in np.ndindex(found.shape):
        window = padded[image, channel, y:y + 3, x:x + 3]
        length = np.hypot((window * kernel).sum(), (window * kernel.T).sum())
        assert abs(found[image, channel, y, x].item() - min(255, length)) <= .51
    step = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    step[..., 4:] = 255
    assert sobel(step)[0, 0, 0].tolist() == [0, 0, 0, 255, 255, 0, 0, 0]


def test_noise_has_its_strength_and_depends_on_the_image_alone():
    _, noise = linear_probe.VARIANTS["noise"]
    greys = (100 + torch.arange(40)).byte().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    difference = noise(greys).double() - greys
    assert abs(difference.std() / 255 - .1) < .001 and abs(difference.mean()) < .3
    assert torch.equal(noise(greys[30:35]), noise(greys)[30:35])
    correlation = torch.corrcoef(difference.flatten(1)).fill_diagonal_(0)
    assert correlation.abs().max() < .1


def test_hues_are_those_of_the_mean_colour():
    colours = np.random.default_rng(1).integers(0, 256, (200, 3))
    pixels = torch.from_numpy(colours).byte()[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    found = linear_probe.hues(data.Images(pixels=pixels), size=4, device=CPU, workers=0)
    expected = [int(colorsys.rgb_to_hsv(*colour)[0] * 6) for colour in colours / 255]
    assert found.tolist() == expected and len(set(expected)) == 6


class Means(torch.nn.Module):
    """In the place of an encoder: h is the mean of each channel, and of each quarter."""

    width = 7

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), F.adaptive_avg_pool2d(x.mean(1), 2).flatten(1)], 1)


def predicted(what, n=400):
    """The quick probe of Means, on images with a bright corner and red more than green."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(90, 110, (2 * n, 3, 8, 8))
    pixels[:, 0] += rng.integers(20, 40, (2 * n, 1, 1))
    pixels[:, :, :4, :4] += 60
    images = data.Images(pixels=torch.from_numpy(pixels).byte())
    encoder = Encoder(Means(), torch.nn.Identity())
    options = dict(normalisation="unit", size=8, device=CPU, workers=0)
    train, test = (linear_probe.examples(what, "h", encoder, images.take(rows), {}, options)
                   for rows in (slice(n), slice(n, None)))
    return evaluate.quick_probe(*train, *test, copies=len(linear_probe.VARIANTS[what]))["top1"]


def test_what_features_hold_linearly_is_predicted_and_nothing_else():
    """Rotation moves the corner, grey removes the red; noise leaves all means as they are."""
    assert predicted("rotation") == predicted("grey") == 100
    assert abs(predicted("noise") - 50) < 300 / 2 / math.sqrt(800)


def test_predictions_work_without_labels_and_make_a_table(made, inside, tmp_path):
    (tmp_path / "photos").mkdir()
    for i, path in enumerate((made / "images").rglob("*.jpg")):
        shutil.copy(path, tmp_path / f"photos/{i}.jpg")
    out = inside(linear_probe, tmp_path / "photos", "--quick", "--encoder", "random",
                 "moco/checkpoint.pt", "--feature", "h", "hidden", "--predict", "rotation", "hue",
                 cwd=made).splitlines()
    assert out[-7].split() == ["rotation", "hue", "encoder"]
    rows = [f"{name}, {feature}" for name in ("random (resnet10)", "moco/checkpoint.pt")
            for feature in ("h", "hidden")]
    assert [line.split(maxsplit=2)[2] for line in out[-6:-2]] == rows
    assert out[-2].split()[0] == "25.00"
    assert out[-1] == f"top-1 {out[-3].split()[0]} %: rotation, {rows[-1]}"
    found = json.loads((made / "moco/probe/quick-hidden.json").read_text())
    assert found["predictions"].keys() == {"rotation", "hue"} and "top1" not in found
    assert f"{found['predictions']['rotation']['top1']:.2f}" == out[-3].split()[0]


def test_the_sides_of_a_prediction_share_no_image():
    images = data.Images(files=np.arange(103))
    train, test = linear_probe.split(data.Data(None, "", "cifar10", images), 0)
    assert len(test) == 20 and sorted([*train.files, *test.files]) == list(range(103))


def test_with_another_encoder_or_other_images_it_is_another_probe(made, inside, monkeypatch):
    """A probe that is continued must be that of the same encoder on the same images."""
    monkeypatch.chdir(made)
    shutil.copy("moco/checkpoint.pt", "encoder.pt")
    argv = ["images", "--encoder", "encoder.pt", "--epochs", "2", "--out", "since"]
    inside(linear_probe, *argv, "--max-steps", "1", cwd=made)
    shutil.copytree("images", "others")
    (made / "others/train/cat/0.jpg").rename(made / "others/train/cat/another.jpg")
    assert "--out since: holds a run with other settings (images_hash" in refused(
        linear_probe, "others", *argv[1:])
    saved = torch.load("encoder.pt", weights_only=True)
    saved["f"]["conv1.weight"] += 1
    torch.save(saved, "encoder.pt")
    assert "--out since: holds a run with other settings (encoder_fingerprint" in refused(
        linear_probe, *argv)


def elsewhere(kind, width=2048):
    """A file in FAIR's or torchvision's format, with their exact names.

    Returns the torchvision module that it is made from, and its content.
    """
    torch.manual_seed(3)
    net = torchvision.models.resnet50()
    for module in net.modules():                    # statistics other than the constructed ones
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -.1, .1)
            torch.nn.init.uniform_(module.running_var, .5, 2)
    if kind == "torchvision":                       # its files are older than this buffer
        return net, {name: tensor for name, tensor in net.state_dict().items()
                     if not name.endswith("num_batches_tracked")}
    last = torch.nn.Linear(width, 128)
    net.fc = last
    if kind == "v2":
        net.fc = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), last)
    state = {}
    for name, tensor in net.state_dict().items():
        state[f"module.encoder_q.{name}"] = tensor
        state[f"module.encoder_k.{name}"] = torch.zeros(()).expand_as(tensor)    # a small file
    state["module.queue"] = torch.randn(128, 64)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    return net, {"epoch": 200, "arch": "resnet50", "state_dict": state,
                 "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("kind, kept", [("v1", "none"), ("v2", "mlp"), ("torchvision", "none")])
def test_weights_from_elsewhere_give_the_features_of_torchvision(tmp_path, kind, kept):
    net, saved = elsewhere(kind)
    torch.save(saved, tmp_path / "file.pth")
    encoder, settings = load_encoder(tmp_path / "file.pth")
    assert (settings["arch"], settings["head"]) == ("resnet50", kept)
    assert settings["scale"] == settings["normalisation"] == "imagenet"
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(encoder.eval()(x), expected, rtol=1e-5, atol=1e-5)
        net.fc = torch.nn.Identity()
        torch.testing.assert_close(encoder.embed(x, "h"), net(x), rtol=1e-5, atol=1e-5)


def test_size_is_the_side_of_what_the_encoder_reads_in_training_and_probes(made, inside):
    sides = set()

    def watch(module, inputs):
        if getattr(module, "in_channels", None) == 3:
            sides.add(tuple(inputs[0].shape[2:]))

    moco = "runs/moco_v2-cifar10-table1-batch_size=8-arch=resnet10-size=40-K=16-bn_group=4"
    probe = ["--encoder", f"{moco}/checkpoint.pt"]
    small = ["images", "--arch", "resnet10", "--batch-size", "8", "--size", "40"]
    watching = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        for module, argv, side in [
                (moco_v2, [*small, "--bn-group", "4", "--K", "16", "--max-steps", "1"], 40),
                (linear_probe, [*probe, "--quick"], 40),
                (linear_probe, [*probe, "--quick", "--size", "24", "--out", "quick"], 24),
                (linear_probe, [*probe, "--epochs", "1", "--out", "sizes"], 40),
                (linear_probe, ["images", "--quick", "--encoder", "random", "--arch", "resnet10",
                                "--size", "20"], 20)]:
            sides.clear()
            inside(module, *argv, cwd=made)
            assert sides == {(side, side)}, argv
    finally:
        watching.remove()
    for path in (made / moco / "probe/quick-h.json", made / "quick/quick-h.json"):
        assert json.loads(path.read_text())["encoder"] == probe[1]
    assert "--size: 8: expected pixels, 16 or more" in refused(moco_v2, "--size", "8")


@pytest.mark.parametrize("kind, name, message", [
    ("v2", "module.encoder_q.layer3.4.conv2.weight", "f: tensor layer3.4.conv2.weight is missing"),
    ("v2", "module.encoder_q.fc.2.bias", "g: tensor 2.bias is missing"),
    ("v1", "module.encoder_q.fc.weight", "tensor fc.weight is missing"),
    ("torchvision", "layer4.2.bn3.running_mean",
     "f: tensor layer4.2.bn3.running_mean is missing")])
def test_a_missing_tensor_from_elsewhere_is_named(tmp_path, kind, name, message):
    _, saved = elsewhere(kind)
    state = saved.get("state_dict", saved)
    tensor = state.pop(name)
    torch.save(saved, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path / "file.pth")
    if "fc" not in name:
        state[name] = torch.cat([tensor, tensor])
        torch.save(saved, tmp_path / "file.pth")
        with pytest.raises(UserError, match=message.replace("is missing", "has shape")):
            load_encoder(tmp_path / "file.pth")


def test_torchvisions_weights_are_fetched_only_if_named(tmp_path, monkeypatch):
    """From torch's own cache here. Nothing else ever downloads."""
    net = torchvision.models.resnet18()
    name = os.path.basename(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    weights = {name: tensor for name, tensor in net.state_dict().items()
               if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "hub/checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder, settings = load_encoder("torchvision:resnet18")
    assert settings["arch"] == "resnet18" and torch.equal(encoder.g[0].weight, net.fc.weight)
    with pytest.raises(UserError, match="torchvision:vgg16: expected torchvision:NAME, NAME one "):
        load_encoder("torchvision:vgg16")


def test_bad_input_gets_one_line(made, tmp_path, inside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, encoder = made / "images", ["--encoder", made / "moco/checkpoint.pt"]

    def folder(name):
        return write_folder(tmp_path / name, 2, (32, 32))
    (folder("no_val") / "val").rename(tmp_path / "elsewhere")
    flat = folder("flat")
    for image in sorted((flat / "val").rglob("*.jpg")):
        image.rename(flat / "val" / f"{image.parent.name}{image.name}")
    for name in ("cat", "dog"):
        (flat / "val" / name).rmdir()
    (folder("other") / "val/dog").rename(tmp_path / "other/val/cow")
    (tmp_path / "photos").mkdir()
    shutil.copy(images / "train/cat/0.jpg", tmp_path / "photos")
    torch.save({"weights": torch.ones(1)}, "odd.pt")
    torch.save({"g": {}, "settings": {}, "step": 1}, "probe.pt")
    inside(moco_v2, images, "--arch", "resnet10", "--batch-size", "8", "--bn-group", "4",
           "--K", "8", "--max-steps", "1", "--head", "none", "--out", "none", cwd=tmp_path)
    for argv, line in [
            (["no_val", *encoder], "no_val: labels are needed; expected train/<class>/ and val/"),
            (["flat", *encoder], "flat/val: "),
            (["flat", *encoder], "expected val/<class>/*.jpg (ImageNet's validation images must "
                                 "be moved into folders of their classes)"),
            (["other", *encoder], "other/val: its classes are not those of train/: cow"),
            (["photos", *encoder], "photos: labels are needed"),
            (["--encoder", "odd.pt"], "odd.pt: holds no encoder"),
            (["--encoder", "probe.pt"], "probe.pt: holds no encoder"),
            (["--encoder", "none/checkpoint.pt", "--feature", "hidden"],
             "--feature hidden: the head of this encoder has no hidden layer"),
            ([images, "--preset", "table2a-medium"],
             "--preset table2a-medium: a supervised row; it needs --train all"),
            ([images, "--train", "all", *encoder],
             "--train all starts from random weights: it excludes"),
            (["photos", *encoder, "--quick", "--predict", "grey", "class"],
             "photos: labels are needed"),
            ([*encoder, "--predict", "grey"], "--predict: needs --quick"),
            ([*encoder, "--feature", "h", "z"], "--feature: expected one, or several with --quick"),
            ([*encoder, "--head", "mlp"], "--head mlp: the head of supervised training; it needs"),
            (["--encoder", "none/checkpoint.pt", "--quick", "--feature", "h", "hidden"],
             "--feature hidden: the head of this encoder has no hidden layer"),
            ([*encoder, "--encoder", "a", "b"], "--encoder: expected one")]:
        assert line in refused(linear_probe, *argv)
