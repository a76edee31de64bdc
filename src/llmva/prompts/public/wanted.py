"""What `--data` names: data sets of the registry, each with a local copy if one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmva.errors import UsageError
from llmva.prompts.public.mirror import find_copy
from llmva.prompts.public.registry import Entry, find

FORM = "NAME or NAME=PATH, several with commas between them"


@dataclass(frozen=True)
class Wanted:
    """A set of the registry, and the path of a copy of it on this disk."""

    entry: Entry
    local: str | None = None


def parse_data(given: Sequence[str], folder: str | Path | None = None) -> list[Wanted]:
    """The sets named by values of `--data`, in order; `folder` has copies of those that are named without a path.

    Raises UsageError for an empty or unknown name, a missing path or copy, a set named twice, and a folder alone.
    """
    if folder is not None and not given:
        raise UsageError("--data-dir applies to the sets of --data: add --data, or leave it out.")
    sets = [_parse(term, folder) for value in given for term in _terms(value)]
    names = [wanted.entry.name for wanted in sets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the data set {twice[0]} is named twice: name it once, with its local copy if it has one.")
    return sets


def _terms(value: str) -> list[str]:
    """Split at commas, unless what follows the first `=` is a path that has commas in it."""
    _, equals, path = value.partition("=")
    return [value] if equals and "," in path and _exists(path) else value.split(",")


def _parse(term: str, folder: str | Path | None) -> Wanted:
    name, equals, path = term.strip().partition("=")
    if not name.strip():
        raise UsageError(f"an empty data set was named: write {FORM}.")
    if not equals:
        if _exists(name) and not _is_known(name):
            raise UsageError(
                f"{name} is a file or folder, not a name: give it as --toxic or --benign, or as NAME=PATH."
            )
        entry = find(name)
        in_folder = folder is not None and entry.home.kind != "bundled"
        return Wanted(entry, find_copy(entry, Path(str(folder)).expanduser()) if in_folder else None)
    entry = find(name)
    if not path.strip():
        raise UsageError(f"{name}= lacks the path of a copy: write {FORM}.")
    if entry.home.kind == "bundled":
        raise UsageError(f"{entry.name} comes with the package: name it without a path.")
    if not _exists(path):
        raise UsageError(f"there is no file or folder {path.strip()!r}: check the path of the copy of {entry.name}.")
    return Wanted(entry, str(Path(path.strip()).expanduser()))


def _is_known(name: str) -> bool:
    try:
        find(name)
    except UsageError:
        return False
    return True


def _exists(path: str) -> bool:
    try:
        return Path(path.strip()).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL byte, a home that is not known
        return False
