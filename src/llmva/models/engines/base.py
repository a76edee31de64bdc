"""An engine: another program that writes a model's answers, from token ids to token ids.

Captures and gradients are read with transformers in any case. So an engine is given prompts as `ChatModel` renders them
and the edit as maps of sublayers' outputs, and what it wrote is cut where transformers' own loop would have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from llmva.errors import LlmvaError
from llmva.models.engines.applied import Maps, applied_maps
from llmva.models.reading.decoding import End

UNLIKELY = 0.5  # a first token of less than this share of the likeliest one's chance is no matter of rounding
ODD_SHARE = 0.05  # of answers that may begin so nevertheless
CHECKED = 16  # answers whose beginnings are compared, where no captures are wanted


class Engine(Protocol):
    """Writes greedily. Its program starts with the first rows."""

    @property
    def title(self) -> str:
        """Name, version and how it is given edits, for run.json."""
        ...

    def write(
        self, rows: Sequence[Sequence[int]], budgets: Sequence[int], ends: Sequence[int], maps: Maps, end: End
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield `(row, its new tokens that count)` as rows end.

        Args:
            rows: token ids of each prompt.
            budgets: maximum number of new tokens of each row, at least 1.
            ends: tokens that end a row, the last of those that count.
            maps: the edit.
            end: as `Growing` takes it; the engine may go on a little longer.
        """
        ...

    def close(self) -> None:
        """End its program; another `write` starts it anew."""
        ...


@dataclass
class Growing:
    """New tokens of a row, of which an engine shows some at a time; `end` is asked after each of them."""

    end: End
    asked: int = 0

    def count(self, new: Sequence[int]) -> int | None:
        """How many of all new tokens so far count, if the row has ended within them."""
        for length in range(self.asked + 1, len(new) + 1):
            self.asked = length
            if (count := self.end(list(new[:length]))) is not None:
                return count
        return None


class FirstTokens(Protocol):
    """The most likely first tokens of each answer, int64 [n, k], and their chances [n, k]."""

    @property
    def likely(self) -> Tensor | None: ...

    @property
    def chances(self) -> Tensor | None: ...


def written_by(
    engine: Engine,
    model: Any,
    rows: Sequence[Sequence[int]],
    budgets: Sequence[int],
    ends: Sequence[int],
    end: End,
    first: FirstTokens,
) -> Iterator[tuple[int, list[int]]]:
    """`engine.write` with the edit that acts on `model` by hook.

    Args:
        first: how answers begin as `model` reads the prompts, at least the first of them.

    Raises:
        UsageError: hooks on the model that an engine cannot be given.
        LlmvaError: more answers begin unlike the model's than rounding explains: the engine has other weights, or not
            the edit.
    """
    odd, checked = 0, 0 if first.likely is None else len(first.likely)
    for i, new in engine.write(rows, budgets, ends, applied_maps(model), end):
        if i < checked and first.likely is not None and first.chances is not None:
            chances = dict(zip(first.likely[i].tolist(), first.chances[i].tolist(), strict=True))
            odd += chances.get(new[0], 0.0) < UNLIKELY * max(chances.values())
        yield i, new
    if odd > max(1, ODD_SHARE * checked):
        raise LlmvaError(
            f"{engine.title} begins {odd} of {checked} answers with words that the model with its edit finds "
            "unlikely, so it has other weights or not the edit: leave --engine out, or try another version."
        )
