"""SimCLR, InstDisc and hard negatives: losses against loops over their formulas; two processes."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, spawn
from scipy.stats import kstest, skewnorm
from torch import nn
from torchvision.models.resnet import BasicBlock

import instdisc
import moco_v2
import simclr
from common import UserError, augment, data, ddp, evaluate, train
from common.checkpoint import load_encoder
from common.loss import info_nce, unit
from common.model import Encoder
from reproduce import figure5

CPU = torch.device("cpu")


def agree(ours, loop, *inputs):
    """Values and gradients of two losses of the same inputs, to 1e-10."""
    results = []
    for loss in (ours, loop):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        results.append((value, torch.autograd.grad(value, leaves)))
    (a, da), (b, db) = results
    assert abs(a - b) < 1e-10
    assert all((x - y).abs().max() < 1e-10 for x, y in zip(da, db, strict=True))


def units(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return unit(torch.randn(*shape, dtype=torch.float64, generator=g))


def simclr_settings(**other):
    defaults = dict(simclr.SCALES["textures"], seed=0, lr=.5)
    return SimpleNamespace(**{**defaults, **other})


def instdisc_settings(**other):
    defaults = dict(instdisc.SCALES["textures"], seed=0, lr=.003)
    return SimpleNamespace(**{**defaults, **other})


# Losses

def test_nt_xent_is_its_formula():
    M, t = 5, .3

    def loop(z):
        total, one, two = 0, z[::2], z[1::2]                    # first and second views
        for first, second in ((one, two), (two, one)):          # the sum of both directions' means
            for i in range(M):
                positive = (first[i] @ second[i] / t).exp()
                others = sum((first[i] @ view[j] / t).exp()
                             for view in (first, second) for j in range(M) if j != i)
                total = total - (positive / (positive + others)).log() / M
        return total
    agree(lambda z: simclr.nt_xent(z, torch.arange(2 * M), t), loop, units(2 * M, 4))
    equal = torch.ones(2 * M, 1, dtype=torch.float64)
    found = simclr.nt_xent(equal, torch.arange(2 * M), t)
    assert found == pytest.approx(2 * math.log(1 + 2 * (M - 1)), abs=1e-12)


def test_the_losses_of_instdisc_are_their_formulas():
    N, n, K, t = 3, 11, 6, .2
    v, memory, index = units(N, 4), units(n, 4, seed=1), torch.tensor([4, 0, 9])
    draws = torch.randint(0, n, (N, K), generator=torch.Generator().manual_seed(2))
    draws[0, 1] = 4                     # its own slot: allowed in NCE, masked out in InfoNCE
    slots, Z = torch.cat([index[:, None], draws], 1), torch.tensor(17.3, dtype=torch.float64)

    def exp(v, i, j):
        return (v[i] @ memory[j] / t).exp()

    def loop_nce(v):
        total = 0
        for i in range(N):
            P = [exp(v, i, j) / Z for j in [index[i], *draws[i]]]
            h = [p / (p + K / n) for p in P]
            total = total - h[0].log() - sum((1 - x).log() for x in h[1:])
        return total / N

    def loop_infonce(v):
        total = 0
        for i in range(N):
            positive = exp(v, i, index[i])
            negatives = sum(exp(v, i, j) for j in draws[i] if j != index[i])
            total = total - (positive / (positive + negatives)).log()
        return total / N

    def loop_softmax(v):
        total = 0
        for i in range(N):
            total = total - (exp(v, i, index[i]) / sum(exp(v, i, j) for j in range(n))).log()
        return total / N
    for kind, loop in (("nce", loop_nce), ("infonce", loop_infonce), ("softmax", loop_softmax)):
        def ours(v):
            return instdisc.LOSSES[kind](v, memory, slots, t, Z.clone(), step=1)
        agree(ours, loop, v)


def test_similarities_are_those_of_the_slots_however_they_are_computed():
    """Few slots of a long bank are copied; otherwise the whole bank is multiplied."""
    for n, copied in ((40, True), (8, False)):
        v, memory, slots = units(3, 4), units(n, 4, seed=1), torch.randint(n, (3, 6))
        assert (6 * 4 < 2 * n) == copied

        def loop(v):
            return torch.stack([torch.stack([v[i] @ memory[j] for j in slots[i]])
                                for i in range(3)]).square().sum()
        agree(lambda v: instdisc.similarities(v, memory, slots).square().sum(), loop, v)


def test_equal_scores_give_the_closed_forms():
    """And the estimate of Z from them makes P = 1 / n."""
    K, n, Z = 4096, 50_000, torch.zeros((), dtype=torch.float64)
    v, memory = torch.full((2, 1), .7, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    slots = torch.cat([torch.tensor([[1], [2]]), torch.randint(10, n, (2, K))], 1)
    expected = math.log(K + 1) + K * math.log1p(1 / K)
    assert expected == pytest.approx(9.318, abs=1e-3)           # nearly ln(K + 1) + 1
    found = instdisc.nce_loss(v, memory, slots, 1., Z, step=0)
    assert found == pytest.approx(expected, abs=1e-9)
    assert Z == pytest.approx(n * math.exp(.7))
    found = instdisc.infonce_loss(v, memory, slots, 1., Z, step=0)
    assert found == pytest.approx(math.log(1 + K), abs=1e-9)
    instdisc.nce_loss(2 * v, memory, slots, 1., Z, step=1)
    assert Z == pytest.approx(n * math.exp(.7))                 # estimated once


def test_only_the_first_step_communicates_about_Z(monkeypatch):
    calls = []
    monkeypatch.setattr(ddp, "mean", lambda x: calls.append(x) or x)
    v, memory, slots = units(4, 3), units(9, 3), torch.randint(9, (4, 6))
    Z = torch.zeros((), dtype=torch.float64)
    for step in range(3):
        instdisc.nce_loss(v, memory, slots, .2, Z, step)
    assert len(calls) == 1 and Z > 0


def test_the_first_loss_is_that_of_the_released_bank():
    """The released code has 10.02 at K = 4096 and 8.14 at K = 512, with T = .07.

    Measured there with an untrained network; here v is random.
    """
    n = 20_000
    s = instdisc_settings(images=n, bn_group=None, lr=.1, weight_decay=0.)
    _, memory, _, _ = instdisc.build(s, CPU)
    assert memory.shape == (n, 128) and memory.norm(dim=1).mean() == pytest.approx(1, abs=.02)
    torch.manual_seed(0)
    v, index = unit(torch.randn(256, 128)), torch.arange(256)
    for K, expected in ((4096, 10.02), (512, 8.14)):
        draws = instdisc.draw_negatives(n, K, 256, 0, 0, CPU)
        slots = torch.cat([index[:, None], draws], 1)
        loss = instdisc.nce_loss(v, memory, slots, .07, torch.zeros(()), step=0)
        assert abs(loss - expected) < .35


def test_negatives_are_uniform_and_depend_only_on_seed_step_and_row(monkeypatch):
    draws = instdisc.draw_negatives(40, 3000, 8, 0, 7, CPU)
    share = torch.bincount(draws.flatten(), minlength=40) / draws.numel()
    assert (share - 1 / 40).abs().max() < .003
    assert not torch.equal(draws[0], draws[1])
    assert draws.min() == 0 and draws.max() == 39
    monkeypatch.setattr(ddp, "rows", lambda n: slice(2, 5))     # as in another process
    assert torch.equal(draws[2:5], instdisc.draw_negatives(40, 3000, 8, 0, 7, CPU))


def test_the_bank_moves_by_its_momentum():
    memory, v, index = units(6, 3), units(2, 3, seed=5), torch.tensor([4, 1])
    before = memory.clone()
    instdisc.update_bank(memory, index, v, .25)
    for row, i in enumerate(index):
        expected = F.normalize(.25 * before[i] + .75 * v[row], dim=0)
        assert torch.allclose(memory[i], expected, atol=1e-14)
    assert torch.equal(memory[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


# Processes

def views(step, n=16):
    g = torch.Generator().manual_seed(step)
    return torch.randn(2, n, 3, 32, 32, dtype=torch.float64, generator=g)


def steps_of_instdisc():
    """Two steps in float64: the encoder, its last loss, bank and Z."""
    s, mine = instdisc_settings(images=30, bn_group=4, dim=8), ddp.rows(16)
    encoder, memory, Z, optimizer = instdisc.build(s, CPU)
    memory, Z, embed = memory.double(), Z.double(), ddp.wrap(encoder.double())
    for step in range(2):
        index = torch.from_numpy(augment.generator("test", step).permutation(30)[:16].copy())[mine]
        draws = instdisc.draw_negatives(30, 12, 16, 0, step, CPU)
        loss = instdisc.train_step(embed, memory, Z, optimizer, views(step)[0, mine], index, draws,
                                   step, instdisc.LOSSES["nce"], .2, .5, .1)
    return encoder, loss, {"memory": memory, "Z": Z}


def steps_of_simclr(chunk):
    """Two steps in float64: the encoder and its last loss."""
    mine = ddp.rows(16)
    encoder, _ = simclr.build(simclr_settings(dim=8), CPU)
    for parameter in encoder.f.parameters():    # not 0, as built, so that every gradient counts
        if parameter.ndim == 1:
            nn.init.normal_(parameter, .1, .1)
    embed = ddp.wrap(encoder.double())
    no_sync = embed.no_sync if ddp.world() > 1 else contextlib.nullcontext
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], .1)
    for step in range(2):
        x = views(step)[:, mine]

        def part_of_x(part):
            return list(x[:, part])
        if chunk:
            loss = simclr.chunked_step(encoder, embed, no_sync, optimizer, part_of_x, x.shape[1],
                                       4, .2)
        else:
            loss = simclr.train_step(embed, optimizer, *x, .2)
    return encoder, loss, {}


def save_steps(folder):
    """Every process saves what it sees after two steps of each method."""
    seen = {}
    for kind, (encoder, loss, extra) in (("simclr", steps_of_simclr(chunk=False)),
                                         ("chunk", steps_of_simclr(chunk=True)),
                                         ("instdisc", steps_of_instdisc())):
        ddp.average_buffers(encoder)
        seen[kind] = {
            "grad": [p.grad for p in encoder.parameters() if p.requires_grad],
            "buffers": [b for b in encoder.buffers() if b.is_floating_point()],
            "loss": ddp.mean(loss), **extra}
    torch.save(seen, folder / f"{ddp.world()}-{ddp.rank()}.pt")


def test_two_processes_compute_what_one_computes(tmp_path):
    """SimCLR, whole and in chunks, and InstDisc: loss, gradients, statistics, bank and Z."""
    save_steps(tmp_path)
    spawn(save_steps, tmp_path)
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert [*one] == ["simclr", "chunk", "instdisc"]
    for kind, expected in one.items():
        for two in (a[kind], b[kind]):
            assert abs(two["loss"] - expected["loss"]) < 1e-9, kind
            for name in ("grad", "buffers"):
                for x, y in zip(two[name], expected[name], strict=True):
                    assert close(x, y, 1e-7), (kind, name)
            if kind == "instdisc":
                assert close(two["memory"], expected["memory"], 1e-9)
                assert close(two["Z"], expected["Z"], 1e-9)


# Chunks

@pytest.mark.parametrize("parts", [1, 4, 5])
def test_chunks_give_the_gradient_of_the_whole_batch(parts, monkeypatch):
    """For a network without batch norm. 5 does not divide 16; the loss is by blocks of 3 rows."""
    monkeypatch.setattr(simclr, "BLOCK", 3 * 32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.Tanh(), nn.Linear(20, 8))
    network, x = network.double(), views(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.)
    whole = simclr.train_step(network, optimizer, *x, .2)
    expected = [p.grad.clone() for p in network.parameters()]
    chunked = simclr.chunked_step(network, network, contextlib.nullcontext, optimizer,
                                  lambda part: list(x[:, part]), 16, parts, .2)
    assert abs(whole - chunked) < 1e-12
    for p, gradient in zip(network.parameters(), expected, strict=True):
        assert close(p.grad, gradient, 1e-10)


def test_running_statistics_move_once_over_all_chunks():
    """Although each chunk is embedded twice."""
    norm = simclr.GlobalBatchNorm(3).double()
    encoder = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * 32 * 32, 4).double())
    optimizer, x = torch.optim.SGD(encoder.parameters(), 0.), views(3) + 2
    simclr.chunked_step(encoder, encoder, contextlib.nullcontext, optimizer,
                        lambda part: list(x[:, part]), 16, 2, .2)
    means = [x[:, i::2].mean((0, 1, 3, 4)) for i in range(2)]
    assert torch.allclose(norm.running_mean, .1 * (means[0] + means[1]) / 2, atol=1e-12)
    assert norm.momentum == .1


def test_a_chunk_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    """Parts of it would be empty, and their batch statistics not a number."""
    monkeypatch.setattr(ddp, "world", lambda: 4)

    def check(chunk):
        argv = ["--batch-size", "8", "--chunk", str(chunk)]
        args = train.settings(simclr.flags(), argv, "textures", simclr.SCALES, simclr.PRESETS)
        args.images = 44
        simclr.check(args)
    for chunk in (2, 3):
        with pytest.raises(UserError, match=f"^--chunk {chunk}: expected 4 or more, an image for"):
            check(chunk)
    check(4)


# LARS

def test_lars_is_the_released_formula():
    torch.manual_seed(0)
    shapes = torch.randn(4, 3), torch.zeros(2, 2), torch.randn(5)   # a weight, one at 0, a bias
    parameters = [nn.Parameter(x.double()) for x in shapes]
    expected, velocity = [p.detach().clone() for p in parameters], [0., 0., 0.]
    lr, decay = (.3, .2), .1
    optimizer = simclr.LARS(parameters, lr[0], weight_decay=decay)
    for step in range(2):
        gradients = [torch.randn_like(p) for p in parameters]
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = lr[step]
        optimizer.step()
        for i, g in enumerate(gradients):
            trust = 1.
            if i < 2:                                           # the bias is excluded from both
                g = g + decay * expected[i]
                norm = expected[i].norm().item()
                trust = .001 * norm / g.norm().item() if norm > 0 else 1.
            velocity[i] = .9 * velocity[i] + lr[step] * trust * g
            expected[i] = expected[i] - velocity[i]
        for p, e in zip(parameters, expected, strict=True):
            assert torch.allclose(p, e, atol=1e-14)


# SimCLR's network and augmentation

def test_simclrs_head_augmentation_and_schedule_are_the_released_ones():
    rates = [simclr.learning_rate(i, lr=4.8, warmup=10, total=110) for i in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0, 2.4, 4.8, 2.4, 0])
    layer = ["Linear", "BatchNorm1d", "ReLU"]
    for layers in (2, 3):
        g = simclr.head(layers, 8, 4, nn.BatchNorm1d)
        assert [type(m).__name__ for m in g] == layer * (layers - 1) + ["Linear", "BatchNorm1d"]
        assert all(m.bias is None for m in g if isinstance(m, nn.Linear))
        assert g[0].bias is None and not g[-1].bias.requires_grad and g[1].bias.requires_grad
    stack = augment.Augment("simclr", augment.jitter_strength(1.))
    draws = stack.draw(0, 500, views=2)
    for view in (0, 1):
        assert len(set(draws[view, "sigma"].tolist())) == 1     # one sigma per batch and view
        assert .4 < len(draws[view, "blur"]) / 500 < .6
    # Zero border and 2 x (size // 20) + 1 taps: a white image gets darker only near its edge.
    none = torch.tensor([], dtype=torch.int64)
    draw = {"flip": none, "gray": none, "blur": torch.tensor([0]), "sigma": torch.tensor([2.]),
            "factors": torch.tensor([[1., 1., 1., 0.]]), "order": [0, 1, 2, 3]}
    white = torch.full((1, 3, 60, 60), 255, dtype=torch.uint8)
    x = augment.Augment("simclr", normalisation="unit").transform(white, draw)
    assert x.max() == pytest.approx(1, abs=1e-5)
    assert x[0, 0, 30, 3] > .9999 > .99 > x[0, 0, 30, 2] > .5


def test_simclrs_encoder_is_read_back_with_its_own_normalisation(tmp_path):
    s = simclr_settings()
    encoder, _ = simclr.build(s, CPU)
    saved = {"f": encoder.f.state_dict(), "g": encoder.g.state_dict(), "settings": vars(s)}
    torch.save(saved, tmp_path / "a.pt")
    back, settings = load_encoder(tmp_path / "a.pt")
    assert isinstance(back, Encoder) and settings["normalisation"] == "unit"
    assert back.width("z") == 128 and back.width("hidden") == 512
    x = torch.rand(2, 3, 32, 32)
    for feature in ("h", "hidden", "z"):
        assert torch.equal(back.eval().embed(x, feature), encoder.eval().embed(x, feature))
    # Residual branches begin at zero.
    assert all(block.bn2.weight.abs().max() == 0 for block in encoder.f.modules()
               if isinstance(block, BasicBlock))
    bottleneck = simclr.build(simclr_settings(arch="resnet50"), CPU)[0].f.layer1[0]
    assert bottleneck.bn3.weight.abs().max() == 0 and bottleneck.bn2.weight.min() == 1
    assert torch.equal(back.embed(x, "hidden"), F.relu(back.g[1](back.g[0](back.f(x)))))
    pixels = (x * 255).to(torch.uint8)
    found = evaluate.features(back, data.Images(pixels=pixels), normalisation="unit", size=32,
                              device=CPU, workers=0)
    assert torch.allclose(found, back.f(pixels / 255), atol=1e-5)


# Hard negatives

def log_counts(negatives, ranks):
    """How often each of `negatives` (N, K) is drawn, by its rank in its row: log counts (N, K).

    Drawing with replacement only changes how often an exponential counts in Eq. (1). So its
    logarithm, added to the similarity over the temperature, gives the same loss: another form of
    sorting and gathering. It is -inf if a key is not drawn.
    """
    count = torch.zeros_like(negatives).scatter_add_(1, ranks, torch.ones_like(negatives))
    order = negatives.argsort(1, descending=True)
    return torch.empty_like(negatives).scatter_(1, order, count.log_())


@pytest.mark.parametrize("kind", ["hard", "hardest", "random"])
def test_hard_negatives_are_sorted_by_similarity_and_sampled_by_rank(kind):
    """Loss and gradients of the step against a literal loop and against log counts, to 1e-10."""
    N, K, t = 6, 50, .2
    ranks = moco_v2.draw_ranks(moco_v2.rank_distribution(kind, K, 4., .25), N, 0, 3)
    x1, x2 = torch.randn(2, N, 3, 2, 2, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    moco = moco_v2.MoCo(encoder, K, 4, .99, t).double()
    queue, k = moco.queue.clone(), unit(encoder(x2)).detach()
    weight = encoder[1].weight.detach().clone()

    def similarities(weight):
        q = unit(F.linear(x1.flatten(1), weight, encoder[1].bias.detach()))
        return (q * k).sum(1), q @ queue.T

    def loop(weight):
        positive, negatives = similarities(weight)
        total = 0
        for p, row, drawn in zip(positive, negatives, ranks):
            most_similar_first = sorted(row, reverse=True)
            others = sum((most_similar_first[rank] / t).exp() for rank in drawn)
            total = total - ((p / t).exp() / ((p / t).exp() + others)).log()
        return total / N

    def counted(weight):
        positive, negatives = similarities(weight)
        return info_nce(positive, negatives + t * log_counts(negatives.detach(), ranks), t)
    agree(counted, loop, weight)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.)
    order = torch.randperm(N)
    x2_shuffled = moco_v2.shuffle(x2, order)
    loss = moco_v2.train_step(moco, optimizer, x1, x2_shuffled, order, 0, ranks)
    leaf = weight.requires_grad_()
    expected = loop(leaf)
    gradient, = torch.autograd.grad(expected, leaf)
    assert abs(loss - expected) < 1e-10
    assert (encoder[1].weight.grad - gradient).abs().max() < 1e-10


def test_ranks_follow_the_truncated_skew_normal():
    K, a, w = 4096, 4., .25
    F_hard = moco_v2.rank_distribution("hard", K, a, w)
    ranks = moco_v2.draw_ranks(F_hard, 64, 0, 0).numpy().ravel()
    assert ranks.min() >= 0 and ranks.max() < K
    low, high = skewnorm.cdf([0, K], a, scale=w * K)
    # Nearly uniform within a rank.
    sample = (ranks + np.random.default_rng(0).random(len(ranks)))[::13]

    def truncated(x):
        return (skewnorm.cdf(x, a, scale=w * K) - low) / (high - low)
    assert kstest(sample, truncated).pvalue > 1e-3
    assert abs(np.median(ranks) / K - .17) < .02 and abs(np.quantile(ranks, .95) / K - .49) < .02
    F_hardest = moco_v2.rank_distribution("hardest", K, a, w)
    assert moco_v2.draw_ranks(F_hardest, 4, 0, 0).max() == math.ceil(K / 10) - 1
    assert moco_v2.rank_distribution("queue", K, a, w) is None
    with pytest.raises(UserError, match="--skew -1e.07 --skew-scale 0.25: no rank of the queue is "
                                        "left to sample; try 4 and .25"):
        moco_v2.rank_distribution("hard", K, -1e7, .25)


def test_ranks_depend_only_on_seed_step_and_row(monkeypatch):
    F_random = moco_v2.rank_distribution("random", 100, 4., .25)
    ranks = moco_v2.draw_ranks(F_random, 8, 0, 7)
    assert ranks.shape == (8, 100)
    assert not torch.equal(ranks[0], ranks[1])
    assert not torch.equal(ranks, moco_v2.draw_ranks(F_random, 8, 0, 8))
    monkeypatch.setattr(ddp, "rows", lambda n: slice(2, 5))     # as in another process
    assert torch.equal(ranks[2:5], moco_v2.draw_ranks(F_random, 8, 0, 7))


def test_the_images_in_the_queue_are_known():
    images = data.Images(torch.zeros(21), torch.zeros(21, 3, 4, 4, dtype=torch.uint8))
    settings, moco = dict(K=20, batch_size=8, seed=3), moco_v2.MoCo(nn.Identity(), 20, 1, .9, .2)
    moco.queue.fill_(-1)
    for step, _, index in data.views(images, 1, size=4, area=(1, 1), batch=8, seed=3, start=0,
                                     stop=7, device=CPU, workers=0):
        assert torch.equal(figure5.images_in_queue(21, settings, step), moco.queue[:, 0].long())
        moco.enqueue(index[:, None], step)
