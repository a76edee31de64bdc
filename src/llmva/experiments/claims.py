"""Who is at work on which cell: files that let any number of processes share a folder, on one machine or on several.

A claim is a file NAME.N, made as a link, which exactly one of several processes can make. N counts from 1; the claim
with the highest N holds. If its process is dead, another makes NAME.N+1. Nobody removes a claim that holds for another,
so a slow process never removes a new claim instead of the old one. Whoever ends removes the cell's claims.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.files import is_locked, write_new

BEAT = 10.0  # seconds between two signs of life
SILENCE = 90.0  # seconds without one after which a process on another machine counts as dead


class Claimed(Exception):  # noqa: N818 (no error: another process measures this cell)
    """Another process is at work on the cell that was asked for."""


class Claims:
    """The claims in a folder, which is made.

    Args:
        silence: seconds after which a claim from another machine is taken over. Dead processes of this machine are
            known at once.
    """

    def __init__(self, directory: Path, silence: float = SILENCE) -> None:
        self.directory, self.silence = directory, silence
        self._owner = owner()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The folder '{directory}' cannot be written ({error.strerror}): choose another with --out."
            ) from error

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the claim on a cell during the block. Raises Claimed if another process, or this one, has it."""
        number = self._take(name)
        path = self._path(name, number)
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            for before in range(1, number + 1):  # its own last: it holds until the dead ones are gone
                self._path(name, before).unlink(missing_ok=True)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Host, pid and more of the living process that is at work on a cell; None if there is none."""
        number = self._highest(name)
        held = None if number == 0 else _read(self._path(name, number))
        return held if held is not None and self._alive(name, number, held) else None

    def held(self) -> list[str]:
        """Names of the cells at which living processes are at work."""
        names = {path.name.rpartition(".")[0] for path in self.directory.iterdir() if not path.name.endswith(".part")}
        return sorted(name for name in names if name and self.holder(name) is not None)

    def _take(self, name: str) -> int:
        number = self._highest(name)
        if number:
            held = _read(self._path(name, number))
            if held is None:  # its process has just removed it
                raise Claimed(name)
            if self._alive(name, number, held):
                raise Claimed(name)
        if not write_new(self._path(name, number + 1), json.dumps(self._owner).encode()):
            raise Claimed(name)
        return number + 1

    def _highest(self, name: str) -> int:
        parts = (path.name.rpartition(".") for path in self.directory.glob(f"{name}.*"))
        return max((int(end) for begin, _, end in parts if begin == name and end.isdecimal()), default=0)

    def _path(self, name: str, number: int) -> Path:
        return self.directory / f"{name}.{number}"

    def _alive(self, name: str, number: int, held: dict[str, Any]) -> bool:
        if (held["host"], held["space"]) == (self._owner["host"], self._owner["space"]):
            return bool(_began(held["pid"]) == held["began"])
        try:
            last = self._path(name, number).stat().st_mtime
        except OSError:
            return True  # it ends this moment; the next look will tell
        return self._now() - last < self.silence

    def _now(self) -> float:
        """The time by the clock of the folder's machine, which writes the times of files."""
        probe = self.directory / f"clock-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)


def at_work(directory: Path) -> bool:
    """Whether a process works in the folder of a run, a comparison or a panel of a study."""
    claims = directory / "claims"
    return is_locked(directory) or (claims.is_dir() and bool(Claims(claims).held()))


def owner() -> dict[str, Any]:
    """What tells this process from all others: host, name space of pids (containers have their own), pid, start."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink()) + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        space = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": space, "pid": pid, "began": _began(pid)}


def _began(pid: int) -> float | None:
    """When a process of this machine began; None if it has ended. A pid is used again, with another begin."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held
