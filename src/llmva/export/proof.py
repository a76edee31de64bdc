"""Whether an artefact's tensors are the edit's, whatever rounding does to its logits.

A change of 1% of what the edit changes is told apart, however small the edit and in whatever dtype the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit, Factors
from llmva.models.checkpoint import Checkpoint
from llmva.models.writers import left_map

SHARE = 0.01  # of the edit's change by which an artefact's may differ
PACKED_SHARE = 0.05  # if the base is packed: its weights are read through kernels that round
CHUNK = 2**22  # values that are compared at once
LOST = 0.5  # share of the edit's change that must survive the rounding of a merged model


def edit_problems(edit: Edit, other: Edit) -> list[str]:
    """A sentence for each sublayer whose map differs between two edits."""
    problems = []
    for name in sorted({*edit.factors, *other.factors}):
        mine, theirs = edit.factors.get(name), other.factors.get(name)
        empty = Factors.empty(len((mine or theirs).V))  # type: ignore[union-attr]
        mine, theirs = mine or empty, theirs or empty
        problems += _compared(name, (mine.V, mine.U.T), (theirs.V, theirs.U.T), SHARE)
    return problems


def adapter_problems(wrapped: Any, edit: Edit, share: float) -> list[str]:
    """A sentence for each projection to which an adapter, as PEFT has loaded it, adds something else than the edit.

    Args:
        wrapped: the base model with PEFT's layers in it.
        share: SHARE or PACKED_SHARE.
    """
    problems, seen = [], set()
    for name, module in wrapped.named_modules():
        if hasattr(module, "modules_to_save"):
            problems.append(f"{name} is replaced by the adapter and not changed by the edit.")
        if not hasattr(module, "lora_A"):
            continue
        f = edit.factors.get(name)
        wanted = None if f is None else (f.V, _read(module.base_layer, f.U, wrapped.dtype))
        seen.add(name)
        for adapter in module.active_adapters:
            if getattr(module, "use_dora", {}).get(adapter):
                problems.append(f"{name} is scaled by DoRA, which the edit does not do.")
        problems += _compared(name, wanted, _added(module), share)
        problems += _bias_problems(name, module, f)
    missing = [name for name in edit.factors if name not in seen]
    return problems + [f"{name} is not changed by the adapter." for name in missing]


def addition_problems(
    model: Any, edit: Edit, additions: Mapping[str, tuple[Tensor, Tensor]], share: float
) -> list[str]:
    """Like `adapter_problems`, of what llama.cpp adds: (B, A) of each module, and of "" for a tensor of no module."""
    problems = ["The adapter changes a tensor that the edit leaves as it is."] if "" in additions else []
    for name, f in edit.factors.items():
        wanted = f.V, _read(model.get_submodule(name), f.U, model.dtype)
        problems += _compared(name, wanted, additions.get(name), share)
    return problems


def merged_problems(base: str, path: Path, edit: Edit, trust: bool) -> list[str]:
    """A sentence for each tensor of the merged checkpoint that differs from base plus edit. Reads every tensor."""
    from llmva.export.merged import edited_tensors

    if base.endswith(".gguf"):
        return []
    before, after = (Checkpoint.open(str(place), trust_remote_code=trust) for place in (base, path))
    if set(before.names) != set(after.names):
        odd = sorted(set(before.names) ^ set(after.names))
        return [f"{odd[0]} is in only one of the base and the merged model ({len(odd)} such tensors)."]
    changed = edited_tensors(before, edit, base)
    problems, kept = [], _Kept()
    for name in before.names:
        mine, theirs = before.tensor(name), after.tensor(name)
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            problems.append(f"{name} has a different dtype or shape.")
        elif name in changed:
            axis, f = changed[name].axis, changed[name].factors
            if not kept.add(mine, theirs, left_map(mine, axis, f.V, f.U), left_map(mine.float(), axis, f.V, f.U)):
                problems.append(f"{name} differs from the base's tensor with the edit.")
        elif not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            problems.append(f"{name} should be unchanged but differs from the base's.")
    return problems + kept.problems(before.tensor(next(iter(changed))).dtype if changed else torch.float32)


@dataclass
class _Kept:
    """How much of the edit's change rounding leaves in a merged model, over all tensors that it changes."""

    change: float = 0.0  # the sum of its squares
    rounded: float = 0.0  # its scalar product with the rounded change

    def add(self, mine: Tensor, theirs: Tensor, rounded: Tensor, exact: Tensor) -> bool:
        """Whether one tensor is `rounded`, as an export writes it, but for the order of its sums."""
        epsilon, floor = torch.finfo(mine.dtype).eps, 1e-6 * float(exact.abs().max())
        near, total, there, wanted = True, 0.0, 0.0, 0.0
        parts = (tensor.reshape(-1) for tensor in (mine, theirs, rounded, exact))
        # piece by piece, since the copies in float64 would be large
        for base, other, own, whole in zip(*(torch.split(part, CHUNK) for part in parts), strict=True):
            change = (whole - base.float()).double()
            total += float(change @ change)
            there += float((other.float() - base.float()).double() @ change)
            wanted += float((own.float() - base.float()).double() @ change)
            # values may differ by a step, since sums of another order round otherwise, but not all in one direction
            near &= not bool(((other.float() - whole).abs() > epsilon * whole.abs() + floor).any())
        self.change += total
        self.rounded += wanted
        return near and abs(there - wanted) <= 2 * SHARE * max(abs(wanted), 1e-3 * total)

    def problems(self, dtype: torch.dtype) -> list[str]:
        if not self.change or self.rounded >= LOST * self.change:
            return []
        name, kept = str(dtype).removeprefix("torch."), max(self.rounded, 0.0) / self.change
        return [f"Rounding to {name} keeps {kept:.0%} of so small an edit: export it --as lora."]


