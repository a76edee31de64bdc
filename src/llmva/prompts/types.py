"""A prompt with its side (benign or toxic) and source, and the three splits that a run needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    """One user message. `id` is a hash of the text, so it survives reordering and is equal for equal texts."""

    text: str
    benign: bool
    source: str
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self.text.encode()).hexdigest()[:12])


@dataclass(frozen=True)
class PromptSet:
    """Disjoint splits: vectors are fitted on `train`, the iteration is chosen on `validation`, figures come from `test`."""

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]

    def splits(self) -> Iterator[tuple[str, tuple[Prompt, ...]]]:
        yield "train", self.train
        yield "validation", self.validation
        yield "test", self.test
