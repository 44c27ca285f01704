"""Eq. (1). InstDisc, MoCo and SimCLR share it and differ in where the negatives come from (Sec. 5)."""

import torch
import torch.nn.functional as F


def precise(x):
    """x in float32 or better: losses and lengths are taken there, outside autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(z):
    """Rows of z at unit length, in float32 or better. Call it outside autocast: in bf16 lengths are off by .003."""
    return F.normalize(precise(z), dim=1)


def info_nce(positive, negatives, temperature):
    """InfoNCE, Eq. (1), as a mean over rows: -log(exp(p/t) / (exp(p/t) + sum_i exp(n_i/t))).

    `positive` (N,) holds sim(z1, z2); `negatives` (N, K) holds sim(z1, g(f(x_i^-))), with -inf where a column is no
    negative of that row. Computed in float32 or better. With equal similarities it is log(1 + K).
    """
    positive, negatives = precise(positive) / temperature, precise(negatives) / temperature
    return (torch.logaddexp(positive, negatives.logsumexp(1)) - positive).mean()
