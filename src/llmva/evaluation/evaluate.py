"""Measure a model on given prompts, without and with an edit, with the fields of a run's test rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.attacks.base import Attack
from llmva.edit import Edit
from llmva.evaluation.attacked import attacked_prompts, worst_case
from llmva.evaluation.utility import measure_utility
from llmva.judges.base import Judge
from llmva.method.observe import Observation, harmless_answers, observe, same_answer
from llmva.metrics.rates import summarise
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.progress import Progress
from llmva.prompts.types import Prompt
from llmva.runs.environment import peak_bytes
from llmva.runs.limits import Tally, limits_of, notes_on_prompts, prove_model
from llmva.settings import check_seed


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are made; the fields have the meaning that they have in `llmva.settings.Settings`."""

    seed: int = 42
    max_new_tokens: int = 128
    endings_tokens: int = 256  # maximum length of answers checked for loops and broken endings; 0 checks none
    thinking: str = "off"
    thinking_tokens: int = 512


def evaluate(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    judge: Judge,
    settings: EvaluationSettings | None = None,
    *,
    edit: Edit | None = None,
    parts: Mapping[str, tuple[int, int]] | None = None,
    attacks: Sequence[Attack] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """ASR, ORR and F1 on exactly `prompts`: `{"test": {"before": ..., "after": ...}, "utility": ..., "cost": ...}`.

    "after" and "utility" exist only with an edit. `parts` names ranges of prompts (start, end); their rates are
    returned in "parts". With `attacks`, all prompts are asked under each of them too: "attacks" has their rates, and
    "worst_case" those of each prompt asked in the worst way. "limits" are sentences that a reader of the figures must
    know.

    Raises:
        UsageError: an edit of another model, or an attack that makes a prompt too long.
    """
    started = time.monotonic()
    settings, progress = settings or EvaluationSettings(), progress or Progress()
    seed = check_seed(settings.seed)
    if edit is not None:
        edit.apply(chat.model).remove()  # raises for an edit of another model before any answer is generated
    asked = [prompt.asked for prompt in prompts]
    told = notes_on_prompts(chat, prompts)
    for note in told:
        progress.note(note)
    thinking = prove_model(chat, settings.thinking, settings.thinking_tokens, asked, progress)

    asked_under = attacked_prompts(chat, prompts, attacks, settings.max_new_tokens, thinking)
    others: list[Observation] = []

    def answers(label: str, asked: Sequence[Prompt] = prompts) -> Observation:
        return observe(
            chat,
            asked,
            judge,
            max_new_tokens=settings.max_new_tokens,
            thinking=thinking,
            on_progress=progress.stage(f"answering, {label}", len(asked)),
            captures=False,
        )

    def add_rates(name: str, seen: Observation) -> None:
        told.extend(same_answer(seen.prompts, seen.labels, seen.capture.answers))
        record["test"][name] = summarise(seen.prompts, seen.labels, seed=seed)
        for part, (start, end) in (parts or {}).items():
            of_part = summarise(seen.prompts[start:end], seen.labels[start:end], seed=seed)
            record.setdefault("parts", {}).setdefault(part, {})[name] = of_part

    def add_attacks(name: str, label: str, plain: Observation) -> None:
        rates: dict[str, dict[str, Any]] = {}
        labels = [plain.labels]
        for attack, variants in asked_under.items():
            under = answers(f"{label}, {attack}", variants)
            told.extend(f"Under {attack}: {one}" for one in same_answer(prompts, under.labels, under.capture.answers))
            labels.append(under.labels)
            rates[attack] = summarise(prompts, under.labels, seed=seed)
            others.append(under)
        for entry in record.get("attacks", ()):
            entry[name] = rates[entry["name"]]
        if rates:
            record["worst_case"][name] = worst_case(prompts, labels, rates, seed)

    record: dict[str, Any] = {"test": {}}
    if attacks:
        record["attacks"] = [{"name": one.name, "about": one.about, "source": one.source} for one in attacks]
        record["worst_case"] = {}
    with at_rest(chat.model):
        before = answers("original")
        add_rates("before", before)
        add_attacks("before", "original", before)
        tokens, seen = before.capture.tokens, [before]
        if edit is not None:
            with edit.apply(chat.model, check=False):
                after = answers("edited")
                add_attacks("after", "edited", after)
            tokens += after.capture.tokens
            seen.append(after)
            add_rates("after", after)
            texts = harmless_answers(before.prompts, before.labels, before.capture.answers)
            if texts:
                record["utility"], more = measure_utility(
                    chat,
                    edit,
                    texts,
                    endings_tokens=settings.endings_tokens,
                    seed=seed,
                    progress=progress,
                    thinking=thinking.off,
                )
                tokens += more
    tokens += sum(one.capture.tokens for one in others)
    record["limits"] = [*limits_of(chat, (), thinking, Tally.of_seen(*seen, *others)), *told]
    record["cost"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak_bytes(),
        "generated_tokens": tokens,
    }
    return record
