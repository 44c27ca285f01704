"""Operators that would slow a GPU down, detected on a CPU.

A TorchDispatchMode sees every operator of a step on the CPU: reads of values by the host, and
kernel launches (operators that are not views). FakeTensorMode raises an error if an operator mixes
devices. Tensors on the `meta` device show the transfers from the host.
"""

import collections
import copy
import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dip_inversion
import instdisc
import linear_probe
import moco_v2
import simclr
import tsne_aug
from common import UserError, augment, data, ddp, evaluate, train
from common.layers import GroupBatchNorm2d
from common.model import Encoder, head, resnet
from common.run import Run

CPU = torch.device("cpu")
BATCH, K, CLASSES, N_IMAGES = 8, 24, 10, 40
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}
NO_LAUNCH = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand",
             "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "detach",
             "alias", "_reshape_alias", "unfold", "diagonal", "narrow", "reshape", "lift_fresh",
             "empty", "empty_like", "new_empty", "empty_strided", "sym_size"}
# Launches of a MoCo step (ResNet-18-3x3, 8 groups, bf16) at commit f1fe113, without graphs.
LAUNCHES_BEFORE = 1310


class Operators(TorchDispatchMode):
    """Counts dispatched operators by name, and transfers from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.names, self.transfers = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names[name] += 1
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            self.transfers += source.device.type == "cpu" and out.device.type != "cpu"
        return out

    def launches(self):
        return sum(count for name, count in self.names.items() if name not in NO_LAUNCH)

    def reads(self):
        return sorted(READS & set(self.names))


def settings(module, scale="textures", scales=None, **other):
    scales = scales or module.SCALES
    return SimpleNamespace(**{**scales[scale], "seed": 0, "lr": .1, "K": K, "bn_group": 4,
                              "images": N_IMAGES, "classes": CLASSES, "precision": "fp32",
                              "compile": False, "graphs": False,
                              **other})


def encoder_of(kind="mlp", **options):
    f = resnet("resnet10", **options)
    return Encoder(f, head(kind, f.width, CLASSES if kind == "none" else 128))


# Each function below makes a step: a callable without arguments, on `device`, from modules built
# there. Draws are made before, as arguments of the step.

def augmented(stack, views, device, parts=None):
    """Augmented views of random images on `device`."""
    module = augment.Augment(stack, augment.jitter_strength(.5)).to(CPU)
    draws = module.draw(0, BATCH, views)
    draws = {name: value.to(device) if isinstance(value, torch.Tensor) else value
             for name, value in draws.items()}
    for name in ("mean", "std"):
        setattr(module, name, getattr(module, name).to(device))
    x = torch.randint(256, (views, BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
    return lambda: module.transform_views(x, draws)


def optimizer_of(module, device):
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, .1, momentum=.9, fused=device.type == "cpu")


def moco_step(device, negatives="queue"):
    moco = moco_v2.MoCo(encoder_of(bn_group=4), K, 128, .99, .2)
    optimizer = optimizer_of(moco.encoder_q, device)
    views = augmented("moco_v2", 2, device)
    permutation, ranks = torch.randperm(BATCH, device=device), None
    if negatives != "queue":
        ranks = torch.randint(K, (BATCH, K), device=device)

    def step():
        x1, x2 = views()
        moco_v2.train_step(moco, optimizer, x1, moco_v2.shuffle(x2, permutation), permutation, 3,
                           ranks)
    return step


def simclr_step(device, chunked=False):
    f = resnet("resnet10", norm=simclr.GlobalBatchNorm)
    encoder = Encoder(f, simclr.head(2, 512, 128, simclr.GlobalBatchNorm))
    optimizer = simclr.LARS([p for p in encoder.parameters() if p.requires_grad], .1)
    views = augmented("simclr", 2, device)
    if not chunked:
        return lambda: simclr.train_step(encoder, optimizer, *views(), .2)
    x = torch.stack(views())
    return lambda: simclr.chunked_step(encoder, encoder, None, optimizer,
                                       lambda part: list(x[:, part]), BATCH, 1, .2)


def instdisc_step(device, loss="nce"):
    encoder = encoder_of(bn_group=4)
    memory, Z = torch.randn(N_IMAGES, 128, device=device), torch.ones((), device=device)
    index = torch.arange(BATCH, device=device)
    slots = torch.randint(N_IMAGES, (BATCH, K), device=device)
    views, optimizer = augmented("moco_v1", 1, device), optimizer_of(encoder, device)
    return lambda: instdisc.train_step(encoder, memory, Z, optimizer, *views(), index, slots, 3,
                                       instdisc.LOSSES[loss], .1, .5, .1)


def probe_step(device):
    frozen = linear_probe.Frozen(encoder_of(), "h")
    classifier = torch.nn.Linear(512, CLASSES)
    views, optimizer = augmented("weak", 1, device), optimizer_of(classifier, device)
    y = torch.randint(CLASSES, (BATCH,), device=device)
    return lambda: linear_probe.train_step(lambda x: classifier(frozen(x)), optimizer, *views(), y,
                                           BATCH)


def supervised_step(device):
    model = encoder_of("none", bn_group=4)
    views, optimizer = augmented("moco_v2", 1, device), optimizer_of(model, device)
    y = torch.randint(CLASSES, (BATCH,), device=device)
    return lambda: linear_probe.train_step(model, optimizer, *views(), y, BATCH)


def tsne_step(device):
    x, y = torch.randn(30, 12, device=device), torch.randn(30, 2, device=device)

    def step():
        P = tsne_aug.affinities(x, 8.)
        tsne_aug.gradient(P, y)
    return step


def dip_step(device):
    """An iteration of two panels, but for Adam, whose step counters stay on the CPU."""
    embed = dip_inversion.feature_function(encoder_of(), "hidden", "textures", device)
    panels = dip_inversion.Panels(1, 2, 32, seed=0)
    x, target = torch.rand(2, 3, 32, 32, device=device), torch.randn(2, 512, device=device)

    def step():
        x_rec, = panels()
        (embed(x_rec) - target).square().mean(1).sum().backward()
        for measure in (dip_inversion.psnr, dip_inversion.colour_distance,
                        dip_inversion.structure):
            measure(x, x_rec.detach())
    return step


STEPS = {
    "moco": moco_step, **{f"moco {kind}": functools.partial(moco_step, negatives=kind)
                          for kind in ("hard", "hardest", "random")},
    "simclr": simclr_step, "simclr chunked": functools.partial(simclr_step, chunked=True),
    **{f"instdisc {loss}": functools.partial(instdisc_step, loss=loss)
       for loss in instdisc.LOSSES},
    "probe": probe_step, "supervised": supervised_step, "dip": dip_step,
    "tsne": tsne_step}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_nothing_from_the_device(name):
    """Augmentation, forward and backward pass, optimizer, and the method's state."""
    torch.manual_seed(0)
    step = STEPS[name](CPU)
    step()                                                      # creates the optimizer's state
    with Operators() as seen:
        step()
    assert seen.reads() == [] and seen.launches() > 20


