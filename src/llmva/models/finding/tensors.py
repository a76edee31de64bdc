"""What modules take and give: tensors, tuples that begin with one, and hooks that see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NOISE = 1e-4  # relative difference of two passes over the same tokens


def first_tensor(output: Any) -> torch.Tensor:
    """The output tensor of a module that returns a tensor, or a tuple that begins with it."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """A module's output with `tensor` in the place of `first_tensor`."""
    return type(output)([tensor, *output[1:]]) if isinstance(output, tuple | list) else tensor


def copied(output: Any) -> Any:
    """An output of which nothing changes when the model writes into its tensors."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if type(output) in (tuple, list):
        return type(output)(copied(part) for part in output)
    return output


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove these hooks at the end of the block, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nearly_equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two passes over the same tokens, computed in `dtype`, gave the same.

    Some kernels add in another order each time, so the dtype's own noise is allowed.
    """
    off = (one - other).norm() / other.norm().clamp_min(1e-30)
    return float(off) <= max(NOISE, 4 * torch.finfo(dtype).eps)


def is_norm(module: Any) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def streams_of(tensor: torch.Tensor, tokens: int, width: int) -> torch.Tensor | None:
    """A block's input or output for one row of tokens as [k, tokens, d], k residual streams; None of another shape.

    Models with several streams keep them as [k, 1, t, d], [1, t, k, d] or [1, t, k d].
    """
    if tensor.ndim < 2 or tensor.numel() % (tokens * width) or tensor.shape[-1] % width:
        return None
    count = tensor.numel() // (tokens * width)
    if count == 1:
        return tensor.reshape(1, tokens, width)
    if tensor.shape[-1] == width and tensor.shape[-2] == tokens:
        return tensor.reshape(count, tokens, width)
    if tensor.shape[0] == tokens or (tensor.ndim > 2 and tensor.shape[1] == tokens):
        return tensor.reshape(tokens, count, width).transpose(0, 1)
    return None


def last_states(output: Any, rows: int, width: int) -> torch.Tensor:
    """The residual stream [rows, d] at the last token of what a block gave for `rows` rows; several streams summed."""
    x = first_tensor(output)
    if x.ndim == 4 and x.shape[1] == rows and x.shape[0] != rows:  # [k, rows, t, d]
        return x[:, :, -1].sum(0)
    if x.ndim == 4:  # [rows, t, k, d]
        return x[:, -1].sum(1)
    return x.reshape(rows, -1, x.shape[-1] // width, width)[:, -1].sum(1)
