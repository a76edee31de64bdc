"""Step 1: the model answers, the judge labels the answers, and captures keep the outputs of the sublayers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmva.judges.base import Judge, Judgement, Label
from llmva.models.chat_model import ChatModel
from llmva.models.generate import Capture
from llmva.models.reading.sampling import Sampling
from llmva.models.thinking import Thinking, answer_after_thoughts
from llmva.prompts.types import Asked, Prompt

ENOUGH, SAME = 5, 0.9  # answers to each side, and the share of them that may not be one text


@dataclass(frozen=True)
class Observation:
    """n prompts, their judged answers, and the captures at the last prompt tokens."""

    prompts: list[Prompt]
    judgements: list[Judgement]
    capture: Capture

    @property
    def labels(self) -> list[Label]:
        return [judgement.label for judgement in self.judgements]

    @property
    def signs(self) -> Tensor:
        """int8 [2, n]: answered (+1) or not (-1), benign (+1) or toxic (-1). Garbled counts as not answered.

        Raises ValueError if there are unjudged answers: take `judged()` first.
        """
        if self.unjudged:
            raise ValueError(f"{self.unjudged} answers are unjudged and have no sign: take judged() first")
        answered = [1 if label is Label.ANSWERED else -1 for label in self.labels]
        benign = [1 if prompt.benign else -1 for prompt in self.prompts]
        return torch.tensor([answered, benign], dtype=torch.int8)

    @property
    def thoughts(self) -> int:
        """How many answers came after thoughts."""
        return sum(bool(thought) for thought in self.capture.thoughts or ())

    @property
    def unclosed(self) -> int:
        """How many answers came after thoughts that the model never closed."""
        return sum(self.capture.unclosed or ())

    @property
    def unjudged(self) -> int:
        """How many answers the judge could not label."""
        return sum(label is Label.UNJUDGED for label in self.labels)

    def judged(self) -> Observation:
        """The rows that the judge could label, in order: vectors are fitted on these."""
        if not self.unjudged:
            return self
        kept = [i for i, label in enumerate(self.labels) if label is not Label.UNJUDGED]
        return self.at(kept, self.capture.tokens)

    def at(self, kept: list[int], tokens: int = 0) -> Observation:
        """Some of the prompts, in the order given; `tokens` is what their capture says was generated."""
        cut = self.capture.rows(kept, tokens)
        return Observation([self.prompts[i] for i in kept], [self.judgements[i] for i in kept], cut)

    def part(self, start: int, end: int) -> Observation:
        """The prompts from `start` up to `end`."""
        rows = slice(start, end)
        return Observation(self.prompts[rows], self.judgements[rows], self.capture.rows(rows))


def observe(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    max_new_tokens: int,
    thinking: Thinking | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
    captures: bool = True,
    sampling: Sampling | None = None,
) -> Observation:
    """Answer, capture and judge `prompts` with the current model.

    With `thinking` on, the model thinks first, and captures are read at the end of its thoughts; None is off. The
    judge sees no thoughts in any case. `captures` is False if only labels are needed. `sampling` draws
    answers; None takes the most likely tokens.
    """
    texts = [prompt.asked for prompt in prompts]
    captured = answer_after_thoughts(
        chat,
        texts,
        max_new_tokens=max_new_tokens,
        thinking=thinking or Thinking(),
        settled=judge.settled,
        on_progress=on_progress,
        captures=captures,
        sampling=sampling,
    )
    return Observation(list(prompts), judge.answered_all(prompts, captured.answers), captured)


def same_answer(prompts: Sequence[Prompt], labels: Sequence[Label | str], answers: Sequence[str]) -> list[str]:
    """A sentence, as a list of one, where nearly all that counts as answered is one text, to prompts of both sides.

    A model that says the same to everything answers nothing, and a judge that looks for refusals cannot tell.
    """
    sides: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for prompt, label, answer in zip(prompts, labels, answers, strict=True):
        if Label(label) is Label.ANSWERED:
            sides[prompt.benign][answer.strip()] += 1
    if min(side.total() for side in sides.values()) < ENOUGH:
        return []
    text = sides[True].most_common(1)[0][0]
    if any(side[text] < SAME * side.total() for side in sides.values()):
        return []
    times, total = sum(side[text] for side in sides.values()), sum(side.total() for side in sides.values())
    return [
        f"{times} of {total} answers that count as such are one and the same text, to harmful and benign prompts "
        "alike: the model may answer nothing, and then no rate means anything."
    ]


def missing_class(train: Observation) -> str | None:
    """Why no answer vector can be fitted, or None."""
    signs = train.signs[0]
    if bool((signs == 1).all()):
        return "every training prompt was answered, so there is no refusal to learn from"
    if bool((signs == -1).all()):
        return "no training prompt was answered, so there is no answer to learn from"
    return None


def harmless_answers(
    prompts: Sequence[Prompt], labels: Sequence[Label | str], answers: Sequence[str]
) -> list[tuple[Asked, str]]:
    """(prompt, answer) for each benign prompt that was answered."""
    return [
        (prompt.asked, answer)
        for prompt, label, answer in zip(prompts, labels, answers, strict=True)
        if prompt.benign and Label(label) is Label.ANSWERED
    ]
