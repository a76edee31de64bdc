"""The registry: public prompt data sets by name, with their homes, licences, pinned revisions and sides.

It is data, in `data/registry.json`; this module reads it, finds names in it, lists it and shows licences. The sets
themselves are read by `llmva.prompts.entries`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from llmva.errors import LlmvaError, UsageError

Side = Literal["toxic", "benign"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Only(_Frozen):
    """Rows that belong to the set: those whose cell in `column` is one of `values`."""

    column: str
    values: tuple[str, ...]


class SideRule(_Frozen):
    """How the cell in `column` divides rows into the two sides."""

    column: str
    toxic: tuple[str, ...]
    benign: tuple[str, ...]


class Part(_Frozen):
    """A table of a set: its place in the set's home, and how its rows become prompts.

    `columns` are tried in order, row by row, and the first cell with text is the prompt. A part has either one `side`
    or a `label` that divides it. `use` is the split that its rows belong to; None: it is cut like any other source.
    `files` are name patterns of local copies; for a home on GitHub the first is the path there. `rows` is the number of
    prompts after `only`; None: unknown. `options` go to the `datasets` library. `gold` is a column of right answers,
    which a copy may lack.
    """

    columns: tuple[str, ...]
    side: Side | None = None
    label: SideRule | None = None
    only: Only | None = None
    config: str | None = None
    split: str = "train"
    use: Literal["train", "validation", "test"] | None = None
    files: tuple[str, ...] = ()
    rows: int | None = None
    gold: str | None = None
    options: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _one_rule(self) -> Part:
        if (self.side is None) == (self.label is None):
            raise ValueError("a part needs a side or a label, and not both")
        return self

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.side,) if self.side else ("toxic", "benign")


class Home(_Frozen):
    """Where a set lives. `revision` is a commit hash; None means that it is not pinned. `gated` sets need a login."""

    kind: Literal["hub", "github", "bundled"]
    id: str | None
    revision: str | None
    gated: bool

    @property
    def url(self) -> str | None:
        where = {"hub": "https://huggingface.co/datasets/", "github": "https://github.com/", "bundled": None}[self.kind]
        return f"{where}{self.id}" if where else None


class Entry(_Frozen):
    """A data set. `unchecked` names the fields that we could not check against public material.

    `copies` are files in which other public code holds the set or one side of it; only copies on this disk are read so.
    """

    name: str
    aliases: tuple[str, ...]
    home: Home
    licence: str  # SPDX where there is such a name
    licence_note: str | None
    arxiv: str | None
    description: str
    parts: tuple[Part, ...]
    copies: tuple[Part, ...] = ()
    unchecked: tuple[str, ...]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that it has, toxic first."""
        sides = {side for part in self.parts for side in part.sides}
        return tuple(side for side in ("toxic", "benign") if side in sides)

    @property
    def rows(self) -> int | None:
        """Number of prompts, None if it is not known."""
        counts = [part.rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


def entries() -> Mapping[str, Entry]:
    """Name -> entry, in the registry's order."""
    text = (resources.files("llmva.prompts") / "data" / "registry.json").read_text(encoding="utf-8")
    validated = [Entry.model_validate(row) for row in json.loads(text)]
    return {entry.name: entry for entry in validated}


def find(name: str) -> Entry:
    """The entry of a name or an alias; case, and `_` for `-`, do not matter.

    Raises UsageError naming the nearest names.
    """
    wanted = name.strip().casefold().replace("_", "-")
    by_name = {alias: entry for entry in entries().values() for alias in (entry.name, *entry.aliases)}
    if wanted in by_name:
        return by_name[wanted]
    # Names with the same beginning come first: for "or-bench" difflib finds only one of its three sets.
    near = [known for known in by_name if wanted and (known.startswith(wanted) or wanted.startswith(known))]
    near += difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)
    if near:
        names = list(dict.fromkeys(by_name[known].name for known in near))
        raise UsageError(f"there is no data set {name!r} in the registry: choose {_either(names)}.")
    raise UsageError(f"there is no data set {name!r} in the registry: choose one of {', '.join(entries())}.")


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def list_data() -> list[dict[str, Any]]:
    """The registry as plain JSON types, a dict per set, for people and programs to choose from."""
    return [
        {
            "name": entry.name,
            "sides": list(entry.sides),
            "rows": entry.rows,
            "licence": entry.licence,
            "licence_note": entry.licence_note,
            "gated": entry.home.gated,
            "home": entry.home.url,
            "revision": entry.home.revision,
            "pinned": entry.home.revision is not None or entry.home.kind == "bundled",
            "configs": [part.config for part in entry.parts],
            "splits": [part.split for part in entry.parts],
            "columns": [list(part.columns) for part in entry.parts],
            "arxiv": entry.arxiv,
            "description": entry.description,
            "aliases": list(entry.aliases),
            "unchecked": list(entry.unchecked),
        }
        for entry in entries().values()
    ]


def first_use_notice(name: str, folder: Path | None = None) -> str | None:
    """One sentence with the licence of a set at its first use, None afterwards; `name` may be `NAME=PATH`.

    A mark in `folder` (default: `cache_folder()`) holds the licence and the revision, so a change of either gives the
    sentence again. Where no file can be written, every use gives it. Raises UsageError as `find`.
    """
    from llmva.files import cache_folder, write_text

    entry = find(name.partition("=")[0])
    if entry.home.kind == "bundled":
        return None  # it came with the package and its licence
    mark = (folder or cache_folder()) / "licences" / f"{entry.name}.txt"
    terms = f"{entry.licence}\n{entry.home.revision}\n"
    with suppress(OSError, UnicodeDecodeError):
        if mark.read_text(encoding="utf-8") == terms:
            return None
    with suppress(OSError, LlmvaError):  # the sentence may come twice
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_text(mark, terms)
    licence = "states no licence" if entry.licence == "none stated" else f"has the licence {entry.licence}"
    note = f" ({entry.licence_note})" if entry.licence_note else ""
    return f"The data set {entry.name} {licence}{note}: see {entry.home.url} before you use it or pass it on."
