"""What a model's files hold and transformers passes over without a word, in sentences for the limits of its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dropped(report: Mapping[str, Any], name: str) -> list[str]:
    """What is told of tensors that the checkpoint has and transformers leaves out, such as biases the config denies."""
    unexpected = sorted(report["unexpected_keys"])
    if not unexpected:
        return []
    more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
    return [
        f"The checkpoint of '{Path(name).name}' holds tensors that its model type does not use and that no figure "
        f"knows of: {unexpected[0]}{more}."
    ]


def untied(model: Any, name: str) -> list[str]:
    """What is told of a model whose config ties its embeddings and whose files hold two that differ."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not tied or entry is None or head is None or head.weight is entry.weight:
        return []
    return [
        f"The config of '{Path(name).name}' ties the output embedding to the input's, and its files hold two that "
        "differ: both were used as they are, and programs that tie them give other answers. Correct "
        "tie_word_embeddings in config.json."
    ]
