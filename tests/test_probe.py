"""The protocol of Sec. 2, supervised training, and weights from elsewhere."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import run, spawn, write_folder
from PIL import Image

import linear_probe
import moco_v2
from common import data, ddp, train
from common.model import Encoder, head, load_encoder, resnet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Class folders of small images, and a MoCo v2 checkpoint trained on them for a moment."""
    root = tmp_path_factory.mktemp("made")
    write_folder(root / "images", 22, (32, 32))
    run("moco_v2.py", "images", "--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--K", "20", "--epochs", "1",
        "--out", "moco", cwd=root)
    return root


def probe_settings(**other):
    return SimpleNamespace(**{**linear_probe.SCALES["textures"], "seed": 0, "precision": "fp32", "dim": 3,
                              "feature": "h", **other})


def test_a_probe_runs_is_reported_and_goes_on(made, inside):
    """Last epoch, top-1 and top-5, confusion; stopped inside an epoch it ends with the same bits."""
    argv = ["linear_probe.py", "--encoder", "moco/checkpoint.pt", "--batch-size", "16", "--epochs", "4"]
    out = run(*argv, cwd=made, OMP_NUM_THREADS=str(torch.get_num_threads())).stdout.splitlines()
    result = json.loads((made / "moco/probe/result.json").read_text())
    logged = [e["top1"] for e in map(json.loads, (made / "moco/probe/log.jsonl").read_text().splitlines()) if "top1" in e]
    assert out[-1] == f"top-1 {logged[-1]:.2f} %" and len(logged) == 4
    assert result["top1"] == logged[-1] and result["best_top1"] == max(logged) and result["top5"] == 100
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [22, 22] and 100 * np.trace(confusion) / 44 == pytest.approx(result["top1"])
    with Image.open(made / "moco/probe/confusion.png") as picture:
        assert min(picture.size) > 400
    # an epoch is 44 images, so that its last batch has 12
    inside(linear_probe, *argv[1:], "--out", "parts", "--max-steps", "5", cwd=made)
    inside(linear_probe, *argv[1:], "--out", "parts", cwd=made)
    a, b = (torch.load(made / name / "checkpoint.pt", weights_only=True) for name in ("moco/probe", "parts"))
    assert a["step"] == 12 and all(torch.equal(a["g"][k], b["g"][k]) for k in a["g"])
    assert "finished already" in inside(linear_probe, *argv[1:], cwd=made)
    out = inside(linear_probe, "--encoder", "moco/checkpoint.pt", "--epochs", "1", "--out", "one", cwd=made)
    assert "note: batch 44, all images there are; learning rate 5.15625" in out


def test_the_probe_is_sgd_at_lr_30_with_steps_at_60_and_80():
    s = linear_probe.SCALES["imagenet"]
    assert (s["lr"], s["batch_size"], s["epochs"], s["weight_decay"], s["crop"]) == (30, 256, 100, 0, (.08, 1.))
    at = [train.learning_rate(10 * e, lr=30, schedule="steps", drops=s["drops"], warmup=0, epochs=100, steps_per_epoch=10)
          for e in (0, 59, 60, 79, 80, 99)]
    assert at == pytest.approx([30, 30, 3, 3, .3, .3])
    frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h")
    model, _, optimizer = linear_probe.build(probe_settings(dim=1000), CPU, False, frozen)
    assert optimizer.param_groups[0]["momentum"] == .9 and len(optimizer.param_groups[0]["params"]) == 2
    assert model.g[0].weight.std().item() == pytest.approx(.01, rel=.02) and model.g[0].bias.abs().max() == 0
    rates = linear_probe.SCALES["imagenet"] | linear_probe.SUPERVISED["imagenet"]
    at = [train.learning_rate(e, lr=.1, schedule="steps", drops=rates["drops"], warmup=0, epochs=100, steps_per_epoch=1)
          for e in (29, 30, 60, 90)]
    assert at == pytest.approx([.1, .01, .001, .0001])


def steps_of_a_probe(frozen, change=lambda model: None):
    model, logits_of, optimizer = linear_probe.build(probe_settings(), CPU, False, frozen)
    before = linear_probe.copy_of(frozen)
    change(model)
    torch.manual_seed(0)
    for _ in range(2):
        linear_probe.train_step(logits_of, optimizer, torch.randn(8, 3, 32, 32), torch.randint(3, (8,)), 8)
    linear_probe.check_unchanged(frozen, before)


