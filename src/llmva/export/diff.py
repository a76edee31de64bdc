"""Which tensors an edit changes, and by how much; nothing is written."""

from __future__ import annotations

from typing import Any

import torch

from llmva.errors import UsageError
from llmva.export.plan import Plan
from llmva.models.checkpoint import Checkpoint


def diff(plan: Plan) -> list[dict[str, Any]]:
    """A row per changed tensor: `tensor`, `shape`, `dtype`, `norm` of the change and `base_norm` (Frobenius), `rank`.

    The rank is that of the map, V U^T, beyond rounding: the change can have no higher one.
    """
    if plan.base.endswith(".gguf"):
        raise UsageError("A .gguf holds no tensors under their own names: export with --as merged and compare.")
    checkpoint = Checkpoint.open(plan.base)
    checkpoint.check(plan.edit.base, plan.edit.factors)
    rows = []
    for module, places in checkpoint.writers_of(plan.edit.factors).items():
        f = plan.edit.factors[module]
        V, U = f.V.double(), f.U.double()
        rank = int(torch.linalg.matrix_rank(torch.linalg.qr(V).R @ torch.linalg.qr(U).R.T, rtol=1e-6))
        for place in places:
            weight = checkpoint.tensor(place.name)
            # |V (U^T W)|_F^2 = tr((V^T V) (A A^T)), A = U^T W: no matrix of W's size is made in float64
            wide = weight.float()
            A = (wide @ f.U).mT if place.axis == -1 and wide.ndim > 1 else f.U.T @ wide
            A = A.double().reshape(*A.shape[:-1], -1) if wide.ndim > 1 else A.double()[:, None]
            square = ((V.T @ V) * (A @ A.mT)).sum()
            rows.append(
                {
                    "tensor": place.name,
                    "shape": list(weight.shape),
                    "dtype": str(weight.dtype).removeprefix("torch."),
                    "norm": float(square.clamp_min(0).sqrt()),
                    "base_norm": float(wide.norm()),
                    "rank": rank,
                }
            )
    return rows
