"""A run on disk: what it needs to go on after a kill, and what it reports.

DIR/run.json is the truth. It is there before any other file, so that a folder with such files and no run.json is never
taken for a run of ours. From then on it is replaced in one rename after each iteration, the other files before it:

    edit.safetensors   columns of all iterations so far; more than run.json knows of are cut off on resume
    .before.safetensors   the edit before an iteration is undone, until run.json knows that it was
    answers.jsonl      appended; cut back to the length that run.json knows of on resume
    prompts.jsonl      the prompts, written once
    .lock              locked by the process that works here, empty
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import IO, Any

from llmva.edit import Edit, edit_file
from llmva.errors import LlmvaError, UsageError
from llmva.files import lock, write_bytes, write_json
from llmva.method.observe import Observation
from llmva.prompts.prompt_set import PromptSet

FORMAT = "llmva-run"
VERSION = 1
BEFORE = ".before.safetensors"
UNTOUCHED = -1  # in answers.jsonl of a run that extends another: the untouched model's, which the first run had asked
IDENTITY = ("seed", "judge")  # with settings, base.sha256 and prompts.hashes: what must not change on resume


class Run:
    """State of one alignment; `record` is what run.json holds. Without a directory it lives in memory only."""

    def __init__(self, directory: Path | None, record: dict[str, Any], edit: Edit, held: IO[bytes] | None) -> None:
        self.directory, self.record, self.edit = directory, record, edit
        self._started = time.monotonic() - record["cost"]["seconds"]
        self._lock = held  # held as long as it is open
        self.answers: list[dict[str, Any]] = []

    @classmethod
    def open(
        cls,
        directory: Path | None,
        record: dict[str, Any],
        prompts: PromptSet,
        *,
        restart: bool = False,
        start: Edit | None = None,
    ) -> tuple[Run, bool]:
        """Start the run that `record` describes, or go on with the one in `directory`; the flag says which.

        `start` is the edit that iteration 0 has, which `record["extends"]` names; None is the untouched model.

        Raises UsageError when the directory holds something else, and LlmvaError when its files are broken or another
        process works there.
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
        factors = {} if start is None else start.factors
        if directory is None:
            return cls(None, record, Edit(factors, record["base"]), None), False
        held = lock(directory)
        if not restart and (directory / "run.json").exists():
            before = read_run(directory)
            _same(before, record, directory)
            if before["iterations"]:
                return cls._resume(directory, before, held), True
            record = before  # killed before the first iteration was done: the other files may not be there yet
        elif not restart:
            _empty(directory)
        run = cls(directory, record, Edit(factors, record["base"]), held)
        write_json(directory / "run.json", record)
        _remove(directory / "report.html")
        prompts.to_jsonl(directory / "prompts.jsonl")
        run.edit.save(directory)
        write_bytes(directory / "answers.jsonl", b"")
        _remove(directory / BEFORE)
        return run, False

    @classmethod
    def _resume(cls, directory: Path, record: dict[str, Any], held: IO[bytes] | None) -> Run:
        edit = _edit_of(directory, record)
        answers = read_answers(directory, record, mend=True)
        run = cls(directory, record, edit, held)
        run.answers = answers
        return run

    @property
    def done(self) -> int:
        """Iterations measured so far."""
        return len(self.record["iterations"])

    def log(self, iteration: int, split: str, seen: Observation) -> None:
        """Keep judged answers; they reach the disk with the next commit."""
        thoughts = seen.capture.thoughts
        rows = zip(seen.prompts, seen.capture.answers, seen.judgements, strict=True)
        for i, (prompt, answer, judged) in enumerate(rows):
            self.answers.append(
                {
                    "iteration": iteration,
                    "split": split,
                    "id": prompt.id,
                    "answer": answer,
                    "label": judged.label.value,
                    "confidence": round(judged.confidence, 3),
                    "reason": judged.reason,
                    **({"thought": thoughts[i]} if thoughts else {}),
                }
            )

    def commit(self, edit: Edit | None = None) -> None:
        """Make everything said so far survive a kill. `edit` is what the next iteration runs with."""
        before, self.edit = self.edit, edit or self.edit
        cost = self.record["cost"]
        cost["seconds"] = round(time.monotonic() - self._started, 2)
        cost["peak_bytes"] = max(cost["peak_bytes"], peak_bytes())
        if self.directory is None:
            return
        self.record["answers_bytes"] = _append(
            self.directory / "answers.jsonl", self.answers, self.record["answers_bytes"]
        )
        undone = not set(before.held) <= set(self.edit.held)
        if undone:  # the run.json on disk still asks for these columns, and a kill may leave it there
            before.save(self.directory / BEFORE)
        self.edit.save(self.directory)
        try:
            write_json(self.directory / "run.json", self.record)
        except ValueError as error:  # JSON knows no NaN
            raise LlmvaError(
                f"A figure of this run is not finite, as when a model overflows in {self.record['base']['dtype']}: "
                "pass --dtype bfloat16 or float32."
            ) from error
        if undone:
            _remove(self.directory / BEFORE)


