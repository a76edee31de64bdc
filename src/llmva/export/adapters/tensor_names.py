"""What llama.cpp calls the projections of a model, and which models it names and stores as they are here.

Its converter rearranges the weights of some architectures, so that a change of ours would not fit. Listed are those of
which we have read that it leaves attention's and the MLP's output projections as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmva.errors import LlmvaError

ARCHITECTURES = {  # llama.cpp's name by transformers' type of model
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
LAYER = re.compile(r"\.(\d+)\.")
MERGED = "export with --as merged, and convert that model with llama.cpp's convert_hf_to_gguf.py"


def architecture_of(model_type: str) -> str:
    """llama.cpp's name of an architecture. Raises LlmvaError for one that is not listed."""
    if model_type not in ARCHITECTURES:
        raise LlmvaError(
            f"Whether llama.cpp stores the projections of {model_type or 'this type of'} models as they are here is "
            f"not known: {MERGED}."
        )
    return ARCHITECTURES[model_type]


def tensor_names(architecture: str, modules: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of the weight of each module. Raises LlmvaError for a module that it does not name."""
    import gguf

    of_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    modules = list(modules)
    layers = 1 + max(int(number) for name in modules for number in LAYER.findall(name) or ["0"])
    known = gguf.get_tensor_name_map(of_name[architecture], layers)
    names = {}
    for module in modules:
        text_part = module.replace("language_model.", "")  # of a multimodal model, which llama.cpp stores alone
        name = known.get_name(f"{text_part}.weight", try_suffixes=(".weight",))
        if name is None:
            raise LlmvaError(f"llama.cpp has no name for {module} in {architecture} models: {MERGED}.")
        names[module] = name
    return names
