"""The statistics of the verdicts: error rates and power by simulation, formulas against oracles."""

import math
import statistics

import numpy as np
import pytest
from scipy import special, stats

from reproduce import verdicts

SPREAD = .5                     # of an ordinary cell, in points
COLLAPSED = 5.


def log_uniform(rng, shape):
    """Spreads from .3 to 3."""
    return np.exp(rng.uniform(math.log(.3), math.log(3), shape))


def one_collapsed(rng, shape, spread=COLLAPSED):
    """The first cell has another spread than all others."""
    return np.where(np.arange(shape[1]) == 0, spread, SPREAD) * np.ones(shape)


def all_equal(rng, shape):
    return np.full(shape, SPREAD)


def simulated(spreads, n, n_cells, repeats):
    """Means and variances (repeats, cells) of independent cells; `n` as in `decided`."""
    rng = np.random.default_rng(0)
    df = n - 1.
    spread = spreads(rng, (repeats, n_cells))
    mean = spread * rng.standard_normal(spread.shape) / np.sqrt(n)
    return mean, spread ** 2 * rng.chisquare(df, spread.shape) / df


def correlated(correlation, n, n_cells, repeats):
    """The same for cells whose seeds are correlated, as contrasts of the same encoders are."""
    rng = np.random.default_rng(0)
    values = math.sqrt(1 - correlation) * rng.standard_normal((repeats, n, n_cells))
    values = values + math.sqrt(correlation) * rng.standard_normal((repeats, n, 1))
    # Contrasts that share an encoder differ a little in spread.
    values = SPREAD * values * rng.uniform(.8, 1.2, (repeats, 1, n_cells))
    return values.mean(1), values.var(1, ddof=1)


def contrasts(mean, sample, n, pairs):
    """Value, standard error and degrees of freedom (repeats,) of each pair, as in `decided`."""
    df = n - 1.
    prior = verdicts.fit(sample, df)
    for i, j in pairs:
        cells = [i] if j is None else [i, j]
        outlier = verdicts.OUTLIER_ALONE if j is None else verdicts.OUTLIER
        variance, moderated_df = verdicts.shrink(sample[:, cells], df[cells], prior, outlier)
        error = np.sqrt((variance / n[cells]).sum(axis=1))
        value = mean[:, i] - (0. if j is None else mean[:, j])
        yield value, error, moderated_df.min(axis=1)


def decided(spreads, n, pairs, n_cells, repeats, difference=0.):
    """Share of comparisons of two cells of a campaign that are decided either way.

    A pair (i, None) is the contrast of cell i alone, as for paired samples. `n` is one number or
    one for each cell.
    """
    n = np.broadcast_to(n, n_cells)
    rates = []
    for value, error, df in contrasts(*simulated(spreads, n, n_cells, repeats), n, pairs):
        p = 2 * special.stdtr(df, -np.abs(value + difference) / error)
        rates.append((p < .05).mean())
    return statistics.mean(rates)


def repeats(n_cells):
    return 10000 if n_cells == 5 else 4000


