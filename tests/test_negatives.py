"""SimCLR, InstDisc and hard negatives: losses against loops over their formulas, processes, chunks, draws."""

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

import instdisc
import moco_v2
import simclr
from common import augment, data, ddp, evaluate
from common.loss import info_nce, unit
from common.model import Encoder, head, load_encoder


def agree(ours, loop, *inputs):
    """Values and gradients of two losses of the same inputs, to 1e-10."""
    results = []
    for loss in (ours, loop):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        results.append((value, torch.autograd.grad(value, leaves)))
    (a, da), (b, db) = results
    assert abs(a - b) < 1e-10 and all((x - y).abs().max() < 1e-10 for x, y in zip(da, db))


def units(*shape, seed=0):
    return unit(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def test_nt_xent_is_its_formula():
    M, t = 5, .3

    def loop(z):
        total = 0
        for first, second in ((z[:M], z[M:]), (z[M:], z[:M])):                  # each direction's mean, summed
            for i in range(M):
                positive = (first[i] @ second[i] / t).exp()
                others = sum((first[i] @ view[j] / t).exp() for view in (first, second) for j in range(M) if j != i)
                total = total - (positive / (positive + others)).log() / M
        return total
    agree(lambda z: simclr.nt_xent(z, torch.arange(2 * M), t), loop, units(2 * M, 4))
    same = torch.ones(2 * M, 1, dtype=torch.float64)
    assert simclr.nt_xent(same, torch.arange(2 * M), t) == pytest.approx(2 * math.log(1 + 2 * (M - 1)), abs=1e-12)


def test_instdiscs_losses_are_their_formulas():
    N, n, K, t = 3, 11, 6, .2
    v, memory, index = units(N, 4), units(n, 4, seed=1), torch.tensor([4, 0, 9])
    draws = torch.randint(0, n, (N, K), generator=torch.Generator().manual_seed(2))
    draws[0, 1] = 4                                             # its own slot: allowed in NCE, no negative in InfoNCE
    Z = torch.tensor(17.3, dtype=torch.float64)

    def exp(v, i, j):
        return (v[i] @ memory[j] / t).exp()

    def loop_nce(v):
        total = 0
        for i in range(N):
            h = [exp(v, i, j) / Z / (exp(v, i, j) / Z + K / n) for j in [index[i], *draws[i]]]
            total = total - h[0].log() - sum((1 - x).log() for x in h[1:])
        return total / N

    def loop_infonce(v):
        total = 0
        for i in range(N):
            negatives = sum(exp(v, i, j) for j in draws[i] if j != index[i])
            total = total - (exp(v, i, index[i]) / (exp(v, i, index[i]) + negatives)).log()
        return total / N

    def loop_softmax(v):
        return sum(-(exp(v, i, index[i]) / sum(exp(v, i, j) for j in range(n))).log() for i in range(N)) / N
    for kind, loop in (("nce", loop_nce), ("infonce", loop_infonce), ("softmax", loop_softmax)):
        agree(lambda v: instdisc.LOSSES[kind](v @ memory.T / t, index, draws, Z.clone()), loop, v)


def test_equal_scores_give_the_closed_forms():
    """And Z, estimated from them, makes P = 1 / n."""
    K, n, Z = 4096, 50_000, torch.zeros((), dtype=torch.float64)
    similarity, index = torch.full((2, n), .7, dtype=torch.float64), torch.tensor([1, 2])
    draws = torch.randint(10, n, (2, K))
    assert instdisc.nce_loss(similarity, index, draws, Z) == pytest.approx(math.log(K + 1) + K * math.log1p(1 / K), abs=1e-9)
    assert math.log(K + 1) + K * math.log1p(1 / K) == pytest.approx(9.318, abs=1e-3)    # ln(K + 1) + 1, nearly
    assert Z == pytest.approx(n * math.exp(.7))
    assert instdisc.infonce_loss(similarity, index, draws, Z) == pytest.approx(math.log(1 + K), abs=1e-9)
    instdisc.nce_loss(2 * similarity, index, draws, Z)
    assert Z == pytest.approx(n * math.exp(.7))                 # known once, it stays


def test_the_first_loss_is_that_of_the_released_bank():
    """Measured there at T = .07, with an untrained network: 10.02 at K = 4096, 8.14 at K = 512. Here v is random."""
    torch.manual_seed(0)
    n, s = 20_000, SimpleNamespace(seed=0, arch="resnet10", bn_group=None, head="none", dim=128, lr=.1, weight_decay=0.)
    _, memory, _, _ = instdisc.build(s, n, torch.device("cpu"))
    assert memory.norm(dim=1).mean() == pytest.approx(1, abs=.02)
    similarity, index = unit(torch.randn(256, 128)) @ memory.T / .07, torch.arange(256)
    for K, expected in ((4096, 10.02), (512, 8.14)):
        draws = instdisc.draw_negatives(n, K, slice(0, 256), 0, 0)
        assert abs(instdisc.nce_loss(similarity, index, draws, torch.zeros(())) - expected) < .35


def test_negatives_are_uniform_and_belong_to_the_run():
    draws = instdisc.draw_negatives(40, 3000, slice(0, 8), 0, 7)
    assert (torch.bincount(draws.flatten(), minlength=40) / draws.numel() - 1 / 40).abs().max() < .003
    assert torch.equal(draws[2:5], instdisc.draw_negatives(40, 3000, slice(2, 5), 0, 7))
    assert not torch.equal(draws[0], draws[1]) and draws.min() == 0 and draws.max() == 39


def test_the_bank_moves_by_its_momentum():
    memory, v, index = units(6, 3), units(2, 3, seed=5), torch.tensor([4, 1])
    before = memory.clone()
    instdisc.update_bank(memory, index, v, .25)
    for row, i in enumerate(index):
        assert torch.allclose(memory[i], F.normalize(.25 * before[i] + .75 * v[row], dim=0), atol=1e-14)
    assert torch.equal(memory[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


# processes

def views(step, n=16):
    return torch.randn(2, n, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def two_processes(folder, kind):
    """Two steps in float64; every process saves what it sees."""
    mine, extra = ddp.rows(16), {}
    if kind == "instdisc":
        s = SimpleNamespace(**{**instdisc.SCALES["textures"], "seed": 0, "bn_group": 4, "dim": 8})
        encoder, memory, Z, optimizer = instdisc.build(s, 30, torch.device("cpu"))
        memory, Z, extra = memory.double(), Z.double(), {}
        embed = ddp.wrap(encoder.double())
        for step in range(2):
            index = torch.from_numpy(augment.generator(step).permutation(30)[:16].copy())[mine]
            draws = instdisc.draw_negatives(30, 12, mine, 0, step)
            loss = instdisc.train_step(embed, memory, Z, optimizer, views(step)[0, mine], index, draws,
                                       instdisc.LOSSES["nce"], .2, .5, .1)
        extra = {"memory": memory, "Z": Z}
    else:
        s = SimpleNamespace(**{**simclr.SCALES["textures"], "seed": 0, "dim": 8, "head": "simclr2"})
        encoder, optimizer = simclr.build(s, torch.device("cpu"))
        for parameter in encoder.f.parameters():                # not 0, as SimCLR begins: every gradient has a part in it
            nn.init.normal_(parameter, .1, .1) if parameter.ndim == 1 else None
        embed = ddp.wrap(encoder.double())
        optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], .1)
        for step in range(2):
            x = views(step)[:, mine]
            if kind == "chunk":
                no_sync = embed.no_sync if ddp.world() > 1 else contextlib.nullcontext
                loss = simclr.chunked_step(encoder, embed, no_sync, optimizer, lambda part: list(x[:, part]), x.shape[1], 4, .2)
            else:
                loss = simclr.train_step(embed, optimizer, *x, .2)
    ddp.average_buffers(encoder)
    torch.save({"grad": [p.grad for p in encoder.parameters() if p.requires_grad], "loss": ddp.mean(loss),
                "buffers": [b for b in encoder.buffers() if b.is_floating_point()], **extra},
               folder / f"{ddp.world()}-{ddp.rank()}.pt")


@pytest.mark.parametrize("kind", ["simclr", "chunk", "instdisc"])
def test_two_processes_compute_what_one_computes(tmp_path, kind):
    two_processes(tmp_path, kind)
    spawn(two_processes, tmp_path, kind)
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for two in (a, b):
        assert abs(two["loss"] - one["loss"]) < 1e-9
        for name in ("grad", "buffers"):
            assert all(close(x, y, 1e-7) for x, y in zip(two[name], one[name])), name
        if kind == "instdisc":
            assert close(two["memory"], one["memory"], 1e-9) and close(two["Z"], one["Z"], 1e-9)


# chunks

class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.Tanh(), nn.Linear(20, 8))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("parts", [1, 4, 5])
def test_chunks_give_the_gradient_of_the_whole(parts, monkeypatch):
    """Of a network without batch statistics; 5 does not divide 16; the loss goes by blocks of 3 rows."""
    monkeypatch.setattr(simclr, "ROWS", 3 * 32)
    torch.manual_seed(0)
    network, x, found = NoBatchNorm().double(), views(0), []
    for chunked in (False, True):
        optimizer = torch.optim.SGD(network.parameters(), 0.)
        loss = simclr.chunked_step(network, network, contextlib.nullcontext, optimizer, lambda part: list(x[:, part]),
                                   16, parts, .2) if chunked else simclr.train_step(network, optimizer, *x, .2)
        found.append((loss, [p.grad.clone() for p in network.parameters()]))
    assert abs(found[0][0] - found[1][0]) < 1e-12
    assert all(close(a, b, 1e-10) for a, b in zip(found[1][1], found[0][1]))


def test_running_statistics_move_once_over_all_chunks():
    """Though each chunk is embedded twice."""
    norm = simclr.GlobalBatchNorm(3).double()
    encoder, x = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * 32 * 32, 4).double()), views(3) + 2
    optimizer = torch.optim.SGD(encoder.parameters(), 0.)
    simclr.chunked_step(encoder, encoder, contextlib.nullcontext, optimizer, lambda part: list(x[:, part]), 16, 2, .2)
    means = [x[:, i::2].mean((0, 1, 3, 4)) for i in range(2)]
    assert torch.allclose(norm.running_mean, .1 * (means[0] + means[1]) / 2, atol=1e-12) and norm.momentum == .1


