"""How long answers end, with and without an edit: loops and broken endings, which next tokens do not show.

KL divergence and kept tokens are measured along the original's own short answers, where one wrong token costs one
token. A model that continues by itself may start to loop at token 150, which those metrics cannot see. So some harmless
prompts get long answers, and every answer is checked for loops and for its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from llmva.judges.garbled import why_garbled
from llmva.judges.text import Folder
from llmva.models.chat import AnswerReader, end_tokens
from llmva.models.chat_model import ChatModel
from llmva.models.generate import generate
from llmva.models.reading.context import context_length
from llmva.models.thinking import Thinking, think
from llmva.prompts.types import Asked, text_of
from llmva.statistics import wilson

PROMPTS = 16
LOOP_TIMES = 4  # minimum number of repetitions of the last tokens
LOOP_TOKENS = 24  # minimum number of tokens that they cover: a row of dots or a short refrain is not a loop
SHOWN, SHOWN_LETTERS = 3, 240  # maximum number of examples, and of letters from an answer's end
FAULTS = ("empty", "loop", "broken_off", "unended")
_SENTENCE_END = ".!?。！？؟।…"
_CLOSING = "\"'”’»)]}*_`>|"
_NO_PROSE = re.compile(r"\s*([-*+•#|>`]|\d+[.)]|[A-Za-z][.)]\s)")  # lists, tables, headings, code


@dataclass(frozen=True)
class LongAnswer:
    """`tokens` exclude the end token; `ended` says whether there was one before the limit.

    Thoughts are no part of `text`; `thinking` says whether the limit came while the model was still thinking.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    thinking: bool = False


def compare_endings(
    chat: ChatModel,
    prompts: Sequence[Asked],
    applied: Callable[[], AbstractContextManager[Any]],
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda n: None,
    thinking: Thinking | None = None,
) -> tuple[dict[str, Any], int]:
    """Answer the prompts with up to `max_new_tokens` tokens, untouched and while `applied()` is entered.

    A model that thinks although it is not to, as `thinking` says, has tokens of its own for that.

    Returns the field `endings` of run.json and the number of generated tokens. `on_progress` counts every prompt twice.
    """
    thinking, limit = thinking or Thinking(), context_length(chat.model)
    if limit is not None:
        max_new_tokens = max(1, min(max_new_tokens, limit - max(map(len, chat.rows(prompts))) - thinking.room))
    before = _long_answers(chat, prompts, max_new_tokens, thinking, on_progress)
    with applied():
        after = _long_answers(chat, prompts, max_new_tokens, thinking, on_progress)
    old = [fault(answer) for answer in before]
    new = [fault(answer) for answer in after]
    # an answer that reaches the limit is faulty only if the original's answer ended
    was_wrong = [one is not None and one != "unended" for one in old]
    is_wrong = [one is not None and (one != "unended" or first.ended) for one, first in zip(new, before, strict=True)]
    examples = [
        {"prompt": text_of(prompts[i]), "fault": new[i], "before": _end(before[i].text), "after": _end(after[i].text)}
        for i in range(len(prompts))
        if is_wrong[i] and not was_wrong[i]
    ]
    record = {
        "n": len(prompts),
        "tokens": max_new_tokens,
        "before": _tally(old, was_wrong),
        "after": _tally(new, is_wrong),
        "examples": examples[:SHOWN],
    }
    return record, sum(len(answer.tokens) for answer in (*before, *after))


def fault(answer: LongAnswer) -> str | None:
    """The first of `FAULTS` that an answer has.

    empty: no words. loop: it repeats itself, or is no language. unended: it had not ended at the limit. broken_off: the
    model ended it in the middle of a sentence, a bracket or a block of code.
    """
    if answer.thinking:
        return "unended"
    reason = why_garbled(Folder().view(answer.text))
    if reason in ("empty", "no words"):
        return "empty"
    if reason or loops(answer.tokens):
        return "loop"
    if not answer.ended:
        return "unended"
    return "broken_off" if breaks_off(answer.text) else None


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last tokens repeat the tokens just before them (LOOP_TIMES, LOOP_TOKENS)."""
    n = len(tokens)
    for period in range(1, n // LOOP_TIMES + 1):
        run = period
        while run < n and tokens[n - 1 - run] == tokens[n - 1 - run + period]:
            run += 1
        if run >= max(LOOP_TIMES * period, LOOP_TOKENS):
            return True
    return False


def breaks_off(text: str) -> bool:
    """Whether an ended text stops in the middle. Only signs decide, so it works in any language.

    Prose should end with the end of a sentence. Text without a finished sentence ("42", a title, a list) may end in any
    way, except with a sign that needs a continuation.
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return True
    bare = text.rstrip(_CLOSING)
    if text and text[-1] in ",;:([{-–—、，；：（":
        return True
    last_line = text.rsplit("\n", 1)[-1]
    prose = any(sign in text[:-1] for sign in _SENTENCE_END) and not _NO_PROSE.match(last_line)
    return prose and bool(bare) and bare == text and bare[-1].isalnum()


def _long_answers(
    chat: ChatModel,
    prompts: Sequence[Asked],
    max_new_tokens: int,
    thinking: Thinking,
    on_progress: Callable[[int], None],
) -> list[LongAnswer]:
    rows = think(chat, prompts, thinking, max_new_tokens).rows if thinking.anyway else chat.rows(prompts)
    answers, ending = dict[int, LongAnswer](), end_tokens(chat.model, chat.tokenizer)
    for i, new in generate(chat, rows, [max_new_tokens] * len(rows)):
        answers[i] = _answer(chat.reader, new, ending)
        on_progress(1)
    return [answers[i] for i in range(len(rows))]


def _answer(reader: AnswerReader, row: Sequence[int], ending: set[int]) -> LongAnswer:
    end = next((i for i, token in enumerate(row) if token in ending), len(row))
    text, thought = reader.read(row[:end])
    thinking = thought is not None and end == len(row) and reader.breaks_off(row)
    return LongAnswer(text, tuple(row[:end]), end < len(row), thinking)


def _tally(faults: Sequence[str | None], wrong: Sequence[bool]) -> dict[str, Any]:
    counts: dict[str, Any] = {name: faults.count(name) for name in FAULTS}
    return {"faulty": sum(wrong), "faulty_interval": wilson(sum(wrong), len(wrong)), **counts}


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"…{text[-SHOWN_LETTERS:]}"
