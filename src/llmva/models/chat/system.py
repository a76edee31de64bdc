"""Where a system prompt goes: into a system turn, or before the user's first message where the template has none.

The second is what Gemma's users expect: the template of Gemma 3 itself puts the text of a system turn there, and those
of Gemma 1 and 2 raise an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def with_system(messages: Messages, system: str | None, word: str | None, *, in_message: bool) -> Messages:
    """The dialogue with the system prompt, and with the word by which a template turns thinking on or off.

    Args:
        word: goes into a system turn: commands with a slash after the system prompt, sentences before it.
        in_message: whether the system prompt stands before the user's first message.
    """
    texts = [word] if word is not None else []
    if system is not None and in_message:
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        messages = [
            {**message, "content": f"{system}\n\n{message['content']}"} if i == first else message
            for i, message in enumerate(messages)
        ]
    elif system is not None:
        texts = [system, *texts] if word is not None and word.startswith("/") else [*texts, system]
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages] if texts else messages


def shows(rendered: str, text: str) -> bool:
    """Whether a text came through a template, which may have made it lower case."""
    return text in rendered or text.lower() in rendered.lower()


def in_message_limit(reason: str | None) -> str:
    """What a reader must know of a system prompt without a system turn; `reason` is what the template said of one."""
    told = f" ({reason})" if reason else ""
    return (
        f"The chat template takes no system turn{told}, so the system prompt was put before the user's first message, "
        "with an empty line between: serve it so."
    )
