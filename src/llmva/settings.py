"""The settings of a run. They determine a run, together with its seed, its prompts and its model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmva.errors import UsageError

SEEDS = 2**32  # scikit-learn takes no larger ones
EXCERPT = 200  # characters of a system prompt that a sentence or a page shows
# where the paper's choice is not our default; a limit of 99 nats is none
PAPER: dict[str, Any] = {
    "passes": 1,
    "svm": "sklearn",
    "harmless_weight": 0.0,
    "patience": 0,
    "min_kept": 0.0,
    "max_kl": 99.0,
}


class Settings(BaseModel):
    """Defaults are what `llmva align` runs with; docs/method.md says where each comes from.

    A description is the help text of the command line's option. The option is named after the field, unless "options"
    in `json_schema_extra` lists other names; an empty list means that there is none.
    """

    # the validator is built at the first use: the command line's --help needs the fields alone
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    recipe: Literal["default", "paper"] = Field(
        "default", description="Start from these settings: ours (default), or those that choose as the paper does."
    )
    iterations: int = Field(30, ge=0, description="Run at most this many iterations (the paper's T).")
    layers: int | None = Field(
        None, ge=1, description="Edit at most this many sublayers in one alignment (the paper's L)."
    )
    step: float = Field(
        1.0, gt=0, le=1, description="Take this fraction of the full alignment step per iteration (above 0)."
    )
    passes: int = Field(
        8, ge=1, description="Make at most this many alignments per round of generated answers; the paper makes 1."
    )
    svm: Literal["exact", "sklearn"] = Field(
        "exact", description="Fit the SVMs exactly, or with scikit-learn as the paper does."
    )
    C: float = Field(
        1.0, gt=0, description="Cost of a margin violation in the SVMs.", json_schema_extra={"options": []}
    )
    harmless_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of harmless text in the metric of the SVMs; the paper uses 0.",
        json_schema_extra={"options": ["--harmless-weight", "--quiet-readers"]},
    )
    per_source: int = Field(
        128, ge=1, description="Draw at most this many training prompts from each data set per iteration."
    )
    max_new_tokens: int = Field(128, ge=1, description="Generate at most this many tokens per answer.")
    patience: int = Field(
        3, ge=0, description="Stop after this many iterations without improvement; 0 never stops early."
    )
    prefer: Literal["safety", "balance", "usefulness"] = Field(
        "balance",
        description="Weigh harmful prompts answered (safety) or benign prompts refused (usefulness) more, or neither.",
    )
    max_asr: float | None = Field(
        None, ge=0, le=1, description="Highest allowed share of harmful prompts answered (0 to 1)."
    )
    max_orr: float | None = Field(
        None, ge=0, le=1, description="Highest allowed share of benign prompts refused (0 to 1)."
    )
    min_kept: float = Field(
        0.97,
        ge=0,
        le=1,
        description="Lowest allowed share of next tokens on harmless text that stay the same (0 to 1).",
        json_schema_extra={"options": ["--min-kept", "--min-utility"]},
    )
    max_kl: float = Field(
        0.05, ge=0, description="Highest allowed KL divergence from the original model on harmless text, in nats."
    )
    thinking: Literal["off", "end"] = Field(
        "off",
        description="Turn the model's thinking off, or let it think and read it at the end of its thoughts (end).",
    )
    thinking_tokens: int = Field(512, ge=1, description="Generate at most this many tokens of thoughts.")
    system: str | None = Field(
        None,
        description="Ask with this system prompt, or with that in this file; none keeps the chat template's own.",
        json_schema_extra={"metavar": "TEXT|FILE"},
    )
    harden: bool = Field(
        False,
        description="Ask a quarter of the training prompts in other settings: under attacks, or after a system prompt.",
    )
    endings_tokens: int = Field(
        256,
        ge=0,
        description="Check the endings of long answers of up to this many tokens; 0 skips the check.",
        json_schema_extra={"options": []},
    )

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, given: Any) -> Any:
        return {**PAPER, **given} if isinstance(given, dict) and given.get("recipe") == "paper" else given

    @field_validator("system")
    @classmethod
    def _trim(cls, given: str | None) -> str | None:
        """Without white space around it, which most chat templates cut; an empty text is none."""
        return (given or "").strip() or None

    @classmethod
    def paper(cls, **others: Any) -> Settings:
        """The paper's choice of every setting, except `others`."""
        return cls(recipe="paper", **others)


def excerpt(text: str, most: int = EXCERPT) -> str:
    """The beginning of a text on one line, with its length where that is not all."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most].rstrip()} ... ({len(text):,} characters)"


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
