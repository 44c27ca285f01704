"""Verdicts on claims about mean accuracies, from two or three seeds per cell.

The variance of each cell is moderated (Smyth 2004, as in limma): it is averaged with a common
variance, whose weight, the prior's degrees of freedom, is estimated from all cells of a campaign, a
folder of results/. In simulations with three seeds, plain moderation decided null comparisons of
two cells too often: up to 9 % where spreads differ, 17 to 38 % if one of the cells has collapsed.
Hence four changes:

* The estimated spread of the variances is averaged with that of a few typical cells.
* A moderated variance is never below the cell's own.
* A cell whose variance is an outlier (F-test against the smaller of the prior's variance and the
  pooled one of all other cells) keeps its own degrees of freedom. The level of this test is high
  for two seeds, which say little about a spread, and for contrasts that depend on a single cell.
* A contrast has the smallest degrees of freedom of its cells instead of Satterthwaite's, which are
  too many if a cell with a large spread happens to look ordinary.

Percentage of null comparisons decided, either way, at a nominal 5 %, with 5 and with 40 cells in a
campaign, and for the single cell of a paired contrast (40,000 and 10,000 simulated campaigns;
10,000 and 3,000 for "half of a gain lost"):

    seeds and cells                                  3, 5   3, 40   2, 5   2, 40   paired, 3 and 2
    equal spreads                                     3.8     2.8    2.3     2.0     2.5 to 4.8
    spreads log-uniform from .3 to 3                  4.9     3.5    3.1     2.8     3.4 to 4.6
    one spread 5 among .5, other cells                1.7     2.2    1.3     1.6
    one spread 5 among .5, with this cell             5.8     5.2    4.1     4.2     5.1 to 5.5
    one spread 1 to 2.5 among .5, with this cell  6.4-7.9 7.2-8.7  3.4-4.6 4.6-5.7   5.7 to 8.1
    half of a gain lost, spread .5 to 5 among .5  1.3-4.8 1.2-4.5  0.4-1.9 0.7-2.0
    power: 1.5 points, spreads of .5                 80.4    84.8   23.4    33.3    78, 80; 41, 44
    power: 1.5 points, one other spread of 5         65.4    81.5   20.0    34.9
    power: equivalent, no difference, spreads of .5          38             11
    the same for three K                                      6            0.2

A cell with two to five times the spread of the others is the worst case, because it often looks
ordinary in three seeds. Cells with two seeds resolve large effects only. The simulated cells are
independent. Contrasts of the same encoders (all those that are compared in pairs) are not: with
correlations of .5, .95 and 1 among five of them, 5, 8 and 11 % of null comparisons are decided.
"""

import collections
import math
import statistics

import numpy as np
from scipy import special

LEVEL = .05                     # error rate of a verdict
MARGIN = 1.                     # points of top-1 that count as no difference
POWER = .8                      # with which the number of seeds `Verdict.seeds` decides a claim
MOST_SEEDS = 100
# Where the difference lies if the claim is true, and the error rate of each end of the interval.
KINDS = {"positive": (0., math.inf, LEVEL / 2),
         "not above": (-math.inf, MARGIN, LEVEL),
         "equivalent": (-MARGIN, MARGIN, LEVEL)}
# The prior is estimated as if this many more cells had been seen, whose spreads differ as those of
# a prior of TYPICAL_DF degrees of freedom. This keeps few cells from looking equal by chance.
ADDED_CELLS, TYPICAL_DF = 4, 4.
# A cell's spread is an outlier below this p-value of the F-test: with two seeds, with more.
OUTLIER = .3, .015
# The same for paired samples, and for contrasts in which one cell has most of the weight.
OUTLIER_ALONE = .5, .3

# Prior variance and degrees of freedom; then, for the cells of the campaign, the sum of squared
# residuals, its degrees of freedom, and the median variance. Arrays of shape (..., 1).
Prior = collections.namedtuple("Prior", "variance df squares pooled_df median")
Contrast = collections.namedtuple("Contrast", "value error df")
# `estimate` ± `half` is the interval of the decisive contrast. `p` is below LEVEL if the claim is
# decided. `n` lists the number of seeds of each cell. `seeds` is how many per cell would resolve an
# unresolved claim: a number, ">100" or None.
Verdict = collections.namedtuple("Verdict", "verdict estimate half p n seeds")


