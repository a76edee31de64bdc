"""The attack in another language: requests as a file of the user's translates them."""

from __future__ import annotations

from pathlib import Path

from llmva.attacks.base import Attack
from llmva.errors import UsageError
from llmva.prompts.sources.columns import short
from llmva.prompts.sources.spec import READABLE
from llmva.prompts.sources.tables import Table, read_file
from llmva.prompts.split import normalise
from llmva.prompts.types import Dialogue, Message

NAME = "translation"
TEXT, TRANSLATION = "text", "translation"  # columns of the file


def translation_attack(given: str) -> Attack:
    """Requests in the language of the file `given`, which has the columns `text` and `translation`.

    Requests are looked up by `normalise`. Raises UsageError for a file that cannot be read, a cell without text, and a
    translation or text that is there twice. The attack raises it for a request that the file lacks.
    """
    path = Path(given).expanduser()
    if not path.is_file() or path.suffix.lower() not in READABLE:
        raise UsageError(f"there is no prompt file {given!r}: give {NAME}=FILE, a table with {TEXT} and {TRANSLATION}.")
    pairs = _pairs(read_file(path))
    by_text = {normalise(text): translation for text, translation in pairs}
    by_translation = {translation: text for text, translation in pairs}
    if len(by_text) < len(pairs) or len(by_translation) < len(pairs):
        what = TEXT if len(by_text) < len(pairs) else TRANSLATION
        raise UsageError(f"{given} has the same {what} in two rows: remove one of them.")

    def wrap(request: str) -> Dialogue:
        translated = by_text.get(normalise(request))
        if translated is None:
            raise UsageError(f"{given} has no translation of {short(request)}: add a row for it.")
        return (Message("user", translated),)

    return Attack(
        NAME,
        f"asks in another language, by {path.name}",
        "Yong et al. 2023, arXiv 2310.02446",
        wrap,
        by_translation.__getitem__,
        "the file leads back to the prompt",
    )


def _pairs(table: Table) -> list[tuple[str, str]]:
    missing = next((name for name in (TEXT, TRANSLATION) if name not in table.columns), None)
    if missing is not None:
        raise UsageError(f"{table.where} has no column {missing!r}: name its columns {TEXT} and {TRANSLATION}.")
    rows = list(zip(table.numbers, table.cells(TEXT), table.cells(TRANSLATION), strict=True))
    for number, *cells in rows:
        if not all(isinstance(cell, str) and cell.strip() for cell in cells):
            where = f"{table.unit} {number} of {table.where}"
            raise UsageError(f"{where} lacks a text or its translation: mend or remove it.")
    return [(text, translation) for _, text, translation in rows]
