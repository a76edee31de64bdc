"""The edit as low-rank additions to projections: B = V, A = U^T W, so that W + B A is exactly the edited weight.

An edited bias is a part of its own, for forms that can hold one. Fused experts are refused: LoRA could express their
edit, with one A for each expert and one B for all, but we have not shown which loaders read such an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmva.edit import Factors
from llmva.errors import LlmvaError, UsageError
from llmva.export.base import check_weights
from llmva.export.merged import Change, edited_tensors, read_proved
from llmva.export.plan import Plan
from llmva.models.checkpoint import Checkpoint

ROWS = 256  # unit vectors with which a packed projection is read at once

Parts = tuple[Tensor, Tensor, Tensor | None]  # A [k, in], B [out, k], bias [out] or None


@dataclass(frozen=True)
class Adapter:
    """What is added to each projection, by its module's name.

    `errors` are those of a rank below a module's own, relative to its change (Frobenius); `warnings` say what the user
    should know of that and of the base.
    """

    parts: dict[str, Parts]
    conv1d: bool  # the projections store their weights as [in, out]
    errors: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: len(A) for name, (A, _, _) in self.parts.items()}

    @property
    def biased(self) -> bool:
        return any(bias is not None for _, _, bias in self.parts.values())

    @property
    def worst(self) -> str | None:
        """The module that a low rank changes most; None where all are exact."""
        name = max(self.errors, key=self.errors.__getitem__, default=None)
        return name if name is not None and self.errors[name] > 0 else None

    def facts(self) -> dict[str, object]:
        """What an export tells of it."""
        return {
            "rank": max(self.ranks.values()),
            "modules": len(self.parts),
            "truncation": max(self.errors.values(), default=0.0),
            "truncation_at": self.worst,
        }


def make_adapter(plan: Plan, rank: int | None) -> Adapter:
    """Read the base, and make of the edit what adapters hold.

    Args:
        rank: one rank for all modules. Modules of lower rank are padded with zeros, which is exact; those of higher
            rank are cut to the nearest map of that rank. None keeps each module's own rank.

    Raises:
        UsageError: `rank` is below 1.
        LlmvaError: the model is not the edit's base, or the edit changes fused experts.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"There is no adapter of rank {rank}: choose 1 or more.")
    checkpoint = _readable(plan)
    warnings, errors = [] if checkpoint is None else check_weights(checkpoint, plan.edit), dict[str, float]()
    conv1d, parts = _from_model(plan) if checkpoint is None else _from_checkpoint(plan, checkpoint)
    if rank is not None:
        for name, part in parts.items():
            parts[name], errors[name] = _at_rank(part, rank)
    made = Adapter(parts, conv1d, errors, tuple(warnings))
    if made.worst is None:
        return made
    told = (
        f"Rank {rank} is below what the edit needs: {made.worst} is off by {errors[made.worst]:.2%} of its change. "
        "Leave --rank out, or choose a higher one, for the exact edit."
    )
    return Adapter(parts, conv1d, errors, (*warnings, told))


def _readable(plan: Plan) -> Checkpoint | None:
    """The checkpoint that holds the weights the edit was fitted on; None if a model must unpack them."""
    if plan.edit.base.get("quantize") is not None or plan.base.endswith(".gguf"):
        return None
    checkpoint = Checkpoint.open(plan.base, trust_remote_code=plan.trust_remote_code)
    return None if checkpoint.holds_packed(plan.edit.factors) else checkpoint


def _from_checkpoint(plan: Plan, checkpoint: Checkpoint) -> tuple[bool, dict[str, Parts]]:
    factors = plan.edit.factors
    changes: dict[str, list[tuple[str, Change]]] = {module: [] for module in factors}
    for name, change in edited_tensors(checkpoint, plan.edit, plan.base).items():
        changes[change.module].append((name, change))
    parts = {}
    conv1d = False
    for module, changed in changes.items():
        shapes = [len(checkpoint.stored[name].shape) for name, _ in changed]
        if sorted(shapes, reverse=True) not in ([2], [2, 1]):
            raise _fused(module)
        f = factors[module]
        bias = None
        for name, change in changed:
            tensor = read_proved(checkpoint, plan.edit, name, change)
            if tensor.ndim == 1:
                bias = _moved(f, tensor)
            else:
                conv1d |= change.axis == -1
                A = (f.U.T @ tensor.float()) if change.axis == -2 else (tensor.float() @ f.U).T
        parts[module] = (A.contiguous(), f.V, bias)
    return conv1d, parts