def trigamma_inverse(x):
    """y with trigamma(y) = x, for x > 0, by Newton's method (Smyth 2004, appendix)."""
    y = .5 + 1 / np.asarray(x, float)
    for _ in range(30):
        trigamma = special.polygamma(1, y)
        y = y + trigamma * (1 - trigamma / x) / special.polygamma(2, y)
    return y


def without_zeros(variances, df, median):
    """Variances; zeros are replaced by the 1 % quantile of variances around the median one.

    Accuracies are multiples of one image, so variances of exactly zero do occur.
    """
    smallest = median * special.chdtri(df, .99) / special.chdtri(df, .5)
    return np.where(variances > 0, variances, smallest)


def fit(variances, df):
    """The `Prior` of cells' variances with `df` degrees of freedom, arrays (..., cells).

    Smyth 2004, Sec. 6.2, for unequal degrees of freedom as in limma's fitFDist, with ADDED_CELLS.
    """
    median = np.median(variances, axis=-1, keepdims=True)
    variances = without_zeros(variances, df, median)
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    others = variances.shape[-1] - 1
    excess = logs.var(axis=-1, ddof=1) - special.polygamma(1, df / 2).mean(axis=-1)
    excess = others * np.maximum(excess, 0) + ADDED_CELLS * special.polygamma(1, TYPICAL_DF / 2)
    half = trigamma_inverse(excess / (others + ADDED_CELLS))
    offset = special.digamma(half) - np.log(half)
    squares = (df * variances).sum(axis=-1, keepdims=True)
    return Prior(np.exp(logs.mean(axis=-1) + offset)[..., None], 2 * half[..., None], squares,
                 df.sum(axis=-1, keepdims=True), median)


def shrink(variances, df, prior, outlier=OUTLIER):
    """Moderated variances of cells, and their degrees of freedom; `prior` is their campaign's."""
    variances = without_zeros(variances, df, prior.median)
    own = df / (prior.df + df)
    moderated = (1 - own) * prior.variance + own * variances
    others_df = prior.pooled_df - df
    others = np.minimum((prior.squares - df * variances) / others_df, prior.variance)
    p = special.fdtrc(df, others_df, variances / others)
    usual = p > np.where(df < 2, *outlier)
    df = np.where(usual, np.minimum(prior.df + df, prior.pooled_df), df)
    return np.maximum(variances, moderated), df


def moderate(samples):
    """The `Prior` of a campaign from all its cells, lists of percents; each cell is given once.

    None, for plain variances, if fewer than three cells have two values or if most do not vary.
    """
    samples = [values for values in samples if len(values) > 1]
    variances = np.array([statistics.variance(values) for values in samples])
    if len(samples) < 3 or not np.median(variances):
        return None
    return fit(variances, np.array([len(values) - 1. for values in samples]))


def contrast(coefficients, cells, prior=None, n=None):
    """The sum of coefficients times means of cells, as a `Contrast`.

    `n`, a number or an array, asks for the standard error and degrees of freedom that n seeds in
    each cell would give.
    """
    squares = [coefficient ** 2 for coefficient in coefficients]
    alone = max(squares) > sum(squares) / 2
    value, variance, dfs = 0., 0., []
    for coefficient, values in zip(coefficients, cells, strict=True):
        if coefficient:
            spread, df = np.array([statistics.variance(values)]), np.array([len(values) - 1.])
            if prior is not None:
                spread, df = shrink(spread, df, prior, OUTLIER_ALONE if alone else OUTLIER)
            size = len(values) if n is None else n
            value += coefficient * statistics.mean(values)
            variance = variance + coefficient ** 2 * spread.item() / size
            dfs.append(df.item() + size - len(values))
    return Contrast(value, np.sqrt(variance), np.min(dfs, axis=0))


def paired(first, second):
    """The differences of two probes of the same encoders, seed by seed: one sample.

    It is judged as a cell with the coefficient 1, with the prior of a campaign's paired samples.
    """
    return [a - b for a, b in zip(first, second, strict=True)]


