"""Models that think before they answer: let them, or see that no thought is taken for an answer.

What such a model decides, it decides while it thinks. So where it is let think, the row that a capture reads, and that
the answer follows, is the prompt with the model's own thoughts up to and including the mark that closes them. A model
that does not close them within its budget has them closed, as those who serve such models do.

Where thinking is off, captures are read at the end of the prompt. Some models think nevertheless; then they are given
the same budget for it, and the answer is what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llmva.errors import UsageError
from llmva.models.at_rest import reads_model
from llmva.models.chat import end_tokens
from llmva.models.chat.marks import Marks, content, spans
from llmva.models.chat_model import ChatModel
from llmva.models.generate import (
    CHECK_EVERY,
    Capture,
    answer_prompts,
    generate,
)
from llmva.models.reading.context import check_rows, context_length
from llmva.models.reading.sampling import Choose, Sampling, greedy
from llmva.progress import Progress
from llmva.prompts.types import Asked, prefill_of

TOKENS = 512  # of thoughts, by default
TRIED = 4  # prompts that are answered to see whether and how a model thinks
OPENING = 64  # tokens of an answer that show whether it opens with a thought
CLOSING = 128  # tokens in which a model goes on with a thought that its template has closed
MIN_ROOM = 16  # tokens of context for thoughts, below which a prompt counts as too long
MARGIN = 24  # tokens of context for a closing mark that has to be written
ROOM = MIN_ROOM + MARGIN
STEP = 8  # budgets of prompts with little room are multiples of it, so that many can go through the model at once


@dataclass(frozen=True)
class Thinking:
    """Whether a model is let think (`on`), or does so although it is not (`anyway`), in at most `tokens` tokens.

    `inside` are the marks of the thought that every answer begins in, where the prompt opens it. `form` is how a reader
    is told the marks that were seen.
    """

    on: bool = False
    anyway: bool = False
    tokens: int = TOKENS
    inside: Marks | None = None
    form: str = field(default="", compare=False)

    @property
    def any(self) -> bool:
        """Whether answers come after thoughts."""
        return self.on or self.anyway

    @property
    def off(self) -> Thinking:
        """The same with the model not let think, for what is measured so in any case."""
        return Thinking(tokens=self.tokens) if self.on else self

    @property
    def room(self) -> int:
        """Tokens of context that a prompt must leave for thoughts, beside an answer."""
        return ROOM if self.any else 0


def prove_thinking(
    chat: ChatModel, mode: str, tokens: int, prompts: Sequence[Asked], progress: Progress | None = None
) -> Thinking:
    """How the model thinks under the setting `thinking`, "end" or "off", seen in its answers to the first prompts.

    `progress` is told of a model that thinks although it is not to.

    Raises UsageError where thoughts are wanted and the model writes none that can be told from its answer.
    """
    on = mode == "end"
    inside = chat.template.opened[0] if on else None
    asked = Thinking(on=on, tokens=tokens, inside=inside)
    budget = tokens if on else CLOSING if chat.template.closes else OPENING
    rows = [chat.row(asked, thinking=on) for asked in prompts[:TRIED]]
    limit = context_length(chat.model)
    if limit is not None:
        rows = [row for row in rows if len(row) + MIN_ROOM < limit]
        budget = min([budget, *(limit - len(row) for row in rows)])
    seen = _first_thoughts(chat, rows, budget, inside) if rows else []
    headless = next((marks for marks, opened in seen if not opened), None)
    form = f"“{seen[0][0].opening.strip()} … {seen[0][0].closing.strip()}”" if seen else ""
    if not on:
        if seen and progress is not None:
            progress.note(
                f"the model thinks although thinking is off ({form}): its thoughts are cut before judging; --thinking "
                "end reads it where they end"
            )
        return replace(asked, anyway=bool(seen), inside=headless, form=form)
    if rows and not seen:
        block = "has no thinking block to wait for" if _silent(chat) else "offers thinking, and the model did not think"
        raise UsageError(
            f"The model's chat template {block}: its answers to the first prompts begin with no thought that can be "
            "told from the rest; leave --thinking off."
        )
    if seen and progress is not None:
        progress.note(f"the model thinks: its thoughts are told from its answers by {form}")
    return replace(asked, inside=inside or headless, form=form)


def _silent(chat: ChatModel) -> bool:
    """Whether nothing in the template tells of thoughts."""
    text = chat.template.text or ""
    switches = any(switch.variables or switch.system for switch in chat.template.switches)
    return not switches and not any(one.open.search(text) or one.close.search(text) for one in chat.template.marks)


def _first_thoughts(
    chat: ChatModel, rows: list[list[int]], budget: int, inside: Marks | None
) -> list[tuple[Marks, bool]]:
    """Of the answers that begin with a thought: its marks, and whether its opening was seen.

    A thought that the model ends its turn in, without ever closing it, is none: so ends an answer without thoughts to a
    prompt that opens one.
    """
    reader, ends = chat.reader, end_tokens(chat.model, chat.tokenizer)

    def end(new: list[int]) -> int | None:
        return len(new) if len(spans(reader.text(new), reader.marks, inside)) > 1 else None

    seen = []
    for _, row in sorted(generate(chat, rows, [budget] * len(rows), end)):
        last = next((k for k, token in enumerate(row) if token in ends), None)
        text = reader.text(row[:last])
        begin = spans(text, reader.marks, inside)[:1]
        if not begin or begin[0].marks is None:
            continue
        unclosed = inside is not None and last is not None and not begin[0].closed
        if unclosed or (inside is None and not content(text, begin[0]).strip()):
            continue
        at = len(text) - len(text.lstrip())
        seen.append((begin[0].marks, inside is not None or begin[0].marks.open.match(text, at) is not None))
    return seen


# -- answers -----------------------------------------------------------------------------------------------------


def answer_after_thoughts(
    chat: ChatModel,
    prompts: Sequence[Asked],
    *,
    max_new_tokens: int,
    thinking: Thinking,
    settled: Callable[[str], bool] = lambda answer: False,
    on_progress: Callable[[int], None] = lambda n: None,
    captures: bool = True,
    sampling: Sampling | None = None,
) -> Capture:
    """`answer_prompts` of a model that may think: answers hold no thoughts, which are in `thoughts`.

    Captures are read where the thoughts end, if the model is let think, else at the end of the prompt; `captures` is
    False if they are not needed. `sampling` draws the tokens of thoughts and answers; None takes the most likely ones.

    Raises:
        UsageError: a prompt that does not fit into the model's context, with thoughts and an answer.
    """
    choose = sampling or greedy
    if thinking.on:
        thoughts = think(chat, prompts, thinking, max_new_tokens, sampling.of_thoughts() if sampling else greedy)
        captured = answer_prompts(
            chat,
            prompts,
            max_new_tokens=max_new_tokens,
            settled=settled,
            rows=thoughts.rows,
            on_progress=on_progress,
            captures=captures,
            choose=choose,
        )
        unclosed = _either(thoughts.unclosed, captured.unclosed)
        return replace(
            captured, tokens=captured.tokens + thoughts.tokens, thoughts=thoughts.texts, unclosed=_if_any(unclosed)
        )
    if thinking.anyway and any(map(prefill_of, prompts)):
        raise UsageError(
            "The model thinks before it answers, even with thinking off, so no beginning of an answer can be given to "
            "it: leave out prompts whose last message is the assistant's."
        )
    captured = answer_prompts(
        chat,
        prompts,
        max_new_tokens=0 if thinking.anyway else max_new_tokens,
        settled=settled,
        on_progress=(lambda n: None) if thinking.anyway else on_progress,
        captures=captures,
        choose=choose,
    )
    began = captured.thoughts or [""] * len(prompts)
    thinkers = [
        i for i in range(len(prompts)) if thinking.anyway or (began[i] and _has_room(chat, prompts[i], max_new_tokens))
    ]
    if not thinkers:
        return captured
    # a thought has taken an answer's tokens: it is thought again with tokens of its own
    asked = [prompts[i] for i in thinkers]
    again = sampling.at(thinkers) if sampling else None
    thoughts = think(chat, asked, thinking, max_new_tokens, again.of_thoughts() if again else greedy)
    after = answer_prompts(
        chat,
        asked,
        max_new_tokens=max_new_tokens,
        settled=settled,
        rows=thoughts.rows,
        on_progress=on_progress if thinking.anyway else lambda n: None,
        captures=False,
        choose=again or greedy,
    )
    answers, texts = list(captured.answers), list(began)
    unclosed = list(captured.unclosed or [False] * len(prompts))
    never = _either(thoughts.unclosed, after.unclosed)
    for i, answer, text, one in zip(thinkers, after.answers, thoughts.texts, never, strict=True):
        answers[i], texts[i], unclosed[i] = answer, text, one
    tokens = captured.tokens + thoughts.tokens + after.tokens
    return replace(
        captured,
        answers=answers,
        tokens=tokens,
        thoughts=texts if any(texts) else None,
        unclosed=_if_any(unclosed),
    )


def _either(one: list[bool], other: list[bool] | None) -> list[bool]:
    return [a or b for a, b in zip(one, other, strict=True)] if other else one


def _if_any(flags: list[bool]) -> list[bool] | None:
    return flags if any(flags) else None


def _has_room(chat: ChatModel, prompt: Asked, max_new_tokens: int) -> bool:
    limit = context_length(chat.model)
    return limit is None or len(chat.row(prompt)) + max_new_tokens + ROOM <= limit


@dataclass(frozen=True)
class Thoughts:
    """A model's thoughts about each prompt."""

    rows: list[list[int]]  # token ids of the prompt with the thoughts, block closed: what the answer follows
    texts: list[str]  # the thoughts alone, with their marks
    unclosed: list[bool]  # whether the model did not close them: the mark at the end is ours
    tokens: int  # generated


