"""A real pretrained model and real prompts, where ../shared holds them: what random weights cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from llmva.models.sublayers import Decoder

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.skipif(not MODEL.is_file(), reason="needs the real model in ../shared/models")


@pytest.fixture(scope="module")
def real() -> tuple[Decoder, Any]:
    model, tokenizer = llmva.load_model(MODEL)
    return llmva.find_decoder(model), tokenizer


def prompts() -> list[llmva.Prompt]:
    data = SHARED / "data"
    from llmva.prompts.load import load_prompts

    toxic, benign = f"{data}/seval_risk_val.csv:input:[:24]", f"{data}/nq_val.csv:input:[:24]"
    return list(load_prompts([toxic], [benign]))


def test_every_block_is_found(real: tuple[Decoder, Any]) -> None:
    decoder, _ = real
    assert len(decoder.sublayers) == 60
    assert [s.kind for s in decoder.sublayers[:2]] == ["attention", "mlp"]


def test_the_exact_solver_is_never_above_scikit_learn_on_real_activations(real: tuple[Decoder, Any]) -> None:
    chosen = prompts()
    found = llmva.capture(*real, [p.text for p in chosen], max_new_tokens=0)
    benign = torch.tensor([1 if p.benign else -1 for p in chosen])
    other = torch.where(torch.arange(len(chosen)) % 5 == 0, -benign, benign)
    features, labels = found.outputs[::6].double(), torch.stack([other, benign])

    def objective(w: torch.Tensor) -> torch.Tensor:
        margins = torch.einsum("snd,smd->smn", features, w) * labels
        return 0.5 * w.pow(2).sum(-1) + (1 - margins).clamp_min(0).pow(2).sum(-1)

    exact, sklearn = llmva.fit_svms(features, labels), llmva.fit_sklearn(features, labels)
    assert (objective(exact) <= objective(sklearn) * (1 + 1e-9)).all()


def test_harm_is_readable_in_a_real_model(real: tuple[Decoder, Any]) -> None:
    """Ordinary questions and harmful requests, read by vectors fitted on other prompts."""
    chosen = prompts()
    found = llmva.capture(*real, [p.text for p in chosen], max_new_tokens=0)
    benign = torch.tensor([1 if p.benign else -1 for p in chosen])
    fit = torch.arange(len(chosen)) % 2 == 0
    middle = found.outputs[30:31].double()
    v = llmva.fit_svms(middle[:, fit], benign[None, fit])
    right = (middle[0, ~fit] @ v[0, 0]).sign() == benign[~fit]
    assert right.double().mean() > 0.8
