"""What all judges that ask a model share: answers that need no question, answers judged before, and the cache."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmva.errors import LlmvaError
from llmva.judges.base import Judge, Judgement, Label
from llmva.judges.model_based.cache import Cache, content_key
from llmva.judges.phrases import PhraseJudge
from llmva.judges.text import visible
from llmva.prompts.types import Prompt
from llmva.servers.client import Interrupted

VERSION = 1  # raise it with every change to the code of guards that can change a label; templates are hashed


@dataclass(frozen=True)
class Question:
    """An answer that a model is to be asked about."""

    key: str
    prompt: Prompt
    answer: str  # without thinking


Keep = Callable[[Question, Judgement], None]


class AskingJudge(Judge):
    """A judge that asks a model, each different answer once.

    The rules of the phrase judge find garbled answers, and the model is not asked about them, so that "garbled" means
    the same for every judge. Thinking blocks are cut out first.

    Args:
        title: a short name. The judge's `name` is the title with a hash of `parts`: everything that a label depends on.
        cache: from the judge's name to the cache of its judgements; None keeps them as long as the judge lives.
        knows_refusals: False for a model that recognises harmful text but not refusals. Then `stand_in` judges the
            answers to benign prompts; without one they are unjudged.
    """

    def __init__(
        self,
        title: str,
        parts: Sequence[Any],
        *,
        cache: Callable[[str], Cache] | None,
        knows_refusals: bool = True,
        stand_in: Judge | None = None,
    ) -> None:
        self._phrases = PhraseJudge()
        self._stand_in = None if knows_refusals else stand_in
        self._knows_refusals = knows_refusals
        names = [self._phrases.name, self._stand_in.name if self._stand_in else None]
        digest = hashlib.sha256(json.dumps([VERSION, names, *parts]).encode()).hexdigest()
        self.title = title
        self.name = f"{title}-{VERSION}-{digest[:8]}"
        self._cache = cache(self.name) if cache else None
        self._known: dict[str, Judgement] = {}

    @abstractmethod
    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask about every question and call `keep` as soon as one is judged. Raises Interrupted if it cannot go on."""

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return self.answered_all([prompt], [answer])[0]

    def answered_all(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Judgement]:
        """Judge many. Raises LlmvaError, which says what is judged and kept, if the model stops answering."""
        judgements: list[Judgement | None] = []  # None where the model is to be asked
        keys: list[str] = []
        questions: dict[str, Question] = {}
        for prompt, answer in zip(prompts, answers, strict=True):
            key, text = content_key(self.name, prompt, answer), visible(answer)
            judgement = self._unasked(prompt, text) or self._known.get(key)
            if judgement is None and self._cache is not None:
                judgement = self._cache.get(key)
            if judgement is None:
                questions.setdefault(key, Question(key, prompt, text))
            judgements.append(judgement)
            keys.append(key)
        failed: dict[str, Judgement] = {}
        if questions:
            known = sum(judgement is not None for judgement in judgements)
            self._ask(list(questions.values()), failed, len(questions) + known)
        return [
            judgement or self._known.get(key) or failed[key] for judgement, key in zip(judgements, keys, strict=True)
        ]

    def _ask(self, questions: list[Question], failed: dict[str, Judgement], total: int) -> None:
        def keep(question: Question, judgement: Judgement) -> None:
            if judgement.label is Label.UNJUDGED:  # not kept, since the next run may succeed
                failed[question.key] = judgement
                return
            if self._cache is not None:
                self._cache.put(question.key, judgement)
            self._known[question.key] = judgement

        try:
            self.ask(questions, keep)
        except Interrupted as stopped:
            left = sum(question.key not in self._known for question in questions)
            kept = "kept" if self._cache is not None else "lost, as there is no cache"
            raise LlmvaError(
                f"The judge {stopped.reason}: {total - left} answers are judged and {kept}, {left} are not; "
                f"{stopped.mend}, and the same command goes on from there."
            ) from stopped
        finally:
            if self._cache is not None:
                self._cache.close()

    def _unasked(self, prompt: Prompt, text: str) -> Judgement | None:
        """The judgement of what no model is asked about, or None."""
        by_phrases = self._phrases.answered(prompt, text)
        if by_phrases.label is Label.GARBLED:
            return by_phrases
        if self._knows_refusals or not prompt.benign:
            return None
        if self._stand_in is None:
            return Judgement(Label.UNJUDGED, 0.0, f"{self.title} does not tell refusals of benign prompts")
        judgement = self._stand_in.answered(prompt, text)
        return replace(judgement, reason=f"{self._stand_in.name}: {judgement.reason}")
