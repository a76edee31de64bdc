"""Measure a model on given prompts, untouched and with an edit, in the form that a run's test figures have."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llmva.edit import Edit
from llmva.evaluation.final import endings, utility
from llmva.judges.base import Judge
from llmva.method.observe import Observation, harmless_answers, observe
from llmva.metrics.rates import summarise
from llmva.models.batching import first_guess
from llmva.models.harmless import agreement
from llmva.models.sublayers import find_decoder
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.types import Prompt
from llmva.runs.run import peak_bytes
from llmva.settings import check_seed


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    edit: Edit | None = None,
    seed: int = 42,
    max_new_tokens: int = 128,
    batch_tokens: int | None = None,
    endings_tokens: int = 256,
    thinking: str = "off",
    thinking_tokens: int = 512,
    progress: Progress | None = None,
    parts: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """ASR, ORR and F1 on exactly `prompts`: `{"test": {"before": ..., "after": ...}, "utility": ..., "cost": ...}`.

    "after" and "utility" are there only with an edit. `parts` asks for the same of prompts from one position up to
    another, by name; it is in "parts" then. `endings_tokens` is the length of the answers that are checked for loops
    and broken endings; 0 checks none. `thinking` and `thinking_tokens`: as in `llmva.settings.Settings`.
    """
    started = time.monotonic()
    check_seed(seed)
    progress = progress or Progress()
    decoder = find_decoder(model)
    if edit is not None:
        edit.apply(model).remove()  # an edit of another model is told before the original's answers are waited for
    batching = first_guess(model, batch_tokens)
    thoughts = Thinking.asked(tokenizer, thinking, thinking_tokens)

    def run(label: str) -> Observation:
        on_progress = progress.stage(f"answering, {label}", len(prompts))
        return observe(
            decoder,
            tokenizer,
            prompts,
            judge,
            max_new_tokens=max_new_tokens,
            thinking=thoughts,
            batching=batching,
            on_progress=on_progress,
        )

    def figures(name: str, seen: Observation) -> None:
        found["test"][name] = summarise(seen.prompts, seen.labels, seed=seed)
        for part, (start, end) in (parts or {}).items():
            of_part = summarise(seen.prompts[start:end], seen.labels[start:end], seed=seed)
            found.setdefault("parts", {}).setdefault(part, {})[name] = of_part

    found: dict[str, Any] = {"test": {}}
    before = run("original")
    figures("before", before)
    tokens = before.capture.tokens
    if edit is not None:
        with edit.apply(model, check=False):
            after = run("edited")
        tokens += after.capture.tokens
        figures("after", after)
        texts = harmless_answers(before.prompts, before.labels, before.capture.answers)
        if texts:
            on_progress = progress.stage("comparing harmless text", len(texts))
            compared = agreement(
                decoder, tokenizer, texts, partial(edit.apply, model, check=False), batching, on_progress
            )
            found["utility"] = utility(compared, seed)
            if endings_tokens:
                found["utility"]["endings"], more = endings(
                    decoder, tokenizer, texts, edit, endings_tokens, batching, progress
                )
                tokens += more
    found["cost"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak_bytes(),
        "generated_tokens": tokens,
    }
    return found
