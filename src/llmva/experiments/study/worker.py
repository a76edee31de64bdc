"""A process that measures cells of a study until none is left. Any number of them may share the folder.

A worker takes the cells of one model before it loads another. What another worker measures is left to it, and what
fails is left out with all that needs it, and told at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmva.edit import check_untouched
from llmva.errors import LlmvaError
from llmva.experiments.cells import Cells
from llmva.experiments.claims import Claimed
from llmva.experiments.compare import check_methods, comparison_identity, record_of
from llmva.experiments.comparison import Comparison, Row, cell_name
from llmva.experiments.measure import ExperimentSetup
from llmva.experiments.study.definition import Study, StudyModel, slug
from llmva.experiments.study.extras import measure_extra
from llmva.experiments.study.plan import Cell, Panel, plan
from llmva.experiments.summary import OURS
from llmva.files import write_json
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet

PAUSE = 1.0  # seconds between two looks at what others have finished


@dataclass
class Outcome:
    """What a worker did: titles of the cells that it measured, and sentences on those that failed."""

    measured: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Worker:
    """Measures cells of `study` in the folder `out`.

    Args:
        number: of this worker among those that begin together, so that they begin with different models.
        device: where models are loaded, as `load_model` takes it.
        demo: the folder of the bundled model.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        *,
        demo: str,
        number: int = 0,
        device: str = "auto",
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        for model in study.models:
            check_methods(model.methods)
        self.study, self.out, self.number = study, out, number
        self.demo, self.device, self.batch_tokens = demo, device, batch_tokens
        self.progress = progress or Progress()
        self.outcome = Outcome()
        self._cells = plan(study)
        self._open: _Open | None = None

    def run(self) -> Outcome:
        """Measure until every cell is finished, here or elsewhere, or cannot be."""
        try:
            while (ready := self._ready()) is not None:
                if not self._try(ready):
                    time.sleep(PAUSE)
        finally:
            self._close()
        return self.outcome

    def _ready(self) -> list[Cell] | None:
        """The cells that can be measured now, maybe by others; None when nothing is left to wait for."""
        done = finished(self.out, self._cells)
        blocked = {*self.outcome.failed}
        for cell in self._cells:  # what needs a cell comes after it
            if any(f"{cell.panel.folder}/{name}" in blocked for name in cell.needs):
                blocked.add(cell.title)
        left = [cell for cell in self._cells if cell.title not in done and cell.title not in blocked]
        if not left:
            return None
        ready = [cell for cell in left if all(f"{cell.panel.folder}/{name}" in done for name in cell.needs)]
        return sorted(ready, key=self._turn)

    def _turn(self, cell: Cell) -> tuple[bool, bool, int]:
        """The open model first, the open panel first of it, then the models in an order of this worker's own."""
        opened, models = self._open, [model.name for model in self.study.models]
        place = (models.index(cell.panel.model.name) - self.number) % len(models)
        if opened is None:
            return True, True, place
        same = cell.panel.model == opened.model
        return not same, not (same and cell.panel.folder in opened.panels), place

    def _try(self, cells: Sequence[Cell]) -> bool:
        """Measure the first of `cells` that no other process has; False if they have all."""
        for cell in cells:
            if (self.out / cell.panel.folder / "claims").is_dir() and self._is_claimed(cell):
                continue  # without loading the model for it
            try:
                self._measure(cell)
            except Claimed:
                continue
            except LlmvaError as error:
                self._fail(cell, str(error))
            return True
        return False

    def _fail(self, cell: Cell, sentence: str) -> None:
        """Leave a cell out; if its model cannot be loaded, all cells of the model."""
        self.progress.note(f"{cell.title} failed: {sentence}")
        lost = [cell] if self._open else [one for one in self._cells if one.panel.model == cell.panel.model]
        self.outcome.failed |= {one.title: sentence for one in lost}

    def _is_claimed(self, cell: Cell) -> bool:
        from llmva.experiments.claims import Claims

        return Claims(self.out / cell.panel.folder / "claims").holder(cell.name) is not None

    def _measure(self, cell: Cell) -> None:
        if self._open is None or self._open.model != cell.panel.model:
            self._close()
            self._open = _Open(self, cell.panel.model)
        comparison = self._open.comparison(cell.panel)
        self.progress.note(cell.title)
        before = len(comparison.cells.measured)
        measure_cell(self.study, comparison, cell, self._open.base, self.out)
        self.outcome.measured += [f"{cell.panel.folder}/{name}" for name in comparison.cells.measured[before:]]

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None


