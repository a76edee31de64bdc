"""Write files so that a kill or a full disk leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmva.errors import LlmvaError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename.

    `shared` says that other processes may write the same file at the same time: each has a temporary name of its own
    then, and the last to rename decides. Else what a killed process left is replaced by the next.
    """
    temporary = _own_part(path) if shared else path.with_name(path.name + ".part")
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


def _own_part(path: Path) -> Path:
    """A temporary name that no other process has."""
    return path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    write_bytes(path, text.encode("utf-8"), shared=shared)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    write_text(path, json_text(value), shared=shared)


def json_text(value: Any) -> str:
    """A value as our files have it."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_new(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet, whole or not at all; False, and nothing is changed, where it is there.

    Of several processes that try at once, on one machine or on several that share the folder, exactly one gets True.
    """
    temporary = _own_part(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, a link replaces nothing
        except FileExistsError:
            return False
        return True
    except OSError as error:
        raise LlmvaError(
            f"'{path}' cannot be written ({error.strerror}): free space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    write_bytes(path, save({k: t.contiguous() for k, t in tensors.items()}, dict(metadata)))


def cache_folder(folder: str | Path | None = None) -> Path:
    """`folder`, else what LLMVA_CACHE names, else `llmva` in the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    if named := os.environ.get("LLMVA_CACHE"):
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "llmva"


class FolderLock:
    """A folder in the hands of one thread of one process, until `close()` or the end of the process."""

    def __init__(self, file: IO[bytes], place: Path, held: list[Path]) -> None:
        self._file, self._place, self._held = file, place, held

    def close(self) -> None:
        """Give the folder back. May be called again."""
        if not self._file.closed:
            self._file.close()
            self._held.remove(self._place)


def lock(directory: Path) -> FolderLock:
    """Make the folder and take its lock, which ends with the process however it dies.

    The same thread may take it again, such as a notebook's next try. Raises UsageError where the folder cannot be
    written, and LlmvaError where another process or another thread of this one is at work there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # before the file is opened: to close it again would end a record lock that another thread of ours has on it
        place, held = _claim(directory)
        try:
            file = (directory / ".lock").open("ab")
            try:
                _lock_file(file, directory)
            except BaseException:
                file.close()
                raise
        except BaseException:
            held.remove(place)
            raise
    except OSError as error:
        raise UsageError(
            f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
        ) from error
    return FolderLock(file, place, held)


HELD = "_llmva_folders"  # in a thread's own dict: where it is at work. It ends with the thread, and copies nothing
GATE = threading.Lock()  # between the look at what other threads hold and one's own claim


def _claim(directory: Path) -> tuple[Path, list[Path]]:
    """Note that this thread works in the folder; returns the note and the list that it is in."""
    me, place = threading.current_thread(), directory.resolve()
    with GATE:
        if any(place in vars(thread).get(HELD, ()) for thread in threading.enumerate() if thread is not me):
            raise _at_work(directory)
        held: list[Path] = vars(me).setdefault(HELD, [])
        held.append(place)
    return place, held


def _lock_file(file: IO[bytes], directory: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # others say that the file system has no locks, which is no reason not to work there
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _at_work(directory) from error


def _at_work(directory: Path) -> LlmvaError:
    return LlmvaError(
        f"Another llmva is at work in '{directory}': wait for its end, or choose another folder with --out."
    )


def is_locked(directory: Path) -> bool:
    """Whether another process has the lock of a folder; nothing is made there. False where locks are not known."""
    try:
        import fcntl

        with (directory / ".lock").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN) and (directory / ".lock").exists()
    return False
