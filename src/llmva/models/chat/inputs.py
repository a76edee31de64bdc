"""Token ids as a model takes them: padded on the left, on its device, with a padding token that it knows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch


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


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def forward_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of a forward pass over the new tokens `ids` [rows, t]; `mask` [rows, past + t] covers a cache too.

    Models with learned positions would count the padding, so the positions are given: they count real tokens, wherever
    the padding is. `generate` computes them itself.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return inputs


def pad_token(model: Any, tokenizer: Any) -> int:
    """The id that fills rows up: the tokenizer's, its end token, or 0, whichever the model has an embedding of.

    A tokenizer may know no padding token, or one that was added to it and never to the model.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(i) for i in candidates if isinstance(i, int) and 0 <= i < known), 0)
