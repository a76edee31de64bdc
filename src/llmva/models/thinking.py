"""Models that think before they answer: let them, and take the end of the thinking block for the end of the prompt.

What such a model decides, it decides while it thinks. So the row that a capture reads, and that the answer follows,
is the prompt with the model's own thoughts up to and including the tag that closes them. A model that does not close
them within its budget has them closed, as those who serve such models do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmva.errors import UsageError
from llmva.models.batching import longest_first
from llmva.models.chat import encode, render
from llmva.models.chat_model import ChatModel
from llmva.models.generate import RowStop, check_rows, end_tokens, generate_greedily
from llmva.models.sublayers import contiguous_head, hooked

_OPEN = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)
AFTER = "\n\n"  # between the closing tag and the answer, where the model left off before it


@dataclass(frozen=True)
class Thinking:
    """How a model marks its thoughts, and how many tokens it may spend on them."""

    open: str
    close: str
    tokens: int

    @classmethod
    def asked(cls, tokenizer: Any, mode: str, tokens: int) -> Thinking | None:
        """For the setting `thinking`: "end", marked as the chat template tells, or "off", which is None.

        Raises UsageError where the template knows no thinking block.
        """
        if mode == "off":
            return None
        template = getattr(tokenizer, "chat_template", None)
        tag = _OPEN.search(template if isinstance(template, str) else "")
        if tag is None:
            raise UsageError("The model's chat template has no thinking block to wait for: leave --thinking off.")
        return cls(tag.group(), f"</{tag.group(1)}>", tokens)

    def row(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of a user message with thinking on."""
        return encode(tokenizer, render(tokenizer, text, thinking=True))

    def end(self, tokenizer: Any, row: list[int], ends: set[int]) -> int | None:
        """How many of the new tokens `row` are thoughts: all before the first one of the answer.

        None while that is not known: the block is open, or nothing but blanks has come after it. `ends` are the
        tokens that end a turn; one of those ends the thoughts before it.
        """
        for k, token in enumerate(row):
            if token in ends:
                return k
        if self._after(tokenizer, row).strip() == "":
            return None
        low, high = 1, len(row)  # the text after the tag only grows
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._after(tokenizer, row[:middle]).strip() else (middle + 1, high)
        return low - 1

    def closed(self, tokenizer: Any, thought: list[int]) -> list[int]:
        """`thought` with its block closed, if it is not."""
        if self.close in tokenizer.decode(thought):
            return thought
        more: list[int] = tokenizer(self.close + AFTER, add_special_tokens=False)["input_ids"]
        return [*thought, *more]

    def _after(self, tokenizer: Any, row: list[int]) -> str:
        text: str = tokenizer.decode(row)
        return text.partition(self.close)[2]


@dataclass(frozen=True)
class Thoughts:
    """What a model thought about each prompt."""

    rows: list[list[int]]  # token ids of the prompt with the thoughts, block closed: what the answer follows
    texts: list[str]  # the thoughts alone
    tokens: int  # generated


def think(chat: ChatModel, prompts: Sequence[str], thinking: Thinking, max_new_tokens: int = 0) -> Thoughts:
    """Let the model think about each prompt, greedily.

    Raises UsageError for a prompt that does not fit into the model's context with its thoughts and an answer of
    `max_new_tokens`.
    """
    tokenizer = chat.tokenizer
    rows = [thinking.row(tokenizer, text) for text in prompts]
    check_rows(chat.model, prompts, rows, thinking.tokens + max_new_tokens + 8)  # the tag may have to be written
    lengths = [len(row) + thinking.tokens for row in rows]
    ends = end_tokens(chat.model, tokenizer)
    thought_rows: list[list[int]] = [[] for _ in rows]
    spent = 0

    def end(row: list[int]) -> int | None:
        return thinking.end(tokenizer, row, ends)

    def work(batch: list[int]) -> tuple[list[list[int]], int]:
        from transformers import StoppingCriteriaList

        ids, mask = chat.pad([rows[i] for i in batch])
        stop = RowStop(ids.shape[1], len(batch), end)
        with torch.inference_mode(), hooked([contiguous_head(chat.model)]):
            new = generate_greedily(
                chat.model, tokenizer, ids, mask, thinking.tokens, stopping_criteria=StoppingCriteriaList([stop])
            )
        # between two looks, or where the budget ran out, it has not been asked of the last tokens; row[:None] is all
        thoughts = [
            row[: end(row) if known is None else known] for row, known in zip(new.tolist(), stop.ends, strict=True)
        ]
        return [thinking.closed(tokenizer, thought) for thought in thoughts], sum(map(len, thoughts))

    for batch, (thoughts, n) in chat.batching.over(longest_first(lengths), lengths.__getitem__, work):
        for i, thought in zip(batch, thoughts, strict=True):
            thought_rows[i] = thought
        spent += n
    texts = [tokenizer.decode(thought, skip_special_tokens=True) for thought in thought_rows]
    return Thoughts([[*row, *thought] for row, thought in zip(rows, thought_rows, strict=True)], texts, spent)
