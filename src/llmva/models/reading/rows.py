"""One forward pass over rows of tokens, whose shared beginning may have been read already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmva.models.forward import logits_of, run_forward
from llmva.models.reading.below import Below
from llmva.models.reading.cache import Prefix, rest_inputs


def read_rows(
    model: Any,
    padding: int,
    rows: Sequence[list[int]],
    prefix: Prefix | None,
    keep: int = 1,
    below: Below | None = None,
) -> Tensor:
    """Logits [rows, keep, V] at the last `keep` tokens of each row. Call it without gradients.

    Args:
        padding: token id that fills rows up.
        below: what passes over the same rows share.
    """

    def work() -> Tensor:
        inputs = rest_inputs(model, rows, padding, prefix)
        return logits_of(run_forward(model, inputs, keep=keep, use_cache=prefix is not None), keep)

    if below is None:
        return work()
    return below.read((prefix.length if prefix else 0, *map(tuple, rows)), work)
