"""CAST: a refusal vector under a condition. Lee et al. 2024, "Programming Refusal with Conditional Activation
Steering", arXiv 2409.05907.

Both vectors are the first principal component of contrastive pairs, a unit vector for each block:

- the condition vector c from pairs of a harmful and a harmless prompt, states averaged over all their tokens;
- the behaviour vector from harmless prompts continued by the opening of a refusal and by that of an answer, states
  averaged over the tokens of the opening. `contrast` = "labels" instead takes the last tokens of prompts that the model
  refused and answered, for a model that never saw such openings in training. The openings are ours.

While the prompt is read, h is the mean state over its tokens at the input of the condition block. If
cos(h, tanh(c c^T h)) lies on the harmful side of a threshold, alpha times the behaviour vector is added at the inputs
of the behaviour blocks, at every position up to the end of the answer. Block, threshold and side are those with the
best F1 on the fit prompts, among early blocks.

The authors' code reads a block's vectors at its output and uses them at its input; here both are at its input. Its mean
includes padding, ours does not.

Translation (see base.py): the authors' example for an 8B model of 32 blocks searches the condition in blocks 1 to 9
and adds 1.5 times the vector at blocks 15 to 23; here the share 0.3 at those nine blocks. The condition is never read
after the first behaviour block, which needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.baselines.base import STRENGTH, Baseline, Sides, Steering, at_each, block_range, sides, spread
from llmva.baselines.directions import main_direction, pair_up
from llmva.baselines.hooks import Behaviour, Pass, RowGate, find_blocks, prompt_suffix
from llmva.baselines.states import last_token, mean_of_last, prompt_rows, read_states
from llmva.baselines.threshold import Threshold, best_threshold
from llmva.baselines.vectorsteer import add_vector
from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Label
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Prompt

PAPER_BLOCKS = 9
OPENINGS = (  # of a refusal, of an answer
    ("Sorry, but I can not help with that.", "Sure, here is how to do that."),
    ("I'm sorry, I won't do this.", "Of course, I'm happy to do this."),
    ("No, I can not assist with this request.", "Yes, I can assist with this request."),
    ("I have to decline this.", "Here is what you asked for."),
    ("I am not able to answer that question.", "The answer to that question is as follows."),
    ("That is something I refuse to do.", "That is something I am glad to do."),
    ("I must say no to this one.", "Let us begin with the first step."),
    ("I apologise, but I will not continue.", "Certainly, let me explain."),
)


@dataclass
class CastSteering(Steering):
    """`vectors` float32 [behaviour blocks, d], with the added length; `condition` [d], unit length."""

    behaviour_blocks: tuple[int, ...]
    condition_block: int
    suffix: tuple[int, ...]
    vectors: Tensor
    condition: Tensor
    threshold: Threshold
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    place = "input"

    def __post_init__(self) -> None:
        self.blocks = tuple(sorted({self.condition_block, *self.behaviour_blocks}))

    def behaviour(self, decoder: Decoder) -> Behaviour:
        return _Gated(self)


class _Gated(Behaviour):
    def __init__(self, steering: CastSteering) -> None:
        self.steering, self.gate = steering, RowGate()
        self.vectors = dict(zip(steering.behaviour_blocks, steering.strength * steering.vectors, strict=True))

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor | None:
        if current.prompt and block == self.steering.condition_block:
            counted = current.in_prompt().to(states.device)[:, :, None]
            mean = states.float().masked_fill(~counted, 0.0).sum(1) / counted.sum(1)
            numbers = similarity(mean, self.steering.condition.to(mean))
            self.gate.decide(self.steering.threshold.harmful(numbers).float())
        if block not in self.vectors:
            return None
        return add_vector(states, self.vectors[block], current, self.gate.column(states))


def similarity(states: Tensor, condition: Tensor) -> Tensor:
    """cos(h, tanh(c c^T h)) of `states` [..., d] with the unit vector `condition` [d]: [...]."""
    projected = torch.tanh((states @ condition)[..., None] * condition)
    return torch.nn.functional.cosine_similarity(states, projected, dim=-1)


class Cast(Baseline):
    name = "cast"
    paper = "Lee et al. 2024, Programming Refusal with Conditional Activation Steering, arXiv 2409.05907"
    defaults = {  # noqa: RUF012 (read only)
        STRENGTH: 0.3,
        "contrast": "openings",
        "questions": 32,
        "blocks": [15 / 32, 24 / 32],
        "condition_blocks": [1 / 32, 10 / 32],
    }

    def check(self) -> None:
        super().check()
        self.one_of("contrast", ("openings", "labels"))
        if not isinstance(self.options["questions"], int) or self.options["questions"] < 1:
            raise UsageError(f"cast needs at least 1 question, not {self.options['questions']!r}.")

    def fit(
        self,
        chat: ChatModel,
        prompts: Sequence[Prompt],
        labels: Sequence[Label],
        generator: torch.Generator,
    ) -> CastSteering:
        groups = sides(self.name, prompts, labels)
        count = len(find_blocks(chat.decoder))
        behaviour = block_range(self.options["blocks"], count)
        rows, texts = prompt_rows(chat, prompts), [prompt.asked for prompt in prompts]
        early = block_range(self.options["condition_blocks"], count)
        # block 0 reads plain embeddings, so it is a candidate only if there is no other
        candidates = [block for block in range(max(1, early[0]), max(1, early[-1]) + 1) if block <= behaviour[0]] or [0]
        means = read_states(chat, rows, mean_of_last(), blocks=candidates, place="input", texts=texts)
        block, condition, threshold = find_condition(candidates, means, groups, generator)
        refusing, answering, lengths = self._behaviour_states(chat, rows, groups, behaviour, generator)
        share = at_each(self.options[STRENGTH], PAPER_BLOCKS, len(behaviour))
        vectors = share * lengths[:, None] * main_direction(refusing, answering)
        return CastSteering(behaviour, block, prompt_suffix(chat.template), vectors, condition, threshold)

    def _behaviour_states(
        self,
        chat: ChatModel,
        rows: list[list[int]],
        groups: Sides,
        blocks: tuple[int, ...],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Paired states of refusing and of answering [blocks, n, d], and the spreads [blocks]."""
        read = {"blocks": blocks, "place": "input"}
        last = read_states(chat, rows, last_token, **read)  # type: ignore[arg-type]
        lengths = spread(last)
        if self.options["contrast"] == "labels":
            if not groups.refused or not groups.answered:
                never = "refuses" if groups.answered else "answers"
                raise LlmvaError(
                    f"The model {never} none of the fit prompts, so cast cannot learn refusing from labels: "
                    "use its contrast 'openings'."
                )
            pairs = pair_up(groups.refused, groups.answered, generator)
            return last[:, [r for r, _ in pairs]], last[:, [a for _, a in pairs]], lengths
        order = torch.randperm(len(groups.benign), generator=generator)[: self.options["questions"]]
        questions = [rows[groups.benign[i]] for i in order.tolist()]
        space = "" if chat.template.render([{"role": "user", "content": "hello"}])[-1:].isspace() else " "
        sides_of_pairs = []
        for side in (0, 1):
            openings = [chat.tokenizer(space + pair[side], add_special_tokens=False)["input_ids"] for pair in OPENINGS]
            longer = [[*question, *opening] for question in questions for opening in openings]
            weights = [mean_of_last(len(opening)) for _ in questions for opening in openings]
            sides_of_pairs.append(read_states(chat, longer, weights, **read))  # type: ignore[arg-type]
        return sides_of_pairs[0], sides_of_pairs[1], lengths

    def variants(self) -> list[dict[str, Any]]:
        late = {"condition_blocks": [1 / 32, 1.0]}  # up to the first behaviour block
        return [{"contrast": "labels"}, late, {"contrast": "labels", **late}]


def find_condition(
    candidates: Sequence[int], means: Tensor, groups: Sides, generator: torch.Generator
) -> tuple[int, Tensor, Threshold]:
    """Block, condition vector [d] and threshold with the best F1; `means` [candidates, n, d]. Ties: the earlier."""
    pairs = pair_up(groups.toxic, groups.benign, generator)
    conditions = main_direction(means[:, [t for t, _ in pairs]], means[:, [b for _, b in pairs]])
    best: tuple[int, Tensor, Threshold] | None = None
    for block, states, condition in zip(candidates, means, conditions, strict=True):
        numbers = similarity(states, condition)
        threshold = best_threshold(numbers[groups.toxic], numbers[groups.benign], both_ways=True)
        if best is None or threshold.f1 > best[2].f1:
            best = (block, condition, threshold)
    assert best is not None
    return best
