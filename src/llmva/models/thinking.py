"""Models that think before they answer: generate the thoughts, and treat their end as the end of the prompt.

Such a model decides while it thinks. So a capture reads the prompt with the model's own thoughts, up to and including
the closing tag, and the answer follows them. If the model does not close its thoughts within the maximum number of
tokens, they are closed for it, as servers of such models do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmva.errors import UsageError
from llmva.models.at_rest import reads_model
from llmva.models.batching import longest_first
from llmva.models.chat import encode, render
from llmva.models.chat_model import ChatModel
from llmva.models.generate import RowStop, check_rows, end_tokens, generate_greedily
from llmva.models.sublayers import contiguous_head, hooked

_OPEN = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)
AFTER = "\n\n"  # between the closing tag and the answer, if the model stopped before it


@dataclass(frozen=True)
class Thinking:
    """The tags around a model's thoughts, and the maximum number of their tokens."""

    open: str
    close: str
    tokens: int

    @classmethod
    def asked(cls, tokenizer: Any, mode: str, tokens: int) -> Thinking | None:
        """For the setting `thinking`: "end" uses the tags of the chat template, "off" gives None.

        Raises UsageError if the template has no thinking block.
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
        """How many of the new tokens `row` are thoughts: all before the first token of the answer.

        None while the block is open or only blanks follow it. `ends` are the tokens that end a turn; they end the
        thoughts too.
        """
        for k, token in enumerate(row):
            if token in ends:
                return k
        if self._after(tokenizer, row).strip() == "":
            return None
        low, high = 1, len(row)  # binary search: the text after the tag only grows
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._after(tokenizer, row[:middle]).strip() else (middle + 1, high)
        return low - 1

    def closed(self, tokenizer: Any, thought: list[int]) -> list[int]:
        """`thought` with its block closed."""
        if self.close in tokenizer.decode(thought):
            return thought
        more: list[int] = tokenizer(self.close + AFTER, add_special_tokens=False)["input_ids"]
        return [*thought, *more]

    def _after(self, tokenizer: Any, row: list[int]) -> str:
        text: str = tokenizer.decode(row)
        return text.partition(self.close)[2]


@dataclass(frozen=True)
class Thoughts:
    """A model's thoughts about each prompt."""

    rows: list[list[int]]  # token ids of prompt and thoughts, block closed; the answer follows them
    texts: list[str]  # the thoughts alone
    tokens: int  # generated


@reads_model
def think(chat: ChatModel, prompts: Sequence[str], thinking: Thinking, max_new_tokens: int = 0) -> Thoughts:
    """Let the model think about each prompt, greedily.

    Raises UsageError for a prompt that does not fit into the model's context with its thoughts and an answer of
    `max_new_tokens`.
    """
    tokenizer = chat.tokenizer
    rows = [thinking.row(tokenizer, text) for text in prompts]
    check_rows(chat.model, prompts, rows, thinking.tokens + max_new_tokens + 8)  # room for a closing tag
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
        # `end` has not seen the tokens since the last check; row[:None] is the whole row
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