@pytest.mark.parametrize("name", [name for name in STEPS if name != "simclr chunked"])
def test_a_step_mixes_no_devices(name, monkeypatch):
    """On fake CUDA tensors; the backward pass and the optimizer cannot run there.

    A chunked step needs the gradient of the embeddings; its parts are those of `simclr`.
    """
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    monkeypatch.setattr(simclr.LARS, "step", lambda self: None)
    # Its operators exist on GPUs only, also as fake ones; tests/test_gpu.py runs them.
    monkeypatch.setattr(GroupBatchNorm2d, "together", GroupBatchNorm2d.one_by_one)
    # Fake tensors cannot be moved, or copied: they would belong to another mode.
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(moco_v2.copy, "deepcopy", lambda encoder: encoder_of(bn_group=4))
    with FakeTensorMode():
        with torch.device("cuda"):
            step = STEPS[name](torch.device("cuda"))
        with Operators() as seen:
            step()
    assert seen.launches() > 10 and seen.transfers == 0


@pytest.mark.parametrize("name", ["knn", "quick probe"])
def test_evaluation_mixes_no_devices(name, monkeypatch):
    """With features on fake CUDA tensors and labels on the CPU, up to the first value that is read.

    That is the accuracy for kNN, and for the quick probe the first loss of its L-BFGS search.
    """
    monkeypatch.setattr(evaluate, "n_classes", lambda labels: CLASSES)
    with FakeTensorMode():
        bank, queries = torch.randn(60, 16, device="cuda"), torch.randn(20, 16, device="cuda")
        labels, truth = torch.zeros(60).long(), torch.zeros(20).long()
        with pytest.raises(DataDependentOutputException) as caught:
            if name == "knn":
                evaluate.knn(bank, labels, queries, truth)
            else:
                evaluate.quick_probe(bank, labels, queries, truth)
    lines = [str(entry.statement) for entry in caught.traceback]
    read = "right.item()" if name == "knn" else "search.step(loss)"
    assert any(read in line for line in lines), lines


