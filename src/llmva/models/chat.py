"""Render a user's message in the chat template, with the generation prompt appended, as token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from llmva.errors import LlmvaError

MAX_ADDED = 100_000  # characters of a template's own; lists of tools have some thousands


def render(tokenizer: Any, text: str, thinking: bool = False) -> str:
    """One user message; see `render_dialogue`."""
    return render_dialogue(tokenizer, [{"role": "user", "content": text}], thinking)


def render_dialogue(tokenizer: Any, messages: Sequence[dict[str, str]], thinking: bool = False) -> str:
    """The chat template, or a plain dialogue if there is none; thinking is off if the template allows it."""
    if not getattr(tokenizer, "chat_template", None):
        turns = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages)
        return f"{turns}Assistant:"
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    most = MAX_ADDED + 10 * sum(len(message["content"]) for message in messages)
    if len(rendered) > most:
        raise LlmvaError(
            f"The chat template makes {len(rendered):,} characters of {messages[-1]['content'][:40]!r}: mend it, or "
            "remove it for a plain dialogue."
        )
    if not thinking and rendered.rstrip().endswith("<think>"):
        rendered = rendered.rstrip() + "\n\n</think>\n\n"  # some templates always open the block: close it
    return rendered


def encode(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids. A template includes its special tokens; for the plain dialogue the tokenizer adds them.

    Raises LlmvaError where the tokenizer fails, as one without a token for unknown letters does.
    """
    special = not getattr(tokenizer, "chat_template", None)
    try:
        ids: list[int] = tokenizer(rendered, add_special_tokens=special)["input_ids"]
    except BaseException as error:
        if not isinstance(error, Exception) and not panicked(error):
            raise
        raise LlmvaError(
            f"The tokenizer cannot encode text that begins with {rendered[:40]!r} ({type(error).__name__}): put the "
            "tokenizer that belongs to the model into its folder, or remove that prompt."
        ) from error
    return ids


def panicked(error: BaseException) -> bool:
    """Whether Rust code failed, whose errors are no Exception."""
    return type(error).__name__ == "PanicException"


def input_device(model: Any) -> torch.device:
    """The device for token ids: that of the input embedding, or of its execution if accelerate offloads it."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        return torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", "cpu"))
    return device


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)`, both int64 [rows, longest]; every row ends at the last column, where the next token is decided."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def forward_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of a forward pass over left-padded rows.

    Models with learned positions would count the padding, so the positions are given; `generate` computes them itself.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs
