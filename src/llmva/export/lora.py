"""The edit as a PEFT LoRA adapter: B = V, A = U^T W, so that W + B A is exactly the edited weight.

An edited bias becomes PEFT's `lora_B.bias`. Fused experts are refused: LoRA could express their edit, with one A for
each expert and one B for all, but we have not shown which loaders read such an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmva.edit import Factors
from llmva.errors import LlmvaError, UsageError
from llmva.export.base import check_weights
from llmva.export.card import hub_revision
from llmva.export.folder import describe, fresh, in_workplace, written
from llmva.export.merged import Change, edited_tensors, read_proved
from llmva.export.plan import Plan
from llmva.files import write_json, write_tensors
from llmva.models.checkpoint import Checkpoint
from llmva.models.files.weights import ADAPTER, findable
from llmva.progress import Progress
from llmva.runs.environment import peak_bytes

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
ROWS = 256  # unit vectors with which a packed projection is read at once

Parts = tuple[Tensor, Tensor, Tensor | None]  # A [k, in], B [out, k], bias [out] or None


def export_lora(
    plan: Plan, out: str | Path, *, rank: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the adapter into the new folder `out`; returns facts about it.

    Args:
        rank: one rank for all modules. Modules of lower rank are padded with zeros, which is exact; those of higher
            rank are cut to the nearest map of that rank, with the error in `truncation` and in a warning. None keeps
            each module's own rank.

    Raises:
        UsageError: `out` exists already, or `rank` is below 1.
        LlmvaError: the model is not the edit's base, or the edit changes fused experts.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"There is no adapter of rank {rank}: choose 1 or more.")
    progress = progress or Progress()
    out = fresh(out)
    progress.stage("reading the base")
    checkpoint = _readable(plan)
    warnings, errors = [] if checkpoint is None else check_weights(checkpoint, plan.edit), {}
    conv1d, parts = _from_model(plan) if checkpoint is None else _from_checkpoint(plan, checkpoint)
    if rank is not None:
        for name, part in parts.items():
            parts[name], errors[name] = _at_rank(part, rank)
    worst = max(errors, key=errors.__getitem__, default=None)
    if worst is not None and errors[worst] > 0:
        warnings.append(
            f"Rank {rank} is below what the edit needs: {worst} is off by {errors[worst]:.2%} of its change. "
            "Leave --rank out, or choose a higher one, for the exact edit."
        )
    if len({len(A) for A, _, _ in parts.values()}) > 1:
        # llama.cpp divides the one alpha by each tensor's own rank, so it would amplify all modules but the widest
        warnings.append(
            "The modules have different ranks, which PEFT reads; llama.cpp would scale them wrongly and other servers "
            "may refuse them. For those, choose one rank with --rank."
        )
    biased = any(bias is not None for _, _, bias in parts.values())
    if biased:
        warnings.append(
            "This edit changes biases, which the adapter carries as lora_B.bias: PEFT reads them, other servers do "
            "not. For those, export with --as merged."
        )
    tensors = {}
    for name, (A, B, bias) in parts.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        if biased:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.zeros(len(B)) if bias is None else bias
    ranks = {name: len(A) for name, (A, _, _) in parts.items()}
    with in_workplace(out) as work:
        write_tensors(work / WEIGHTS, tensors, {"format": "pt"})
        reasons = describe(plan, "lora", work)
        write_json(work / ADAPTER, _config(plan, ranks, conv1d, biased))
    return {
        **written(out, {**reasons, WEIGHTS: "the adapter's weights", ADAPTER: "the adapter's config"}),
        "rank": max(ranks.values()),
        "modules": len(ranks),
        "truncation": max(errors.values(), default=0.0),
        "truncation_at": worst if worst is not None and errors[worst] > 0 else None,
        "warnings": warnings,
        "peak_bytes": peak_bytes(),
    }


def _config(plan: Plan, ranks: Mapping[str, int], conv1d: bool, biased: bool) -> dict[str, Any]:
    """alpha = r everywhere, so that the scale is 1 for loaders that know no patterns too."""
    largest = max(ranks.values())
    # PEFT matches keys with the ends of names, as patterns: layers.1 must not match layers.11 or a tower's layers.1
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": findable(plan.base),
        "revision": hub_revision(plan),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_bias": biased,
        "lora_dropout": 0.0,
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


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