# LARS

def test_lars_is_the_released_formula():
    torch.manual_seed(0)
    w, still, bias = (nn.Parameter(torch.randn(4, 3).double()), nn.Parameter(torch.zeros(2, 2).double()),
                      nn.Parameter(torch.randn(5).double()))
    mine, velocity, lr, decay = [p.detach().clone() for p in (w, still, bias)], [0., 0., 0.], (.3, .2), .1
    optimizer = simclr.LARS([w, still, bias], lr[0], weight_decay=decay)
    for step in range(2):
        gradients = [torch.randn_like(p) for p in (w, still, bias)]
        for p, g in zip((w, still, bias), gradients):
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = lr[step]
        optimizer.step()
        for i, g in enumerate(gradients):
            trust = 1.
            if i < 2:                                           # the bias is excluded from both
                g = g + decay * mine[i]
                long = mine[i].norm().item()
                trust = .001 * long / g.norm().item() if long > 0 else 1.
            velocity[i] = .9 * velocity[i] + lr[step] * trust * g
            mine[i] = mine[i] - velocity[i]
        assert all(torch.allclose(p, q, atol=1e-14) for p, q in zip((w, still, bias), mine))


def test_simclrs_head_augmentation_and_schedule_are_the_released_ones(photos):
    assert [simclr.learning_rate(i, lr=4.8, warmup=10, total=110) for i in (0, 5, 10, 60, 110)] == pytest.approx(
        [0, 2.4, 4.8, 2.4, 0])
    g = head("simclr3", 8, 4)
    assert [type(m).__name__ for m in g] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(m.bias is None for m in g if isinstance(m, nn.Linear)) and not g[-1].bias.requires_grad
    draw = augment.Augment("simclr", augment.jitter_strength(1.)).draw(2, 500, 0, 0)
    for view in draw["sigma"]:
        assert len(set(view[view > 0].tolist())) == 1 and .4 < (view > 0).float().mean() < .6
    # zero border and 2 x (size // 20) + 1 taps: an image of ones gets darker at its edge only
    one = torch.tensor([True])
    draw = {"flip": ~one, "gray": ~one, "sigma": torch.tensor([2.]), "factors": torch.tensor([[1., 1., 1., 0.]]),
            "order": torch.arange(4)}
    white = augment.Augment("simclr", scale="unit").apply_draws(torch.full((1, 3, 60, 60), 255, dtype=torch.uint8), draw)
    assert white.max() == pytest.approx(1, abs=1e-5) and white[0, 0, 30, 3] > .9999 > .99 > white[0, 0, 30, 2] > .5


