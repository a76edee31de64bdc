"""Where models keep chat templates: in the tokenizer, perhaps several by name, and in files of their processor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "chat_template.jinja"  # which tokenizers read themselves
PROCESSOR_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json", TOKENIZER_FILE)


def default_template(tokenizer: Any) -> str | None:
    """The text of the template that a tokenizer holds itself, the default one of several; None where it holds none."""
    own: Any = getattr(tokenizer, "chat_template", None)
    text: Any = of_names(own) if isinstance(own, dict) and own else own
    return text if isinstance(text, str) and text else None


def of_names(named: Mapping[str, str]) -> str:
    """The default among named templates; where there is none, the first that is not for tools or documents."""
    special = re.compile(r"tool|rag|document|function|vision|image", re.I)
    order = sorted(named, key=lambda name: (name != "default", special.search(name) is not None))
    return named[order[0]]


def find_in_files(name: str, **where: Any) -> Iterator[tuple[str, str]]:
    """`(file, text)` of the chat templates among the files of a model's processor, the file that counts most first.

    Args:
        name: a folder or a hub id.
        where: further arguments of transformers' `cached_file`, such as `revision`.
    """
    from transformers.utils.hub import cached_file

    for file in PROCESSOR_FILES if name else ():
        try:
            path = cached_file(
                name,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
                **where,
            )
            held = None if path is None else Path(path).read_text(encoding="utf-8")
            text = held if held is None or file == TOKENIZER_FILE else json.loads(held).get("chat_template")
            if isinstance(text, list):
                text = {str(one["name"]): str(one["template"]) for one in text}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):  # what cannot be read holds no template
            continue
        if isinstance(text, dict) and text:
            text = of_names(text)
        if isinstance(text, str) and text.strip():
            yield file, text
