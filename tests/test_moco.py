"""The step against a literal transcription of the released algorithm; then its parts one by one."""

import argparse
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, spawn

import instdisc
import linear_probe
import moco_v2
import simclr
from common import UserError, ddp, run, train
from common.layers import GroupBatchNorm2d, SmallConv2d
from common.model import Encoder, head, resnet

CPU = torch.device("cpu")


def settings(**other):
    defaults = dict(moco_v2.SCALES["textures"], seed=0, K=24, dim=16, bn_group=4, lr=.03,
                    m=.97, temperature=.13)
    return SimpleNamespace(**{**defaults, **other})


def in_double(s):
    """What `build` returns, in float64."""
    moco, optimizer = moco_v2.build(s, CPU)
    return moco.double(), optimizer


def images(step, n=16):
    g = torch.Generator().manual_seed(100 + step)
    x1, x2 = torch.randn(2, n, 3, 32, 32, dtype=torch.float64, generator=g)
    return x1, x2, torch.randperm(n, generator=g)


class Released:
    """MoCo's pseudocode in the released order, with a loop over n GPUs that each hold a group.

    Batch norm is PyTorch's own, on one group at a time. The momentum update comes before the keys.
    The queue has a pointer.
    """

    def __init__(self, encoder_q, queue, group, lr, weight_decay, m, temperature):
        self.q = self.plain(encoder_q)
        self.k = copy.deepcopy(self.q)
        self.queue, self.pointer, self.group = queue.clone().T, 0, group    # (D, K), as released
        self.m, self.t, self.lr, self.wd, self.velocity = m, temperature, lr, weight_decay, {}

    @staticmethod
    def plain(encoder):
        encoder = copy.deepcopy(encoder)
        for module in encoder.modules():
            if isinstance(module, GroupBatchNorm2d):
                module.group = None
        return encoder

    def step(self, x1, x2, permutation):
        n = len(x1)
        groups = [slice(start, start + self.group) for start in range(0, n, self.group)]
        q = torch.cat([F.normalize(self.q(x1[group]), dim=1) for group in groups])
        with torch.no_grad():
            for p_k, p_q in zip(self.k.parameters(), self.q.parameters()):
                p_k.copy_(p_k * self.m + p_q * (1 - self.m))
            keys = [None] * n
            for group in groups:
                members = permutation[group].tolist()
                for image, key in zip(members, F.normalize(self.k(x2[members]), dim=1)):
                    keys[image] = key
            k = torch.stack(keys)
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone())
        logits = torch.cat([l_pos, l_neg], 1) / self.t
        loss = F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))
        self.q.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in self.q.parameters()]
        with torch.no_grad():
            for i, p in enumerate(self.q.parameters()):         # SGD, momentum .9, decay on all
                d = p.grad + self.wd * p
                self.velocity[i] = self.velocity[i] * .9 + d if i in self.velocity else d
                p -= self.lr * self.velocity[i]
        for key in k:
            self.queue[:, self.pointer] = key
            self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss.detach(), gradients, k


def test_five_steps_equal_the_released_algorithm():
    """Loss, gradients, keys, queue and momentum encoder to 1e-9.

    With shuffled groups, a queue that wraps, and weight decay.
    """
    s = settings()
    moco, optimizer = in_double(s)
    released = Released(moco.encoder_q, moco.queue, s.bn_group, s.lr, s.weight_decay, s.m,
                        s.temperature)
    seen = {}

    def embed_k(x):
        seen["k"] = moco.encoder_k(x)
        return seen["k"]
    moco.embed_k = embed_k
    for step in range(5):
        x1, x2, permutation = images(step)
        expected, gradients, keys = released.step(x1, x2, permutation)
        # Both momentum encoders as they compute the keys of this step.
        for p, r in zip(moco.encoder_k.parameters(), released.k.parameters(), strict=True):
            assert close(p, r, 1e-9)
        loss = moco_v2.train_step(moco, optimizer, x1, moco_v2.shuffle(x2, permutation),
                                  permutation, step)
        assert abs(loss - expected) < 1e-9
        for p, r in zip(moco.encoder_q.parameters(), gradients, strict=True):
            assert close(p.grad, r, 1e-9)
        assert close(F.normalize(seen["k"], dim=1)[permutation.argsort()], keys, 1e-9)
        assert close(moco.queue, released.queue.T, 1e-9)
        assert not torch.equal(moco.queue[0], moco.queue[1])


