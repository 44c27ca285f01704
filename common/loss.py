"""Eq. (1), InfoNCE. MoCo and SimCLR share it and differ in their negatives (Sec. 5).

InstDisc uses it with `--loss infonce`.
"""

import torch
import torch.nn.functional as F


def precise(x):
    """x in float32 or higher precision, for losses and normalisation. Call it outside autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(z):
    """Rows of z scaled to unit length, in float32 or higher: (N, D) -> (N, D).

    Call it outside autocast: in bf16, lengths are off by .003.
    """
    return F.normalize(precise(z), dim=1)


def info_nce(positive, negatives, temperature):
    """InfoNCE, Eq. (1): the mean over rows of -log(exp(p/t) / (exp(p/t) + sum_i exp(n_i/t))).

    `positive` p (N,) holds the dot products of unit-length z1 and z2, `negatives` n (N, K) those of
    z1 and g_phi(f_phi(x_i^-)); entries of -inf are ignored. sim of Eq. (1) is a dot product
    divided by the temperature t. The loss is computed in float32 or float64. If all similarities
    are equal, it is log(1 + K).
    """
    positive, negatives = precise(positive) / temperature, precise(negatives) / temperature
    return (torch.logaddexp(positive, negatives.logsumexp(1)) - positive).mean()
