"""Which maps act on a model's outputs by hook, so that an engine that knows only its files can be given the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmva.errors import UsageError
from llmva.models.at_rest import told_hooks

BAKED = "_llmva_baked"  # in a projection's own dict: the digest of the factors in its weights, and its hash since
Maps = Mapping[str, tuple[Tensor, Tensor]]  # module -> V, U, float32 [d, k]: o' = o + V (U^T o)


class OutputMap:
    """A forward hook that changes a module's output to o + V (U^T o)."""

    def __init__(self, V: Tensor, U: Tensor) -> None:
        self.V, self.U = V, U


def applied_maps(model: nn.Module) -> Maps:
    """The maps on each module; several on one are composed.

    Raises UsageError where a hook does something else to the model, which cannot be told in this form.
    """
    if other := told_hooks(model):
        raise _unknown(other)
    maps = dict[str, tuple[Tensor, Tensor]]()
    for name, module in model.named_modules():
        if any(map(_ours, module._forward_pre_hooks.values())):
            raise _unknown(f"a steering method's hook on {name or 'it'}")
        for hook in module._forward_hooks.values():
            if isinstance(hook, OutputMap):
                maps[name] = _composed(maps[name], hook) if name in maps else (hook.V, hook.U)
            elif _ours(hook):
                raise _unknown(f"a steering method's hook on {name or 'it'}")
    return maps


def digest(maps: Maps) -> str:
    """What identifies these maps; "" for none."""
    if not maps:
        return ""
    whole = hashlib.sha256()
    for name, parts in sorted(maps.items()):
        whole.update(name.encode())
        for part in parts:
            whole.update(part.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def _composed(first: tuple[Tensor, Tensor], then: OutputMap) -> tuple[Tensor, Tensor]:
    """(I + V2 U2^T) (I + V1 U1^T) as one map."""
    V, U = first
    return torch.cat([V, then.V], 1), torch.cat([U, then.U + U @ (V.T @ then.U)], 1)


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("llmva.")


def _unknown(what: str) -> UsageError:
    return UsageError(f"The model has {what}, which vLLM cannot be given: leave --engine out.")
