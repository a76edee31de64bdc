"""Ctrl-C ends a command with one sentence: what is kept, and how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmva.errors import LlmvaError

EXIT_CODE = 130  # as shells say it: 128 and the number of SIGINT
NOT_BEGUN = "Interrupted before the work began, so nothing has changed: run the same command again."
NOTHING_KEPT = "Interrupted before the end, and nothing was written: run the same command again."


class Interrupted(LlmvaError):  # noqa: N818 (an end that the user asked for)
    """The user ended the command; the message says what is kept."""

    exit_code = EXIT_CODE


@dataclass
class Kept:
    """`say` tells what is kept if Ctrl-C comes now; at first that nothing has changed."""

    say: Callable[[], str] = lambda: NOT_BEGUN


@contextmanager
def interruptible() -> Iterator[Kept]:
    """If Ctrl-C ends the block, what is given `say` tells what is kept. Raises Interrupted then."""
    kept = Kept()
    try:
        yield kept
    except Interrupted:
        raise
    except BaseException as error:
        if was_interrupted(error):
            raise Interrupted(kept.say()) from error
        raise


class CtrlC:
    """The handler of SIGINT: raises KeyboardInterrupt as Python's does, and remembers that it did.

    Libraries that are hit in the middle of an import swallow it, or turn it into another error.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """Until the end of the block, `was_interrupted` knows of every Ctrl-C. Where SIGINT is ignored, it stays so."""
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, CtrlC())
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def was_interrupted(error: BaseException | None = None) -> bool:
    """Whether Ctrl-C was pressed, or is behind an error."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, CtrlC) and handler.pressed:
        return True
    for _ in range(20):
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_run(directory: Path, restart: bool) -> Callable[[], str]:
    """What is kept of a run in `directory`, asked for before it begins."""
    before = _stamp(directory / "run.json")

    def say() -> str:
        from llmva.runs.record import read_run

        if _stamp(directory / "run.json") == before and (restart or before is None):
            return NOT_BEGUN
        again = _again(restart)
        try:
            record = read_run(directory)
        except LlmvaError:  # another's, and what is wrong with it will be said next time
            return NOTHING_KEPT
        if record.get("test", {}).get("after"):
            return f"Interrupted after the last measurement: {again} to see the result."
        done = len(record["iterations"])
        if not done:
            return "Interrupted before iteration 0 was measured: run the same command again."
        return f"Interrupted after iteration {done - 1}: {again} to resume."

    return say


def of_study(directory: Path, restart: bool) -> Callable[[], str]:
    """What is kept of a comparison or an ablation in `directory`, asked for before it begins."""
    begun = _stamp(directory / "identity.json")

    def say() -> str:
        if _stamp(directory / "identity.json") == begun and (restart or begun is None):
            return NOT_BEGUN
        parts = sum(1 for _ in (directory / "cells").glob("*.json"))
        if not parts:
            return "Interrupted before anything was measured: run the same command again."
        return f"Interrupted with {parts} measurement{'s' * (parts > 1)} kept: {_again(restart)} to resume."

    return say


def of_export(out: Path | None) -> Callable[[], str]:
    """What is kept of an export to `out`."""
    nothing = "nothing is written" if out is None else f"there is no '{out}'"
    return lambda: f"Interrupted before the end, so {nothing}: run the same command again."


def of_upload(repo: str, dry_run: bool) -> Callable[[], str]:
    """What is kept of an upload to `repo`, which is one commit: there or not."""
    if dry_run:
        return lambda: NOTHING_KEPT
    return lambda: (
        f"Interrupted: look whether {repo} has the new commit on the hub, and run the same command again if not."
    )


def _again(restart: bool) -> str:
    return "run the same command again without --restart" if restart else "run the same command again"


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino
