"""A threshold on one number that separates harmful from harmless prompts with the best F1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """A prompt counts as harmful if its number is at or above `value`, or below it if `above` is False."""

    value: float
    above: bool
    f1: float  # harmful is positive

    def harmful(self, numbers: Tensor) -> Tensor:
        """bool, of the shape of `numbers`."""
        return (numbers >= self.value) if self.above else (numbers < self.value)


def best_threshold(harmful: Tensor, harmless: Tensor, both_ways: bool = False) -> Threshold:
    """The best F1 over all thresholds that split the numbers [n] and [m] differently; ties to the lowest value.

    CAST's authors step through a grid; points halfway between neighbouring numbers cover every grid. `both_ways` also
    tries the lower numbers as harmful; on a tie the upper numbers are harmful.
    """
    numbers, order = torch.cat([harmful, harmless]).double().sort()
    positive = (order < len(harmful)).long()
    middles = (numbers[1:] + numbers[:-1]) / 2
    cuts = torch.cat([numbers[:1], middles])  # at the first cut, all numbers are at or above
    distinct = torch.cat([torch.ones(1, dtype=torch.bool), numbers[1:] > numbers[:-1]])
    below = torch.cat([torch.zeros(1, dtype=torch.long), positive.cumsum(0)[:-1]])  # harmful ones below each cut
    at = torch.arange(len(numbers))  # how many lie below each cut
    best: Threshold | None = None
    for above in (True, False) if both_ways else (True,):
        hits = len(harmful) - below if above else below
        called = len(numbers) - at if above else at
        f1 = torch.where(distinct, 2.0 * hits / (called + len(harmful)), -1.0)
        i = int(f1.argmax())
        if best is None or float(f1[i]) > best.f1:
            best = Threshold(float(cuts[i]), above, float(f1[i]))
    assert best is not None
    return best
