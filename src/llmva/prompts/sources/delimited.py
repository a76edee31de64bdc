"""Delimited text (CSV and its kin) as rows of cells: what divides the cells is tried, and every row is checked."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from llmva.errors import UsageError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}

Rows = list[tuple[int, list[str]]]  # the line on which a row starts, from 1, and its cells

_SEP = re.compile(r"sep=([,;\t|])\r?\n", re.IGNORECASE)  # Excel's first line, which names the delimiter


@dataclass(frozen=True)
class Divided:
    """Rows of equal length, the header first, and what divides their cells."""

    rows: Rows
    delimiter: str


def divide(text: str, usual: str, where: str) -> Divided:
    """Divide text at `usual`, else at the one other delimiter that gives every row as many cells as the header.

    A header without any delimiter is one column. Quotes are those of RFC 4180, and a quote that is not closed is no
    text. Raises UsageError naming the line of a row that does not fit, and where several delimiters would do.
    """
    first = 1
    if named := _SEP.match(text):
        usual, text, first = named[1], text[named.end() :], 2
    if not text.strip():
        raise UsageError(f"{where} holds no prompts: put at least one row into it.")
    errors: dict[str, UsageError] = {}
    tried: dict[str, Rows] = {}
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        if delimiter != usual and delimiter not in _first_line(text):
            continue
        try:
            rows = _rows(text, delimiter, first, where)
        except UsageError as error:
            errors[delimiter] = error
            continue
        if len(rows[0][1]) > 1 and _uneven(rows) is None and delimiter == usual:
            return Divided(rows, usual)
        tried[delimiter] = rows
    wide = {delimiter: rows for delimiter, rows in tried.items() if len(rows[0][1]) > 1}
    whole = [delimiter for delimiter, rows in wide.items() if _uneven(rows) is None]
    if len(whole) > 1:
        names = " and by ".join(DELIMITERS[delimiter] for delimiter in whole)
        raise UsageError(f"the cells of {where} can be divided by {names}: save it with commas, or as JSONL.")
    if whole:
        return Divided(wide[whole[0]], whole[0])
    if usual in errors and not wide:
        raise errors[usual]
    # A header that another delimiter divides is no name of one column; its rows are at fault.
    delimiter = usual if usual in wide or not wide else max(wide, key=lambda one: len(wide[one][0][1]))
    rows = tried[delimiter]
    if (uneven := _uneven(rows)) is not None:
        number, cells = uneven
        raise UsageError(
            f"line {number} of {where} has {len(cells)} cells but the header has {len(rows[0][1])}: "
            "mend the row, or put quotes around cells that hold the delimiter."
        )
    return Divided(rows, delimiter)


def _rows(text: str, delimiter: str, first: int, where: str) -> Rows:
    # strict: otherwise a quote that is never closed takes all later rows into one cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    start = first  # quoted cells may hold line breaks
    try:
        for cells in reader:
            if cells:  # the csv module gives [] for a blank line
                rows.append((start, cells))
            start = reader.line_num + first
    except csv.Error as error:
        raise UsageError(
            f"the row from line {start} of {where} cannot be read ({error}): mend its quotes, or shorten its cells."
        ) from error
    return rows


def _first_line(text: str) -> str:
    return text.lstrip("\r\n").split("\n", 1)[0].split("\r", 1)[0]


def _uneven(rows: Rows) -> tuple[int, list[str]] | None:
    """The first row that has not as many cells as the header."""
    return next((row for row in rows if len(row[1]) != len(rows[0][1])), None)
