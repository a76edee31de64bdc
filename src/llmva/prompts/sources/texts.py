"""From cells to prompts: which cells are usable, and what is said of the column that they are from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.columns import COLUMNS, is_chat
from llmva.prompts.sources.tables import Table

# What spreadsheets, data frames and databases write where there is nothing, or a number. It may be a prompt, but much
# more often the column is another than the prompts'.
_NO_TEXT = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?|nan|null|none|nil|n/?a|<na>|true|false|#(n/a|ref!|value!|name\?)")
_CHAT_AS_TEXT = re.compile(r"\[\s*\{\s*(['\"])(role|from)\1\s*:")
_NAMES = re.compile(r"[\w -]{1,40}(?:([,;\t|])[\w -]{0,40})+")


def read_texts(table: Table, column: str, max_chars: int) -> list[str]:
    """Every cell of the column as a prompt. Raises UsageError naming the row that holds none."""
    others = ", ".join(name for name in table.columns if name != column)
    mend = f"mend or remove it{f', or name another column ({others})' if others else ''}"
    cells = table.cells(column)
    _check_header(table, cells)
    texts = []
    for number, cell in zip(table.numbers, cells, strict=True):
        where = f"{table.unit} {number} of {table.where}"
        text = check_text(cell, where, max_chars, mend)
        if isinstance(cell, str):
            _check_meant(text, column, where, mend)
        texts.append(text)
    return texts


def check_text(cell: Any, where: str, max_chars: int, mend: str = "mend or remove it") -> str:
    """The prompt in a cell: a string, or the first user turn of chat messages. Raises UsageError if there is none."""
    text = _first_user_turn(cell) if is_chat(cell) else cell
    if text is None:
        raise UsageError(f"{where} has no {'user turn' if is_chat(cell) else 'prompt (an empty cell)'}: {mend}.")
    if not isinstance(text, str):
        raise UsageError(f"{where} is not text but {type(text).__name__}: {mend}.")
    if not text.strip():
        raise UsageError(f"{where} is an empty prompt: {mend}.")
    if len(text) > max_chars:
        raise UsageError(f"{where} is {len(text):,} characters long, the limit is {max_chars:,}: shorten or remove it.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{where} holds a NUL byte or half a surrogate pair, which is no text: {mend}.")
    return text


def about_chats(cells: Sequence[Any]) -> str:
    """What is left out of conversations; "" for nothing."""
    chats = [cell for cell in cells if is_chat(cell)]
    longer = sum(len(chat) > 1 for chat in chats)
    with_parts = sum(any(_has_no_text(turn) for turn in chat) for chat in chats)
    left_out = []
    if longer:
        left_out.append(f"took the first user turn alone of conversations that have other turns: {longer}")
    if with_parts:
        left_out.append(f"left out pictures and other parts that are no text in conversations: {with_parts}")
    return "; ".join(left_out)


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


def _first_user_turn(turns: Sequence[Mapping[str, Any]]) -> Any:
    for turn in turns:
        if turn["role"] == "user":
            content = turn.get("content")
            if isinstance(content, Sequence) and not isinstance(content, str):  # parts of a multimodal message
                parts = [
                    part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                ]
                return "\n".join(parts) or None
            return content
    return None


def _has_no_text(turn: Mapping[str, Any]) -> bool:
    """Whether a user's message has parts that are no text, such as images."""
    content = turn.get("content")
    return (
        turn["role"] == "user"
        and isinstance(content, Sequence)
        and not isinstance(content, str)
        and not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
    )
