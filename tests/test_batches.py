"""A run's result does not depend on how its prompts were batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmva
from llmva.alignment import RunOptions
from llmva.cli.inputs import demo_model


def products(result: llmva.Result) -> dict[str, Tensor]:
    """V U^T of every sublayer, which the sign and order of columns do not change."""
    return {name: f.V.double() @ f.U.double().T for name, f in result.every.factors.items()}


@pytest.fixture(scope="module")
def whole() -> tuple[llmva.Result, dict[str, Tensor]]:
    result = run(None)
    return result, products(result)


def run(batch_tokens: int | None) -> llmva.Result:
    model, tokenizer = llmva.load_model(demo_model(), dtype="float32")
    prompts = llmva.PromptSet.from_jsonl(demo_model() / "llmva" / "prompts.jsonl")
    return llmva.align(
        model,
        tokenizer,
        prompts,
        per_source=8,
        iterations=1,
        batch_tokens=batch_tokens,
        options=RunOptions(measure_test=False),
    )


@pytest.mark.parametrize("batch_tokens", [1, 200])  # one row at a time, and about eight
def test_the_edit_is_the_same(batch_tokens: int, whole: tuple[llmva.Result, dict[str, Tensor]]) -> None:
    result, own = whole
    other = run(batch_tokens)
    for one, two in zip(result.record["iterations"], other.record["iterations"], strict=True):
        assert {k: one[k] for k in ("f1", "asr", "orr")} == {k: two[k] for k in ("f1", "asr", "orr")}
    for name, product in products(other).items():
        torch.testing.assert_close(product, own[name], rtol=1e-4, atol=1e-6)
    assert own.keys() == products(other).keys()
