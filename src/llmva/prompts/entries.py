"""Data sets of the registry as sources of prompts: from the hub, from GitHub, or from a copy on this disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.files import cache_folder
from llmva.prompts.public.registry import Entry, Part, Side, SideRule
from llmva.prompts.sources.gold import gold_answers
from llmva.prompts.sources.hub import read_folder, read_github, read_pinned
from llmva.prompts.sources.source import Source
from llmva.prompts.sources.spec import READABLE
from llmva.prompts.sources.tables import Table, read_file
from llmva.prompts.sources.texts import check_prompt
from llmva.prompts.store import read_bundled


def read_entry(
    entry: Entry, local: str | None, max_chars: int, folder: Path | None = None
) -> list[tuple[bool, Source]]:
    """A registered set as sources with their sides (benign?), toxic first; `local` is a copy of it on disk.

    A set with both sides gives two sources, `NAME (toxic)` and `NAME (benign)`. Rows without a usable prompt are left
    out and counted in the warnings of the first source, since nobody can mend a published set. Downloads go to
    `folder`. Raises UsageError as the readers do, and for a column or label that the registry does not expect.
    """
    if entry.home.kind == "bundled":
        return _read_bundled(entry, local)
    both = len(entry.sides) > 1
    by_side = {side: Source(f"{entry.name} ({side})" if both else entry.name, {}) for side in entry.sides}
    warnings: list[str] = []
    dropped = 0
    for part, table in _part_tables(entry, local, folder or cache_folder(), warnings):
        if table.note:
            warnings.append(f"{entry.name}: {table.note}.")
        for side, cell, gold in _sided_cells(part, table, entry):
            try:
                asked = check_prompt(cell, "a row", max_chars)
            except UsageError:
                dropped += 1
                continue
            by_side[side].texts.setdefault(part.use or "", []).append(asked)
            with suppress(UsageError):  # nobody can mend a published set
                by_side[side].add_gold([asked], [gold_answers(gold)])
    if not any(source.texts for source in by_side.values()):
        raise UsageError(f"{local or entry.home.id} holds no prompt of {entry.name}: check that it is that set.")
    if dropped:
        warnings.append(
            f"{entry.name}: {dropped} rows left out, which hold no prompt or one of more than {max_chars:,} characters."
        )
    if local is not None:
        missing = [side for side, source in by_side.items() if not source.texts]
        warnings += [f"{entry.name}: {local} holds none of its {side} prompts." for side in missing]
    sources = [(side == "benign", source) for side, source in by_side.items() if source.texts]
    sources[0][1].warnings += warnings
    return sources


def _read_bundled(entry: Entry, local: str | None) -> list[tuple[bool, Source]]:
    if local is not None:
        raise UsageError(f"{entry.name} comes with the package: name it without a path.")
    sources: dict[tuple[bool, str], Source] = {}
    for split, prompts in read_bundled().splits():
        for prompt in prompts:
            source = sources.setdefault((prompt.benign, prompt.source), Source(prompt.source, {}))
            source.texts.setdefault(split, []).append(prompt.text)
    return [(benign, source) for (benign, _), source in sources.items()]


def _part_tables(entry: Entry, local: str | None, folder: Path, warnings: list[str]) -> Iterator[tuple[Part, Table]]:
    if local is not None:
        yield from _local_tables(entry, Path(local).expanduser(), warnings)
        return
    home = entry.home
    for part in entry.parts:
        if home.kind == "github":
            yield part, read_file(read_github(entry.name, str(home.id), part.files[0], home.revision, folder))
        else:
            tables = read_pinned(entry.name, str(home.id), part.config, home.revision, part.options, home.gated)
            yield part, _split_of(tables, part, entry)


def _local_tables(entry: Entry, path: Path, warnings: list[str]) -> list[tuple[Part, Table]]:
    """The parts of a set in a file, or in a folder: by the files' names, else as `datasets` reads the folder.

    A missing split gives a warning. A missing file that holds a side of its own raises UsageError.
    """
    if path.is_file():
        return [(_part_of_file(entry, path), _readable(path))]
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {str(path)!r}: check the path of the copy of {entry.name}.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READABLE)
    by_part = [(part, [file for file in files if _is_of(part, file.relative_to(path))]) for part in entry.parts]
    if not any(matching for _, matching in by_part):
        return [(part, _split_of(read_folder(path, part.config), part, entry)) for part in entry.parts]
    for part in [part for part, matching in by_part if not matching]:
        name = part.files[0].rsplit("/", 1)[-1]
        if not _differ_in_split(entry):
            raise UsageError(f"{path} has no file {name}, a part of {entry.name}: put it there.")
        warnings.append(f"{entry.name}: {path} has no {name}, so its {part.use} prompts are not used.")
    return [(part, read_file(file)) for part, matching in by_part for file in _nearest(matching)]


def _nearest(files: Sequence[Path]) -> list[Path]:
    """Those in the folder that is least deep: a set does not hold the same file twice."""
    depth = min((len(file.parts) for file in files), default=0)
    return [file for file in files if len(file.parts) == depth]


def _part_of_file(entry: Entry, path: Path) -> Part:
    matching = [part for part in (*entry.parts, *entry.copies) if _is_of(part, Path(path.name))]
    if matching:
        return matching[0]
    if _differ_in_split(entry):
        return entry.parts[0].model_copy(update={"use": None})  # the file is cut into splits of ours
    names = " and ".join(part.files[0] for part in entry.parts)
    raise UsageError(f"{entry.name} has several parts: give the folder with {names} in it.")


def _differ_in_split(entry: Entry) -> bool:
    """Whether all parts are read alike and differ only in the split that they hold."""
    alike = [part.model_copy(update={"use": None, "split": "", "rows": None, "files": ()}) for part in entry.parts]
    return all(part == alike[0] for part in alike)


def _is_of(part: Part, path: Path) -> bool:
    """Whether one of the part's patterns fits the end of the path."""
    for pattern in part.files:
        depth = pattern.count("/") + 1
        ends = {"/".join(path.parts[-n:]) for n in (1, depth)}
        # A copy of one file often loses its folders, so a name without wildcards is enough by itself.
        accepted = {pattern} if "*" in pattern else {pattern, pattern.rsplit("/", 1)[-1]}
        if any(fnmatch(end.casefold(), form.casefold()) for end in ends for form in accepted):
            return True
    return False


