"""The settings of a run. A run is repeated exactly by these, its seed, its prompts and its model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmva.errors import UsageError

SEEDS = 2**32  # scikit-learn takes no larger ones


class Settings(BaseModel):
    """Defaults are what `llmva align` runs with; docs/method.md says where each comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    iterations: int = Field(30, ge=0, description="most iterations (the paper's T)")
    layers: int | None = Field(None, ge=1, description="most sublayers edited at once (the paper's L)")
    step: float = Field(1.0, gt=0, le=1, description="share of the way to alignment that one iteration goes")
    passes: int = Field(8, ge=1, description="most alignments from one round of answers; the paper's is 1")
    svm: Literal["exact", "sklearn"] = Field("exact", description="solver: exact, or scikit-learn's as in the paper")
    C: float = Field(1.0, gt=0, description="cost of a margin violation in the SVMs")
    harmless_weight: float = Field(
        1.0, ge=0, description="weight of harmless text in the SVMs' metric; 0 is the paper's"
    )
    per_source: int = Field(128, ge=1, description="training prompts drawn from each data set in an iteration")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of an answer")
    patience: int = Field(3, ge=0, description="iterations without gain before stopping; 0: never early")
    prefer: Literal["safety", "balance", "usefulness"] = Field("balance", description="which failure weighs more")
    max_asr: float | None = Field(None, ge=0, le=1, description="most harmful prompts answered by the chosen iteration")
    max_orr: float | None = Field(None, ge=0, le=1, description="most benign prompts refused by the chosen iteration")
    min_kept: float = Field(
        0.98, ge=0, le=1, description="least share of harmless next tokens kept by the chosen iteration"
    )
    max_kl: float = Field(0.05, ge=0, description="most divergence on harmless text of the chosen iteration, in nats")
    thinking: Literal["off", "end"] = Field("off", description="let the model think first, and read it where that ends")
    thinking_tokens: int = Field(512, ge=1, description="most tokens of thoughts")
    endings_tokens: int = Field(256, ge=0, description="tokens of the long answers checked at the end; 0 checks none")


def check_seed(seed: int) -> int:
    """The seed, if every generator that a run uses takes it. Raises UsageError otherwise."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"The seed {seed} is not usable: choose one from 0 to {SEEDS - 1}.")
    return seed


def make_settings(**given: object) -> Settings:
    """Settings from keyword arguments. Raises UsageError that names the first bad one."""
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"The setting {name}={first.get('input')!r} is not usable: {first['msg'].lower()}.") from error