def test_shuffling_works_in_one_process():
    moco, _ = in_double(settings())
    _, x2, permutation = images(0)

    def keys(permutation):
        return moco.encode_keys(moco_v2.shuffle(x2, permutation), permutation)
    in_order, shuffled = keys(torch.arange(16)), keys(permutation)
    assert .01 < (shuffled - in_order).abs().max()              # other groups, other statistics
    within = torch.cat([torch.randperm(4) + 4 * i for i in range(4)])
    torch.testing.assert_close(keys(within), in_order)          # same groups


@pytest.mark.parametrize("K, batch", [(10, 4), (12, 4), (3, 4), (4, 4), (9, 4)])
def test_queue_is_first_in_first_out(K, batch):
    """Whether or not K is a multiple of the batch, or smaller than it."""
    moco, seen = moco_v2.MoCo(torch.nn.Identity(), K, 2, .99, .2), []
    moco.queue.fill_(-1.)
    for step in range(7):
        keys = torch.arange(step * batch, (step + 1) * batch).float()[:, None].expand(-1, 2)
        seen += keys[:, 0].tolist()
        moco.enqueue(keys, step)
        assert sorted(v for v in moco.queue[:, 0].tolist() if v >= 0) == seen[-K:]


def test_momentum_zero_copies_and_leaves_equal_parameters_equal():
    moco, _ = moco_v2.build(settings(m=.999), CPU)

    def equal():
        pairs = zip(moco.encoder_k.parameters(), moco.encoder_q.parameters(), strict=True)
        return all(torch.equal(k, q) for k, q in pairs)
    for _ in range(50):
        moco.momentum_update()                      # m x + (1 - m) x would not be exactly x
    assert equal()
    with torch.no_grad():
        before = [p.clone() for p in moco.encoder_k.parameters()]
        for p in moco.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    moco.m = .75
    moco.momentum_update()
    parameters = moco.encoder_k.parameters(), moco.encoder_q.parameters()
    for b, k, q in zip(before, *parameters, strict=True):
        torch.testing.assert_close(k, .75 * b + .25 * q, rtol=1e-5, atol=1e-6)
    assert not equal()
    moco.m = 1.
    moco.momentum_update()
    moco.m = 0.
    moco.momentum_update()
    assert equal()


