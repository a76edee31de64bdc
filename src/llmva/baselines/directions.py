"""Directions that separate two kinds of prompts: principal component of paired differences, or difference of means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmva.baselines.base import unit

METHODS = ("pca", "means")


def pair_up(positive: Sequence[int], negative: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """Random pairs of one of each, as many as the smaller side has."""
    count = min(len(positive), len(negative))
    one, other = (
        [side[i] for i in torch.randperm(len(side), generator=generator)[:count].tolist()]
        for side in (positive, negative)
    )
    return list(zip(one, other, strict=True))


def main_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal component of paired states [..., n, d], unit length, pointing to `positive`: [..., d].

    The pairs are centred each on its own middle, so the component is that of the differences about zero. This is what
    CAST's authors call pairwise; representation engineering swaps the order of random pairs and centres the
    differences, which comes to the same once there are many pairs. The sign is that by which more pairs are in order.
    """
    differences = (positive - negative).double()
    # right singular vectors by the smaller of the two Gram matrices
    if differences.shape[-2] >= differences.shape[-1]:
        _, vectors = torch.linalg.eigh(differences.mT @ differences)
        axis = vectors[..., -1]
    else:
        _, vectors = torch.linalg.eigh(differences @ differences.mT)
        axis = unit((differences.mT @ vectors[..., -1:]).squeeze(-1))
    along = (differences @ axis.unsqueeze(-1)).squeeze(-1)  # [..., n]
    votes = along.sign().sum(-1, keepdim=True)
    sign = torch.where(votes == 0, along.sum(-1, keepdim=True).sign(), votes.sign())
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    direction: Tensor = (sign * axis).float()
    return direction


def difference_of_means(states: Tensor, positive: Sequence[int], negative: Sequence[int]) -> Tensor:
    """Mean of `states` [blocks, n, d] over `positive`, minus that over `negative`: [blocks, d], not normalised."""
    return states[:, list(positive)].mean(1) - states[:, list(negative)].mean(1)
