"""ASR, ORR and F1 by data set, before and after an edit: a table for the terminal and one in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmva.report.fitting import Fitting
from llmva.report.run.rows import Row, cost, rate_row, utility
from llmva.report.run.truth import truth_rows
from llmva.report.values import DASH, dicts, finite, part, printable

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all sets"
MEASURES = (  # field, name, fields whose numbers of prompts count, is it a score
    ("asr", "ASR", ("n_toxic",), False),
    ("orr", "ORR", ("n_benign",), False),
    ("f1", "F1", ("n_toxic", "n_benign"), True),
)


@dataclass(frozen=True)
class Group:
    """A data set with those of its rates that exist: ASR of a toxic side, ORR of a benign one, F1 of both."""

    name: str
    hint: str  # was the edit fitted on it?
    rows: tuple[Row, ...]


def groups(record: dict[str, Any]) -> list[Group]:
    """The sets of a record of `llmva evaluate --data`, then all of them together where they are several."""
    sets = dicts(record.get("sets"))
    single = [
        Group(str(one.get("name") or "unnamed"), "fitted on" if one.get("fitted_on") is True else "", _rows(one))
        for one in sets
    ]
    return [*single, Group(ALL, "", _rows(part(record, "test")))] if len(single) > 1 else single


def _rows(summaries: dict[str, Any]) -> tuple[Row, ...]:
    before, after = part(summaries, "before"), part(summaries, "after")

    def made() -> Iterator[Row]:
        for key, name, sizes, is_score in MEASURES:
            numbers = [finite(before.get(size)) or 0.0 for size in sizes]
            if all(numbers):
                scale = "score" if is_score else "share"
                yield rate_row(name, before, after, key, n=int(sum(numbers)), scale=scale, lower_is_better=not is_score)

    return tuple(made())


def transfer_table(record: dict[str, Any]) -> Fitting:
    """A row for each rate of each data set, with 95% intervals; utility and cost below.

    A narrow terminal gets no intervals.
    """
    return Fitting((lambda: _table(record, True), lambda: _table(record, False)), ("", "intervals"))


def _table(record: dict[str, Any], intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    spent = ", ".join(f"{name.lower()} {value}" for name, value in cost(record))
    title = Text(f"By data set, before and after the edit{' [95% intervals]' * intervals}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    table.caption = Text(spent, justify="left")
    table.add_column("data set")
    table.add_column("", no_wrap=True)
    for name in ("n", "before", "after"):
        table.add_column(name, justify="right" if name == "n" else "left", no_wrap=True)
    for group in groups(record):
        for number, row in enumerate(group.rows):
            # Text, not str: rich would read a data set named '[red]' as markup.
            title = Text(printable(group.name) if number == 0 else "", style="bold")
            if number == 0 and group.hint:
                title.append(f" ({group.hint})", style="dim")
            table.add_row(title, row.name, str(row.n), *_cells(row, intervals))
        table.add_section()
    for row in truth_rows(record):
        head, of = (Text(""), row.name) if row.level else (Text("with gold answers"), row.name.lower())
        table.add_row(head, of, str(row.n), *_cells(row, intervals))
    for row in utility(record):
        table.add_row(Text(row.name), "", DASH, *_cells(row, intervals))
    return table


def _cells(row: Row, intervals: bool) -> list[Any]:
    from rich.text import Text

    if intervals:
        return [Text(row.before_cell), Text(row.after_cell)]
    return [Text(row.before_text), Text(row.after_text)]


def transfer_markdown(record: dict[str, Any]) -> str:
    """A row for each data set, a column for each rate, as the paper's Appendix G has them."""
    measures = [row[1] for row in MEASURES]
    heads = [f"{name} {when}" for name in measures for when in ("before", "after")]
    lines = [f"| data set | toxic | benign | {' | '.join(heads)} |", f"| --- {'| --- ' * (len(heads) + 2)}|"]
    for group in groups(record):
        by_name = {row.name: row for row in group.rows}
        sizes = [str(by_name[name].n) if name in by_name else DASH for name in ("ASR", "ORR")]
        cells = []
        for name in measures:
            row = by_name.get(name)
            cells += [DASH, DASH] if row is None else [row.before_cell, row.after_cell]
        name = _escaped(group.name) + (f" ({group.hint})" if group.hint else "")
        lines.append(f"| {' | '.join([name, *sizes, *cells])} |")
    limits = [str(limit) for limit in record.get("limits") or ()]
    return "\n".join([*lines, *(f"\n{_escaped(limit)}" for limit in limits)]) + "\n"


def _escaped(text: str) -> str:
    """As text in a cell of a table, so that a name can neither end the cell nor be read as markup."""
    line = " ".join(printable(text).split())
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in line)
