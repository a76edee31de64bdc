"""New prompts beside those of an earlier run, whose splits stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmva.errors import UsageError
from llmva.prompts.contamination import FitIndex, near_repeats
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.sources.source import unique_name
from llmva.prompts.split import MIN_PER_SIDE, check_sides, cut, drop_repeats, normalise, require_prompts
from llmva.prompts.types import Prompt, Splits


def add_prompts(old: PromptSet, new: Sequence[Prompt], seed: int) -> tuple[PromptSet, tuple[str, ...]]:
    """`old` with each source of `new` cut 60/20/20 and added to its splits; and the names of the new sources.

    A new prompt that `old` has already is left out with a warning. A source whose name is taken gets another name.
    Raises UsageError for prompts that are on both sides, if nothing is new, and if there is too little to cut.
    """
    earlier = [prompt for _, prompts in old.splits() for prompt in prompts]
    known = {normalise(prompt.text) for prompt in new}
    check_sides([*earlier, *new])
    fit = FitIndex(earlier)
    fresh = drop_repeats([prompt for prompt in new if prompt.text not in fit])
    if not fresh:
        raise UsageError(f"none of the {len(new)} prompts is new, the earlier run has them all: give others.")
    for side, benign in (("toxic", False), ("benign", True)):
        count = sum(prompt.benign == benign for prompt in fresh)
        if count:
            require_prompts(side, count, MIN_PER_SIDE, "new ")
    warnings = [f"{len(new) - len(fresh)} prompts are not new and were left out."] if len(fresh) < len(new) else []
    if near := len(fit.overlap(fresh).near):
        warnings.append(f"{near} of {len(fresh)} new prompts share most of their words with one of the earlier run.")
    names: list[str] = []
    taken = {prompt.source for prompt in earlier}
    added: dict[str, list[Prompt]] = {split: [] for split, _ in old.splits()}
    for source, benign in dict.fromkeys((prompt.source, prompt.benign) for prompt in fresh):
        name = unique_name(source, taken)
        taken.add(name)
        names.append(name)
        renamed = [replace(p, source=name) for p in fresh if (p.source, p.benign) == (source, benign)]
        for split, prompts in cut({"": renamed}, seed).items():
            added[split] += prompts
    for split, prompts in added.items():
        for benign in {prompt.benign for prompt in fresh}:
            if all(prompt.benign != benign for prompt in prompts):
                raise UsageError(f"the {split} split gets no new {'benign' if benign else 'toxic'} prompts: give more.")
    train, validation, test = ((*prompts, *added[split]) for split, prompts in old.splits())
    warnings += near_repeats(Splits(train, validation, tuple(added["test"])))
    read = tuple(prompt for prompt in old.read if normalise(prompt.text) not in known)
    return PromptSet(train, validation, test, tuple(warnings), read=read), tuple(names)
