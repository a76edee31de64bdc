"""The records of comparisons and ablations: how they are read, what they were measured with, and their CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmva.report import pages
from llmva.report.estimates import Estimate
from llmva.report.values import count, finite, part

VERSION = 1
STYLES = ("style.css", "comparison.css")


def read_record(directory: Path, command: str, what: str) -> dict[str, Any]:
    """The record in `directory`/`command`.json, whose field `kind` must be `what`: "comparison" or "ablation".

    Raises:
        UsageError: no such file, not JSON, another kind of record, or one of a newer format.
    """
    article = "an" if what[0] in "aeiou" else "a"
    path = directory / f"{command}.json"
    return pages.read_record(path, command, f"{article} {what}", ("kind", what), ("format", VERSION))


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the study was measured with, as (name, value); only what is known."""
    base, counts = part(record, "base"), record.get("prompts")
    pairs: list[tuple[str, object]] = [
        ("Model", base.get("model")),
        ("Weights, SHA-256", base.get("sha256")),
        ("Architecture", base.get("model_type")),
        ("Stored as", base.get("dtype")),
        ("Judge", record.get("judge")),
        ("Seeds", _listed(record.get("seeds"))),
    ]
    for name, value in counts.items() if isinstance(counts, dict) else ():
        pairs.append((f"Prompts, {name}", None if finite(value) is None else count(value)))
    pairs += [("llmva", record.get("llmva")), *part(record, "versions").items()]
    return [(name, str(value)) for name, value in pairs if value is not None and not isinstance(value, (dict, list))]


def _listed(values: object) -> str | None:
    """[0, 1, 2] -> '0, 1, 2'."""
    return ", ".join(str(value) for value in values) if isinstance(values, list) and values else None


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """Rows as CSV with a header: the union of their keys in order of appearance, nothing where a value is not known."""
    import csv
    import io

    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return out.getvalue()


def csv_cells(name: str, value: Estimate) -> dict[str, object]:
    """Columns of one estimate: name_mean, name_spread, name_low, name_high."""
    low, high = value.interval or (None, None)
    return {f"{name}_mean": value.mean, f"{name}_spread": value.spread, f"{name}_low": low, f"{name}_high": high}
