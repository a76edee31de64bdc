"""An edit measured on data sets other than those that it was fitted on, as in the paper's Appendix G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.judges.base import Judge
from llmva.models.chat_model import ChatModel
from llmva.prompts.testsets import TestSet


def transfer(chat: ChatModel, sets: Sequence[TestSet], judge: Judge, **how: Any) -> dict[str, Any]:
    """Rates on each set, before and after an edit, and on all of them together.

    Args:
        sets: as `read_test_sets` gives them.
        how: further arguments of `evaluate`, the edit among them.

    Returns:
        What `evaluate` returns for all prompts, with `sets`, each with `before` and `after` (docs/datasets.md), and
        `limits`, sentences that a reader of the rates must know.
    """
    if not sets:
        raise UsageError("no data set was named: add --data with a name that llmva data list shows.")
    prompts = [prompt for one in sets for prompt in one.prompts]
    parts: dict[str, tuple[int, int]] = {}
    end = 0
    for one in sets:
        parts[one.name] = (end, end + len(one.prompts))
        end += len(one.prompts)
    record = evaluate(chat, prompts, judge, parts=parts, **how)
    rates = record.pop("parts")
    return {
        "sets": [{**one.about, **rates[one.name]} for one in sets],
        **record,
        "limits": [*record.get("limits", []), *(limit for one in sets for limit in one.limits)],
    }
