"""The front of a run: all points measured on validation prompts, each of which can ship without a new run.

A point is an iteration of the edit at a strength. It is on the front if no other point is at least as good in three
metrics and better in one: harmful prompts answered, benign prompts refused, and divergence on harmless text. As in F1,
a garbled answer to a harmful prompt counts as answered, because a model that breaks down is not safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.errors import UsageError

RATES = ("f1", "asr", "orr", "garbled", "kept", "kl", "perplexity")


def find_front(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a run from its run.json, numbered in the order of iteration and strength."""
    best, best_strength = record["best_iteration"], record.get("best_strength", 1.0)
    pairs = [((e["iteration"], 1.0), e) for e in record["iterations"] if not e.get("undone")]
    known = {pair for pair, _ in pairs}
    # strength 0 is the untouched model, which iteration 0 is already, unless the run extends another
    same = 1.0 if record.get("extends") else 0.0
    pairs += [
        ((best, row["strength"]), row)
        for row in record.get("strengths", [])
        if (best, row["strength"]) not in known and (row["strength"] or same)
    ]
    rows: list[dict[str, Any]] = [
        {
            "iteration": iteration,
            "strength": strength,
            **{name: rates.get(name) for name in RATES},
            **({"predicted": True} if rates.get("predicted") else {}),
        }
        for (iteration, strength), rates in sorted(pairs, key=lambda pair: pair[0])
    ]
    return [
        {
            "point": k,
            **row,
            "on_front": _whole(row) and not any(_dominates(other, row) for other in rows),
            "chosen": (row["iteration"], row["strength"]) == (best, best_strength),
        }
        for k, row in enumerate(rows)
    ]


def find_point(record: Mapping[str, Any] | None, number: int, where: object) -> tuple[int, float]:
    """Iteration and strength of a point. Raises UsageError if the run has no point of that number."""
    rows: Sequence[Mapping[str, Any]] = (record or {}).get("front") or []
    if not rows:
        raise UsageError(f"'{where}' has no points: only a finished run of this version of llmva has; use --iteration.")
    if not 0 <= number < len(rows):
        raise UsageError(f"'{where}' has points 0 to {len(rows) - 1}: choose --point among what llmva front shows.")
    return int(rows[number]["iteration"]), float(rows[number]["strength"])


def _whole(row: Mapping[str, Any]) -> bool:
    return row["asr"] is not None and row["orr"] is not None


def _cost(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """The three metrics; smaller is better. If no harmless text could be compared, the divergence counts as 0."""
    return float(row["asr"]) + float(row["garbled"] or 0.0), float(row["orr"]), float(row["kl"] or 0.0)


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if not _whole(one):
        return False
    first, second = _cost(one), _cost(other)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))
