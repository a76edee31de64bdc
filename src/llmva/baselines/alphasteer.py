"""AlphaSteer: a push towards refusal to which benign activations do not respond. Sheng et al. 2025, arXiv 2506.07022.

At the input of each chosen block, h the state at the last prompt token (columns of H):

    r = mean of h over refused prompts - mean over answered ones
    P = projector on the directions that benign activations use least: eigenvectors of H_b H_b^T, smallest eigenvalues
    D = argmin |D P H_m - r 1^T|^2 + gamma |D P|^2          H_m: malicious activations
    s = lambda D P h, added at every position of the prompt; nothing is added while the answer is written.

Every column of the target is r, so D P has rank one: D P = r w^T with w = P H_m (H_m^T P H_m + gamma I)^-1 1. So it is
solved and stored as one system as large as the number of malicious prompts, and two vectors per block. With fewer
benign prompts than dimensions, several eigenvalues are zero and none of them is the smallest; then P keeps all of them,
even if that is more than `null_share`.

AlphaSteer+ (arXiv 2601.19487) takes for H_b only the benign prompts that the model answers.

`contrast` = "harmful" is not the paper's: r is then the difference of harmful and harmless prompts. It helps if hardly
any harmful prompt is refused, because r, made from refused benign prompts, then points away from what w reads.

Translation (see base.py): r has its own length. The authors' code tries lambda from 0.1 to 0.5 (negative there, because
their r points the other way) at ten blocks of Llama-3.1-8B between 8 and 19; here 0.5, at blocks 8 to 17 of 32
without gaps. `null_share` is 0.6 at most of those blocks. Their gamma is 10 and is added to squares of activations,
which scale with the model. Here gamma is 0.01 times the sum of squares of P H_m, which gives D P h of about 0.9 r on
malicious prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Steering, at_each, block_range, both, sides
from llmva.baselines.directions import difference_of_means
from llmva.baselines.hooks import Behaviour, Pass, find_blocks, prompt_suffix
from llmva.baselines.states import last_states
from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

PAPER_BLOCKS = 10


@dataclass
class AlphaSteering(Steering):
    """`readers` w and `refusals` r, both float32 [blocks, d]; `gain` is lambda."""

    blocks: tuple[int, ...]
    suffix: tuple[int, ...]
    readers: Tensor
    refusals: Tensor
    gain: float
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "input"

    def behaviour(self, decoder: Decoder) -> Behaviour:
        factor = self.strength * self.gain
        return _Push(dict(zip(self.blocks, zip(self.readers, factor * self.refusals, strict=True), strict=True)))


class _Push(Behaviour):
    def __init__(self, factors: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.factors = factors

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor | None:
        if not current.prompt:
            return None
        reader, refusal = self.factors[block]
        # terms of the reader nearly cancel on benign prompts, so it is applied in float32
        amount = current.at_end(states).float() @ reader.to(states.device)
        push = amount[:, None, None] * refusal.to(states.device)
        return states + (current.in_prompt().to(states.device)[:, :, None] * push).to(states.dtype)


def null_projector(benign: Tensor, share: float) -> Tensor:
    """P [d, d] on the `share` of directions with the smallest eigenvalues of benign^T benign, `benign` [n, d].

    float64. More than the share if more eigenvalues are zero.
    """
    benign = benign.double()
    n, width = benign.shape
    if n < width:  # the same directions without a [d, d] matrix
        _, roots, rows = torch.linalg.svd(benign, full_matrices=False)
        values, directions = roots**2, rows.T
    else:
        values, directions = (part.flip(-1) for part in torch.linalg.eigh(benign.T @ benign))
    zeros = width - int((values > values[0] * width * torch.finfo(values.dtype).eps).sum())
    used = directions[:, : width - max(int(share * width), zeros)]
    projector: Tensor = torch.eye(width, dtype=values.dtype) - used @ used.T
    return projector


def solve_reader(malicious: Tensor, projector: Tensor, regulariser: float) -> Tensor:
    """w [d] with D P = r w^T for the ridge problem above, `malicious` [n, d]; float32."""
    projected = malicious.double() @ projector
    gram = projected @ projected.T
    gram.diagonal().add_(regulariser)
    ones = torch.ones(len(gram), 1, dtype=gram.dtype)
    solution = torch.cholesky_solve(ones, torch.linalg.cholesky(gram))
    reader: Tensor = (projected.T @ solution)[:, 0].float()
    return reader


class AlphaSteer(Baseline):
    name = "alphasteer"
    paper = (
        "Sheng et al. 2025, AlphaSteer: Learning Refusal Steering with Principled Null-Space Constraint, "
        "arXiv 2506.07022"
    )
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 0.5,
        "null_share": 0.6,
        "regulariser": 1e-2,
        "contrast": "refused",
        "blocks": [8 / 32, 18 / 32],
    }
    only_answered = False  # whether the null space comes only from benign prompts that the model answers

    def check(self) -> None:
        super().check()
        self.one_of("contrast", ("refused", "harmful"))
        if not 0 < self.options["null_share"] < 1:
            raise UsageError(f"{self.name} needs a null_share between 0 and 1, not {self.options['null_share']!r}.")
        if not self.options["regulariser"] > 0:
            raise UsageError(f"{self.name} needs a regulariser above 0, not {self.options['regulariser']!r}.")

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> AlphaSteering:
        groups = sides(self.name, prompts, labels)
        kept = both(groups.benign, groups.answered) if self.only_answered else groups.benign
        if not kept:
            raise LlmvaError(
                "The model answers none of the benign fit prompts, so alphasteer+ has no null space: use alphasteer."
            )
        notes: tuple[str, ...] = ()
        towards, away = groups.toxic, groups.benign
        if self.options["contrast"] == "refused" and groups.refused and groups.answered:
            towards, away = groups.refused, groups.answered
        elif self.options["contrast"] == "refused":
            notes = (
                f"{self.name}: the model treats all fit prompts alike, so its refusal vector is the difference "
                "of harmful and harmless prompts.",
            )
        blocks = block_range(self.options["blocks"], len(find_blocks(chat.decoder)))
        states = last_states(chat, prompts, blocks, "input")
        readers = []
        for h in states:
            malicious = h[groups.toxic]
            projector = null_projector(h[kept], self.options["null_share"])
            size = float((malicious.double() @ projector).pow(2).sum())
            readers.append(solve_reader(malicious, projector, self.options["regulariser"] * size))
        refusals = difference_of_means(states, towards, away)
        gain = at_each(self.options[STRENGTH], PAPER_BLOCKS, len(blocks))
        return AlphaSteering(blocks, prompt_suffix(chat.template), torch.stack(readers), refusals, gain, notes=notes)

    def variants(self) -> list[dict[str, Any]]:
        return [
            {"contrast": "harmful"},
            {"null_share": 0.4},
            {"contrast": "harmful", "null_share": 0.4},
            {"regulariser": 1e-1},
        ]


class AlphaSteerPlus(AlphaSteer):
    name = "alphasteer+"
    paper = "variant of AlphaSteer (arXiv 2506.07022) in LLM-VA, arXiv 2601.19487"
    only_answered = True
