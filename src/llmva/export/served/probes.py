"""Prompts to which the base and the edited model begin to answer differently, whatever numbers a server computes in.

A server in bfloat16, or of quantised weights, soon writes something else than the same model here. So a probe is a
prompt whose answers part at once, where both models are sure of their words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.models.chat import ChatTemplate, decode
from llmva.models.chat.dialogues import as_turns
from llmva.models.chat.system import with_system
from llmva.models.chat_model import ChatModel
from llmva.models.generate import generate
from llmva.progress import Progress
from llmva.prompts.types import Asked, Prompt, Splits, prefill_of

T = TypeVar("T")
TOKENS = 8  # of an answer that are written, here and by the server
CANDIDATES = 64  # prompts that are answered here
PROBES = 16  # of them that the server is asked at most
MAX_CHARS = 2000  # of a prompt
MIN_GAP = 0.25  # of the two best tokens' logits: rounding may turn what is closer


@dataclass(frozen=True)
class Probe:
    """A prompt as a server is asked it, and how its answer begins without and with the edit.

    No text begins with both beginnings.
    """

    messages: Sequence[Any]  # of /v1/chat/completions
    variables: dict[str, Any]  # of the chat template
    prompt: Prompt
    base: str
    edited: str
    base_answer: str  # TOKENS tokens, for people
    edited_answer: str
    gap: float  # the smallest lead, of both models, of a token in the beginnings over the second best

    def agrees(self, answer: str) -> str:
        """With which model an answer does: "edited", "base" or "neither"."""
        text = answer.lstrip()
        return "edited" if text.startswith(self.edited) else "base" if text.startswith(self.base) else "neither"


@dataclass
class _Leads:
    """Chooses the most likely token, and notes by how much it leads: `of[row][place]`."""

    of: dict[int, dict[int, float]] = field(default_factory=dict)

    def __call__(self, rows: Sequence[int], counts: Sequence[int], logits: Tensor) -> list[int]:
        best, tokens = logits.float().topk(2)
        for row, count, lead in zip(rows, counts, (best[:, 0] - best[:, 1]).tolist(), strict=True):
            self.of.setdefault(row, {})[count] = lead
        chosen: list[int] = tokens[:, 0].tolist()
        return chosen


def candidates(prompts: Splits) -> list[Prompt]:
    """Of both sides as many, where there are; of the validation split first. Test prompts are left for the test."""
    every = [*prompts.validation, *prompts.train]
    usable = [p for p in dict.fromkeys(every) if len(p.text) <= MAX_CHARS and not prefill_of(p.asked)]
    return _of_both_sides(usable, lambda prompt: prompt.benign, CANDIDATES)


def choose_probes(
    model: Any, tokenizer: Any, edit: Edit, prompts: Sequence[Prompt], system: str | None, progress: Progress
) -> list[Probe]:
    """The probes, those on which the models are surest first; of each side as many, where there are.

    Raises LlmvaError where the model has no chat template: then a server asks it in a form of its own.
    """
    template = ChatTemplate.loaded(tokenizer, system)
    if template.text is None:
        raise LlmvaError(
            "The model has no chat template, so every server asks it in a form of its own: put a chat_template.jinja "
            "into the folders of base and server."
        )
    thinking = template.opened[1] is not None  # which no switch turns off on a server
    chat = ChatModel.of(model, tokenizer, system=template.system)
    rows = chat.rows([prompt.asked for prompt in prompts], thinking)
    base, base_leads = _written(chat, rows, progress, "answering as the base")
    with edit.apply(model):
        edited, edited_leads = _written(chat, rows, progress, "answering with the edit")
    probes = []
    for i, prompt in enumerate(prompts):
        texts = [[decode(tokenizer, new[i][:k]).lstrip() for k in range(1, TOKENS + 1)] for new in (base, edited)]
        k = _parted(texts[0], texts[1], min(len(base[i]), len(edited[i])))
        if k is None:
            continue
        gap = min(leads[i][place] for leads in (base_leads, edited_leads) for place in range(k))
        if gap >= MIN_GAP:
            sent = as_sent(template, prompt.asked, thinking)
            probes.append(Probe(*sent, prompt, texts[0][k - 1], texts[1][k - 1], texts[0][-1], texts[1][-1], gap))
    surest = _of_both_sides(sorted(probes, key=_surest_first), lambda probe: probe.prompt.benign, PROBES)
    return sorted(surest, key=_surest_first)


def as_sent(template: ChatTemplate, asked: Asked, thinking: bool) -> tuple[list[Any], dict[str, Any]]:
    """The messages, and the variables of its chat template, from which a server renders what the model reads here."""
    switch, turns = template.switches[0 if thinking else 1], list(as_turns(asked))
    if turns[0]["role"] == "system":
        template, turns = template.with_own_system(turns[0]["content"]), turns[1:]
    messages = with_system(turns, template.system, switch.system, in_message=template.system_in_message)
    return list(messages), dict(switch.variables)


def _written(
    chat: ChatModel, rows: list[list[int]], progress: Progress, title: str
) -> tuple[list[list[int]], dict[int, dict[int, float]]]:
    """The first tokens of each answer, and the lead of each of them."""
    tick, leads = progress.stage(title, len(rows)), _Leads()
    new: list[list[int]] = [[] for _ in rows]
    for i, tokens in generate(chat, rows, [TOKENS] * len(rows), choose=leads):
        new[i] = tokens
        tick(1)
    return new, leads.of


def _parted(base: Sequence[str], edited: Sequence[str], length: int) -> int | None:
    """After how many tokens, of at most `length`, neither text begins with the other; None if they never do."""
    for k in range(1, length + 1):
        one, other = base[k - 1], edited[k - 1]
        whole = "\N{REPLACEMENT CHARACTER}" not in one + other  # else a letter is not all there yet
        if whole and not one.startswith(other) and not other.startswith(one):
            return k
    return None


def _surest_first(probe: Probe) -> float:
    return -probe.gap


def _of_both_sides(items: Sequence[T], benign: Callable[[T], bool], most: int) -> list[T]:
    """At most so many, the first ones of each side; where one side has too few, the other fills up."""
    sides = [[one for one in items if benign(one) == side] for side in (False, True)]
    count = max(most // 2, most - min(map(len, sides)))
    return [one for side in sides for one in side[:count]][:most]
