"""From a user's message to what the model reads, and from what it writes to its answer without thoughts."""

from __future__ import annotations

from llmva.models.chat.inputs import forward_inputs, input_device, pad_left, pad_token, takes
from llmva.models.chat.reading import AnswerReader, decode
from llmva.models.chat.single import encode, render, render_dialogue
from llmva.models.chat.template import ChatTemplate
from llmva.models.chat.turns import end_tokens, ending_limits, special_in_text, turn_end

__all__ = [
    "AnswerReader",
    "ChatTemplate",
    "decode",
    "encode",
    "end_tokens",
    "ending_limits",
    "forward_inputs",
    "input_device",
    "pad_left",
    "pad_token",
    "render",
    "render_dialogue",
    "special_in_text",
    "takes",
    "turn_end",
]
