"""The step against a separately written transcription of the released algorithm; the mechanisms one by one."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, spawn

import moco_v2
from common import ddp, train
from common.model import Encoder, GroupBatchNorm2d, head, resnet


def settings(**other):
    return SimpleNamespace(**{**moco_v2.SCALES["textures"], "seed": 0, "K": 24, "dim": 16, "bn_group": 4, **other})


def in_double(s):
    """What `build` makes, in float64."""
    encoder_q, encoder_k, queue, optimizer = moco_v2.build(s, torch.device("cpu"))
    return encoder_q.double(), encoder_k.double(), queue.double(), optimizer


def images(step, n=16):
    g = torch.Generator().manual_seed(100 + step)
    x1, x2 = torch.randn(2, n, 3, 32, 32, dtype=torch.float64, generator=g)
    return x1, x2, torch.randperm(n, generator=g)


class Released:
    """MoCo's pseudocode and released order, written as n GPUs that each hold a group of images, with a loop for each.

    Its batch norm is PyTorch's own, on a group at a time; its momentum update comes before the keys, and its queue has
    a pointer.
    """

    def __init__(self, encoder_q, queue, group, lr, weight_decay, m, temperature):
        self.q = self.plain(encoder_q)
        self.k = copy.deepcopy(self.q)
        self.queue, self.pointer, self.group = queue.clone().T, 0, group                # (D, K), as released
        self.m, self.t, self.lr, self.wd, self.velocity = m, temperature, lr, weight_decay, {}

    @staticmethod
    def plain(encoder):
        encoder = copy.deepcopy(encoder)
        for module in encoder.modules():
            if isinstance(module, GroupBatchNorm2d):
                module.group = None
        return encoder

    def step(self, x1, x2, permutation):
        n, gpus = len(x1), len(x1) // self.group
        q = torch.cat([F.normalize(self.q(x1[g * self.group:(g + 1) * self.group]), dim=1) for g in range(gpus)])
        with torch.no_grad():
            for p_k, p_q in zip(self.k.parameters(), self.q.parameters()):
                p_k.copy_(p_k * self.m + p_q * (1 - self.m))
            keys = [None] * n
            for g in range(gpus):
                members = permutation[g * self.group:(g + 1) * self.group].tolist()
                for image, key in zip(members, F.normalize(self.k(x2[members]), dim=1)):
                    keys[image] = key
            k = torch.stack(keys)
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone())
        loss = F.cross_entropy(torch.cat([l_pos, l_neg], 1) / self.t, torch.zeros(n, dtype=torch.long))
        self.q.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in self.q.parameters()]
        with torch.no_grad():
            for i, p in enumerate(self.q.parameters()):         # SGD, momentum .9, decay on everything
                d = p.grad + self.wd * p
                self.velocity[i] = self.velocity[i] * .9 + d if i in self.velocity else d
                p -= self.lr * self.velocity[i]
        for key in k:
            self.queue[:, self.pointer] = key
            self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss.detach(), gradients, k


def test_five_steps_equal_the_released_algorithm():
    """Loss, gradients, keys, queue and key encoder to 1e-9, with shuffled groups, a queue that wraps, and decay."""
    s = settings()
    encoder_q, encoder_k, queue, optimizer = in_double(s)
    released = Released(encoder_q, queue, s.bn_group, s.lr, s.weight_decay, s.m, s.temperature)
    for step in range(5):
        x1, x2, permutation = images(step)
        expected, gradients, keys = released.step(x1, x2, permutation)
        for p, r in zip(encoder_k.parameters(), released.k.parameters()):       # both as they make this step's keys
            assert close(p, r, 1e-9)
        seen = {}
        loss = moco_v2.train_step(encoder_q, encoder_k, encoder_q, lambda x: seen.setdefault("k", encoder_k(x)), queue,
                                  optimizer, x1, x2, permutation, step, s.m, s.temperature)
        assert abs(loss - expected) < 1e-9
        for p, r in zip(encoder_q.parameters(), gradients):
            assert close(p.grad, r, 1e-9)
        assert close(F.normalize(seen["k"], dim=1)[permutation.argsort()], keys, 1e-9)
        assert close(queue, released.queue.T, 1e-9)
        assert not torch.equal(queue[0], queue[1])


def test_shuffling_does_its_work_in_one_process():
    s = settings()
    _, encoder_k, _, _ = in_double(s)
    _, x2, permutation = images(0)
    in_order = moco_v2.encode_keys(encoder_k, x2, torch.arange(16))
    shuffled = moco_v2.encode_keys(encoder_k, x2, permutation)
    assert .01 < (shuffled - in_order).abs().max()              # other neighbours, other statistics ...
    within = torch.cat([torch.randperm(4) + 4 * i for i in range(4)])
    torch.testing.assert_close(moco_v2.encode_keys(encoder_k, x2, within), in_order)    # ... the same, the same keys


@pytest.mark.parametrize("K, batch", [(10, 4), (12, 4), (3, 4), (4, 4), (9, 4)])
def test_queue_is_first_in_first_out(K, batch):
    """Whether or not K is a multiple of the batch, or smaller than it."""
    queue, seen = torch.full((K, 2), -1.), []
    for step in range(7):
        keys = torch.arange(step * batch, (step + 1) * batch).float()[:, None].expand(-1, 2)
        seen += keys[:, 0].tolist()
        moco_v2.enqueue(queue, keys, step)
        assert sorted(v for v in queue[:, 0].tolist() if v >= 0) == seen[-K:]


def test_momentum_zero_copies_and_leaves_equal_parameters_equal():
    encoder_q, encoder_k, _, _ = moco_v2.build(settings(), torch.device("cpu"))
    for _ in range(50):
        moco_v2.momentum_update(encoder_q, encoder_k, .999)     # m x + (1 - m) x is not x; this is
    assert all(torch.equal(p, q) for p, q in zip(encoder_k.parameters(), encoder_q.parameters()))
    with torch.no_grad():
        before = [p.clone() for p in encoder_k.parameters()]
        for p in encoder_q.parameters():
            p.add_(torch.randn_like(p))
    moco_v2.momentum_update(encoder_q, encoder_k, .75)
    for b, p, q in zip(before, encoder_k.parameters(), encoder_q.parameters()):
        torch.testing.assert_close(p, .75 * b + .25 * q, rtol=1e-5, atol=1e-6)
    moco_v2.momentum_update(encoder_q, encoder_k, 1.)
    moco_v2.momentum_update(encoder_q, encoder_k, 0.)
    assert all(torch.equal(p, q) for p, q in zip(encoder_k.parameters(), encoder_q.parameters()))


def test_the_key_encoder_starts_as_a_copy_and_keeps_its_own_batch_statistics():
    s = settings()
    encoder_q, encoder_k, queue, optimizer = in_double(s)
    assert all(torch.equal(a, b) for a, b in zip(encoder_q.state_dict().values(), encoder_k.state_dict().values()))
    x1, x2, permutation = images(0)
    moco_v2.train_step(encoder_q, encoder_k, encoder_q, encoder_k, queue, optimizer, x1, x2, permutation, 0, 0., .2)
    assert torch.equal(encoder_q.f.conv1.weight, encoder_k.f.conv1.weight)
    assert not torch.equal(encoder_q.f.bn1.running_mean, encoder_k.f.bn1.running_mean)


def test_a_fixed_head_stays_as_it_was_to_the_bit():
    s = settings(head="fixed")
    encoder_q, encoder_k, queue, optimizer = in_double(s)
    before = [e.g[0].weight.clone() for e in (encoder_q, encoder_k)]
    last = encoder_q.g[2].weight.clone()
    bound = 1 / math.sqrt(512)
    assert before[0].abs().max() <= bound and before[0].std() == pytest.approx(bound / math.sqrt(3), rel=.01)
    for step in range(3):
        moco_v2.train_step(encoder_q, encoder_k, encoder_q, encoder_k, queue, optimizer, *images(step), step, .5, .2)
    assert all(torch.equal(e.g[0].weight, b) for e, b in zip((encoder_q, encoder_k), before))
    assert not torch.equal(encoder_q.g[2].weight, last)


def test_heads_are_table_1s_rows():
    for kind, widths in (("none", [(2048, 128)]), ("mlp", [(2048, 2048), (2048, 128)]),
                         ("fixed", [(2048, 2048), (2048, 128)]), ("deep", [(2048, 2048), (2048, 2048), (2048, 128)]),
                         ("narrow", [(2048, 128), (128, 128)]), ("identity", [])):
        g = head(kind, 2048)
        layers = [m for m in g.modules() if isinstance(m, torch.nn.Linear)]
        assert [(m.in_features, m.out_features) for m in layers] == widths, kind
        assert sum(isinstance(m, torch.nn.ReLU) for m in g.modules()) == max(0, len(widths) - 1), kind
        assert [m.weight.requires_grad for m in layers] == [kind != "fixed"] * (len(widths) > 1) + [True] * min(
            len(widths), max(1, len(widths) - 1)), kind


def test_running_statistics_move_once_by_the_mean_over_groups():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64) + 1
    grouped = GroupBatchNorm2d(5, group=4).double()
    out = grouped(x)
    for i in range(3):
        part = x[4 * i:4 * i + 4]
        expected = (part - part.mean((0, 2, 3), keepdim=True)) / (part.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(out[4 * i:4 * i + 4], expected)
    groups = x.view(3, 4, 5, 3, 3).transpose(1, 2).flatten(2)   # (3, 5, 36)
    torch.testing.assert_close(grouped.running_mean, .1 * groups.mean(2).mean(0))
    torch.testing.assert_close(grouped.running_var, .9 + .1 * groups.var(2).mean(0))


def two_processes(folder, head_kind):
    """Three steps; every process saves what it sees."""
    s = settings(head=head_kind)
    encoder_q, encoder_k, queue, optimizer = in_double(s)
    embed_q, mine = ddp.wrap(encoder_q), ddp.rows(16)
    for step in range(3):
        x1, x2, permutation = images(step)
        loss = moco_v2.train_step(encoder_q, encoder_k, embed_q, encoder_k, queue, optimizer, x1[mine], x2[mine],
                                  permutation, step, s.m, s.temperature)
    ddp.average_buffers(encoder_q)
    torch.save({"grad": [p.grad for p in encoder_q.parameters() if p.requires_grad], "queue": queue,
                "loss": ddp.mean(loss), "keys": list(encoder_k.parameters()), "buffers": list(encoder_q.buffers())},
               folder / f"{ddp.world()}-{ddp.rank()}.pt")


@pytest.mark.parametrize("kind", ["mlp", "fixed"])
def test_two_processes_compute_what_one_computes(tmp_path, kind):
    """Parameter gradients, key encoder, queue (its last rows are the keys), loss, running statistics; to 1e-10."""
    two_processes(tmp_path, kind)
    spawn(two_processes, tmp_path, kind)
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for two in (a, b):
        assert abs(two["loss"] - one["loss"]) < 1e-10
        for name in ("grad", "keys"):
            assert all(close(x, y, 1e-10) for x, y in zip(two[name], one[name])), name
        assert close(two["queue"], one["queue"], 1e-10)
        assert all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(two["buffers"], one["buffers"]))


def test_learning_rate_is_constant_within_an_epoch_as_released():
    def at(step, schedule, warmup=0):
        return train.learning_rate(step, lr=.03, schedule=schedule, warmup=warmup, epochs=200, steps_per_epoch=10)
    for epoch in (0, 1, 57, 119, 120, 159, 160, 199):
        cosine = .03 * .5 * (1 + math.cos(math.pi * epoch / 200))
        steps = .03 * (.1 if epoch >= 120 else 1) * (.1 if epoch >= 160 else 1)
        for i in (0, 9):
            assert at(10 * epoch + i, "cosine") == pytest.approx(cosine, rel=1e-12)
            assert at(10 * epoch + i, "steps") == pytest.approx(steps, rel=1e-12)
    assert [at(i, "steps", 3) for i in range(5)] == pytest.approx([.0075, .015, .0225, .03, .03])


def test_presets_are_the_papers_rows():
    rows = moco_v2.PRESETS
    assert len([name for name in rows if name.startswith("table1")]) == 5
    assert len([name for name in rows if name.startswith("table2a")]) == 3
    assert len([name for name in rows if name.startswith("table2b")]) == 4
    assert len([name for name in rows if name.startswith("table3")]) == 5

    def resolved(*argv, scale="imagenet"):
        return train.resolve("moco_v2", moco_v2.parse_args(list(argv)), moco_v2.SCALES, rows, scale, named=("K",))
    s, out = resolved("--preset", "table3", "--K", "512")
    assert (s.epochs, s.K, s.head, s.m, str(out)) == (200, 512, "mlp", .999, "runs/moco_v2-imagenet-table3-K512")
    assert resolved("--preset", "table3", scale="cifar10")[0].epochs == 200
    s, _ = resolved("--preset", "moco-v1")
    assert (s.stack, s.head, s.temperature, s.schedule, s.epochs) == ("moco_v1", "none", .07, "steps", 200)
    s, _ = resolved("--preset", "fair-cifar10", scale="cifar10")    # FAIR's CIFAR-10 demo, to the letter
    assert (s.arch, s.batch_size, s.lr, s.weight_decay, s.K, s.m, s.temperature, s.crop, s.blur, s.head, s.epochs,
            s.batch_size // s.bn_group) == ("resnet18-3x3", 512, .06, 5e-4, 4096, .99, .1, (.08, 1.), False, "none", 200, 8)
    s, _ = resolved("--batch-size", "64", "--jitter", "1")
    assert s.lr == pytest.approx(.0075) and s.jitter == 1
    assert resolved("--batch-size", "64", "--lr", ".1")[0].lr == .1


def test_every_option_of_a_preset_is_a_setting():
    known = set(moco_v2.SCALES["imagenet"])
    for name, row in moco_v2.PRESETS.items():
        assert set(row) - {"paper", "long"} <= known and "paper" in row, name


def test_gradient_through_gather_is_that_of_one_process(tmp_path):
    spawn(gathered_loss, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2                   # both got through


def gathered_loss(folder):
    """The loss of every process sees all rows; a gather without gradient would give another one."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected, = torch.autograd.grad(((x @ x.T) ** 3).mean(), x)
    mine = x.detach()[ddp.rows(6)].requires_grad_()
    everything = ddp.all_gather_with_grad(mine)
    ((mine @ everything.T) ** 3).mean().backward()
    assert close(mine.grad / ddp.world(), expected[ddp.rows(6)], 1e-12)
    assert torch.equal(ddp.all_gather(mine), x)
    (folder / str(ddp.rank())).touch()


def test_encoder_features_are_what_they_are_called():
    encoder = Encoder(resnet("resnet10"), head("deep", 512)).eval()
    x = torch.randn(2, 3, 32, 32)
    h, hidden, z = (encoder.embed(x, name) for name in ("h", "hidden", "z"))
    assert torch.equal(z, encoder(x)) and torch.equal(h, encoder.f(x))
    assert torch.equal(hidden, F.relu(F.linear(h, encoder.g[0].weight, encoder.g[0].bias)))
    with pytest.raises(SystemExit, match="no hidden layer"):
        Encoder(resnet("resnet10"), head("none", 512)).eval().embed(x, "hidden")
