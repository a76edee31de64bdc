"""The spec of a prompt source, `PATH_OR_ID[:column[=gold][:split]]`, taken apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmva.errors import UsageError

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
FORM = "PATH_OR_ID[:column[=gold][:split]]"

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")  # name, owner/name, or owner/name/configuration
_PART = re.compile(r"(?P<name>[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Part:
    """One term of a split such as `train[:10%]`: a split's name ("" for the only one) and a slice of its rows."""

    name: str
    start: str = ""
    stop: str = ""

    def rows(self, n: int) -> range:
        """The row numbers (from 0) that this term takes out of n rows; percentages round to the nearest row."""

        def place(bound: str) -> int | None:
            if bound.endswith("%"):
                return round(n * int(bound[:-1]) / 100)
            return int(bound) if bound else None

        return range(n)[place(self.start) : place(self.stop)]


@dataclass(frozen=True)
class Spec:
    """A prompt source as given on the command line."""

    given: str
    base: str  # a path that exists, or a data set id
    local: bool
    column: str | None = None  # as given: of the prompts, or `prompts=gold answers`
    parts: tuple[Part, ...] = ()  # empty: no split was asked for

    def columns(self, there: Sequence[str]) -> tuple[str | None, str | None]:
        """The columns of prompts and of gold answers that were asked for, in a table with the columns `there`.

        A column whose own name holds the sign is meant by it.
        """
        if self.column is None or "=" not in self.column or self.column in there:
            return self.column, None
        prompts, _, gold = self.column.rpartition("=")
        return prompts or None, gold

    @property
    def name(self) -> str:
        """What reports call the source: the file's stem, the folder's or the data set's last name."""
        path = Path(self.base)
        name = path.stem if self.local and path.is_file() else path.resolve().name if self.local else path.name
        return name or "prompts"


def parse_spec(given: str) -> Spec:
    """Split a spec at its colons; the longest beginning that exists on disk is the path, so paths may hold colons.

    Raises UsageError for an empty spec, a file that is not there, an unknown ending or a malformed split.
    """
    if not given.strip() or "\0" in given:
        raise UsageError(f"an empty prompt source was given: write {FORM}.")
    base, rest, local = _split_base(given)
    if local and Path(base).is_file() and Path(base).suffix.lower() not in READABLE:
        raise UsageError(f"{base} is not a kind of prompt file that can be read: use one of {', '.join(READABLE)}.")
    column, split = _split_rest(rest)
    return Spec(given, base, local, column or None, _parse_split(split, given))


def _split_base(given: str) -> tuple[str, str, bool]:
    ends = [i for i, letter in enumerate(given) if letter == ":"]
    for end in [len(given), *reversed(ends)]:
        base = str(Path(given[:end]).expanduser()) if end else ""
        if base and _exists(base):
            return base, given[end + 1 :], True
    after_drive = 2 if _DRIVE.match(given) else 0
    end = given.find(":", after_drive)
    base, rest = (given, "") if end < 0 else (given[:end], given[end + 1 :])
    looks_like_file = (
        base.lower().endswith(READABLE)
        or base.startswith(".")
        or not _HUB_ID.fullmatch(base)
        or ("/" in base and _exists(base.split("/")[0]))  # a file misspelt in a folder that is there
    )
    if looks_like_file:
        raise UsageError(f"there is no file or folder {base!r}: check the path (a prompt source is {FORM}).")
    return base, rest, False


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # such as a name longer than the file system allows
        return False


def _split_rest(rest: str) -> tuple[str, str]:
    """`column:split` -> its two halves. A slice alone (`[200:]`, `train[:10%]`) is taken for a split."""
    if "[" in rest and ":" not in rest.split("[", 1)[0]:
        return "", rest
    column, _, split = rest.partition(":")
    return column, split


def _parse_split(split: str, given: str) -> tuple[Part, ...]:
    parts = []
    for term in split.split("+") if split else []:
        match = _PART.fullmatch(term.strip())
        if match is None or not term.strip():
            raise UsageError(
                f"the split {split!r} of {given!r} cannot be read: "
                "write it like train, train[200:], [:10%] or train+test."
            )
        parts.append(Part(match["name"], match["start"] or "", match["stop"] or ""))
    return tuple(parts)
