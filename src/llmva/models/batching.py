"""How many prompts are in a batch: a first guess from free memory, halved whenever memory runs out."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from llmva.errors import LlmvaError, UsageError
from llmva.models.sublayers import text_config

T = TypeVar("T")
MAX_ROWS = 256
CPU_SHARE = 0.25  # on the CPU, caches may take this share of the weights' bytes, plus SPARE
SPARE = 384 * 2**20
FREE_SHARE = 0.5  # of the memory that is free on the machine
ACTIVATIONS = 96 * 2**20  # off CUDA, bytes of the activations of one block: more tokens at once bring no speed there
LEAST_AT_ONCE = 512  # tokens; below, products are slower
GRAPH = 128 * 2**20  # off CUDA, bytes of keys and values that a graph of gradients may hold, or
GRAPH_SHARE = 1 / 16  # of the weights' bytes
KEPT_FREE = 0.92  # of --max-memory: what is counted is not all that is taken
LEAST_TOKENS = 256  # a prompt and its answer


@dataclass
class Batching:
    """`tokens` is the maximum number of tokens in a batch, padding and cache included. It only decreases.

    A run keeps one Batching, so that a size that once fitted is used for the rest of the run.
    """

    tokens: int
    square: float = 0.0  # memory of attention for each squared token of a row's length, in tokens
    row: float = 0.0  # memory of a row's logits, which are held in float32 too, in tokens
    alone_above: int | None = None  # a row of more tokens is a batch of its own
    at_once: int | None = None  # maximum number of tokens, padding included, that are read at once; None: `tokens`
    in_graph: int | None = None  # maximum number of tokens whose keys and values a graph holds; None: `tokens`

    def cost(self, length: int, at_once: int | None = None) -> float:
        """How many tokens of the maximum a row of `length` tokens uses, of which `at_once` go through the model at once
        and the rest one by one; None means all."""
        return max(1.0, length + self.square * (length if at_once is None else at_once) ** 2 + self.row)

    def read_at_once(self, length: int) -> int:
        """How many rows of `length` tokens may be read at once, at least 1."""
        return MAX_ROWS if self.at_once is None else max(1, self.at_once // max(1, length))

    def over(
        self,
        order: list[int],
        length: Callable[[int], int],
        work: Callable[[list[int]], T],
        *,
        decodes: bool = False,
    ) -> Iterator[tuple[list[int], T]]:
        """Yield `(batch, work(batch))` over `order`, items sorted longest first; `length` is an item's tokens.

        `decodes` says that most of these tokens go through the model one by one, so that `at_once` does not count. If
        memory runs out, the maximum is halved and the same items are tried again.
        """
        start = 0
        while start < len(order):
            rows = max(1, min(MAX_ROWS, int(self.tokens / self.cost(length(order[start])))))
            if not decodes:
                rows = min(rows, self.read_at_once(length(order[start])))
            if self.alone_above is not None and length(order[start]) > self.alone_above:
                rows = 1
            batch = order[start : start + rows]
            done: list[T] = []
            try:
                done.append(work(batch))
            except RuntimeError as error:  # also torch.OutOfMemoryError, a subclass
                check_divisible(error, len(batch))
            if done:
                yield batch, done.pop()
                start += len(batch)
                trim()
            else:  # outside the except block, because its traceback holds the failed batch's tensors
                self.tokens = math.ceil(self.cost(length(order[start])) * max(1, len(batch) // 2))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by decreasing length: rows of a batch need little padding, and memory runs out early or never."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def first_guess(model: Any, tokens: int | None = None) -> Batching:
    """As many tokens as fit with their caches beside the weights, or `tokens` if given.

    A power of two, so that a machine with slightly more free memory makes the same batches.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        free = 0.7 * torch.cuda.mem_get_info(parameter.device)[0]
    else:
        free = min(_weights_bytes(model) * CPU_SHARE + SPARE, FREE_SHARE * psutil.virtual_memory().available)
    return _sized(model, tokens or _power_of_two(free / _token_bytes(model)))


