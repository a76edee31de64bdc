"""The installed vLLM writes what transformers writes, with each edit that it is given. Skipped where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import requests_as_rows, taught_requests, teach, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.models.chat_model import ChatModel
from llmva.models.engines.choose import make_engine
from llmva.models.generate import answer_prompts

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
PROMPTS = [text for text, _, _ in taught_requests()][::5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A taught model with heads of 32, which vLLM's attention on the CPU has."""
    place = tmp_path_factory.mktemp("heads") / "taught"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    teach(tiny_model(**shape, head_dim=32), requests_as_rows(tiny_tokenizer())).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=["vllm:merged", "vllm:lora"])
def both(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[ChatModel, ChatModel]]:
    """A model answered for by transformers, and by vLLM."""
    model, tokenizer = llmva.load_model(folder)
    chat = ChatModel.of(model, tokenizer)
    by_engine = replace(chat, engine=make_engine(request.param, model))
    yield chat, by_engine
    by_engine.close()


def edit_of(model: Any, columns: int, seed: int) -> Edit:
    generator, edit = torch.Generator().manual_seed(seed), Edit()
    for name in (f"model.layers.{i}.{part}" for i in (0, 2) for part in ("self_attn.o_proj", "mlp.down_proj")):
        for iteration in range(1, columns + 1):
            v, u = 0.3 * torch.randn(2, model.config.hidden_size, generator=generator)
            edit = edit.then(name, v, u, iteration)
    return edit


def test_answers_are_those_of_transformers(both: tuple[ChatModel, ChatModel]) -> None:
    chat, by_engine = both
    seen = []
    for edit in (Edit(), edit_of(chat.model, 2, 0), edit_of(chat.model, 3, 1), Edit(), edit_of(chat.model, 2, 0)):
        with edit.apply(chat.model, check=False):
            wanted = answer_prompts(chat, PROMPTS, max_new_tokens=12)
            got = answer_prompts(by_engine, PROMPTS, max_new_tokens=12)
        assert got.answers == wanted.answers
        assert got.tokens == wanted.tokens
        assert torch.allclose(got.outputs, wanted.outputs, atol=1e-5)
        seen.append(tuple(wanted.answers))
    assert len(set(seen)) == 3


def test_settled_answers_are_cut_where_transformers_stops(both: tuple[ChatModel, ChatModel]) -> None:
    def settled(answer: str) -> bool:
        return "how to" in answer

    wanted, got = (answer_prompts(chat, PROMPTS, max_new_tokens=12, settled=settled) for chat in both)
    assert got.answers == wanted.answers
    assert got.tokens == wanted.tokens
    assert got.tokens < answer_prompts(both[1], PROMPTS, max_new_tokens=12).tokens
