"""Hashes that tell whether an edit belongs to a model; they do not depend on how the model was loaded."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.sublayers import Decoder
from llmva.models.writers import find_writers

HASHED_VALUES = 2**22  # maximum number of hashed values of a tensor, evenly spread: a 70B model takes seconds


def tensor_hash(weight: Tensor, limit: int = HASHED_VALUES) -> str:
    """sha256 (16 hex digits) of the values rounded to bfloat16, equal for a model in float32 and in bfloat16.

    Loading in float16 rounds and clips first, so the hash equals only that of another float16 model or checkpoint.
    Fused experts [E, ..] are hashed one by one, because checkpoints store each as a separate tensor.
    """
    if hasattr(weight, "__tensor_flatten__"):  # a packed tensor of torchao: hash its parts
        return slices_hash(tensor_hash(getattr(weight, part)) for part in weight.__tensor_flatten__()[0])
    if weight.ndim == 3:
        return slices_hash(tensor_hash(part, max(limit // len(weight), 4096)) for part in weight)
    flat = weight.detach().reshape(-1)
    if flat.numel() > limit:
        flat = flat[:: -(-flat.numel() // limit)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).contiguous().view(torch.int16)
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(flat.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def slices_hash(hashes: Iterable[str]) -> str:
    """The hash of a fused tensor from the hashes of its slices."""
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()[:16]


def module_hash(module: nn.Module) -> str:
    """The hash of the parameters that an edit of `module` would write; of all its tensors if weights are packed.

    If no tensor can be read, the hash of its outputs, which also depends on the device and its kernels.
    """
    written = {writer.name for writer in find_writers(module, 0, prove=False)}
    # and nothing else of the state: bitsandbytes changes the layout of its scales at first use
    names = written or {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    with _brought_in(module):
        try:
            state = _to_be_saved(module).state_dict()
            held = [(n, tensor_hash(t)) for n, t in state.items() if n in names and isinstance(t, Tensor)]
        except Exception:  # a packed tensor that cannot be read may raise anything
            if written:
                raise
            held = []
        return parts_hash(held or [("outputs", _outputs_hash(module))])


def _to_be_saved(module: nn.Module) -> nn.Module:
    """`module`, or a copy if reading its state would corrupt it.

    On CPUs bitsandbytes changes the layout of 4-bit weights for use and changes it back for saving, but not that of
    their scales.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in module.parameters())
    relaid = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return copy.deepcopy(module) if relaid else module


@contextmanager
def _brought_in(module: nn.Module) -> Iterator[None]:
    """Load weights that accelerate has offloaded to their device, until the end of the block."""
    with ExitStack() as after:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device

                after.enter_context(align_module_device(part))
        yield


@torch.no_grad()
def _outputs_hash(module: Any) -> str:
    """The hash of the outputs for two fixed inputs of unit length; the class name if the input width is unknown."""
    size = getattr(module, "in_features", None)
    if size is None:
        return type(module).__name__
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return tensor_hash(module((x / x.norm(dim=1, keepdim=True)).to(device)))


def parts_hash(parts: Iterable[tuple[str, str]]) -> str:
    """The hash of a module from the names and hashes of its tensors."""
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()[:16]


def fingerprint(decoder: Decoder, name: str) -> dict[str, Any]:
    """The `base` of an edit: `model`, shape facts, a hash for each sublayer, and `sha256` over all except `model`."""
    config = decoder.model.config
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "blocks": len({sublayer.block for sublayer in decoder.sublayers}),
        "hidden_size": decoder.width,
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "hashes": {sublayer.name: module_hash(sublayer.projection) for sublayer in decoder.sublayers},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"model": name, "quantize": _quantised(decoder.model), "sha256": digest, **facts}


def _quantised(model: Any) -> str | None:
    """How bitsandbytes packed the model when it was loaded, as a value of `load_model`; None if it did not."""
    return next((bits for bits in ("4bit", "8bit") if getattr(model, f"is_loaded_in_{bits}", False)), None)
