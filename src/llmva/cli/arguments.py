"""What was typed, before it is parsed."""

from __future__ import annotations

from llmva.errors import UsageError


def check_text(text: str) -> str:
    """The text, if it is one; bytes that are no UTF-8 reach a program as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{text[:60]!a} is not UTF-8: write it in UTF-8, or rename the file.") from error
    return text
