"""Where two runs of the same prompts and settings part, in the order in which a run computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.runs.record import read_answers, read_run
from llmva.settings import excerpt

SHOWN = 60  # letters of an answer
# of run.json: what a run measures, in this order; seconds, memory and versions are not of it
FOUND = ("stopped", "best_iteration", "strengths", "best_strength", "test", "utility", "front")
FIGURES = ("f1", "asr", "orr", "garbled", "unjudged", "kept", "kl", "perplexity", "foretold", "passes", "foreseen")
Rows = Mapping[tuple[int, str], list[Mapping[str, Any]]]  # lines of answers.jsonl by iteration and split


@dataclass(frozen=True)
class Parting:
    """The first difference of two runs; `what` is prompts, answers, figures, edit or end."""

    iteration: int | None  # None at the end of the run
    what: str
    sentence: str


@dataclass(frozen=True)
class Alike:
    """How far two runs are the same.

    `same_bytes` tells of edit.safetensors and answers.jsonl. `other_answers` and `other_labels` count lines of the
    latter; an answer that only one of the runs has is other. `largest` is the largest difference of a number in the
    edits' factors, divided by the largest number there; None where their shapes differ.
    """

    same_bytes: Mapping[str, bool]
    answers: int
    other_answers: int
    other_labels: int
    largest: float | None
    first: Parting | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs that a run computes."""
        return self.first is None and all(self.same_bytes.values())

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare_runs(before: Path, after: Path) -> Alike:
    """Compare the runs in two folders. Raises UsageError or LlmvaError where one cannot be read."""
    (old, old_rows), (new, new_rows) = (_read(folder) for folder in (before, after))
    keys = [*old_rows, *(key for key in new_rows if key not in old_rows)]
    pairs = [pair for key in keys for pair in _paired(old_rows.get(key, []), new_rows.get(key, []))]
    edits = [Edit.load(folder) for folder in (before, after)]
    files = {
        "edit.safetensors": [edit_file(folder).read_bytes() for folder in (before, after)],
        "answers.jsonl": [
            (folder / "answers.jsonl").read_bytes()[: record["answers_bytes"]]
            for folder, record in ((before, old), (after, new))
        ],
    }
    return Alike(
        same_bytes={name: one == other for name, (one, other) in files.items()},
        answers=sum(len(rows) for rows in old_rows.values()),
        other_answers=sum(a is None or b is None or a["answer"] != b["answer"] for a, b in pairs),
        other_labels=sum(a is None or b is None or a["label"] != b["label"] for a, b in pairs),
        largest=_largest(*edits),
        first=_first((old, old_rows, edits[0]), (new, new_rows, edits[1])),
    )


def _read(folder: Path) -> tuple[dict[str, Any], Rows]:
    record = read_run(folder)
    rows: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in read_answers(folder, record):
        rows.setdefault((row["iteration"], row["split"]), []).append(row)
    return record, rows


def _paired(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """The lines of the same prompts, None where one run has none."""
    by_id = {row["id"]: row for row in new}
    known = {row["id"] for row in old}
    return [(row, by_id.get(row["id"])) for row in old] + [(None, row) for row in new if row["id"] not in known]


def _first(old: tuple[dict[str, Any], Rows, Edit], new: tuple[dict[str, Any], Rows, Edit]) -> Parting | None:
    entries = old[0]["iterations"], new[0]["iterations"]
    for t in range(max(map(len, entries))):
        for split in ("train", "validation"):
            if parting := _first_answer(t, split, old[1].get((t, split), []), new[1].get((t, split), [])):
                return parting
        figures = [_figures(entry[t]) if t < len(entry) else None for entry in entries]
        if said := _first_value(figures[0], figures[1], f"iteration {t}"):
            return Parting(t, "figures", said)
        if said := _first_column(t + 1, old[2], new[2]):
            return Parting(t, "edit", said)
    chosen = old[0]["best_iteration"]
    for t in sorted({0, chosen}):
        if parting := _first_answer(t, "test", old[1].get((t, "test"), []), new[1].get((t, "test"), [])):
            return parting
    for name in FOUND:
        if said := _first_value(old[0].get(name), new[0].get(name), name):
            return Parting(None, "end", said)
    return None


def _first_answer(
    t: int, split: str, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> Parting | None:
    if [row["id"] for row in old] != [row["id"] for row in new]:
        return Parting(t, "prompts", f"the {split} prompts of iteration {t} are others")
    other = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    if not other:
        return None
    a, b = other[0]
    labels = sum(a["label"] != b["label"] for a, b in other)
    field = next(name for name in ("answer", "label", "confidence", "reason", "thought") if a.get(name) != b.get(name))
    where = _apart(str(a.get(field)), str(b.get(field)))
    said = f"{len(other)} of {len(old)} {split} answers of iteration {t} are others, {labels} with another label"
    return Parting(t, "answers", f"{said}; first the {field} to prompt {a['id']}, {where}")


def _apart(a: str, b: str) -> str:
    """Both texts from a little before they part."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - SHOWN // 2)
    lead = "..." if start else ""
    return f"'{lead}{excerpt(a[start:], SHOWN)}' then and '{lead}{excerpt(b[start:], SHOWN)}' now"


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The measured part of an iteration's entry first, then what was fitted from it."""
    return {name: entry[name] for name in FIGURES if name in entry} | dict(entry)


def _first_value(old: Any, new: Any, name: str) -> str | None:
    """The first leaf of two JSON values that differs, in words."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        both = {key: (old.get(key), new.get(key)) for key in [*old, *new]}
        return next((said for key, pair in both.items() if (said := _first_value(*pair, f"{name}, {key}"))), None)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((said for i, (a, b) in pairs if (said := _first_value(a, b, f"{name}, {i}"))), None)
    if old == new:
        return None
    a, b = (f"{len(value)} values" if isinstance(value, list | dict) else str(value) for value in (old, new))
    return f"{name}: {excerpt(a, SHOWN)} then and {excerpt(b, SHOWN)} now"


def _first_column(iteration: int, old: Edit, new: Edit) -> str | None:
    """The first sublayer in which the columns of an iteration differ, in words."""
    for name in sorted({*old.written(iteration), *new.written(iteration)}):
        a, b = (_columns(edit, name, iteration) for edit in (old, new))
        if a.shape != b.shape:
            return f"iteration {iteration} writes {a.shape[-1]} columns at {name} then and {b.shape[-1]} now"
        if not torch.equal(a, b):
            by = f"{_relative(a, b):.1e} of the largest number"
            return f"the columns of iteration {iteration} at {name} differ by up to {by}"
    return None


def _columns(edit: Edit, name: str, iteration: int) -> torch.Tensor:
    """V and U of a sublayer's columns of an iteration, [2, d, k]."""
    factors = edit.factors.get(name)
    if factors is None:
        return torch.zeros(2, 0, 0)
    own = factors.iteration == iteration
    return torch.stack([factors.V[:, own], factors.U[:, own]])


def _largest(old: Edit, new: Edit) -> float | None:
    if {name: f.V.shape for name, f in old.factors.items()} != {name: f.V.shape for name, f in new.factors.items()}:
        return None
    pairs = [pair for name, f in old.factors.items() for g in (new.factors[name],) for pair in ((f.V, g.V), (f.U, g.U))]
    return max((_relative(a, b) for a, b in pairs), default=0.0)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
