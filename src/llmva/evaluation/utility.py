"""The field `utility` of run.json: what an edit does to harmless text (next tokens, perplexity, long answers)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from llmva.edit import Edit
from llmva.evaluation.endings import PROMPTS, compare_endings
from llmva.models.chat_model import ChatModel
from llmva.models.harmless import agreement
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.types import Asked

Texts = Sequence[tuple[Asked, str]]  # harmless (prompt, answer) of the untouched model


def measure_utility(
    chat: ChatModel,
    edit: Edit,
    texts: Texts,
    *,
    endings_tokens: int,
    seed: int,
    progress: Progress,
    thinking: Thinking | None = None,
) -> tuple[dict[str, Any], int]:
    """The field `utility`, without skills, and the number of tokens generated for long answers.

    Args:
        texts: at least one.
        endings_tokens: maximum length of the answers that are checked for loops and broken endings; 0 checks none.
        seed: of the bootstrap intervals.
        thinking: how the model thinks, before long answers.
    """
    applied = partial(edit.apply, chat.model, check=False)
    compared = agreement(chat, texts, applied, progress.stage("comparing harmless text", len(texts)))
    record: dict[str, Any] = {
        "kept": compared.mean_kept,
        "kept_interval": _mean_interval(compared.kept, seed),
        "kl": compared.mean_kl,
        "kl_interval": _mean_interval(compared.kl, seed),
        "perplexity": compared.perplexity_ratio,
    }
    if not endings_tokens:
        return record, 0
    prompts = [prompt for prompt, _ in texts[:PROMPTS]]
    on_progress = progress.stage("long answers, before and after", 2 * len(prompts))
    record["endings"], tokens = compare_endings(chat, prompts, applied, endings_tokens, on_progress, thinking)
    return record, tokens


def _mean_interval(values: list[float], seed: int, resamples: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean over texts."""
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    means = x[picks].mean(1)
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]
