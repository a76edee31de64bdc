"""How many prompts go through the model at once: a first guess from its memory, halved whenever memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llmva.errors import LlmvaError

T = TypeVar("T")
MOST = 256
CPU_SHARE = 0.25  # of the weights' bytes that caches may take, beside SPARE
SPARE = 192 * 2**20


@dataclass
class Batching:
    """`size` only falls. A run keeps one, so that what it learned of the machine's memory stays known."""

    size: int

    def over(self, items: list[T], work: Callable[[list[T]], Any]) -> Iterator[tuple[list[T], Any]]:
        """Yield `(batch, work(batch))` over `items` in order, halving the batch on out-of-memory and going on."""
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            try:
                result = work(batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise LlmvaError("Memory does not hold even one prompt: use a smaller model or shorter prompts.") from error
                result = None
            if result is None:  # outside the except block: the traceback holds the failed batch's tensors
                self.size = max(1, len(batch) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield batch, result
            start += len(batch)


def first_guess(model: Any, longest: int) -> int:
    """Rows of `longest` tokens whose caches fit beside the weights, a power of two from 1 to 256."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    device = next(model.parameters()).device
    free = weights * CPU_SHARE + SPARE
    if device.type == "cuda":
        free = 0.7 * torch.cuda.mem_get_info(device)[0]
    element = next(model.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head * element
    passing = 12 * config.hidden_size * 4  # activations of one block, which come and go
    rows = free / max(1, longest * (cached + passing) + 3 * 4 * config.vocab_size)
    return int(min(MOST, 2 ** max(0, int(rows).bit_length() - 1)))


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text
