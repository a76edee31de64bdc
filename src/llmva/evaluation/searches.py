"""The searches of an evaluation: what each is told, and what all of them found of one model after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmva.evaluation.adaptive import Outcome, SearchPlan, search_forms
from llmva.evaluation.sampled import SUFFIX, TRANSFORMS, EvaluationSettings
from llmva.evaluation.suffixes import SuffixPlan, about, check_suffixes, compare_halves, search_suffixes
from llmva.judges.base import Judge
from llmva.method.observe import Observation
from llmva.models.chat_model import ChatModel
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.types import Prompt

FIELDS = {TRANSFORMS: "adaptive", SUFFIX: "suffix"}  # of a record


class Searches:
    """Runs the searches that the settings name. `fallen` are the prompts that fell with the last model."""

    def __init__(
        self, chat: ChatModel, prompts: Sequence[Prompt], judge: Judge, settings: EvaluationSettings, thinking: Thinking
    ) -> None:
        """Raises UsageError for a model that cannot be searched."""
        self.chat, self.prompts, self.judge, self.settings = chat, prompts, judge, settings
        plan = SearchPlan(settings.adaptive or 0, settings.seed, settings.max_new_tokens, thinking)
        self.plan, self.suffix_plan = plan, SuffixPlan(plan, settings.suffix_tokens, settings.candidates)
        self.fallen: list[Prompt] = []
        self.seen: list[Observation] = []
        self._outcomes: dict[str, dict[str, Outcome]] = {kind: {} for kind in settings.searches}
        if SUFFIX in settings.searches:
            check_suffixes(chat, prompts, self.suffix_plan)

    def run(self, name: str, label: str, progress: Progress) -> None:
        """Search the model as it is now, which the record calls `name` and the display `label`."""
        toxic = sum(not prompt.benign for prompt in self.prompts)
        self.fallen.clear()
        for kind, outcomes in self._outcomes.items():
            tries = self.plan.budget + (kind == SUFFIX)  # the plain prompt is a try, and no step
            shown = progress.stage(f"searching {kind}, {label}", tries * toxic)
            outcomes[name] = self._search(kind, shown)
            self.fallen += outcomes[name].fallen
            self.seen += outcomes[name].seen

    def _search(self, kind: str, shown: Callable[[int], None]) -> Outcome:
        if kind == SUFFIX:
            return search_suffixes(self.chat, self.prompts, self.judge, self.suffix_plan, shown)
        return search_forms(self.chat, self.prompts, self.judge, self.plan, shown)

    def record(self) -> dict[str, Any]:
        """A field for each kind of search, with what it found of each model."""
        fields: dict[str, Any] = {}
        for kind, outcomes in self._outcomes.items():
            known = about(self.suffix_plan) if kind == SUFFIX else {"budget": self.plan.budget}
            fields[FIELDS[kind]] = known | {name: outcome.record for name, outcome in outcomes.items()}
            if kind == SUFFIX and len(outcomes) == 2:
                fields[FIELDS[kind]] |= compare_halves(outcomes["before"], outcomes["after"], self.plan.budget)
        return fields
