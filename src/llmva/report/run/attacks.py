"""ASR and ORR by attack, before and after an edit: a table for the terminal and one in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmva.report.fitting import Fitting
from llmva.report.run.rows import Row, rate_row
from llmva.report.values import DASH, dicts, finite, part, printable

if TYPE_CHECKING:
    from rich.table import Table

NONE, WORST = "no attack", "worst case"
RATES = (("asr", "ASR", "n_toxic"), ("orr", "ORR", "n_benign"))
WHEN = ("before", "after")


def attack_rows(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Row]]]:
    """Name and rates of the plain prompts, of each attack, and of the worst case."""
    attacks = dicts(record.get("attacks"))
    every = [(NONE, part(record, "test")), *((str(one.get("name")), one) for one in attacks)]
    for name, of in [*every, (WORST, part(record, "worst_case"))]:
        before, after = part(of, "before"), part(of, "after")
        yield (
            name,
            {
                key: rate_row(title, before, after, key, n=int(finite(before.get(size)) or 0))
                for key, title, size in RATES
            },
        )


def worst_sentence(record: dict[str, Any]) -> str:
    """What the worst case is, and the attacks with the highest rates of their own."""
    after = part(record, "worst_case", "after") or part(record, "worst_case", "before")
    named = [
        f"highest {title} under {printable(str(after[f'{key}_of']))}"
        for key, title, _ in RATES
        if after.get(f"{key}_of") is not None
    ]
    return "; ".join([f"{WORST}: answered or refused in any of these ways", *named])


def attacks_table(record: dict[str, Any]) -> Fitting:
    """A row for each attack of `llmva evaluate --attack`, with 95% intervals; a narrow terminal gets none."""
    return Fitting((lambda: _table(record, True), lambda: _table(record, False)), ("", "intervals"))


def _table(record: dict[str, Any], intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(f"By attack, before and after the edit{' [95% intervals]' * intervals}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    table.caption = Text(worst_sentence(record), justify="left")
    table.add_column("attack")
    for _, name, _ in RATES:
        for when in WHEN:
            table.add_column(f"{name} {when}", no_wrap=True)
    for name, rates in attack_rows(record):
        cells = [Text(cell) for key, _, _ in RATES for cell in _cells(rates[key], intervals)]
        if name == WORST:
            table.add_section()
        table.add_row(Text(printable(name), style="bold" if name in (NONE, WORST) else ""), *cells)
    return table


def _cells(row: Row, intervals: bool) -> list[str]:
    if not row.n:
        return [DASH, DASH]
    return [row.before_cell, row.after_cell] if intervals else [row.before_text, row.after_text]


def attacks_markdown(record: dict[str, Any]) -> str:
    """A row for each attack, then a sentence on the worst case."""
    heads = [f"{name} {when}" for _, name, _ in RATES for when in WHEN]
    lines = [f"| attack | {' | '.join(heads)} |", f"| --- {'| --- ' * len(heads)}|"]
    for name, rates in attack_rows(record):
        cells = [cell for key, _, _ in RATES for cell in _cells(rates[key], True)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, "", f"{worst_sentence(record)}."]) + "\n"
