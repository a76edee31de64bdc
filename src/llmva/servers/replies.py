"""What a server replied, taken out of its JSON. Every function raises ValueError for a reply of another form."""

from __future__ import annotations

from typing import Any


def text_of(reply: Any, chat: bool) -> str:
    """The text of the first choice."""
    choice = _first_choice(reply)
    try:
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, TypeError) as error:
        raise ValueError("no choices") from error
    return _checked(text)


def written_by(reply: Any) -> str:
    """All that a model wrote in a chat: its answer, after the thoughts that some servers cut off."""
    message = _first_choice(reply).get("message")
    if not isinstance(message, dict):
        raise ValueError("no message")
    thoughts = message.get("reasoning_content", message.get("reasoning"))  # the name that newer servers use
    return _checked(thoughts) + _checked(message.get("content"))


def names_of(reply: Any) -> list[str]:
    """The names of the models that a server lists."""
    listed = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(listed, list):
        raise ValueError("no list of models")
    names = [entry.get("id") if isinstance(entry, dict) else None for entry in listed]
    return [name for name in names if isinstance(name, str)]


def _first_choice(reply: Any) -> dict[str, Any]:
    try:
        choice = reply["choices"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no choices") from error
    if not isinstance(choice, dict):
        raise ValueError("no choices")
    return choice


def _checked(text: Any) -> str:
    if text is not None and not isinstance(text, str):
        raise ValueError("no text")
    return text or ""
