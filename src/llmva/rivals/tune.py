"""Choose a rival's options on validation prompts, for a given number of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Judge, Label
from llmva.metrics import quick
from llmva.models.batching import Batching
from llmva.models.sublayers import Decoder
from llmva.observation import observe
from llmva.progress import Progress
from llmva.prompts.types import Prompt
from llmva.rivals import make_rival
from llmva.rivals.base import STRENGTH, Steering


def tune(
    name: str,
    decoder: Decoder,
    tokenizer: Any,
    fit: tuple[Sequence[Prompt], Sequence[Label]],
    validation: Sequence[Prompt],
    judge: Judge,
    *,
    budget: int,
    max_new_tokens: int,
    batching: Batching,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options of the rival's grid with the best F1 on `validation`, ties to the earlier, and every one tried.

    The grid begins with the paper's settings and goes on until `budget` answers are spent. Where only the strength
    differs the fit is reused. Each fit begins with the state that `generator` has now, so it is the one that
    `make_rival(name, **options).fit` makes with a generator in that state.

    Args:
        fit: prompts to fit on, and what the untouched model did with them.

    Returns:
        options, and rows with `options`, `f1`, `asr` and `orr` in the order tried. Where a variant could not be
        fitted the figures are None and `error` says why; it costs no answers.

    Raises:
        UsageError: a budget that is not enough for the validation prompts once, or a side without prompts.
        LlmvaError: no variant could be fitted.
    """
    if len({prompt.benign for prompt in validation}) < 2:
        raise UsageError("Tuning needs benign and toxic validation prompts: add those that are missing.")
    if budget < len(validation):
        raise UsageError(
            f"Tuning may cost {budget} answers, fewer than the {len(validation)} validation prompts: raise the budget."
        )
    progress = progress or Progress()
    start = generator.get_state()
    fits: dict[str, Steering | LlmvaError] = {}  # by all options but the strength
    fitted: dict[str, float] = {}  # at which strength
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    tries = budget // len(validation)
    for options in make_rival(name).grid():
        if len(measured) == tries:
            break
        key = repr({option: value for option, value in options.items() if option != STRENGTH})
        if key not in fits:
            same = torch.Generator(generator.device)
            same.set_state(start)
            fitted[key] = options[STRENGTH]
            try:
                fits[key] = make_rival(name, **options).fit(decoder, tokenizer, *fit, batching=batching, generator=same)
            except LlmvaError as error:  # such as a model that refuses nothing, for a variant that learns from refusals
                fits[key] = error
        steering = fits[key]
        if isinstance(steering, LlmvaError):
            rows.append({"options": options, "f1": None, "asr": None, "orr": None, "error": str(steering)})
            continue
        advance = progress.stage(f"{name}: tuning, {len(measured) + 1} of at most {tries}", len(validation))
        with steering.scaled(options[STRENGTH] / fitted[key]).applied(decoder):
            seen = observe(
                decoder,
                tokenizer,
                validation,
                judge,
                max_new_tokens=max_new_tokens,
                batching=batching,
                advance=advance,
            )
        figures = quick(seen.prompts, seen.labels)
        rows.append({"options": options, **{figure: figures[figure] for figure in ("f1", "asr", "orr")}})
        measured.append(rows[-1])
    if not measured:
        raise LlmvaError(rows[0]["error"])
    best = max(measured, key=lambda row: -1.0 if row["f1"] is None else row["f1"])  # the first of equals
    return dict(best["options"]), rows
