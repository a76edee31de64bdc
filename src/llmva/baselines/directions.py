"""Directions that separate two groups of prompts: principal component of paired differences, difference of means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmva.baselines.base import unit

METHODS = ("pca", "means")


def pair_up(positive: Sequence[int], negative: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """Random pairs with one of each, as many as the smaller group has."""
    count = min(len(positive), len(negative))
    one, other = (
        [side[i] for i in torch.randperm(len(side), generator=generator)[:count].tolist()]
        for side in (positive, negative)
    )
    return list(zip(one, other, strict=True))


def main_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal component of paired states [..., n, d], unit length, pointing to `positive`: [..., d].

    Each pair is centred on its own middle, so this is the principal component of the uncentred differences. CAST's
    authors call it pairwise. Representation engineering swaps the order of random pairs and centres the differences,
    which gives the same for many pairs. The sign puts `positive` higher in the majority of pairs.
    """
    differences = (positive - negative).double()
    # right singular vectors from the smaller of the two Gram matrices
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
