"""Estimates of rates: a mean with its spread over seeds and its interval over prompts, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmva.report.values import Interval, finite, interval, score, share


@dataclass(frozen=True)
class Estimate:
    """A rate or score in [0, 1]: mean and sample standard deviation over seeds, 95% interval over prompts.

    None stands for what is not known.
    """

    mean: float | None = None
    spread: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Unit:
    """How estimates of one kind are written: `text` the mean, `bare` the ends of the interval and the spread."""

    text: Callable[[float | None], str]
    bare: Callable[[float], str]

    def spread(self, value: Estimate) -> str:
        """'±1.2', or '' where the spread is not known."""
        return "" if value.spread is None else f"±{self.bare(value.spread)}"

    def bracket(self, value: Estimate) -> str:
        """'[38.2, 57.6]', or '' where there is no interval."""
        return "" if value.interval is None else f"[{self.bare(value.interval[0])}, {self.bare(value.interval[1])}]"

    def words(self, value: Estimate) -> str:
        """All that is known of an estimate on one line: '48.0% [38.2, 57.6] ±1.2'."""
        return " ".join(filter(None, (self.text(value.mean), self.bracket(value), self.spread(value))))


SCORE = Unit(score, lambda value: f"{value:.3f}")
SHARE = Unit(share, lambda value: f"{100 * value:.1f}")
MEASURES = (("f1", "F1", SCORE), ("asr", "ASR", SHARE), ("orr", "ORR", SHARE))


def estimate(value: object) -> Estimate:
    """An Estimate from {"mean", "spread", "interval"}, or from a bare number, which is a mean.

    What cannot be a share, an F1 or their spread counts as not known.
    """
    fields = value if isinstance(value, dict) else {"mean": value}
    mean, spread = (_in_unit(finite(fields.get(key))) for key in ("mean", "spread"))
    return Estimate(mean, spread, interval([_in_unit(finite(end)) for end in _pair(fields.get("interval"))]))


def _in_unit(value: float | None) -> float | None:
    return value if value is not None and 0 <= value <= 1 else None


def _pair(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def number(value: object) -> float | None:
    """A number of any size, from itself or from {"mean": ...}."""
    return finite(value.get("mean")) if isinstance(value, dict) else finite(value)
