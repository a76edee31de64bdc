"""What is shipped: the edit of a run at an iteration and strength, and the model it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import UsageError
from llmva.metrics.pareto import find_point
from llmva.runs.record import read_run


@dataclass(frozen=True)
class Plan:
    """`edit` holds just the columns that ship, scaled; `record` is run.json's, where the edit comes from a run."""

    directory: Path
    edit: Edit
    base: str  # local folder, .gguf file or hub id
    iteration: int
    strength: float
    record: Mapping[str, Any] | None
    title: str  # the base model's name for people
    trust_remote_code: bool = False  # whether code that comes with the base may be run


def make_plan(
    directory: str | Path,
    *,
    iteration: int | None = None,
    strength: float | None = None,
    point: int | None = None,
    base: str | None = None,
    known: Mapping[str, Path] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Read the run in `directory` (or an edit.safetensors) and choose what of it ships.

    Args:
        iteration: None takes the one that the run chose.
        strength: 0 is the base model, 1 the edit as fitted. None takes the one that the run chose; it is 1 if an
            iteration is named.
        point: one of those that `llmva front` shows, instead of iteration and strength.
        base: where the base model is now; None takes the name that the run was given.
        known: paths of models by name, such as the bundled one's.
        trust_remote_code: whether code that comes with the base may be run. Most exports need none of it.

    Raises:
        UsageError: no edit, no such iteration or point, or an edit that changes nothing.
    """
    directory = Path(directory)
    whole = Edit.load(directory)
    folder = edit_file(directory).parent
    record = read_run(folder) if (folder / "run.json").is_file() else None
    if point is not None:
        if iteration is not None or strength is not None:
            raise UsageError("--point is an iteration and a strength: leave --iteration and --strength out.")
        iteration, strength = find_point(record, point, directory)
    if strength is None:
        strength = whole.strength if iteration is None and whole.best is not None else 1.0
    if iteration is None:
        iteration = whole.iterations if whole.best is None else whole.best
    edit = whole.asked(iteration, directory)
    if not edit.factors:
        raise UsageError(
            f"Iteration {iteration} of '{directory}' is the untouched model, so there is nothing to ship: choose "
            "another --iteration, or use the model as it is."
        )
    title = str(whole.base.get("model", "unnamed"))
    place = base or str((known or {}).get(title, title))
    local = place.startswith((".", "/", "~")) or place.count("/") > 1 or place.endswith(".gguf")
    if local and not Path(place).expanduser().exists():
        raise UsageError(f"The base model is not at '{place}': say where it is with --base.")
    chosen = replace(edit.scaled(strength), best=None)
    return Plan(directory, chosen, place, iteration, strength, record, title, trust_remote_code)
