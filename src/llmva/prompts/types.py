"""A prompt with its side (benign or toxic) and source, and prompts in the three splits that a run needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

READ = "read"  # in place of a split: prompts that are read and not answered
MAX_CHARS = 20_000  # a longer prompt is far more often a mistake in the file than a prompt


@dataclass(frozen=True)
class Prompt:
    """One user message. `id` is a hash of the text, so it survives reordering and is equal for equal texts.

    `gold` are the right answers of a benign question, any of which will do; empty where they are not known.
    """

    text: str
    benign: bool
    source: str
    id: str = field(init=False)
    gold: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self.text.encode()).hexdigest()[:12])


@dataclass(frozen=True)
class Splits:
    """Prompts in three disjoint splits, and prompts that are read but not answered.

    On those under `read`, benign vectors are fitted beside `train`; only their side is used.
    `warnings` are sentences about what loading dropped or guessed, which a run keeps. `notes` say what was read from
    each source, with its first prompt, and are for the user's eyes alone. Commands show both, equality ignores them.
    """

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    warnings: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    read: tuple[Prompt, ...] = ()

    def splits(self) -> Iterator[tuple[str, tuple[Prompt, ...]]]:
        """Name and prompts of each split: train, validation, test."""
        yield "train", self.train
        yield "validation", self.validation
        yield "test", self.test

    def parts(self) -> Iterator[tuple[str, tuple[Prompt, ...]]]:
        """The splits, then the prompts that are read but not answered, under the name READ."""
        yield from self.splits()
        yield READ, self.read


def as_splits(by_name: Mapping[str, Sequence[Prompt]], warnings: Iterable[str] = ()) -> Splits:
    """The prompts under the keys train, validation and test, and read, if it is there."""
    train, validation, test = (tuple(by_name[name]) for name in ("train", "validation", "test"))
    return Splits(train, validation, test, tuple(warnings), read=tuple(by_name.get(READ, ())))
