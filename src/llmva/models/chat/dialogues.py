"""Conversations as a chat template takes them, with the beginning of an answer apart.

A template ends an assistant's turn, so it cannot write a beginning that the model goes on with. The rest is rendered up
to where an answer begins, and the beginning is put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.models.chat.system import shows

Turns = Sequence[Mapping[str, Any]]


def as_turns(asked: str | Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """One user message, or `(role, content)` of each message of a conversation, as templates take them."""
    messages = [("user", asked)] if isinstance(asked, str) else asked
    return [{"role": role, "content": content} for role, content in messages]


def split_prefill(turns: Turns, thinking: bool) -> tuple[Turns, str]:
    """The turns without the beginning of the answer, and that beginning, "" where there is none.

    Raises UsageError where the model is to think before it answers: it cannot, once its answer has begun.
    """
    if not turns or turns[-1]["role"] != "assistant":
        return turns, ""
    prefill = str(turns[-1]["content"])
    if thinking:
        raise UsageError(
            f"A prompt has a beginning of the answer ({prefill[:40]!r}), before which the model cannot think: pass "
            "--thinking off, or remove that message."
        )
    return turns[:-1], prefill


def check_shown(rendered: str, turns: Turns) -> None:
    """Raises LlmvaError where a template leaves a user's turn out, as one does that reads the last turn alone.

    Answers may be changed, since many templates cut thoughts out of them.
    """
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "user" and not shows(rendered, str(turn["content"]).strip()):
            raise LlmvaError(
                f"The chat template leaves out turn {number} of a conversation ({str(turn['content'])[:40]!r}): mend "
                "the template, or give prompts of one message."
            )


def no_conversation(name: str, turns: Turns, reason: str) -> LlmvaError:
    """The error for a template that takes one message and no conversation, or not this one."""
    return LlmvaError(
        f"The chat template of {name} cannot render a conversation of {len(turns)} turns ({reason}): mend the "
        "template, or give prompts of one message."
    )


def space_before(dialogue: str, reply: str) -> str:
    """White space that a template writes between the head of an answer and the answer `reply`."""
    before, answer, _ = dialogue.partition(reply)
    return before[len(before.rstrip()) :] if answer else ""