# hard negatives

@pytest.mark.parametrize("kind", ["hard", "hardest", "random"])
def test_hard_negatives_equal_gathering_what_is_drawn(kind):
    """Counting how often a key is drawn, and taking each drawn similarity as a column, are one loss with one gradient."""
    K, t, ranks_of = 50, .2, moco_v2.rank_distribution(kind, 50, 4., .25)
    ranks = moco_v2.draw_ranks(ranks_of, slice(0, 6), 0, 3)
    positive, negatives = units(6, 4).sum(1), torch.rand(6, K, dtype=torch.float64) * 2 - 1

    def gathered(positive, negatives):
        rows = [torch.stack([row.sort(descending=True).values[r] for r in drawn]) for row, drawn in zip(negatives, ranks)]
        return info_nce(positive, torch.stack(rows), t)
    agree(lambda p, n: info_nce(p, n + t * moco_v2.log_counts(n.detach(), ranks), t), gathered, positive, negatives)


def test_ranks_follow_the_truncated_skew_normal():
    K, a, w = 4096, 4., .25
    ranks = moco_v2.draw_ranks(moco_v2.rank_distribution("hard", K, a, w), slice(0, 64), 0, 0).numpy().ravel()
    assert ranks.min() >= 0 and ranks.max() < K
    low, high = skewnorm.cdf([0, K], a, scale=w * K)
    smooth = ranks + np.random.default_rng(0).random(len(ranks))                # within a rank it is uniform, nearly
    sample = smooth[::13]
    assert kstest(sample, lambda x: (skewnorm.cdf(x, a, scale=w * K) - low) / (high - low)).pvalue > 1e-3
    assert abs(np.median(ranks) / K - .17) < .02 and abs(np.quantile(ranks, .95) / K - .49) < .02
    top = moco_v2.draw_ranks(moco_v2.rank_distribution("hardest", K, a, w), slice(0, 4), 0, 0)
    assert top.max() == math.ceil(K / 10) - 1 and moco_v2.rank_distribution("queue", K, a, w) is None
    with pytest.raises(SystemExit, match="--skew -1e.07 --skew-scale 0.25: leave no rank"):
        moco_v2.rank_distribution("hard", K, -1e7, .25)


