"""A run on disk: what it needs to resume after an interruption, and what it reports.

DIR/run.json decides what counts. It is written before any other file, so a folder with such files and no run.json is
never mistaken for a run. After each iteration it is replaced in one rename, after the other files:

    edit.safetensors   columns of all iterations so far; a resumed run cuts off those that run.json does not count
    .before.safetensors   the edit before an iteration is undone, until run.json records that
    answers.jsonl      appended; a resumed run cuts it to the length that run.json states
    prompts.jsonl      the prompts, written once
    .lock              empty, locked by the process that works here
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import LlmvaError, UsageError
from llmva.files import FolderLock, lock, write_bytes, write_json
from llmva.method.observe import Observation, harmless_answers
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Asked
from llmva.runs.environment import peak_bytes
from llmva.runs.identity import difference, other_versions
from llmva.runs.record import FORMAT, VERSION, read_answers, read_run
from llmva.settings import Settings, excerpt

BEFORE = ".before.safetensors"
UNTOUCHED = -1  # iteration of the untouched model's answers in a run that extends another, copied from the first run
UNCHANGED = ("seed", "judge")  # must not change on resume, as settings, prompts.hashes and identity


class Run:
    """State of one run; `record` is the content of run.json. Without a directory it is kept in memory only."""

    def __init__(self, directory: Path | None, record: dict[str, Any], edit: Edit, held: FolderLock | None) -> None:
        self.directory, self.record, self.edit = directory, record, edit
        self._started = time.monotonic() - record["cost"]["seconds"]
        self._lock = held
        # differences from the start of the run that need not change its answers; `elsewhere` are those of versions
        self.notes: list[str] = []
        self.elsewhere: list[str] = []
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
        """Start the run that `record` describes, or resume the one in `directory`; returns True in the second case.

        `start` is the edit of iteration 0, which `record["extends"]` names; None is the untouched model.

        Raises UsageError if the directory contains something else, and LlmvaError if its files are broken or another
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
            "limits": list(record.get("limits", [])),
        }
        factors = {} if start is None else start.factors
        if directory is None:
            return cls(None, record, Edit(factors, record["base"]), None), False
        held = lock(directory)
        try:
            if not restart and (directory / "run.json").exists():
                before = read_run(directory)
                notes = _same(before, record, directory)
                if before["iterations"]:
                    run = cls._resume(directory, before, held)
                    run.notes, run.elsewhere = notes, other_versions(before, record)
                    return run, True
                record = before  # interrupted before the end of the first iteration: other files may be missing
            elif not restart:
                _empty(directory)
            run = cls(directory, record, Edit(factors, record["base"]), held)
            run._begin(prompts)
        except BaseException:
            held.close()
            raise
        return run, False

    def _begin(self, prompts: PromptSet) -> None:
        """Write the files of a run that has done nothing yet."""
        assert self.directory is not None
        write_json(self.directory / "run.json", self.record)
        _remove(self.directory / "report.html")
        prompts.to_jsonl(self.directory / "prompts.jsonl")
        self.edit.save(self.directory)
        write_bytes(self.directory / "answers.jsonl", b"")
        _remove(self.directory / BEFORE)

    @classmethod
    def _resume(cls, directory: Path, record: dict[str, Any], held: FolderLock) -> Run:
        edit = _edit_of(directory, record)
        answers = read_answers(directory, record, mend=True)
        run = cls(directory, record, edit, held)
        run.answers = answers
        return run

    def close(self) -> None:
        """Let others work in the folder."""
        if self._lock is not None:
            self._lock.close()

    @property
    def iterations(self) -> list[dict[str, Any]]:
        """The entries of the measured iterations."""
        entries: list[dict[str, Any]] = self.record["iterations"]
        return entries

    @property
    def done(self) -> int:
        """How many iterations are measured."""
        return len(self.iterations)

    @property
    def stopped(self) -> str | None:
        """Why the loop ended; None while it runs."""
        reason: str | None = self.record["stopped"]
        return reason

    def harmless_texts(self, prompts: PromptSet, split: str, limit: int) -> list[tuple[Asked, str]]:
        """At most `limit` benign prompts of a split that the untouched model answered, with its answers.

        An edit should not change this text.
        """
        by_id = {prompt.id: prompt for prompt in getattr(prompts, split)}
        first = min((row["iteration"] for row in self.answers), default=0)
        rows = [
            row for row in self.answers if row["iteration"] == first and row["split"] == split and row["id"] in by_id
        ]
        asked, labels = [by_id[row["id"]] for row in rows], [row["label"] for row in rows]
        return harmless_answers(asked, labels, [row["answer"] for row in rows])[:limit]

    def log(self, iteration: int, split: str, seen: Observation) -> None:
        """Keep judged answers; the next commit writes them to disk."""
        thoughts, unclosed = seen.capture.thoughts, seen.capture.unclosed
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
                    **({"thought": thoughts[i]} if thoughts and thoughts[i] else {}),
                    **({"unclosed": True} if unclosed and unclosed[i] else {}),
                }
            )

    def commit(self, edit: Edit | None = None) -> None:
        """Write everything so far to disk. `edit` is the edit of the next iteration."""
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
        if undone:  # the run.json on disk still counts these columns until it is replaced
            before.save(self.directory / BEFORE)
        self.edit.save(self.directory)
        try:
            write_json(self.directory / "run.json", self.record)
        except ValueError as error:  # JSON has no NaN
            raise LlmvaError(
                f"A figure of this run is not finite, as when a model overflows in {self.record['base']['dtype']}: "
                "pass --dtype bfloat16 or float32."
            ) from error
        if undone:
            _remove(self.directory / BEFORE)


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


def _same(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> list[str]:
    """Refuse to continue one run as another, naming the first difference; notes on what need not be the same."""

    def refuse(what: str, old: object, new: object) -> UsageError:
        return UsageError(
            f"'{directory}' holds a run with {what} {old}, and this one has {new}: "
            "pass --restart to discard it, or another --out."
        )

    for name, new in now["settings"].items():
        old = before["settings"].get(name)
        if name not in before["settings"] and name in Settings.model_fields:  # the run began before there was this one
            old = Settings.model_fields[name].default
        if old != new:
            raise refuse(f"the setting {name}", _shown(old), _shown(new))
    for name in UNCHANGED:
        if before[name] != now[name]:
            raise refuse(f"the {name}", before[name], now[name])
    old, new = (r.get("extends") or {} for r in (before, now))
    if old.get("edit") != new.get("edit"):
        raise refuse("the edit it began with,", old.get("edit"), new.get("edit"))
    if before["prompts"]["hashes"] != now["prompts"]["hashes"]:
        raise refuse(
            "the prompts", sorted(before["prompts"]["hashes"]), f"{sorted(now['prompts']['hashes'])} with other texts"
        )
    if before["base"]["dtype"] != now["base"]["dtype"]:
        raise refuse("the dtype", before["base"]["dtype"], now["base"]["dtype"])
    changed, notes = difference(before, now)
    if changed is not None:
        raise refuse(*changed)
    if before["base"]["sha256"] != now["base"]["sha256"]:
        raise refuse("the model", *(f"'{r['base']['model']}' ({r['base']['sha256'][:12]})" for r in (before, now)))
    return notes


def _shown(value: object) -> object:
    """A setting in a sentence: a system prompt may be long."""
    return f"'{excerpt(value, 60)}'" if isinstance(value, str) and len(value.split()) > 1 else value


def _append(path: Path, rows: list[dict[str, Any]], known: int) -> int:
    """Write the rows that the file lacks after its first `known` bytes; returns the new length in bytes."""
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
