"""The folder of an export: complete or absent, with the model card and the exact edit in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.export.card import card, public_edit
from llmva.export.plan import Plan
from llmva.files import lock, write_text
from llmva.models.files.belonging import CARD, OWN

EMBEDDED = OWN  # the folder in which an export keeps the edit that it was made from
LOCK = ".lock"
CONFIGS = ("config.json", "adapter_config.json")  # written last, removed first


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

    One that a killed export left is emptied first. Raises LlmvaError if the disk is full or cannot be written, or if
    another process exports to `out`.
    """
    work = out.with_name(f".{out.name}.part")
    held = lock(work)
    try:
        _empty(work)
        yield work
        (work / LOCK).unlink(missing_ok=True)
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
    finally:
        if held is not None:
            held.close()


def _empty(work: Path) -> None:
    """First the file by which loaders know a whole export: a kill in between must not leave it with others missing."""
    for path in sorted(work.iterdir(), key=lambda path: path.name not in CONFIGS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def describe(plan: Plan, kind: str, folder: Path) -> dict[str, str]:
    """Write the model card, and the exact edit into EMBEDDED, so that `llmva verify` can later check the export.

    Returns why each of these files is there.
    """
    write_text(folder / CARD, card(plan, kind))
    inside = folder / EMBEDDED
    inside.mkdir(exist_ok=True)
    edit = public_edit(plan).save(inside)
    return {
        CARD: "the model card",
        edit.relative_to(folder).as_posix(): "exactly the edit that was exported, for llmva verify",
    }


def written(out: Path, reasons: Mapping[str, str]) -> dict[str, Any]:
    """`out`, the relative paths of its `files`, `why` each is there, and their `bytes` in all."""
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return {
        "out": str(out),
        "files": files,
        "why": {name: reasons[name] for name in files},
        "bytes": sum((out / name).stat().st_size for name in files),
    }