def test_the_images_in_the_queue_are_known():
    s = SimpleNamespace(K=20, batch_size=8, seed=3)
    images = data.Images(torch.zeros(21), torch.zeros(21, 3, 4, 4, dtype=torch.uint8))
    owner = torch.full((20,), -1)
    for step, _, index in data.views(images, 1, size=4, area=(1, 1), batch=8, seed=3, start=0, stop=7,
                                     device=torch.device("cpu"), workers=0):
        assert torch.equal(moco_v2.images_in_queue(21, s, step), owner)
        moco_v2.enqueue(owner, index, step)


def test_simclrs_encoder_is_read_back_with_its_own_normalisation(tmp_path):
    s = SimpleNamespace(**{**simclr.SCALES["textures"], "seed": 0, "head": "simclr2"})
    encoder, _ = simclr.build(s, torch.device("cpu"))
    torch.save({"f": encoder.f.state_dict(), "g": encoder.g.state_dict(), "settings": vars(s)}, tmp_path / "a.pt")
    back, saved = load_encoder(str(tmp_path / "a.pt"))
    assert saved["normalisation"] == "unit" and back.width("z") == 128 and back.width("hidden") == 512
    x = torch.rand(2, 3, 32, 32)
    for feature in ("h", "hidden", "z"):
        assert torch.equal(back.eval().embed(x, feature), encoder.eval().embed(x, feature))
    assert torch.equal(back.embed(x, "hidden"), F.relu(back.g[1](back.g[0](back.f(x)))))
    same = evaluate.features(back, data.Images(pixels=(x * 255).to(torch.uint8)), scale="unit", size=32,
                             device=torch.device("cpu"), workers=0)
    assert torch.allclose(same, back.f((x * 255).to(torch.uint8) / 255), atol=1e-5)
    assert isinstance(back, Encoder)
