"""The edit as files that an engine reads: changed tensors of the checkpoint, or a LoRA adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.models.checkpoint import Checkpoint
from llmva.models.engines.applied import Maps
from llmva.models.writers import left_map

RAM_DISK = Path("/dev/shm")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for


def workplace() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with the object, on a RAM disk if there is one."""
    try:
        return tempfile.TemporaryDirectory(prefix="llmva-", dir=RAM_DISK if RAM_DISK.is_dir() else None)
    except OSError:  # a RAM disk that nobody may write to
        return tempfile.TemporaryDirectory(prefix="llmva-")


def write_tensors(checkpoint: Checkpoint, maps: Maps, modules: Iterable[str], dtype: torch.dtype, folder: Path) -> None:
    """The tensors of `modules` as `model.safetensors`: edited where there is a map, else as they are stored.

    Args:
        dtype: in which the engine computes. They are edited in float32 and rounded to it once.
    """
    tensors = {}
    for module, places in checkpoint.writers_of(sorted(modules)).items():
        for place in places:
            tensor = checkpoint.tensor(place.name)
            if module in maps:
                tensor = left_map(tensor.float(), place.axis, *maps[module])
            tensors[place.name] = tensor.to(dtype).contiguous()
    _save(tensors, folder / "model.safetensors")


def adapter_rank(checkpoint: Checkpoint, maps: Maps) -> int | None:
    """The smallest rank of vLLM's that holds the edit; None where an adapter cannot: biases, experts, or too many."""
    for places in checkpoint.writers_of(maps).values():
        if len(places) != 1 or len(checkpoint.stored[places[0].name].shape) != 2:
            return None
    widest = max((V.shape[1] for V, _ in maps.values()), default=0)
    return next((rank for rank in RANKS if widest <= rank), None)


def write_adapter(checkpoint: Checkpoint, maps: Maps, folder: Path) -> None:
    """B = V and A = U^T W of each edited module, all padded to the widest one's rank: servers know no others."""
    widest = max(V.shape[1] for V, _ in maps.values())
    tensors = {}
    for module, ((place,), (V, U)) in zip(
        maps, zip(checkpoint.writers_of(maps).values(), maps.values(), strict=True), strict=True
    ):
        W = checkpoint.tensor(place.name).float()
        A = U.T @ W if place.axis == -2 else (W @ U).T
        more = widest - len(A)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, more))
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(V, (0, more))
    _save({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.folder),
        "r": widest,
        "lora_alpha": widest,
        "target_modules": sorted(maps),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
