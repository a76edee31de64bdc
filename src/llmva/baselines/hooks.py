"""Change the residual stream at some blocks while a model runs, with knowledge of which tokens are the prompt.

A forward pass over whole sequences is a prompt pass. With a cache, later ones have one new token per row. A prompt may
also come with its answer in one forward pass, as in comparisons on text. So its end is found by the tokens that the
chat template puts after every message, and a decision at the end of the prompt is the same in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from llmva.errors import LlmvaError
from llmva.models.at_rest import check_thread
from llmva.models.chat import ChatTemplate
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.sublayers import Decoder

T = TypeVar("T")
Place = Literal["input", "output"]  # of a block


@dataclass(frozen=True)
class Pass:
    """One forward pass over `rows` sequences."""

    rows: int
    prompt: bool  # whole sequences; otherwise tokens after a cache, and the fields below are None
    ids: Tensor | None = None  # int64 [rows, t]
    real: Tensor | None = None  # bool [rows, t]: not padding
    ends: Tensor | None = None  # int64 [rows]: column of the last prompt token

    def at_end(self, states: Tensor) -> Tensor:
        """States [rows, t, d] at the last prompt token: [rows, d]."""
        assert self.ends is not None
        rows = torch.arange(self.rows, device=states.device)
        return states[rows, self.ends.to(states.device)]

    def in_prompt(self) -> Tensor:
        """bool [rows, t]: real tokens up to the last prompt token."""
        assert self.ends is not None
        assert self.real is not None
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        return self.real & (columns <= self.ends[:, None])

    def prompt_rows(self) -> list[list[int]]:
        """Token ids of each prompt, without padding and answer."""
        assert self.ids is not None
        return [row[kept].tolist() for row, kept in zip(self.ids, self.in_prompt(), strict=True)]

    def from_end(self) -> Tensor:
        """bool [rows, t]: the last prompt token and what follows it."""
        assert self.ends is not None
        assert self.real is not None
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        return self.real & (columns >= self.ends[:, None])


class Behaviour:
    """One application of a baseline. May keep state from a prompt pass for the forward passes that continue it."""

    def begin(self, current: Pass, alone: Callable[[Callable[[], T]], T]) -> None:
        """Called when a forward pass begins. `alone(work)` runs work on the model without our hooks and newer ones."""

    def change(self, block: int, states: Tensor, current: Pass) -> Tensor | None:
        """New residual stream [rows, t, d] at `block`, or None for no change. Must not write into `states`."""
        return None


class RowGate:
    """A number for each row, set in a prompt pass and kept for the forward passes that continue it."""

    def __init__(self) -> None:
        self._values: Tensor | None = None

    def decide(self, values: Tensor) -> None:
        """`values` [rows]."""
        self._values = values

    def column(self, states: Tensor) -> Tensor:
        """[rows, 1, 1] of the dtype and device of `states`. Raises LlmvaError for other rows."""
        if self._values is None or len(self._values) != len(states):
            raise LlmvaError(
                "The steered pass continues prompts that were not seen: begin each batch with its prompts."
            )
        return self._values.to(states)[:, None, None]


def find_blocks(decoder: Decoder) -> nn.ModuleList:
    """The module list that ends with the decoder's last block. Raises LlmvaError for several residual streams."""
    if decoder.streams > 1:
        raise LlmvaError("The decoder has several residual streams, and no baseline says which to steer.")
    if decoder.blocks is None:
        raise LlmvaError("The decoder's blocks are no list of modules: the architecture cannot be steered.")
    return decoder.blocks


def prompt_suffix(template: ChatTemplate) -> tuple[int, ...]:
    """Token ids at the end of every rendered prompt, independent of the message; perhaps none."""
    one, other = (template.row(text)[::-1] for text in ("yes", "no ."))
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return tuple(one[:count][::-1])


def prompt_ends(ids: Tensor, suffix: Sequence[int]) -> Tensor:
    """Column of the last token of the last `suffix` in each row of `ids` [rows, t]; the last column without one."""
    rows, width = ids.shape
    last = torch.full((rows,), width - 1, dtype=torch.long, device=ids.device)
    if not suffix or len(suffix) > width:
        return last
    wanted = torch.tensor(suffix, device=ids.device)
    matches = (ids.unfold(1, len(suffix), 1) == wanted).all(-1)  # [rows, width - len(suffix) + 1]
    columns = torch.arange(matches.shape[1], device=ids.device)
    start = torch.where(matches, columns, -1).max(dim=1).values
    return torch.where(start >= 0, start + len(suffix) - 1, last)


@contextmanager
def steered(
    decoder: Decoder, blocks: Sequence[int], place: Place, suffix: Sequence[int], behaviour: Behaviour | None
) -> Iterator[None]:
    """Let `behaviour` act at the input or output of `blocks`; None does nothing."""
    if behaviour is None:
        yield
        return
    watch = _Watch(decoder.model, behaviour, suffix)
    modules = find_blocks(decoder)
    check_thread(decoder.model)
    handles = [decoder.model.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    for index in blocks:
        if place == "input":
            handles.append(modules[index].register_forward_pre_hook(watch.before(index), with_kwargs=True))
        else:
            handles.append(modules[index].register_forward_hook(watch.after(index)))
    watch.newest = max(handle.id for handle in handles)
    with hooked(handles):
        yield


class _Watch:
    """The hooks of one application."""

    def __init__(self, model: Any, behaviour: Behaviour, suffix: Sequence[int]) -> None:
        self.model, self.behaviour, self.suffix = model, behaviour, suffix
        self.current = Pass(0, False)
        self.idle = False
        self.newest = 0

    def begin(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.idle:
            return
        self.current = self._read(args, kwargs)
        self.behaviour.begin(self.current, self._alone)

    def before(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            new = self._change(index, states)
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def after(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            new = self._change(index, first_tensor(output))
            if new is None or isinstance(output, torch.Tensor):
                return new
            return type(output)([new, *output[1:]])

        return hook

    def _change(self, index: int, states: Tensor) -> Tensor | None:
        return None if self.idle else self.behaviour.change(index, states, self.current)

    def _read(self, args: Any, kwargs: Any) -> Pass:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor):
            raise LlmvaError("A steered model reads token ids, not embeddings: pass input_ids.")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            seen = mask.shape[1] - ids.shape[1]
        else:
            caches = (value for value in kwargs.values() if hasattr(value, "get_seq_length"))  # its name varies
            seen = max((int(cache.get_seq_length()) for cache in caches), default=0)
            mask = torch.ones_like(ids)
        if seen > 0:
            return Pass(len(ids), False)
        return Pass(len(ids), True, ids, mask.bool(), prompt_ends(ids, self.suffix))

    def _alone(self, work: Callable[[], T]) -> T:
        """Run `work` without our hooks and newer ones, such as those of a capture of the current forward pass."""
        kept: list[tuple[Any, dict[int, Any]]] = []
        self.idle = True
        try:
            for module in self.model.modules():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    if any(key > self.newest for key in hooks):
                        kept.append((hooks, dict(hooks)))
                        for key in [key for key in hooks if key > self.newest]:
                            del hooks[key]
            return work()
        finally:
            for hooks, all_hooks in kept:
                hooks.clear()
                hooks.update(all_hooks)
            self.idle = False