def p_above(found, bound):
    """One-sided p-value for a contrast above `bound`; 1 if there is no spread."""
    if not found.error:
        return 1.
    return float(special.stdtr(found.df, (bound - found.value) / found.error))


def p_below(found, bound):
    """One-sided p-value for a contrast below `bound`."""
    return p_above(Contrast(-found.value, found.error, found.df), -bound)


def half_width(found, tail):
    """Half the interval of a contrast that leaves the probability `tail` at each end."""
    return float(special.stdtrit(found.df, 1 - tail) * found.error)


def seeds_needed(kind, contrasts, cells, prior=None):
    """Seeds per cell that decide a claim with a probability of POWER, if what was estimated holds.

    ">100" if more than MOST_SEEDS are needed, None if nothing varies.
    """
    bottom, top, tail = KINDS[kind]
    n = np.arange(1 + min(len(values) for values in cells), MOST_SEEDS + 1)
    missed, outside = 0., 0.
    for coefficients in contrasts:
        value, error, df = contrast(coefficients, cells, prior, n)
        if not error.all():
            return None
        t = special.stdtrit(df, 1 - tail)
        missed = missed + special.stdtr(df, t - (top - value) / error) \
            + special.stdtr(df, t - (value - bottom) / error)
        t = special.stdtrit(df, 1 - tail / len(contrasts))
        distance = max(value - top, bottom - value)
        outside = np.maximum(outside, special.stdtr(df, distance / error - t))
    enough = n[np.maximum(1 - missed, outside) >= POWER]
    return int(enough[0]) if len(enough) else f">{MOST_SEEDS}"


def judge(kind, contrasts, cells, prior=None):
    """The `Verdict` on a claim of a kind in KINDS about every one of `contrasts`.

    A contrast is a list of one coefficient per cell. The claim is shown if it is shown for each
    contrast (an intersection-union test), and contradicted if a contrast contradicts it after
    Bonferroni's correction. Intervals are shown without this correction.
    """
    n = [len(values) for values in cells]
    if min(n) < 2:
        return Verdict("not run", None, None, None, n, None)
    bottom, top, tail = KINDS[kind]
    sides = LEVEL / tail
    found = [contrast(coefficients, cells, prior) for coefficients in contrasts]
    inside = [sides * max(p_above(each, bottom), p_below(each, top)) for each in found]
    outside = [sides * min(p_below(each, bottom), p_above(each, top)) for each in found]
    p_shown, p_contradicted = max(inside), len(found) * min(outside)
    verdict, decisive, seeds = "not resolved", inside.index(p_shown), None
    if p_shown < LEVEL:
        verdict = "shown"
    elif p_contradicted < LEVEL:
        verdict, decisive = "contradicted", outside.index(min(outside))
    else:
        seeds = seeds_needed(kind, contrasts, cells, prior)
    value, half = found[decisive].value, half_width(found[decisive], tail)
    return Verdict(verdict, value, half, min(p_shown, p_contradicted, 1.), n, seeds)


def collapse(baseline, untrained, cell, prior=None):
    """The `Verdict` on the claim that a cell loses half of the baseline's gain or more.

    A gain is that over the untrained encoder. The contrast is half of the baseline's gain minus the
    cell's. Unless the baseline is shown to gain anything, the claim is not resolved.
    """
    cells = [baseline, untrained, cell]
    lost = judge("positive", [[.5, .5, -1.]], cells, prior)
    gain = judge("positive", [[1., -1., 0.]], cells, prior)
    if lost.verdict not in ("shown", "contradicted"):
        return lost
    lost = lost._replace(p=max(lost.p, gain.p) if gain.estimate > 0 else 1.)    # both must hold
    if gain.verdict != "shown":
        return lost._replace(verdict="not resolved", seeds=gain.seeds)
    return lost


def holm(p_values):
    """Which p-values are significant at LEVEL after Holm's correction; None counts as 1."""
    p_values = [1. if p is None else p for p in p_values]
    significant = [False] * len(p_values)
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        significant[i] = True
    return significant
