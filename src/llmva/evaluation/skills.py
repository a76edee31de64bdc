"""Probes with known answers: other abilities of the model, measured before and after an edit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmva.errors import UsageError
from llmva.models.chat_model import ChatModel
from llmva.models.thinking import Thinking, answer_after_thoughts

PROBE_TOKENS = 32  # maximum length of an answer; known answers are short


@dataclass(frozen=True)
class Probe:
    """A prompt of one skill. An answer is right if it begins with `expected`, or has every word of `contains`.

    Case and punctuation are ignored.
    """

    skill: str
    prompt: str
    expected: str | None = None
    contains: tuple[str, ...] = ()

    def right(self, answer: str) -> bool:
        words = _words(answer)
        if self.expected is not None:
            wanted = _words(self.expected)
            return words[: len(wanted)] == wanted
        return set(_words(" ".join(self.contains))) <= set(words)


def load_probes(path: Path) -> list[Probe]:
    """Read a JSONL file with the fields of `Probe`. Raises UsageError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The skills file '{path}' cannot be read: give a UTF-8 JSONL file.") from error
    probes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            probe = Probe(row["skill"], row["prompt"], row.get("expected"), tuple(row.get("contains") or ()))
            texts = [probe.skill, probe.prompt, probe.expected or "", *probe.contains]
            if isinstance(row.get("contains"), str) or not all(isinstance(text, str) for text in texts):
                raise ValueError("not text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"Line {number} of '{path}' is no probe: give skill, prompt and expected or contains."
            ) from error
        if probe.right(""):  # any answer would be right
            raise UsageError(f"Line {number} of '{path}' has words in neither expected nor contains: add some.")
        probes.append(probe)
    if not probes:
        raise UsageError(f"The skills file '{path}' holds no probes: give one JSON object a line.")
    return probes


def measure_skills(
    chat: ChatModel,
    probes: Sequence[Probe],
    on_progress: Callable[[int], None] = lambda n: None,
    thinking: Thinking | None = None,
) -> dict[str, dict[str, float]]:
    """Share of right answers per skill: `{skill: {"right": share, "n": probes}}`. Thoughts are no part of an answer."""
    if not probes:
        return {}
    captured = answer_after_thoughts(
        chat,
        [probe.prompt for probe in probes],
        max_new_tokens=PROBE_TOKENS,
        thinking=thinking or Thinking(),
        on_progress=on_progress,
        captures=False,
    )
    results: dict[str, list[bool]] = {}
    for probe, answer in zip(probes, captured.answers, strict=True):
        results.setdefault(probe.skill, []).append(probe.right(answer))
    return {skill: {"right": sum(r) / len(r), "n": len(r)} for skill, r in results.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
