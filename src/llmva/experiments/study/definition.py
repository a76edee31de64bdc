"""What a study is: the content of STUDY.toml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmva.errors import UsageError
from llmva.experiments.comparison import METHODS
from llmva.settings import SEEDS, Settings, make_settings

Name = Annotated[str, Field(min_length=1, max_length=60)]
NEVER_SET = ("system", "layers")  # of the settings: each model has its own


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StudyModel(_Part):
    """A model of a study."""

    name: Name = Field(description="What tables call the model.")
    path: str = Field(description="Hub id, local folder or .gguf file; demo is the bundled model.")
    revision: str | None = Field(None, description="Commit of the hub's repository.")
    dtype: str = Field("auto", description="Compute in this dtype: auto, bfloat16, float16, float32.")
    device_map: str | None = Field(None, description="Spread the model over several devices: auto.")
    quantize: str = Field("none", description="Quantize the weights with bitsandbytes: none, 4bit, 8bit.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    system: str | None = Field(None, description="Ask with this system prompt; none keeps the chat template's own.")
    layers: int | None = Field(None, ge=1, description="Edit at most this many sublayers in one alignment.")
    parameters: float | None = Field(None, gt=0, description="Number of parameters, for the estimates of a plan.")
    methods: tuple[str, ...] = Field((), description="Rows of this model alone, beside those of the study.")


class StudyData(_Part):
    """Prompts of a study, as the options --toxic, --benign, --data, --data-dir, --per-set and --only name them."""

    name: Name = Field("bundled", description="What tables call these prompts.")
    toxic: tuple[str, ...] = Field((), description="Prompts to refuse: PATH_OR_ID[:COLUMN[:SPLIT]].")
    benign: tuple[str, ...] = Field((), description="Prompts to answer: PATH_OR_ID[:COLUMN[=GOLD][:SPLIT]].")
    data: tuple[str, ...] = Field((), description="Public data sets: NAME or NAME=PATH.")
    data_dir: str | None = Field(None, description="Folder with copies of the public data sets.")
    per_set: int | None = Field(None, ge=1, description="Use at most this many prompts per side of a public set.")
    only: bool = Field(False, description="Leave the bundled prompts out, which teach v_b beside the named ones.")


class StudyJudge(_Part):
    """A judge of a study."""

    name: Name = Field("phrases", description="What tables call the judge.")
    judge: str = Field("phrases", description="The judge, as the option --judge names it.")


class Study(_Part):
    """Every model with every data set and every judge is a comparison of all methods with all seeds."""

    title: str = Field("Study", description="Title of the page.")
    models: tuple[StudyModel, ...] = Field(min_length=1)
    data: tuple[StudyData, ...] = Field((StudyData(),), min_length=1)  # type: ignore[call-arg]
    judges: tuple[StudyJudge, ...] = Field((StudyJudge(),), min_length=1)  # type: ignore[call-arg]
    methods: tuple[str, ...] = Field(("none", "llmva"), min_length=1, description="Methods to compare.")
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEEDS)], ...] = Field(
        (42,), min_length=1, description="Seeds of the draws of fit prompts."
    )
    tuned: bool = Field(False, description="Add a row for each baseline with options tuned on validation prompts.")
    attacks: tuple[str, ...] = Field((), description="Also ask the test prompts under these attacks.")
    transfer: tuple[str, ...] = Field((), description="Also ask these public sets, on which nothing is fitted.")
    transfer_per_set: int = Field(500, ge=1, description="Use at most this many prompts per side of each of them.")
    utility: tuple[str, ...] = Field((), description="Also run these tasks of lm-evaluation-harness.")
    utility_limit: int | None = Field(None, ge=1, description="Documents of a task; none is the paper's number.")
    settings: dict[str, Any] = Field({}, description="Settings of the method, as llmva align has them.")
    published: dict[str, dict[str, Any]] = Field(
        {}, description="Published figures by model, then by method, shown beside the measured ones."
    )

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            raise ValueError(f"there is no method '{unknown[0]}' for all models, choose among {', '.join(METHODS)}")
        return tuple(dict.fromkeys(methods))

    @field_validator("settings")
    @classmethod
    def _usable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if own := [name for name in NEVER_SET if name in settings]:
            raise ValueError(f"{own[0]} belongs to a model: write it under [[models]]")
        make_settings(**settings)
        return settings

    @model_validator(mode="after")
    def _different(self) -> Study:
        for part in (self.models, self.data, self.judges):
            names = [slug(one.name) for one in part]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two parts are called {twice[0]}: give them different names")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice: give different seeds")
        return self

    def settings_of(self, model: StudyModel) -> Settings:
        """The settings of the method for one model."""
        own = {"system": model.system, "layers": model.layers}
        return make_settings(**self.settings, **{name: value for name, value in own.items() if value is not None})


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "unnamed"


def read_study(path: Path) -> Study:
    """The study in a TOML or JSON file. Raises UsageError that names the first mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The study '{path}' cannot be read: give a TOML file, such as llmva study init writes."
        ) from error
    try:
        given = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise UsageError(f"The study '{path}' is not valid {path.suffix[1:].upper() or 'TOML'}: {error}.") from error
    try:
        return Study.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the study"
        raise UsageError(f"The study '{path}' is not usable: {place}: {first['msg'].lower().rstrip('.')}.") from error


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise UsageError("Python 3.10 reads no TOML: write the study as a .json file, or use Python 3.11.") from error
    return tomllib.loads(text)


def schema() -> dict[str, Any]:
    """The JSON schema of a study."""
    return Study.model_json_schema()