@reads_model
def think(
    chat: ChatModel, prompts: Sequence[Asked], thinking: Thinking, max_new_tokens: int = 0, choose: Choose = greedy
) -> Thoughts:
    """Let the model think about each prompt, greedily by default, in no more tokens than its context has room for.

    Raises UsageError for a prompt that does not fit into the model's context with an answer of `max_new_tokens`.
    """
    reader, inside = chat.reader, thinking.inside
    rows = chat.rows(prompts, thinking=thinking.on)
    check_rows(chat.model, prompts, rows, max_new_tokens + ROOM)
    limit = context_length(chat.model)
    rooms = [thinking.tokens if limit is None else limit - len(row) - max_new_tokens - MARGIN for row in rows]
    budgets = [min(thinking.tokens, room // STEP * STEP) for room in rooms]
    ends = end_tokens(chat.model, chat.tokenizer)
    thought_rows: list[list[int]] = [[] for _ in rows]
    unclosed = [False] * len(rows)
    spent = 0

    def end(new: list[int]) -> int | None:
        return None if len(new) % CHECK_EVERY else reader.thought_length(new, ends, inside)

    for i, new in generate(chat, rows, budgets, end, choose=choose):
        thought = new[: reader.thought_length(new, ends, inside)]
        thought_rows[i] = reader.closed(thought, inside)
        unclosed[i] = thought_rows[i] != thought
        spent += len(thought)
    texts = [reader.text(thought) for thought in thought_rows]
    whole = [[*row, *thought] for row, thought in zip(rows, thought_rows, strict=True)]
    return Thoughts(whole, texts, unclosed, spent)
