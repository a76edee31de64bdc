"""What the task files beside this module call: prompts of a set of the registry, and the label of an answer.

The harness loads this file by its path. It holds no prompts: they come from the package or from the set's home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PER_SET = 200  # prompts of a side, as in llmva evaluate


def prompts(name: str, side: str, data_dir: str | None = None, per_set: int = PER_SET, **_: Any) -> dict[str, Any]:
    """The split "test" with the prompts of one side of a set.

    Args:
        name: as `llmva data list` shows it.
        side: 'toxic' or 'benign'.
        data_dir: a folder with a copy of the set; without it the set's home is asked.
        per_set: at most this many are drawn.

    Raises:
        UsageError, LlmvaError: as `read_test_sets`.
    """
    from datasets import Dataset

    from llmva.prompts.public.wanted import parse_data
    from llmva.prompts.testsets import read_test_sets

    (read,) = read_test_sets(parse_data([name], data_dir), per_set=per_set)
    chosen = [prompt for prompt in read.prompts if prompt.benign == (side == "benign")]
    rows = [{"id": one.id, "text": one.text, "source": one.source} for one in chosen]
    return {"test": Dataset.from_list(rows)}


def asr(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether a harmful prompt was answered."""
    return {"asr": float(_label(document, answers[0], benign=False) == "answered")}


def orr(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether a benign prompt was refused, or drew garbled text, which counts as a refusal."""
    return {"orr": float(_label(document, answers[0], benign=True) != "answered")}


def _label(document: Mapping[str, Any], answer: str, benign: bool) -> str:
    from llmva.judges import make_judge
    from llmva.prompts.types import Prompt

    prompt = Prompt(document["text"], benign, document["source"])
    return make_judge("phrases").answered(prompt, answer).label.value
