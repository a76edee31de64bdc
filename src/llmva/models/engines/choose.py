"""From `--engine` and a loaded model to an engine, or to the reason why there can be none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.models.at_rest import told_hooks
from llmva.models.batching import cached_bytes, first_guess
from llmva.models.checkpoint import Checkpoint
from llmva.models.engines.applied import BAKED
from llmva.models.engines.base import Engine
from llmva.models.engines.vllm import Loaded, VllmEngine, installed
from llmva.models.forward import is_of_transformers
from llmva.models.sublayers import text_config

OWN, OTHER = "transformers", "vllm"
WAYS = {OTHER: "auto", f"{OTHER}:merged": "merged", f"{OTHER}:lora": "lora"}
NAMES = (OWN, *WAYS)


def check_engine(name: str) -> None:
    """Raises UsageError for an engine that is unknown or not installed."""
    if name not in NAMES:
        raise UsageError(f"engine '{name}' is unknown: use {', '.join(NAMES)}.")
    if name != OWN:
        installed()
        if find_spec("vllm") is None:
            raise UsageError("vLLM is installed without its code: install it anew, or leave --engine out.")


def make_engine(engine: Engine | str | None, model: Any) -> Engine | None:
    """The engine that answers for a loaded model; None is transformers' own way. An Engine is taken as it is.

    Raises UsageError where vLLM is not installed, or the model is not what vLLM would load from its files.
    """
    if engine is None or engine == OWN:
        return None
    if not isinstance(engine, str):
        return engine
    check_engine(engine)
    return VllmEngine(_loaded(model), WAYS[engine])


def _loaded(model: Any) -> Loaded:
    place = str(getattr(model.config, "_name_or_path", "") or "")
    title = Path(place).name or "this model"
    device = next(model.parameters()).device
    several = {str(where) for where in (getattr(model, "hf_device_map", None) or {}).values()}
    if place.endswith(".gguf"):
        raise _refused(f"'{title}' is a .gguf file", "give the folder of the unpacked model")
    if not place:
        raise _refused("this model has been in memory only", "save it and load it from its folder")
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None) is not None:
        raise _refused(f"the weights of '{title}' are packed", "leave --quantize out, or give the unpacked model")
    if type(model).__module__.startswith("peft") or getattr(model, "_hf_peft_config_loaded", False):
        raise _refused("the model has an adapter", "merge it into the weights and save them")
    if any(BAKED in vars(module) for module in model.modules()):
        raise _refused("an edit has been written into the weights in memory", "save the model and load it anew")
    if hooks := told_hooks(model):
        raise _refused(f"the model has {hooks}", "remove them")
    if first_guess(model, 1).alone_above is not None:
        raise UsageError("This model's positions depend on the longest row that vLLM may read: leave --engine out.")
    if device.type not in ("cpu", "cuda") or len(several) > 1:
        where = " and ".join(sorted(several)) if len(several) > 1 else device.type
        raise _refused(f"the model is on {where}", "run it on one GPU or on the CPU")
    checkpoint = Checkpoint.open(place)
    return Loaded(
        checkpoint,
        model.dtype,
        device,
        getattr(text_config(model), "max_position_embeddings", None),
        sum(p.numel() * p.element_size() for p in model.parameters()),
        cached_bytes(model),
        own_code=not is_of_transformers(model),
    )


def _refused(why: str, mend: str) -> UsageError:
    return UsageError(f"vLLM loads a model's own files, and {why}: {mend}, or leave --engine out.")
