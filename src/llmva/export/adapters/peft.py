"""The edit as a PEFT LoRA adapter. An edited bias becomes PEFT's `lora_B.bias`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmva.export.adapters.parts import make_adapter
from llmva.export.card import hub_revision
from llmva.export.folder import describe, fresh, in_workplace, written
from llmva.export.plan import Plan
from llmva.files import write_json, write_tensors
from llmva.models.files.weights import ADAPTER, findable
from llmva.progress import Progress
from llmva.runs.environment import peak_bytes

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def export_lora(
    plan: Plan, out: str | Path, *, rank: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the adapter into the new folder `out`; returns facts about it.

    Args:
        rank: one rank for all modules. Modules of lower rank are padded with zeros, which is exact; those of higher
            rank are cut to the nearest map of that rank, with the error in `truncation` and in a warning. None keeps
            each module's own rank.

    Raises:
        UsageError: `out` exists already, or `rank` is below 1.
        LlmvaError: the model is not the edit's base, or the edit changes fused experts.
    """
    progress = progress or Progress()
    out = fresh(out)
    progress.stage("reading the base")
    made = make_adapter(plan, rank)
    warnings, biased = list(made.warnings), made.biased
    if len(set(made.ranks.values())) > 1:
        # llama.cpp divides the one alpha by each tensor's own rank, so it would amplify all modules but the widest
        warnings.append(
            "The modules have different ranks, which PEFT reads; llama.cpp would scale them wrongly and other servers "
            "may refuse them. For those, choose one rank with --rank."
        )
    if biased:
        warnings.append(
            "This edit changes biases, which the adapter carries as lora_B.bias: PEFT reads them, other servers do "
            "not. For those, export with --as merged."
        )
    tensors = {}
    for name, (A, B, bias) in made.parts.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        if biased:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.zeros(len(B)) if bias is None else bias
    with in_workplace(out) as work:
        write_tensors(work / WEIGHTS, tensors, {"format": "pt"})
        reasons = describe(plan, "lora", work)
        write_json(work / ADAPTER, _config(plan, made.ranks, made.conv1d, biased))
    return {
        **written(out, {**reasons, WEIGHTS: "the adapter's weights", ADAPTER: "the adapter's config"}),
        **made.facts(),
        "warnings": warnings,
        "peak_bytes": peak_bytes(),
    }


def _config(plan: Plan, ranks: Mapping[str, int], conv1d: bool, biased: bool) -> dict[str, Any]:
    """alpha = r everywhere, so that the scale is 1 for loaders that know no patterns too."""
    largest = max(ranks.values())
    # PEFT matches keys with the ends of names, as patterns: layers.1 must not match layers.11 or a tower's layers.1
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": findable(plan.base),
        "revision": hub_revision(plan),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_bias": biased,
        "lora_dropout": 0.0,
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
