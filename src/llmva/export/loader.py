"""How a reader of a card loads a model: by which class of transformers, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmva.export.plan import Plan
from llmva.models.files.weights import read_object

TEXT, IMAGE = "AutoModelForCausalLM", "AutoModelForImageTextToText"


@dataclass(frozen=True)
class Loader:
    """Classes of transformers, and whether the model comes with code of its own.

    Attributes:
        part: loads what was aligned, whose modules have the names in the edit: maybe the language model alone.
        whole: loads all of the model.
    """

    part: str
    whole: str
    own_code: bool

    @property
    def task(self) -> str:
        """The hub's name of what the model does."""
        return "image-text-to-text" if self.whole == IMAGE else "text-generation"


def find_loader(plan: Plan) -> Loader:
    """From the base's config where it is on this machine, else from the type of model that the edit remembers."""
    fields = _config(plan)
    model_type = str(fields.get("model_type", plan.edit.base.get("model_type", "")))
    auto_map = fields.get("auto_map")
    if isinstance(auto_map, Mapping) and auto_map:
        return Loader(TEXT, TEXT, own_code=True)
    names = fields.get("architectures")
    if isinstance(names, list) and names and str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return Loader(TEXT, TEXT, own_code=False)  # saves importing transformers' models
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    part = IMAGE if images and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else TEXT  # as load_model does
    return Loader(part, IMAGE if images else TEXT, own_code=False)


def _config(plan: Plan) -> dict[str, Any]:
    """The base's config.json, if it is in a folder or in the hub's cache; nothing is downloaded."""
    folder = Path(plan.base).expanduser()
    if folder.is_dir():
        return read_object(folder / "config.json")
    if plan.base.endswith(".gguf"):
        return {}
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(plan.base, "config.json")
    except ValueError:  # no hub id
        return {}
    return read_object(Path(cached)) if isinstance(cached, str) else {}
