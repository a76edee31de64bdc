"""Gradients of scores of the next token's logits with respect to the sublayers' outputs.

The decision is read at the last prompt token, so only that token needs a graph. If the model's cache is plain keys and
values, all earlier tokens come from the cache, and the backward pass costs little time and memory. Otherwise the graph
covers the whole prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.models.at_rest import reads_model
from llmva.models.batching import longest_first
from llmva.models.chat.inputs import forward_inputs
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import first_tensor, hooked, last_states
from llmva.models.forward import logits_of, run_forward
from llmva.models.reading.cache import Prefix, cache_name, read_prefix, rest_inputs
from llmva.models.writers import PLAIN
from llmva.prompts.types import Asked

LOGIT_BYTES = 32 * 2**20
Score = Callable[[Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Part:
    """What was computed for a batch of n prompts, on the CPU."""

    rows: list[int]  # indices of the prompts
    scores: Tensor  # float32 [n, k]
    outputs: Tensor  # of the sublayers at the last prompt token, [S, n, d], in the model's dtype
    final: Tensor  # final residual stream there, [n, d]
    slopes: Tensor  # gradients of the scores with respect to the outputs, [S, n, k, d]


def check_graph(model: Any) -> None:
    """Raises UsageError for weights that no graph may use; without gradients an edit would be a poorer one."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return  # blocks on disk are loaded for each use, and take no part in a graph
    # packed weights are made in inference mode at their first use, and gradients pass them all the same
    plain = [p for p in model.parameters() if type(p) is torch.nn.Parameter and p.dtype in PLAIN]
    if any(parameter.is_inference() for parameter in plain):
        raise UsageError(
            "The model was loaded inside torch.inference_mode(), so that no gradients pass its weights: load it "
            "outside of that."
        )


def gradients(chat: ChatModel, prompts: Sequence[Asked], score: Score) -> Iterator[Part]:
    """Sublayers' outputs at the last prompt token, and the gradients of `score` with respect to them.

    Args:
        prompts: user messages or conversations; the chat template is applied here.
        score: takes the next token's logits, float32 [n, V], and the prompts' indices; returns scores [n, k].

    Raises:
        RuntimeError: gradients cannot pass the weights, as in some packed formats.
    """
    rows, batching = chat.rows(prompts), chat.batching
    shared = read_prefix(chat.model, rows) if chat.decodes() else None
    lengths = [len(row) for row in rows]

    def work(batch: list[int]) -> Part:
        return _backward(chat, batch, [rows[i] for i in batch], shared, lambda logits: score(logits, batch))

    # the graph holds the logits several times: limit them for large vocabularies
    max_rows = max(1, LOGIT_BYTES // (4 * chat.decoder.vocabulary))
    tokens = min(batching.tokens, math.ceil(max_rows * batching.cost(max(lengths))))
    if batching.in_graph is not None:
        tokens = min(tokens, batching.in_graph)
    small = replace(batching, tokens=tokens, row=0.0)
    for _, part in small.over(longest_first(lengths), lengths.__getitem__, work):
        yield part


@reads_model
def _backward(
    chat: ChatModel,
    batch: list[int],
    rows: list[list[int]],
    shared: Prefix | None,
    score: Callable[[Tensor], Tensor],
) -> Part:
    model = chat.model
    with frozen(model):
        inputs = rest_inputs(model, rows, chat.pad_id, shared, cached=chat.decodes())
        cached = _all_but_last(model, inputs)
        inputs = cached or inputs
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

        final: list[Tensor] = []

        def keep_final(module: Any, args: Any, output: Any) -> None:
            final.append(last_states(output, len(rows), chat.decoder.width).detach().cpu())

        handles = [s.output.register_forward_hook(join(i)) for i, s in enumerate(chat.decoder.sublayers)]
        with hooked([*handles, chat.decoder.last_block.register_forward_hook(keep_final)]):
            logits = logits_of(run_forward(model, inputs, keep=1, use_cache=cached is not None), 1)[:, -1]
        scores = score(logits.float())
        places = [steps[i] for i in range(len(steps))]
        slopes = []
        for j in range(scores.shape[1]):
            one = scores[:, j].sum()
            last = j == scores.shape[1] - 1
            each = torch.autograd.grad(one, places, retain_graph=not last, allow_unused=True, materialize_grads=True)
            slopes.append(torch.stack([g.cpu() for g in each]))
    stacked = torch.stack([outputs[i].cpu() for i in range(len(outputs))])
    return Part(batch, scores.detach().cpu(), stacked, final[-1], torch.stack(slopes, 2))


def _all_but_last(model: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Read all tokens but the last: arguments of a pass over that one, or None if the cache does not let a graph in."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    name, ids, mask = cache_name(model), inputs["input_ids"], inputs["attention_mask"]
    if name is None:
        return None
    if ids.shape[1] < 2:
        return inputs if name in inputs else None
    before = {k: v[:, :-1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():  # not inference_mode: a graph cannot use its tensors
        result = run_forward(model, before, keep=1, use_cache=True)
    cache = inputs.get(name, getattr(result, name, None))
    # recurrent layers change their states in place
    if not (isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)):
        return None
    return {**forward_inputs(model, ids[:, -1:], mask), name: cache}


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