OTHERS = [(1, 2), (3, 4), (1, 3)]
WITH_FIRST = [(0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("n_cells", [5, 40])
@pytest.mark.parametrize("n", [2, 3])
def test_null_comparisons_are_decided_in_at_most_6_percent(n, n_cells):
    for spreads, pairs in ((all_equal, OTHERS), (log_uniform, OTHERS), (one_collapsed, OTHERS),
                           (one_collapsed, WITH_FIRST)):
        rate = decided(spreads, n, pairs, n_cells, repeats(n_cells))
        assert .01 < rate <= .06, (spreads, pairs, rate)


@pytest.mark.parametrize("spread", [1., 1.5, 2.5])
def test_an_odd_cell_that_looks_ordinary_is_the_worst_case(spread):
    """Two to five times the spread of the others: the error rates in the module's docstring."""
    for n, n_cells, most in ((3, 5, .09), (3, 40, .09), (2, 5, .065), (2, 40, .065)):
        rate = decided(lambda rng, shape: one_collapsed(rng, shape, spread), n, WITH_FIRST,
                       n_cells, repeats(n_cells) // 2)
        assert rate <= most, (n, n_cells, rate)


def test_cells_of_two_and_of_three_seeds():
    for n in ([2, 2, 3, 3, 3], [3, 3, 2, 2, 2]):
        for spreads in (all_equal, log_uniform, one_collapsed):
            for pairs in (OTHERS, WITH_FIRST):
                assert decided(spreads, n, pairs, 5, 4000) <= .06


@pytest.mark.parametrize("n", [2, 3])
def test_null_contrasts_of_paired_samples(n):
    for spreads in (all_equal, log_uniform, one_collapsed):
        for cell in (0, 1):
            assert decided(spreads, n, [(cell, None)], 6, 5000) <= .06, (spreads, cell)
    for spread in (1., 1.5, 2.5):                               # the worst case
        assert decided(lambda rng, shape: one_collapsed(rng, shape, spread), n, [(0, None)],
                       6, 5000) <= .085


def test_power_at_three_seeds():
    """A true difference of 1.5 points at a spread of .5."""
    assert decided(all_equal, 3, OTHERS, 5, 20000, difference=1.5) >= .8
    assert decided(all_equal, 3, OTHERS, 40, 6000, difference=1.5) >= .82
    assert decided(one_collapsed, 3, OTHERS, 40, 6000, difference=1.5) >= .8


@pytest.mark.parametrize("n, one, three", [(2, .11, .002), (3, .38, .06)])
def test_claims_of_no_difference_are_rarely_shown(n, one, three):
    """The true difference is 0, the spread .5, in 40 cells: for one contrast, and for three K."""
    n, pairs = np.broadcast_to(n, 40), [(0, 1), (2, 3), (4, 5)]
    shown = []
    for value, error, df in contrasts(*simulated(all_equal, n, 40, 4000), n, pairs):
        shown.append(np.abs(value) + special.stdtrit(df, .95) * error < verdicts.MARGIN)
    assert np.mean(shown) == pytest.approx(one, rel=.1)
    assert np.all(shown, 0).mean() == pytest.approx(three, abs=.01)


@pytest.mark.parametrize("correlation, expected", [(0., .05), (.5, .05), (.95, .08), (1., .11)])
def test_contrasts_of_the_same_encoders_are_decided_too_often(correlation, expected):
    """Five paired contrasts: the error rates in the module's docstring."""
    n = np.broadcast_to(3, 5)
    rates = []
    for value, error, df in contrasts(*correlated(correlation, 3, 5, 20000), n,
                                      [(i, None) for i in range(5)]):
        rates.append((2 * special.stdtr(df, -np.abs(value) / error) < .05).mean())
    assert np.mean(rates) == pytest.approx(expected, abs=.005)


def test_judge_computes_what_the_simulation_does():
    rng = np.random.default_rng(0)
    for n in ([3, 3, 3, 3, 3], [2, 3, 3, 2, 5]):
        cells = [list(rng.normal(60, spread, k)) for spread, k in zip([.5, .5, 5., .5, 1.], n)]
        df = np.array(n) - 1.
        variances = np.array([statistics.variance(values) for values in cells])
        moderated, moderated_df = verdicts.shrink(variances, df, verdicts.fit(variances, df))
        prior = verdicts.moderate([*cells, [60.], []])          # one seed contributes nothing
        for i, j in ((0, 1), (0, 2), (3, 4)):
            coefficients = [float(k == i) - float(k == j) for k in range(5)]
            found = verdicts.judge("positive", [coefficients], cells, prior)
            value = statistics.mean(cells[i]) - statistics.mean(cells[j])
            error = math.sqrt(moderated[i] / n[i] + moderated[j] / n[j])
            least = min(moderated_df[i], moderated_df[j])
            assert found.estimate == pytest.approx(value)
            assert found.p == pytest.approx(2 * stats.t.sf(abs(value) / error, least))
            assert found.half == pytest.approx(stats.t.ppf(.975, least) * error)
            assert found.n == n


def slow_fit(variances, dfs, added):
    """limma's fitFDist, cell by cell; the inverse of trigamma by bisection."""
    median = statistics.median(variances)
    logs = []
    for s2, d in zip(variances, dfs):
        if s2 == 0:
            s2 = median * stats.chi2.ppf(.01, d) / stats.chi2.ppf(.5, d)
        logs.append(math.log(s2) - special.psi(d / 2) + math.log(d / 2))
    center = sum(logs) / len(logs)
    excess = sum((x - center) ** 2 for x in logs) / (len(logs) - 1)
    excess -= sum(special.polygamma(1, d / 2) for d in dfs) / len(dfs)
    excess = max(excess, 0)
    typical = special.polygamma(1, 2.)
    excess = ((len(logs) - 1) * excess + added * typical) / (len(logs) - 1 + added)
    if excess == 0:
        return math.exp(center), math.inf
    low, high = 1e-9, 1e9
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if special.polygamma(1, middle) > excess else (low, middle)
    return math.exp(center + special.psi(low) - math.log(low)), 2 * low


def test_fit_against_a_literal_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        dfs = rng.integers(1, 5, 8).astype(float)
        variances = log_uniform(rng, 8) * rng.chisquare(dfs) / dfs
        variances[0] *= rng.random() < .5
        prior = verdicts.fit(variances, dfs)
        variance, df = slow_fit(variances, dfs, verdicts.ADDED_CELLS)
        assert prior.df.item() == pytest.approx(df, rel=1e-6)
        assert prior.variance.item() == pytest.approx(variance, rel=1e-6)


def test_fit_finds_the_prior_that_made_the_cells():
    rng = np.random.default_rng(0)
    dfs = rng.integers(1, 4, 20000).astype(float)
    true = .5 * 6 / rng.chisquare(6, 20000)
    prior = verdicts.fit(true * rng.chisquare(dfs) / dfs, dfs)
    assert prior.df.item() == pytest.approx(6, rel=.1)
    assert prior.variance.item() == pytest.approx(.5, rel=.05)


def test_trigamma_inverse():
    y = np.geomspace(1e-3, 1e4, 50)
    assert verdicts.trigamma_inverse(special.polygamma(1, y)) == pytest.approx(y, rel=1e-6)


def test_many_cells_of_equal_spread_are_nearly_pooled():
    rng = np.random.default_rng(0)
    df = np.full(20000, 2.)
    variances = SPREAD ** 2 * rng.chisquare(df) / df
    prior = verdicts.fit(variances, df)
    moderated, moderated_df = verdicts.shrink(np.array([.1]), np.array([2.]), prior)
    assert moderated.item() == pytest.approx(variances.mean(), rel=.1)
    assert moderated_df.item() > 30
    pooled = verdicts.Prior(np.array([.25]), np.array([math.inf]), np.array([2.5]),
                            np.array([10.]), np.array([.2]))
    for given, expected in ((.1, .25), (.3, .3)):               # never below the cell's own
        moderated, moderated_df = verdicts.shrink(np.array([given]), np.array([2.]), pooled)
        assert moderated.item() == expected and moderated_df.item() == 10   # of all cells, no more


def test_without_a_prior_the_rule_is_welch_with_the_smaller_degrees_of_freedom():
    cells = [[60., 61., 63.], [50., 50.5]]
    error = math.sqrt(statistics.variance(cells[0]) / 3 + statistics.variance(cells[1]) / 2)
    weak = verdicts.Prior(*map(np.array, ([1.], [1e-12], [5.], [9.], [1.])))
    for prior in (None, weak, verdicts.moderate(cells)):        # two cells are too few for a prior
        found = verdicts.contrast([1., -1.], cells, prior)
        assert found.error == pytest.approx(error) and found.df == pytest.approx(1)
        assert found.value == pytest.approx(61 + 1 / 3 - 50.25)
    assert verdicts.moderate(cells) is None


def test_an_outlier_keeps_its_own_degrees_of_freedom():
    cells = [[60., 60.5, 61.], [60., 60.4, 60.8], [60., 60.6, 61.2], [60., 60.5, 61.1],
             [50., 60., 70.]]
    prior = verdicts.moderate(cells)
    assert verdicts.contrast([1., -1., 0., 0., 0.], cells, prior).df > 3
    found = verdicts.contrast([1., 0., 0., 0., -1.], cells, prior)
    assert found.df == 2 and found.error >= 10 / math.sqrt(3)


def test_cells_that_do_not_vary():
    """A variance of zero is raised where other cells vary; without any spread nothing is decided"""
    constant = [60., 60., 60.]
    cells = [constant, [61., 61.5, 62.], [59., 59.5, 60.], [58., 58.4, 59.]]
    prior = verdicts.moderate(cells)
    assert math.isfinite(prior.df.item()) and prior.variance.item() > .05
    assert verdicts.contrast([1., 0., 0., 0.], cells, prior).error > .05
    assert verdicts.moderate([constant] * 5) is None
    for kind in verdicts.KINDS:
        found = verdicts.judge(kind, [[1., -1.]], [constant, [50., 50.]], None)
        assert found.verdict == "not resolved" and found.p == 1 and found.seeds is None


def test_kinds():
    def judge(kind, difference, noise=.1):
        cells = [[60 + difference + x for x in (-noise, 0., noise)],
                 [60 + x for x in (-noise, 0., noise)]]
        return verdicts.judge(kind, [[1., -1.]], cells).verdict
    for kind, difference, verdict in (
            ("positive", 2., "shown"), ("positive", -2., "contradicted"),
            ("not above", -9., "shown"), ("not above", .2, "shown"),
            ("not above", 3., "contradicted"), ("not above", 1.1, "not resolved"),
            ("equivalent", .2, "shown"), ("equivalent", -.2, "shown"),
            ("equivalent", 3., "contradicted"), ("equivalent", -3., "contradicted"),
            ("equivalent", .99, "not resolved")):
        assert judge(kind, difference) == verdict, (kind, difference)
        assert judge(kind, difference, noise=9.) == "not resolved"


def test_levels():
    """95 % intervals and two-sided p-values for `positive`, 90 % and one-sided ones otherwise."""
    cells = [[60., 60.4, 61.], [60.3, 60.7, 60.8]]
    error = math.sqrt(sum(statistics.variance(values) / 3 for values in cells))
    value = statistics.mean(cells[0]) - statistics.mean(cells[1])
    found = {kind: verdicts.judge(kind, [[1., -1.]], cells) for kind in verdicts.KINDS}
    assert found["positive"].half == pytest.approx(stats.t.ppf(.975, 2) * error)
    assert found["positive"].p == pytest.approx(2 * stats.t.sf(abs(value) / error, 2))
    for kind, distance in (("not above", 1 - value), ("equivalent", 1 - abs(value))):
        assert found[kind].half == pytest.approx(stats.t.ppf(.95, 2) * error)
        assert found[kind].p == pytest.approx(stats.t.sf(distance / error, 2))


def test_equivalence_must_hold_for_every_contrast():
    ladder = [[1., 0., 0., -1.], [0., 1., 0., -1.], [0., 0., 1., -1.]]
    flat = [[60., 60.1, 60.2], [60.1, 60.2, 60.3], [60., 60.1, 60.1], [60., 60.1, 60.2]]
    found = verdicts.judge("equivalent", ladder, flat)
    assert found.verdict == "shown"
    assert found.estimate == pytest.approx(.1)                  # the least certain of the three
    low = [[57., 57.1, 57.2], *flat[1:]]
    found = verdicts.judge("equivalent", ladder, low)
    assert found.verdict == "contradicted" and found.estimate == pytest.approx(-3)
    wide = [[57., 60., 63.], *flat[1:]]
    assert verdicts.judge("equivalent", ladder, wide).verdict == "not resolved"
    # Alone, this contrast contradicts the claim at 5 %; among three, it does not.
    border = [[61.3, 61.5, 61.7], *flat[1:]]
    assert verdicts.judge("equivalent", ladder[:1], border).verdict == "contradicted"
    found = verdicts.judge("equivalent", ladder, border)
    assert found.verdict == "not resolved"
    alone = verdicts.judge("equivalent", ladder[:1], border)
    assert found.p == pytest.approx(3 * alone.p) and found.half == alone.half


def test_probes_of_the_same_encoders_are_compared_in_pairs():
    h, hidden = [60., 80., 70.], [58., 78.1, 68.2]
    differences = verdicts.paired(h, hidden)
    assert differences == pytest.approx([2., 1.9, 1.8])
    found = verdicts.judge("positive", [[1.]], [differences])
    reference = stats.ttest_rel(h, hidden)
    assert found.p == pytest.approx(reference.pvalue) and found.verdict == "shown"
    assert verdicts.judge("positive", [[1., -1.]], [h, hidden]).verdict == "not resolved"
    with pytest.raises(ValueError):
        verdicts.paired(h, hidden[:2])


def test_every_cell_needs_two_seeds():
    for cells in ([[60., 61.], [50.]], [[], [50., 51.]]):
        found = verdicts.judge("positive", [[1., -1.]], cells)
        assert found.verdict == "not run" and found.n == [len(values) for values in cells]
        assert found.p is found.estimate is found.seeds is None
    assert verdicts.collapse([60., 61.], [40.], [42., 41.]).verdict == "not run"


def test_collapse_is_the_loss_of_half_of_the_gain():
    noise = np.array([-.2, 0., .2])
    baseline, untrained = list(60 + noise), list(40 + noise)
    for accuracy, verdict in ((45, "shown"), (55, "contradicted"), (50, "not resolved"),
                              (10, "shown")):
        found = verdicts.collapse(baseline, untrained, list(accuracy + noise))
        assert found.verdict == verdict
        assert found.estimate == pytest.approx(50 - accuracy)
        error = math.sqrt((.25 + .25 + 1) * .2 ** 2 / 3)
        assert found.half == pytest.approx(stats.t.ppf(.975, 2) * error)
    # Training that gains nothing has nothing to lose.
    for start in (60., 70.):
        found = verdicts.collapse(baseline, list(start + noise), list(45 + noise))
        assert found.verdict == "not resolved" and found.p > .05
    # The p-value is that of the weaker test, here of the gain.
    untrained = list(59 + noise)
    found = verdicts.collapse(baseline, untrained, list(20 + noise))
    gain = verdicts.judge("positive", [[1., -1.]], [baseline, untrained])
    assert found.verdict == "shown" and .02 < found.p == gain.p < .03


def test_a_contrast_that_hangs_on_one_cell_has_the_stricter_test_for_outliers():
    """Twice the common spread is ordinary in a comparison of two cells, and not if it weighs most.
    """
    noise = np.array([-.5, 0., .5])
    cells = [list(mean + scale * noise) for mean, scale in ((60, 1), (40, 1), (50, 2), (60, 1.1))]
    prior = verdicts.moderate(cells)
    assert verdicts.contrast([1., 0., -1., 0.], cells, prior).df > 3
    assert verdicts.contrast([.5, .5, -1., 0.], cells, prior).df == 2
    assert verdicts.contrast([0., 0., 1., 0.], cells, prior).df == 2


def test_the_number_of_seeds_that_would_resolve_a_claim():
    """With these, four of five repetitions are decided; with one less, fewer."""
    rng = np.random.default_rng(0)

    def power(kind, difference, n):
        bottom, top, tail = verdicts.KINDS[kind]
        x = rng.normal(0, 1, (20000, 2, n))
        value = x[:, 0].mean(axis=1) - x[:, 1].mean(axis=1) + difference
        half = stats.t.ppf(1 - tail, n - 1) * np.sqrt(x.var(axis=2, ddof=1).sum(axis=1) / n)
        shown = (value - half > bottom) & (value + half < top)
        return (shown | (value - half > top) | (value + half < bottom)).mean()
    noise = np.array([-1., 0., 1.])
    for kind, difference in (("positive", 1.2), ("positive", -.8), ("not above", .2),
                             ("not above", 2.), ("equivalent", 0.), ("equivalent", 2.)):
        found = verdicts.judge(kind, [[1., -1.]], [list(60 + difference + noise), list(60 + noise)])
        assert found.verdict == "not resolved" and found.seeds > 3
        assert .78 <= power(kind, difference, found.seeds) <= .87, (kind, difference)
        assert power(kind, difference, found.seeds - 1) < .82, (kind, difference)
    found = verdicts.judge("positive", [[1., -1.]], [list(60.01 + noise), list(60 + noise)])
    assert found.seeds == ">100"
    found = verdicts.judge("positive", [[1., -1.]], [list(99 + noise), list(60 + noise)])
    assert found.verdict == "shown" and found.seeds is None


def slow_holm(p_values):
    significant, rest = set(), set(range(len(p_values)))
    while rest:
        i = min(rest, key=lambda i: p_values[i])
        if p_values[i] > .05 / len(rest):
            break
        significant.add(i)
        rest.remove(i)
    return [i in significant for i in range(len(p_values))]


def test_holm_against_a_literal_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = list(rng.uniform(0, 1, 8) ** 4)
        assert verdicts.holm(p_values) == slow_holm(p_values)
    assert verdicts.holm([.01, .02, .04]) == [True, True, True]
    assert verdicts.holm([.02, None, .04]) == [False] * 3
    assert verdicts.holm([]) == []
