"""How an evaluation makes answers: greedily, or several to each prompt, drawn so that no batch has a part in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmva.errors import UsageError
from llmva.models.reading.sampling import Sampling
from llmva.prompts.types import Prompt

TRANSFORMS, SUFFIX, BOTH = SEARCHES = ("transforms", "suffix", "both")


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
    adaptive: int | None = None  # tries or steps for each toxic prompt in a search; None searches not
    search: str = "transforms"  # what is searched: one of SEARCHES
    suffix_tokens: int = 10  # length of a suffix
    candidates: int = 64  # suffixes tried in a step

    @property
    def searches(self) -> tuple[str, ...]:
        """The kinds of search, none without a budget."""
        if self.adaptive is None:
            return ()
        return (TRANSFORMS, SUFFIX) if self.search == BOTH else (self.search,)


def check_search(settings: EvaluationSettings) -> None:
    """Raises UsageError for settings of a search that are none."""
    default = EvaluationSettings()
    if settings.search not in SEARCHES:
        raise UsageError(f"There is no search over {settings.search!r}: choose --search {', '.join(SEARCHES)}.")
    if settings.adaptive is None and settings.search != default.search:
        raise UsageError("--search says over what --adaptive searches: add --adaptive with its budget.")
    own = [getattr(settings, name) != getattr(default, name) for name in ("suffix_tokens", "candidates")]
    if any(own) and SUFFIX not in settings.searches:
        raise UsageError(
            "--suffix-tokens and --candidates are about a search over suffixes: add --adaptive and --search suffix."
        )
    if settings.adaptive is not None and settings.adaptive < 1:
        raise UsageError(f"A budget of {settings.adaptive} searches nothing: make --adaptive 1 or more.")
    if min(settings.suffix_tokens, settings.candidates) < 1:
        raise UsageError("A suffix has tokens, and a step tries some: make --suffix-tokens and --candidates 1 or more.")


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
