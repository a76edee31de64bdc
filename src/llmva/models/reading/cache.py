"""Plain caches of keys and values: a beginning that all rows share, rows that leave, rows that join.

A cache is plain if it holds nothing but keys and values of past tokens. Then a row of it can be copied, dropped or put
beside rows of other lengths: columns of padding between them are hidden by the attention mask, and positions are given.
Recurrent states and windows that slide cannot be cut so, and models with such caches are read without this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmva.models.chat.inputs import forward_inputs, input_device, pad_left, takes
from llmva.models.forward import is_of_transformers, run_forward
from llmva.models.sublayers import text_config

ROOM = 32  # tokens; a cache that is full is copied into one with so much more room
MIN_SHARED = 2  # tokens; a shorter beginning is not worth a pass of its own


def cache_name(model: Any) -> str | None:
    """The parameter of the model's forward that takes a cache; None for code of a model's own, which may mean any."""
    # transformers has called it by both names
    names = [name for name in ("cache", "past_key_values") if takes(model, name)]
    return names[0] if names and is_of_transformers(model) else None


def plain_cache(model: Any) -> Any | None:
    """An empty plain cache, or None if the model needs another kind.

    A window that slides saves memory, not results: the model's mask hides what lies before it, so a plain cache does
    for such a model too.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if cache_name(model) is None:
        return None
    try:
        layers = DynamicCache(config=text_config(model)).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a config that says nothing of its layers
        return None
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return DynamicCache()


@cache
def _layer_with_room() -> Any:
    """The class of a layer that takes new tokens without copying the old ones at each."""
    from transformers.cache_utils import DynamicLayer

    class LayerWithRoom(DynamicLayer):  # type: ignore[no-untyped-call]
        """Keys and values at the beginning of larger tensors, `rooms`. Not for graphs: it writes into them."""

        rooms: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            old = self.get_seq_length()
            end = old + key_states.shape[2]
            held: Any = (self.keys, self.values)
            rooms = self.rooms
            if rooms is None or end > rooms[0].shape[2] or held[0].data_ptr() != rooms[0].data_ptr():
                rooms = _room(key_states, end + ROOM), _room(value_states, end + ROOM)
                if old:
                    rooms[0][:, :, :old], rooms[1][:, :, :old] = held
            for room, states in zip(rooms, (key_states, value_states), strict=True):
                room[:, :, old:end] = states
            self.rooms, self.keys, self.values = rooms, rooms[0][:, :, :end], rooms[1][:, :, :end]
            return self.keys, self.values

    return LayerWithRoom


def _room(states: Tensor, tokens: int) -> Tensor:
    return states.new_empty(states.shape[0], states.shape[1], tokens, states.shape[3])


@dataclass(frozen=True)
class Prefix:
    """Tokens with which all rows of a call begin, and their keys and values [1, heads, tokens, head]; None: a layer
    that has none of its own."""

    length: int
    layers: tuple[tuple[Tensor, Tensor] | None, ...]

    def fill(self, empty: Any, rows: int) -> Any:
        """Let an empty plain cache begin with these tokens in each of `rows` rows."""
        for index, layer in enumerate(self.layers):
            if layer is not None:
                keys, values = (x.expand(rows, *x.shape[1:]) for x in layer)
                empty.update(keys, values, index)
            elif len(empty.layers) <= index:
                empty.layers.append(empty.layer_class_to_replicate())
        return empty


def read_prefix(model: Any, rows: Sequence[Sequence[int]]) -> Prefix | None:
    """What all rows share at their beginning, read once by the model as it is now, hooks included.

    At least the last token of every row is left to be read. None if they share too little.
    """
    length = shared_length(rows)
    if len(rows) < 2 or length < MIN_SHARED:
        return None
    name, empty = cache_name(model), plain_cache(model)
    assert name is not None
    assert empty is not None
    ids = torch.tensor([list(rows[0][:length])], device=input_device(model))
    with torch.no_grad():  # not inference_mode: a graph cannot use its tensors
        run_forward(model, {**forward_inputs(model, ids, torch.ones_like(ids)), name: empty}, keep=1, use_cache=True)
    return Prefix(length, tuple((x.keys, x.values) if x.is_initialized else None for x in empty.layers))


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows share at their beginning, at most one less than the shortest has."""
    least, most = min(map(list, rows)), max(map(list, rows))  # what the first and the last in order share, all share
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(max(0, limit)) if least[i] != most[i]), max(0, limit))


def rest_inputs(
    model: Any,
    rows: Sequence[Sequence[int]],
    padding: int,
    prefix: Prefix | None,
    *,
    cached: bool = False,
    room: bool = False,
) -> dict[str, Any]:
    """Arguments of a forward pass over left-padded `rows`, of which `prefix` has been read.

    Args:
        cached: give a cache to go on from in any case, not only where there is a prefix.
        room: many more tokens will follow, and no graph is wanted.
    """
    shared = prefix.length if prefix else 0
    ids, mask = pad_left([row[shared:] for row in rows], padding, input_device(model))
    mask = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
    inputs: dict[str, Any] = forward_inputs(model, ids, mask)
    if prefix is not None or cached:
        name = cache_name(model)
        assert name is not None
        empty = plain_cache(model)
        assert empty is not None
        if room:
            empty.layer_class_to_replicate = _layer_with_room()
        inputs[name] = prefix.fill(empty, len(rows)) if prefix else empty
    return inputs


# -- rows that leave and join ------------------------------------------------------------------------------------


def keep_rows(held: Any, mask: Tensor, kept: list[int]) -> Tensor:
    """Drop all other rows from the cache `held`, and columns that are padding in all that stay; returns their mask."""
    index = torch.tensor(kept, device=mask.device)
    mask = mask[index]
    used = mask.any(0)
    narrow = None if bool(used.all()) else used.nonzero()[:, 0]
    for layer in _filled(held):
        rows = index.to(layer.keys.device)
        for name in ("keys", "values"):
            x = getattr(layer, name)[rows]
            setattr(layer, name, x if narrow is None else x[:, :, narrow.to(x.device)])
        layer.rooms = None  # else what the rows had stays until the next token
    return mask if narrow is None else mask[:, narrow]


def join_rows(held: Any, mask: Tensor, other: Any, other_mask: Tensor) -> Tensor:
    """Put the rows of `other` below those of the cache `held`, the shorter padded on the left; returns their mask."""
    width = max(mask.shape[1], other_mask.shape[1])
    for layer, more in zip(_filled(held), _filled(other), strict=True):
        for name in ("keys", "values"):
            both = (pad(x, (0, 0, width - x.shape[2], 0)) for x in (getattr(layer, name), getattr(more, name)))
            setattr(layer, name, torch.cat(list(both)))
        layer.rooms = None
    return torch.cat([pad(x, (width - x.shape[1], 0)) for x in (mask, other_mask)])


def _filled(held: Any) -> list[Any]:
    return [layer for layer in held.layers if layer.is_initialized]
