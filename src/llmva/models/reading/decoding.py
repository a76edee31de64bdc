"""Decoding of many rows: a row that has ended leaves the batch at once, and a waiting one takes its place.

So the batch stays full, and no token is computed that nobody reads. All rows share the keys and values of the tokens
with which they all begin. This needs a plain cache (`cache`), and it is proved on the model before it is used
(`decodes_well`): else transformers' own `generate` answers batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmva.models.batching import MAX_ROWS, Batching, check_divisible, longest_first, trim
from llmva.models.chat.inputs import forward_inputs
from llmva.models.forward import HALF_TOLERANCE, check_numbers, logits_of, run_forward
from llmva.models.reading.cache import (
    cache_name,
    join_rows,
    keep_rows,
    plain_cache,
    read_prefix,
    rest_inputs,
)
from llmva.models.reading.sampling import Choose, greedy

REFILL = 0.125  # waiting rows are read once they can fill this share of the batch: a pass over few tokens is dear
TRIM_EVERY = 8  # steps; rows that leave and tokens that come leave pieces of memory that fit nothing else
TOLERANCE = 1e-3  # of the largest logit, in float32
End = Callable[[list[int]], int | None]  # a row's new tokens -> how many of them count, or None to go on


class Taking(Protocol):
    """What keeps the results of the pass over the prompts."""

    def watch(self, batch: list[int]) -> AbstractContextManager[Any]:
        """Open during the pass over the prompts of these rows."""

    def take_logits(self, batch: list[int], logits: Tensor) -> None:
        """Given the logits [rows, V] of these rows' first new tokens."""


@dataclass
class _Active:
    """Rows that are being answered."""

    rows: list[int]
    new: list[list[int]]  # of each row
    cache: Any
    mask: Tensor  # int64 [rows, columns of the cache]


