"""What a LoRA adapter of llama.cpp does to a model, as llama.cpp reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.errors import LlmvaError
from llmva.export.adapters.gguf_writing import PARTS
from llmva.export.adapters.tensor_names import architecture_of, tensor_names
from llmva.models.finding.tensors import first_tensor, hooked


def read_additions(path: Path, model_type: str, modules: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) of what an adapter's file adds to each module, its scale in B; "" stands for any other tensor.

    Raises LlmvaError for a file that is no such adapter.
    """
    import gguf

    architecture = architecture_of(model_type)
    try:
        file = gguf.GGUFReader(path)
        alpha = float(file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
        here = str(file.fields[gguf.Keys.General.ARCHITECTURE].contents())
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    except Exception as error:  # whatever a file that is no .gguf makes the package raise
        raise LlmvaError(f"'{path}' is no adapter of llama.cpp ({type(error).__name__}): export it again.") from error
    if here != architecture:
        raise LlmvaError(f"'{path}' is an adapter of {here} models and not of {architecture}: export it again.")
    module_of = {name: module for module, name in tensor_names(architecture, modules).items()}
    added = {}
    for name in dict.fromkeys(tensor.removesuffix(PARTS[0]).removesuffix(PARTS[1]) for tensor in tensors):
        A, B = (tensors.get(name + part) for part in PARTS)
        if A is None or B is None:
            raise LlmvaError(f"'{path}' lacks a part of {name}: export it again.")
        added[module_of.get(name, "")] = (B * (alpha / B.shape[1] if alpha else 1.0), A)
    return added


@contextmanager
def adding(model: Any, additions: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, each module's output is what llama.cpp makes of it with the adapter; `additions` as read."""

    def hook(B: Tensor, A: Tensor) -> Any:
        def add(module: Any, args: Any, output: Any) -> Any:
            x, o = args[0], first_tensor(output)
            change = x.float() @ A.to(x.device).T @ B.to(x.device).T
            moved = (o.float() + change).to(o.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple | list) else moved

        return add

    named = {module: parts for module, parts in additions.items() if module}
    with hooked([model.get_submodule(module).register_forward_hook(hook(*parts)) for module, parts in named.items()]):
        yield