def test_the_momentum_encoder_starts_as_a_copy_and_keeps_its_own_batch_statistics():
    moco, optimizer = in_double(settings(m=0.))
    q, k = moco.encoder_q, moco.encoder_k
    for a, b in zip(q.state_dict().values(), k.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moco_v2.train_step(moco, optimizer, *images(0), 0)
    assert torch.equal(q.f.conv1.weight, k.f.conv1.weight)
    assert not torch.equal(q.f.bn1.running_mean, k.f.bn1.running_mean)


def test_only_the_query_encoder_gets_gradients():
    moco, optimizer = in_double(settings())
    moco_v2.train_step(moco, optimizer, *images(0), 0)
    assert all(p.grad is not None for p in moco.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in moco.encoder_k.parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in moco.encoder_q.parameters()}
    assert not moco.queue.requires_grad


def test_a_fixed_head_stays_bit_identical():
    moco, optimizer = in_double(settings(head="fixed", m=.5))
    encoders = moco.encoder_q, moco.encoder_k
    before = [encoder.g[0].weight.clone() for encoder in encoders]
    last = moco.encoder_q.g[2].weight.clone()
    bound = 1 / math.sqrt(512)
    assert before[0].abs().max() <= bound
    assert before[0].std() == pytest.approx(bound / math.sqrt(3), rel=.01)
    for step in range(3):
        moco_v2.train_step(moco, optimizer, *images(step), step)
    assert all(torch.equal(e.g[0].weight, b) for e, b in zip(encoders, before))
    assert not torch.equal(moco.encoder_q.g[2].weight, last)


@pytest.mark.parametrize("kind, widths, trained", [
    ("none", [(2048, 128)], [True]),
    ("mlp", [(2048, 2048), (2048, 128)], [True, True]),
    ("fixed", [(2048, 2048), (2048, 128)], [False, True]),
    ("deep", [(2048, 2048), (2048, 2048), (2048, 128)], [True, True, True]),
    ("narrow", [(2048, 128), (128, 128)], [True, True]),
    ("identity", [], [])])
def test_heads_are_the_rows_of_table_1(kind, widths, trained):
    g = head(kind, 2048)
    layers = [m for m in g.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == widths
    assert [m.weight.requires_grad for m in layers] == trained
    assert [m.bias.requires_grad for m in layers] == trained
    relus = [m for m in g.modules() if isinstance(m, torch.nn.ReLU)]
    assert len(relus) == max(0, len(widths) - 1)


def test_running_statistics_move_once_by_the_mean_over_groups():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64) + 1
    grouped = GroupBatchNorm2d(5, group=4).double()
    out = grouped(x)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        mean = x[rows].mean((0, 2, 3), keepdim=True)
        variance = x[rows].var((0, 2, 3), False, keepdim=True)
        torch.testing.assert_close(out[rows], (x[rows] - mean) / (variance + 1e-5).sqrt())
    groups = x.view(3, 4, 5, 3, 3).transpose(1, 2).flatten(2)   # (3, 5, 36)
    torch.testing.assert_close(grouped.running_mean, .1 * groups.mean(2).mean(0))
    torch.testing.assert_close(grouped.running_var, .9 + .1 * groups.var(2).mean(0))


@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 1), (7, 3)])
def test_a_convolution_to_few_pixels_is_a_matrix_product(kernel, padding, monkeypatch):
    """Values and all gradients, in float64, for images from 1 to 5 pixels."""
    for stride in (1, 2):
        for height, width in ((1, 1), (1, 2), (2, 2), (3, 1), (4, 3), (5, 5)):
            torch.manual_seed(0)
            plain = torch.nn.Conv2d(3, 4, kernel, stride, padding).double()
            small = copy.deepcopy(plain)
            small.__class__ = SmallConv2d
            x = torch.randn(2, 3, height, width, dtype=torch.float64)
            found = []
            for layer in (plain, small):
                inputs = x.clone().requires_grad_()
                out = layer(inputs)
                found.append([out, *torch.autograd.grad(out.square().sum(),
                                                        [inputs, *layer.parameters()])])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    monkeypatch.delattr(torch.nn.Conv2d, "forward")             # small images do not need it
    for size in (1, 2):
        assert small(x[:, :, :2 * size - 1, :2 * size - 1]).shape == (2, 4, size, size)
    assert small(x[:0, :, :3, :3]).shape == (0, 4, 2, 2)


def three_steps(folder):
    """Three steps with a trained and a fixed head, and with hard negatives.

    Every process saves what it sees.
    """
    seen, mine, ranks = {}, ddp.rows(16), None
    F_hard = moco_v2.rank_distribution("hard", 24, 4., .25)
    for kind in ("mlp", "fixed", "hard"):
        moco, optimizer = in_double(settings(head="fixed" if kind == "fixed" else "mlp"))
        moco.embed_q = ddp.wrap(moco.encoder_q)
        for step in range(3):
            x1, x2, permutation = images(step)
            if kind == "hard":
                ranks = moco_v2.draw_ranks(F_hard, 16, 0, step)
            x2 = moco_v2.shuffle(x2[mine], permutation)
            loss = moco_v2.train_step(moco, optimizer, x1[mine], x2, permutation, step, ranks)
        ddp.average_buffers(moco.encoder_q)
        seen[kind] = {
            "grad": [p.grad for p in moco.encoder_q.parameters() if p.requires_grad],
            "encoder_k": list(moco.encoder_k.parameters()), "queue": moco.queue,
            "loss": ddp.mean(loss), "buffers": list(moco.encoder_q.buffers())}
    torch.save(seen, folder / f"{ddp.world()}-{ddp.rank()}.pt")


