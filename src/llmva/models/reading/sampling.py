"""Which token comes next: the most likely one, or one drawn at a temperature from the likeliest.

A draw depends on its row's key and on how many tokens the row has, and on nothing else. So what a row writes does not
depend on the batch that it is in, and a row that is begun again writes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# rows, how many new tokens each of them has, and the logits [rows, V] of the next -> the next token of each
Choose = Callable[[Sequence[int], Sequence[int], Tensor], list[int]]


def greedy(rows: Sequence[int], counts: Sequence[int], logits: Tensor) -> list[int]:
    """The most likely token of each row."""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


@dataclass(frozen=True)
class Sampling:
    """Draws for as many rows as there are keys: nucleus sampling (Holtzman et al. 2020), by inversion.

    Of the likeliest tokens as many are drawn from as together have the probability `top_p`, at least one.
    """

    keys: tuple[str, ...]
    temperature: float = 1.0
    top_p: float = 1.0

    def at(self, rows: Sequence[int]) -> Sampling:
        """The draws of some of the rows, in this order."""
        return replace(self, keys=tuple(self.keys[i] for i in rows))

    def of_thoughts(self) -> Sampling:
        """Other draws for the same rows, for what they write before their answers."""
        return replace(self, keys=tuple(f"{key}:thoughts" for key in self.keys))

    def __call__(self, rows: Sequence[int], counts: Sequence[int], logits: Tensor) -> list[int]:
        """The next token of each row; `logits` [rows, V]."""
        wide = torch.float32 if logits.device.type == "mps" else torch.float64  # which that device lacks
        ranked, tokens = (logits.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        reached = ranked.softmax(-1).to(wide).cumsum(-1)
        before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], 1)
        kept = (before < self.top_p).sum(-1, keepdim=True)
        mass = reached.gather(1, kept - 1)
        draws = [_uniform(self.keys[row], count) for row, count in zip(rows, counts, strict=True)]
        target = torch.tensor(draws, dtype=wide, device=logits.device)[:, None] * mass
        place = torch.searchsorted(reached, target, right=True).minimum(kept - 1)
        chosen: list[int] = tokens.gather(1, place)[:, 0].tolist()
        return chosen


def _uniform(key: str, count: int) -> float:
    """A number from 0 up to 1, by a hash."""
    return int.from_bytes(hashlib.sha256(f"{key}:{count}".encode()).digest()[:6], "big") / 2**48
