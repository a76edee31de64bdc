"""A prompt with its side (benign or toxic) and source, and prompts in the three splits that a run needs.

A prompt is one user message, or a conversation up to where the model goes on: perhaps a system message, earlier turns,
the request, and perhaps the beginning of the answer (a *prefill*), which is a last message of the assistant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

READ = "read"  # in place of a split: prompts that are read and not answered
MAX_CHARS = 20_000  # a longer prompt is far more often a mistake in the file than a prompt


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


Dialogue = tuple[Message, ...]
Asked = str | Dialogue  # what a model is asked: one user message, or a conversation


@dataclass(frozen=True)
class Prompt:
    """One user message, or a conversation. `id` is a hash of the text and the attack, so it survives reordering.

    `text` is what judges read, and what makes two prompts the same. Without `messages` it is what the model is asked.
    `gold` are the right answers of a benign question, any of which will do; empty where they are not known.
    `attack` names the transform in which `messages` ask what `text` says plainly; "" where they are the text itself.
    """

    text: str
    benign: bool
    source: str
    messages: Dialogue | None = None
    id: str = field(init=False)
    gold: tuple[str, ...] = field(default=(), compare=False)
    attack: str = ""

    def __post_init__(self) -> None:
        known = f"{self.attack}\0{self.text}" if self.attack else self.text
        object.__setattr__(self, "id", hashlib.sha256(known.encode()).hexdigest()[:12])

    @classmethod
    def of(cls, asked: Asked, benign: bool, source: str, gold: tuple[str, ...] = ()) -> Prompt:
        """A prompt of what is asked; the text of a conversation is its transcript."""
        return cls(text_of(asked), benign, source, None if isinstance(asked, str) else asked, gold)

    @property
    def asked(self) -> Asked:
        """What the model is asked."""
        return self.text if self.messages is None else self.messages


def text_of(asked: Asked) -> str:
    """One user message as it is; a conversation as its turns, each after who speaks."""
    if isinstance(asked, str):
        return asked
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in asked)


def prefill_of(asked: Asked) -> str:
    """The beginning of the answer that is given with a prompt; "" where there is none."""
    return asked[-1].content if not isinstance(asked, str) and asked[-1].role == "assistant" else ""


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
