"""What many edits share: the blocks below the first edited one compute the same for each of them.

A line search reads the same rows with edit after edit, and gradient writers leave the lower half of a model alone. So
the residual stream at the first block that may differ is kept for each batch, and later passes begin there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.finding.tensors import first_tensor, hooked, nearly_equal
from llmva.models.sublayers import Decoder

Key = tuple[object, ...]


@dataclass
class Below:
    """The streams at block `first`, by the rows of a pass. It holds as long as nothing below that block changes.

    The first pass that begins there is compared with a whole one. If they differ, as in a model whose blocks hand on
    more than the stream, every pass is whole.
    """

    blocks: Sequence[nn.Module]
    first: int
    dtype: torch.dtype
    streams: dict[Key, Tensor] = field(default_factory=dict)
    proven: bool = False

    @classmethod
    def of(cls, decoder: Decoder, first: int) -> Below | None:
        """None if nothing lies below block `first`, or the blocks are no list of modules."""
        blocks = decoder.blocks
        return cls(list(blocks), first, decoder.model.dtype) if blocks and 0 < first < len(blocks) else None

    def read(self, key: Key, work: Callable[[], Tensor]) -> Tensor:
        """`work()`, the logits of one forward pass; `key` says which rows it reads, and how."""
        if self.first == 0:
            return work()
        if key not in self.streams:
            with self._kept(key):
                return work()
        if self.proven:
            with self._begun(self.streams[key]):
                return work()
        whole = work()  # first, because hooks that keep what a pass computes keep that of the first one
        with self._begun(self.streams[key]):
            self.proven = nearly_equal(work().float(), whole.float(), self.dtype)
        if not self.proven:
            self.first = 0
            self.streams.clear()
        return whole

    @contextmanager
    def _kept(self, key: Key) -> Iterator[None]:
        """Keep the stream of the pass inside the block, unless a lower block hands on more than that."""
        more: list[bool] = []

        def look(module: Any, args: Any, output: Any) -> None:
            more.append(not isinstance(first_tensor(output), Tensor) or (isinstance(output, tuple) and len(output) > 1))

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            stream = args[0] if args else kwargs.get("hidden_states")
            if isinstance(stream, Tensor) and not any(more):
                self.streams[key] = stream.detach().clone()  # a block may add to it in place

        handles = [block.register_forward_hook(look) for block in self.blocks[: self.first]]
        with hooked([*handles, self.blocks[self.first].register_forward_pre_hook(keep, with_kwargs=True)]):
            yield

    @contextmanager
    def _begun(self, stream: Tensor) -> Iterator[None]:
        """Inside, the lower blocks do nothing, and block `first` gets `stream`."""

        def begin(module: Any, args: Any, kwargs: Any) -> Any:
            own = stream.clone()
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

        with ExitStack() as after:
            for block in self.blocks[: self.first]:
                after.enter_context(_idle(block))
            handle = self.blocks[self.first].register_forward_pre_hook(begin, with_kwargs=True)
            after.enter_context(hooked([handle]))
            yield


@contextmanager
def _idle(block: nn.Module) -> Iterator[None]:
    """Inside, the block returns the stream that it gets."""
    own = vars(block).get("forward")  # accelerate puts one of its own there
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
