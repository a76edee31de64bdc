"""A run on disk: what it needs to go on after a kill, and what it reports.

DIR/run.json is the truth and is replaced in one rename after each iteration; the other files are written before it:

    edit.safetensors   columns of all iterations so far; more than run.json knows of are cut off on resume
    answers.jsonl      appended; cut back to the length that run.json knows of on resume
    prompts.jsonl      the prompts, written once
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.files import write_json
from llmva.observe import Observation
from llmva.prompts.types import PromptSet

FORMAT = "llmva-run"
VERSION = 1
IDENTITY = ("seed", "judge")  # with settings, base.sha256 and prompts.hashes: what must not change on resume


class Run:
    """State of one alignment; `record` is what run.json holds. Without a directory it lives in memory only."""

    def __init__(self, directory: Path | None, record: dict[str, Any], edit: Edit) -> None:
        self.directory, self.record, self.edit = directory, record, edit
        self._started = time.monotonic() - record["cost"]["seconds"]
        self.answers: list[dict[str, Any]] = []

    @classmethod
    def open(
        cls, directory: Path | None, record: dict[str, Any], prompts: PromptSet, *, restart: bool = False
    ) -> tuple[Run, bool]:
        """Start the run that `record` describes, or go on with the one in `directory`; the flag says which.

        Raises UsageError when the directory holds a run of something else.
        """
        record = {
            "format": FORMAT,
            "version": VERSION,
            **record,
            "iterations": [],
            "best_iteration": 0,
            "stopped": None,
            "answers_bytes": 0,
            "cost": {"seconds": 0.0, "peak_bytes": 0, "generated_tokens": 0},
            "limits": list(prompts.warnings),
        }
        run = cls(directory, record, Edit({}, record["base"]))
        if directory is None:
            return run, False
        _make(directory)
        if not restart and (directory / "run.json").exists():
            before = read_run(directory)
            _same(before, record, directory)
            run = cls(directory, before, Edit.load(directory).at(len(before["iterations"])))
            _truncate(directory / "answers.jsonl", before["answers_bytes"])
            run.answers = read_lines(directory / "answers.jsonl")
            return run, True
        # run.json goes first: what is left of an older run must never be taken for part of the new one
        for name in ("run.json", "edit.safetensors", "answers.jsonl", "report.html"):
            (directory / name).unlink(missing_ok=True)
        prompts.to_jsonl(directory / "prompts.jsonl")
        run.edit.save(directory)
        (directory / "answers.jsonl").touch()
        write_json(directory / "run.json", record)
        return run, False

    @property
    def done(self) -> int:
        """Iterations measured so far."""
        return len(self.record["iterations"])

    def log(self, iteration: int, split: str, seen: Observation) -> None:
        """Keep judged answers; they reach the disk with the next commit."""
        for prompt, answer, judged in zip(seen.prompts, seen.capture.answers, seen.judgements, strict=True):
            self.answers.append(
                {
                    "iteration": iteration,
                    "split": split,
                    "id": prompt.id,
                    "answer": answer,
                    "label": judged.label.value,
                    "confidence": round(judged.confidence, 3),
                    "reason": judged.reason,
                }
            )

    def commit(self, edit: Edit | None = None) -> None:
        """Make everything said so far survive a kill. `edit` is what the next iteration runs with."""
        self.edit = edit or self.edit
        cost = self.record["cost"]
        cost["seconds"] = round(time.monotonic() - self._started, 2)
        cost["peak_bytes"] = max(cost["peak_bytes"], peak_bytes())
        if self.directory is None:
            return
        self.record["answers_bytes"] = _append(
            self.directory / "answers.jsonl", self.answers, self.record["answers_bytes"]
        )
        self.edit.save(self.directory)
        write_json(self.directory / "run.json", self.record)


def read_run(directory: Path) -> dict[str, Any]:
    """The run.json of `directory`, checked. Raises UsageError where there is none or it is not ours."""
    path = directory / "run.json"
    if not path.is_file():
        raise UsageError(f"'{directory}' holds no run: give the folder that llmva align wrote.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError("another format")
        version = int(record["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{path}' is no run of llmva: choose another folder or pass --restart.") from error
    if version > VERSION:
        raise UsageError(f"'{path}' is of format version {version} and this llmva reads {VERSION}: update llmva.")
    return dict(record)


def read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise LlmvaError(f"'{path}' is broken: run again with --restart.") from error


def versions() -> dict[str, str]:
    """What computed the run; other versions may round differently."""
    import torch
    import transformers

    import llmva

    return {
        "llmva": llmva.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def peak_bytes() -> int:
    """Most memory this process has held: resident on the CPU, plus allocated on every CUDA device."""
    import resource
    import sys

    import torch

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return resident + sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
        ) from error


def _same(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Refuse to continue one run as another, naming the first difference."""

    def refuse(what: str, old: object, new: object) -> UsageError:
        return UsageError(
            f"'{directory}' holds a run with {what} {old}, and this one has {new}: "
            "pass --restart to discard it, or another --out."
        )

    for name, new in now["settings"].items():
        if before["settings"].get(name) != new:
            raise refuse(f"the setting {name}", before["settings"].get(name), new)
    for name in IDENTITY:
        if before[name] != now[name]:
            raise refuse(f"the {name}", before[name], now[name])
    if before["base"]["sha256"] != now["base"]["sha256"]:
        raise refuse("the model", *(f"'{r['base']['model']}' ({r['base']['sha256'][:12]})" for r in (before, now)))
    if before["base"]["dtype"] != now["base"]["dtype"]:
        raise refuse("the dtype", before["base"]["dtype"], now["base"]["dtype"])
    if before["prompts"]["hashes"] != now["prompts"]["hashes"]:
        raise refuse(
            "the prompts", sorted(before["prompts"]["hashes"]), f"{sorted(now['prompts']['hashes'])} with other texts"
        )


def _append(path: Path, rows: list[dict[str, Any]], known: int) -> int:
    """Write the rows that the file lacks beyond `known` bytes; returns the new length."""
    have = 0
    if known:
        with path.open("rb") as file:
            have = file.read(known).count(b"\n")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[have:]).encode("utf-8")
    try:
        with path.open("r+b") as file:
            file.seek(known)
            file.truncate()
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LlmvaError(
            f"'{path}' cannot be written ({error.strerror}): free space and run the same command again."
        ) from error
    return known + len(lines)


def _truncate(path: Path, length: int) -> None:
    if not path.is_file() or path.stat().st_size < length:
        raise LlmvaError(f"'{path}' is shorter than run.json says: run again with --restart.")
    os.truncate(path, length)


def harmless_texts(
    answers: Iterable[Mapping[str, Any]], prompts: PromptSet, split: str, most: int
) -> list[tuple[str, str]]:
    """Benign prompts that the untouched model answered, with its answers: text that an edit should leave alone."""
    by_id = {prompt.id: prompt for prompt in getattr(prompts, split) if prompt.benign}
    found = [
        (by_id[row["id"]].text, row["answer"])
        for row in answers
        if row["iteration"] == 0 and row["split"] == split and row["label"] == "answered" and row["id"] in by_id
    ]
    return found[:most]
