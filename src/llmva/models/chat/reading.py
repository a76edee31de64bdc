"""Read a model's answers off its token ids, without the thoughts that it wrote down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmva.models.chat.marks import Marks, answer_begins, content, growing, spans, without_wrapper


@dataclass(frozen=True)
class AnswerReader:
    """`marks` are those of thoughts that the model may write. Rows are the token ids that it generated."""

    tokenizer: Any
    marks: tuple[Marks, ...]
    hidden: frozenset[int]  # special tokens, which plain decoding leaves out

    @classmethod
    def of(cls, tokenizer: Any, marks: tuple[Marks, ...]) -> AnswerReader:
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = [i for i, token in added.items() if getattr(token, "special", False)]
        return cls(tokenizer, marks, frozenset([*special, *(getattr(tokenizer, "all_special_ids", None) or ())]))

    def text(self, row: Sequence[int]) -> str:
        """All that the model wrote, special tokens included."""
        return decode(self.tokenizer, row, skip_special_tokens=False)

    def read(self, row: Sequence[int]) -> tuple[str, str | None]:
        """`(answer, thought)` of a row that has ended; the thought is None where there was none."""
        plain = decode(self.tokenizer, row)
        text = self.text(row) if self.hidden.intersection(row) else plain
        cut = spans(text, self.marks)
        if all(span.marks is None for span in cut):
            return plain, None
        answer, at = "", 0
        for span in cut:
            end = len(row) if span is cut[-1] else max(at, self._token_at(row, span.end))
            answer += decode(self.tokenizer, row[at:end]) if span.marks is None else ""
            at = end
        thought = "".join(text[span.start : span.end] for span in cut if span.marks is not None)
        thinks = any(content(text, span).strip() for span in cut if span.marks is not None)
        return without_wrapper(answer), thought if thinks else None

    def breaks_off(self, row: Sequence[int]) -> bool:
        """Whether a row that has ended holds no answer, because its thought goes on to its end."""
        last = spans(self.text(row), self.marks)[-1:]
        return bool(last) and last[0].marks is not None and not last[0].closed and not self.read(row)[0].strip()

    def so_far(self, row: Sequence[int]) -> str | None:
        """The answer of a row that goes on; None while what was written may be a thought."""
        text = self._marked(row)
        begin = answer_begins(text, self.marks)
        if begin is None:
            return None
        if begin == len(text) - len(text.lstrip()):  # no thought came before it
            return decode(self.tokenizer, row)
        return self.read(row)[0]

    def thought_length(self, row: Sequence[int], ends: set[int], inside: Marks | None) -> int | None:
        """How many tokens of a row are thoughts: all before the first one of the answer.

        None while that is not known. `ends` are the tokens that end a turn; one of those ends the thoughts before it.
        `inside` are the marks of the thought that the prompt left open.
        """
        for k, token in enumerate(row):
            if token in ends:
                begin = answer_begins(self.text(row[:k]), self.marks, inside)
                return k if begin is None else self._token_at(row, begin)
        begin = answer_begins(self.text(row), self.marks, inside)
        return None if begin is None else self._token_at(row, begin)

    def closed(self, thought: Sequence[int], inside: Marks | None) -> list[int]:
        """Token ids of a thought, closed if it is not."""
        text = self.text(thought)
        last = spans(text, self.marks, inside)[-1:]
        if last and last[0].marks is not None and not last[0].closed:
            marks, begun = last[0].marks, list(thought)
            return [*begun, *self._encode(marks.closing + marks.after)]
        half = None if inside is not None else growing(text, self.marks)
        if half is not None:  # the budget ended within the opening mark
            return self._encode(half.opening + half.closing + half.after)
        return list(thought)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _marked(self, row: Sequence[int]) -> str:
        """The row's text with its special tokens, if it has any."""
        return self.text(row) if self.hidden.intersection(row) else decode(self.tokenizer, row)

    def _token_at(self, row: Sequence[int], letter: int) -> int:
        """The place of the token that writes a letter of the row's text."""
        low, high = 1, len(row)  # the text of the first tokens only grows with their number
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.text(row[:middle])) > letter else (middle + 1, high)
        return low - 1


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of token ids; those that the tokenizer does not know, which some models can write, are left out."""
    try:
        text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        known = set(tokenizer.get_vocab().values())
        text = tokenizer.decode([i for i in ids if i in known], skip_special_tokens=skip_special_tokens)
    return text
