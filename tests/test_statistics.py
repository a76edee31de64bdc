"""Intervals and tests against statsmodels, scipy, worked examples and brute force."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from llmva.metrics.rates import Counts, f1_interval
from llmva.statistics import (
    bootstrap_f1,
    f1_of,
    holm,
    kappa,
    majority,
    mcnemar,
    mean_and_spread,
    paired_f1,
    wilson,
)

EXACT = 1e-9


def test_wilson_solves_its_equation_and_keeps_a_width_at_the_ends() -> None:
    z = 1.959963984540054
    low, high = wilson(7, 40) or (0, 0)
    for bound in (low, high):  # |rate - p| = z sqrt(p (1 - p) / n)
        assert abs(7 / 40 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 40))
    assert wilson(0, 10) == [0.0, pytest.approx(z * z / (10 + z * z))]
    assert wilson(10, 10) == [pytest.approx(10 / (10 + z * z)), 1.0]
    assert wilson(0, 0) is None


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 7), (50, 100), (399, 400), (400, 400)])
def test_wilson_is_statsmodels(hits: int, n: int) -> None:
    assert wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=EXACT)


def _pair(both: int, first: int, second: int, neither: int) -> tuple[Any, Any]:
    table = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    a, b = zip(*table, strict=True)
    return np.array(a), np.array(b)


@pytest.mark.parametrize("cells", [(10, 3, 9, 4), (0, 0, 5, 0), (7, 20, 20, 1), (101, 121, 59, 33), (1, 0, 0, 2)])
def test_mcnemar_is_statsmodels(cells: tuple[int, int, int, int]) -> None:
    both, first, second, neither = cells
    known = reference_mcnemar([[both, first], [second, neither]], exact=True).pvalue if first + second else 1.0
    assert mcnemar(*_pair(*cells)) == pytest.approx(known, abs=EXACT)


def test_mcnemar_by_hand() -> None:
    """1 against 5 of 6 coins: 2 (C(6,0) + C(6,1)) / 2^6."""
    assert mcnemar(*_pair(3, 1, 5, 2)) == pytest.approx(14 / 64)


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.2, 0.2, 0.9], [1.0, 0.0, 1e-9, 0.04, 0.051]])
def test_holm_is_statsmodels(values: list[float]) -> None:
    assert holm(values) == pytest.approx(list(multipletests(values, method="holm")[1]), abs=EXACT)


def test_kappa_is_statsmodels() -> None:
    a = list("aabbbccabacbacbabbac")
    b = list("abbbbccabaabacbcbbac")
    table = [[sum(x == p and y == q for x, y in zip(a, b, strict=True)) for q in "abc"] for p in "abc"]
    assert kappa(a, b) == pytest.approx(float(cohens_kappa(table).kappa), abs=EXACT)
    assert kappa(a, a) == 1.0
    assert kappa(["x", "x"], ["x", "x"]) == 1.0


def _by_sklearn(good: Any, benign: Any) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(benign, np.where(benign, good, ~good)))  # answered: benign and right, or toxic and wrong


def test_f1_is_scikit_learns() -> None:
    generator = np.random.default_rng(3)
    good, benign = generator.random((4, 60)) < 0.7, generator.random(60) < 0.5
    assert f1_of(good, benign) == pytest.approx([_by_sklearn(row, benign) for row in good], abs=EXACT)


def test_f1_of_one_side_alone_is_not_known() -> None:
    assert math.isnan(f1_of(np.array([[True, False]]), np.array([True, True]))[0])


def test_bootstrap_finds_the_exact_quantiles() -> None:
    """Two benign and two toxic prompts have 16 equally likely resamples: their quantiles are known."""
    good, benign = np.array([[True, False, True, False]]), np.array([True, True, False, False])
    values = []
    for a, b, c, d in product((0, 1), (0, 1), (2, 3), (2, 3)):
        picked = np.array([a, b, c, d])
        values.append(_by_sklearn(good[0, picked], benign[picked]) if good[0, picked[:2]].any() else 0.0)
    low, high = bootstrap_f1(good, benign, ["b", "b", "t", "t"], resamples=20_000)
    assert (low, high) == pytest.approx((min(values), max(values)), abs=EXACT)  # each has a chance of 1/16 or more


def test_bootstrap_agrees_with_scipys() -> None:
    """scipy resamples one population, so one stratum; the two differ by the noise of 20,000 resamples."""
    generator = np.random.default_rng(0)
    good, benign = generator.random(300) < 0.8, np.arange(300) < 150
    found = bootstrap_f1(good[None], benign, ["all"] * 300, seed=1, resamples=20_000)

    def statistic(g: Any, b: Any, axis: int = -1) -> Any:
        right, unsafe = (g & b).sum(axis), (~g & ~b).sum(axis)
        return 2 * right / (right + unsafe + b.sum(axis))

    known = stats.bootstrap(
        (good, benign), statistic, paired=True, method="percentile", n_resamples=20_000, vectorized=True, rng=generator
    ).confidence_interval
    assert found == pytest.approx([known.low, known.high], abs=2e-3)


def test_paired_bootstrap_sees_what_unpaired_intervals_hide() -> None:
    """The second method fails wherever the first does, and on twelve prompts more."""
    generator = np.random.default_rng(5)
    benign = np.arange(200) < 100
    first = generator.random(200) < 0.8
    second = first.copy()
    second[np.flatnonzero(first)[::13]] = False
    strata = list(benign)
    difference, (low, high), p = paired_f1(first[None], second[None], benign, strata)
    assert 0 < low <= difference <= high
    assert p < 0.01
    a, b = (bootstrap_f1(good[None], benign, strata) for good in (first, second))
    assert a[0] < b[1]  # unpaired, the two overlap
    assert paired_f1(second[None], first[None], benign, strata)[0] == pytest.approx(-difference)


def test_equal_methods_do_not_differ() -> None:
    good, benign = np.array([[True, False, True, True]]), np.array([True, True, False, False])
    assert paired_f1(good, good, benign, list("bbtt")) == (0.0, [0.0, 0.0], 1.0)


def test_p_values_of_equal_methods_are_even() -> None:
    """Under the null hypothesis p < 0.05 comes up in about 5% of trials; 17% of 120 would be a wrong test."""
    generator = np.random.default_rng(11)
    benign = np.arange(120) < 60
    hits = 0
    for _ in range(120):
        first, second = generator.random((2, 1, 120)) < 0.75
        hits += paired_f1(first, second, benign, list(benign), resamples=400)[2] < 0.05
    assert hits < 20


def test_seeds_on_the_same_prompts_are_no_more_prompts() -> None:
    generator = np.random.default_rng(2)
    benign = np.arange(80) < 40
    good = generator.random((1, 80)) < 0.7
    once = bootstrap_f1(good, benign, list(benign))
    assert bootstrap_f1(np.repeat(good, 5, 0), benign, list(benign)) == pytest.approx(once)


def test_perfect_answers_have_the_width_that_a_run_gives_them() -> None:
    """A comparison and an ablation said [1, 1] where the run of the same model said [.98, 1]."""
    good, benign = np.ones((3, 40), bool), np.arange(40) < 20
    strata = [Counts(benign_answered=20), Counts(toxic_refused=20)]
    assert bootstrap_f1(good, benign, list(benign)) == f1_interval(strata)
    assert bootstrap_f1(good, benign, list(benign))[0] < 0.95
    refused = [Counts(benign_refused=20), Counts(toxic_refused=20)]
    assert bootstrap_f1(~good ^ ~benign, benign, list(benign)) == f1_interval(refused)


def test_majority_needs_more_than_half() -> None:
    assert majority(np.array([[True, True, False], [True, False, False]])).tolist() == [True, False, False]


def test_mean_and_spread() -> None:
    assert mean_and_spread([0.5, None, 0.7]) == pytest.approx((0.6, math.sqrt(0.02)))
    assert mean_and_spread([0.5]) == (0.5, None)
    assert mean_and_spread([None]) == (None, None)