def read_run(directory: Path) -> dict[str, Any]:
    """The run.json of `directory`, checked. Raises UsageError where there is none or it is not ours."""
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
    """Raises KeyError or TypeError if a field that reading relies on is not there or of another type."""
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
    import torch

    return _peak_resident() + sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def _peak_resident() -> int:
    """In bytes. Linux's getrusage also counts the process that started this one, so its own figure is read instead."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _empty(directory: Path) -> None:
    """Refuse a folder whose files a new run would overwrite."""
    for name in ("edit.safetensors", "answers.jsonl", "prompts.jsonl", "report.html"):
        if (directory / name).exists():
            raise UsageError(
                f"'{directory}' holds no run, but a file {name} that would be lost: choose another --out, "
                "or pass --restart to replace it."
            )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LlmvaError(f"'{path}' cannot be removed ({error.strerror}): remove it and run again.") from error


def _edit_of(directory: Path, record: Mapping[str, Any]) -> Edit:
    """The columns that run.json knows of."""
    path, done = edit_file(directory), len(record["iterations"])
    if not path.exists():
        raise LlmvaError(f"'{path}' is missing: put it back, or run again with --restart.")
    edit = Edit.load(path).at(done)
    needed = record["best_iteration"] if record["stopped"] else done
    if (directory / BEFORE).exists():
        if edit.iterations < needed:  # killed while an iteration was being undone: run.json does not know of it
            edit = Edit.load(directory / BEFORE).at(done)
        else:
            _remove(directory / BEFORE)
    if edit.base.get("sha256") != record["base"]["sha256"] or edit.iterations < needed:
        raise LlmvaError(f"'{path}' is of another run than run.json beside it: run again with --restart.")
    return edit


def read_answers(directory: Path, record: Mapping[str, Any], *, mend: bool = False) -> list[dict[str, Any]]:
    """The answers that run.json knows of; more are what an unfinished commit left, and are cut off to `mend` it."""
    path, length = directory / "answers.jsonl", record["answers_bytes"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LlmvaError(f"'{path}' cannot be read ({error.strerror}): run again with --restart.") from error
    if len(data) < length:
        raise LlmvaError(f"'{path}' is shorter than run.json says: run again with --restart.")
    try:
        # not splitlines(), which would cut at U+2028 and its like inside an answer
        rows = [json.loads(line) for line in data[:length].decode("utf-8").split("\n") if line]
        if not all({"iteration", "split", "id", "answer", "label"} <= row.keys() for row in rows):
            raise ValueError("a field is missing")
    except (ValueError, AttributeError) as error:
        raise LlmvaError(f"'{path}' is broken: run again with --restart.") from error
    if mend and len(data) > length:
        os.truncate(path, length)
    return rows


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
    old, new = (r.get("extends") or {} for r in (before, now))
    if old.get("edit") != new.get("edit"):
        raise refuse("the edit it began with,", old.get("edit"), new.get("edit"))
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


def harmless_texts(
    answers: Iterable[Mapping[str, Any]], prompts: PromptSet, split: str, most: int
) -> list[tuple[str, str]]:
    """Benign prompts that the untouched model answered, with its answers: text that an edit should leave alone."""
    by_id = {prompt.id: prompt for prompt in getattr(prompts, split) if prompt.benign}
    answers = list(answers)
    first = min((row["iteration"] for row in answers), default=0)
    found = [
        (by_id[row["id"]].text, row["answer"])
        for row in answers
        if row["iteration"] == first and row["split"] == split and row["label"] == "answered" and row["id"] in by_id
    ]
    return found[:most]
