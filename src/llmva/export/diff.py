"""Which tensors an edit changes, and by how much; nothing is written."""

from __future__ import annotations

from typing import Any

import torch

from llmva.errors import UsageError
from llmva.export.base import check_weights
from llmva.export.merged import edited_tensors, read_proved
from llmva.export.plan import Plan
from llmva.models.checkpoint import Checkpoint


def diff(plan: Plan) -> list[dict[str, Any]]:
    """A row for each changed tensor, in the order of the checkpoint.

    Returns:
        `tensor`, `shape`, `dtype`, `norm` of the change and `base_norm` (both Frobenius), and `rank`: the numerical
        rank of the map V U^T, which bounds that of the change.

    Raises:
        UsageError: the base is a .gguf file.
        LlmvaError: the checkpoint is another base, packed, or lacks some tensors.
    """
    if plan.base.endswith(".gguf"):
        raise UsageError("llmva cannot list the tensors of a .gguf file: export with --as merged and compare.")
    checkpoint = Checkpoint.open(plan.base, trust_remote_code=plan.trust_remote_code)
    check_weights(checkpoint, plan.edit)
    ranks: dict[int, int] = {}  # by id of the factors, which experts share
    rows = []
    for name, change in edited_tensors(checkpoint, plan.edit, plan.base).items():
        axis, f = change.axis, change.factors
        V, U = f.V.double(), f.U.double()
        if id(f) not in ranks:
            ranks[id(f)] = int(torch.linalg.matrix_rank(torch.linalg.qr(V).R @ torch.linalg.qr(U).R.T, rtol=1e-6))
        weight = read_proved(checkpoint, plan.edit, name, change)
        inner, square, base = V.T @ V, 0.0, 0.0
        for part in weight if weight.ndim == 3 else [weight]:  # one expert at a time keeps float32 copies small
            wide = part.float()
            # |V (U^T W)|_F^2 = tr((V^T V) (A A^T)) with A = U^T W needs no float64 matrix of W's size
            A = (wide @ f.U).mT if axis == -1 and wide.ndim > 1 else f.U.T @ wide
            A = A.double().reshape(len(inner), -1)
            square += float((inner * (A @ A.mT)).sum())
            base += float(wide.norm()) ** 2
        rows.append(
            {
                "tensor": name,
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "norm": max(square, 0.0) ** 0.5,
                "base_norm": base**0.5,
                "rank": ranks[id(f)],
            }
        )
    return rows