def test_two_processes_compute_what_one_computes(tmp_path):
    """Gradients, momentum encoder, loss, statistics, and the queue, which ends with the keys."""
    three_steps(tmp_path)
    spawn(three_steps, tmp_path)
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for kind, expected in one.items():
        for two in (a[kind], b[kind]):
            assert abs(two["loss"] - expected["loss"]) < 1e-10
            for name in ("grad", "encoder_k"):
                for x, y in zip(two[name], expected[name], strict=True):
                    assert close(x, y, 1e-10), (kind, name)
            assert close(two["queue"], expected["queue"], 1e-10)
            for x, y in zip(two["buffers"], expected["buffers"], strict=True):
                assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def test_learning_rate_is_constant_within_an_epoch_as_released():
    def at(step, schedule, warmup=0):
        return train.learning_rate(step, lr=.03, schedule=schedule, warmup=warmup, epochs=200,
                                   steps_per_epoch=10)
    for epoch in (0, 1, 57, 119, 120, 159, 160, 199):
        cosine = .03 * .5 * (1 + math.cos(math.pi * epoch / 200))
        steps = .03 * (.1 if epoch >= 120 else 1) * (.1 if epoch >= 160 else 1)
        for i in (0, 9):
            assert at(10 * epoch + i, "cosine") == pytest.approx(cosine, rel=1e-12)
            assert at(10 * epoch + i, "steps") == pytest.approx(steps, rel=1e-12)
    warm = [at(i, "steps", 3) for i in range(5)]
    assert warm == pytest.approx([.0075, .015, .0225, .03, .03])


def resolved(*argv, scale="imagenet"):
    argv = [str(a) for a in argv]
    return train.settings(moco_v2.flags(), argv, scale, moco_v2.SCALES, moco_v2.PRESETS)


def test_presets_change_what_the_papers_rows_change():
    long, v1 = {"epochs": 200}, dict(stack="moco_v1", head="none", temperature=.07, blur=False)
    rows = {"table1": {}, "table1a": {"head": "none"}, "table1b": {"head": "fixed"},
            "table1c": {"head": "deep"}, "table1d": {"head": "narrow"},
            "table2a-baseline": {}, "table2a-medium": {"crop": (.2, .5)},
            "table2a-extreme": {"crop": (.02, .1)},
            "table2b-eighth": {"jitter": .125}, "table2b-quarter": {"jitter": .25},
            "table2b-half": {}, "table2b-full": {"jitter": 1.},
            "table3": long, "table3a": {"head": "none", **long},
            "table3b": {"blur": False, **long}, "table3c": {"schedule": "steps", **long},
            "table3d": {"m": .5, **long}, "section7": {"m": 0., **long},
            "moco-v1": {**v1, "schedule": "steps", **long},
            "fair-cifar10": dict(head="none", crop=(.08, 1.), batch_size=512, bn_group=64, lr=.06)}
    assert rows.keys() == moco_v2.PRESETS.keys()
    plain = vars(resolved())
    for name, expected in rows.items():
        row = vars(resolved("--preset", name))
        assert {key: row[key] for key in row if row[key] != plain[key]
                and key not in ("preset", "out")} == expected, name


@pytest.mark.parametrize("module, scale, expected", [
    (moco_v2, "imagenet", dict(
        arch="resnet50", size=224, epochs=100, batch_size=256, lr=.03, weight_decay=1e-4, K=65536,
        m=.999, temperature=.2, head="mlp", dim=128, crop=(.2, 1.), jitter=.5, blur=True,
        schedule="cosine", bn_group=32, warmup=0, negatives="queue", stack="moco_v2")),
    (moco_v2, "cifar10", dict(
        arch="resnet18-3x3", size=32, epochs=200, batch_size=256, lr=.03, weight_decay=5e-4, K=4096,
        m=.99, temperature=.1, blur=False)),
    (simclr, "imagenet", dict(
        arch="resnet50", size=224, epochs=100, batch_size=4096, lr=4.8, weight_decay=1e-4,
        temperature=.1, layers=2, dim=128, crop=(.08, 1.), jitter=1., blur=True, scaling="sqrt",
        warmup_epochs=10, stack="simclr", normalisation="unit")),
    (simclr, "cifar10", dict(
        arch="resnet18-3x3", size=32, epochs=200, batch_size=512, lr=2., temperature=.5, jitter=.5,
        blur=False)),
    (instdisc, "imagenet", dict(
        arch="resnet50", size=224, epochs=100, batch_size=256, lr=.03, weight_decay=1e-4,
        temperature=.07, K=4096, bank_momentum=.5, proximal=0., loss="nce", schedule="steps",
        crop=(.2, 1.), head="none", dim=128, stack="moco_v1")),
    (instdisc, "cifar10", dict(
        arch="resnet18-3x3", size=32, epochs=200, batch_size=128, lr=.03, weight_decay=5e-4,
        temperature=.1, stack="instdisc_cifar10"))])
