"""What a run's results depend on beside settings, judge and prompts: the model with all that belongs to it, by name.

A folder keeps its name when its files change. So a run remembers hashes, and goes on only where they are the same. What
has changed is refused where answers change with it, and noted where they need not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmva.models.chat import end_tokens
from llmva.models.chat.template import template_text
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import other_weights, weights_digest

TITLES = {  # of the fields, in the order in which the first difference is named
    "adapters": "the adapters",
    "quantization": "the quantization",
    "weights": "the weights",
    "code": "the model's own code",
    "config": "the config",
    "generation": "the end tokens",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "inputs": "the prompts as the model reads them",
    "skills": "the skills",
}
# of a config: what says nothing of what the model computes, is told elsewhere, or acts in training alone
UNTOLD = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id",
    "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
COMPUTED_BY = ("device", "torch", "transformers", "tokenizers", "engine", "llmva")  # what may change answers by itself


def identity(
    chat: ChatModel, base: Mapping[str, Any], rows: Sequence[Sequence[int]], probes: Sequence[Any] = ()
) -> dict[str, Any]:
    """The field `identity` of run.json.

    Args:
        base: the model's `fingerprint`.
        rows: token ids of all prompts of the run, as the model reads them.
        probes: of the run's skills; dataclasses.
    """
    return {
        "weights": weights_digest(chat.model, base["weights"]),
        **belongings(chat.model, chat.tokenizer),
        "inputs": _digest([list(row) for row in rows]),
        "skills": _digest([asdict(probe) for probe in probes]) if probes else None,
    }


def belongings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The part of `identity` that is told without reading weights and prompts."""
    config = model.config.to_dict()
    quantization = config.get("quantization_config")
    return {
        "adapters": _adapters(model),
        "quantization": None if quantization is None else _digest(quantization),
        "code": _own_code(model),
        "config": _digest(_computing(config)),
        "generation": sorted(end_tokens(model, tokenizer)),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": template_digest(tokenizer),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """How text becomes token ids and back; not how batches are padded, which is ours."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"vocabulary": tokenizer.get_vocab(), "kind": type(tokenizer).__name__}
    spaces = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    return _digest([rules, special, spaces])


def template_digest(tokenizer: Any) -> str | None:
    """The chat template, or all of them where there are several; None where there is none."""
    template = template_text(tokenizer)  # which may lie in a processor's file
    return None if template is None else _digest(template)


def difference(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[tuple[str, object, object] | None, list[str]]:
    """What of two records' identities may not differ and does: its title and both values; and notes on the rest.

    Args:
        before, now: records as run.json holds them, with `identity`, `base` and `versions`.
    """
    old, new = before.get("identity") or {}, now.get("identity") or {}
    changed = [name for name in TITLES if old.get(name) != new.get(name)]
    versions = other_versions(before, now)
    notes = list(versions)
    for name in changed:
        title = TITLES[name]
        if name == "inputs" and "chat_template" not in changed:
            notes.append(
                "the chat template renders the prompts otherwise than when the run began, as by telling a date"
            )
        elif name == "chat_template" and "inputs" not in changed and "tokenizer" not in changed:
            notes.append("the chat template has changed since the run began; the run's prompts look as they did")
        elif name in ("config", "tokenizer") and versions and "inputs" not in changed:
            notes.append(f"{title} is another by the versions of today; the run's prompts look as they did")
        elif name != "inputs":
            if name == "weights" and (part := other_weights(before["base"], now["base"]["weights"])):
                title = f"{title} of {part}"
            return (title, _shown(old.get(name)), _shown(new.get(name))), []
    return None, notes


def other_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What computed a run and is another now, in words; both as records of run.json hold it."""
    usual = {"engine": "transformers"}  # runs before there was a choice do not say
    old, new = ({"llmva": one.get("llmva"), **usual, **one.get("versions", {})} for one in (before, now))
    return [
        f"{name} is {new.get(name)}, and was {old.get(name)} when the run began"
        for name in COMPUTED_BY
        if old.get(name) != new.get(name)
    ]


def notes_on_edit(record: Mapping[str, Any], model: Any, tokenizer: Any) -> list[str]:
    """What has changed since the run that an edit is from, beside the weights, which the edit itself knows.

    An edit may be wanted under another chat template; that it was fitted under this one should be known.
    """
    known = record.get("identity") or {}
    here = belongings(model, tokenizer) if known else {}
    other = [title for name, title in TITLES.items() if name in here and known.get(name) != here[name]]
    return [f"Not as in the edit's run: {', '.join(other)}. That run's figures need not hold here."] if other else []


def _adapters(model: Any) -> str | None:
    """The active adapters of PEFT with the scale of each; their weights are counted among the model's."""
    active = []
    for name, module in model.named_modules():
        if not hasattr(module, "merged_adapters") or getattr(module, "disable_adapters", False):
            continue
        scales = getattr(module, "scaling", None) or {}
        own = [adapter for adapter in module.active_adapters if adapter not in module.merged_adapters]
        active.append([name, [[adapter, scales.get(adapter)] for adapter in own]])
    return _digest(active) if any(own for _, own in active) else None


def _own_code(model: Any) -> str | None:
    """The source of a model class that comes with the model or from the user; None for one of transformers."""
    kind = type(model)
    root = kind.__module__.split(".")[0]
    if root in ("transformers", "peft", "torch"):
        return None
    try:
        source = Path(inspect.getfile(kind))
        files = sorted(source.parent.glob("*.py")) if root == "transformers_modules" else [source]
        return _digest([[path.name, path.read_text(encoding="utf-8")] for path in files])
    except (OSError, TypeError, UnicodeDecodeError):  # a class made in a notebook
        return kind.__qualname__


def _computing(config: Any) -> Any:
    """A config without UNTOLD and dropout, at any depth."""
    if isinstance(config, dict):
        kept = {str(key): value for key, value in config.items() if key not in UNTOLD and "drop" not in str(key)}
        return {key: _computing(value) for key, value in kept.items()}
    return [_computing(value) for value in config] if isinstance(config, list | tuple) else config


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_named).encode()).hexdigest()[:16]


def _named(value: Any) -> str:
    """An object of a config, by its text unless that tells where in memory it lies."""
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _shown(value: Any) -> object:
    return "none" if value is None else value