def test_reads_and_mixed_devices_are_noticed():
    """What the tests above would miss if the modes did not work."""
    x = torch.randn(3)
    with Operators() as seen:
        x.sum().item()
        (x > 0).nonzero()
    assert seen.reads() == ["_local_scalar_dense", "nonzero"]
    with FakeTensorMode():
        cpu, cuda = torch.randn(3, device="cpu"), torch.randn(3, device="cuda")
        with pytest.raises(Exception, match="[Dd]evice"):
            cpu + cuda
        with pytest.raises(Exception):
            cuda.sum().item()


def test_all_draws_of_a_step_travel_in_one_copy():
    """And the indices and boxes of crops from images in memory in another."""
    meta = torch.device("meta")
    module = augment.Augment("moco_v2")
    draws = {**module.draw(0, BATCH, views=2), "permutation": torch.randperm(BATCH)}
    with Operators() as seen:
        sent = ddp.send(draws, meta)
    assert seen.transfers == 1 and sent.keys() == draws.keys()
    assert all(sent[name].shape == value.shape and sent[name].dtype == value.dtype
               for name, value in draws.items() if isinstance(value, torch.Tensor))
    pixels = torch.empty(N_IMAGES, 3, 32, 32, dtype=torch.uint8, device=meta)
    with Operators() as seen:
        data._crops_in_memory(pixels, np.arange(BATCH), np.random.rand(BATCH, 2, 22), 32, (.2, 1.))
    assert seen.transfers == 1


def test_packed_tensors_are_unpacked_unchanged():
    tensors = {"a": torch.arange(3), "b": torch.randn(2, 5), "d": torch.randn(3).double(),
               "c": torch.tensor([], dtype=torch.int64), "e": torch.tensor([True, False]),
               "order": [2, 0, 1], "f": torch.randn(4, 3).T}
    found = ddp.unpack(ddp.pack(tensors), tensors)
    assert found["order"] == [2, 0, 1] and found.keys() == tensors.keys()
    for name in "abcdef":
        assert found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name])


# Launches

def per_channel(values):
    return values.view(1, -1, 1, 1)


def elemt(x, weight, bias, mean, invstd, eps, out):
    out.copy_((x - per_channel(mean)) * per_channel(invstd * weight) + per_channel(bias))


def backward_reduce(dy, x, mean, invstd, weight, *_):
    dy_sum = dy.sum((0, 2, 3))
    dy_x = (dy * (x - per_channel(mean))).sum((0, 2, 3))
    return dy_sum, dy_x, dy_x * invstd, dy_sum


def backward_elemt(dy, x, mean, invstd, weight, dy_sum, dy_x, count):
    slope = (x - per_channel(mean)) * per_channel(invstd.square() * dy_x / count)
    return (dy - per_channel(dy_sum / count) - slope) * per_channel(invstd * weight)


def test_all_groups_together_equal_the_loop_over_groups(monkeypatch):
    """Values, gradients and running statistics, with formulas for the operators of GPUs."""
    for name in ("elemt", "backward_reduce", "backward_elemt"):
        monkeypatch.setattr(torch, f"batch_norm_{name}", globals()[name])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = (torch.randn(12, 5, 6, 7) + 1).to(memory_format=memory_format)
        weight, found = torch.randn(12, 5, 6, 7), []
        for form in ("one_by_one", "together"):
            norm = GroupBatchNorm2d(5, group=4)
            norm.load_state_dict({**norm.state_dict(), "weight": torch.arange(5.),
                                  "bias": torch.arange(5.) - 2})
            leaf = x.clone().requires_grad_()
            out = getattr(norm, form)(leaf)
            (out * weight).sum().backward()
            found.append([out, leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def launches_of_moco():
    """Of a MoCo step on a GPU, with ResNet-18-3x3 and 64 images.

    The passes of the encoders are three CUDA graphs; what they hold is not counted.
    """
    moco, optimizer = moco_v2.build(settings(moco_v2, "cifar10", bn_group=8), CPU)
    module = augment.Augment("moco_v2", blur=False, normalisation="cifar10")
    x = torch.randint(256, (2, 64, 3, 32, 32), dtype=torch.uint8)
    permutation, draws = torch.randperm(64), module.draw(0, 64, views=2)
    z = torch.randn(64, 128, requires_grad=True)
    moco.embed_q = moco.embed_k = lambda x: z
    for parameter in moco.encoder_q.parameters():               # as by the graph of the backward
        parameter.grad = torch.zeros_like(parameter)            # pass
    optimizer.zero_grad = lambda: None

    def step(i):
        x1, x2 = module.transform_views([x[0], moco_v2.shuffle(x[1], permutation)], draws)
        moco_v2.train_step(moco, optimizer, x1, x2, permutation, i)
    step(0)
    with Operators() as seen:
        step(1)
    assert z.grad is not None
    return 3 + seen.launches()


def test_a_cifar_step_has_at_most_a_quarter_of_the_launches_without_graphs():
    assert launches_of_moco() <= LAUNCHES_BEFORE / 4


def test_recording_an_encoder_changes_nothing(monkeypatch):
    """PyTorch calls it several times before it records, which moves batch statistics."""
    def warm_up(module, inputs):
        for _ in range(3):
            module(*inputs)
        return module
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warm_up)
    encoder, x = encoder_of(bn_group=4), torch.randn(BATCH, 3, 32, 32)
    untouched = copy.deepcopy(encoder)
    recorded = train.record(encoder, x)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name]), name
    # Its parameters are the encoder's, or the backward pass would not reach them.
    assert list(map(id, recorded.parameters())) == list(map(id, encoder.parameters()))
    assert torch.equal(recorded(x), untouched(x))


