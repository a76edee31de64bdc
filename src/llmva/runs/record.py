"""Read run.json and answers.jsonl, checked; needs neither torch nor the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from llmva.errors import LlmvaError, UsageError

FORMAT = "llmva-run"
VERSION = 1


def read_run(directory: Path) -> dict[str, Any]:
    """The run.json of `directory`, checked. Raises UsageError if there is none or it is not ours."""
    path = directory / "run.json"
    if not path.exists():
        raise UsageError(f"'{directory}' holds no run: give the folder that llmva align wrote.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or type(record["version"]) is not int:
            raise ValueError("another format")
        if record["version"] > VERSION:
            raise UsageError(
                f"'{path}' is of format version {record['version']} and this llmva reads {VERSION}: update llmva."
            )
        _check_fields(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' is no run of llmva: choose another folder or pass --restart.") from error
    return dict(record)


FIELDS: dict[str, type | tuple[type, ...]] = {
    "base": dict,
    "settings": dict,
    "seed": int,
    "judge": str,
    "prompts": dict,
    "iterations": list,
    "best_iteration": int,
    "stopped": (str, NoneType),
    "answers_bytes": int,
    "cost": dict,
    "limits": list,
}


def _check_fields(record: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError if a required field is missing or has another type."""
    wrong = [name for name, kind in FIELDS.items() if not isinstance(record[name], kind)]
    base, cost = record["base"], record["cost"]
    texts = [base["sha256"], base["model"], base["dtype"], *record["prompts"]["hashes"].values()]
    numbers = [cost["seconds"], cost["peak_bytes"], cost["generated_tokens"]]
    numbers += [entry["iteration"] for entry in record["iterations"]]
    shares = [entry[name] for entry in record["iterations"] for name in ("f1", "asr", "orr")]
    if (
        wrong
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(number, int | float) for number in numbers)
        or not all(isinstance(share, int | float | None) for share in shares)
    ):
        raise TypeError(f"fields of other types: {wrong}")


def best_so_far(record: Mapping[str, Any], where: object) -> tuple[int, str]:
    """What an unfinished run is used at, and the sentence that says so. Raises UsageError where that is no edit yet."""
    best, done = record["best_iteration"], len(record["iterations"])
    if not best:
        raise UsageError(
            f"The run in '{where}' is unfinished, and nothing that it measured is better than the untouched model: "
            "finish it with the same llmva align, or choose --iteration."
        )
    return best, (
        f"The run in '{where}' is unfinished: this is iteration {best}, the best on validation prompts of the {done} "
        "measured so far."
    )


def unmeasured(record: Mapping[str, Any], iteration: int) -> str | None:
    """The sentence that an iteration's columns were made, but what they do was never measured; None where it was."""
    if any(entry["iteration"] == iteration for entry in record["iterations"]):
        return None
    return f"Iteration {iteration} was made by the run and never measured, so nothing is known of what it does."


def is_finished(directory: Path) -> bool:
    """Whether `directory` holds a run that has nothing left to do."""
    try:
        return bool((read_run(directory).get("test") or {}).get("after"))
    except (UsageError, AttributeError, OSError):  # a name too long, or no folder: opening the run will say so
        return False


def read_answers(directory: Path, record: Mapping[str, Any], *, mend: bool = False) -> list[dict[str, Any]]:
    """The answers that run.json counts. Lines after them come from an unfinished commit; `mend` cuts them off."""
    path, length = directory / "answers.jsonl", record["answers_bytes"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LlmvaError(f"'{path}' cannot be read ({error.strerror}): run again with --restart.") from error
    if len(data) < length:
        raise LlmvaError(f"'{path}' is shorter than run.json says: run again with --restart.")
    try:
        # not splitlines(), which would also split at U+2028 inside an answer
        rows = [json.loads(line) for line in data[:length].decode("utf-8").split("\n") if line]
        if not all({"iteration", "split", "id", "answer", "label"} <= row.keys() for row in rows):
            raise ValueError("a field is missing")
    except (ValueError, AttributeError) as error:
        raise LlmvaError(f"'{path}' is broken: run again with --restart.") from error
    if mend and len(data) > length:
        os.truncate(path, length)
    return rows
