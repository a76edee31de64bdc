"""Tables for terminals of any width: what is least needed is left out, then names are folded, then rows become lists.

No number is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

NAME_WIDTH = 14  # columns of the terminal that a cell of words may shrink to, line by line
WIDE = 100  # from here on a table keeps all it has, and names are folded instead


@dataclass(frozen=True)
class Fitting:
    """A rich renderable: the first of `tables` that fits, else the last one's rows as lists.

    `left_out` are words for what each table lacks, told below it; "" for nothing. Words are folded where the last
    table would not fit without, and before anything is left out on a wide terminal or with `folds`.
    """

    tables: Sequence[Callable[[], Table]]
    left_out: Sequence[str]
    folds: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        every = list(zip(self.tables, self.left_out, strict=True))
        early = self.folds or options.max_width >= WIDE
        tries = [(*one, fold) for one in every for fold in ((False, True) if early else (False,))]
        for make, left_out, fold in tries if early else [*tries, (*every[-1], True)]:
            table, lacking = make(), left_out
            if _hold(table, console, options, fold) <= options.max_width:
                yield table
                break
        else:
            yield from _lists(table)
        if lacking:
            yield Text(f"Left out at this width: {lacking}.", style="dim")


def _hold(table: Table, console: Console, options: ConsoleOptions, fold: bool) -> int:
    """Give columns of numbers (`no_wrap`) the width of their cells; `fold` lets words be folded, none is cut.

    Returns the columns of the terminal that the table then needs.
    """
    from rich.cells import cell_len
    from rich.measure import Measurement

    for column in table.columns:
        texts = [str(cell) for cell in (column.header, *column.cells)]
        longest = max((cell_len(line) for text in texts for line in text.split("\n")), default=0)
        word = max((cell_len(word) for text in texts for word in text.split()), default=0)
        column.width = column.min_width = min(word, NAME_WIDTH) if fold and not column.no_wrap else longest
        column.overflow = "fold"
    needed = Measurement.get(console, options.update(width=10_000), table).maximum
    for column in table.columns:
        column.width = None
    return needed


def _lists(table: Table) -> Iterator[RenderableType]:
    """Each row as the name in its first cell and, below it, the others with their heads."""
    from rich.text import Text

    if table.title:
        yield Text(str(table.title), style="bold")
    heads = [str(column.header).replace("\n", " ") for column in table.columns]
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        yield Text(f"{heads[0]} {name}".strip(), style="bold")
        for head, cell in zip(heads[1:], cells, strict=True):
            if str(cell):
                yield Text(f"  {' '.join((*head.split(), *str(cell).split()))}")
    if table.caption:
        yield Text(str(table.caption))
