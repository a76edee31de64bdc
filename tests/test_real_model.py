"""A real pretrained model and real prompts, where ../shared holds them: what random weights cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmva
from llmva.models.sublayers import Decoder

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.skipif(not MODEL.is_file(), reason="needs the real model in ../shared/models")


@pytest.fixture(scope="module")
def real() -> tuple[Decoder, Any]:
    model, tokenizer = llmva.load_model(MODEL)
    return llmva.find_decoder(model), tokenizer


@pytest.fixture(scope="module")
def read(real: tuple[Decoder, Any]) -> tuple[Tensor, Tensor]:
    """Outputs [S, n, d] at the last token of harmful requests and ordinary questions, and +1 where one is benign."""
    from llmva.prompts.load import load_prompts

    data = SHARED / "data"
    toxic, benign = f"{data}/seval_risk_val.csv:input:[:24]", f"{data}/nq_val.csv:input:[:24]"
    chosen = list(load_prompts([toxic], [benign]))
    captured = llmva.capture(*real, [p.text for p in chosen], max_new_tokens=0)
    return captured.outputs, torch.tensor([1 if p.benign else -1 for p in chosen])


def test_every_block_is_found(real: tuple[Decoder, Any]) -> None:
    decoder, _ = real
    assert len(decoder.sublayers) == 60
    assert [s.kind for s in decoder.sublayers[:2]] == ["attention", "mlp"]


def test_the_exact_solver_is_never_above_scikit_learn_on_real_activations(read: tuple[Tensor, Tensor]) -> None:
    outputs, benign = read
    other = torch.where(torch.arange(len(benign)) % 5 == 0, -benign, benign)
    features, labels = outputs[::6].double(), torch.stack([other, benign])

    def objective(w: torch.Tensor) -> torch.Tensor:
        margins = torch.einsum("snd,smd->smn", features, w) * labels
        return 0.5 * w.pow(2).sum(-1) + (1 - margins).clamp_min(0).pow(2).sum(-1)

    exact, sklearn = llmva.fit_svms(features, labels), llmva.fit_sklearn(features, labels)
    assert (objective(exact) <= objective(sklearn) * (1 + 1e-9)).all()


def test_harm_is_readable_in_a_real_model(read: tuple[Tensor, Tensor]) -> None:
    """Ordinary questions and harmful requests, read by vectors fitted on other prompts."""
    outputs, benign = read
    fit = torch.arange(len(benign)) % 2 == 0
    middle = outputs[30:31].double()
    v = llmva.fit_svms(middle[:, fit], benign[None, fit])
    right = (middle[0, ~fit] @ v[0, 0]).sign() == benign[~fit]
    assert right.double().mean() > 0.8