def _from_model(plan: Plan) -> tuple[bool, dict[str, Parts]]:
    """Like `_from_checkpoint`, through the loaded model, for weights that are packed on disk."""
    from llmva.models.load import load_model

    packing = plan.edit.base.get("quantize")
    if packing is not None and not plan.base.endswith(".gguf") and Checkpoint.open(plan.base).packed:
        packing = None  # the weights are stored packed
    model, _ = load_model(plan.base, quantize=packing or "none", trust_remote_code=plan.trust_remote_code)
    plan.edit.apply(model).remove()  # raises on another base
    parts = {}
    conv1d = False
    for module, f in plan.edit.factors.items():
        projection = model.get_submodule(module)
        turned = type(projection).__name__ == "Conv1D"  # which has nx and nf, and its weight as (in, out)
        size = getattr(projection, "nx" if turned else "in_features", None)
        if size is None:
            raise _fused(module)
        conv1d |= turned
        bias = getattr(projection, "bias", None)
        parts[module] = (
            read_through(projection, size, f.U, model.dtype),
            f.V,
            None if bias is None else _moved(f, bias.detach().cpu()),
        )
    return conv1d, parts


def _moved(f: Factors, bias: Tensor) -> Tensor | None:
    """What the edit adds to a bias [out]; None where that is nothing."""
    change = f.V @ (f.U.T @ bias.float())
    return change if bool(change.any()) else None


def _fused(module: str) -> LlmvaError:
    return LlmvaError(
        f"llmva writes no adapter for fused experts such as {module} yet (LoRA could express their edit, per expert, "
        "but we have not shown which loaders read it): export with --as merged, or serve the edit by hook."
    )


@torch.no_grad()
def read_through(projection: nn.Module, size: int, U: Tensor, dtype: torch.dtype) -> Tensor:
    """U^T W, float32 [k, in], of a projection whose weight cannot be read, from its outputs on unit vectors.

    Args:
        size: inputs of the projection.
        U: float32 [out, k].
        dtype: in which the projection computes.
    """
    device = next((t.device for t in (*projection.parameters(), *projection.buffers())), torch.device("cpu"))
    # without its bias: in bfloat16 the sum of a small weight and a large bias is rounded, and subtracting the bias
    # again would leave mostly that rounding
    own = {**dict(projection.named_parameters(recurse=False)), **dict(projection.named_buffers(recurse=False))}
    unbiased = {"bias": torch.zeros_like(own["bias"])} if own.get("bias") is not None else {}

    def outputs(x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(projection, unbiased, (x,)) if unbiased else projection(x)
        return y.float()

    nothing = outputs(torch.zeros(1, size, dtype=dtype, device=device))
    U = U.to(device)
    columns = []
    for start in range(0, size, ROWS):
        count = min(ROWS, size - start)
        unit = torch.zeros(count, size, dtype=dtype, device=device)
        unit[torch.arange(count), torch.arange(start, start + count)] = 1.0
        columns.append(((outputs(unit) - nothing) @ U).T.cpu())
    return torch.cat(columns, 1).contiguous()


def _at_rank(part: Parts, rank: int) -> tuple[Parts, float]:
    """The same change padded to `rank`, or the nearest of that rank, and its relative error (Frobenius)."""
    A, B, bias = part
    if len(A) <= rank:
        pad = rank - len(A)
        return (nn.functional.pad(A, (0, 0, 0, pad)), nn.functional.pad(B, (0, pad)), bias), 0.0
    # the singular values of B A are those of a k x k core, so no matrix of W's size is taken apart
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    left, values, right = torch.linalg.svd(Rb @ Ra.T)
    root = values[:rank].sqrt()
    cut = (root[:, None] * (right[:rank] @ Qa.T)).float(), ((Qb @ left[:, :rank]) * root).float(), bias
    whole = float(values.norm())
    return cut, float(values[rank:].norm()) / whole if whole else 0.0
