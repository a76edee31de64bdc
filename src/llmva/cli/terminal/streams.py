"""The standard streams, whatever they are: closed, a pipe that nobody reads any more, or unable to show a letter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

# What our own lines hold beyond ASCII, most of it as one letter, so that columns of tables stay in line.
PLAIN = str.maketrans(
    {
        "–": "-", "−": "-", "×": "x", "±": "~", "†": "+", "·": "|", "•": "*", "’": "'", "‘": "'", "“": '"', "”": '"',
        "°": " deg", "…": "...", "→": "->", "≤": "<=", "≥": ">=",
    }
)  # fmt: skip


@contextmanager
def safe_streams() -> Iterator[None]:
    """Streams that can be written until the end of the block, and no traceback of what was left in them."""
    _open_closed()
    _keep_stdout()
    for stream in (sys.stdout, sys.stderr):
        if not unicode(stream) and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # the interpreter flushes once more at its end, which would fail again
                discard(stream)


def discard(stream: Any) -> None:
    """Send what is still written to a stream nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def unicode(stream: Any) -> bool:
    """Whether a stream takes any letter."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")


class Shown:
    """A text stream for what a person may see: letters that it cannot show are replaced by PLAIN's.

    Where nothing more can be written, as on a full disk, the work goes on unseen. A closed pipe ends it, as ever.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.plain = not unicode(stream)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text.translate(PLAIN) if self.plain else text)
        except BrokenPipeError:
            raise
        except OSError:
            discard(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            discard(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _keep_stdout() -> None:
    """Send what libraries not written in Python print to stderr, so that stdout has results alone."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stdout.fileno() == 1 and os.fstat(2):
            sys.stdout.flush()
            sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: PTH123, SIM115
            os.dup2(2, 1)


def _open_closed() -> None:
    """Give closed streams a place, before a file of ours gets their number and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # takes the lowest number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, cast(IO[str], open(os.devnull, mode, encoding="utf-8")))  # noqa: PTH123, SIM115
