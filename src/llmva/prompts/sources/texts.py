"""From cells to prompts: which column holds the prompts, and which cells are usable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.tables import Table

COLUMNS = ("input", "prompt", "question", "instruction", "text", "query", "goal", "message")


def choose_column(table: Table, asked: str | None) -> tuple[str, str | None]:
    """The column of prompts, and a warning if it had to be guessed.

    It is the one asked for, else the first of COLUMNS that exists, else the only one that holds text or chat messages.
    Raises UsageError, naming the columns there are, if that leaves none.
    """
    there = ", ".join(table.columns) or "none"
    if asked is not None:
        if asked not in table.columns:
            raise UsageError(f"{table.where} has no column {asked!r}: choose one of its columns ({there}).")
        return asked, None
    for name in COLUMNS:
        if name in table.columns:
            return name, None
    textual = [name for name in table.columns if _is_textual(table.cells(name))]
    if len(textual) != 1:
        raise UsageError(f"the prompts' column of {table.where} is not clear: add :column with one of {there}.")
    # A file without a header loses its first prompt here, so the guess is a warning.
    (name,) = textual
    return name, f"{table.where}: took {name!r} for the name of the prompts' column, the only one with text."


def read_texts(table: Table, column: str, max_chars: int) -> list[str]:
    """Every cell of the column as a prompt. Raises UsageError naming the row that holds none."""
    others = ", ".join(name for name in table.columns if name != column)
    return [
        check_text(
            cell,
            f"{table.unit} {number} of {table.where}",
            max_chars,
            f"mend or remove it{f', or name another column ({others})' if others else ''}",
        )
        for number, cell in zip(table.numbers, table.cells(column), strict=True)
    ]


def check_text(cell: Any, where: str, max_chars: int, mend: str = "mend or remove it") -> str:
    """The prompt in a cell: a string, or the first user turn of chat messages. Raises UsageError if there is none."""
    text = _first_user_turn(cell) if _is_chat(cell) else cell
    if text is None:
        raise UsageError(f"{where} has no {'user turn' if _is_chat(cell) else 'prompt (an empty cell)'}: {mend}.")
    if not isinstance(text, str):
        raise UsageError(f"{where} is not text but {type(text).__name__}: {mend}.")
    if not text.strip():
        raise UsageError(f"{where} is an empty prompt: {mend}.")
    if len(text) > max_chars:
        raise UsageError(f"{where} is {len(text):,} characters long, the limit is {max_chars:,}: shorten or remove it.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{where} holds a NUL byte or half a surrogate pair, which is no text: {mend}.")
    return text


def _is_textual(cells: Sequence[Any]) -> bool:
    filled = [cell for cell in cells if cell is not None]
    return bool(filled) and all(isinstance(cell, str) or _is_chat(cell) for cell in filled)


def _is_chat(cell: Any) -> bool:
    return (
        isinstance(cell, Sequence) and bool(cell) and all(isinstance(turn, Mapping) and "role" in turn for turn in cell)
    )


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
