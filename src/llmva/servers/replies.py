"""What a server replied, taken out of its JSON."""

from __future__ import annotations

from typing import Any


def text_of(reply: Any, chat: bool) -> str:
    """The text of the first choice. Raises ValueError for a reply of another form."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no choices") from error
    if text is not None and not isinstance(text, str):
        raise ValueError("no text")
    return text or ""
