"""Which column of a table holds the prompts, and whether all of its rows belong to one side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.conversations import is_chat, is_list
from llmva.prompts.sources.tables import Table

COLUMNS = ("input", "prompt", "question", "instruction", "text", "query", "goal", "message")
CHATS = ("messages", "conversations", "conversation", "turns", "dialogue")
CONTEXT = ("input", "context", "passage", "document")  # what an instruction or a question may be about
ASKING = ("instruction", "question", "prompt", "query")

# What a column of labels may say of a row. Words tell by themselves, a yes or no only by the column's name.
TOXIC = {"toxic", "harmful", "unsafe", "malicious"}
BENIGN = {"benign", "harmless", "safe", "unharmful", "nonharmful", "notharmful", "nontoxic", "nottoxic"}
YES_IS_TOXIC = {*TOXIC, *(f"is_{word}" for word in TOXIC), "toxicity", "harm"}
YES_IS_BENIGN = {"benign", "is_benign", "harmless", "is_harmless", "safe", "is_safe"}
LABELS = {"label", "labels", "class", "side", "safety"}  # it is not known which answer is which
YES, NO = {"1", "10", "true", "yes"}, {"0", "00", "false", "no"}  # 10 and 00 are 1.0 and 0.0
_MAY_LABEL = re.compile("label|class|side|kind|type|categor|toxic|harm|safe|benign|malicious", re.IGNORECASE)


def choose_column(table: Table, asked: str | None) -> tuple[str, str]:
    """The column of prompts, and what was guessed in choosing it ("" for nothing).

    It is the one asked for, else the first of COLUMNS that exists, in any case, else the first of CHATS that holds
    lists, else the only one that holds text or chat messages. Raises UsageError, naming the columns there are, if that
    leaves none, if a context goes with each prompt, and if what stands for a name reads like a prompt.
    """
    there = ", ".join(map(_cut, table.columns)) or "none"
    if asked is not None:
        if asked not in table.columns:
            raise UsageError(f"{table.where} has no column {asked!r}: choose one of its columns ({there}).")
        return asked, ""
    plausible = [name for known in COLUMNS for name in table.columns if name.strip().casefold() == known]
    if plausible:
        ask, context = _with_context(table, plausible)
        name = ask or plausible[0]
        others = [one for one in (*plausible, *_chats(table)) if one not in (name, *context)]
        return name, f"took {name!r} for the prompts, not {_listed(others)}" if others else ""
    if chats := _chats(table):
        return chats[0], f"took {chats[0]!r} for the prompts, not {_listed(chats[1:])}" if len(chats) > 1 else ""
    textual = [name for name in table.columns if is_textual(table.cells(name))]
    if len(textual) != 1:
        header = next((name for name in table.columns if _reads_like_prompt(name, table.headed)), None)
        if header is not None:
            raise _no_header(table, header)
        raise UsageError(f"the prompts' column of {table.where} is not clear: add :column with one of {there}.")
    (name,) = textual
    if _reads_like_prompt(name, table.headed):
        raise _no_header(table, name)
    return name, f"took {name!r} for the name of the prompts' column, the only one with text"


def check_side(table: Table, column: str, benign: bool, gold: str | None = None) -> None:
    """Raises UsageError for a table with a column that says that rows belong to the other side, or to both.

    The columns of prompts and of gold answers say nothing of that.
    """
    for name in table.columns:
        # the others are not read, since a cell may be as large as a picture
        sides = _sides(name, table.cells(name)) if name not in (column, gold) and _MAY_LABEL.search(name) else set()
        if len(sides) == 2:
            raise UsageError(
                f"{table.where} has toxic and benign rows, by its column {name!r}: make a file of each side, or add "
                f":{column} to take all rows for {'benign' if benign else 'toxic'}."
            )
        if sides and sides != {benign}:
            raise UsageError(
                f"the column {name!r} of {table.where} says that its rows are {'toxic' if benign else 'benign'}: "
                f"give it as --{'toxic' if benign else 'benign'}, or add :{column} to overrule that."
            )


def is_textual(cells: Sequence[Any]) -> bool:
    """Whether every cell that is filled holds a string or chat messages, and some are filled."""
    filled = [cell for cell in cells if cell is not None]
    return bool(filled) and all(isinstance(cell, str) or is_chat(cell) for cell in filled)


def short(text: str) -> str:
    """Text quoted on one line, of 60 letters at most."""
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _with_context(table: Table, plausible: Sequence[str]) -> tuple[str | None, list[str]]:
    """The column that asks, where others hold what it asks about in no row. Raises UsageError where they do."""
    by_name = {name.strip().casefold(): name for name in table.columns}
    ask = next((by_name[name] for name in ASKING if name in by_name), None)
    context = [by_name[name] for name in CONTEXT if name in by_name and by_name[name] != ask]
    if ask is None or not context or ask not in plausible:
        return None, []
    for name in context:
        if any(cell.strip() if isinstance(cell, str) else cell for cell in table.cells(name)):
            raise UsageError(
                f"{table.where} asks in {ask!r} about what stands in {name!r}: join the two into one column, or add "
                f":{ask} or :{name} to take one of them alone."
            )
    return ask, context


def _chats(table: Table) -> list[str]:
    """Columns that are called as conversations are, and hold lists; `turns` is a number elsewhere."""
    by_name = {name.strip().casefold(): name for name in reversed(table.columns)}
    columns = [by_name[known] for known in CHATS if known in by_name]
    filled = [(name, [cell for cell in table.cells(name) if cell is not None]) for name in columns]
    return [name for name, cells in filled if cells and all(map(is_list, cells))]


def _listed(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names)) + ", which may hold prompts too"


def _reads_like_prompt(name: str, headed: bool) -> bool:
    """Whether what stands for a column's name is rather a row: a sentence, or words in a first line."""
    if len(name) > 40 or len(name.split()) > 4 or name.rstrip().endswith((".", "?", "!", "…", "？", "。", "！")):
        return True
    return headed and len(name.split()) > 1 and not any(known in name.casefold() for known in COLUMNS)


def _no_header(table: Table, name: str) -> UsageError:
    return UsageError(
        f"{table.where} seems to have no header, since {short(name)} reads like a prompt: put a line with the names of "
        "its columns on top, or add :column if that is a name."
    )


def _sides(name: str, cells: Sequence[Any]) -> set[bool]:
    """The sides (benign?) that the cells of a column tell of; empty where they tell of none."""
    known = re.sub(r"\W+", "_", name.strip().casefold())
    values: set[str] = set()
    for cell in cells:
        value = re.sub(r"[\W_]+", "", str(cell).casefold()) if isinstance(cell, str | int | float) else ""
        if value:
            values.add(value)
        if len(values) > len(TOXIC | BENIGN | YES | NO):
            return set()
    if not values or known.startswith(("response", "answer", "completion")):  # what a model said to the prompt
        return set()
    if values <= TOXIC | BENIGN:
        return {value in BENIGN for value in values}
    if not values <= YES | NO:
        return set()
    if known in YES_IS_TOXIC | YES_IS_BENIGN:
        return {(value in YES) == (known in YES_IS_BENIGN) for value in values}
    both = bool(values & YES and values & NO)
    return {True, False} if both and (known in LABELS or known.endswith("_label")) else set()
