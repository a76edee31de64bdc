"""Conversations in cells: lists of messages with `role` and `content`, or with `from` and `value` (as in ShareGPT).

A conversation may begin with one system message. Then the user and the assistant alternate, the user first, and every
message says something. If the last message is the assistant's, it is the beginning of the answer, with which the model
goes on. What is not so is refused; `about_chats` tells what was read in a way that a user may not expect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.types import Asked, Message, prefill_of

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
}
KEYS = (("role", "content"), ("from", "value"))
CALLS = ("tool_calls", "function_call")
TOOLS = ("tool", "function", "ipython", "observation", "function_call", "tool_call")


def is_list(cell: Any) -> bool:
    """Whether a cell holds a list of anything."""
    return isinstance(cell, Sequence) and not isinstance(cell, str | bytes)


def is_chat(cell: Any) -> bool:
    """Whether a cell is a list of messages that say whose they are."""
    return is_list(cell) and bool(cell) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in cell)


def read_conversation(cell: Sequence[Any], where: str, mend: str) -> Asked:
    """A user message alone as its text; else a conversation. A list of one string is that string.

    Raises UsageError, which names the message by its place, for what is no conversation.
    """
    if not cell:
        raise UsageError(f"{where} holds a conversation without messages: {mend}.")
    if all(isinstance(one, str) for one in cell):
        if len(cell) == 1:
            return str(cell[0])
        raise UsageError(
            f"{where} holds {len(cell)} texts that do not say who speaks: write messages with role and content."
        )
    turns = [_read_message(one, i, where, mend) for i, one in enumerate(cell, 1)]
    turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    _check_order(turns, where, mend)
    return turns[0].content if len(turns) == 1 else tuple(turns)


def about_chats(cells: Sequence[Any], prompts: Sequence[Asked]) -> str:
    """What a reader of conversations must know of how they were read; "" for nothing."""
    chats = [cell for cell in cells if is_chat(cell)]
    counts = {
        "took last messages of the assistant for beginnings of the answer, with which the model goes on": sum(
            bool(prefill_of(asked)) for asked in prompts
        ),
        "left out pictures and other parts that are no text in conversations": sum(
            any(_has_other_parts(message) for message in chat) for chat in chats
        ),
        "left out empty system messages": sum(any(_is_empty_system(message) for message in chat) for chat in chats),
    }
    return "; ".join(f"{what}: {n}" for what, n in counts.items() if n)


def _read_message(one: Any, place: int, where: str, mend: str) -> Message:
    if is_list(one):
        raise UsageError(f"{where} holds a list in a list of messages: give every conversation a row of its own.")
    if not isinstance(one, Mapping):
        raise UsageError(f"message {place} of {where} is not an object but {type(one).__name__}: {mend}.")
    keys = next((pair for pair in KEYS if one.get(pair[0]) is not None), None)
    if keys is None:
        raise UsageError(f"message {place} of {where} does not say whose it is: give it a role.")
    given = one[keys[0]]
    if given in TOOLS or any(one.get(key) for key in CALLS):
        raise UsageError(
            f"message {place} of {where} is about the call of a tool, which no prompt here can have: {mend}."
        )
    role = ROLES.get(given.strip().casefold()) if isinstance(given, str) else None
    if role is None:
        raise UsageError(f"message {place} of {where} has the role {given!r}: make it system, user or assistant.")
    content = _text(one.get(keys[1]))
    if role == "system" and content is None:
        content = ""
    if content is None:
        raise UsageError(f"message {place} of {where} has no text: {mend}.")
    if not isinstance(content, str):
        raise UsageError(f"message {place} of {where} is not text but {type(content).__name__}: {mend}.")
    if role != "system" and not content.strip():
        raise UsageError(f"message {place} of {where} is empty: {mend}.")
    return Message(role, content)


def _check_order(turns: Sequence[Message], where: str, mend: str) -> None:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    first = len(turns) - len(spoken) + 1
    if not spoken:
        raise UsageError(f"{where} has no user turn: {mend}.")
    for i, turn in enumerate(spoken):
        wanted = "assistant" if i % 2 else "user"
        if turn.role == "system":
            raise UsageError(f"{where} has a system message after its first: put all its system text first.")
        if turn.role != wanted:
            raise UsageError(
                f"message {first + i} of {where} is the {turn.role}'s where the {wanted}'s must come: let user and "
                "assistant alternate, the user first."
            )


def _text(content: Any) -> Any:
    """A message's content; of one in parts, as multimodal models have, the texts. None where there is no text."""
    if not is_list(content):
        return content
    texts = [part["text"] for part in content if _is_text(part)]
    return "\n".join(texts) if texts else None


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _has_other_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return is_list(content) and not all(map(_is_text, content or ()))


def _is_empty_system(message: Mapping[str, Any]) -> bool:
    role, text = next(((message[a], _text(message.get(b))) for a, b in KEYS if message.get(a) is not None), ("", ""))
    return isinstance(role, str) and ROLES.get(role.strip().casefold()) == "system" and not str(text or "").strip()
