"""Score the sublayers and select those that are edited (method.md, steps 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmva.errors import UsageError

PAPERS_SHARE = 42 / 64  # of the 2N sublayers; the paper's choice for Llama-3.1-8B


def accuracy(features: Tensor, vectors: Tensor, labels: Tensor) -> Tensor:
    """Share of prompts on the right side of each vector: [S, m] from [S, n, d], [S, m, d] and labels [m, n]."""
    side = torch.einsum("snd,smd->smn", features.to(vectors.dtype), vectors).sign()
    return (side == labels.to(vectors)).to(torch.float64).mean(-1)


def score(vectors: Tensor, final: Tensor, accuracies: Tensor) -> Tensor:
    """score = C_a acc_a + C_b acc_b, with C = v(final residual) . v(sublayer) (paper, contribution score).

    Args:
        vectors: unit vectors of the sublayers, [S, 2, d], v_a first.
        final: unit vectors of the final residual stream, [2, d].
        accuracies: on validation prompts, [S, 2].

    Returns:
        [S]
    """
    return (torch.einsum("smd,md->sm", vectors, final) * accuracies).sum(-1)


def select(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` best sublayers, in the model's order; ties go to the earlier one."""
    if not 1 <= count <= len(scores):
        raise UsageError(f"{count} sublayers cannot be selected out of {len(scores)}: choose 1 to {len(scores)}.")
    best = torch.argsort(scores, descending=True, stable=True)[:count]
    return sorted(best.tolist())


def papers_count(sublayers: int) -> int:
    """How many of a model's sublayers the paper would edit."""
    return max(1, round(PAPERS_SHARE * sublayers))
