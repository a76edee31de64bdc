"""The prompts of a run, in three splits: where they come from, and what a run asks of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmva.prompts.load import Lists, load_splits, splits_from_lists
from llmva.prompts.split import normalise
from llmva.prompts.store import read_bundled, read_jsonl, write_jsonl
from llmva.prompts.types import MAX_CHARS, Prompt, Splits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class PromptSet(Splits):
    """Disjoint splits: vectors are fitted on `train`, the iteration chosen on `validation`, figures come from `test`.

    `warnings` are sentences about what loading dropped or guessed, which a run keeps. `notes` say what was read from
    each source, with its first prompt, and are for the user's eyes alone. Commands show both, equality ignores them.
    """

    @classmethod
    def bundled(cls) -> PromptSet:
        """The set that ships with the package: sources harmful, jailbreak, alarming and plain (docs/prompts.md)."""
        return cls.of(read_bundled())

    @classmethod
    def load(
        cls,
        toxic: Sequence[str] = (),
        benign: Sequence[str] = (),
        seed: int = 0,
        max_chars: int = MAX_CHARS,
        data: Sequence[str] = (),
        per_set: int | None = None,
        data_dir: str | Path | None = None,
        only: bool = False,
    ) -> PromptSet:
        """Read `PATH_OR_ID[:column[=gold][:split]]` specs. A source with its own splits keeps them, others
        are cut 60/20/20.

        `data` names sets of the registry (docs/datasets.md), `NAME` or `NAME=PATH`, which bring their sides along; of
        each side `per_set` prompts are drawn (default 500). Copies of sets named without a path are in `data_dir`, if
        that is given; else their homes are asked. The bundled prompts are added to be read (`with_bundled`), unless
        `only` leaves them out.

        Raises UsageError, one sentence with its mend, for anything that cannot be read or is no usable prompt.
        """
        named = cls.of(load_splits(toxic, benign, seed, max_chars, data, per_set, data_dir))
        return named if only else named.with_bundled()

    @classmethod
    def from_lists(cls, toxic: Lists, benign: Lists, seed: int = 0, max_chars: int = MAX_CHARS) -> PromptSet:
        """Cut each source 60/20/20: a list is one source, a mapping holds several by name. Errors as in `load`."""
        return cls.of(splits_from_lists(toxic, benign, seed=seed, max_chars=max_chars))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> PromptSet:
        """Read what `to_jsonl` wrote: one object a line with text, benign, source, split (and id, checked if there).

        Raises UsageError naming the line that `to_jsonl` would not have written.
        """
        return cls.of(read_jsonl(Path(path)))

    @classmethod
    def of(cls, splits: Splits) -> PromptSet:
        """The set of these splits, warnings and notes included."""
        return cls(splits.train, splits.validation, splits.test, splits.warnings, splits.notes, splits.read)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(prompts)} {split}" for split, prompts in self.splits())
        return f"PromptSet({sizes}; {', '.join(self.counts())})"

    def with_bundled(self) -> PromptSet:
        """The set with the bundled training and validation prompts to read, except those that it has itself.

        Prompts of a few files teach their style more than what makes a prompt harmful; bundled ones have other styles.
        """
        own = {normalise(prompt.text) for _, prompts in self.splits() for prompt in prompts}
        bundled = read_bundled()
        others = [p for p in (*bundled.train, *bundled.validation) if normalise(p.text) not in own]
        return replace(self, read=tuple(Prompt(p.text, p.benign, f"bundled {p.source}") for p in others))

    def to_jsonl(self, path: str | Path) -> None:
        """Write every prompt, split by split, through a temporary file. `warnings` are not kept."""
        write_jsonl(self, Path(path))

    def draw(self, n_per_source: int, generator: torch.Generator) -> list[Prompt]:
        """Draw from `train` without replacement, n from each source (all of a smaller one), source after source.

        The result depends on `train`'s order and the generator's state alone.
        """
        return draw(self.train, n_per_source, generator)

    def hashes(self) -> dict[str, str]:
        """sha256 (hex) of each source: its texts, sides, gold answers, splits and order, so any change shows."""
        digests: dict[str, Any] = {source: hashlib.sha256() for source in self.counts()}
        for split, prompts in self.parts():
            for prompt in prompts:
                gold = [list(prompt.gold)] if prompt.gold else []
                line = json.dumps([split, prompt.benign, prompt.text, *(prompt.messages or ()), *gold]) + "\n"
                digests.setdefault(prompt.source, hashlib.sha256()).update(line.encode())
        return {source: digest.hexdigest() for source, digest in digests.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of prompts by source, then by split."""
        counts: dict[str, dict[str, int]] = {}
        for split, prompts in self.splits():
            for prompt in prompts:
                counts.setdefault(prompt.source, {"train": 0, "validation": 0, "test": 0})[split] += 1
        return counts


def draw(prompts: Sequence[Prompt], n_per_source: int, generator: torch.Generator) -> list[Prompt]:
    """Draw without replacement, n from each source (all of a smaller one), source after source."""
    import torch

    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    drawn: list[Prompt] = []
    for members in by_source.values():
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        drawn += [members[i] for i in order[:n_per_source].tolist()]
    return drawn
