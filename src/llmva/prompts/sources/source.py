"""Read one prompt source: its spec, the rows that it selects, and its own splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmva.errors import UsageError
from llmva.prompts.public.registry import entries
from llmva.prompts.sources.columns import check_side, choose_column, short
from llmva.prompts.sources.conversations import about_chats
from llmva.prompts.sources.gold import read_gold
from llmva.prompts.sources.hub import read_folder, read_hub
from llmva.prompts.sources.spec import Spec
from llmva.prompts.sources.tables import Table, read_file
from llmva.prompts.sources.texts import read_texts
from llmva.prompts.types import Asked, Prompt, text_of

# What data sets call the splits that we call train, validation and test.
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass
class Source:
    """Texts and conversations by split; the one key "" says that there are no splits, or that rows were picked.

    `said` tells the user what was read: from where, how many prompts, which column, and the first of them. It is for
    their eyes alone, while `warnings`, which say what was guessed or left out, are kept with a run and published.
    """

    name: str
    texts: dict[str, list[Asked]]
    warnings: list[str] = field(default_factory=list)
    said: str = ""
    gold: dict[Asked, tuple[str, ...]] = field(default_factory=dict)  # prompt -> its gold answers, where there are any

    def prompt(self, asked: Asked, benign: bool) -> Prompt:
        return Prompt.of(asked, benign, self.name, self.gold.get(asked, ()))

    def add_gold(self, texts: Sequence[Asked], answers: Sequence[tuple[str, ...]]) -> None:
        """Keep the gold answers of prompts; a prompt that comes twice has all of its answers."""
        for text, more in zip(texts, answers, strict=True):
            if more:
                self.gold[text] = tuple(dict.fromkeys((*self.gold.get(text, ()), *more)))

    def all_texts(self) -> list[Asked]:
        return [text for texts in self.texts.values() for text in texts]


def read_source(spec: Spec, benign: bool, max_chars: int) -> Source:
    """Read what the spec names. Raises UsageError, as the readers do, and for a split that is not there.

    A file that says in a column of labels that rows are of another side than `benign` is refused, unless the spec names
    the column of prompts.
    """
    tables = _read_tables(spec)
    source = Source(spec.name, {})
    if spec.parts:
        picked = [(_pick(tables, part.name, spec), part) for part in spec.parts]
        chosen = [("", table.at(part.rows(len(table.numbers)), table.where)) for table, part in picked]
    elif len(tables) == 1:
        chosen = [("", table) for table in tables.values()]
    else:
        chosen = _own_splits(tables, spec, source.warnings)
    columns: dict[str, None] = {}
    guesses: dict[str, None] = {}  # as keys, since they come once a table
    for split, table in chosen:
        asked, gold = spec.columns(table.columns)
        column, guess = choose_column(table, asked)
        if asked is None:
            check_side(table, column, benign, gold)
        read = read_texts(table, column, max_chars)
        source.texts.setdefault(split, []).extend(read)
        if gold is not None:
            source.add_gold(read, _gold_of(table, gold, spec, benign))
        columns[column] = None
        guesses |= dict.fromkeys(filter(None, (guess, table.note, about_chats(table.cells(column), read))))
        empty = gold if gold is not None and not source.gold else None
    texts = source.all_texts()
    if not texts:
        raise UsageError(f"{spec.given!r} selects no prompts: widen its split or put prompts into it.")
    if empty is not None:
        raise UsageError(f"the column {empty!r} of {spec.base} holds no gold answers: name one that does after the =.")
    named = " and ".join(map(repr, columns))
    first = short(text_of(texts[0]))
    source.said = f"{spec.given}: read {len(texts)} prompts from {named}, the first being {first}{_of_gold(source)}."
    if guesses:
        source.warnings.append(f"{spec.name}: {'; '.join(guesses)}.")
    return source


def _gold_of(table: Table, column: str, spec: Spec, benign: bool) -> list[tuple[str, ...]]:
    """As `read_gold`. Raises UsageError for prompts that no one should answer."""
    if not benign:
        raise UsageError(f"{spec.given!r} names gold answers of toxic prompts, which have none: leave out ={column}.")
    return read_gold(table, column)


def _of_gold(source: Source) -> str:
    """What is told of gold answers, "" for nothing."""
    texts = source.all_texts()
    known = [text for text in texts if text in source.gold]
    if not known:
        return ""
    answers = " | ".join(source.gold[known[0]])
    return f"; {len(known)} of them have gold answers, the first being {short(answers)}"


def unique_name(name: str, taken: Collection[str]) -> str:
    """`name`, or NAME-2, NAME-3 and so on: the first that is not taken."""
    return next(new for new in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 2))) if new not in taken)


def _read_tables(spec: Spec) -> dict[str, Table]:
    if not spec.local:
        _refuse_registered(spec.base)
        return read_hub(spec.base)
    path = Path(spec.base)
    return read_folder(path) if path.is_dir() else _split_by_column(read_file(path))


def _refuse_registered(name: str) -> None:
    """Raises UsageError for a name of the registry: ids of the hub nearly always have an owner."""
    if "/" not in name and name.casefold() in entries():
        raise UsageError(f"{name} is a set of the registry, which brings its side along: name it by --data {name}.")


def _split_by_column(table: Table) -> dict[str, Table]:
    """A file whose column `split` says train, validation or test in every row has splits of its own."""
    marks = list(table.cells("split")) if "split" in table.columns else []
    if not marks or not all(isinstance(mark, str) and mark in SPLIT_NAMES for mark in marks):
        if any(isinstance(mark, str) and mark in SPLIT_NAMES for mark in marks):
            note = "; ".join(filter(None, (table.note, "its column 'split' is not used, since not every row has one")))
            table = replace(table, note=note)
        return {"train": table}
    return {
        name: table.at([i for i, mark in enumerate(marks) if mark == name], f"{table.where} ({name})")
        for name in dict.fromkeys(marks)
    }


def _pick(tables: Mapping[str, Table], name: str, spec: Spec) -> Table:
    there = ", ".join(tables)
    if not name:
        if len(tables) > 1:
            raise UsageError(f"{spec.base} has several splits: name one of them before the slice ({there}).")
        return next(iter(tables.values()))
    if name not in tables:
        raise UsageError(f"{spec.base} has no split {name!r}: choose one of its splits ({there}).")
    return tables[name]


def _own_splits(tables: Mapping[str, Table], spec: Spec, warnings: list[str]) -> list[tuple[str, Table]]:
    known = [(SPLIT_NAMES[name], table) for name, table in tables.items() if name in SPLIT_NAMES]
    unknown = [name for name in tables if name not in SPLIT_NAMES]
    if not known:
        raise UsageError(f"{spec.base} has several splits: add ::split with one of them ({', '.join(tables)}).")
    if unknown:
        warnings.append(f"{spec.base}: the splits {', '.join(unknown)} are not used; add ::split to use one.")
    return known
