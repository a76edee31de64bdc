"""Cut sources into train, validation and test, and keep every wording in one split only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llmva.errors import UsageError
from llmva.prompts.types import Prompt, Splits, as_splits

BySplit = dict[str, list[Prompt]]  # "train", "validation", "test" -> prompts; "" of a source without splits

SHARE = 0.2  # of a source for validation, and as much for test
MIN_PER_SIDE = 8  # different prompts; fewer would leave a split with none


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
    by_text: dict[str, Prompt] = {}
    for prompt in prompts:
        other = by_text.setdefault(normalise(prompt.text), prompt)
        if other.benign != prompt.benign:
            shown = prompt.text if len(prompt.text) <= 80 else prompt.text[:77] + "..."
            raise UsageError(
                f"the prompt {shown!r} is given both as toxic (or harmful) and as benign, in {other.source} and "
                f"{prompt.source}: remove it from one of them."
            )


def cut(prompts: BySplit, seed: int) -> BySplit:
    """Cut one source. Its own splits stay; a missing validation or test split is taken from its train split.

    A source without splits (key "") is cut 60/20/20. The place of a prompt depends on a hash of the seed and its id,
    and on the other prompts of its source. Other sources do not move it, nor does the order of the file.
    """
    own = {split: list(given) for split, given in prompts.items() if given}
    if "train" not in own:  # without splits, or with a test split alone, for example: all prompts are cut
        pool = [prompt for given in own.values() for prompt in given]
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
    """At most n of `prompts`, in order; their texts must differ. A smaller draw is part of a larger one."""
    return _take(prompts, n, seed)[0] if len(prompts) > n else list(prompts)


def draw_splits(prompts: BySplit, n: int, seed: int) -> BySplit:
    """At most n prompts of a source; its own validation and test splits get their shares of n."""
    if sum(map(len, prompts.values())) <= n:
        return prompts
    cut_off = [split for split in prompts if split in ("validation", "test") and "train" in prompts]
    shares = dict.fromkeys(cut_off, round(n * SHARE))
    rest = n - sum(shares.values())
    return {split: draw(given, shares.get(split, rest), seed) for split, given in prompts.items()}


def _take(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The n prompts whose hashes come first, and the rest; both keep their order."""
    ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest())
    taken = {prompt.id for prompt in ranked[:n]}
    return [p for p in prompts if p.id in taken], [p for p in prompts if p.id not in taken]


def join(sources: Sequence[tuple[str, BySplit]], warnings: Sequence[str]) -> Splits:
    """Join cut sources. A text that is in several splits stays in one: in test, else in validation.

    Raises UsageError if a split is left without one of the two sides.
    """
    placed: set[str] = set()
    kept: BySplit = {"test": [], "validation": [], "train": []}
    dropped: dict[str, int] = {}
    for split, prompts in kept.items():
        for name, by_split in sources:
            for prompt in by_split.get(split, []):
                key = normalise(prompt.text)
                if key in placed:
                    dropped[name] = dropped.get(name, 0) + 1
                else:
                    placed.add(key)
                    prompts.append(prompt)
    repeats = [f"{name}: {n} left out, the same text being in another split or source." for name, n in dropped.items()]
    joined = as_splits(kept, [*warnings, *repeats])
    check_splits(joined)
    return joined


def check_splits(splits: Splits) -> None:
    """Raises UsageError if a split lacks toxic or benign prompts."""
    for split, prompts in splits.splits():
        for benign, side in ((False, "toxic"), (True, "benign")):
            if not any(prompt.benign == benign for prompt in prompts):
                raise UsageError(f"the {split} split has no {side} prompts: give more of them (--{side}).")


def require_prompts(side: str, count: int, minimum: int = 1, kind: str = "") -> None:
    """Raises UsageError if a side has no prompt, or fewer than `minimum` different ones; `kind` says which prompts."""
    if not count:
        raise UsageError(f"there are no {side} prompts: add --{side} with a file or a data set.")
    if count < minimum:
        raise UsageError(
            f"there are only {count} different {kind}{side} prompts: give at least {minimum} with --{side}, so that "
            "train, validation and test all get some."
        )
