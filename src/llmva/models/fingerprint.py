"""Tell whether an edit belongs to a model: hashes of what it edits, equal however the model was loaded."""

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

HASHED_VALUES = 2**22  # a larger tensor is hashed at this many evenly spread values, so that a 70B model takes seconds


def tensor_hash(weight: Tensor, limit: int = HASHED_VALUES) -> str:
    """sha256 of the values rounded to bfloat16, so that loading in float32 or bfloat16 is the same (16 hex digits).

    float16 rounds and clips before that: what is loaded so agrees with itself, and with a float16 checkpoint.
    Fused experts [E, ..] are hashed one by one, since checkpoints keep each as a tensor of its own.
    """
    if hasattr(weight, "__tensor_flatten__"):  # a packed tensor in disguise, as torchao's: of its parts
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
    """One hash of a fused tensor from those of its slices."""
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()[:16]


def module_hash(module: nn.Module) -> str:
    """One hash over what an edit of `module` would write; over all it holds where weights are packed.

    Where it holds nothing to be read, over its outputs: such a hash is of the device and its kernels too.
    """
    written = {writer.name for writer in find_writers(module, 0, prove=False)}
    # not what else is in the state: bitsandbytes lays its scales out anew on their first use
    names = written or {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    with _brought_in(module):
        try:
            state = _to_be_saved(module).state_dict()
            held = [(n, tensor_hash(t)) for n, t in state.items() if n in names and isinstance(t, Tensor)]
        except Exception:  # whatever a packed tensor raises that does not want to be read
            if written:
                raise
            held = []
        return parts_hash(held or [("outputs", _outputs_hash(module))])


def _to_be_saved(module: nn.Module) -> nn.Module:
    """`module`, or a copy where reading its state would harm it.

    On CPUs bitsandbytes lays 4-bit weights out anew for use, and lays them back for saving, but not their scales.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in module.parameters())
    relaid = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return copy.deepcopy(module) if relaid else module


@contextmanager
def _brought_in(module: nn.Module) -> Iterator[None]:
    """Weights that accelerate keeps on disk or in memory come to their device for the length of this block."""
    with ExitStack() as after:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device

                after.enter_context(align_module_device(part))
        yield


@torch.no_grad()
def _outputs_hash(module: Any) -> str:
    """Of the outputs for two fixed inputs of unit length; of the kind of module alone where its inputs are unknown."""
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
    return {"model": name, "quantize": _quantised(decoder.model), "sha256": digest, **facts}


def _quantised(model: Any) -> str | None:
    """How bitsandbytes packed the model when it was loaded, as `load_model` takes it; None where it did not."""
    return next((bits for bits in ("4bit", "8bit") if getattr(model, f"is_loaded_in_{bits}", False)), None)
