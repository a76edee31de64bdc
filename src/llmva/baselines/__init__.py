"""The baselines: steering methods behind one interface, those that the paper compares with and two-sided ones.

All steer towards safety and usefulness only.
"""

from __future__ import annotations

from typing import Any

from llmva.baselines.adasteer import AdaSteer
from llmva.baselines.alphasteer import AlphaSteer, AlphaSteerPlus
from llmva.baselines.base import Baseline, Steering
from llmva.baselines.cast import Cast
from llmva.baselines.scans import Scans
from llmva.baselines.surgical import Surgical
from llmva.baselines.vectorsteer import VectorSteer
from llmva.errors import UsageError

_BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline for baseline in (VectorSteer, AlphaSteer, AlphaSteerPlus, Scans, Cast, Surgical, AdaSteer)
}
BASELINES = tuple(_BASELINES)


def make_baseline(name: str, **options: Any) -> Baseline:
    """A baseline by name, with its paper's settings except for `options`. Raises UsageError for unknown ones."""
    if name not in _BASELINES:
        raise UsageError(f"There is no baseline '{name}': choose among {', '.join(BASELINES)}.")
    return _BASELINES[name](**options)


__all__ = ["BASELINES", "Baseline", "Steering", "make_baseline"]
