"""A comparison as tables for the terminal, for spreadsheets (CSV) and for papers (LaTeX)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmva.report.pages import title
from llmva.report.study.headline import headline
from llmva.report.study.methods import Block, Column, baseline, blocks, methods
from llmva.report.study.records import csv_cells, csv_text
from llmva.report.values import DASH, MINUS, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

BEST, DIFFERS = "*", "†"
GAP = 2  # columns of a terminal between two columns of a table


# --- Terminal -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """A rich renderable: tables cut between columns where the terminal is too narrow, never within a cell."""

    sentence: str
    blocks: tuple[Block, ...]
    legend: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.sentence:
            yield Text(f"{printable(self.sentence)}\n")
        for block in self.blocks:
            intervals = _fits(block, options.max_width)
            for number, columns in enumerate(_fitting(block, options.max_width, intervals)):
                heading = f"{block.title}{', continued' if number else ''}"
                yield Text(printable(heading), style="bold")  # the title of a rich table would fold at its width
                yield _rich_table(block.names, columns, intervals)
                yield Text("")
        if self.legend:
            yield Text(printable(self.legend), style="dim")


def comparison_table(record: dict[str, Any]) -> RenderableType:
    """The contents of compare.json as tables: F1, ASR, ORR and tests; the same by data set; utility and cost.

    Values that are not known are dashes. The best of a column has a star, which needs no colour.
    """
    tables = tuple(blocks(record))
    said = headline(record)
    return Tables(" ".join((said.sentence, *said.notes)), tables, legend(record) if tables else "")


def legend(record: dict[str, Any]) -> str:
    """What the signs in the tables mean."""
    seeds = record.get("seeds")
    rows = methods(record)
    words = [f"{BEST} best of its column."]
    if any(row.versus is not None for row in rows):
        named = baseline(record, rows) or "the best baseline"
        words.append(f"{DIFFERS} F1 differs from {named}: p < 0.05 after Holm's correction.")
    words.append("[95% intervals over prompts].")
    if isinstance(seeds, list) and len(seeds) > 1:
        words.append(f"± standard deviation over {len(seeds)} seeds.")
    return " ".join(words)


def _texts(column: Column, intervals: bool = True) -> list[str]:
    """Cells as lines of equal width, their parts below each other. Only F1 and differences show their intervals."""
    shown_intervals = intervals and column.title.startswith("F1")
    marks = [BEST * cell.best + DIFFERS * cell.significant for cell in column.cells]
    shown = [
        (c.text, mark, c.spread, c.bracket if shown_intervals else "")
        for c, mark in zip(column.cells, marks, strict=True)
    ]
    wide = [max(len(one[i]) for one in shown) for i in range(4)]
    lines = []
    for text, mark, spread, bracket in shown:
        parts = [text.rjust(wide[0]) + mark.ljust(wide[1]), spread.rjust(wide[2]), bracket.rjust(wide[3])]
        lines.append(" ".join(part for part, width in zip(parts, (1, wide[2], wide[3]), strict=True) if width))
    return lines


def _first_width(block: Block) -> int:
    from rich.cells import cell_len

    return max(cell_len(printable(name)) for name in ("method", *block.names))


def _needed(column: Column, intervals: bool) -> int:
    from rich.cells import cell_len

    words = (column.group, column.title, *_texts(column, intervals))
    return GAP + max(cell_len(printable(word)) for word in words)


def _fits(block: Block, width: int) -> bool:
    """Whether every column fits next to the names with its intervals."""
    return all(_first_width(block) + _needed(column, True) <= width for column in block.columns)


def _fitting(block: Block, width: int, intervals: bool) -> Iterator[list[Column]]:
    """The columns in groups that fit into `width` next to the names; those of one heading stay together if they fit."""
    first = _first_width(block)
    shown: list[Column] = []
    used = first
    for _, start, count in groups(block.columns):
        together = block.columns[start - 2 : start - 2 + count]
        if shown and used + sum(_needed(column, intervals) for column in together) > width:
            yield shown
            shown, used = [], first
        for column in together:
            needed = _needed(column, intervals)
            if shown and used + needed > width:  # a heading's columns are wider than the terminal
                yield shown
                shown, used = [], first
            shown.append(column)
            used += needed
    yield shown


def _rich_table(names: Sequence[str], columns: Sequence[Column], intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False)
    table.add_column("method", overflow="fold")
    for column in columns:
        # Text, not str: rich would read a data set named '[red]' as markup.
        above = Text(printable("\n".join(filter(None, (column.group, column.title)))))
        table.add_column(above, justify="right", no_wrap=True)
    lines = [_texts(column, intervals) for column in columns]
    for row, name in enumerate(names):
        cells = []
        for column, texts in zip(columns, lines, strict=True):
            cells.append(Text(texts[row], style="bold" if column.cells[row].best else ""))
        table.add_row(Text(printable(name)), *cells)
    return table


# --- CSV ----------------------------------------------------------------------------------------------------------


def comparison_csv(record: dict[str, Any]) -> str:
    """One line for each method and setting with every digit recorded; a value that is not known is an empty field."""
    lines = []
    for row in methods(record):
        line: dict[str, object] = {"method": row.method, "setting": row.setting, "seeds": len(row.runs)}
        for name, value in row.measures.items():
            line |= csv_cells(name, value)
        for name, value in row.sources.items():
            line |= csv_cells(f"source_{name}", value)
        for name in ("kept", "kl", "perplexity", "fit_seconds", "fit_answers", "latency"):
            line[name] = getattr(row, name)
        line["latency_low"], line["latency_high"] = row.latency_range or (None, None)
        for name, (before, after) in row.skills.items():
            line |= {f"skill_{name}_before": before, f"skill_{name}_after": after}
        test = row.versus
        low, high = (test.interval if test else None) or (None, None)
        line |= {
            "baseline": test.baseline if test else None,
            "f1_difference": test.difference if test else None,
            "f1_difference_low": low,
            "f1_difference_high": high,
            "f1_p": test.p if test else None,
            "f1_p_holm": test.p_holm if test else None,
            "mcnemar_p": test.mcnemar if test else None,
            "mcnemar_p_holm": test.mcnemar_holm if test else None,
            "note": row.note,
        }
        lines.append(line)
    return csv_text(lines)


# --- LaTeX --------------------------------------------------------------------------------------------------------

ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", DASH: "--", MINUS: "$-$", "±": r"$\pm$", "×": r"$\times$",
    "°": r"$^\circ$", "†": r"$^\dagger$", "’": "'", "“": "``", "”": "''",
}  # fmt: skip


def latex(text: str) -> str:
    """Text as LaTeX that pdflatex sets without more packages. It has no accents, and U+4E2D for what has no letter.

    Brackets are put in a group, or one that begins a row would be read as an option of the line break before it.
    """
    out = []
    for character in " ".join(printable(text).split()):
        if character in ESCAPES:
            out.append(ESCAPES[character])
        elif character in "[]":
            out.append(f"{{{character}}}")
        elif character.isascii():
            out.append(character)
        else:
            base = "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii() and c.isalnum())
            out.append(base or f"U+{ord(character):04X}")
    return "".join(out)


def comparison_latex(record: dict[str, Any]) -> str:
    """A table for each block, with booktabs rules; best values in bold. To be \\input into a document."""
    lines = [
        "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.",
        f"% {latex(str(record.get('command') or 'The command was not recorded.'))}",
    ]
    for number, block in enumerate(blocks(record)):
        heading = f"{latex(block.title)} on {latex(title(record))}."
        note = f" {_latex_legend(record)}" if number == 0 else ""
        lines += ["", *_latex_block(block, f"{heading}{note}", f"tab:llmva-{number + 1}")]
    return "\n".join(lines) + "\n"


def _latex_legend(record: dict[str, Any]) -> str:
    words = legend(record).replace(f"{BEST} best of its column.", "Bold: best of its column.")
    return latex(words)


def _latex_block(block: Block, caption: str, label: str) -> list[str]:
    headings = groups(block.columns)
    lines = [
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(block.columns)}}}",
        r"\toprule",
    ]
    if any(name for name, _, _ in headings):
        lines.append(" & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{latex(g)}}}" for g, _, n in headings)]) + r" \\")
        lines.append("".join(rf"\cmidrule(lr){{{first}-{first + n - 1}}}" for g, first, n in headings if g))
    lines.append(" & ".join(["Method", *(latex(column.title) for column in block.columns)]) + r" \\")
    lines.append(r"\midrule")
    for row, name in enumerate(block.names):
        lines.append(" & ".join([latex(name), *(_latex_cell(column, row) for column in block.columns)]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]


def groups(columns: Sequence[Column]) -> list[tuple[str, int, int]]:
    """(heading, first column, number of columns): the names' column is 1, a column without a heading is alone."""
    headings: list[tuple[str, int, int]] = []
    for number, column in enumerate(columns, start=2):
        if headings and column.group and headings[-1][0] == column.group:
            _, first, columns_so_far = headings[-1]
            headings[-1] = (column.group, first, columns_so_far + 1)
        else:
            headings.append((column.group, number, 1))
    return headings


def _latex_cell(column: Column, row: int) -> str:
    cell = column.cells[row]
    text = rf"\textbf{{{latex(cell.text)}}}" if cell.best else latex(cell.text)
    spread = rf"\,{{\scriptsize {latex(cell.spread)}}}" if cell.spread else ""
    bracket = rf"\,{{\scriptsize {latex(cell.bracket)}}}" if cell.bracket and column.title.startswith("F1") else ""
    return text + (latex(DIFFERS) if cell.significant else "") + spread + bracket
