"""Finished parts of a long measurement, each in a JSON file, so that an interruption loses at most one.

DIR/cells/NAME.json    the measurement, with every answer
DIR/identity.json      what all cells share: model, prompts, judge, settings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.files import lock, write_json


def file_name(method: str, setting: str | None) -> str:
    """The beginning of the names of a method's cells."""
    return method.replace("+", "-plus") + ("" if setting is None else f"-{setting}")


class Cells:
    """`get` measures only missing cells. Without a directory, cells are kept in memory."""

    def __init__(self, directory: Path | None, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.directory = directory
        self._kept: dict[str, dict[str, Any]] = {}
        if directory is None:
            return
        self._lock = lock(directory)  # locked while it is open
        path = directory / "identity.json"
        if restart:
            shutil.rmtree(directory / "cells", ignore_errors=True)
        elif path.exists():
            _same(_read(path), identity, directory)
        elif any(directory.glob("*.json")):
            raise UsageError(f"'{directory}' holds other files: choose another --out.")
        try:
            (directory / "cells").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
            ) from error
        write_json(path, dict(identity))

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell `name`, read from disk if it was measured before."""
        if self.directory is None:
            if name not in self._kept:
                self._kept[name] = measure()
            return self._kept[name]
        path = self.directory / "cells" / f"{name}.json"
        if path.exists():
            return _read(path)
        cell = measure()
        write_json(path, cell)
        return cell


def _read(path: Path) -> dict[str, Any]:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cell, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise LlmvaError(f"'{path}' cannot be read: remove it and run the same command again.") from error
    return cell


def _same(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise UsageError(
                f"'{directory}' was measured with {name} {_short(before.get(name))}, and this is {_short(value)}: "
                "pass --restart to discard it, or another --out."
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