class _Open:
    """A loaded model and its comparisons by the folder of their panel."""

    def __init__(self, worker: Worker, model: StudyModel) -> None:
        self.worker, self.model = worker, model
        self.panels: dict[str, Comparison] = {}
        self._stack = ExitStack()
        place = worker.demo if model.path == "demo" and not Path("demo").exists() else model.path
        worker.progress.note(f"loading {model.name}")
        loaded, self.tokenizer = load_model(
            place,
            device=worker.device,
            dtype=model.dtype,
            device_map=model.device_map,
            quantize=model.quantize,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
            note=worker.progress.note,
        )
        self.settings = worker.study.settings_of(model)
        self.chat = ChatModel.of(loaded, self.tokenizer, worker.batch_tokens, system=self.settings.system)
        self.base = fingerprint(self.chat.decoder, model.name)
        check_untouched(loaded)
        self._stack.enter_context(at_rest(loaded))

    def comparison(self, panel: Panel) -> Comparison:
        if panel.folder not in self.panels:
            self.panels[panel.folder] = self._begin(panel)
        return self.panels[panel.folder]

    def _begin(self, panel: Panel) -> Comparison:
        from llmva.judges import make_judge

        study, settings, progress = self.worker.study, self.settings, self.worker.progress
        prompts, judge = prompts_of(panel, study.seeds[0]), make_judge(panel.judge.judge)
        identity = comparison_identity(self.chat, self.base, prompts, judge, settings, study.seeds[0], ())
        directory = self.worker.out / panel.folder
        cells = Cells(directory, identity, shared=True)
        setup = ExperimentSetup.of(self.chat, prompts, judge, settings, (), progress)
        setup.timed = False
        return Comparison(setup, cells, directory, list(study.seeds), settings.model_dump(), False, self.model.name)

    def close(self) -> None:
        self._stack.close()


def prompts_of(panel: Panel, seed: int) -> PromptSet:
    """The prompts of a panel."""
    data = panel.data
    if not (data.toxic or data.benign or data.data):
        return PromptSet.bundled()
    return PromptSet.load(
        data.toxic,
        data.benign,
        seed=seed,
        data=data.data,
        per_set=data.per_set,
        data_dir=data.data_dir,
        only=data.only,
    )


def measure_cell(study: Study, comparison: Comparison, cell: Cell, base: dict[str, Any], out: Path) -> None:
    """Measure one cell, whose needs are finished, and write it. Raises Claimed if another process is at it."""
    row, cells = cell.row, comparison.cells
    if cell.kind == "untouched":
        comparison.begin()
    elif cell.kind == "validation":
        comparison.choices.untouched()
    elif cell.kind == "labels":
        comparison.fit_prompts(cell.seed or 0)
    elif cell.kind == "table":
        cells.get(cell.name, lambda: _table(study, comparison, cell, base, out))
    elif row is not None and cell.kind == "options":
        if OURS in cell.panel.methods:
            comparison.budget = _budget(study, comparison)
        comparison.choice(row)
    elif row is not None and cell.kind == "method":
        options = comparison.choice(row)["options"]
        same = comparison.same_row(row, options)
        if same == row:
            comparison.cell(row, cell.seed, options)
        else:
            cells.get(cell.name, lambda: comparison.cell(same, cell.seed, options))
    elif row is not None:
        options = comparison.choice(row)["options"]
        same = comparison.same_row(row, options)

        def measured() -> dict[str, Any]:
            applied = comparison.fitted(same, cell.seed, options)(1.0)
            return measure_extra(study, comparison, cell, applied)

        cells.get(cell.name, measured)


def _budget(study: Study, comparison: Comparison) -> int:
    ours = cell_name(Row(OURS, None), study.seeds[0])
    path = Path(comparison.directory or ".") / "cells" / f"{ours}.json"
    return (
        int(comparison.cell(Row(OURS, None), study.seeds[0], {})["fit_answers"]) if path.exists() else comparison.budget
    )


def _table(study: Study, comparison: Comparison, cell: Cell, base: dict[str, Any], out: Path) -> dict[str, Any]:
    """compare.json and its pages beside the cells, as `llmva compare` writes them; nothing is measured for it."""
    from llmva.report import write_comparison

    directory = out / cell.panel.folder
    command = f"llmva study: {study.title}"
    record = record_of(comparison, cell.panel.methods, base, tuned=study.tuned, curves=False, command=command)
    write_json(directory / "compare.json", record, shared=True)
    write_comparison(directory)
    return {"rows": [row["method"] for row in record["rows"]], "limits": record["limits"]}


def finished(out: Path, cells: Sequence[Cell]) -> set[str]:
    """Titles of the cells that are on disk; one look at each folder."""
    return {title for folder in dict.fromkeys(cell.panel.folder for cell in cells) for title in _in_folder(out, folder)}


def _in_folder(out: Path, folder: str) -> Iterator[str]:
    with suppress(OSError), os.scandir(out / folder / "cells") as entries:
        yield from [f"{folder}/{entry.name[:-5]}" for entry in entries if entry.name.endswith(".json")]


def study_folder(study: Study) -> Path:
    """Where a study is kept unless another folder is named."""
    return Path(f"llmva-study-{slug(study.title)}")
