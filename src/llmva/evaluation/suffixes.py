"""An attack that looks into the model: a greedy search over the tokens of a short suffix, prompt by prompt.

It is GCG (Zou et al. 2023, arXiv 2307.15043) with few steps: the gradient names tokens that make an affirmative opening
of the answer likelier, some of them are tried, and the best one stays. The loss guides the search; whether a prompt
fell is for the judge to say, who reads an answer whenever the suffix has changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmva.attacks.suffix import suffix_attack
from llmva.errors import UsageError
from llmva.evaluation.adaptive import Falls, Outcome, SearchPlan, shares_fallen
from llmva.judges.base import Judge, Label
from llmva.method.observe import Observation, observe
from llmva.models.chat_model import ChatModel
from llmva.models.reading.context import context_length
from llmva.models.suffix.loss import check_slopes, likely_tokens, losses, slopes
from llmva.models.suffix.place import OPENING, Place, find_place, suffix_text, usable_tokens
from llmva.prompts.types import Asked, Prompt

LIKELY = 64  # tokens for each place of the suffix, of which candidates are drawn
DRAWS = 200  # of a suffix to begin with, since not every one comes back from the tokenizer


@dataclass(frozen=True)
class SuffixPlan:
    """How the search is made; `plan.budget` is the number of steps."""

    plan: SearchPlan
    tokens: int
    candidates: int


@dataclass
class Attempt:
    """The search for one prompt: the suffix so far, and the draws of candidates."""

    prompt: Prompt
    place: Place
    suffix: list[int]
    generator: torch.Generator
    trace: list[float] = field(default_factory=list)  # the loss with which each step ended

    def form(self, chat: ChatModel) -> Prompt:
        """The prompt with the suffix, as it is asked."""
        return suffix_attack(suffix_text(chat, self.suffix)).apply(self.prompt)


@dataclass
class Spent:
    """What a search has cost beside the answers."""

    forward_tokens: int = 0  # read for losses and gradients
    gradient_steps: int = 0  # backward passes, counted by prompt


def begin(chat: ChatModel, prompt: Prompt, usable: Sequence[int], search: SuffixPlan) -> Attempt | None:
    """A search from a suffix that the seed and the prompt decide; None for a prompt that leaves no room for one.

    Raises UsageError where the tokenizer gives no drawn suffix back.
    """
    plan = search.plan
    digest = hashlib.sha256(f"{plan.seed}:{prompt.id}:suffix".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def ask(text: str) -> Asked:
        return suffix_attack(text).apply(prompt).asked

    for _ in range(DRAWS):
        drawn = [usable[i] for i in torch.randint(len(usable), (search.tokens,), generator=generator).tolist()]
        place = find_place(chat, ask, drawn)
        if place is not None and place.comes_back(chat, drawn):
            limit = context_length(chat.model)
            fits = limit is None or len(place.row(drawn)) + plan.max_new_tokens <= limit
            return Attempt(prompt, place, drawn, generator) if fits else None
    raise UsageError(
        f"The tokenizer gave none of {DRAWS} suffixes of {search.tokens} tokens back as they were: choose fewer "
        "--suffix-tokens, or --search transforms."
    )


def check_suffixes(chat: ChatModel, prompts: Sequence[Prompt], search: SuffixPlan) -> None:
    """Raises UsageError, before anything is answered, for a model whose suffixes cannot be searched."""
    if search.plan.thinking.any:
        raise UsageError(
            "The model thinks before it answers, so no suffix can aim at the opening of its answer: pass "
            "--thinking off to a model that obeys it, or --search transforms."
        )
    toxic = [prompt for prompt in prompts if not prompt.benign]
    usable = usable_tokens(chat)
    if not usable:
        raise UsageError("No token of this model's tokenizer is plain text: pass --search transforms.")
    attempts = [one for prompt in toxic if (one := begin(chat, prompt, usable, search)) is not None]
    if attempts:
        check_slopes(chat, attempts[0].place, attempts[0].suffix)


def search_suffixes(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    judge: Judge,
    search: SuffixPlan,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Outcome:
    """Ask each toxic prompt plainly, then after each step with its suffix, until the model answers or steps run out.

    The record: `n` toxic prompts that the judge could label at least once; `fallen`, the share that was answered, with
    `fallen_interval`; `half`, the number of steps at which half of them had been, 0 if they were as they stand, None if
    that was not reached; `by_step`, the share after 0, 1, ... steps; `censored`, how many did not fall; `drawn`, of
    those refused as they stand the share that is answered with the drawn suffix, which counts for no step, since the
    gradient has no part in it; `too_long`, how many of the toxic prompts leave no room for a suffix; `loss`, its mean
    before the first and after the last step of each prompt; `cost`.
    """
    toxic = [prompt for prompt in prompts if not prompt.benign]
    usable = usable_tokens(chat)
    attempts = [begin(chat, prompt, usable, search) for prompt in toxic]
    falls, spent = Falls(), Spent()

    def observed(forms: list[Prompt]) -> Observation:
        plan = search.plan
        return observe(chat, forms, judge, max_new_tokens=plan.max_new_tokens, thinking=plan.thinking, captures=False)

    def ask(step: int, asked: dict[int, Prompt]) -> None:
        falls.add(step, list(asked), observed(list(asked.values())))

    if toxic:
        ask(0, dict(enumerate(toxic)))
        on_progress(len(toxic))
    refused = [one.form(chat) for i, one in enumerate(attempts) if one is not None and i not in falls.fell_at]
    known: list[Label] = []
    if refused:
        falls.seen.append(observed(refused))
        known = [label for label in falls.seen[-1].labels if label is not Label.UNJUDGED]
    for step in range(1, search.plan.budget + 1):
        left = {i: one for i, one in enumerate(attempts) if one is not None and i not in falls.fell_at}
        if not left:
            break
        changed = improve(chat, list(left.values()), usable, search.candidates, spent)
        forms = {i: one.form(chat) for (i, one), new in zip(left.items(), changed, strict=True) if new}
        if forms:
            ask(step, forms)
        on_progress(len(left))
    record = shares_fallen(falls.fell_at, falls.judged, range(search.plan.budget + 1))
    record["by_step"] = record.pop("shares")
    record["censored"] = record["n"] - len(falls.fell_at)
    record["drawn"] = {"n": len(known), "fallen": known.count(Label.ANSWERED) / len(known) if known else None}
    record["too_long"] = attempts.count(None)
    traces = [one.trace for one in attempts if one is not None and one.trace]
    record["loss"] = [sum(trace[end] for trace in traces) / len(traces) for end in (0, -1)] if traces else None
    record["cost"] = {
        "forward_tokens": spent.forward_tokens,
        "gradient_steps": spent.gradient_steps,
        "generated_tokens": sum(one.capture.tokens for one in falls.seen),
    }
    return falls.outcome(record)


def improve(
    chat: ChatModel, attempts: Sequence[Attempt], usable: Sequence[int], candidates: int, spent: Spent
) -> list[bool]:
    """One step of each search: the best of the drawn candidates takes the suffix's place, if it is better.

    Returns whether the suffix of each changed.
    """
    sloping, read = slopes(chat, [one.place for one in attempts], [one.suffix for one in attempts])
    spent.forward_tokens += read
    spent.gradient_steps += len(attempts)
    likely = likely_tokens(chat, torch.cat([one.gradient for one in sloping]), usable, LIKELY)
    changed = []
    for one, tokens in zip(attempts, likely.view(len(attempts), -1, likely.shape[1]), strict=True):
        # the suffix itself is scored with the others, since another batch rounds otherwise
        tried = [one.suffix, *draw_candidates(chat, one, tokens, candidates)]
        scores, read = losses(chat, one.place, tried)
        spent.forward_tokens += read
        best = min(range(len(tried)), key=lambda i: scores[i] if math.isfinite(scores[i]) else math.inf)
        one.trace += [scores[best]] if one.trace else [scores[0], scores[best]]
        one.suffix = tried[best]
        changed.append(best > 0)
    return changed


def draw_candidates(chat: ChatModel, attempt: Attempt, likely: Tensor, count: int) -> list[list[int]]:
    """Up to `count` suffixes with another token at one place, of its `likely` ones [n, k], which come back."""
    width = likely.shape[1]
    drawn: list[list[int]] = []
    for pair in torch.randperm(likely.numel(), generator=attempt.generator).tolist():
        if len(drawn) == count:
            break
        at = pair // width
        other = [*attempt.suffix[:at], int(likely[at, pair % width]), *attempt.suffix[at + 1 :]]
        if other != attempt.suffix and attempt.place.comes_back(chat, other):
            drawn.append(other)
    return drawn


def compare_halves(before: Outcome, after: Outcome, budget: int) -> dict[str, Any]:
    """`ratio` of the steps at which half of all toxic prompts fell, and `refused`, the same of those refused by both.

    A prompt that the model answers as it stands needs no step, so only the others say what the search costs.
    """
    same = before.judged & after.judged
    both = {i for i in same if before.fell_at.get(i) != 0 and after.fell_at.get(i) != 0}
    first, second = (
        shares_fallen({i: at for i, at in one.fell_at.items() if i in both}, both, range(1, budget + 1))["half"]
        for one in (before, after)
    )
    refused = {"n": len(both), "before": first, "after": second, **_ratio(first, second, budget)}
    return {**_ratio(before.record["half"], after.record["half"], budget), "refused": refused}


def _ratio(before: int | None, after: int | None, budget: int) -> dict[str, Any]:
    """How many times as many steps are needed; with `at_least`, since half did not fall in `budget` steps after it."""
    if not before:  # half never fell, or needed no step
        return {"ratio": None, "at_least": False}
    return {"ratio": (budget + 1 if after is None else after) / before, "at_least": after is None}


def about(search: SuffixPlan) -> dict[str, Any]:
    """What a record says of the search, whatever the model."""
    plan = search.plan
    return {"budget": plan.budget, "tokens": search.tokens, "candidates": search.candidates, "opening": OPENING}
