"""How an evaluation makes answers: greedily, or several to each prompt, drawn so that no batch has a part in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmva.errors import UsageError
from llmva.models.reading.sampling import Sampling
from llmva.prompts.types import Prompt


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are made; the fields have the meaning that they have in `llmva.settings.Settings`."""

    seed: int = 42
    max_new_tokens: int = 128
    endings_tokens: int = 256  # maximum length of answers checked for loops and broken endings; 0 checks none
    thinking: str = "off"
    thinking_tokens: int = 512
    samples: int | None = None  # answers to each prompt, drawn at `temperature` from `top_p`; None is one, greedy
    temperature: float = 1.0
    top_p: float = 1.0
    adaptive: int | None = None  # answers tried for each toxic prompt in a search over transforms; None searches not


def check_sampling(settings: EvaluationSettings, *, by_engine: bool) -> None:
    """Raises UsageError for settings of samples that are none, and where an engine is to write them."""
    if settings.samples is None:
        if (settings.temperature, settings.top_p) != (1.0, 1.0):
            raise UsageError("--temperature and --top-p are about sampled answers: add --samples with their number.")
        return
    if settings.samples < 1:
        raise UsageError(f"{settings.samples} samples are none: make --samples 1 or more.")
    if not 0.0 < settings.temperature < float("inf"):
        raise UsageError(
            f"--temperature {settings.temperature:g} draws no answers: give a number above 0, or leave "
            "--samples out for greedy answers."
        )
    if not 0.0 < settings.top_p <= 1.0:
        raise UsageError(f"--top-p {settings.top_p:g} is no share of a probability: give a number above 0, at most 1.")
    if by_engine:
        raise UsageError("Answers are sampled with transformers alone: leave --engine out, or --samples.")


def draws(settings: EvaluationSettings, prompts: Sequence[Prompt]) -> list[Sampling | None]:
    """What each sample draws by: the seed, the prompt and the number of the sample; None alone for greedy answers."""
    if settings.samples is None:
        return [None]
    return [
        Sampling(
            tuple(f"{settings.seed}:{prompt.id}:{number}" for prompt in prompts), settings.temperature, settings.top_p
        )
        for number in range(settings.samples)
    ]
