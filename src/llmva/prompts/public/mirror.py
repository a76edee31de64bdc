"""A folder with copies of registered sets, as `--data-dir` names it, and where in it a set is looked for.

A set is a folder there, called by its name in the registry or as its home calls it, or a file; files may also lie one
folder deeper, as in mirrors that sort them. docs/datasets.md lists the places. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmva.errors import UsageError
from llmva.prompts.public.registry import Entry, Part
from llmva.prompts.sources.spec import READABLE


def find_copy(entry: Entry, folder: Path) -> str:
    """The path of the copy of a set in a folder, as `NAME=PATH` would give it.

    Raises UsageError if there is no such folder, no copy in it, or more than one that might be meant.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}: check the path given as --data-dir.")
    folders, files = _folders(entry), _files(entry)
    for place in (folder / name for name in folders):
        if place.is_dir() and _holds(entry, place):
            return str(place)
    deeper = [path for path in sorted(_members(folder).values()) if path.is_dir() and not path.name.startswith(".")]
    for places in ([folder], deeper):
        copies = [copy for place in places if (copy := _copy_among(entry, place, files)) is not None]
        if len(copies) > 1:
            raise UsageError(
                f"{folder} has several copies of {entry.name} ({', '.join(map(str, copies))}): name one as "
                f"{entry.name}=PATH."
            )
        if copies:
            return str(copies[0])
    raise UsageError(
        f"{folder} has no copy of {entry.name}, neither a folder {', '.join(folders)} nor, there or one folder deeper, "
        f"a file {', '.join(files)} (or with {', '.join(READABLE[1:])} instead of .csv): put one there, or name a copy "
        f"as {entry.name}=PATH."
    )


def _names(entry: Entry) -> list[str]:
    names = (entry.name, *entry.aliases)
    return list(dict.fromkeys(form for name in names for form in (name, name.replace("-", "_"))))


def _folders(entry: Entry) -> list[str]:
    """Folders that may hold a set, in the order in which they are tried."""
    home = str(entry.home.id)
    folders = [*_names(entry), home, home.rpartition("/")[2]]
    if entry.home.kind == "hub":
        snapshot = f"datasets--{home.replace('/', '--')}/snapshots/{entry.home.revision}"
        folders += [snapshot, f"hub/{snapshot}"]
    return list(dict.fromkeys(folders))


def _files(entry: Entry) -> list[str]:
    """Files that may hold a set or a part of it; those named after it may have any of the endings READABLE.

    Files of the hub are known by their folder alone: many sets have a train.jsonl.
    """
    at_home = entry.parts if entry.home.kind == "github" else ()
    known = [_base_name(part) for part in (*at_home, *entry.copies)]
    return list(dict.fromkeys([*(f"{name}.csv" for name in _names(entry)), *known]))


def _base_name(part: Part) -> str:
    return part.files[0].rpartition("/")[2]


def _holds(entry: Entry, place: Path) -> bool:
    """Whether a folder may be the set's: several sets can share a home on GitHub, and a copy need not have them all."""
    if entry.home.kind != "github" or place.name in _names(entry):
        return True
    return any(next(place.rglob(_base_name(part)), None) is not None for part in entry.parts)


def _copy_among(entry: Entry, place: Path, files: list[str]) -> Path | None:
    """The set among the files of a folder: a file, the folder itself if the set's parts are files of their own."""
    members = _members(place)
    for name in files:
        stem = name.removesuffix(".csv")
        endings = READABLE if stem in _names(entry) else (".csv",)
        forms = [f"{stem}{ending}" for ending in endings] if name.endswith(".csv") else [name]
        present = (members[form.casefold()] for form in forms if form.casefold() in members)
        path = next((path for path in present if path.is_file()), None)
        if path is not None:
            of_several = len(entry.parts) > 1 and name in map(_base_name, entry.parts)
            return place if of_several else path
    return None


def _members(folder: Path) -> Mapping[str, Path]:
    """What lies in a folder, by name in lower case."""
    try:
        return {path.name.casefold(): path for path in sorted(folder.iterdir(), reverse=True)}
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read ({error.strerror}): check --data-dir.") from error
