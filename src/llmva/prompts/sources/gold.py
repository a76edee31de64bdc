"""Gold answers in a column beside the prompts: which cells hold them, and in what form."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.columns import short
from llmva.prompts.sources.tables import Table

SEPARATOR = "|"  # between answers in one cell, any of which is right
FINAL = "####"  # before the result, after the steps that lead to it


def read_gold(table: Table, column: str) -> list[tuple[str, ...]]:
    """The gold answers of every row of the column, () for an empty cell.

    Raises UsageError for a column that is not there, and naming the row for a cell that holds no answers.
    """
    if column not in table.columns:
        raise UsageError(
            f"{table.where} has no column {column!r} of gold answers: choose one of its columns "
            f"({', '.join(table.columns) or 'none'})."
        )
    cells = zip(table.numbers, table.cells(column), strict=True)
    return [gold_answers(cell, f"{table.unit} {number} of {table.where}") for number, cell in cells]


def gold_answers(cell: Any, where: str = "a row") -> tuple[str, ...]:
    """The answers in a cell: a text, a number, yes or no, or a list of them.

    In a text, `|` divides answers. A text in brackets is a list, as JSON or Python write it. What stands before the
    last `####` is how one comes to the result, and left out. Raises UsageError for what is no answer.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ()
    if isinstance(cell, bool):
        return ("yes", "true") if cell else ("no", "false")
    if isinstance(cell, float) and cell.is_integer():
        return (str(int(cell)),)
    if isinstance(cell, int | float):
        return (str(cell),)
    if isinstance(cell, str):
        return _of_text(cell, where)
    if isinstance(cell, Sequence):
        return tuple(dict.fromkeys(answer for one in cell for answer in gold_answers(one, where)))
    raise UsageError(
        f"{where} holds gold answers as {type(cell).__name__}: make it a text, a number or a list of them."
    )


def _of_text(text: str, where: str) -> tuple[str, ...]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]") and (items := _as_list(text)) is not None:
        return gold_answers(items, where)
    if FINAL in text:
        answers = [f"{FINAL} {text.rpartition(FINAL)[2].strip()}"]
    else:
        answers = [one.strip() for one in text.split(SEPARATOR) if one.strip()]
    for answer in answers:
        if not re.search(r"[^\W_]", answer):
            raise UsageError(
                f"{where} has the gold answer {short(answer)}, without a word or a number: mend or empty it."
            )
    return tuple(answers)


def _as_list(text: str) -> list[Any] | None:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return None
