"""Measure every method in the same way: test prompts, harmless text, skills and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmva.evaluation.skills import Probe, measure_skills
from llmva.judges.base import Judge
from llmva.method.context import Texts
from llmva.method.observe import Observation, observe
from llmva.metrics.rates import point_rates
from llmva.models.chat_model import ChatModel
from llmva.models.generate import generate_greedily
from llmva.models.harmless import agreement
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.runs.limits import Tally, prove_model
from llmva.settings import Settings

Applied = Callable[[], AbstractContextManager[Any]]  # a context with a method's hooks on the model
HARMLESS_TEXTS = 128
TIMED_PROMPTS, TIMED_TOKENS, TIMED_ROUNDS = 8, 24, 7


@dataclass
class ExperimentSetup:
    """One model with the prompts, judge and probes that all methods share."""

    chat: ChatModel
    prompts: PromptSet
    judge: Judge
    max_new_tokens: int
    skills: Sequence[Probe] = ()
    progress: Progress = field(default_factory=Progress)
    thinking: Thinking = field(default_factory=Thinking)
    timed: bool = True  # measure the latency, which says little where other processes work on the same machine

    @classmethod
    def of(
        cls,
        chat: ChatModel,
        prompts: PromptSet,
        judge: Judge,
        settings: Settings,
        skills: Sequence[Probe],
        progress: Progress,
    ) -> ExperimentSetup:
        """The setup with what the model's first answers show of its thinking, which the user is told."""
        texts = [prompt.asked for prompt in prompts.train]
        thinking = prove_model(chat, settings.thinking, settings.thinking_tokens, texts, progress)
        return cls(chat, prompts, judge, settings.max_new_tokens, skills, progress, thinking)

    def observe(self, prompts: Sequence[Prompt], stage: str) -> Observation:
        """Answers of the current model; `stage` is the text of the progress bar."""
        return observe(
            self.chat,
            prompts,
            self.judge,
            max_new_tokens=self.max_new_tokens,
            thinking=self.thinking,
            on_progress=self.progress.stage(stage, len(prompts)),
        )

    def measure(self, what: str, applied: Applied, harmless: Texts) -> dict[str, Any]:
        """Rates on the test prompts with a method applied.

        Args:
            harmless: (prompt, the untouched model's answer), for the comparison of next tokens; may be empty.

        Returns:
            f1, asr, orr, garbled; kept, kl, perplexity (a ratio) on `harmless`; latency (time per generated
            token divided by the untouched model's, the median of several rounds) and latency_range (the lowest and
            the highest of them), both None unless `timed`; skills; labels and answers, in the order of the test
            prompts; thoughts and unclosed, numbers of answers, of a model that thinks.
        """
        with applied():
            seen = self.observe(self.prompts.test, f"{what}: test prompts")
            skills = self._skills(what)
        on_progress = self.progress.stage(f"{what}: comparing harmless text", len(harmless))
        return {
            **point_rates(seen.prompts, seen.labels),
            **agreement(self.chat, harmless, applied, on_progress).as_record(),
            **(self._latency(applied) if self.timed else {"latency": None, "latency_range": None}),
            "skills": skills,
            "labels": [label.value for label in seen.labels],
            "answers": seen.capture.answers,
            **Tally.of_seen(seen).counts(),
        }

    def strengths(self, what: str, applied: Callable[[float], Applied], strengths: Sequence[float]) -> list[Any]:
        """f1, asr and orr on the validation prompts along the strength of a method."""
        rows = []
        for strength in strengths:
            with applied(strength)():
                seen = self.observe(self.prompts.validation, f"{what}: strength {strength}")
            rows.append({"strength": strength, **point_rates(seen.prompts, seen.labels)})
        return rows

    def _skills(self, what: str) -> dict[str, float]:
        on_progress = self.progress.stage(f"{what}: skills", len(self.skills))
        shares = measure_skills(self.chat, self.skills, on_progress, self.thinking.off)
        return {name: row["right"] for name, row in shares.items()}

    def _latency(self, applied: Applied) -> dict[str, Any]:
        """Rounds alternately without and with the method, so that other work affects both."""
        longest = sorted(self.prompts.test, key=lambda prompt: len(prompt.text))[-TIMED_PROMPTS:]
        ids, mask = self.chat.pad(self.chat.rows([prompt.asked for prompt in longest]))

        def seconds() -> float:
            started = time.perf_counter()
            generate_greedily(
                self.chat.model, self.chat.tokenizer, ids, mask, TIMED_TOKENS, min_new_tokens=TIMED_TOKENS
            )
            if ids.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - started

        ratios = []
        with torch.inference_mode():
            seconds()  # the first round is always slower
            for _ in range(TIMED_ROUNDS):
                without = seconds()
                with applied():
                    ratios.append(seconds() / without)
        return {"latency": statistics.median(ratios), "latency_range": [min(ratios), max(ratios)]}
