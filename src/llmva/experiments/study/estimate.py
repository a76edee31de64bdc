"""What a study will take: tokens through each model and memory, told before anything is loaded.

Tokens are an upper bound: every answer has its maximum length, and an alignment makes all its iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmva.baselines import BASELINES, make_baseline
from llmva.errors import LlmvaError
from llmva.experiments.comparison import BUDGET
from llmva.experiments.measure import HARMLESS_TEXTS
from llmva.experiments.study.definition import Study, StudyModel
from llmva.experiments.study.plan import Cell, Panel
from llmva.experiments.study.worker import prompts_of
from llmva.experiments.summary import OURS
from llmva.prompts.public.registry import Entry
from llmva.prompts.public.wanted import parse_data
from llmva.settings import Settings

CHARACTERS = 4  # of a token, about
TEMPLATE = 16  # tokens that a chat template adds, about
PROMPT = 64  # tokens of a prompt whose text is not at hand
TASK_DOCUMENTS, TASK_TOKENS = 256, 300  # of a benchmark: documents by default, tokens of each with its choices
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SPARE = (1.25, 10**9)  # memory beside the weights: as much as batches may take, see --max-memory


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts of a panel, and tokens of a prompt."""

    drawn: int
    validation: int
    test: int
    benign: int  # of the test prompts
    tokens: float
    known: bool  # False where the data are not on this machine and their registry entry stands in


