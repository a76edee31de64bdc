"""VectorSteer: one direction, added at every token. Zou et al. 2023, "Representation Engineering", arXiv 2310.01405.

Each block has a reading vector v of unit length, made from the states at the last prompt token at the block's output:
the first principal component of paired differences, or their mean. At some middle blocks alpha v is added to the
output, h + alpha v, at every position of prompt and answer, towards refusal.

The contrast is the paper's for harmlessness: harmful and harmless prompts, independent of the model's answers. The
paper adds the harmless direction to make a model answer; here only the opposite direction exists. The option
`contrast` = "refused" instead contrasts refused and answered prompts, which gives the "answer vector" that the LLM-VA
paper (arXiv 2601.19487) mentions for this method.

Translation (see base.py): the authors' example for Llama-2-7B adds 4.0 v at the outputs of blocks 10 to 14 of 32; here
the share 0.6 at those five blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Steering, at_each, block_range, sides, spread, unit
from llmva.baselines.directions import METHODS, difference_of_means, main_direction, pair_up
from llmva.baselines.hooks import Behaviour, Pass, find_blocks, prompt_suffix
from llmva.baselines.states import last_states
from llmva.errors import LlmvaError
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

PAPER_BLOCKS = 5


@dataclass
class VectorSteering(Steering):
    """`vectors` float32 [blocks, d], with the added length."""

    blocks: tuple[int, ...]
    suffix: tuple[int, ...]
    vectors: Tensor
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "output"

    def behaviour(self, decoder: Decoder) -> Behaviour:
        return _Add({block: self.strength * v for block, v in zip(self.blocks, self.vectors, strict=True)})


class _Add(Behaviour):
    def __init__(self, vectors: dict[int, Tensor]) -> None:
        self.vectors = vectors

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor:
        return add_vector(states, self.vectors[block], current)


def add_vector(states: Tensor, vector: Tensor, current: Pass, factor: Tensor | None = None) -> Tensor:
    """`vector` [d] added to `states` [rows, t, d] except at padding, times `factor` [rows, 1 or t, 1]."""
    added = vector.to(states)
    if factor is not None:
        added = factor * added
    if current.real is not None:
        added = current.real.to(states)[:, :, None] * added
    return states + added


class VectorSteer(Baseline):
    name = "vectorsteer"
    paper = "Zou et al. 2023, Representation Engineering: A Top-Down Approach to AI Transparency, arXiv 2310.01405"
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 0.6,
        "contrast": "harmful",
        "direction": "pca",
        "blocks": [10 / 32, 15 / 32],
    }

    def check(self) -> None:
        super().check()
        self.one_of("contrast", ("harmful", "refused"))
        self.one_of("direction", METHODS)

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> VectorSteering:
        groups = sides(self.name, prompts, labels)
        positive, negative = groups.toxic, groups.benign
        if self.options["contrast"] == "refused":
            positive, negative = groups.refused, groups.answered
            if not positive or not negative:
                never = "refuses" if negative else "answers"
                raise LlmvaError(
                    f"The model {never} none of the fit prompts, so vectorsteer has no answer vector: "
                    "use its contrast 'harmful'."
                )
        blocks = block_range(self.options["blocks"], len(find_blocks(chat.decoder)))
        states = last_states(chat, prompts, blocks, "output")
        if self.options["direction"] == "pca":
            pairs = pair_up(positive, negative, generator)
            vectors = main_direction(states[:, [p for p, _ in pairs]], states[:, [n for _, n in pairs]])
        else:
            vectors = unit(difference_of_means(states, positive, negative))
        share = at_each(self.options[STRENGTH], PAPER_BLOCKS, len(blocks))
        return VectorSteering(blocks, prompt_suffix(chat.template), share * spread(states)[:, None] * vectors)

    def variants(self) -> list[dict[str, Any]]:
        return [{"contrast": "refused"}, {"direction": "means"}, {"contrast": "refused", "direction": "means"}]
