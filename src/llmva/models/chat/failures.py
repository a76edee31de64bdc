"""How templates and tokenizers fail, which are programs of others."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first sentence of a message, in 200 characters at most."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"(?<=\w)\. (?=[A-Z])", lines[0])[0][:200].rstrip(". ")


def panicked(error: BaseException) -> bool:
    """Whether Rust code failed, whose errors are no Exception."""
    return type(error).__name__ == "PanicException"