def sizes_of(study: Study, panel: Panel) -> Sizes:
    """Read from the data where they are at hand, else from the registry."""
    settings = study.settings_of(panel.model)
    data = panel.data
    if all("=" in name for name in data.data) or data.data_dir is not None or not data.data:
        prompts = prompts_of(panel, study.seeds[0])
        sources = prompts.counts().values()
        drawn = sum(min(settings.per_source, counts["train"]) for counts in sources)
        texts = [prompt.text for prompt in prompts.test]
        tokens = sum(map(len, texts)) / max(1, len(texts)) / CHARACTERS + TEMPLATE
        benign = sum(prompt.benign for prompt in prompts.test)
        return Sizes(drawn, len(prompts.validation), len(texts), benign, tokens, True)
    counts = [_registered(wanted.entry, data.per_set or 500) for wanted in parse_data(data.data)]
    drawn = sum(min(settings.per_source, train) for train, _, _ in counts)
    validation, test = (sum(count[i] for count in counts) for i in (1, 2))
    return Sizes(drawn, validation, test, test // 2, PROMPT, False)


def _registered(entry: Entry, per_set: int) -> tuple[int, int, int]:
    """Prompts of train, validation and test as a set's registry entry has them."""
    by_use = {use: sum(part.rows or 0 for part in entry.parts if part.use == use) for use in ("train", "validation")}
    test = sum(part.rows or 0 for part in entry.parts if part.use == "test")
    if test:
        return by_use["train"], by_use["validation"], test
    n = min(per_set * len(entry.sides), entry.rows or per_set)
    return round(0.6 * n), round(0.2 * n), round(0.2 * n)


def forward_tokens(study: Study, cell: Cell, sizes: Sizes) -> int:
    """At most so many tokens go through the model for a cell."""
    settings = study.settings_of(cell.panel.model)
    answer = sizes.tokens + settings.max_new_tokens
    harmless = min(HARMLESS_TEXTS, sizes.benign) * 2 * answer
    if cell.kind == "untouched":
        return round(sizes.test * answer)
    if cell.kind == "validation":
        return round(sizes.validation * answer)
    if cell.kind == "labels":
        return round(sizes.drawn * answer)
    if cell.kind == "options" and cell.row is not None:
        tried = len(make_baseline(cell.row.method).sweep()) * sizes.validation
        return round((tried if cell.row.setting == "paper" else BUDGET) * answer + sizes.drawn * sizes.tokens)
    if cell.kind == "method" and cell.row is not None:
        return round(_fit_tokens(settings, cell.row.method, sizes) + sizes.test * answer + harmless)
    if cell.kind == "attack":
        return round(sizes.test * (answer + sizes.tokens))  # an attack adds about as much again
    if cell.kind == "transfer":
        (wanted,) = parse_data([cell.what])
        _, _, test = _registered(wanted.entry, study.transfer_per_set)
        return round(min(test or study.transfer_per_set, 2 * study.transfer_per_set) * answer)
    if cell.kind == "utility":
        return (study.utility_limit or TASK_DOCUMENTS) * TASK_TOKENS
    return 0


def _fit_tokens(settings: Settings, method: str, sizes: Sizes) -> float:
    if method in BASELINES:
        return sizes.drawn * sizes.tokens
    if method != OURS:
        return 0.0
    observed = (sizes.drawn + sizes.validation) * (sizes.tokens + settings.max_new_tokens)
    inner = (settings.passes - 1) * (sizes.drawn + sizes.validation) * sizes.tokens
    return (settings.iterations + 1) * (observed + inner)


def weight_bytes(model: StudyModel, demo: str) -> float | None:
    """Bytes of a model's weights in memory; None where neither its files nor its size are known here."""
    folder = Path(demo if model.path == "demo" and not Path("demo").exists() else model.path).expanduser()
    bits = {"4bit": 0.5, "8bit": 1.0}.get(model.quantize)
    if model.parameters is not None:
        return model.parameters * (bits or BYTES.get(model.dtype, 2))
    if folder.is_file():
        return float(folder.stat().st_size)
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return float(sum(file.stat().st_size for file in files)) or None


def memory_bytes(model: StudyModel, demo: str) -> float | None:
    """Memory that a process takes for a model: its weights, and what batches are sized to take."""
    weights = weight_bytes(model, demo)
    return None if weights is None else SPARE[0] * weights + SPARE[1]


def estimates(
    study: Study, cells: Sequence[Cell], demo: str, tflops: float | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each cell: title, needs, tokens, memory and hours; and sentences on what is not known.

    Args:
        tflops: operations that the device does in a second, in units of 10^12; for the hours.
    """
    sizes: dict[str, Sizes | None] = {}
    notes: list[str] = []
    rows = []
    for cell in cells:
        key = cell.panel.data.name
        if key not in sizes:
            sizes[key] = _sizes_or_none(study, cell.panel, notes)
        known = sizes[key]
        tokens = None if known is None else forward_tokens(study, cell, known)
        rows.append(
            {
                "cell": cell.title,
                "kind": cell.kind,
                "model": cell.panel.model.name,
                "needs": list(cell.needs),
                "tokens": tokens,
                "memory_bytes": memory_bytes(cell.panel.model, demo),
                "hours": _hours(cell.panel.model, tokens, demo, tflops),
            }
        )
    unknown = [model.name for model in study.models if memory_bytes(model, demo) is None]
    if unknown:
        notes.append(f"The size of {', '.join(unknown)} is not known here: write its `parameters` for an estimate.")
    return rows, notes


def _sizes_or_none(study: Study, panel: Panel, notes: list[str]) -> Sizes | None:
    try:
        sizes = sizes_of(study, panel)
    except LlmvaError as error:
        notes.append(f"The prompts of {panel.data.name} cannot be counted: {error}")
        return None
    if not sizes.known:
        notes.append(f"The prompts of {panel.data.name} are not on this machine: their numbers are the registry's.")
    return sizes


def _hours(model: StudyModel, tokens: int | None, demo: str, tflops: float | None) -> float | None:
    """2 operations for a parameter and a token."""
    weights = weight_bytes(model, demo)
    if tokens is None or tflops is None or weights is None:
        return None
    parameters = model.parameters or weights / BYTES.get(model.dtype, 2)
    return 2 * parameters * tokens / (tflops * 1e12) / 3600


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells, tokens and hours of a plan, and the largest memory; None where a part is not known."""

    def total(key: str) -> Any:
        values = [row[key] for row in rows]
        return None if None in values else sum(values)

    memory = [row["memory_bytes"] for row in rows]
    return {
        "cells": len(rows),
        "tokens": total("tokens"),
        "hours": total("hours"),
        "memory_bytes": None if None in memory else max(memory, default=0),
    }
