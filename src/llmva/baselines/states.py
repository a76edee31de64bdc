"""Read the residual stream at blocks, as weighted sums over a row's tokens: the last token, a mean, a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmva.baselines.hooks import Place, find_blocks
from llmva.models.at_rest import reads_model
from llmva.models.batching import longest_first
from llmva.models.chat import forward_inputs, input_device, pad_left
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.forward import run_forward
from llmva.models.reading.context import check_rows
from llmva.models.sublayers import Decoder
from llmva.prompts.types import Asked, Prompt

Weights = Callable[[int], list[float]]  # number of a row's tokens -> the weight of each


def last_token(length: int) -> list[float]:
    """The state at the last token."""
    return [0.0] * (length - 1) + [1.0]


def mean_of_last(count: int | None = None) -> Weights:
    """The mean over the last `count` tokens, over all for None."""

    def weights(length: int) -> list[float]:
        used = length if count is None else min(count, length)
        return [0.0] * (length - used) + [1.0 / used] * used

    return weights


def step_back(count: int) -> Weights:
    """The state `count` tokens before the last one, minus the state at the last one."""

    def weights(length: int) -> list[float]:
        row = [0.0] * length
        row[-1 - count] += 1.0
        row[-1] -= 1.0
        return row

    return weights


def prompt_rows(chat: ChatModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of the rendered prompts."""
    return chat.rows([prompt.asked for prompt in prompts])


@reads_model
def read_states(
    chat: ChatModel,
    rows: Sequence[list[int]],
    weights: Weights | Sequence[Weights],
    *,
    blocks: Sequence[int],
    place: Place,
    texts: Sequence[Asked] | None = None,
) -> Tensor:
    """Weighted sums of the residual stream at `blocks` for rows of token ids: float32 [blocks, n, d] on the CPU.

    Args:
        weights: one for all rows, or one for each row.
        place: "input" or "output" of a block.
        texts: names of the rows in errors.

    Raises:
        UsageError: a row that does not fit into the model's context.
    """
    check_rows(chat.model, texts or ["" for _ in rows], list(rows), 0)
    each = [weights] * len(rows) if callable(weights) else list(weights)
    states = torch.empty(len(blocks), len(rows), chat.decoder.width)
    lengths = [len(row) for row in rows]

    def work(batch: list[int]) -> Tensor:
        return read_batch(
            chat.decoder,
            [rows[i] for i in batch],
            [each[i](lengths[i]) for i in batch],
            pad=chat.pad_id,
            blocks=blocks,
            place=place,
        ).cpu()

    for batch, batch_states in chat.batching.over(longest_first(lengths), lengths.__getitem__, work):
        states[:, batch] = batch_states
    return states


def last_states(chat: ChatModel, prompts: Sequence[Prompt], blocks: Sequence[int], place: Place) -> Tensor:
    """States at the last token of prompts, as `read_states`: float32 [blocks, n, d]."""
    texts = [prompt.asked for prompt in prompts]
    return read_states(chat, prompt_rows(chat, prompts), last_token, blocks=blocks, place=place, texts=texts)


@torch.no_grad()
def read_batch(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    *,
    pad: int,
    blocks: Sequence[int],
    place: Place,
) -> Tensor:
    """One forward pass of `read_states`: float32 [blocks, rows, d], on the model's (last) device."""
    model, modules = decoder.model, find_blocks(decoder)
    ids, mask = pad_left(rows, pad, input_device(model))
    counts = torch.zeros(ids.shape, device=ids.device)
    for i, row in enumerate(weights):
        counts[i, ids.shape[1] - len(row) :] = torch.tensor(row, device=ids.device)
    taken: dict[int, Tensor] = {}

    def keep(index: int, states: Tensor) -> None:
        # padding may contain NaN, and 0 times NaN is not 0
        real = mask.to(states.device).bool()[:, :, None]
        taken[index] = torch.einsum("rt,rtd->rd", counts.to(states.device), states.float().masked_fill(~real, 0.0))

    def before(index: int) -> Any:
        return lambda module, args, kwargs: keep(index, args[0] if args else kwargs["hidden_states"])

    def after(index: int) -> Any:
        return lambda module, args, output: keep(index, first_tensor(output))

    handles = [
        modules[i].register_forward_pre_hook(before(i), with_kwargs=True)
        if place == "input"
        else modules[i].register_forward_hook(after(i))
        for i in blocks
    ]
    with hooked(handles):
        run_forward(model, forward_inputs(model, ids, mask), keep=1)
    return torch.stack([taken[i].to(taken[blocks[-1]].device) for i in blocks])
