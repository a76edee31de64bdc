"""Tell whether an edit belongs to a model: hashes of what it edits, equal however the model was loaded."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.sublayers import Decoder

HASHED_VALUES = 2**22  # a larger tensor is hashed at this many evenly spread values, so that a 70B model takes seconds


def tensor_hash(weight: Tensor) -> str:
    """sha256 of the values rounded to bfloat16, so that loading in float32 or bfloat16 is the same (16 hex digits).

    float16 rounds and clips before that: what is loaded so agrees with itself, and with a float16 checkpoint.
    """
    flat = weight.detach().reshape(-1)
    if flat.numel() > HASHED_VALUES:
        flat = flat[:: -(-flat.numel() // HASHED_VALUES)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).contiguous().view(torch.int16)
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(flat.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def module_hash(module: nn.Module) -> str:
    """One hash over a projection's parameters and buffers, in order of their names."""
    parts = [(name, tensor_hash(t)) for name, t in sorted(module.state_dict().items()) if isinstance(t, Tensor)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fingerprint(decoder: Decoder, name: str) -> dict[str, Any]:
    """What an edit remembers of its base: `model`, shape facts, a hash per sublayer, and `sha256` over all of these."""
    config = decoder.model.config
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "blocks": len({sublayer.block for sublayer in decoder.sublayers}),
        "hidden_size": decoder.width,
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "hashes": {sublayer.name: module_hash(sublayer.projection) for sublayer in decoder.sublayers},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"model": name, "sha256": digest, **facts}
