"""Gradients of scores of the next token's logits with respect to the sublayers' outputs.

The decision is read at the last prompt token, so only that token needs a graph. If the model's cache is plain keys and
values, all earlier tokens come from the cache, and the backward pass costs little time and memory. Otherwise the graph
covers the whole prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmva.models.at_rest import reads_model
from llmva.models.batching import Batching, longest_first
from llmva.models.chat import forward_inputs, takes
from llmva.models.chat_model import ChatModel
from llmva.models.forward import is_of_transformers, logits_of, run_forward
from llmva.models.sublayers import first_tensor, hooked

LOGIT_BYTES = 32 * 2**20
Score = Callable[[Tensor, list[int]], Tensor]
# indices of n prompts; their scores [n, k]; the sublayers' outputs [S, n, d]; the gradients [S, n, k, d]
Part = tuple[list[int], Tensor, Tensor, Tensor]


def gradients(chat: ChatModel, prompts: Sequence[str], score: Score) -> Iterator[Part]:
    """Sublayers' outputs at the last prompt token, and the gradients of `score` with respect to them.

    Args:
        prompts: user messages; the chat template is applied here.
        score: takes the next token's logits, float32 [n, V], and the prompts' indices; returns scores [n, k].

    Yields:
        Batch by batch, on the CPU: scores in float32, outputs and gradients in the model's dtype.

    Raises:
        RuntimeError: gradients cannot pass the weights, as in some packed formats.
    """
    rows, batching = chat.rows(prompts), chat.batching
    lengths = [len(row) for row in rows]

    def work(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(chat, [rows[i] for i in batch], lambda logits: score(logits, batch))

    # the graph holds the logits several times: limit them for large vocabularies
    max_rows = max(1, LOGIT_BYTES // (4 * chat.decoder.vocabulary))
    small = Batching(min(batching.tokens, math.ceil(max_rows * batching.cost(max(lengths)))), batching.square)
    for batch, (scores, outputs, slopes) in small.over(longest_first(lengths), lengths.__getitem__, work):
        yield batch, scores, outputs, slopes


@reads_model
def _backward(
    chat: ChatModel, rows: list[list[int]], score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    model = chat.model
    ids, mask = chat.pad(rows)
    inputs = forward_inputs(model, ids, mask)
    with frozen(model):
        # transformers has called it by both names; code of a model's own may mean anything by them
        names = [name for name in ("cache", "past_key_values") if takes(model, name)]
        name = names[0] if names and is_of_transformers(model) else None
        cache = _prefix(model, inputs, name) if name else None
        if cache is not None and name is not None:
            inputs = {k: v if k == "attention_mask" else v[:, -1:] for k, v in inputs.items()}
            inputs[name] = cache
        outputs: dict[int, Tensor] = {}
        steps: dict[int, Tensor] = {}  # zeros added to the outputs; their gradients are those of the outputs

        def join(index: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                o = first_tensor(output)
                wide = o.reshape(len(rows), -1, o.shape[-1])  # experts get a flat list of tokens
                outputs[index] = wide[:, -1].detach()
                steps[index] = torch.zeros_like(outputs[index], requires_grad=True)
                padded = torch.nn.functional.pad(steps[index][:, None], (0, 0, wide.shape[1] - 1, 0))
                joined = o + padded.reshape(o.shape)
                return (joined, *output[1:]) if isinstance(output, tuple | list) else joined

            return hook

        with hooked([s.output.register_forward_hook(join(i)) for i, s in enumerate(chat.decoder.sublayers)]):
            logits = logits_of(run_forward(model, inputs, keep=1, use_cache=cache is not None), 1)[:, -1]
        scores = score(logits.float())
        places = [steps[i] for i in range(len(steps))]
        slopes = []
        for j in range(scores.shape[1]):
            one = scores[:, j].sum()
            last = j == scores.shape[1] - 1
            each = torch.autograd.grad(one, places, retain_graph=not last, allow_unused=True, materialize_grads=True)
            slopes.append(torch.stack([g.cpu() for g in each]))
    return scores.detach().cpu(), torch.stack([outputs[i].cpu() for i in range(len(outputs))]), torch.stack(slopes, 2)


def _prefix(model: Any, inputs: dict[str, Tensor], name: str) -> Any:
    """The cache of all tokens but the last, or None if a graph cannot use it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if inputs["input_ids"].shape[1] < 2:
        return None
    with torch.no_grad():  # not inference_mode: a graph cannot use its tensors
        result = run_forward(model, {k: v[:, :-1] for k, v in inputs.items()}, keep=1, use_cache=True)
    cache = getattr(result, name, None)
    # recurrent layers change their states in place
    plain = isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return cache if plain else None


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No gradients of the weights inside the block: their graph would hold many activations."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
