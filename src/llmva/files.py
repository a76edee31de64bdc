"""Write files so that a kill or a full disk leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmva.errors import LlmvaError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LlmvaError(
            f"'{path}' cannot be written ({error.strerror}): free space or choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    write_bytes(path, save({k: t.contiguous() for k, t in tensors.items()}, dict(metadata)))


def lock(directory: Path) -> IO[bytes] | None:
    """Make the folder and take its lock, which ends with the process however it dies; None where there are no locks.

    A record lock, unlike flock, does not shut out a later run of this same process, such as a notebook's next try.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise UsageError(
            f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
        ) from error
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise LlmvaError(
                f"Another llmva is at work in '{directory}': wait for its end, or choose another folder with --out."
            ) from error
    return file  # a file system without locks is no reason not to work there
