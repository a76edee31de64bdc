"""What every method is measured by: the same test prompts, harmless text, skills and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmva.evaluation.skills import Probe, measure_skills
from llmva.judges.base import Judge
from llmva.method.observe import Observation, observe
from llmva.metrics.rates import point_rates
from llmva.models.batching import Batching
from llmva.models.chat import encode, input_device, pad_left, render
from llmva.models.generate import generate_greedily
from llmva.models.harmless import agreement
from llmva.models.sublayers import Decoder
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt

Applied = Callable[[], AbstractContextManager[Any]]  # a method's hooks are on the model while it is entered
HARMLESS_TEXTS = 128
TIMED_PROMPTS, TIMED_TOKENS, TIMED_ROUNDS = 8, 24, 3


@dataclass
class Bench:
    """One model with the prompts, judge and probes that all methods meet."""

    decoder: Decoder
    tokenizer: Any
    prompts: PromptSet
    judge: Judge
    batching: Batching
    max_new_tokens: int
    skills: Sequence[Probe] = ()
    progress: Progress = field(default_factory=Progress)

    def observe(self, prompts: Sequence[Prompt], what: str) -> Observation:
        """Answers of the model as it is now."""
        return observe(
            self.decoder,
            self.tokenizer,
            prompts,
            self.judge,
            max_new_tokens=self.max_new_tokens,
            batching=self.batching,
            on_progress=self.progress.stage(what, len(prompts)),
        )

    def measure(self, what: str, applied: Applied, harmless: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Figures on the test prompts with a method applied.

        Args:
            harmless: (prompt, the untouched model's answer) to compare next tokens on; none before these are known.

        Returns:
            f1, asr, orr, garbled; kept, kl, perplexity (a ratio) on `harmless`; latency (time of a generated token
            over the untouched model's); skills; labels and answers, in the order of the test prompts.
        """
        with applied():
            seen = self.observe(self.prompts.test, f"{what}: test prompts")
            skills = self._skills(what)
        found: dict[str, Any] = {**point_rates(seen.prompts, seen.labels), "kept": None, "kl": None, "perplexity": None}
        if harmless:
            on_progress = self.progress.stage(f"{what}: comparing harmless text", len(harmless))
            compared = agreement(self.decoder, self.tokenizer, harmless, applied, self.batching, on_progress)
            found |= {"kept": compared.mean_kept, "kl": compared.mean_kl, "perplexity": compared.perplexity_ratio}
        return {
            **found,
            "latency": self._latency(applied),
            "skills": skills,
            "labels": [label.value for label in seen.labels],
            "answers": seen.capture.answers,
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
        found = measure_skills(self.decoder, self.tokenizer, self.skills, self.batching, on_progress)
        return {name: row["right"] for name, row in found.items()}

    def _latency(self, applied: Applied) -> float:
        """Best of some rounds, with and without in turn, so that other work on the machine spoils neither alone."""
        longest = sorted(self.prompts.test, key=lambda prompt: len(prompt.text))[-TIMED_PROMPTS:]
        rows = [encode(self.tokenizer, render(self.tokenizer, prompt.text)) for prompt in longest]
        ids, mask = pad_left(rows, self.tokenizer.pad_token_id, input_device(self.decoder.model))

        def seconds() -> float:
            started = time.perf_counter()
            generate_greedily(self.decoder.model, self.tokenizer, ids, mask, TIMED_TOKENS, min_new_tokens=TIMED_TOKENS)
            if ids.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - started

        without, with_it = [], []
        with torch.inference_mode():
            for _ in range(TIMED_ROUNDS):
                without.append(seconds())
                with applied():
                    with_it.append(seconds())
        return min(with_it) / min(without)
