"""Finished parts of a long measurement, each in a JSON file, so that an interruption loses at most one.

DIR/cells/NAME.json    the measurement, with every answer
DIR/identity.json      what all cells share: model, prompts, judge, settings; and what computed the first one
DIR/claims/            who is at work on which cell, where several processes share the folder
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.experiments.claims import Claims
from llmva.files import FolderLock, json_text, lock, write_json, write_new
from llmva.models.chat_model import ChatModel
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.environment import versions
from llmva.runs.identity import difference, identity


def file_name(method: str, setting: str | None) -> str:
    """The beginning of the names of a method's cells."""
    if ":" in method:  # published, and named by its place
        kind, _, place = method.partition(":")
        last = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(place).name)
        return f"{kind}-{last}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    return method.replace("+", "-plus") + ("" if setting is None else f"-{setting}")


class Cells:
    """`get` measures only missing cells. Without a directory, cells are kept in memory.

    The folder is locked for this process, unless it is `shared`: then each cell is claimed by itself.
    """

    def __init__(
        self, directory: Path | None, identity: Mapping[str, Any], *, restart: bool = False, shared: bool = False
    ) -> None:
        self.directory = directory
        self.notes: list[str] = []  # what is not as it was when the first cell was measured, and need not matter
        self.measured: list[str] = []  # names of the cells that this process measured
        self._kept: dict[str, dict[str, Any]] = {}
        self._lock: FolderLock | None = None
        self._claims: Claims | None = None
        if directory is None:
            return
        if shared:
            self._claims = Claims(directory / "claims")
            self._begin(directory, identity, restart)
            return
        self._lock = lock(directory)
        try:
            self._begin(directory, identity, restart)
        except BaseException:
            self.close()
            raise

    def _begin(self, directory: Path, identity: Mapping[str, Any], restart: bool) -> None:
        path = directory / "identity.json"
        if restart:
            shutil.rmtree(directory / "cells", ignore_errors=True)
        elif path.exists():
            self.notes = _same(_read(path), json.loads(json.dumps(identity)), directory)
            return
        elif any(directory.glob("*.json")):
            raise UsageError(f"'{directory}' holds other files: choose another --out.")
        try:
            (directory / "cells").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
            ) from error
        if restart:
            write_json(path, dict(identity))
        elif not write_new(path, json_text(dict(identity)).encode()):  # another process was faster
            self.notes = _same(_read(path), json.loads(json.dumps(identity)), directory)

    @property
    def sentences(self) -> list[str]:
        """The notes as limits of a record."""
        return [f"Some figures are of an earlier measurement: {'; '.join(self.notes)}."] if self.notes else []

    def close(self) -> None:
        """Let others work in the folder."""
        if self._lock is not None:
            self._lock.close()

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell `name`, read from disk if it was measured before.

        Raises Claimed if the folder is shared and another process is measuring the cell.
        """
        if self.directory is None:
            if name not in self._kept:
                self._kept[name] = measure()
            return self._kept[name]
        path = self.directory / "cells" / f"{name}.json"
        if path.exists():
            return _read(path)
        if self._claims is None:
            cell = measure()
            write_json(path, cell)
            self.measured.append(name)
            return cell
        with self._claims.hold(name):
            # it may have been finished between the look and the claim
            if not path.exists() and write_new(path, json_text(measure()).encode()):
                self.measured.append(name)
            return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cell, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise LlmvaError(f"'{path}' cannot be read: remove it and run the same command again.") from error
    return cell


def study_identity(
    chat: ChatModel, base: Mapping[str, Any], prompts: PromptSet, probes: Sequence[Any]
) -> dict[str, Any]:
    """What the cells of every study have in common; `base` is the model's `fingerprint`."""
    rows = chat.rows([prompt.asked for _, split in prompts.splits() for prompt in split])
    return {
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "prompts": prompts.hashes(),
        "base": {"weights": base["weights"]},
        "identity": identity(chat, base, rows, probes),
        "versions": versions(),
    }


def _same(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> list[str]:
    """Refuse to add to cells of something else, naming the first difference; notes on what need not be the same."""

    def refuse(what: str, old: object, new: object) -> UsageError:
        return UsageError(
            f"'{directory}' was measured with {what} {old}, and this is {new}: pass --restart to discard it, or "
            "another --out."
        )

    for name in [name for name in now if name not in ("base", "identity", "versions")]:
        if before.get(name) != now[name]:
            raise refuse(name, _short(before.get(name)), _short(now[name]))
    if "identity" not in now:
        return []
    changed, notes = difference({"base": {}, **before}, now)
    if changed is not None:
        raise refuse(*changed)
    return notes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
