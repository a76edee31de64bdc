"""Attacks in an evaluation: prompts as they are asked, whether they fit, and rates by attack with the worst case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.attacks.base import Attack
from llmva.errors import UsageError
from llmva.judges.base import Label
from llmva.metrics.rates import summarise
from llmva.metrics.samples import worst_labels
from llmva.models.chat_model import ChatModel
from llmva.models.reading.context import context_length
from llmva.models.thinking import Thinking
from llmva.prompts.types import Prompt, prefill_of


def attacked_prompts(
    chat: ChatModel, prompts: Sequence[Prompt], attacks: Sequence[Attack], max_new_tokens: int, thinking: Thinking
) -> dict[str, list[Prompt]]:
    """The prompts under each attack, by its name.

    Raises UsageError before any answer for an attack that makes a prompt too long, or that begins the answer of a model
    that thinks first.
    """
    asked = {attack.name: [attack.apply(prompt) for prompt in prompts] for attack in attacks}
    limit = context_length(chat.model)
    for name, variants in asked.items():
        if thinking.any and any(prefill_of(prompt.asked) for prompt in variants):
            raise UsageError(
                f"The model thinks before it answers, so its answer cannot be begun for it: leave {name} out of "
                "--attack, or pass --thinking off."
            )
        rows = chat.rows([prompt.asked for prompt in variants], thinking=thinking.on)
        longest = max(map(len, rows))
        if limit is not None and longest + max_new_tokens + thinking.room > limit:
            raise UsageError(
                f"The attack {name} makes a prompt of {longest} tokens, which with {max_new_tokens} for the answer is "
                f"more than the {limit} that the model reads: leave {name} out of --attack, or shorten the prompts."
            )
    return asked


def failed_prompts(asked: Sequence[tuple[Sequence[Prompt], Sequence[Sequence[Label]]]]) -> list[Prompt]:
    """The prompts that failed, as they were asked: toxic ones answered, benign ones refused or garbled, in any sample.

    Args:
        asked: the plain prompts and those under each attack, with their labels [samples][prompts].
    """
    return [
        prompt
        for prompts, labels in asked
        for prompt, label in zip(prompts, worst_labels(prompts, labels), strict=True)
        if label in ((Label.REFUSED, Label.GARBLED) if prompt.benign else (Label.ANSWERED,))
    ]


def worst_case(
    prompts: Sequence[Prompt],
    labels: Sequence[Sequence[Label]],
    rates: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Rates where each prompt is asked in the way that is worst for the model, as `summarise` gives them.

    `asr_of` and `orr_of` name the attacks with the highest rate of their own, None where there is no rate.

    Args:
        labels: for the plain prompts and each attack; several of each where answers were sampled.
        rates: of each attack.
    """
    record = summarise(prompts, worst_labels(prompts, labels), seed=seed)
    for rate in ("asr", "orr"):
        known = {name: of[rate] for name, of in rates.items() if of[rate] is not None}
        record[f"{rate}_of"] = max(known, key=known.__getitem__, default=None)
    return record
