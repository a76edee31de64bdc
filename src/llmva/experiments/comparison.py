"""The cells of a comparison: which there are, and how each is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmva.alignment import RunOptions, align
from llmva.baselines import BASELINES, make_baseline
from llmva.baselines.base import STRENGTH, Steering
from llmva.edit import Edit
from llmva.experiments.cells import Cells, file_name
from llmva.experiments.choice import Choices, curve
from llmva.experiments.measure import HARMLESS_TEXTS, Applied, ExperimentSetup
from llmva.experiments.summary import NONE, OURS, method_rates, title
from llmva.judges.base import Label
from llmva.method.observe import harmless_answers
from llmva.prompts.types import Prompt
from llmva.runs.limits import Tally

METHODS = (NONE, *BASELINES, OURS)
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
BUDGET = 3000  # maximum number of answers for tuning a baseline if our own method is not compared


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    method: str
    setting: str | None  # "paper" or "tuned"; None for methods that are not baselines

    @property
    def title(self) -> str:
        return title({"method": self.method, "setting": self.setting})


class Comparison:
    """The cells of one comparison, and their shared state."""

    def __init__(
        self,
        setup: ExperimentSetup,
        cells: Cells,
        directory: Path | None,
        seeds: list[int],
        settings: dict[str, Any],
        restart: bool,
    ) -> None:
        self.setup, self.cells, self.directory = setup, cells, directory
        self.seeds, self.settings, self.restart = seeds, settings, restart
        self.by_title: dict[str, list[dict[str, Any]]] = {}
        self.measured: dict[str, dict[str, Any]] = {}  # cells with test answers by name; two rows may share one
        self.extra: dict[str, dict[str, Any]] = {}  # by title: curve, options, what was tried
        self.budget = BUDGET
        self.choices = Choices(
            setup, cells, seeds[0], lambda: self._fit_prompts(seeds[0])[:2], float(settings["min_kept"])
        )
        self._fitted: dict[int, tuple[list[Prompt], list[Label], float]] = {}
        self.untouched = cells.get("none", lambda: setup.measure("untouched model", nullcontext, []))
        answered = harmless_answers(setup.prompts.test, self.untouched["labels"], self.untouched["answers"])
        self.harmless = answered[:HARMLESS_TEXTS]

    def tally(self) -> Tally:
        """Of the answers to test prompts."""
        return Tally.of_cells([self.untouched, *self.measured.values()])

    def rows_of(self, method: str, tuned: bool) -> list[Row]:
        if method in (NONE, OURS):
            return [Row(method, None)]
        return [Row(method, setting) for setting in (("paper", "tuned") if tuned else ("paper",))]

    def measure(self, row: Row, curves: bool) -> None:
        if row.method == NONE:
            kept = {"kept": 1.0, "kl": 0.0, "perplexity": 1.0} if self.harmless else {}
            cell = {**self.untouched, **kept, "seed": None, "fit_seconds": 0.0, "fit_answers": 0, "latency": 1.0}
            self.by_title[row.title] = [cell]
            self.extra[row.title] = {"options": {}, "curve": [], "tried": []}
            return
        choice = self._choice(row)
        options, strengths = choice["options"], curves and row.setting != "tuned"
        same = row
        if row.setting == "tuned" and options == self.extra[Row(row.method, "paper").title]["options"]:
            same = Row(row.method, "paper")  # no other options were better, so it is measured already
        measured, drawn = self._cells(same, options, strengths)
        # the cost of a choice is part of every fit that uses it
        cells = [
            {
                **cell,
                "fit_answers": cell["fit_answers"] + choice["answers"],
                "fit_seconds": round(cell["fit_seconds"] + choice["seconds"], 2),
            }
            for cell in measured
        ]
        if row.method == OURS:
            self.budget = cells[0]["fit_answers"]
        elif strengths:
            drawn = curve(choice["tried"], options[STRENGTH])
        self.by_title[row.title] = cells
        self.extra[row.title] = {"options": options, "curve": drawn, "tried": choice["tried"]}

    def _choice(self, row: Row) -> dict[str, Any]:
        if row.method == OURS:
            return {"options": {}, "tried": [], "answers": 0, "seconds": 0.0}
        if row.setting == "tuned":
            return self.choices.tuned(row.method, self.budget)
        return self.choices.paper(row.method)

    def _cells(self, row: Row, options: Mapping[str, Any], curves: bool) -> tuple[list[dict[str, Any]], list[Any]]:
        """The cells of a row, one per seed; for our own method also the curve of the first seed."""
        fits: dict[int, Callable[[float], Applied]] = {}  # fits made by this process

        def fit(seed: int) -> tuple[Callable[[float], Applied], dict[str, Any]]:
            applied, cost = self._fit(row, seed, options)
            fits[seed] = applied
            return applied, cost

        cells = []
        for seed in self.seeds:
            what = f"{row.title}, seed {seed}"

            def measured(seed: int = seed, what: str = what) -> dict[str, Any]:
                applied, cost = fit(seed)
                return {"seed": seed, **cost, **self.setup.measure(what, applied(1.0), self.harmless)}

            name = f"{file_name(row.method, row.setting)}-{seed}"
            self.measured[name] = self.cells.get(name, measured)
            cells.append(self.measured[name])
        if row.method != OURS or not curves:
            return cells, []
        first = self.seeds[0]

        def drawn() -> dict[str, Any]:
            applied = fits[first] if first in fits else fit(first)[0]
            return {"curve": self.setup.strengths(row.title, applied, STRENGTHS)}

        return cells, self.cells.get(f"{file_name(row.method, row.setting)}-curve", drawn)["curve"]

    def summary(self, row: Row) -> dict[str, Any]:
        """The row of compare.json, except for `versus` and `note`."""
        cells, test = self.by_title[row.title], self.setup.prompts.test
        before = self.untouched["skills"]

        def mean(key: str) -> float | None:
            known = [cell[key] for cell in cells if cell[key] is not None]
            return sum(known) / len(known) if known else None

        return {
            "method": row.method,
            "setting": row.setting,
            **self.extra[row.title],
            "runs": [
                {k: v for k, v in cell.items() if k not in ("labels", "answers")}
                | {"by_source": {s: f["mean"] for s, f in method_rates([cell], test)["by_source"].items()}}
                for cell in cells
            ],
            **method_rates(cells, test),
            "skills": {
                skill: {"before": right, "after": sum(cell["skills"][skill] for cell in cells) / len(cells)}
                for skill, right in before.items()
            },
            "cost": {key: mean(key) for key in ("fit_seconds", "fit_answers", "latency")}
            | {"latency_range": _spanned([cell["latency_range"] for cell in cells if cell.get("latency_range")])},
            "utility": {key: mean(key) for key in ("kept", "kl", "perplexity")},
        }

    def _fit(
        self, row: Row, seed: int, options: Mapping[str, Any]
    ) -> tuple[Callable[[float], Applied], dict[str, Any]]:
        """A function that applies the fitted method at a strength, and the cost of the fit."""
        if row.method == OURS:
            return self._fit_ours(seed)
        prompts, labels, answering = self._fit_prompts(seed)
        started = time.monotonic()
        self.setup.progress.stage(f"{row.title}, seed {seed}: fitting")
        steering: Steering = make_baseline(row.method, **options).fit(
            self.setup.chat, prompts, labels, _generator(seed)
        )

        def applied(strength: float) -> Applied:
            scaled = steering if strength == 1.0 else steering.scaled(strength)
            return lambda: scaled.applied(self.setup.chat.decoder)

        seconds = round(time.monotonic() - started + answering, 2)
        return applied, {"fit_seconds": seconds, "fit_answers": len(prompts)}

    def _fit_ours(self, seed: int) -> tuple[Callable[[float], Applied], dict[str, Any]]:
        setup = self.setup
        result = align(
            setup.chat.model,
            setup.chat.tokenizer,
            setup.prompts,
            judge=setup.judge,
            seed=seed,
            out=None if self.directory is None else self.directory / f"llmva-{seed}",
            restart=self.restart,
            batch_tokens=setup.chat.batching.tokens,
            progress=setup.progress,
            options=RunOptions(measure_test=False, thinking=setup.thinking),
            **self.settings,
        )
        edit: Edit = result.edit
        record = result.record

        def applied(strength: float) -> Applied:
            scaled = edit.scaled(strength) if strength != 1.0 and record["best_iteration"] else edit
            return lambda: _applied(scaled, setup)

        drawn = len(setup.prompts.draw(self.settings["per_source"], _generator(seed)))
        answers = len(record["iterations"]) * (drawn + len(setup.prompts.validation))
        return applied, {
            "fit_seconds": record["cost"]["fit_seconds"],
            "fit_answers": answers,
            "iteration": record["best_iteration"],
            "iterations": len(record["iterations"]) - 1,
            "stopped": record["stopped"],
        }

    def _fit_prompts(self, seed: int) -> tuple[list[Prompt], list[Label], float]:
        """The training prompts for baselines, the untouched model's labels of them, and the seconds that these took."""
        if seed not in self._fitted:
            prompts = self.setup.prompts.draw(self.settings["per_source"], _generator(seed))

            def answered() -> dict[str, Any]:
                started = time.monotonic()
                seen = self.setup.observe(prompts, f"fit prompts, seed {seed}")
                labels = [label.value for label in seen.labels]
                return {"labels": labels, "seconds": round(time.monotonic() - started, 2)}

            cell = self.cells.get(f"fit-{seed}", answered)
            self._fitted[seed] = (prompts, [Label(label) for label in cell["labels"]], cell["seconds"])
        return self._fitted[seed]


def _spanned(ranges: Sequence[Sequence[float]]) -> list[float] | None:
    """The smallest range that holds all `ranges`; None without any."""
    return [min(low for low, _ in ranges), max(high for _, high in ranges)] if ranges else None


def _applied(edit: Edit, setup: ExperimentSetup) -> AbstractContextManager[Any]:
    return edit.apply(setup.chat.model, check=False)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
