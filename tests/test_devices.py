"""Several devices, by the one stand-in that a CPU has: blocks that accelerate keeps on disk and brings in for use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import chat_model, taught_requests
from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.models.batching import first_guess
from llmva.models.fingerprint import fingerprint, module_hash
from llmva.models.generate import generate_greedily
from llmva.models.harmless import agreement
from llmva.models.load import load_model

CPU = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS: dict[str, dict[str, str]] = {
    "last blocks": {**CPU, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
    "one sublayer": {
        **CPU, "model.layers.0": "cpu", "model.layers.2": "cpu",
        **{f"model.layers.1.{part}": "cpu" for part in ("self_attn", "input_layernorm", "post_attention_layernorm")},
        "model.layers.1.mlp": "disk",
    },
    "all": {"": "disk"},
}  # fmt: skip
TEXTS = ["please fix the door", "tell me how to break a lamp"]


@pytest.fixture(
    params=[
        "last blocks",
        "one sublayer",
        "all",
    ]
)
def spread(request: pytest.FixtureRequest, taught_folder: Path) -> Any:
    model, _ = load_model(taught_folder, device="cpu", device_map=MAPS[request.param])
    assert any(p.device.type == "meta" for p in model.parameters())
    return model


@pytest.fixture
def whole(taught_folder: Path) -> tuple[Any, Any]:
    return load_model(taught_folder, device="cpu")


def an_edit(model: Any) -> Edit:
    """Of every sublayer, and of `model` alone."""
    decoder = llmva.find_decoder(model)
    edit = Edit({}, fingerprint(decoder, "taught"))
    generator = torch.Generator().manual_seed(0)
    for name in decoder.names:
        v, u = torch.randn(2, decoder.width, generator=generator) * 0.2
        edit = edit.then(name, v, u, 1)
    return edit


def test_spread_model_is_found_and_fingerprinted_as_the_whole_one(spread: Any, whole: tuple[Any, Any]) -> None:
    model, _ = whole
    there, here = llmva.find_decoder(spread), llmva.find_decoder(model)
    assert there.names == here.names
    assert fingerprint(there, "taught") == fingerprint(here, "taught")
    offloaded = [p.device.type for p in spread.parameters()]
    assert "meta" in offloaded  # the hashing has brought nothing in for good
    assert module_hash(spread.model.layers[1].mlp) == module_hash(model.model.layers[1].mlp)


def test_spread_model_answers_and_is_edited_as_the_whole_one(spread: Any, whole: tuple[Any, Any]) -> None:
    model, tokenizer = whole
    edit = an_edit(model)
    plain = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=6)
    for change in (Edit(), edit):
        with change.apply(model, check=bool(change.factors)), change.apply(spread, check=bool(change.factors)):
            wanted = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=6)
            found = llmva.capture(spread, tokenizer, TEXTS, max_new_tokens=6)
        assert found.answers == wanted.answers
        torch.testing.assert_close(found.outputs, wanted.outputs)
        torch.testing.assert_close(found.final, wanted.final)
    assert not torch.allclose(wanted.outputs, plain.outputs, rtol=0.1)
    ids = torch.arange(4, 12)[None]
    mask = torch.ones_like(ids)
    assert torch.equal(
        generate_greedily(spread, tokenizer, ids, mask, 5), generate_greedily(model, tokenizer, ids, mask, 5)
    )


def test_harmless_agreement_on_a_spread_model(spread: Any, whole: tuple[Any, Any]) -> None:
    model, tokenizer = whole
    edit = an_edit(model)
    texts = [(text, answer) for text, _, answer in taught_requests()[:4]]
    found, wanted = (
        agreement(chat_model(decoder, tokenizer, first_guess(decoder.model)), texts, partial(edit.apply, decoder.model))
        for decoder in (llmva.find_decoder(spread), llmva.find_decoder(model))
    )
    assert found == wanted


def aligned(model: Any, tokenizer: Any) -> Edit:
    rows = taught_requests()
    prompts = llmva.PromptSet.from_lists(*([t for t, benign, _ in rows if benign == side] for side in (False, True)))
    return llmva.align(model, tokenizer, prompts, iterations=1, passes=2, per_source=16, max_new_tokens=6).edit.at(1)


@pytest.fixture(scope="module")
def wanted(taught_folder: Path) -> Edit:
    """Of the model that lies in memory whole."""
    return aligned(*load_model(taught_folder, device="cpu"))


def test_align_on_a_spread_model(spread: Any, whole: tuple[Any, Any], wanted: Edit) -> None:
    found = aligned(spread, whole[1])
    assert found.factors.keys() == wanted.factors.keys() != set()
    for name, f in wanted.factors.items():
        torch.testing.assert_close(found.factors[name].V @ found.factors[name].U.T, f.V @ f.U.T)


def test_bake_refuses_weights_that_are_elsewhere(spread: Any, whole: tuple[Any, Any]) -> None:
    edit = an_edit(whole[0])
    with pytest.raises(LlmvaError, match=r"weights of model\.layers\.\d\.\S+ are offloaded: apply the edit by hook"):
        edit.bake(spread)


def test_spread_model_of_another_base_is_refused(spread: Any, whole: tuple[Any, Any]) -> None:
    edit = an_edit(whole[0])
    name = "model.layers.1.mlp.down_proj"
    edit.base["hashes"][name] = "0" * 16
    with pytest.raises(LlmvaError, match=f"whose {name} has hash 0000000000000000"):
        edit.apply(spread)
