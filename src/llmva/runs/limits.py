"""What a reader of any figure must know of the model and its prompts: told in the log, and kept among `limits`.

Every command that measures a model asks here, so that none is silent on what another tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.method.observe import Observation
from llmva.models.chat import special_in_text
from llmva.models.chat_model import ChatModel
from llmva.models.thinking import Thinking, prove_thinking
from llmva.progress import Progress
from llmva.prompts.types import Asked, Prompt


@dataclass(frozen=True)
class Tally:
    """Of so many `answers`, how many came after thoughts, and how many after thoughts that were never closed."""

    answers: int = 0
    thoughts: int = 0
    unclosed: int = 0

    @classmethod
    def of_seen(cls, *seen: Observation) -> Tally:
        """Of observations."""
        return cls(sum(len(s.prompts) for s in seen), sum(s.thoughts for s in seen), sum(s.unclosed for s in seen))

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Tally:
        """Of rows of answers.jsonl."""
        return cls(len(rows), sum(bool(row.get("thought")) for row in rows), sum("unclosed" in row for row in rows))

    @classmethod
    def of_cells(cls, cells: Iterable[Mapping[str, Any]]) -> Tally:
        """Of finished parts of a study, whose answers have `labels` and, if the model thought, `counts`."""
        cells = list(cells)
        thoughts, unclosed = (sum(cell.get(name, 0) for cell in cells) for name in ("thoughts", "unclosed"))
        return cls(sum(len(cell["labels"]) for cell in cells), thoughts, unclosed)

    def counts(self) -> dict[str, int]:
        """What a cell keeps; nothing of a model that does not think."""
        return {name: n for name, n in (("thoughts", self.thoughts), ("unclosed", self.unclosed)) if n}


def prove_model(
    chat: ChatModel, mode: str, tokens: int, prompts: Sequence[Asked], progress: Progress | None = None
) -> Thinking:
    """How the model thinks, as `prove_thinking`; `progress` is told what is odd about the model and its template."""
    for note in (*chat.template.notes, *chat.limits):
        if progress is not None:
            progress.note(note)
    return prove_thinking(chat, mode, tokens, prompts, progress)


def notes_on_prompts(chat: ChatModel, prompts: Sequence[Prompt]) -> list[str]:
    """Sentences on how the model reads these prompts: special tokens in texts, and system messages of conversations."""
    notes = special_in_text(chat.tokenizer, [prompt.text for prompt in prompts])
    own = [prompt.messages[0].content for prompt in prompts if prompt.messages and prompt.messages[0].role == "system"]
    if own and chat.template.system is not None:
        notes.append(f"{len(own):,} prompts have a system message of their own, which took the system prompt's place.")
    if own and chat.template.system is None:  # with a system prompt, the template's limits tell
        notes += [limit for limit in chat.template.with_own_system(own[0]).limits if limit not in chat.template.limits]
    return notes


def limits_of(
    chat: ChatModel, warnings: Sequence[str] = (), thinking: Thinking | None = None, tally: Tally | None = None
) -> list[str]:
    """The sentences of a record.

    Args:
        warnings: what reading the prompts guessed or left out.
        thinking, tally: how the model thinks, and how often it did; None before that is known.
    """
    return [*chat.limits, *warnings, *thinking_limits(thinking or Thinking(), tally or Tally())]


def thinking_limits(thinking: Thinking, tally: Tally) -> list[str]:
    """The sentences on thoughts."""
    sentences = []
    if tally.thoughts and thinking.on:
        sentences.append(
            f"The model was let think, and did before {tally.thoughts} of {tally.answers} answers; its thoughts are "
            f"told from answers by {thinking.form}."
        )
    elif tally.thoughts:
        by = f" ({thinking.form})" if thinking.form else ""
        sentences.append(
            f"The model thought before {tally.thoughts} of {tally.answers} answers although thinking was off{by}: the "
            "thoughts were cut before judging, captures are from before them, and harmless text is compared as if the "
            "answers came without them. --thinking end reads the model where its thoughts end."
        )
    if tally.unclosed:
        share = 100 * tally.unclosed / tally.answers
        sentences.append(
            f"The model never closed its thought before {tally.unclosed} of {tally.answers} answers ({share:.1f}%): "
            f"it was cut after at most {thinking.tokens} tokens, and what followed was judged. A larger "
            "--thinking-tokens lets the model end it."
        )
    return sentences