def decode(
    model: Any,
    padding: int,
    batching: Batching,
    rows: Sequence[Sequence[int]],
    budgets: Sequence[int],
    end: End,
    *,
    taking: Taking | None = None,
    choose: Choose = greedy,
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(row, its new tokens that count)` as rows end, in the order in which they do.

    Args:
        padding: token id that fills rows up.
        budgets: maximum number of new tokens of each row, at least 1.
        end: asked after every new token.
        taking: keeps what the pass over the prompts computes.
        choose: says which token comes next.

    Raises:
        LlmvaError: memory does not hold one row, or its logits are no numbers.
    """
    lengths = [len(row) + budget for row, budget in zip(rows, budgets, strict=True)]
    waiting = longest_first(lengths)[::-1]  # the next one last
    prefix = read_prefix(model, rows)
    unread = [len(row) - (prefix.length if prefix else 0) for row in rows]
    active: _Active | None = None
    steps = 0

    def cost(of: Sequence[int]) -> float:
        return sum(batching.cost(lengths[i], len(rows[i])) for i in of)

    while waiting or active:
        group: list[int] = []
        try:
            group = _next_group(waiting, active.rows if active else [], batching, cost, unread)
            if group:
                added = _prefill(model, padding, rows, group, prefix, taking, choose)
                active = added if active is None else _joined(active, added)
                trim()
            elif active is not None:
                _step(model, active, choose)
                steps += 1
                if steps % TRIM_EVERY == 0:
                    trim()
        except RuntimeError as error:  # also torch.OutOfMemoryError, a subclass
            lost = [*(active.rows if active else []), *group]
            check_divisible(error, len(lost))
        else:
            assert active is not None
            yield from _leave(active, budgets, end)
            if not active.rows:
                active = None
                trim()
            continue
        # outside the except block, because its traceback holds the tensors
        active, batching.tokens = None, math.ceil(cost(lost) / 2)
        waiting = sorted([*waiting, *lost], key=lambda i: (lengths[i], -i))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _next_group(
    waiting: list[int],
    busy: Sequence[int],
    batching: Batching,
    cost: Callable[[Sequence[int]], float],
    unread: Sequence[int],
) -> list[int]:
    """Take the rows that are read next out of `waiting`, those at its end first; none if they are too few for a pass.

    Args:
        busy: rows that are being answered.
        unread: how many tokens of each row are read in that pass.
    """
    room, group, taken, longest, whole = batching.tokens - cost(busy), list[int](), 0.0, 0, False
    while waiting and len(busy) + len(group) < MAX_ROWS:
        one, longest = cost(waiting[-1:]), max(longest, unread[waiting[-1]])
        whole = len(group) >= batching.read_at_once(longest)
        if whole or ((busy or group) and taken + one > room):
            break
        group.append(waiting.pop())
        taken += one
    if busy and waiting and not whole and taken < REFILL * batching.tokens and len(group) < REFILL * MAX_ROWS:
        waiting += group[::-1]
        return []
    return group


@torch.inference_mode()
def _prefill(
    model: Any,
    padding: int,
    rows: Sequence[Sequence[int]],
    group: list[int],
    prefix: Any,
    taking: Taking | None,
    choose: Choose = greedy,
) -> _Active:
    inputs = rest_inputs(model, [rows[i] for i in group], padding, prefix, cached=True, room=True)
    with nullcontext() if taking is None else taking.watch(group):
        logits = logits_of(run_forward(model, inputs, keep=1, use_cache=True), 1)[:, -1]
    check_numbers(model, logits)
    if taking is not None:
        taking.take_logits(group, logits)
    name = cache_name(model)
    assert name is not None
    first = choose(group, [0] * len(group), logits)
    return _Active(list(group), [[token] for token in first], inputs[name], inputs["attention_mask"])


@torch.inference_mode()
def _joined(active: _Active, added: _Active) -> _Active:
    mask = join_rows(active.cache, active.mask, added.cache, added.mask)
    return _Active([*active.rows, *added.rows], [*active.new, *added.new], active.cache, mask)


@torch.inference_mode()
def _step(model: Any, active: _Active, choose: Choose = greedy) -> Tensor:
    """One more token of every row; returns the logits [rows, V] that it was chosen by."""
    ids = torch.tensor([[new[-1]] for new in active.new], device=active.mask.device)
    active.mask = torch.cat([active.mask, torch.ones_like(ids)], 1)
    name = cache_name(model)
    assert name is not None
    inputs: dict[str, Any] = {**forward_inputs(model, ids, active.mask), name: active.cache}
    logits = logits_of(run_forward(model, inputs, keep=1, use_cache=True), 1)[:, -1]
    check_numbers(model, logits)
    for new, token in zip(active.new, choose(active.rows, list(map(len, active.new)), logits), strict=True):
        new.append(token)
    return logits


def _leave(active: _Active, budgets: Sequence[int], end: End) -> list[tuple[int, list[int]]]:
    """Take the rows that have ended out of `active`."""
    kept, gone = [], []
    for place, (row, new) in enumerate(zip(active.rows, active.new, strict=True)):
        count = end(new)
        if count is None and len(new) < budgets[row]:
            kept.append(place)
        else:
            gone.append((row, new[:count]))
    if gone:
        _keep(active, kept)
    return gone


@torch.inference_mode()
def _keep(active: _Active, places: list[int]) -> None:
    if places:
        active.mask = keep_rows(active.cache, active.mask, places)
    active.rows, active.new = [active.rows[i] for i in places], [active.new[i] for i in places]


# -- proof -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decodes_well(model: Any, padding: int, rows: Sequence[list[int]]) -> bool:
    """Whether rows that share a beginning, join a running batch and leave it give the logits that each gives alone.

    Args:
        rows: three rows of different lengths that begin alike.
    """
    if plain_cache(model) is None:
        return False
    try:
        prefix = read_prefix(model, rows)
        seen: list[list[Tensor]] = [[] for _ in rows]

        class Noting:
            def watch(self, batch: list[int]) -> AbstractContextManager[None]:
                return nullcontext()

            def take_logits(self, batch: list[int], logits: Tensor) -> None:
                for place, i in enumerate(batch):
                    seen[i].append(logits[place].float())

        noting = Noting()
        active = _prefill(model, padding, rows, [0, 1], prefix, noting)
        written = dict(zip(active.rows, active.new, strict=True))
        noting.take_logits(active.rows, _step(model, active))
        added = _prefill(model, padding, rows, [2], prefix, noting)
        written[2] = added.new[0]
        active = _joined(active, added)
        noting.take_logits(active.rows, _step(model, active))
        _keep(active, [1, 2])
        noting.take_logits(active.rows, _step(model, active))
        for i, row in enumerate(rows):
            whole = [*row, *written[i][: len(seen[i]) - 1]]
            keep = len(seen[i])
            ids = torch.tensor([whole], device=active.mask.device)
            alone = run_forward(model, forward_inputs(model, ids, torch.ones_like(ids)), keep=keep)
            wanted = logits_of(alone, keep)[0].float()
            allowed = TOLERANCE if model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
            batched = torch.stack(seen[i]).to(wanted.device)
            if not float((batched - wanted).abs().max()) <= allowed * float(wanted.abs().max().clamp_min(1e-6)):
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may refuse what it was not written for in any way: it is read without this module then
        return False
    return True
