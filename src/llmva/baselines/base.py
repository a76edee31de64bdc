"""The interface of baselines: steering methods that are fitted on labelled prompts and applied by forward hooks.

Magnitudes. The papers' numbers are lengths on 7B models and do not carry over to another width or depth. Here:

- A length is a share of the spread of the block to which the vector is added: the root mean square distance of the
  states at the last prompt token from their mean. The length of the states is not a usable unit, because most of it may
  be common to all prompts: at the middle blocks of the 135M test model it is 7 to 9 times the spread, in the bundled
  model 1.2 times, and the same share of it garbled one model and did not change the other.
- A share that a paper uses at n blocks is multiplied by sqrt(n / m) if m blocks are steered here. With the same share
  at each block, the bundled model (4 blocks) did not change; with the same sum of shares it was garbled; the 135M model
  (30 blocks) worked with both. The square root lies between them and was chosen on training and validation prompts
  alone.

No paper gives the spreads of its models, so they are our estimates. The translated magnitude is therefore only the
start of a sweep (see tune.py): papers choose a magnitude for each model by trying several, and so does a comparison.
The strengths of methods whose magnitude is a length are the smallest, on a grid of steps of about 1.5, at which
validation prompts of both of our models began to change. Blocks are given as shares of depth.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmva.baselines.hooks import Behaviour, Place, steered
from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

S = TypeVar("S", bound="Steering")
STRENGTH = "strength"  # an option of every baseline, which only scales the fitted steering
FACTORS = (1.0, 0.75, 1.5, 0.5, 2.0, 0.25, 3.0, 0.125, 4.0)  # times the translated magnitude, nearest first
FACTORS_OF_VARIANTS = (1.0, 0.5, 2.0, 0.25, 4.0)  # times the magnitude around which other options are tried


class Steering(ABC):
    """A fitted baseline: how it changes the residual stream at some blocks.

    `strength` is a multiple of the fitted magnitude: 1 as fitted, 0 nothing. `notes` are sentences about replacements
    that the fit needed; a comparison shows them.
    """

    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place: Place
    blocks: tuple[int, ...]  # indices of the blocks whose input or output (`place`) it reads or changes
    suffix: tuple[int, ...]  # token ids that end every prompt

    @abstractmethod
    def behaviour(self, decoder: Decoder) -> Behaviour:
        """New state for one application to `decoder`."""

    def applied(self, decoder: Decoder) -> AbstractContextManager[None]:
        """A context with the hooks on the model; weights stay untouched.

        The effect is the same on a prompt that is continued token by token with a cache, and on prompt and answer in
        one forward pass. Other hooks stay; the extra forward pass of SCANS runs with the hooks that were there before.
        """
        if self.strength == 0.0:
            return steered(decoder, (), self.place, self.suffix, None)
        return steered(decoder, self.blocks, self.place, self.suffix, self.behaviour(decoder))

    def scaled(self: S, strength: float) -> S:
        """The same steering at a multiple of its magnitude; 0 is the untouched model.

        Raises UsageError for a negative multiple, which would steer away from safety.
        """
        if not math.isfinite(strength) or strength < 0:
            raise UsageError(
                f"A steering's strength cannot be {strength}: give 0 or more, since less would undo safety."
            )
        other = copy.copy(self)
        other.strength = self.strength * strength
        return other


class Baseline(ABC):
    """A baseline with its hyperparameters; `options` are plain JSON types."""

    name: str
    paper: str
    defaults: Mapping[str, Any]  # the paper's settings, translated

    def __init__(self, **options: Any) -> None:
        unknown = [key for key in options if key not in self.defaults]
        if unknown:
            raise UsageError(f"{self.name} has no option '{unknown[0]}': choose among {', '.join(self.defaults)}.")
        self.options: dict[str, Any] = {**self.defaults, **options}
        self.check()

    def check(self) -> None:
        """Raises UsageError for an option out of its range."""
        strength = self.options[STRENGTH]
        if not isinstance(strength, int | float) or not math.isfinite(strength) or strength <= 0:
            raise UsageError(f"{self.name} cannot have the strength {strength!r}: give a number above 0.")
        for key in (key for key in self.options if key.endswith("blocks")):
            value = self.options[key]
            if not isinstance(value, list | tuple) or len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
                raise UsageError(
                    f"{self.name} cannot steer the {key} {value!r}: give two shares of depth, as [0.3, 0.6]."
                )

    def one_of(self, key: str, choices: Sequence[str]) -> None:
        """Raises UsageError unless the option `key` is among `choices`."""
        if self.options[key] not in choices:
            raise UsageError(f"{self.name} knows no {key} {self.options[key]!r}: choose among {', '.join(choices)}.")

    def share(self, key: str) -> None:
        """Raises UsageError unless the option `key` is a share of depth."""
        value = self.options[key]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UsageError(f"{self.name} cannot read at the depth {value!r}: give a share from 0 to 1 as {key}.")

    @abstractmethod
    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> Steering:
        """Fit on `prompts` with the untouched model's `labels`. Raises LlmvaError if a side is missing."""

    @abstractmethod
    def variants(self) -> list[dict[str, Any]]:
        """Changes of the defaults, except for the strength, that tuning may try, in the order of expected effect."""

    def sweep(self) -> list[dict[str, Any]]:
        """The paper's settings at every tried magnitude, the translated one first."""
        return [{**self.defaults, STRENGTH: factor * self.defaults[STRENGTH]} for factor in FACTORS]

    def grid(self, strength: float) -> list[dict[str, Any]]:
        """Full options that tuning may try in addition, at magnitudes around `strength`."""
        return [
            {**self.defaults, **variant, STRENGTH: factor * strength}
            for variant in self.variants()
            for factor in FACTORS_OF_VARIANTS
        ]


