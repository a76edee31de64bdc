"""The interface of attacks: how a request becomes the turns that a model reads, and how it is read back from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmva.prompts.types import Dialogue, Message, Prompt, prefill_of


@dataclass(frozen=True)
class Attack:
    """A transform of the request, which is the last user message of a prompt; what stands before it stays.

    `wrap` takes the request and gives the turns in its place: perhaps harmless ones before, the user's message, and
    perhaps the beginning of the answer. `read` takes that user's message and gives the request back.
    """

    name: str
    about: str  # what it does, for a list
    source: str  # the paper that describes it
    wrap: Callable[[str], Dialogue]
    read: Callable[[str], str]
    back: str = "the prompt stands in it word for word"  # how it is read back, for a list

    def apply(self, prompt: Prompt) -> Prompt:
        """The prompt as an attacker asks it. The text stays, so that judges see the request itself.

        Raises UsageError where a translation lacks the request.
        """
        earlier, request, begun = _parts(prompt)
        turns = self.wrap(request)
        if begun and turns[-1].role == "assistant":
            turns = (*turns[:-1], Message("assistant", f"{turns[-1].content} {begun}"))
        elif begun:
            turns = (*turns, Message("assistant", begun))
        return replace(prompt, messages=(*earlier, *turns), attack="+".join(filter(None, (prompt.attack, self.name))))

    def read_back(self, prompt: Prompt) -> str:
        """The request of a prompt that `apply` made."""
        return self.read(_parts(prompt)[1])


def _parts(prompt: Prompt) -> tuple[Dialogue, str, str]:
    """Earlier turns, the request, and the beginning of the answer."""
    if prompt.messages is None:
        return (), prompt.text, ""
    begun = prefill_of(prompt.messages)
    turns = prompt.messages[:-1] if begun else prompt.messages
    return turns[:-1], turns[-1].content, begun


@dataclass(frozen=True)
class Frame:
    """Words before and after a request, or after a code of it."""

    head: str = ""
    tail: str = ""

    def around(self, text: str) -> Dialogue:
        return (Message("user", f"{self.head}{text}{self.tail}"),)

    def inside(self, message: str) -> str:
        return message.removeprefix(self.head).removesuffix(self.tail)