def _readable(path: Path) -> Table:
    if path.suffix.lower() not in READABLE:
        raise UsageError(f"{path} is not a kind of prompt file that can be read: use one of {', '.join(READABLE)}.")
    return read_file(path)


def _split_of(tables: Mapping[str, Table], part: Part, entry: Entry) -> Table:
    if part.split in tables:
        return tables[part.split]
    if len(tables) == 1 and len(entry.parts) == 1:  # a copy of the only split, which may have any name
        return next(iter(tables.values()))
    raise UsageError(
        f"{entry.name} has no split {part.split!r} here ({', '.join(tables)}): give a copy of revision "
        f"{entry.home.revision}, or update llmva."
    )


def _sided_cells(part: Part, table: Table, entry: Entry) -> Iterator[tuple[Side, Any, Any]]:
    """Side, prompt cell and cell of gold answers (None without) of each row that belongs to the set."""
    columns = [name for name in part.columns if name in table.columns]
    needed = [rule.column for rule in (part.only, part.label) if rule is not None]
    missing = [name for name in needed if name not in table.columns] + ([] if columns else [part.columns[0]])
    if missing:
        raise UsageError(
            f"{table.where} has no column {missing[0]!r}, which the registry expects of {entry.name}, but "
            f"{', '.join(table.columns) or 'none'}: give a copy of revision {entry.home.revision}, or read it with "
            "--toxic or --benign and :column."
        )
    cells = [table.cells(name) for name in columns]
    kinds = table.cells(part.only.column) if part.only else None
    labels = table.cells(part.label.column) if part.label else None
    gold = table.cells(part.gold) if part.gold in table.columns and part.gold else None
    for i, number in enumerate(table.numbers):
        if part.only and kinds is not None and _plain(kinds[i]) not in part.only.values:
            continue
        side = part.side
        if part.label and labels is not None:
            side = _side(part.label, labels[i], f"{table.unit} {number} of {table.where}", entry)
        assert side is not None  # a part has a side or a label
        prompt = next((cell for cell in (_first(column[i]) for column in cells) if _filled(cell)), None)
        yield side, prompt, None if gold is None else gold[i]


def _side(rule: SideRule, cell: Any, where: str, entry: Entry) -> Side:
    value = _plain(cell)
    if value in rule.toxic:
        return "toxic"
    if value in rule.benign:
        return "benign"
    raise UsageError(
        f"{where} has {value!r} in {rule.column!r}, not {', '.join((*rule.toxic, *rule.benign))}: give a copy of "
        f"revision {entry.home.revision} of {entry.name}."
    )


def _plain(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _filled(cell: Any) -> bool:
    return bool(cell.strip()) if isinstance(cell, str) else bool(cell)


def _first(cell: Any) -> Any:
    """The first of several turns, where these are plain strings; chat messages are left to `check_prompt`."""
    if isinstance(cell, Sequence) and not isinstance(cell, str) and cell and isinstance(cell[0], str):
        return cell[0]
    return cell
