"""The plan of a study for a terminal: its models, kinds of cells, and what they will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmva.report.fitting import Fitting
from llmva.report.values import DASH, counted, dicts, finite, part, printable, scaled, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TOKENS = ("", "thousand", "million", "billion")


def plan_table(plan: dict[str, Any]) -> list[RenderableType]:
    """A row for each model and kind of cell, then the sums. Tokens are the most that may be needed."""
    total = part(plan, "totals")
    cells = int(finite(total.get("cells")) or 0)
    hours = finite(total.get("hours"))
    said = (
        f"{counted(cells, 'cell')}, {plan.get('finished')} finished: at most {scaled(total.get('tokens'), TOKENS)} "
        f"tokens{'' if hours is None else f', {hours:.1f} hours on one device'}, "
        f"{size(total.get('memory_bytes'))} of memory for the largest model. "
        f"Cells are kept in {plan.get('folder')}."
    )
    return [Fitting([lambda: _table(plan)], [""]), printable(said)]


def _table(plan: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in dicts(plan.get("cells")):
        groups.setdefault((str(row.get("model")), str(row.get("kind"))), []).append(row)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("model", "cells of the kind"):
        table.add_column(head)
    for head in ("number", "tokens", "memory", "hours"):
        table.add_column(head, justify="right", no_wrap=True)
    for (model, kind), rows in groups.items():
        tokens, hours = _sum(rows, "tokens"), _sum(rows, "hours")
        texts = (
            model,
            kind,
            str(len(rows)),
            scaled(tokens, TOKENS),
            size(rows[0].get("memory_bytes")),
            DASH if hours is None else f"{hours:.2f}",
        )
        table.add_row(*(Text(printable(text)) for text in texts))
    return table


def _sum(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [finite(row.get(key)) for row in rows]
    return None if None in values else sum(value or 0.0 for value in values)
