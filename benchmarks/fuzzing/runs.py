"""run.json, changed in its parts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fuzzing.common import Kind, change, clean, json_file
from llmva.errors import LlmvaError
from llmva.runs.record import read_run


def run_json() -> dict[str, Any]:
    entries = [{"iteration": t, "f1": 0.5, "asr": 0.5, "orr": None, "selected": [0]} for t in range(3)]
    return {
        "format": "llmva-run",
        "version": 1,
        "settings": {"layers": 1},
        "seed": 1,
        "judge": "phrases-1",
        "base": {"model": "tiny", "sha256": "0" * 64, "dtype": "float32", "hashes": {"a.b": "0"}},
        "prompts": {"counts": {"train": {"s": 3}}, "hashes": {"s": "0" * 64}},
        "iterations": entries,
        "best_iteration": 2,
        "stopped": None,
        "answers_bytes": 9,
        "limits": ["x"],
        "cost": {"seconds": 1.0, "peak_bytes": 3, "generated_tokens": 4},
    }


def spoil(folder: Path, rng: random.Random) -> None:
    (folder / "run.json").write_bytes(json_file(change(run_json(), rng), rng))


def check(folder: Path) -> str:
    try:
        read_run(folder)
    except LlmvaError as error:
        return clean(error)
    return "read"


def kind() -> Kind:
    return Kind("runs", spoil, check, room=256)
