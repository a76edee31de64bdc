"""Adapters as PEFT itself loads them give the edited model's logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from llmva.errors import LlmvaError
from llmva.export.lora import export_lora, read_through
from llmva.export.plan import make_plan
from test_edit import far, logits
from test_merged import made

DENSE: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {},
    "Phi3Config": {},
    "Qwen2Config": {},
    "Qwen3Config": {},
    "Gemma2Config": {},
    "Gemma3TextConfig": {},
    "PhiConfig": {},
    "GPT2Config": {},
    "OPTConfig": {"word_embed_proj_dim": 32},
    "GPTNeoXConfig": {},
    "Olmo2Config": {},
    "GraniteConfig": {"residual_multiplier": 0.3},
    "Cohere2Config": {},
}


def with_adapter(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys
        return PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("config", DENSE)
def test_peft_gives_the_edited_models_logits(config: str, rank: int | None, tmp_path: Path) -> None:
    model = made(tmp_path, config, **DENSE[config])
    plan = make_plan(tmp_path, strength=0.7)
    found = export_lora(plan, tmp_path / "adapter", rank=rank)
    with plan.edit.apply(model):
        wanted = logits(model)
    assert far(logits(model), wanted) > 1e-3
    tuned = with_adapter(model, tmp_path / "adapter")
    assert far(logits(tuned), wanted) < 1e-5
    assert far(logits(tuned.merge_and_unload()), wanted) < 1e-5
    ranks = {f.V.shape[1] for f in plan.edit.factors.values()}
    assert len(ranks) > 1
    assert found["rank"] == (rank or max(ranks))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == found["rank"]
    assert bool(settings["rank_pattern"]) == (rank is None)
    assert any("lora_B.bias" in warning for warning in found["warnings"]) == settings["lora_bias"]
    assert settings["lora_bias"] == (config in ("PhiConfig", "GPT2Config", "OPTConfig", "GPTNeoXConfig"))


def test_a_cut_rank_tells_its_true_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = made(tmp_path)
    plan = make_plan(tmp_path)
    found = export_lora(plan, tmp_path / "adapter", rank=2)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    errors = []
    for name, f in plan.edit.factors.items():
        key = f"base_model.model.{name}"
        got = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        wanted = f.V.double() @ (f.U.double().T @ model.get_submodule(name).weight.double())
        errors.append(far(got, wanted))
        best = torch.linalg.svdvals(wanted)[2:].norm() / wanted.norm()
        assert errors[-1] == pytest.approx(float(best), abs=1e-6)
    assert found["truncation"] == pytest.approx(max(errors), abs=1e-6)
    assert "off by" in found["warnings"][0]


def test_experts_are_refused_and_merged_is_offered(tmp_path: Path) -> None:
    made(tmp_path, "MixtralConfig", num_local_experts=4)
    with pytest.raises(LlmvaError, match=r"LoRA cannot express .*--as merged"):
        export_lora(make_plan(tmp_path), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Sealed(nn.Module):
    """A packed projection: it computes, and lets nobody read its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = [linear]
        self.in_features = linear.in_features

    @property
    def weight(self) -> Tensor:
        raise AssertionError("packed weights were read")

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._linear[0](x)
        return found


@pytest.mark.parametrize("bias", [False, True])
def test_packed_projections_are_read_by_their_outputs(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(600, 32, bias=bias)
    U = torch.randn(32, 5, generator=generator)
    found = read_through(Sealed(linear), 600, U, torch.float32)
    torch.testing.assert_close(found, U.T @ linear.weight, rtol=1e-4, atol=1e-5)


def test_at_bfloat16_peft_is_no_farther_from_the_truth_than_rounded_weights(tmp_path: Path) -> None:
    """Truth: the bfloat16 base, edited and run in float64. The adapter rounds activations alone, so may be nearer."""
    model = made(tmp_path, dtype=torch.bfloat16)
    plan = make_plan(tmp_path)
    export_lora(plan, tmp_path / "adapter")
    exact, rounded = tiny_model(), tiny_model()
    exact.load_state_dict(model.state_dict())
    exact.double()
    for name, f in plan.edit.factors.items():
        weight = exact.get_submodule(name).weight
        weight.data += f.V.double() @ (f.U.double().T @ weight.data)
    truth = logits(exact)
    rounded.load_state_dict(exact.state_dict())
    rounded.to(torch.bfloat16)
    of_rounding = float((logits(rounded).double() - truth).norm())
    tuned = with_adapter(model, tmp_path / "adapter")
    assert float((logits(tuned).double() - truth).norm()) <= 1.25 * of_rounding  # the draw of activations' roundings


def test_an_8b_models_edit_and_adapter_are_small() -> None:
    """30 iterations, 42 of 64 sublayers each, d 4096, inner 14336, by the shapes alone, if every choice is an MLP."""
    width, inner, mlps, attentions, steps = 4096, 14336, 32, 10, 30
    edit = (mlps + attentions) * steps * 2 * width * 4
    adapter = 4 * steps * (mlps * (width + inner) + attentions * 2 * width)
    assert edit < 100e6
    assert adapter < 150e6
