"""Turn a user's message into the text that the model reads, with the generation prompt appended."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch


def render(tokenizer: Any, text: str, thinking: bool = False) -> str:
    """One user message; see `render_dialogue`."""
    return render_dialogue(tokenizer, [{"role": "user", "content": text}], thinking)


def render_dialogue(tokenizer: Any, messages: Sequence[dict[str, str]], thinking: bool = False) -> str:
    """The chat template, a plain dialogue where there is none; thinking is off, where it offers that, unless asked."""
    if not getattr(tokenizer, "chat_template", None):
        turns = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages)
        return f"{turns}Assistant:"
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    if not thinking and rendered.rstrip().endswith("<think>"):
        rendered = rendered.rstrip() + "\n\n</think>\n\n"  # some templates always open the block: close it at once
    return rendered


def encode(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids. A template writes its own special tokens; the plain dialogue needs the tokenizer's."""
    special = not getattr(tokenizer, "chat_template", None)
    ids: list[int] = tokenizer(rendered, add_special_tokens=special)["input_ids"]
    return ids


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the input embedding, or where accelerate brings an offloaded one."""
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
    """What a forward pass over left-padded rows takes.

    Models with learned positions count the padding unless told where each row begins; `generate` tells them itself.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs
