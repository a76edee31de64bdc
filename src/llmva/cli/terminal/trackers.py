"""`--log`: iterations, figures and the final table of a run go to the tracker that people have, too.

A `Tracked` stands where the display does and passes everything on to it. The trackers keep their own rules on where
their data lies and who may read it; nothing of a prompt or an answer is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from llmva.errors import LlmvaError, UsageError
from llmva.progress import Progress
from llmva.report.run.rows import Row, comparison, endings, perplexity, skills, utility
from llmva.report.run.truth import truth_rows

COLUMNS = ("", "n", "before", "after")
TABLE = "test prompts"


class Tracker(Protocol):
    """What is used of a tracking library."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of an iteration."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The before/after table."""

    def finish(self) -> None:
        """Everything has been sent."""


class Tracked(Progress):
    """A display that also sends figures to a tracker."""

    def __init__(self, display: Progress, tracker: Tracker) -> None:
        self.display, self.tracker = display, tracker

    def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Callable[[int], None]:
        return self.display.stage(text, total, unit)

    def note(self, text: str) -> None:
        self.display.note(text)

    def iteration(self, record: Mapping[str, Any], best: int, limit: int) -> None:
        self.display.iteration(record, best, limit)
        figures = {f"validation/{name}": value for name, value in record.items() if _is_number(value)}
        step = int(figures.pop("validation/iteration"))
        self.tracker.log({**figures, "best_iteration": float(best)}, step)

    def result(self, record: Mapping[str, Any]) -> None:
        """The figures of a finished run, and its table."""
        run = dict(record)
        rows = [*comparison(run), *truth_rows(run), *utility(run), *perplexity(run), *endings(run), *skills(run)]
        figures = {
            f"{when}/{_name(rows, i)}": value
            for i, row in enumerate(rows)
            for when, value in (("before", row.before), ("after", row.after))
            if value is not None
        }
        self.tracker.log(figures, len(record["iterations"]))
        self.tracker.table(COLUMNS, [_cells(row) for row in rows])


@contextmanager
def tracked(display: Progress, name: str | None, directory: Path, model: str) -> Iterator[Tracked]:
    """The display, which during the block also sends to the tracker `name`; None: to none.

    Project "llmva", run after the folder and the model. What a tracker prints goes to stderr, since results own stdout.

    Raises:
        UsageError: as `check_tracker`.
        LlmvaError: the tracker does not start; the work has not begun.
    """
    if name is None:
        yield Tracked(display, _Nothing())
        return
    check_tracker(name)
    with redirect_stdout(sys.stderr):
        try:
            tracker = TRACKERS[name](directory.resolve().name, {"model": model, "folder": str(directory)})
        except Exception as error:  # each has errors of its own: no account, no network, no disk
            reason = " ".join(str(error).split())[:300]
            raise LlmvaError(f"{name} does not start ({reason}): mend that, or leave --log out.") from error
    quietly = _Quietly(tracker, display)
    try:
        yield Tracked(display, quietly)
    finally:
        quietly.finish()


def check_tracker(name: str | None) -> None:
    """Raises UsageError for a tracker that is unknown or not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(f"There is no tracker '{name}': choose --log {', '.join(TRACKERS)}.")
    if find_spec(name) is None:
        raise UsageError(f"{name} is not installed: pip install '{PACKAGES[name]}', or leave --log out.")


class _Nothing:
    """No tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...

    def finish(self) -> None: ...


class _Quietly:
    """A tracker whose failures end no run: the first is told, and nothing more is sent."""

    def __init__(self, tracker: Tracker, display: Progress) -> None:
        self.tracker, self.display, self.failed = tracker, display, False

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._send(lambda: self.tracker.log(figures, step))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._send(lambda: self.tracker.table(columns, rows))

    def finish(self) -> None:
        self._send(self.tracker.finish)

    def _send(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            with redirect_stdout(sys.stderr):
                work()
        except Exception as error:  # a run of hours is worth more than its tracking
            self.failed = True
            reason = " ".join(str(error).split())[:300]
            self.display.note(
                f"The tracker takes nothing more ({reason}). The run goes on and keeps everything itself."
            )


class _Trackio:
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="llmva", name=name, config=dict(config), resume="allow", embed=False)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(figures), step=step)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        import pandas

        self.trackio.log({TABLE: self.trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(columns)))})

    def finish(self) -> None:
        self.trackio.finish()


class _Wandb:
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project="llmva", name=name, id=name, config=dict(config), resume="allow")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.run.log({TABLE: self.wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def finish(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment("llmva")
        mlflow.start_run(run_name=name)
        mlflow.log_params(dict(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({name.replace(",", ""): value for name, value in figures.items()}, step=step)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.mlflow.log_dict({"columns": list(columns), "rows": [list(row) for row in rows]}, "test-prompts.json")

    def finish(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[str, Mapping[str, Any]], Tracker]] = {
    "trackio": _Trackio,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
PACKAGES = {"trackio": "llmva[trackio]", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(rows: Sequence[Row], i: int) -> str:
    """A row's name, after that of the row to which it belongs."""
    above = next((row for row in reversed(rows[:i]) if row.level == 0), None) if rows[i].level else None
    return f"{above.name}, {rows[i].name}" if above else rows[i].name


def _cells(row: Row) -> list[str]:
    return ["  " * row.level + row.name, "" if row.n is None else str(row.n), row.before_cell, row.after_cell]
