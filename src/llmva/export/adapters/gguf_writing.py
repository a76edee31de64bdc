"""The edit as llama.cpp's LoRA adapter, one .gguf file, with a Modelfile by which Ollama puts it on the base.

llama.cpp multiplies B A by the file's one alpha over the rank of each B. So B is divided by that here, which is exact
where all ranks are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmva.errors import LlmvaError
from llmva.export.adapters.parts import make_adapter
from llmva.export.adapters.tensor_names import MERGED, architecture_of, tensor_names
from llmva.export.card import base_name
from llmva.export.folder import describe, fresh, in_workplace, written
from llmva.export.plan import Plan
from llmva.export.redact import one_line
from llmva.files import write_text
from llmva.models.files.weights import findable
from llmva.progress import Progress
from llmva.runs.environment import peak_bytes

ADAPTER, MODELFILE = "adapter.gguf", "Modelfile"
PARTS = (".lora_a", ".lora_b")


def export_gguf(
    plan: Plan, out: str | Path, *, rank: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the adapter into the new folder `out`; returns facts about it. `rank` is as in `make_adapter`.

    Raises:
        UsageError: `out` exists already, or `rank` is below 1.
        LlmvaError: the model is not the edit's base, or the edit is one that such a file cannot hold.
    """
    progress = progress or Progress()
    out = fresh(out)
    architecture = architecture_of(str(plan.edit.base.get("model_type", "")))
    names = tensor_names(architecture, plan.edit.factors)
    progress.stage("reading the base")
    made = make_adapter(plan, rank)
    if made.biased:
        raise LlmvaError(f"This edit changes biases, which llama.cpp's adapters cannot hold: {MERGED}.")
    with in_workplace(out) as work:
        additions = {names[module]: (A, B) for module, (A, B, _) in made.parts.items()}
        _write(work / ADAPTER, architecture, base_name(plan), additions)
        write_text(work / MODELFILE, _modelfile(plan))
        reasons = describe(plan, "gguf", work)
    return {
        **written(out, {**reasons, ADAPTER: "the adapter", MODELFILE: "what Ollama makes a model from"}),
        **made.facts(),
        "architecture": architecture,
        "warnings": list(made.warnings),
        "peak_bytes": peak_bytes(),
    }


def _write(path: Path, architecture: str, base: str, additions: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """`additions` are A [k, in] and B [out, k] by the tensor that they are added to."""
    import gguf

    alpha = max(len(A) for A, _ in additions.values())
    file = gguf.GGUFWriter(path, architecture)
    file.add_type(gguf.GGUFType.ADAPTER)
    file.add_string(gguf.Keys.Adapter.TYPE, "lora")
    file.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    file.add_name(f"{base} with LLM-VA")
    file.add_base_model_count(1)
    file.add_base_model_name(0, base)
    for name, (A, B) in sorted(additions.items()):
        for part, tensor in zip(PARTS, (A, B * (len(A) / alpha)), strict=True):
            file.add_tensor(name + part, tensor.float().contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _modelfile(plan: Plan) -> str:
    if plan.base.endswith(".gguf"):
        return f"FROM {one_line(findable(plan.base))}\nADAPTER ./{ADAPTER}\n"
    told = f"# Put {one_line(base_name(plan))}, converted by llama.cpp's convert_hf_to_gguf.py, here as base.gguf."
    return f"{told}\nFROM ./base.gguf\nADAPTER ./{ADAPTER}\n"