@pytest.mark.parametrize("feature", ["h", "hidden", "z"])
def test_the_encoder_is_bit_identical_after_the_probe(feature):
    encoder = Encoder(resnet("resnet10"), head("mlp", 512))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    frozen = linear_probe.Frozen(encoder, feature)
    steps_of_a_probe(frozen)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    expected = encoder.embed(torch.ones(1, 3, 32, 32), feature)
    assert torch.equal(frozen(torch.ones(1, 3, 32, 32)), expected) and not expected.requires_grad


def test_one_batch_norm_that_is_not_frozen_is_noticed():
    frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h")
    with pytest.raises(SystemExit, match="not frozen: encoder.f.layer2.0.bn1.running_mean"):
        steps_of_a_probe(frozen, lambda model: model.f.encoder.f.layer2[0].bn1.train())


def gradients(folder, kind):
    """Gradients of one step on a batch that does not divide evenly by two, in float64."""
    torch.manual_seed(1)
    x, y = torch.randn(11, 3, 32, 32, dtype=torch.float64), torch.randint(3, (11,))
    s, frozen = probe_settings(bn_group=4, arch="resnet10"), None
    if kind == "all":
        x, y = x[:8], y[:8]
    else:
        torch.manual_seed(2)
        frozen = linear_probe.Frozen(Encoder(resnet("resnet10"), head("mlp", 512)), "h").double()
    torch.set_default_dtype(torch.float64)
    model, logits_of, optimizer = linear_probe.build(s, CPU, False, frozen)
    torch.set_default_dtype(torch.float32)
    mine = ddp.rows(len(x))
    linear_probe.train_step(logits_of, optimizer, x[mine], y[mine], len(x))
    torch.save([p.grad for p in model.parameters() if p.requires_grad], folder / f"{ddp.world()}-{ddp.rank()}.pt")


@pytest.mark.parametrize("kind", ["linear", "all"])
def test_two_processes_give_the_gradients_of_one(tmp_path, kind):
    gradients(tmp_path, kind)
    spawn(gradients, tmp_path, kind)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(one) == (2 if kind == "linear" else len(list(resnet("resnet10").parameters())) + 2)
    for other in two:
        assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(other, one))


def accuracy(folder):
    """On 31 test images, with a model whose accuracy is known."""
    textures = data.open_data(None)
    few = data.Data(None, "", "textures", textures.train, data.Images(textures.test.labels[:31], textures.test.pixels[:31]))
    torch.manual_seed(0)
    model = Encoder(resnet("resnet10"), head("none", 512, 10)).eval()
    s = probe_settings(normalisation="textures")
    (folder / f"{ddp.world()}-{ddp.rank()}.json").write_text(json.dumps(linear_probe.test(model, few, s, CPU, 0)))


def test_two_processes_count_each_test_image_once(tmp_path):
    accuracy(tmp_path)
    spawn(accuracy, tmp_path)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert one == two[0] == two[1] and sum(map(sum, one["confusion"])) == 31
    assert one["top5"] >= one["top1"] == pytest.approx(100 * np.trace(np.array(one["confusion"])) / 31)