def _added(module: Any) -> tuple[Tensor, Tensor] | None:
    """(B, A) of what the active adapters add to a projection together, float32, with their scales; None for nothing."""
    parts = []
    for adapter in [] if module.disable_adapters else module.active_adapters:
        if adapter in module.lora_A and adapter in module.lora_B:
            A, B = (part[adapter].weight.detach().cpu().float() for part in (module.lora_A, module.lora_B))
            parts.append((B * module.scaling[adapter], A))
    return (torch.cat([B for B, _ in parts], 1), torch.cat([A for _, A in parts])) if parts else None


def _read(projection: Any, U: Tensor, dtype: torch.dtype) -> Tensor:
    """U^T W, float32 [k, in]."""
    from llmva.export.adapters.parts import read_through

    weight = getattr(projection, "weight", None)
    turned = type(projection).__name__ == "Conv1D"
    if type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.element_size() > 1:
        wide = weight.detach().cpu().float()
        return (wide @ U).T if turned else U.T @ wide
    return read_through(projection, projection.nx if turned else projection.in_features, U, dtype)


def _bias_problems(name: str, module: Any, f: Factors | None) -> list[str]:
    bias = getattr(module.base_layer, "bias", None)
    wanted = torch.zeros(()) if f is None or bias is None else f.V @ (f.U.T @ bias.detach().cpu().float())
    got = torch.zeros(())
    for adapter in module.active_adapters:
        own = getattr(module.lora_B[adapter], "bias", None) if adapter in module.lora_B else None
        if own is not None:
            got = got + own.detach().cpu().float() * module.scaling[adapter]
    if float((got - wanted).norm()) <= SHARE * float(wanted.norm()) + 1e-6:
        return []
    return [f"{name} has another bias than with the edit."]


def _compared(name: str, wanted: Sequence[Tensor] | None, got: Sequence[Tensor] | None, share: float) -> list[str]:
    """Compare two maps B A, each of (B [d, k], A [k, n]) or None for nothing, by the Frobenius norm."""
    difference = [*([] if wanted is None else [(wanted[0], wanted[1])]), *([] if got is None else [(-got[0], got[1])])]
    if not difference:
        return []
    distance = _norm(torch.cat([B for B, _ in difference], 1), torch.cat([A for _, A in difference]))
    size = 0.0 if wanted is None else _norm(*wanted)
    if distance <= share * size:
        return []
    if not size:
        return [f"{name} is changed, and the edit leaves it as it is."]
    return [f"{name} is off by {distance / size:.0%} of what the edit changes."]


def _norm(B: Tensor, A: Tensor) -> float:
    """|B A|, without the product: B [d, k] and A [k, n] may be of a large model."""
    if not B.shape[1]:
        return 0.0
    return float((torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().T).R.T).norm())