def tokens_within(model: Any, gigabytes: float) -> int:
    """Tokens in a batch with which this process, or its part of a GPU, takes at most so much memory.

    Raises UsageError if the loaded model leaves no room for a batch.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        taken = float(torch.cuda.memory_reserved(parameter.device))
    else:
        taken = float(psutil.Process().memory_info().rss)
    free = KEPT_FREE * gigabytes * 1e9 - taken
    tokens = int(free / _token_bytes(model))
    least = math.ceil(_sized(model, 1).cost(LEAST_TOKENS))
    if tokens < least:
        raise UsageError(
            f"With the model loaded, {taken / 1e9:.2f} GB of memory are taken, which leaves no room for a batch: give "
            f"--max-memory {(taken + least * _token_bytes(model)) / KEPT_FREE / 1e9 + 0.05:.1f} or more."
        )
    return tokens


def _sized(model: Any, tokens: int) -> Batching:
    config, parameter = text_config(model), next(model.parameters())
    each, size = _token_bytes(model), parameter.element_size()
    queries = _queries(config)
    # off CUDA, attention under a padding mask holds its scores: float32, and once more in the model's dtype
    square = 0.0 if parameter.device.type == "cuda" else queries * (4 + size) / each
    head = model.get_output_embeddings()  # an encoder has none
    row = 0.0 if head is None else int(head.weight.shape[0]) * (4 + size) / each
    at_once = in_graph = None
    if parameter.device.type != "cuda":
        at_once = max(LEAST_AT_ONCE, _power_of_two(ACTIVATIONS / _passing_bytes(model)))
        # where several heads share keys and values, a graph holds a copy for each
        copies = cached_bytes(model, queries)
        in_graph = _power_of_two(max(GRAPH, GRAPH_SHARE * _weights_bytes(model)) / copies)
    return Batching(tokens, square, row, _changes_its_positions(config), at_once, in_graph)


def _token_bytes(model: Any) -> float:
    """Memory of a token: its keys and values, and the activations of one block."""
    return cached_bytes(model) + _passing_bytes(model)


def _passing_bytes(model: Any) -> float:
    """Memory of the activations of one block for a token."""
    config, parameter = text_config(model), next(model.parameters())
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # one for each block
    return float((6 * config.hidden_size + 3 * inner) * parameter.element_size())


def _weights_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cached_bytes(model: Any, heads: int | None = None) -> float:
    """Memory of a token's keys and values, of so many heads or as many as the cache has."""
    config, parameter = text_config(model), next(model.parameters())
    queries = _queries(config)
    heads = heads or getattr(config, "num_key_value_heads", None) or queries
    head = getattr(config, "head_dim", None) or config.hidden_size // queries
    return float(2 * config.num_hidden_layers * heads * head * parameter.element_size())


def _power_of_two(most: float) -> int:
    """The largest power of two that is not above `most`, at least 1."""
    return int(2 ** max(0, int(most).bit_length() - 1))


def _queries(config: Any) -> int:
    """How many heads attention has."""
    return int(getattr(config, "num_attention_heads", None) or max(1, config.hidden_size // 64))


def _changes_its_positions(config: Any) -> int | None:
    """The length from which on a model turns its position embeddings otherwise, as LongRoPE does; None for most.

    transformers goes by the longest row of a batch, so that a short prompt beside a long one would get other answers.
    """
    rules = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_kinds = [rules, *(part for part in rules.values() if isinstance(part, dict))] if isinstance(rules, dict) else []
    for part in of_kinds:
        if part.get("rope_type", part.get("type")) in ("longrope", "su"):
            length = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return length if isinstance(length, int) else None
    return None


def trim() -> None:
    """Return freed memory to the system. glibc keeps it in pieces that a batch of another shape cannot use.

    In a run on a 135M model these pieces added up to several hundred MB.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)


def check_divisible(error: RuntimeError, rows: int) -> None:
    """Raises what cannot be mended by fewer than `rows` rows: an error other than of memory, or of a single row."""
    if not _out_of_memory(error):
        raise error
    if rows == 1:
        raise LlmvaError("Memory does not hold even one prompt: use a smaller model or shorter prompts.") from error


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text
