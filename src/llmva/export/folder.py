"""The folder of an export: complete or absent, with the model card and the exact edit in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.export.card import card, public_edit
from llmva.export.plan import Plan

EMBEDDED = "llmva"  # the folder in which an export keeps the edit that it was made from


def fresh(out: str | Path) -> Path:
    """A folder that does not exist, or is empty. Raises UsageError otherwise."""
    path = Path(os.path.abspath(out))  # noqa: PTH100 (resolve() would follow a link that is to be replaced)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"'{out}' exists already: choose another --out, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"'{out}' cannot be written ({error.strerror}): choose another --out.") from error
    return path


@contextmanager
def in_workplace(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that is renamed to it at the end, or removed if anything fails.

    One that a killed export left is removed first. Raises LlmvaError if the disk is full or cannot be written.
    """
    work = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        if out.is_dir():
            out.rmdir()
        work.rename(out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise LlmvaError(
                f"'{out}' cannot be written ({error.strerror}): free space or choose another --out."
            ) from error
        raise


def describe(plan: Plan, kind: str, folder: Path) -> None:
    """Write the model card, and the exact edit into EMBEDDED, so that `llmva verify` can later check the export."""
    (folder / "README.md").write_text(card(plan, kind), encoding="utf-8")
    inside = folder / EMBEDDED
    inside.mkdir(exist_ok=True)
    public_edit(plan).save(inside)


def written(out: Path) -> dict[str, Any]:
    """`out`, the relative paths of its `files`, and their `bytes` in all."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        "out": str(out),
        "files": sorted(str(path.relative_to(out)) for path in files),
        "bytes": sum(path.stat().st_size for path in files),
    }
