"""Eq. (1) against a literal loop."""

import math

import torch

from common.loss import info_nce, unit


def eq1(z1, z2, negatives, temperature):
    """Eq. (1), literally: one row, one negative at a time."""
    total = 0
    for i in range(len(z1)):
        def exp_sim(b):
            return math.exp(math.fsum((z1[i] * b).tolist()) / temperature)
        positive = exp_sim(z2[i])
        total += -math.log(positive / (positive + sum(exp_sim(n) for n in negatives)))
    return total / len(z1)


def test_info_nce_is_equation_1():
    torch.manual_seed(0)
    z1, z2, negatives = (unit(torch.randn(n, 7, dtype=torch.float64)) for n in (5, 5, 11))
    for temperature in (.07, .2, 1.):
        ours = info_nce((z1 * z2).sum(1), z1 @ negatives.T, temperature)
        assert abs(ours.item() - eq1(z1, z2, negatives, temperature)) < 1e-12


def test_equal_similarities_give_log_k_plus_1():
    for K in (1, 16, 65536):
        loss = info_nce(torch.full((3,), .4), torch.full((3, K), .4), .07)
        assert abs(loss.item() - math.log(K + 1)) < 1e-5


def test_info_nce_gradient_is_softmax_minus_one_hot():
    torch.manual_seed(1)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    info_nce(logits[:, 0], logits[:, 1:], .2).backward()
    expected = torch.softmax(logits.detach() / .2, 1)
    expected[:, 0] -= 1
    torch.testing.assert_close(logits.grad, expected / .2 / 4, rtol=1e-12, atol=1e-14)


def test_masked_columns_are_ignored():
    torch.manual_seed(2)
    positive = torch.randn(3, dtype=torch.float64)
    negatives = torch.randn(3, 6, dtype=torch.float64)
    masked = torch.cat([negatives, torch.full((3, 2), -math.inf, dtype=torch.float64)], 1)
    assert info_nce(positive, masked, .1) == info_nce(positive, negatives, .1)


def test_loss_is_computed_in_float32_or_higher():
    z = torch.randn(3, 8)
    assert unit(z.bfloat16()).dtype == torch.float32 and unit(z.double()).dtype == torch.float64
    assert info_nce(z[:, 0].bfloat16(), z.bfloat16(), .1).dtype == torch.float32
    assert (unit(z.bfloat16()).norm(dim=1) - 1).abs().max() < 1e-6