def test_under_torchrun_a_probe_ends_like_plain(made, inside):
    argv = ["linear_probe.py", "--encoder", "moco/checkpoint.pt", "--batch-size", "15", "--epochs", "2", "--precision", "fp32"]
    inside(linear_probe, *argv[1:], "--out", "plain", cwd=made)
    run(*argv, "--out", "two", cwd=made, torchrun=2)
    a, b = (torch.load(made / name / "checkpoint.pt", weights_only=True)["g"] for name in ("plain", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


def test_supervised_rows_train_everything_and_their_encoder_is_read_back(made, inside):
    """And the classifier is their g: z are the logits."""
    argv = ["--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--epochs", "2", "--train", "all"]
    for row in ("table2a-extreme", "supervised"):
        inside(linear_probe, "images", *argv, "--preset", row, "--out", row, cwd=made)
    encoder, settings = load_encoder(str(made / "table2a-extreme/checkpoint.pt"))
    assert settings["crop"] == [.02, .1] and settings["stack"] == "moco_v2" and settings["blur"]
    assert encoder.embed(torch.randn(2, 3, 32, 32), "z").shape == (2, 2)
    torch.manual_seed(0)
    assert not torch.equal(encoder.f.layer1[0].conv1.weight, resnet("resnet10").layer1[0].conv1.weight)
    assert load_encoder(str(made / "supervised/checkpoint.pt"))[1]["stack"] == "weak"
    probed = inside(linear_probe, "--quick", "--encoder", "supervised/checkpoint.pt", cwd=made)
    assert "supervised/checkpoint.pt" in probed


def elsewhere(kind, width=2048):
    """A file in FAIR's or torchvision's format, with their exact names, and the torchvision module it is made from."""
    torch.manual_seed(3)
    net = torchvision.models.resnet50()
    for module in net.modules():                                # statistics that are not the constructed ones
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -.1, .1)
            torch.nn.init.uniform_(module.running_var, .5, 2)
    if kind == "torchvision":
        return net, net.state_dict()
    mlp = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 128))
    net.fc = mlp if kind == "v2" else torch.nn.Linear(width, 128)
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in net.state_dict().items()}
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return net, {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("kind, kept", [("v1", "none"), ("v2", "mlp"), ("torchvision", "none")])
def test_weights_from_elsewhere_give_torchvisions_features(tmp_path, kind, kept):
    net, saved = elsewhere(kind)
    torch.save(saved, tmp_path / "file.pth")
    encoder, settings = load_encoder(str(tmp_path / "file.pth"))
    assert (settings["arch"], settings["head"], settings["scale"]) == ("resnet50", kept, "imagenet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(encoder.eval()(x), expected, rtol=1e-5, atol=1e-5)
        net.fc = torch.nn.Identity()
        torch.testing.assert_close(encoder.embed(x, "h"), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, name, message", [
    ("v2", "module.encoder_q.layer3.4.conv2.weight", "f: tensor layer3.4.conv2.weight is missing"),
    ("v2", "module.encoder_q.fc.2.bias", "g: tensor 2.bias is missing"),
    ("v1", "module.encoder_q.fc.weight", "tensor fc.weight is missing"),
    ("torchvision", "layer4.2.bn3.running_mean", "f: tensor layer4.2.bn3.running_mean is missing")])
def test_a_missing_tensor_from_elsewhere_is_named(tmp_path, kind, name, message):
    _, saved = elsewhere(kind)
    state = saved.get("state_dict", saved)
    tensor = state.pop(name)
    torch.save(saved, tmp_path / "file.pth")
    with pytest.raises(SystemExit, match=message):
        load_encoder(str(tmp_path / "file.pth"))
    if "fc" not in name:
        state[name] = torch.cat([tensor, tensor])
        torch.save(saved, tmp_path / "file.pth")
        with pytest.raises(SystemExit, match=message.replace("is missing", "has shape")):
            load_encoder(str(tmp_path / "file.pth"))


def test_torchvisions_weights_are_fetched_by_name_alone(tmp_path, monkeypatch):
    """From torch's own cache here; nothing else ever downloads."""
    net = torchvision.models.resnet18()
    name = os.path.basename(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder, settings = load_encoder("torchvision:resnet18")
    assert settings["arch"] == "resnet18" and torch.equal(encoder.g[0].weight, net.fc.weight)


def test_bad_input_gets_one_line(made, tmp_path, inside, capsys):
    images, encoder = made / "images", ["--encoder", str(made / "moco/checkpoint.pt")]
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
    torch.save({"weights": torch.ones(1)}, tmp_path / "odd.pt")
    torch.save({"g": {}, "settings": {}, "step": 1}, tmp_path / "probe.pt")
    inside(moco_v2, images, "--arch", "resnet10", "--batch-size", "8", "--bn-group", "4", "--K", "8", "--max-steps", "1",
           "--head", "none", "--out", "none", cwd=tmp_path)
    for argv, line in [(["no_val", *encoder], "labels are needed"), (["flat", *encoder], "without class folders, as ImageNet"),
                       (["other", *encoder], "its classes are not those of train/: cow"),
                       (["photos", *encoder], "labels are needed"), (["--encoder", "odd.pt"], "holds no encoder"),
                       (["--encoder", "probe.pt"], "holds no encoder"),
                       (["--encoder", "none/checkpoint.pt", "--feature", "hidden"], "has no hidden layer"),
                       ([str(images), "--preset", "table2a-medium"], "add --train all"),
                       ([str(images), "--train", "all", *encoder], "--train all starts from random weights"),
                       ([*encoder, "--encoder", "a", "b"], "one at a time")]:
        with pytest.raises(SystemExit) as error:
            linear_probe.main(argv)
        message = str(error.value) if error.value.code not in (0, 2) else capsys.readouterr().err
        assert error.value.code not in (0, None) and line in message, (argv, message)
        assert len(message.strip().splitlines()) == 1, message
