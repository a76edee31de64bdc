"""Measure a model on given prompts, without and with an edit, with the fields of a run's test rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmva.attacks.base import Attack
from llmva.edit import Edit
from llmva.evaluation.attacked import attacked_prompts, failed_prompts, worst_case
from llmva.evaluation.sampled import EvaluationSettings, check_sampling, check_search, draws
from llmva.evaluation.searches import Searches
from llmva.evaluation.utility import measure_utility
from llmva.judges.base import Judge, Label, ToTheEnd
from llmva.method.observe import Observation, harmless_answers, observe, same_answer
from llmva.metrics.rates import summarise
from llmva.metrics.samples import summarise_samples
from llmva.metrics.truth import summarise_truth
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.progress import Progress
from llmva.prompts.store import prompt_row
from llmva.prompts.types import Prompt
from llmva.runs.environment import peak_bytes
from llmva.runs.limits import Tally, limits_of, notes_on_prompts, prove_model
from llmva.settings import check_seed


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
    "worst_case" those of each prompt asked in the worst way. "failed" are the prompts, in the form asked, that failed
    with the edit, without one if there is none. "adaptive" is what the search over transforms found and "suffix" that
    over suffixes, where `settings.adaptive` has a budget. "limits" are sentences that a reader must know.

    Raises:
        UsageError: an edit of another model, an attack that makes a prompt too long, a model whose suffixes cannot be
            searched, or settings of samples or of a search that are none.
    """
    started = time.monotonic()
    settings, progress = settings or EvaluationSettings(), progress or Progress()
    seed = check_seed(settings.seed)
    check_sampling(settings, by_engine=chat.engine is not None)
    check_search(settings)
    if edit is not None:
        edit.apply(chat.model).remove()  # raises for an edit of another model before any answer is generated
    asked = [prompt.asked for prompt in prompts]
    told = notes_on_prompts(chat, prompts)
    for note in told:
        progress.note(note)
    thinking = prove_model(chat, settings.thinking, settings.thinking_tokens, asked, progress)
    asked_under = attacked_prompts(chat, prompts, attacks, settings.max_new_tokens, thinking)
    compares = settings.samples is None and any(prompt.gold for prompt in prompts)  # what `truth_of` reads
    searches = Searches(chat, prompts, judge, settings, thinking)
    others: list[Observation] = []
    by_form: list[tuple[Sequence[Prompt], list[list[Label]]]] = []  # of the last model
    of_endings = 0

    def answers(label: str, asked: Sequence[Prompt] = prompts) -> list[Observation]:
        on_progress = progress.stage(f"answering, {label}", len(asked) * (settings.samples or 1))
        return [
            observe(
                chat,
                asked,
                ToTheEnd(judge) if compares and asked is prompts else judge,
                max_new_tokens=settings.max_new_tokens,
                thinking=thinking,
                on_progress=on_progress,
                captures=False,
                sampling=sampling,
            )
            for sampling in draws(settings, asked)
        ]

    def rates_of(seen: Sequence[Observation], start: int = 0, end: int | None = None) -> dict[str, Any]:
        labels = [one.labels[start:end] for one in seen]
        if settings.samples is None:
            return summarise(prompts[start:end], labels[0], seed=seed)
        return summarise_samples(prompts[start:end], labels, seed=seed)

    def truth_of(seen: Sequence[Observation], start: int = 0, end: int | None = None) -> dict[str, Any]:
        """Of greedy answers; of drawn ones nothing is said."""
        if settings.samples is not None:
            return {}
        now, first = ((one.labels[start:end], one.capture.answers[start:end]) for one in (seen[0], before[0]))
        return summarise_truth(prompts[start:end], *now, None if seen is before else first)

    def add_rates(name: str, seen: Sequence[Observation]) -> None:
        told.extend(same_answer(prompts, seen[0].labels, seen[0].capture.answers))
        record["test"][name] = rates_of(seen) | truth_of(seen)
        for part, (start, end) in (parts or {}).items():
            record.setdefault("parts", {}).setdefault(part, {})[name] = rates_of(seen, start, end) | truth_of(
                seen, start, end
            )

    def add_attacks(name: str, label: str, plain: Sequence[Observation]) -> None:
        rates: dict[str, dict[str, Any]] = {}
        labels = [one.labels for one in plain]
        by_form[:] = [(prompts, labels[:])]
        for attack, variants in asked_under.items():
            under = answers(f"{label}, {attack}", variants)
            same = same_answer(prompts, under[0].labels, under[0].capture.answers)
            told.extend(f"Under {attack}: {sentence}" for sentence in same)
            labels += [one.labels for one in under]
            by_form.append((variants, [one.labels for one in under]))
            rates[attack] = rates_of(under)
            others.extend(under)
        for entry in record.get("attacks", ()):
            entry[name] = rates[entry["name"]]
        if rates:
            record["worst_case"][name] = worst_case(prompts, labels, rates, seed)

    record: dict[str, Any] = {"test": {}}
    if attacks:
        record["attacks"] = [{"name": one.name, "about": one.about, "source": one.source} for one in attacks]
        record["worst_case"] = {}
    if settings.samples is not None:
        record["sampling"] = {name: getattr(settings, name) for name in ("samples", "temperature", "top_p")}
    with at_rest(chat.model):
        before = answers("original")
        add_rates("before", before)
        add_attacks("before", "original", before)
        searches.run("before", "original", progress)
        seen = [*before]
        if edit is not None:
            with edit.apply(chat.model, check=False):
                after = answers("edited")
                add_attacks("after", "edited", after)
                searches.run("after", "edited", progress)
            seen += after
            add_rates("after", after)
            texts = harmless_answers(prompts, before[0].labels, before[0].capture.answers)
            if texts:
                record["utility"], of_endings = measure_utility(
                    chat,
                    edit,
                    texts,
                    endings_tokens=settings.endings_tokens,
                    seed=seed,
                    progress=progress,
                    thinking=thinking.off,
                )
    failed = dict.fromkeys((*failed_prompts(by_form), *searches.fallen))  # a form may have failed in both
    record |= searches.record()
    record["failed"] = [prompt_row(prompt) for prompt in failed]
    record["limits"] = [*limits_of(chat, (), thinking, Tally.of_seen(*seen, *others, *searches.seen)), *told]
    record["cost"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak_bytes(),
        "generated_tokens": of_endings + sum(one.capture.tokens for one in (*seen, *others, *searches.seen)),
    }
    return record
