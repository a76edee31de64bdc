"""From a user's message to what the model reads, and from what it writes to its answer without thoughts."""

from __future__ import annotations

from llmva.models.chat.inputs import forward_inputs, input_device, pad_left, pad_token, takes
from llmva.models.chat.reading import AnswerReader, decode
from llmva.models.chat.template import ChatTemplate, encode, render, render_dialogue

__all__ = [
    "AnswerReader",
    "ChatTemplate",
    "decode",
    "encode",
    "forward_inputs",
    "input_device",
    "pad_left",
    "pad_token",
    "render",
    "render_dialogue",
    "takes",
]
