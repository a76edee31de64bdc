"""Cut sources into train, validation and test, and keep every wording in one split only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llmva.errors import UsageError
from llmva.prompts.types import Prompt, PromptSet

Splits = dict[str, list[Prompt]]  # "train", "validation", "test" -> prompts

SHARE = 0.2  # of a source for validation, and as much for test
LEAST = 8  # prompts a side: fewer would leave a split with none


def normalise(text: str) -> str:
    """The form in which two prompts count as the same: case folded, runs of whitespace as one space."""
    return " ".join(text.casefold().split())


def drop_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep the first of equal prompts (by `normalise`), in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(normalise(prompt.text), prompt)
    return list(first.values())


def check_sides(prompts: Sequence[Prompt]) -> None:
    """Raises UsageError naming a text that is given both as toxic and as benign."""
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        other = seen.setdefault(normalise(prompt.text), prompt)
        if other.benign != prompt.benign:
            shown = prompt.text if len(prompt.text) <= 80 else prompt.text[:77] + "..."
            raise UsageError(
                f"the prompt {shown!r} is given both as toxic (or harmful) and as benign, in {other.source} and "
                f"{prompt.source}: remove it from one of them."
            )


def cut(prompts: dict[str, list[Prompt]], seed: int) -> Splits:
    """Cut one source. Its own splits stay; a missing validation or test split is a quarter of its train split.

    A source without splits (key "") is cut 60/20/20. Each prompt's place follows from a hash of seed and id, within
    its source only: other sources do not move it, nor does the order of the file.
    """
    own = {split: list(found) for split, found in prompts.items() if found}
    if "train" not in own:  # "" or, say, test only: everything is up for cutting
        pool = [prompt for found in own.values() for prompt in found]
        n = round(len(pool) * SHARE)
        test, rest = _take(pool, n, seed)
        validation, train = _take(rest, n, seed)
        return {"train": train, "validation": validation, "test": test}
    missing = [split for split in ("test", "validation") if split not in own]
    n = round(len(own["train"]) * SHARE / (1 - SHARE)) if len(missing) == 1 else round(len(own["train"]) * SHARE)
    for split in missing:
        own[split], own["train"] = _take(own["train"], n, seed)
    return own


def draw(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """At most n of different prompts, in order. A draw of fewer is part of a draw of more."""
    return _take(prompts, n, seed)[0] if len(prompts) > n else list(prompts)


def draw_splits(prompts: dict[str, list[Prompt]], n: int, seed: int) -> dict[str, list[Prompt]]:
    """At most n prompts of a source with or without splits of its own, which then get their shares of n."""
    if sum(map(len, prompts.values())) <= n:
        return prompts
    cut_off = [split for split in prompts if split in ("validation", "test") and "train" in prompts]
    shares = dict.fromkeys(cut_off, round(n * SHARE))
    rest = n - sum(shares.values())
    return {split: draw(found, shares.get(split, rest), seed) for split, found in prompts.items()}


def _take(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The n prompts whose hashes come first, and the rest; both keep their order."""
    ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest())
    taken = {prompt.id for prompt in ranked[:n]}
    return [p for p in prompts if p.id in taken], [p for p in prompts if p.id not in taken]


def join(sources: Sequence[tuple[str, Splits]], warnings: Sequence[str]) -> PromptSet:
    """Put cut sources together, so that a text stays in one split only: test before validation before train.

    Raises UsageError if a split is left without one of the two sides.
    """
    told = list(warnings)
    seen: set[str] = set()
    kept: Splits = {"test": [], "validation": [], "train": []}
    dropped: dict[str, int] = {}
    for split, into in kept.items():
        for name, splits in sources:
            for prompt in splits.get(split, []):
                key = normalise(prompt.text)
                if key in seen:
                    dropped[name] = dropped.get(name, 0) + 1
                else:
                    seen.add(key)
                    into.append(prompt)
    for name, n in dropped.items():
        told.append(f"{name}: {n} left out, the same text being in another split or source.")
    result = PromptSet(tuple(kept["train"]), tuple(kept["validation"]), tuple(kept["test"]), tuple(told))
    check_splits(result)
    return result


def check_splits(prompts: PromptSet) -> None:
    """Raises UsageError if a split lacks toxic or benign prompts."""
    for split, found in prompts.splits():
        for benign, side in ((False, "toxic"), (True, "benign")):
            if not any(prompt.benign == benign for prompt in found):
                raise UsageError(f"the {split} split has no {side} prompts: give more of them (--{side}).")
