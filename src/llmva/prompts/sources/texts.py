"""From cells to prompts: which cells are usable, and what is said of the column that they are from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.columns import COLUMNS
from llmva.prompts.sources.conversations import is_list, read_conversation
from llmva.prompts.sources.tables import Table
from llmva.prompts.types import Asked, text_of

# What spreadsheets, data frames and databases write where there is nothing, or a number. It may be a prompt, but much
# more often the column is another than the prompts'.
_NO_TEXT = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?|nan|null|none|nil|n/?a|<na>|true|false|#(n/a|ref!|value!|name\?)")
_CHAT_AS_TEXT = re.compile(r"\[\s*\{\s*(['\"])(role|from)\1\s*:")
_NAMES = re.compile(r"[\w -]{1,40}(?:([,;\t|])[\w -]{0,40})+")


def read_texts(table: Table, column: str, max_chars: int) -> list[Asked]:
    """Every cell of the column as a prompt or conversation. Raises UsageError naming the row that holds none."""
    others = ", ".join(name for name in table.columns if name != column)
    mend = f"mend or remove it{f', or name another column ({others})' if others else ''}"
    cells = table.cells(column)
    _check_header(table, cells)
    prompts = []
    for number, cell in zip(table.numbers, cells, strict=True):
        where = f"{table.unit} {number} of {table.where}"
        asked = check_prompt(cell, where, max_chars, mend)
        if isinstance(cell, str):
            _check_meant(cell, column, where, mend)
        prompts.append(asked)
    return prompts


def check_prompt(cell: Any, where: str, max_chars: int, mend: str = "mend or remove it") -> Asked:
    """The prompt in a cell: a string, or a conversation. Raises UsageError if there is none."""
    asked = read_conversation(cell, where, mend) if is_list(cell) else cell
    if asked is None:
        raise UsageError(f"{where} has no prompt (an empty cell): {mend}.")
    if not isinstance(asked, str | tuple):
        raise UsageError(f"{where} is not text but {type(asked).__name__}: {mend}.")
    if isinstance(asked, str) and not asked.strip():
        raise UsageError(f"{where} is an empty prompt: {mend}.")
    text = text_of(asked)
    if len(text) > max_chars:
        raise UsageError(f"{where} is {len(text):,} characters long, the limit is {max_chars:,}: shorten or remove it.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{where} holds a NUL byte or half a surrogate pair, which is no text: {mend}.")
    return asked


def _check_meant(text: str, column: str, where: str, mend: str) -> None:
    """Raises UsageError for a string that is text, but hardly a prompt."""
    cell = text.strip()
    if len(cell) <= 40 and _NO_TEXT.fullmatch(cell.casefold()):
        raise UsageError(f"{where} holds {cell!r}, which is no prompt: {mend}.")
    if cell.casefold() in (*COLUMNS, column.casefold()):
        raise UsageError(f"{where} holds {cell!r}, the name of a column: remove the line, or save the table as .csv.")
    if _CHAT_AS_TEXT.match(cell):
        raise UsageError(f"{where} is a conversation that was written as text: save the file as JSONL or Parquet.")


def _check_header(table: Table, cells: Sequence[Any]) -> None:
    """Raises UsageError for lines of text that are the rows of a table, its header first."""
    if table.columns != ("text",) or not cells or not isinstance(cells[0], str):
        return
    names = _NAMES.fullmatch(cells[0].strip())
    if (
        names
        and any(name.strip().casefold() in COLUMNS for name in cells[0].split(names[1]))
        and all(isinstance(cell, str) and names[1] in cell for cell in cells)
    ):
        raise UsageError(f"{table.where} begins with {cells[0]!r}, the header of a table: save it as .csv.")
