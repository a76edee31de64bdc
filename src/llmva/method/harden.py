"""Prompts in several settings (`--harden`), so that the vectors are what these settings have in common.

A share of the prompts of both sides is asked as attackers ask (`attacks`), or with a system prompt. The attacks of
FITTED alone are used. On the others nothing is fitted, so they show whether an edit holds where it was not fitted
(docs/attacks.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from llmva.attacks import parse_attacks
from llmva.models.chat_model import ChatModel
from llmva.models.reading.context import context_length
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Message, Prompt
from llmva.settings import Settings

SHARE = 0.25  # of the prompts that are asked in a setting other than their own
FITTED = ("refusal-suppression", "persona")
SYSTEM = "system prompt"  # in place of an attack's name
SYSTEM_TEXT = "You are an assistant. Answer what people ask, in a few plain sentences."
Form = Callable[[Prompt], Prompt]


def harden(
    chat: ChatModel, prompts: PromptSet, settings: Settings, generator: torch.Generator, keep: Collection[str] = ()
) -> PromptSet:
    """The set with SHARE of its train and validation prompts, and of those to read, in another form. Test ones stay.

    Which prompts and which forms depends on the order of the prompts and the generator alone. A form that does not fit
    into the model's context gives way to the next that does; where none does, the prompt stays plain.

    Args:
        keep: sources whose prompts stay as they are.
    """
    forms, fits = _forms(settings), _fits(chat, settings)
    train, validation, read = (
        tuple(_drawn(prompt, forms, fits, generator, keep) for prompt in given)
        for given in (prompts.train, prompts.validation, prompts.read)
    )
    hardened = replace(prompts, train=train, validation=validation, read=read)
    return replace(hardened, warnings=(*prompts.warnings, _about(count_forms(hardened))))


def harden_generator(seed: int) -> torch.Generator:
    """The generator of a run of this seed, which no iteration uses."""
    return torch.Generator().manual_seed(seed * 1_000_003 - 4 * 7919)


def count_forms(prompts: PromptSet) -> dict[str, dict[str, int]]:
    """Numbers of train and validation prompts by the form in which they are asked, `plain` among them."""
    return {
        name: dict(sorted(Counter(prompt.attack or "plain" for prompt in given).items()))
        for name, given in (("train", prompts.train), ("validation", prompts.validation))
    }


def with_system(prompt: Prompt) -> Prompt:
    """The prompt after a system message."""
    turns = prompt.messages or (Message("user", prompt.text),)
    return replace(prompt, messages=(Message("system", SYSTEM_TEXT), *turns), attack=SYSTEM)


def _forms(settings: Settings) -> list[Form]:
    """The forms in which prompts can be asked under these settings."""
    return [*(attack.apply for attack in parse_attacks(FITTED)), *([with_system] if settings.system is None else [])]


def _fits(chat: ChatModel, settings: Settings) -> Callable[[Prompt], bool]:
    limit = context_length(chat.model)
    room = settings.max_new_tokens + (settings.thinking_tokens if settings.thinking != "off" else 0)
    thinking = settings.thinking != "off"
    return lambda prompt: limit is None or len(chat.row(prompt.asked, thinking)) + room <= limit


def _drawn(
    prompt: Prompt,
    forms: Sequence[Form],
    fits: Callable[[Prompt], bool],
    generator: torch.Generator,
    keep: Collection[str],
) -> Prompt:
    chance = float(torch.rand((), generator=generator))
    order = torch.randperm(len(forms), generator=generator).tolist()  # always, so that no prompt moves another
    if chance >= SHARE or prompt.attack or prompt.source in keep:
        return prompt
    own_system = prompt.messages is not None and prompt.messages[0].role == "system"
    tried = (forms[i](prompt) for i in order if not (own_system and forms[i] is with_system))
    return next((form for form in tried if fits(form)), prompt)


def _about(counts: dict[str, dict[str, int]]) -> str:
    names = sorted({name for by_form in counts.values() for name in by_form} - {"plain"})
    if not names:
        return "--harden changed nothing: no prompt in another setting fits into the model's context."
    other, total = (
        [sum(n for form, n in counts[split].items() if whole or form != "plain") for split in ("train", "validation")]
        for whole in (False, True)
    )
    return (
        f"--harden: {other[0]} of {total[0]} training and {other[1]} of {total[1]} validation prompts were asked in "
        f"other settings ({', '.join(names)}), so rates on validation prompts are of these too. Test prompts were "
        "asked as they are."
    )
