"""The cells of a study, each with the cells that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from llmva.baselines import BASELINES
from llmva.experiments.cells import file_name
from llmva.experiments.comparison import Row, cell_name, rows_of, seeds_of
from llmva.experiments.study.definition import Study, StudyData, StudyJudge, StudyModel, slug
from llmva.experiments.summary import NONE, OURS

Kind = Literal["untouched", "validation", "labels", "options", "method", "attack", "transfer", "utility", "table"]
TABLE = "table"


@dataclass(frozen=True)
class Panel:
    """One model with one data set and one judge: a comparison, in a folder of its own."""

    model: StudyModel
    data: StudyData
    judge: StudyJudge
    methods: tuple[str, ...]

    @property
    def folder(self) -> str:
        return "--".join(slug(part.name) for part in (self.model, self.data, self.judge))


@dataclass(frozen=True)
class Cell:
    """A part of a study that is measured at once. `name` and `needs` are names of cells of the same panel."""

    panel: Panel
    name: str
    kind: Kind
    needs: tuple[str, ...] = ()
    row: Row | None = None
    seed: int | None = None
    what: str = ""  # the attack, the data set or the task

    def path(self, out: Path) -> Path:
        """Where it is once it is finished."""
        return out / self.panel.folder / "cells" / f"{self.name}.json"

    @property
    def title(self) -> str:
        return f"{self.panel.folder}/{self.name}"


def panels(study: Study) -> list[Panel]:
    """Every model with every data set and judge, those of one model together."""
    return [
        Panel(model, data, judge, tuple(dict.fromkeys((*study.methods, *model.methods))))
        for model, data, judge in product(study.models, study.data, study.judges)
    ]


def plan(study: Study) -> list[Cell]:
    """All cells of a study; each comes after those that it needs."""
    return [cell for panel in panels(study) for cell in _of_panel(study, panel)]


def _of_panel(study: Study, panel: Panel) -> Iterator[Cell]:
    core = list(_core(study, panel))
    yield from core
    yield Cell(panel, TABLE, "table", tuple(cell.name for cell in core))
    yield from _extras(study, panel, core)


def _core(study: Study, panel: Panel) -> Iterator[Cell]:
    """What a comparison consists of."""
    baselines = [method for method in panel.methods if method in BASELINES]
    first = study.seeds[0]
    yield Cell(panel, NONE, "untouched", row=Row(NONE, None))
    if baselines:
        yield Cell(panel, "none-validation", "validation")
        yield from (Cell(panel, f"fit-{seed}", "labels", seed=seed) for seed in study.seeds)
    # our own method first: its answers are the baselines' budget
    for method in sorted(panel.methods, key=lambda method: method != OURS):
        for row in rows_of(method, study.tuned) if method != NONE else ():
            needs = [NONE]
            if row.setting is not None:
                options = f"{file_name(method, row.setting)}-options"
                before = ["none-validation", f"fit-{first}"]
                if row.setting == "tuned":
                    before += [f"{file_name(method, 'paper')}-options"]
                    before += [f"{OURS}-{first}"] * (OURS in panel.methods)
                yield Cell(panel, options, "options", tuple(before), row)
                needs.append(options)
            for seed in seeds_of(method, study.seeds):
                own = [f"fit-{seed}"] * (method in BASELINES)
                own += [cell_name(Row(method, "paper"), seed)] * (row.setting == "tuned")
                yield Cell(panel, cell_name(row, seed), "method", (*needs, *own), row, seed)


def _extras(study: Study, panel: Panel, core: Sequence[Cell]) -> Iterator[Cell]:
    """Further figures of each fitted method."""
    kinds: tuple[tuple[Literal["attack", "transfer", "utility"], tuple[str, ...]], ...] = (
        ("attack", study.attacks),
        ("transfer", study.transfer),
        ("utility", study.utility),
    )
    for cell in core:
        if cell.kind in ("untouched", "method"):
            for kind, names in kinds:
                for what in names:
                    name = f"{cell.name}+{kind}-{slug(what.partition('=')[0])}"
                    yield Cell(panel, name, kind, (*cell.needs, cell.name), cell.row, cell.seed, what)
