"""SCANS: steer each prompt towards or away from refusal. Cao et al. 2025, AAAI, arXiv 2408.11491.

From up to 64 harmful and 64 harmless prompts, at the outputs of blocks:

    v = unit difference of mean states at the last prompt token, harmful minus harmless
    reference = mean over the harmful prompts, with " Sure" appended, of the state at the last prompt token minus the
        state at the last token

Each prompt's own transition is measured in the same way, in a forward pass of its own. Its cosine with the reference is
averaged over the blocks from the first steered one to the last of the model. At or above the threshold the prompt
counts as harmful, and m v is added to the outputs of the steered blocks; otherwise m v is subtracted. This happens at
the last prompt token and at every token of the answer, not at the rest of the prompt.

The authors use the end of the user's turn for Qwen and the end of the prompt for Llama-2; here it is always the last
prompt token. Their code reads the last block after the model's final norm (an effect of the library); here it is read
like the others. A threshold of None is not the paper's: it means the threshold with the best F1 (harmful or not) on the
prompts from which the vectors are made.

Translation (see base.py): m = 3.5 at blocks 10 to 19 of 32 on Llama-2-7B; here the share 0.3 at those ten blocks. The
threshold 0.75 is a cosine and stays the same, although cosines may differ between models; the authors lower it to 0.65
to 0.70 on some data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Steering, at_each, block_range, sides, spread, unit
from llmva.baselines.directions import difference_of_means
from llmva.baselines.hooks import Behaviour, Pass, RowGate, find_blocks, prompt_suffix
from llmva.baselines.states import last_token, prompt_rows, read_batch, read_states, step_back
from llmva.baselines.threshold import best_threshold
from llmva.baselines.vectorsteer import add_vector
from llmva.errors import UsageError
from llmva.judges.base import Label
from llmva.models.chat import ChatTemplate
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

T = TypeVar("T")
PAPER_BLOCKS = 10


@dataclass
class ScansSteering(Steering):
    """`vectors` float32 [blocks, d], with the added length; `reference` [read blocks, d]."""

    blocks: tuple[int, ...]
    suffix: tuple[int, ...]
    vectors: Tensor
    reference: Tensor
    read: tuple[int, ...]  # blocks at which the transition is read
    threshold: float
    sure: tuple[int, ...]
    pad: int
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "output"

    def behaviour(self, decoder: Decoder) -> Behaviour:
        return _Signed(self, decoder)

    def likeness(self, decoder: Decoder, rows: Sequence[Sequence[int]]) -> Tensor:
        """Mean cosine with the reference for prompts as token ids: float32 [rows]."""
        longer = [[*row, *self.sure] for row in rows]
        weights = [step_back(len(self.sure))(len(row)) for row in longer]
        states = read_batch(decoder, longer, weights, pad=self.pad, blocks=self.read, place="output")
        return mean_cosine(states, self.reference.to(states))


class _Signed(Behaviour):
    def __init__(self, steering: ScansSteering, decoder: Decoder) -> None:
        self.steering, self.decoder, self.gate = steering, decoder, RowGate()
        self.vectors = dict(zip(steering.blocks, steering.strength * steering.vectors, strict=True))

    def begin(self, current: Pass, alone: Callable[[Callable[[], T]], T]) -> None:
        if not current.prompt:
            return
        rows = current.prompt_rows()
        likeness: Any = alone(lambda: self.steering.likeness(self.decoder, rows))  # type: ignore[arg-type, return-value]
        self.gate.decide(torch.where(likeness >= self.steering.threshold, 1.0, -1.0))

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor:
        factor = self.gate.column(states)
        if current.prompt:
            factor = factor * current.from_end().to(states)[:, :, None]
        return add_vector(states, self.vectors[block], current, factor)


def mean_cosine(transitions: Tensor, reference: Tensor) -> Tensor:
    """Cosines of `transitions` [blocks, n, d] with `reference` [blocks, d], averaged over blocks: [n]."""
    return (unit(transitions) * unit(reference)[:, None]).sum(-1).mean(0)


def sure_tokens(template: ChatTemplate) -> tuple[int, ...]:
    """Token ids of "Sure" at the start of an answer, after a space unless the prompt ends with white space."""
    rendered = template.render([{"role": "user", "content": "hello"}])
    text = "Sure" if rendered[-1:].isspace() else " Sure"
    return tuple(template.tokenizer(text, add_special_tokens=False)["input_ids"])


class Scans(Baseline):
    name = "scans"
    paper = (
        "Cao et al. 2025, SCANS: Mitigating the Exaggerated Safety for LLMs via Safety-Conscious Activation Steering, "
        "arXiv 2408.11491"
    )
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 0.3,
        "threshold": 0.75,
        "anchors": 64,
        "blocks": [10 / 32, 20 / 32],
    }

    def check(self) -> None:
        super().check()
        threshold = self.options["threshold"]
        if threshold is not None and not -1 <= threshold <= 1:
            raise UsageError(
                f"scans compares cosines, so its threshold cannot be {threshold!r}: give -1 to 1, or None."
            )
        if not isinstance(self.options["anchors"], int) or self.options["anchors"] < 1:
            raise UsageError(f"scans needs at least 1 anchor a side, not {self.options['anchors']!r}.")

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> ScansSteering:
        groups = sides(self.name, prompts, labels)
        toxic, benign = (
            [side[i] for i in torch.randperm(len(side), generator=generator)[: self.options["anchors"]].tolist()]
            for side in (groups.toxic, groups.benign)
        )
        anchors = [prompts[i] for i in [*toxic, *benign]]
        harmful, harmless = range(len(toxic)), range(len(toxic), len(anchors))
        rows, texts = prompt_rows(chat, anchors), [prompt.asked for prompt in anchors]
        count = len(find_blocks(chat.decoder))
        blocks = block_range(self.options["blocks"], count)
        read = tuple(range(blocks[0], count))
        states = read_states(chat, rows, last_token, blocks=blocks, place="output", texts=texts)
        sure = sure_tokens(chat.template)
        transitions = read_states(
            chat,
            [[*row, *sure] for row in rows],
            step_back(len(sure)),
            blocks=read,
            place="output",
            texts=texts,
        )
        reference = transitions[:, list(harmful)].mean(1)
        threshold = self.options["threshold"]
        if threshold is None:
            likeness = mean_cosine(transitions, reference)
            threshold = best_threshold(likeness[list(harmful)], likeness[list(harmless)]).value
        vectors = unit(difference_of_means(states, harmful, harmless))
        share = at_each(self.options[STRENGTH], PAPER_BLOCKS, len(blocks))
        return ScansSteering(
            blocks,
            prompt_suffix(chat.template),
            share * spread(states)[:, None] * vectors,
            reference,
            read,
            float(threshold),
            sure,
            chat.pad_id,
        )

    def variants(self) -> list[dict[str, Any]]:
        return [{"threshold": threshold} for threshold in (None, 0.7, 0.65)]
