"""Surgical: the false-refusal direction is removed from the residual stream, without the part of it that true refusal
uses. Wang et al. 2024, "Surgical, Cheap, and Flexible: Mitigating False Refusal in Language Models via Single Vector
Ablation", arXiv 2410.03415.

From the states h at the last prompt token at the output of one block:

    f = mean of h over refused benign prompts - mean over answered benign ones
    r = mean of h over refused harmful prompts - mean over answered benign ones
    e = f - overlap (f . r / r . r) r, made a unit vector
    h <- h - min(s, 1) (h . e) e    at the output of every block, at every position of prompt and answer
    h <- h + s addition r           at that block alone, likewise

The addition is the authors' second vector, towards refusal. So the method mends both failures: the removal lets benign
prompts pass, the addition holds harmful ones. `strength` s scales both, and a removal is never more than whole.

The authors remove e also from the output of each attention and MLP, and choose block and token by refusal scores of
held-out prompts. Here it is removed where the next block reads, the token is the last, and tuning chooses the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Steering, block_at, block_range, both, sides, unit
from llmva.baselines.directions import difference_of_means
from llmva.baselines.hooks import Behaviour, Pass, find_blocks, prompt_suffix
from llmva.baselines.states import last_states
from llmva.baselines.vectorsteer import add_vector
from llmva.errors import UsageError
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt


@dataclass
class SurgicalSteering(Steering):
    """`removed` e, float32 [d], of length 1 or 0; `refusal` r with the added length, float32 [d], at `block`."""

    blocks: tuple[int, ...]
    suffix: tuple[int, ...]
    block: int
    removed: Tensor
    refusal: Tensor
    gain: float = 1.0
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "output"

    def behaviour(self, decoder: Decoder) -> Behaviour:
        return _Remove(self)


class _Remove(Behaviour):
    def __init__(self, steering: SurgicalSteering) -> None:
        self.block = steering.block
        share = steering.strength * steering.gain
        self.removed, self.share = steering.removed, min(share, 1.0)
        self.added = share * steering.refusal

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor:
        removed = self.removed.to(states.device)
        along = states.float() @ removed
        left = states - (self.share * along[..., None] * removed).to(states.dtype)
        return add_vector(left, self.added, current) if block == self.block else left


class Surgical(Baseline):
    name = "surgical"
    paper = (
        "Wang et al. 2024, Surgical, Cheap, and Flexible: Mitigating False Refusal in Language Models via Single "
        "Vector Ablation, arXiv 2410.03415"
    )
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 1.0,
        "overlap": 1.0,
        "addition": 0.2,
        "at": 0.5,
        "blocks": [0.0, 1.0],
    }

    def check(self) -> None:
        super().check()
        self.share("at")
        for key in ("overlap", "addition"):
            if not isinstance(self.options[key], int | float) or not 0 <= self.options[key] <= 1:
                raise UsageError(f"{self.name} needs 0 to 1 as its {key}, not {self.options[key]!r}.")

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> SurgicalSteering:
        groups = sides(self.name, prompts, labels)
        count = len(find_blocks(chat.decoder))
        block = block_at(self.options["at"], count)
        states = last_states(chat, prompts, [block], "output")
        false, right = both(groups.benign, groups.refused), both(groups.benign, groups.answered)
        true = both(groups.toxic, groups.refused)
        notes = []
        if not true:
            notes.append(f"{self.name}: the model refuses no harmful prompt, so its refusal vector is of harmful ones.")
        refusal = difference_of_means(states, true or groups.toxic, right or groups.benign)[0]
        if false and right:
            removed = difference_of_means(states, false, right)[0]
            removed = removed - self.options["overlap"] * (removed @ refusal) / refusal.dot(refusal) * refusal
        else:
            never = "refuses none" if right else "answers none"
            notes.append(f"{self.name}: the model {never} of the benign fit prompts, so no direction is removed.")
            removed = torch.zeros_like(refusal)
        return SurgicalSteering(
            tuple(sorted({*block_range(self.options["blocks"], count), block})),
            prompt_suffix(chat.template),
            block,
            unit(removed),
            self.options["addition"] * refusal,
            float(self.options[STRENGTH]),
            notes=tuple(notes),
        )

    def variants(self) -> list[dict[str, Any]]:
        return [{"addition": 0.0}, {"at": 0.65}, {"at": 0.35}, {"overlap": 0.0}]
