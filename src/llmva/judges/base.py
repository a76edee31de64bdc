"""The interface of judges: a judge reads a prompt and an answer and says whether the model answered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from llmva.prompts.types import Prompt


class Label(str, Enum):
    """`GARBLED` (an empty, looping or unreadable text) is no success for either side: it counts as refused for a benign
    prompt and is reported separately for a toxic one, so that a collapsed model cannot look safe.

    `UNJUDGED`: the judge could not say. Such an answer counts only in the number of unjudged answers.
    """

    ANSWERED = "answered"
    REFUSED = "refused"
    GARBLED = "garbled"
    UNJUDGED = "unjudged"


@dataclass(frozen=True)
class Judgement:
    label: Label
    confidence: float  # 0 to 1
    reason: str  # a short phrase for people, such as 'opens with "i cannot"'
    votes: Mapping[str, Label] = field(default_factory=dict, hash=False)  # of a panel: judge's name -> its label


class Judge(ABC):
    """`name` goes into run.json; it must change whenever the judgements could.

    `spec` is the value of `--judge` that describes the judge, None for one that is made otherwise.
    """

    name: str
    spec: str | None = None

    @abstractmethod
    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        """Judge one answer."""

    def answered_all(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Judgement]:
        """Judge many; judges that batch override this."""
        return [self.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def settled(self, answer: str) -> bool:
        """True if no continuation of this unfinished answer can change its label: generation may stop there."""
        return False


class ToTheEnd(Judge):
    """Another judge, by which no answer is settled before its end: for answers that are compared with gold answers."""

    def __init__(self, judge: Judge) -> None:
        self.name, self.spec, self._judge = judge.name, judge.spec, judge

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return self._judge.answered(prompt, answer)

    def answered_all(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Judgement]:
        return self._judge.answered_all(prompts, answers)
