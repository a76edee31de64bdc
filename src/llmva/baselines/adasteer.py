"""AdaSteer: two directions, with lengths that each prompt decides. Zhao et al. 2025, "AdaSteer: Your Aligned LLM is
Inherently an Adaptive Jailbreak Defender", arXiv 2504.09466.

From the states h at the last prompt token at the output of each block:

    v = mean of h over refused harmful prompts - mean over answered harmful ones        (rejection)
    c = mean of h over answered harmful prompts - mean over answered benign ones        (harmfulness)
    w = the projection of c on v
    h <- h + alpha v + beta w    at the output of every block, at every position of the prompt

The prompt's own state decides alpha and beta, before anything is steered. What it has along v at an early block says
how far it is from being refused (the authors' first law), what it has along c at a middle block how harmful it is
(their second):

    alpha = s P(harmful and answered | h . v)          between 0 and s
    beta = s (5 P(harmful | h . c) - 3)                between -3 s, towards an answer, and 2 s, towards a refusal

Both chances are logistic functions of one number, fitted on the labelled prompts with both sides weighing the same. In
the authors' code each is a straight line between two limits, whose numbers were set by hand for each of three models;
the limits here are those of Qwen2.5-7B: .2 for alpha, -.6 and .4 for beta.

w always points towards refusal here. Where c and v point apart, theirs turns, and would push harmful prompts towards
an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Steering, at_each, block_at, block_range, both, sides, unit
from llmva.baselines.directions import difference_of_means
from llmva.baselines.hooks import Behaviour, Pass, RowGate, find_blocks, prompt_suffix
from llmva.baselines.states import last_states, last_token, read_batch
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

T = TypeVar("T")
PAPER_BLOCKS = 28
TOWARDS_ANSWER, TOWARDS_REFUSAL = -3.0, 2.0  # limits of beta, in units of the strength


@dataclass(frozen=True)
class Chance:
    """The chance 1 / (1 + exp(-(slope direction . h + offset))), from the state h [d] at a block."""

    block: int
    direction: Tensor  # float32 [d], of length 1
    slope: float
    offset: float

    def of(self, states: Tensor) -> Tensor:
        """[n] of `states` [n, d]."""
        return torch.sigmoid(self.slope * (states.float() @ self.direction.to(states.device)) + self.offset)


@dataclass
class AdaSteering(Steering):
    """`rejection` v and `harmfulness` w, float32 [blocks, d]; `gain` is s."""

    blocks: tuple[int, ...]
    suffix: tuple[int, ...]
    rejection: Tensor
    harmfulness: Tensor
    needed: Chance
    harmful: Chance
    pad: int
    gain: float
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "output"

    def behaviour(self, decoder: Decoder) -> Behaviour:
        return _Adapted(self, decoder)

    def coefficients(self, decoder: Decoder, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """alpha and beta of prompts as token ids, each float32 [rows]."""
        blocks = sorted({self.needed.block, self.harmful.block})
        weights = [last_token(len(row)) for row in rows]
        states = read_batch(decoder, rows, weights, pad=self.pad, blocks=blocks, place="output")
        needed, harmful = (one.of(states[blocks.index(one.block)]) for one in (self.needed, self.harmful))
        scale = self.strength * self.gain
        return scale * needed, scale * (TOWARDS_ANSWER + (TOWARDS_REFUSAL - TOWARDS_ANSWER) * harmful)


class _Adapted(Behaviour):
    def __init__(self, steering: AdaSteering, decoder: Decoder) -> None:
        self.steering, self.decoder = steering, decoder
        self.alpha, self.beta = RowGate(), RowGate()
        self.vectors = dict(
            zip(steering.blocks, zip(steering.rejection, steering.harmfulness, strict=True), strict=True)
        )

    def begin(self, current: Pass, alone: Callable[[Callable[[], T]], T]) -> None:
        if not current.prompt:
            return
        rows = current.prompt_rows()
        both: Any = alone(lambda: self.steering.coefficients(self.decoder, rows))  # type: ignore[arg-type, return-value]
        alpha, beta = both
        self.alpha.decide(alpha)
        self.beta.decide(beta)

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor | None:
        if not current.prompt:
            return None
        rejection, harmfulness = (vector.to(states) for vector in self.vectors[block])
        added = self.alpha.column(states) * rejection + self.beta.column(states) * harmfulness
        moved: Tensor = states + current.in_prompt().to(states)[:, :, None] * added
        return moved


class AdaSteer(Baseline):
    name = "adasteer"
    paper = (
        "Zhao et al. 2025, AdaSteer: Your Aligned LLM is Inherently an Adaptive Jailbreak Defender, arXiv 2504.09466"
    )
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 0.2,
        "rejection_at": 5 / 28,
        "harmfulness_at": 13 / 28,
        "blocks": [0.0, 1.0],
    }

    def check(self) -> None:
        super().check()
        self.share("rejection_at")
        self.share("harmfulness_at")

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> AdaSteering:
        groups = sides(self.name, prompts, labels)
        towards, away = both(groups.toxic, groups.refused), both(groups.toxic, groups.answered)
        needed, harmless = away or groups.toxic, both(groups.benign, groups.answered) or groups.benign
        notes = []
        if not towards or not away:
            towards, away = groups.refused, groups.answered
            kind = "the refused and answered prompts of both sides"
            if not towards or not away:
                towards, away = groups.toxic, groups.benign
                kind = "harmful and harmless prompts"
            notes.append(f"{self.name}: the model treats all harmful fit prompts alike, so its v is of {kind}.")
        count = len(find_blocks(chat.decoder))
        states = last_states(chat, prompts, range(count), "output")
        rejection = difference_of_means(states, towards, away)
        harmfulness = difference_of_means(states, needed, harmless)
        along = (harmfulness * unit(rejection)).sum(-1, keepdim=True).abs() * unit(rejection)
        at = block_at(self.options["rejection_at"], count), block_at(self.options["harmfulness_at"], count)
        steered = list(block_range(self.options["blocks"], count))
        gain = at_each(self.options[STRENGTH], PAPER_BLOCKS, len(steered))
        return AdaSteering(
            tuple(steered),
            prompt_suffix(chat.template),
            rejection[steered],
            along[steered],
            fit_chance(at[0], states[at[0]], rejection[at[0]], needed, harmless),
            fit_chance(at[1], states[at[1]], harmfulness[at[1]], groups.toxic, groups.benign),
            chat.pad_id,
            gain,
            notes=tuple(notes),
        )

    def variants(self) -> list[dict[str, Any]]:
        return [{"rejection_at": 13 / 28}, {"harmfulness_at": 18 / 28}, {"blocks": [8 / 28, 20 / 28]}]


def fit_chance(
    block: int, states: Tensor, direction: Tensor, positive: Sequence[int], negative: Sequence[int]
) -> Chance:
    """The logistic regression of `positive` against `negative` on direction . h, of states [n, d] at a block."""
    from sklearn.linear_model import LogisticRegression

    axis = unit(direction)
    numbers = (states[[*positive, *negative]] @ axis).double()
    middle, scale = float(numbers.mean()), float(numbers.std(correction=0)) or 1.0
    side = [1] * len(positive) + [0] * len(negative)
    fitted = LogisticRegression(class_weight="balanced").fit(((numbers - middle) / scale)[:, None].numpy(), side)
    slope = float(fitted.coef_[0, 0]) / scale
    return Chance(block, axis, slope, float(fitted.intercept_[0]) - slope * middle)
