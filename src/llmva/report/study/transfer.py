"""Attacks, and sets on which nothing was fitted, as tables of a study: the layout of the paper's Table 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmva.report.study.grids import Grid, panel_name
from llmva.report.values import dicts, finite, part, score, share

SIDES = (("asr", "ASR"), ("orr", "ORR"))
Column = tuple[str, str]  # a set or an attack, and the field of its rate


def attack_grid(record: dict[str, Any]) -> Grid | None:
    """ASR and ORR of each attack, attack by attack."""
    rows = list(_measured(record, "attack"))
    names = dict.fromkeys(name for _, row in rows for name in part(row, "attack"))
    columns = _known([(name, rate) for name in names for rate, _ in SIDES], rows, "attack")
    if not rows:
        return None
    lines = tuple((model, str(row.get("title")), *_shares(row, "attack", columns)) for model, row in rows)
    about = "The test prompts as each attack asks them."
    return Grid("attack", "Under attacks", about, ("Model", "Method", *map(_head, columns)), lines, 2)


def transfer_grid(record: dict[str, Any]) -> Grid | None:
    """Harmful sets by ASR, then benign ones by ORR, then F1 over all; what was published stands below what we measured.

    A published row of a method that was not measured on such sets is left out.
    """
    rows = list(_measured(record, "transfer"))
    names = dict.fromkeys(name for _, row in rows for name in part(row, "transfer"))
    columns = _known([(name, rate) for rate, _ in SIDES for name in names], rows, "transfer")
    if not rows:
        return None
    lines: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for model, row in rows:
        title, f1 = str(row.get("title")), finite(row.get("transfer_f1"))
        others = [finite(other.get("transfer_f1")) for name, other in rows if name == model]
        if f1 is not None and len(others) > 1 and f1 == max(value for value in others if value is not None):
            best.add((len(lines), 2 + len(columns)))
        lines.append((model, title, *_shares(row, "transfer", columns), score(f1)))
        told = part(row, "published")
        if part(told, "transfer"):
            cells = _shares(told, "transfer", columns)
            lines.append((model, f"{title} (published)", *cells, score(finite(told.get("transfer_f1")))))
    about = (
        "Sets on which no method was fitted or chosen: harmful ones by the share answered, benign ones by the share "
        "refused, and F1 over the prompts of all of them, the best measured one of each model marked."
    )
    if len(lines) > len(rows):
        about += (
            " Published rows are of others, with their prompts, judge and settings: figures to stand beside, no test."
        )
    heads = ("Model", "Method", *map(_head, columns), "F1")
    return Grid("transfer", "Transfer", about, heads, tuple(lines), 2, frozenset(best))


def _measured(record: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Model and row of each method that was measured so."""
    for panel in dicts(record.get("panels")):
        for row in dicts(panel.get("rows")):
            if part(row, key):
                yield panel_name(record, panel), row


def _known(columns: Sequence[Column], rows: Sequence[tuple[str, dict[str, Any]]], key: str) -> list[Column]:
    """The columns with a rate in some row: most sets have one side."""
    return [one for one in columns if any(_rate(row, key, one) is not None for _, row in rows)]


def _shares(row: dict[str, Any], key: str, columns: Sequence[Column]) -> list[str]:
    return [share(_rate(row, key, column)) for column in columns]


def _rate(row: dict[str, Any], key: str, column: Column) -> float | None:
    name, rate = column
    return finite(part(row, key, name).get(rate))


def _head(column: Column) -> str:
    name, rate = column
    return f"{name} {dict(SIDES)[rate]}"
