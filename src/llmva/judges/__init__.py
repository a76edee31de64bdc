"""Judges say whether a model answered, refused, or broke down."""

from __future__ import annotations

from llmva.errors import UsageError
from llmva.judges.base import Judge, Judgement, Label
from llmva.judges.phrases import PhraseJudge

__all__ = ["Judge", "Judgement", "Label", "PhraseJudge", "make_judge"]


def make_judge(name: str) -> Judge:
    """The judge called `name`. Raises UsageError, which lists the known names, for any other."""
    known: dict[str, type[Judge]] = {"phrases": PhraseJudge}
    if name not in known:
        raise UsageError(f"There is no judge called '{name}'; choose one of: {', '.join(known)}.")
    return known[name]()
