"""One text or dialogue through a tokenizer's template; whoever renders many takes one `ChatTemplate` for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.models.chat.template import ChatTemplate


def render(tokenizer: Any, text: str, thinking: bool = False) -> str:
    """One user message; see `ChatTemplate.render`."""
    return render_dialogue(tokenizer, [{"role": "user", "content": text}], thinking)


def render_dialogue(tokenizer: Any, messages: Sequence[Mapping[str, str]], thinking: bool = False) -> str:
    """A dialogue; see `ChatTemplate.render`."""
    return ChatTemplate.of(tokenizer).render(messages, thinking)


def encode(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids of what was rendered; see `ChatTemplate.encode`."""
    return ChatTemplate.of(tokenizer).encode(rendered)