def test_scales_are_the_released_settings(module, scale, expected):
    found = vars(train.settings(module.flags(), [], scale, module.SCALES, module.PRESETS))
    assert {name: found[name] for name in expected} == expected


def test_the_stem_for_small_images_keeps_their_size():
    f, x = resnet("resnet10-3x3").eval(), torch.randn(1, 3, 32, 32)
    x = f.maxpool(f.conv1(x))
    assert x.shape == (1, 64, 32, 32)
    assert f.layer4(f.layer3(f.layer2(f.layer1(x)))).shape == (1, 512, 4, 4)


def test_lengths_and_folders_of_presets():
    s = resolved("--preset", "table3", "--K", 512)
    assert (s.epochs, s.K, s.head, s.m) == (200, 512, "mlp", .999)
    assert s.out == "runs/moco_v2-imagenet-table3-K=512"
    assert resolved("--preset", "table3", scale="cifar10").epochs == 200
    assert resolved("--preset", "table3", scale="textures").epochs == 12
    assert resolved("--preset", "table1").epochs == 100
    s = resolved("--preset", "moco-v1")
    assert (s.stack, s.head, s.temperature, s.schedule) == ("moco_v1", "none", .07, "steps")
    assert s.epochs == 200
    s = resolved("--preset", "fair-cifar10", scale="cifar10")   # exactly FAIR's CIFAR-10 demo
    assert (s.arch, s.batch_size, s.lr, s.weight_decay) == ("resnet18-3x3", 512, .06, 5e-4)
    assert (s.K, s.m, s.temperature, s.crop, s.blur) == (4096, .99, .1, (.08, 1.), False)
    assert (s.head, s.epochs, s.batch_size // s.bn_group) == ("none", 200, 8)


@pytest.mark.parametrize("module", [moco_v2, simclr, instdisc, linear_probe])
def test_every_option_of_a_preset_is_a_setting(module):
    known = {**module.SCALES["imagenet"], **getattr(module, "SUPERVISED", {}).get("imagenet", {})}
    for name, row in module.PRESETS.items():
        assert set(row) - {"long"} <= set(known), name


def test_flags_override_presets_which_override_scales():
    plain = resolved(scale="textures")
    assert (plain.preset, plain.head, plain.K, plain.m) == ("table1", "mlp", 1024, .99)
    assert (plain.epochs, plain.blur, plain.scale) == (12, False, "textures")
    assert resolved("--preset", "table3d", scale="textures").m == .5
    assert resolved("--preset", "table3d", "--m", ".25", scale="textures").m == .25
    # A flag wins also if its value is that of the scale.
    assert resolved("--preset", "table3d", "--m", ".99", scale="textures").m == .99
    long = resolved("--preset", "table3", "--epochs", 5)
    assert long.epochs == 5
    assert not resolved("--preset", "table3b").blur
    assert resolved("--preset", "table3b", "--blur").blur
    assert resolved("--crop", ".5", ".75").crop == [.5, .75]
    assert resolved("--jitter", 1).jitter == 1
    assert not {"base_lr", "long", "long_epochs"} & set(vars(long))


def test_the_learning_rate_follows_from_the_batch_size_by_the_scales_rule():
    assert resolved().lr == pytest.approx(.03)
    assert resolved("--batch-size", 64).lr == pytest.approx(.0075)
    assert resolved("--batch-size", 1024).lr == pytest.approx(.12)
    assert resolved("--batch-size", 64, "--lr", .1).lr == .1
    scales = {"imagenet": dict(moco_v2.SCALES["imagenet"], scaling="sqrt")}

    def with_square_root(*argv):
        return train.settings(moco_v2.flags(), argv, "imagenet", scales, moco_v2.PRESETS).lr
    assert with_square_root() == pytest.approx(.03)
    assert with_square_root("--batch-size", "64") == pytest.approx(.015)
    assert with_square_root("--batch-size", "1024", "--preset", "table3") == pytest.approx(.06)


def test_the_folder_of_a_run_names_what_was_given_and_differs():
    assert resolved().out == "runs/moco_v2-imagenet-table1"
    assert resolved("--K", 65536, "--seed", 0).out == "runs/moco_v2-imagenet-table1"
    given = resolved("--seed", 1, "--preset", "table3a", "--K", 512, "--workers", 3, "--fresh",
                     scale="cifar10")
    assert given.out == "runs/moco_v2-cifar10-table3a-seed=1-K=512"
    assert resolved("--crop", ".2", ".5").out == "runs/moco_v2-imagenet-table1-crop=0.2,0.5"
    assert resolved("--K", 512, "--out", "there").out == "there"


def test_only_settings_identify_a_run(capsys):
    """Where data and results are, and how it is run, do not. Resolving prints nothing."""
    def differences(a, b):
        there, here = (train.run_options(args, 10, CPU)["settings"] for args in (a, b))
        return run.differences(there, here)
    plain = resolved("images", "--out", "a")
    moved = resolved("elsewhere", "--out", "b", "--workers", 7, "--compile", "--fresh",
                     "--no-graphs", "--device", "cpu",
                     "--max-steps", 3, "--save-minutes", 1)
    assert differences(plain, moved) == ""
    other = resolved("images", "--out", "a", "--seed", 1, "--m", ".5")
    assert differences(plain, other) == "m was 0.999, is now 0.5; seed was 0, is now 1"
    assert capsys.readouterr() == ("", "")


def assert_flag_takes(action, value, where):
    """`value`, from a table, passes the checks of its flag."""
    if isinstance(action, argparse.BooleanOptionalAction):
        assert isinstance(value, bool), where
    else:
        assert action.type is None or action.type(str(value)) == value, where
    assert action.choices is None or value in action.choices, where


@pytest.mark.parametrize("module", [moco_v2, simclr, instdisc, linear_probe])
def test_every_value_of_a_table_passes_the_checks_of_its_flag(module):
    """argparse does not check defaults."""
    flags = {action.dest: action for action in module.flags()._actions}
    checked = 0
    for table in (module.SCALES, module.PRESETS, getattr(module, "SUPERVISED", {})):
        for row, values in table.items():
            for name in flags.keys() & values.keys():
                value, where = values[name], (row, name)
                several = value if isinstance(value, tuple) else (value,)
                assert flags[name].nargs in (len(several), 0, None), where
                for v in several:
                    assert_flag_takes(flags[name], v, where)
                checked += 1
    assert checked > 5


def test_gradient_through_gather_is_that_of_one_process(tmp_path):
    spawn(gathered_loss, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2                   # no process failed


def gathered_loss(folder):
    """The loss of every process sees all rows; a gather without gradient would give another one."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected, = torch.autograd.grad(((x @ x.T) ** 3).mean(), x)
    mine = x.detach()[ddp.rows(6)].requires_grad_()
    gathered = ddp.all_gather_with_grad(mine)
    ((mine @ gathered.T) ** 3).mean().backward()
    assert close(mine.grad / ddp.world(), expected[ddp.rows(6)], 1e-12)
    assert torch.equal(ddp.all_gather(mine), x)
    (folder / str(ddp.rank())).touch()


def test_features_are_what_their_names_say():
    encoder = Encoder(resnet("resnet10"), head("deep", 512)).eval()
    x = torch.randn(2, 3, 32, 32)
    h, hidden, z = (encoder.embed(x, name) for name in ("h", "hidden", "z"))
    assert torch.equal(z, encoder(x)) and torch.equal(h, encoder.f(x))
    assert torch.equal(hidden, F.relu(F.linear(h, encoder.g[0].weight, encoder.g[0].bias)))
    assert [encoder.width(name) for name in ("h", "hidden", "z")] == [512, 512, 128]
    with pytest.raises(UserError, match="--feature hidden: .* has no hidden layer"):
        Encoder(resnet("resnet10"), head("none", 512)).eval().embed(x, "hidden")
