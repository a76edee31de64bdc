"""Tests of methods over several models, against published worked examples and other programs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import friedmanchisquare, norm

from llmva.statistics import critical_difference, friedman, holm, mean_ranks, nemenyi, ranks_against

# Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7 (2006), Table 6: how four trees rank on
# fourteen data sets by AUC. A lower rank is a higher score.
DEMSAR = -np.array(
    [
        [4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 2, 3], [4, 1, 3, 2], [4, 2, 3, 1], [1, 2.5, 4, 2.5], [3, 2, 4, 1],
        [2.5, 2.5, 4, 1], [4, 3, 2, 1], [2.5, 2.5, 2.5, 2.5], [4, 2.5, 1, 2.5], [3, 2, 4, 1], [4, 1, 2, 3],
        [3, 1, 4, 2],
    ]
)  # fmt: skip
# Hollander and Wolfe, Nonparametric Statistical Methods (1973), p. 140: seconds to round first base by three ways
BASES = np.array(
    [
        [5.40, 5.50, 5.55], [5.85, 5.70, 5.75], [5.20, 5.60, 5.50], [5.55, 5.50, 5.40], [5.90, 5.85, 5.70],
        [5.45, 5.55, 5.60], [5.40, 5.40, 5.35], [5.45, 5.50, 5.35], [5.25, 5.15, 5.00], [5.85, 5.80, 5.70],
        [5.25, 5.20, 5.10], [5.65, 5.55, 5.45], [5.60, 5.35, 5.45], [5.05, 5.00, 4.95], [5.50, 5.50, 5.40],
        [5.45, 5.55, 5.50], [5.55, 5.55, 5.35], [5.45, 5.50, 5.55], [5.50, 5.45, 5.25], [5.65, 5.60, 5.40],
        [5.70, 5.65, 5.55], [6.30, 6.30, 6.25],
    ]
)  # fmt: skip


def range_tail(q: float, methods: int) -> float:
    """P(range of `methods` standard normal variables > q), by integration of its definition."""
    inside = quad(lambda z: methods * norm.pdf(z) * (norm.cdf(z) - norm.cdf(z - q)) ** (methods - 1), -9, 9 + q)[0]
    return float(1 - inside)


def test_mean_ranks_of_the_example() -> None:
    assert mean_ranks(DEMSAR) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)


def test_friedman_of_the_examples() -> None:
    """Demsar prints 9.28 without the correction for ties; Hollander and Wolfe print 11.1 with it, p about .004."""
    ranks = mean_ranks(DEMSAR)
    assert 12 * 14 / (4 * 5) * (float((ranks**2).sum()) - 4 * 25 / 4) == pytest.approx(9.28, abs=0.01)
    for scores in (DEMSAR, BASES):
        wanted = friedmanchisquare(*scores.T)
        assert friedman(scores) == pytest.approx((wanted.statistic, wanted.pvalue), abs=1e-6)
    statistic, p = friedman(BASES) or (0.0, 0.0)
    assert (statistic, p) == pytest.approx((11.142857, 0.003805), abs=1e-6)  # as R's friedman.test prints it


def test_friedman_needs_three_methods_that_differ() -> None:
    assert friedman(DEMSAR[:, :2]) is None
    assert friedman(DEMSAR[:1]) is None
    assert friedman(np.ones((5, 3))) is None


def test_critical_differences_are_the_published_ones() -> None:
    """Demsar, Table 5(a): q at 5% for 2 to 10 methods; and the example's 1.25."""
    published = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for methods, q in enumerate(published, start=2):
        assert critical_difference(methods, 1) / math.sqrt(methods * (methods + 1) / 6) == pytest.approx(q, abs=1e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_nemenyi_is_the_tail_of_the_range() -> None:
    ranks = mean_ranks(DEMSAR)
    p = nemenyi(ranks, 14)
    error = math.sqrt(4 * 5 / (6 * 14))
    for i in range(4):
        assert p[i, i] == pytest.approx(1.0)
        for j in range(i):
            assert p[i, j] == p[j, i]
            assert p[i, j] == pytest.approx(range_tail(abs(ranks[i] - ranks[j]) / error * math.sqrt(2), 4), abs=1e-6)
    apart = critical_difference(4, 14)
    assert nemenyi(np.array([1.0, 1.0 + apart, 2.0, 3.0]), 14)[0, 1] == pytest.approx(0.05, abs=1e-6)


def test_two_methods_have_the_normal_p() -> None:
    ranks = np.array([1.2, 1.8])
    z = 0.6 / math.sqrt(2 * 3 / (6 * 10))
    assert nemenyi(ranks, 10)[0, 1] == pytest.approx(2 * norm.sf(z), abs=1e-6)
    assert ranks_against(ranks, 0, 10) == pytest.approx([1.0, 2 * norm.sf(z)], abs=1e-6)


def test_holm_of_the_example() -> None:
    """Demsar, section 3.2.2: against the first tree the others have p .019, .607 and .016, and Holm rejects two."""
    from statsmodels.stats.multitest import multipletests

    p = ranks_against(mean_ranks(DEMSAR), 0, 14)[1:]
    assert p == pytest.approx([0.019, 0.607, 0.016], abs=2e-3)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-6)
    assert [value < 0.05 for value in holm(p)] == [True, False, True]
