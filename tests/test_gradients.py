"""Gradients at the last prompt token: against finite differences, with and without a cache, in every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES, MORE, tiny, tiny_of_type
from conftest import chat_model, tiny_tokenizer
from llmva.models import gradients as module
from llmva.models.batching import Batching
from llmva.models.chat import encode, forward_inputs, pad_left, render
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.gradients import gradients
from llmva.models.sublayers import find_decoder

TEXTS = ["please open the door", "trap", "tell me how to fix the lamp and paint the fence", "paint a fence"]


def score(logits: Tensor, batch: list[int]) -> Tensor:
    """Two scores of each prompt, of which the second depends on which one it is."""
    logs = torch.log_softmax(logits, -1)
    weights = torch.tensor([float(i + 1) for i in batch])
    return torch.stack([logs[:, 7] - logs[:, 9], logs[:, 5] * weights], 1)


def found(model: Any, budget: int = 100_000, in_graph: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n, k], outputs [S, n, d] and gradients [S, n, k, d], in the prompts' order."""
    batching = Batching(budget, in_graph=in_graph)
    parts = list(gradients(chat_model(find_decoder(model), tiny_tokenizer(), batching), TEXTS, score))
    back = torch.tensor([i for part in parts for i in part.rows]).argsort()
    scores, outputs, slopes = (
        torch.cat([getattr(part, name) for part in parts], dim)
        for name, dim in (("scores", 0), ("outputs", 1), ("slopes", 1))
    )
    return scores[back], outputs[:, back], slopes[:, back]


def scored(model: Any, place: nn.Module, step: Tensor) -> Tensor:
    """Scores of all prompts with `step` [n, d] added to what a sublayer puts out at their last tokens."""
    tokenizer = tiny_tokenizer()
    ids, mask = pad_left([encode(tokenizer, render(tokenizer, text)) for text in TEXTS], 0, torch.device("cpu"))

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        o = first_tensor(output).clone()
        o.reshape(len(TEXTS), -1, o.shape[-1])[:, -1] += step
        return (o, *output[1:]) if isinstance(output, tuple) else o

    with torch.no_grad(), hooked([place.register_forward_hook(add)]):
        logits = model(**forward_inputs(model, ids, mask), use_cache=False).logits[:, -1]
    return score(logits, list(range(len(TEXTS))))


def check(model: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Returns whether a cache was used. The graph through whole prompts is checked by finite differences."""
    used: list[bool] = []
    original = module._all_but_last

    def prefix(*args: Any) -> Any:
        cache = original(*args)
        used.append(cache is not None)
        return cache

    monkeypatch.setattr(module, "_all_but_last", prefix)
    scores, outputs, slopes = found(model)
    monkeypatch.setattr(module, "_all_but_last", lambda *args: None)
    monkeypatch.setattr(ChatModel, "decodes", lambda self: False)
    whole = found(model)
    for one, other in zip((scores, outputs, slopes), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert slopes.abs().amax((1, 3)).gt(0).all()  # every sublayer is felt
    places = [sublayer.output for sublayer in find_decoder(model).sublayers]
    for s in (0, len(places) // 2, len(places) - 1):
        step = torch.randn(outputs[s].shape, generator=torch.Generator().manual_seed(s))
        step *= 1e-3 * outputs[s].norm(dim=-1, keepdim=True).clamp_min(1e-2)
        measured = (scored(model, places[s], step) - scored(model, places[s], -step)) / 2
        expected = torch.einsum("nkd,nd->nk", slopes[s], step)
        torch.testing.assert_close(measured, expected, atol=3e-5, rtol=0.05)
    return all(used)


RECURRENT = ("qwen3_next",)  # its states are written in place


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(tiny(name), monkeypatch) == (name not in RECURRENT)


@pytest.mark.parametrize("model_type", MORE)
def test_further_model_types(model_type: str) -> None:
    """Gradients come out of each, finite, by whichever way."""
    scores, outputs, slopes = found(tiny_of_type(model_type, MORE[model_type]))
    assert all(part.isfinite().all() for part in (scores, outputs, slopes))
    assert slopes.abs().amax() > 0


def test_a_graph_holds_no_more_tokens_than_it_may() -> None:
    model = tiny("llama")
    chat = chat_model(find_decoder(model), tiny_tokenizer(), Batching(100_000, in_graph=1))
    assert [part.rows for part in gradients(chat, TEXTS, score)] == [[2], [0], [3], [1]]  # alone, the longest first
    for one, other in zip(found(model, in_graph=1), found(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
