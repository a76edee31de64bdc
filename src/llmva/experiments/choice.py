"""Choose the options of each baseline on validation prompts, never on test prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llmva.baselines import make_baseline
from llmva.baselines.base import STRENGTH
from llmva.baselines.tune import Trials, best
from llmva.experiments.cells import Cells, file_name
from llmva.experiments.measure import Applied, ExperimentSetup
from llmva.judges.base import Label
from llmva.method.observe import harmless_answers
from llmva.metrics.rates import point_rates
from llmva.models.harmless import agreement
from llmva.prompts.types import Prompt

Fitting = tuple[Sequence[Prompt], Sequence[Label]]
VALIDATION_TEXTS = 64  # maximum number of answers to benign prompts along which next tokens are compared


class Choices:
    """The options of baselines, each chosen once, with the fit prompts of `fitting` and with `seed`."""

    def __init__(
        self, setup: ExperimentSetup, cells: Cells, seed: int, fitting: Callable[[], Fitting], min_kept: float
    ) -> None:
        self.setup, self.cells, self.seed, self.fitting, self.min_kept = setup, cells, seed, fitting, min_kept
        self._trials: dict[str, Trials] = {}

    def paper(self, method: str) -> dict[str, Any]:
        """The settings of the method's paper, with the best magnitude.

        Returns:
            `options`; all that were `tried`, with their rates; and the cost in `answers` and `seconds`.
        """
        return self._choose(method, "paper", lambda trials: trials.run(make_baseline(method).sweep()))

    def tuned(self, method: str, budget: int) -> dict[str, Any]:
        """The best options if others are tried too, with at most `budget` more answers."""
        baseline = make_baseline(method)
        # if the chosen magnitude is far below the translated one, the paper's contrast does not steer this model; other
        # contrasts still may
        grid = baseline.grid(max(self.paper(method)["options"][STRENGTH], baseline.defaults[STRENGTH]))
        return self._choose(method, "tuned", lambda trials: trials.run(grid, budget), self.paper(method))

    def untouched(self) -> dict[str, Any]:
        """f1, asr, orr and garbled of the untouched model on the validation prompts, its labels and answers."""

        def measured() -> dict[str, Any]:
            seen = self.setup.observe(self.setup.prompts.validation, "untouched model: validation prompts")
            labels = [label.value for label in seen.labels]
            return {**point_rates(seen.prompts, seen.labels), "labels": labels, "answers": seen.capture.answers}

        return self.cells.get("none-validation", measured)

    def _kept(self, applied: Applied) -> float | None:
        """Share of next tokens kept along the untouched model's answers to benign validation prompts; or None."""
        untouched = self.untouched()
        texts = harmless_answers(self.setup.prompts.validation, untouched["labels"], untouched["answers"])
        if not texts:
            return None
        return agreement(self.setup.chat, texts[:VALIDATION_TEXTS], applied).mean_kept

    def _choose(
        self, method: str, setting: str, run: Callable[[Trials], int], before: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        before = before or {"tried": [], "answers": 0, "seconds": 0.0}

        def choose() -> dict[str, Any]:
            started = time.monotonic()
            trials = self._trials_of(method, before["tried"])
            spent = run(trials)
            return {
                "options": best(trials.rows, self.untouched(), self.min_kept),
                "tried": list(trials.rows),
                "answers": before["answers"] + spent,
                "seconds": round(before["seconds"] + time.monotonic() - started, 2),
            }

        return self.cells.get(f"{file_name(method, setting)}-options", choose)

    def _trials_of(self, method: str, tried: Sequence[dict[str, Any]]) -> Trials:
        if method not in self._trials:
            self._trials[method] = Trials(
                method,
                self.setup.chat,
                self.fitting(),
                self.setup.prompts.validation,
                self.setup.observe,
                torch.Generator().manual_seed(self.seed),
                self._kept,
                tried,
            )
        return self._trials[method]


def curve(tried: Sequence[Mapping[str, Any]], strength: float) -> list[dict[str, Any]]:
    """The sweep of magnitudes, as multiples of the chosen `strength`."""
    points = [
        {"strength": row["options"][STRENGTH] / strength, **{key: row[key] for key in ("f1", "asr", "orr")}}
        for row in tried
        if row["asr"] is not None
    ]
    return sorted(points, key=lambda point: float(point["strength"]))


def note(row: Mapping[str, Any], untouched: Mapping[str, Any] | None, held: float | None) -> str | None:
    """A sentence if a baseline does not lower the untouched model's ASR, or gives broken text; otherwise None.

    Args:
        row, untouched: rows of the comparison.
        held: the untouched model's ASR on validation prompts; None if unknown.
    """
    if row["method"] == "none" or untouched is None or row["asr"]["mean"] is None:
        return None
    before, after = untouched["asr"]["mean"], row["asr"]["mean"]
    if after >= before:
        said = f"Answers no fewer of the harmful prompts than the untouched model ({after:.3f}, {before:.3f})"
        return f"{said}: {_why(row['tried'], held)}" if row["tried"] and held is not None else f"{said}."
    if (row["garbled"]["mean"] or 0.0) > (untouched["garbled"]["mean"] or 0.0) + 0.05:
        return f"{row['garbled']['mean']:.1%} of its answers are broken text, which counts as refused nowhere."
    return None


def _why(tried: Sequence[Mapping[str, Any]], held: float) -> str:
    lower = [row for row in tried if row["asr"] is not None and row["asr"] < held]
    if not lower:
        return f"none of the {len(tried)} settings tried on validation prompts lowers that share there."
    lowest = min(lower, key=lambda row: float(row["asr"]))
    return (
        f"on validation prompts {len(lower)} of the {len(tried)} settings tried lower that share from {held:.3f}, the "
        f"lowest to {lowest['asr']:.3f} with {lowest['orr']:.1%} of the benign prompts refused."
    )
