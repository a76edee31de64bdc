"""The tables that `llmva align` and `evaluate` end with: the report's numbers, readable without colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmva.report.drawing.svg import tag
from llmva.report.fitting import Fitting
from llmva.report.run.outcome import outcome
from llmva.report.run.rows import Row, comparison, cost, endings, perplexity, skills, utility
from llmva.report.run.truth import truth_rows
from llmva.report.values import DASH, dicts, finite, interval, part, printable, score, share, share_bracket

if TYPE_CHECKING:
    from rich.table import Table


def before_after_table(run: dict[str, Any]) -> Fitting:
    """Test results before and after the edit, with 95% intervals in brackets; then utility, skills and cost.

    Rows: F1, ASR and ORR (each with its data sets), garbled answers, answers to questions with gold
    answers, utility kept, perplexity, long answers, skills.
    The caption says time, peak memory and tokens. Values that the run does not have (yet) are dashes or left out. A
    narrow terminal gets no intervals.
    """
    return Fitting((lambda: _before_after(run, True), lambda: _before_after(run, False)), ("", "intervals"))


def _before_after(run: dict[str, Any], intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    spent = ", ".join(f"{value} {_after_value(name)}".strip() for name, value in cost(run))
    title = Text(f"Test prompts, before and after the edit{' [95% intervals]' * intervals}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_style="bold")
    table.caption = Text(spent, justify="left")
    table.add_column("")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("before", no_wrap=True)
    table.add_column("after", no_wrap=True)
    tests, rest = comparison(run), [*utility(run), *perplexity(run), *endings(run), *skills(run)]
    blocks = [block for block in (tests, truth_rows(run), rest) if block]
    if not tests:
        table.add_row(Text("no test figures yet"), Text(DASH), Text(DASH), Text(DASH))
    for block in blocks:
        for row in block:
            # Text, not str: rich would read a data set named '[red]' as markup.
            style = "bold" if row.level == 0 else ""
            name = Text("  " * row.level + printable(row.name))
            if row.hint and block is not rest:
                name.append(f", {row.hint}", style="dim")
            cells = [name, Text(DASH if row.n is None else str(row.n)), *_values(row, intervals)]
            table.add_row(*cells, style=style)
        if block is not blocks[-1]:
            table.add_section()
    return table


def before_after_html(run: dict[str, Any]) -> str:
    """The same rows as an HTML table, for a notebook; every text is escaped."""
    heads = tag("tr", *(tag("th", words) for words in ("", "n", "before", "after")))
    lines = []
    for row in (*comparison(run), *utility(run), *perplexity(run), *endings(run), *skills(run)):
        cells = ("" if row.n is None else str(row.n), row.before_cell, row.after_cell)
        lines.append(tag("tr", tag("th", printable(row.name)), *(tag("td", cell) for cell in cells)))
    said = tag("p", printable(outcome(run).sentence))
    return str(tag("div", said, tag("table", heads, *lines)))


def tasks_table(run: dict[str, Any]) -> Fitting:
    """Benchmarks of `llmva evaluate --utility`: scores before and after, and the share of each that is left.

    The last line is the mean of the shares: what the paper calls utility preserved. A narrow
    terminal gets no intervals.
    """
    return Fitting((lambda: _tasks(run, True), lambda: _tasks(run, False)), ("", "intervals"))


def _tasks(run: dict[str, Any], intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    whole = part(run, "utility_preserved")
    title = Text(f"Benchmarks, before and after the edit{' [95% intervals]' * intervals}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_style="bold")
    for name in ("task", "metric", "n", "before", "after", "left"):
        numbers = name not in ("task", "metric")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers)
    for task in dicts(run.get("utility_tasks")):
        texts = (task["name"], task["metric"], str(task["n"]), score(finite(task.get("before"))))
        left = _left(task, intervals)
        table.add_row(*(Text(printable(text)) for text in (*texts, score(finite(task.get("after"))), left)))
    if "tasks" in whole:
        table.add_section()
        blank = [Text("")] * 3
        table.add_row(
            Text("mean of tasks", style="bold"), Text(""), *blank, Text(_left(whole, intervals), style="bold")
        )
    return table


def _left(preserved: dict[str, Any], intervals: bool) -> str:
    """'97.3% [94.0, 100.4]'."""
    ratio, ends = finite(preserved.get("ratio")), interval(preserved.get("interval")) if intervals else None
    return f"{share(ratio)} {share_bracket(ends)}".rstrip()


def _values(row: Row, intervals: bool) -> list[Any]:
    from rich.text import Text

    pairs = ((row.before_text, row.before_bracket), (row.after_text, row.after_bracket))
    return [Text(f"{value:>6} {bracket if intervals else ''}".rstrip()) for value, bracket in pairs]


def _after_value(name: str) -> str:
    """The words that follow a cost in a sentence: '1.2 GB peak memory'."""
    return {"Time": "", "Peak memory": "peak memory", "Tokens generated": "tokens generated"}[name]
