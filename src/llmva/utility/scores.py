"""A task's score from its documents, and after / before with an interval.

The unit that was sampled is the document, and both models answered the same ones. So a resample draws documents and
takes both models' answers to them along: what makes a document easy or hard cancels in the ratio.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmva.statistics import Interval

Floats = NDArray[np.float64]
MACRO_F1 = "f1_macro"
RESAMPLES = 2000
SLOW_RESAMPLES = 500  # for a score that is not a mean, and has to be computed anew on every resample


@dataclass(frozen=True)
class Metric:
    """`aggregate` makes the score from the documents' values; None is the mean of numbers.

    For `MACRO_F1` a value is the pair of the right choice and the chosen one, and `aggregate` is not asked.
    """

    name: str
    higher_is_better: bool = True
    aggregate: Callable[[list[Any]], float] | None = None


@dataclass(frozen=True)
class Preserved:
    """Score before and after, and `ratio`: the share of it that is left, below 1 whichever way the metric points.

    `ratio` is None where the score before is 0 or less; `interval` too where a resample in forty has such a score.
    """

    before: float
    after: float
    ratio: float | None
    interval: Interval | None
    resampled: Floats  # ratios, [resamples]


def score(metric: Metric, values: Sequence[Any]) -> float:
    """The metric over all documents."""
    return float(_scores(metric, values, np.ones((1, len(values))))[0])


def preserved(metric: Metric, before: Sequence[Any], after: Sequence[Any], seed: int, name: str = "") -> Preserved:
    """Both scores and their ratio, with a 95% percentile interval over documents drawn in pairs.

    Args:
        before, after: a value for each document, in the same order.
        seed: with `name`, of the resamples.
    """
    n = len(before)
    resamples = RESAMPLES if metric.aggregate is None else SLOW_RESAMPLES
    draws = draw_counts(n, resamples, seed, name)
    first, second = score(metric, before), score(metric, after)
    resampled = _ratios(metric, _scores(metric, before, draws), _scores(metric, after, draws))
    (whole,) = _ratios(metric, np.array([first]), np.array([second]))
    ratio = float(whole) if math.isfinite(whole) else None
    return Preserved(first, second, ratio, None if ratio is None else bounds(resampled), resampled)


def draw_counts(n: int, resamples: int, seed: int, name: str = "") -> Floats:
    """How often each of n documents is in each resample, [resamples, n]."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.multinomial(n, np.full(n, 1 / n), resamples).astype(float)


def mean_preserved(tasks: Sequence[Preserved]) -> tuple[float | None, Interval | None]:
    """Mean of the tasks' ratios, each counting the same, with its interval; tasks without a ratio are left out.

    Tasks have no documents in common, so one task's resamples are independent of another's.
    """
    known = [task for task in tasks if task.ratio is not None]
    if not known:
        return None, None
    size = min(len(task.resampled) for task in known)
    resampled = np.mean([task.resampled[:size] for task in known], axis=0)
    return float(np.mean([task.ratio for task in known])), bounds(resampled)


def bounds(resampled: Floats) -> Interval | None:
    """The middle 95%; None where an end is infinite."""
    low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975], method="inverted_cdf"))
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def _ratios(metric: Metric, before: Floats, after: Floats) -> Floats:
    """The share of the score that is left; infinite, for not known, where the score before is 0 or less."""
    top, bottom = (after, before) if metric.higher_is_better else (before, after)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = np.where((bottom > 0) & (before > 0), top / bottom, np.inf)
    return ratios


def _scores(metric: Metric, values: Sequence[Any], draws: Floats) -> Floats:
    """The metric on every resample, [resamples]."""
    if metric.name == MACRO_F1:
        return _macro_f1(values, draws)
    if metric.aggregate is None:
        means: Floats = draws @ np.asarray(values, dtype=float) / draws.sum(1)
        return means
    picks = (np.repeat(np.arange(len(values)), row.astype(int)).tolist() for row in draws)
    return np.array([float(metric.aggregate([values[i] for i in pick])) for pick in picks])


def _macro_f1(pairs: Sequence[tuple[Any, Any]], draws: Floats) -> Floats:
    """Mean F1 over the classes that occur in a resample, as right answer or as given one (scikit-learn's "macro")."""
    right = np.array([pair[0] for pair in pairs])
    given = np.array([pair[1] for pair in pairs])
    total, classes = np.zeros(len(draws)), np.zeros(len(draws))
    for one in sorted({*right.tolist(), *given.tolist()}):
        hits = draws @ ((right == one) & (given == one))
        occurs = draws @ ((right == one).astype(float) + (given == one))
        total += np.divide(2 * hits, occurs, out=np.zeros(len(draws)), where=occurs > 0)
        classes += occurs > 0
    mean: Floats = total / classes
    return mean
