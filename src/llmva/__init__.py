"""LLM-VA: make a chat model answer what is benign and refuse what is harmful, by editing its weights in closed form.

    import llmva
    model, tokenizer = llmva.load_model("org/model")
    result = llmva.align(model, tokenizer, llmva.PromptSet.bundled())
    result.edit.bake(model)

The names below load their modules when first used, so that `import llmva` and `llmva --help` take no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmva.alignment import Result, align
    from llmva.edit import Edit
    from llmva.errors import LlmvaError, UsageError
    from llmva.extension import extend
    from llmva.judges.base import Judge, Judgement, Label
    from llmva.method.align import align_one, align_sublayers
    from llmva.method.identify import identify, score, select
    from llmva.method.observe import observe
    from llmva.method.svm import HarmlessMetric, fit_sklearn, fit_svms
    from llmva.models.chat_model import ChatModel
    from llmva.models.generate import Capture, capture
    from llmva.models.load import load_model
    from llmva.models.sublayers import find_decoder
    from llmva.prompts.prompt_set import PromptSet
    from llmva.prompts.types import Prompt

__version__ = "0.1.0"

_HOMES = {
    "Capture": "llmva.models.generate",
    "ChatModel": "llmva.models.chat_model",
    "Edit": "llmva.edit",
    "Judge": "llmva.judges.base",
    "Judgement": "llmva.judges.base",
    "Label": "llmva.judges.base",
    "LlmvaError": "llmva.errors",
    "Prompt": "llmva.prompts.types",
    "PromptSet": "llmva.prompts.prompt_set",
    "HarmlessMetric": "llmva.method.svm",
    "Result": "llmva.alignment",
    "UsageError": "llmva.errors",
    "align": "llmva.alignment",
    "align_one": "llmva.method.align",
    "align_sublayers": "llmva.method.align",
    "capture": "llmva.models.generate",
    "extend": "llmva.extension",
    "find_decoder": "llmva.models.sublayers",
    "fit_sklearn": "llmva.method.svm",
    "fit_svms": "llmva.method.svm",
    "identify": "llmva.method.identify",
    "load_model": "llmva.models.load",
    "observe": "llmva.method.observe",
    "score": "llmva.method.identify",
    "select": "llmva.method.identify",
}

__all__ = [
    "Capture",
    "ChatModel",
    "Edit",
    "HarmlessMetric",
    "Judge",
    "Judgement",
    "Label",
    "LlmvaError",
    "Prompt",
    "PromptSet",
    "Result",
    "UsageError",
    "align",
    "align_one",
    "align_sublayers",
    "capture",
    "extend",
    "find_decoder",
    "fit_sklearn",
    "fit_svms",
    "identify",
    "load_model",
    "observe",
    "score",
    "select",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmva' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