@dataclass(frozen=True)
class Sides:
    """Indices of the fit prompts by side and by label; garbled answers are in neither `answered` nor `refused`."""

    benign: list[int]
    toxic: list[int]
    answered: list[int]
    refused: list[int]


def both(side: Sequence[int], label: Sequence[int]) -> list[int]:
    """What of a side has a label, in its order."""
    kept = set(label)
    return [i for i in side if i in kept]


def sides(name: str, prompts: Sequence[Prompt], labels: Sequence[Label]) -> Sides:
    """Raises LlmvaError if there are no benign or no toxic prompts."""
    groups = Sides(
        [i for i, prompt in enumerate(prompts) if prompt.benign],
        [i for i, prompt in enumerate(prompts) if not prompt.benign],
        [i for i, (_, label) in enumerate(zip(prompts, labels, strict=True)) if label is Label.ANSWERED],
        [i for i, label in enumerate(labels) if label is Label.REFUSED],
    )
    if not groups.benign or not groups.toxic:
        kind = "toxic" if groups.benign else "benign"
        raise LlmvaError(f"{name} is fitted on benign and toxic prompts and got no {kind} ones: add some.")
    return groups


def block_range(shares: Sequence[float], count: int) -> tuple[int, ...]:
    """Indices of the blocks from `shares[0]` up to `shares[1]` of the depth of `count` blocks; at least one.

    Block i begins at the share i / count. For 32 blocks, [10 / 32, 20 / 32] gives 10 to 19.
    """
    first, end = round(shares[0] * count), round(shares[1] * count)
    first = min(first, count - 1)
    return tuple(range(first, max(end, first + 1)))


def block_at(share: float, count: int) -> int:
    """Index of the block at a share of the depth of `count` blocks."""
    return min(round(share * count), count - 1)


def at_each(strength: float, papers: int, count: int) -> float:
    """The share for each of `count` blocks, from one that a paper uses at `papers` blocks; see above."""
    return strength * math.sqrt(papers / count)


def spread(states: Tensor) -> Tensor:
    """Root mean square distance of vectors [blocks, n, d] from their mean, by block: [blocks]."""
    centred = states - states.mean(dim=1, keepdim=True)
    root: Tensor = centred.pow(2).sum(-1).mean(-1).sqrt()
    return root


def unit(vector: Tensor) -> Tensor:
    """Unit vectors along the last dimension; zero stays zero."""
    length: Tensor = vector.norm(dim=-1, keepdim=True)
    return vector / length.clamp_min(1e-12)
