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
from llmva.errors import UsageError
from llmva.experiments.cells import Cells, file_name
from llmva.experiments.choice import Choices, curve
from llmva.experiments.measure import HARMLESS_TEXTS, Applied, ExperimentSetup
from llmva.experiments.published import Published, is_published, load_published
from llmva.experiments.summary import NONE, OURS, method_rates, title
from llmva.judges.base import Label
from llmva.method.context import Texts
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


def cell_name(row: Row, seed: int | None) -> str:
    """The name of the cell of a row and a seed."""
    return file_name(row.method, row.setting) + ("" if seed is None else f"-{seed}")


def seeds_of(method: str, seeds: Sequence[int]) -> list[int | None]:
    """The seeds with which a method is fitted; None stands for no fit."""
    return [None] if method == NONE or is_published(method) else list(seeds)


def rows_of(method: str, tuned: bool) -> list[Row]:
    """The rows of a method: one for each setting of a baseline."""
    if method not in BASELINES:
        return [Row(method, None)]
    return [Row(method, setting) for setting in (("paper", "tuned") if tuned else ("paper",))]


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
        base: str,
    ) -> None:
        self.base = base  # what the model is called
        self._published: dict[str, Published] = {}
        self.setup, self.cells, self.directory = setup, cells, directory
        self.seeds, self.settings, self.restart = seeds, settings, restart
        self.by_title: dict[str, list[dict[str, Any]]] = {}
        self.measured: dict[str, dict[str, Any]] = {}  # cells with test answers by name; two rows may share one
        self.extra: dict[str, dict[str, Any]] = {}  # by title: curve, options, what was tried
        self.budget = BUDGET
        self._fits: dict[tuple[str, int | None], Callable[[float], Applied]] = {}  # made by this process
        self.choices = Choices(
            setup, cells, seeds[0], lambda: self.fit_prompts(seeds[0])[:2], float(settings["min_kept"])
        )
        self._fitted: dict[int, tuple[list[Prompt], list[Label], float]] = {}

    @cached_property
    def untouched(self) -> dict[str, Any]:
        """The cell of the untouched model."""
        return self.cells.get(NONE, lambda: self.setup.measure("untouched model", nullcontext, []))

    def begin(self) -> None:
        """Measure the untouched model, with which all methods are compared."""
        _ = self.untouched

    @cached_property
    def harmless(self) -> Texts:
        """What the untouched model answered to benign test prompts, along which methods are compared with it."""
        seen = self.untouched
        return harmless_answers(self.setup.prompts.test, seen["labels"], seen["answers"])[:HARMLESS_TEXTS]

    @property
    def _same_time(self) -> float | None:
        return 1.0 if self.setup.timed else None

    def tally(self) -> Tally:
        """Of the answers to test prompts."""
        return Tally.of_cells([self.untouched, *self.measured.values()])

    def measure(self, row: Row, curves: bool) -> None:
        if row.method == NONE:
            kept = {"kept": 1.0, "kl": 0.0, "perplexity": 1.0} if self.harmless else {}
            cell = {
                **self.untouched,
                **kept,
                "seed": None,
                "fit_seconds": 0.0,
                "fit_answers": 0,
                "latency": self._same_time,
            }
            self.by_title[row.title] = [cell]
            self.extra[row.title] = {"options": {}, "curve": [], "tried": []}
            return
        choice = self.choice(row)
        options, strengths = choice["options"], curves and row.setting != "tuned"
        same = self.same_row(row, options)
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
        elif strengths and row.method in BASELINES:
            drawn = curve(choice["tried"], options[STRENGTH])
        self.by_title[row.title] = cells
        self.extra[row.title] = {"options": options, "curve": drawn, "tried": choice["tried"]}

    def choice(self, row: Row) -> dict[str, Any]:
        """The options of a row and what their choice took, from its cell for a baseline."""
        if row.method not in BASELINES:
            about = self.published(row.method).about if is_published(row.method) else {}
            return {"options": about, "tried": [], "answers": 0, "seconds": 0.0}
        if row.setting == "tuned":
            return self.choices.tuned(row.method, self.budget)
        return self.choices.paper(row.method)

    def _cells(self, row: Row, options: Mapping[str, Any], curves: bool) -> tuple[list[dict[str, Any]], list[Any]]:
        """The cells of a row, one per seed; for our own method also the curve of the first seed."""
        self._fits.clear()
        cells = [self.cell(row, seed, options) for seed in seeds_of(row.method, self.seeds)]
        if row.method != OURS or not curves:
            return cells, []
        first = self.seeds[0]

        def drawn() -> dict[str, Any]:
            applied = self.fitted(row, first, options)
            return {"curve": self.setup.strengths(row.title, applied, STRENGTHS)}

        return cells, self.cells.get(f"{file_name(row.method, row.setting)}-curve", drawn)["curve"]

    def same_row(self, row: Row, options: Mapping[str, Any]) -> Row:
        """The row whose cells are those of `row`: the paper's, if tuning found no better options than its."""
        paper = Row(row.method, "paper")
        return paper if row.setting == "tuned" and options == self.choice(paper)["options"] else row

    def cell(self, row: Row, seed: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """A fit of a method with one seed, measured on the test prompts."""
        what = row.title if seed is None else f"{row.title}, seed {seed}"

        def measured() -> dict[str, Any]:
            applied, cost = self._fit(row, seed, options)
            self._fits[row.title, seed] = applied
            return {
                "seed": seed,
                **cost,
                **self.setup.measure(what, applied(1.0), self.harmless),
            }

        name = cell_name(row, seed)
        cell = self.cells.get(name, measured)
        if any(cell.get(key) != value for key, value in self._content(row).items()):
            raise UsageError(f"{row.method} has changed since it was measured: pass --restart, or another --out.")
        self.measured[name] = cell
        return cell

    def _content(self, row: Row) -> dict[str, Any]:
        """What a cell must say of published weights to be of these."""
        return {"sha256": self.published(row.method).about["sha256"]} if is_published(row.method) else {}

    def fitted(self, row: Row, seed: int | None, options: Mapping[str, Any]) -> Callable[[float], Applied]:
        """What applies a method at a strength; it is fitted again unless this process has just done so."""
        key = (row.title, seed)
        if key not in self._fits:
            self._fits[key] = self._fit(row, seed, options)[0]
        return self._fits[key]

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

    def published(self, method: str) -> Published:
        """What a method's name leads to, read once."""
        if method not in self._published:
            self._published[method] = load_published(method, self.setup.chat, self.base, self.setup.progress)
            for sentence in self._published[method].notes:
                self.setup.progress.note(sentence)
        return self._published[method]

    def _fit(
        self, row: Row, seed: int | None, options: Mapping[str, Any]
    ) -> tuple[Callable[[float], Applied], dict[str, Any]]:
        """A function that applies the fitted method at a strength, and the cost of the fit."""
        if seed is None:
            one = nullcontext if row.method == NONE else self.published(row.method).applied
            return lambda strength: one, {"fit_seconds": 0.0, "fit_answers": 0, **self._content(row)}
        if row.method == OURS:
            return self._fit_ours(seed)
        prompts, labels, answering = self.fit_prompts(seed)
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

    def fit_prompts(self, seed: int) -> tuple[list[Prompt], list[Label], float]:
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