def test_encoders_are_recorded_on_one_gpu_only(monkeypatch):
    monkeypatch.setattr(train, "record", lambda module, x: pytest.fail(f"{tuple(x.shape)}"))
    args = {"precision": "fp32", "compile": False, "graphs": True, "size": 32}
    cuda, module = torch.device("cuda"), torch.nn.Identity()
    with FakeTensorMode():
        with pytest.raises(pytest.fail.Exception, match=r"\(8, 3, 32, 32\)"):
            train.embedder(module, SimpleNamespace(**args), cuda, 8)
        for device, batch, changes in ((CPU, 8, {}), (cuda, None, {}), (cuda, 8, {"graphs": False}),
                                       (cuda, 8, {"compile": True})):
            train.embedder(module, SimpleNamespace(**{**args, **changes}), device, batch)
        monkeypatch.setattr(ddp, "world", lambda: 2)
        train.embedder(module, SimpleNamespace(**args), cuda, 8)


def launches_of_lars():
    """Of a step of SimCLR's optimizer for ResNet-50."""
    f = resnet("resnet50")
    optimizer = simclr.LARS(list(f.parameters()), .1)
    for p in f.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with Operators() as seen:
        optimizer.step()
    return seen.launches()


def test_a_step_of_lars_has_at_most_60_launches():
    assert launches_of_lars() <= 60


# What surrounds the step

def test_bf16_is_the_default_only_where_the_hardware_has_it(monkeypatch):
    """V100 and T4 emulate bf16, slowly: `is_bf16_supported()` alone counts them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native)
        assert train.has_bf16() == train.has_bf16("cuda") == native


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: .* expected cpu"):
        ddp.init("cuda")
    assert ddp.init("cpu") == ddp.init() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="more processes than GPUs: expected --nproc_per_node=4"):
        ddp.init()


def end_of_epochs(folder, n=40):
    """Seconds per epoch of n epochs of one empty step, without evaluation."""
    module = torch.nn.Linear(9, 9)
    network = resnet("resnet10")
    optimizer = torch.optim.SGD(module.parameters(), .1)
    run = Run({"f": network, "optimizer": optimizer}, out=folder,
              settings={"script": "test", "batch_size": 1}, total_steps=n + 1, steps_per_epoch=1,
              device=CPU, evaluate=dict, eval_every=10 * n, eval_first=False, max_steps=n)
    began = time.time()
    for _ in run.steps((step,) for step in range(n)):
        run.log(torch.zeros(()), lr=.1)
    return (time.time() - began) / n


def test_the_end_of_an_epoch_is_cheap(tmp_path):
    """Curves are drawn after evaluations; saving takes at most 5 % of the time."""
    assert end_of_epochs(tmp_path) < .05
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 40 and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("script, flags", [
    (moco_v2, ["--bn-group", "4", "--K", "16"]), (simclr, ["--chunk", "2"])])
def test_compiled_scripts_train(script, flags, small, tmp_path, monkeypatch):
    """Without a recompilation for every chunk, which would end in eager mode."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    script.main([str(a) for a in (small, "--arch", "resnet10", "--batch-size", 8, *flags,
                                  "--epochs", 1, "--max-steps", 3, "--compile", "--precision",
                                  "fp32", "--out", tmp_path / "run")])
    assert 0 < counters["stats"]["unique_graphs"] < 8 and not counters["graph_break"]
