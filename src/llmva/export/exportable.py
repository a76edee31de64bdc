"""Asked before a run: can its edit be exported, from the files that the model was loaded from?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.models.checkpoint import Checkpoint
from llmva.models.sublayers import Decoder

MAX_COMPARED = 2**30  # bytes of weights that are compared with those in memory before a run


def export_notes(decoder: Decoder, base: Mapping[str, Any]) -> list[str]:
    """What a user should know, before a run, of exporting an edit of this model; nothing for one made in memory.

    Args:
        base: the model's fingerprint, with its `dtype`.

    Raises UsageError or LlmvaError where its folder holds what no export could read as it was loaded, or where an
    adapter is on the model.
    """
    if _has_adapter(decoder.model):
        raise UsageError(
            "An adapter is on the model, which no export would contain: merge it first (PEFT's merge_and_unload), and "
            "save the merged model with save_pretrained."
        )
    folder, local = _folder_of(decoder.model)
    if folder is None:
        return []
    own_code = type(decoder.model).__module__.startswith("transformers_modules.")  # then it ran when it was loaded
    try:
        checkpoint = Checkpoint.open(folder, trust_remote_code=own_code)
    except LlmvaError:
        if local:
            raise
        return []  # of a model of the hub another revision may be in the cache
    packed = checkpoint.packed or base.get("quantize") is not None
    notes = [*checkpoint.weights.notes, *_missing_forms(checkpoint, decoder, packed)]
    if not packed and (module := _other_weights(checkpoint, decoder, base["hashes"])):
        stored = {place.dtype for place in checkpoint.stored.values()}
        if base.get("dtype") == "float16" and "F16" not in stored:
            raise UsageError(
                f"float16 rounds the weights of '{folder}' ({module}), so that no export could tell that an edit is "
                "of this model: pass --dtype bfloat16 or float32."
            )
        notes.append(
            f"The weights in memory are not those in '{folder}' ({module} differs): save the model with "
            "save_pretrained, and export with --base and that folder."
        )
    return notes


def _has_adapter(model: Any) -> bool:
    if "peft" not in sys.modules:  # then there is none
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _folder_of(model: Any) -> tuple[Path | None, bool]:
    """The folder that a model in memory was loaded from, and whether it is a local one; nothing is downloaded."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name or name.endswith(".gguf"):
        return None, False
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), True
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True)), False
    except Exception:  # no hub id, or one that is not in the cache
        return None, False


def _missing_forms(checkpoint: Checkpoint, decoder: Decoder, packed: bool) -> list[str]:
    """A note where an edit of all sublayers could not be exported in both forms."""
    linear = all(hasattr(s.projection, "in_features") or hasattr(s.projection, "nx") for s in decoder.sublayers)
    merged, why = not packed, "its weights are packed"
    if merged and not all(checkpoint.plain(name, decoder.width) for name in decoder.names):
        try:
            checkpoint.writers_of(decoder.names)
        except LlmvaError as error:
            said = str(error).split(": ")[0]
            merged, why = False, f"the {said[4:]}" if said.startswith("The ") else said
    if not merged and not linear:
        return [f"An edit of this model can only be served by hook or pushed --as edit, not exported, since {why}."]
    if not merged:
        return [f"An edit of this model can be exported --as lora and not --as merged, since {why}."]
    if not linear:
        return ["An edit of this model can be exported --as merged and not --as lora, since it has fused experts."]
    return []


def _other_weights(checkpoint: Checkpoint, decoder: Decoder, hashes: Mapping[str, str]) -> str | None:
    """The first sublayer whose weights on disk are not those in memory, among as many as are read quickly."""
    left = MAX_COMPARED
    for name in decoder.names:
        if checkpoint.plain(name, decoder.width) is None:
            continue
        place = checkpoint.stored[f"{name}.weight"]
        left -= place.end - place.begin
        if left < 0:
            return None
        if name in hashes and checkpoint.plain_hash(name) != hashes[name]:
            return name
    return None
