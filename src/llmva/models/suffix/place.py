"""Where a suffix stands among the tokens that a model reads, and which tokens may stand in it.

A search chooses token ids, but a user types text. So a suffix counts only if the tokenizer gives its ids back: the
text of the whole prompt, with the text of the suffix in it, must encode to the same ids as the search has scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmva.models.chat import decode
from llmva.models.chat.dialogues import as_turns
from llmva.models.chat_model import ChatModel
from llmva.prompts.types import Asked, Message

OPENING = "Sure, here is"  # an affirmative beginning, the likelihood of which a search raises

Ask = Callable[[str], Asked]  # what the model is asked with the text of a suffix


@dataclass(frozen=True)
class Place:
    """The tokens around a suffix, those of the opening at the end included, and the text that they come from."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    opening: int  # how many tokens of the tail are the opening
    texts: tuple[str, str] = field(repr=False)  # before and after the suffix

    def row(self, suffix: Sequence[int]) -> list[int]:
        """Token ids of the prompt with the suffix and the opening."""
        return [*self.head, *suffix, *self.tail]

    def comes_back(self, chat: ChatModel, suffix: Sequence[int]) -> bool:
        """Whether the text of the prompt with this suffix encodes to `row`."""
        text = suffix_text(chat, suffix)
        before, after = self.texts
        return bool(text) and chat.template.encode(f"{before}{text}{after}") == self.row(suffix)


def suffix_text(chat: ChatModel, suffix: Sequence[int]) -> str:
    """What a user types; white space at its ends is left out, since the request has a space behind it."""
    return decode(chat.tokenizer, suffix).strip()


def find_place(chat: ChatModel, ask: Ask, suffix: Sequence[int]) -> Place | None:
    """Where `suffix` stands in what `ask` makes of its text; None if it does not stand there exactly once."""
    text, count = suffix_text(chat, suffix), len(suffix)
    if not text:
        return None
    asked = ask(text)
    rendered = chat.template.render(as_turns(_with_opening(asked)))
    plain, begun = chat.template.row(asked), chat.template.encode(rendered)
    shared = next((i for i, pair in enumerate(zip(plain, begun, strict=False)) if pair[0] != pair[1]), len(plain))
    starts = [i for i in range(len(begun) - count + 1) if begun[i : i + count] == list(suffix)]
    if len(starts) != 1 or rendered.count(text) != 1 or not starts[0] + count <= shared < len(begun):
        return None
    before, _, after = rendered.partition(text)
    head, tail = begun[: starts[0]], begun[starts[0] + count :]
    return Place(tuple(head), tuple(tail), len(begun) - shared, (before, after))


def _with_opening(asked: Asked) -> Asked:
    """The prompt with the opening as the beginning of the answer, after one that it may have."""
    turns = (Message("user", asked),) if isinstance(asked, str) else asked
    if turns[-1].role == "assistant":
        return (*turns[:-1], Message("assistant", f"{turns[-1].content} {OPENING}"))
    return (*turns, Message("assistant", OPENING))


def usable_tokens(chat: ChatModel) -> list[int]:
    """Ids of tokens that may stand in a suffix: printable text, neither special nor added to the vocabulary."""
    tokenizer = chat.tokenizer
    # a tokenizer may have more tokens than the model has embeddings of
    known = min(len(tokenizer), int(chat.model.get_input_embeddings().weight.shape[0]))
    added = tokenizer.get_added_vocab().values() if hasattr(tokenizer, "get_added_vocab") else ()
    barred = {*tokenizer.all_special_ids, *added}
    return [i for i in range(known) if i not in barred and _is_text(decode(tokenizer, [i]))]


def _is_text(text: str) -> bool:
    """Whether a token writes letters or signs; part of a letter is written as the replacement character."""
    return bool(text.strip()) and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
