"""How likely an opening of the answer is after a suffix, and how the choice of each token of the suffix changes that.

The loss is that of GCG (Zou et al. 2023, arXiv 2307.15043): the mean negative log-likelihood of the opening's tokens.
Its gradient with respect to a token's one-hot vector is the gradient with respect to the embedding's output there,
times the embedding. So only the former is computed by a backward pass, and the model's own code reads token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.models.at_rest import reads_model
from llmva.models.batching import Batching, longest_first
from llmva.models.chat import forward_inputs, input_device
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import first_tensor, hooked, with_first
from llmva.models.forward import logits_of, run_forward
from llmva.models.gradients import check_graph, frozen
from llmva.models.reading.cache import read_prefix
from llmva.models.reading.rows import read_rows
from llmva.models.suffix.place import Place

LOGIT_BYTES = 64 * 2**20  # of all positions of a batch that predict openings, in float32
CHUNK = 8192  # tokens of the vocabulary whose embeddings are looked at together
NO_GRADIENT = (
    "No gradient passes the weights of this model, which a search over suffixes needs: load it without --quantize and "
    "in memory, or pass --search transforms."
)


@dataclass(frozen=True)
class Slope:
    """The loss after a suffix of n tokens, and its gradient with respect to their embeddings."""

    loss: float
    gradient: Tensor  # float32 [n, d], on the CPU


@reads_model
@torch.inference_mode()
def losses(chat: ChatModel, place: Place, suffixes: Sequence[Sequence[int]]) -> tuple[list[float], int]:
    """The loss after each suffix, and how many tokens were read for that.

    What the rows share at their beginning is read once.
    """
    rows = [place.row(suffix) for suffix in suffixes]
    shared = read_prefix(chat.model, rows) if chat.decodes() else None
    read = sum(map(len, rows)) - (shared.length * (len(rows) - 1) if shared else 0)
    batching = _for_openings(chat, place.opening)

    def work(batch: list[int]) -> list[float]:
        some = [rows[i] for i in batch]
        logits = read_rows(chat.model, chat.pad_id, some, shared, place.opening + 1)
        return [float(_loss(own, row, place.opening)) for own, row in zip(logits, some, strict=True)]

    result = [0.0] * len(rows)
    for batch, means in batching.over(longest_first([len(row) for row in rows]), lambda i: len(rows[i]), work):
        for i, mean in zip(batch, means, strict=True):
            result[i] = mean
    return result, read


def _for_openings(chat: ChatModel, opening: int) -> Batching:
    """The model's batching, of no more rows than whose logits fit."""
    most = max(1, LOGIT_BYTES // (4 * chat.decoder.vocabulary * (opening + 1)))
    return replace(chat.batching, row=max(chat.batching.row, chat.batching.tokens / most))


def _loss(logits: Tensor, row: Sequence[int], opening: int) -> Tensor:
    """The mean negative log-likelihood of the row's last `opening` tokens; `logits` [>= opening + 1, V] at its end."""
    logs = torch.log_softmax(logits[-opening - 1 : -1].float(), -1)
    said = torch.tensor(row[-opening:], device=logits.device)[:, None]
    return -logs.gather(1, said).mean()


@reads_model
def slopes(chat: ChatModel, places: Sequence[Place], suffixes: Sequence[Sequence[int]]) -> tuple[list[Slope], int]:
    """Loss and gradient of each suffix in its place, and how many tokens were read for that.

    Raises RuntimeError where gradients cannot pass the weights, as in some packed formats.
    """
    rows = [place.row(suffix) for place, suffix in zip(places, suffixes, strict=True)]
    lengths = [len(row) for row in rows]
    # the graph holds what every block computes, and the batch size counts one block
    blocks = len({sublayer.block for sublayer in chat.decoder.sublayers})
    batching = _for_openings(chat, max(place.opening for place in places))
    tokens = math.ceil(batching.tokens / blocks)
    small = replace(batching, tokens=tokens, row=batching.row / blocks)

    def work(batch: list[int]) -> list[Slope]:
        return _backward(chat, [rows[i] for i in batch], [places[i] for i in batch], len(suffixes[0]))

    result: dict[int, Slope] = {}
    for batch, part in small.over(longest_first(lengths), lengths.__getitem__, work):
        result.update(zip(batch, part, strict=True))
    return [result[i] for i in range(len(rows))], sum(lengths)


def _backward(chat: ChatModel, rows: list[list[int]], places: list[Place], count: int) -> list[Slope]:
    model = chat.model
    embedding = model.get_input_embeddings()
    keep = max(place.opening for place in places) + 1
    with frozen(model):
        ids, mask = chat.pad(rows)
        ends = torch.tensor([ids.shape[1] - len(place.tail) for place in places])
        columns = ends[:, None] - count + torch.arange(count)
        numbers = torch.arange(len(rows))[:, None].expand(-1, count)
        steps = torch.zeros(len(rows), count, embedding.weight.shape[1], device=input_device(model))
        steps.requires_grad_(True)  # zeros added to the embeddings; their gradients are those of the embeddings

        def join(module: Any, args: Any, output: Any) -> Any:
            o = first_tensor(output)
            where = (numbers.to(o.device), columns.to(o.device))
            added = torch.zeros_like(o).index_put(where, steps.to(o.device, o.dtype))
            return with_first(output, o + added)

        with hooked([embedding.register_forward_hook(join)]):
            logits = logits_of(run_forward(model, forward_inputs(model, ids, mask), keep=keep), keep)
        each = [_loss(own, row, place.opening) for own, row, place in zip(logits, rows, places, strict=True)]
        (gradient,) = torch.autograd.grad(torch.stack(each).sum(), steps)
    return [Slope(float(loss.detach()), part) for loss, part in zip(each, gradient.float().cpu(), strict=True)]


def check_slopes(chat: ChatModel, place: Place, suffix: Sequence[int]) -> None:
    """Raises UsageError for a model through which no gradient passes, before a search begins."""
    check_graph(chat.model)
    try:
        ((slope,), _) = slopes(chat, [place], [suffix])
    except RuntimeError as error:  # of the weights' own code; lack of memory has a sentence of its own
        raise UsageError(NO_GRADIENT) from error
    if not bool(slope.gradient.isfinite().all()) or not bool(slope.gradient.any()):
        raise UsageError(NO_GRADIENT)


@reads_model
@torch.no_grad()
def likely_tokens(chat: ChatModel, gradients: Tensor, usable: Sequence[int], count: int) -> Tensor:
    """Of the `usable` tokens, those that lower the loss most to first order: ids [m, at most `count`].

    Args:
        gradients: with respect to the embeddings at m places, [m, d].
    """
    embedding, device = chat.model.get_input_embeddings(), input_device(chat.model)
    gradients = gradients.to(device)
    best = torch.empty(len(gradients), 0, device=device)
    chosen = torch.empty(len(gradients), 0, dtype=torch.long, device=device)
    for ids in torch.split(torch.tensor(usable, device=device), CHUNK):
        gain = -(gradients @ first_tensor(embedding(ids[None]))[0].float().to(device).T)
        best = torch.cat([best, gain], 1)
        chosen = torch.cat([chosen, ids.expand(len(gradients), -1)], 1)
        best, order = best.topk(min(count, best.shape[1]))
        chosen = chosen.gather(1, order)
    return chosen.cpu()
