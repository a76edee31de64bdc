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
from llmva.errors import LlmvaError, UsageError
from llmva.export.adapters.parts import read_through
from llmva.export.adapters.peft import export_lora
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
    assert any("have different ranks" in warning for warning in found["warnings"]) == (rank is None)
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
    assert found["truncation_at"] == list(plan.edit.factors)[errors.index(max(errors))]
    assert "off by" in found["warnings"][0]


def test_padding_adds_zeros_and_changes_nothing_else(tmp_path: Path) -> None:
    from safetensors import safe_open

    made(tmp_path)
    plan = make_plan(tmp_path)
    found = export_lora(plan, tmp_path / "own")
    padded = export_lora(plan, tmp_path / "padded", rank=16)
    assert (padded["truncation"], padded["truncation_at"], padded["warnings"]) == (0.0, None, [])
    assert found["rank"] < 16
    with (
        safe_open(tmp_path / "own" / "adapter_model.safetensors", "pt") as own,
        safe_open(tmp_path / "padded" / "adapter_model.safetensors", "pt") as wide,
    ):
        assert own.metadata() == {"format": "pt"}
        assert set(own.keys()) == set(wide.keys())
        for key in own.keys():  # noqa: SIM118 (not a dict)
            axis = 0 if "lora_A" in key else 1
            tensor = wide.get_tensor(key)
            k = own.get_tensor(key).shape[axis]
            assert tensor.shape[axis] == 16
            assert torch.equal(tensor.narrow(axis, 0, k), own.get_tensor(key))
            assert not tensor.narrow(axis, k, 16 - k).any()


def scale_in_llama_cpp(settings: dict[str, Any], A: Tensor) -> float:
    """get_scale of its llama-adapter.h: the one alpha of the file over the rank of the tensor at hand."""
    return float(settings["lora_alpha"]) / len(A)


@pytest.mark.parametrize("rank", [None, 16])
def test_one_rank_gives_one_scale_to_loaders_without_patterns(rank: int | None, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made(tmp_path)
    found = export_lora(make_plan(tmp_path), tmp_path / "adapter", rank=rank)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scales = {scale_in_llama_cpp(settings, A) for key, A in tensors.items() if "lora_A" in key}
    assert (scales == {1.0}) == (rank is not None)
    assert any("llama.cpp" in warning for warning in found["warnings"]) == (scales != {1.0})


def test_an_earlier_iteration_has_its_own_adapter(tmp_path: Path) -> None:
    model = made(tmp_path)
    whole, plan = make_plan(tmp_path), make_plan(tmp_path, iteration=1, strength=1.5)
    export_lora(plan, tmp_path / "adapter")
    with plan.edit.apply(model):
        wanted = logits(model)
    with whole.edit.apply(model):
        assert far(logits(model), wanted) > 1e-3
    assert far(logits(with_adapter(model, tmp_path / "adapter")), wanted) < 1e-5


def test_strength_0_is_the_base_at_any_rank(tmp_path: Path) -> None:
    model = made(tmp_path)
    plain = logits(model)
    found = export_lora(make_plan(tmp_path, strength=0.0), tmp_path / "adapter", rank=2)
    assert (found["truncation"], found["truncation_at"]) == (0.0, None)
    assert far(logits(with_adapter(model, tmp_path / "adapter")), plain) < 1e-6


@pytest.mark.parametrize("rank", [0, -8])
def test_a_rank_below_one_is_refused(rank: int, tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UsageError, match="choose 1 or more"):
        export_lora(make_plan(tmp_path), tmp_path / "adapter", rank=rank)
    assert not (tmp_path / "adapter").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        export_lora(make_plan(tmp_path), tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["mine.txt"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    tiny_model(seed=5).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    with pytest.raises(LlmvaError, match="belongs to"):
        export_lora(make_plan(tmp_path), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("config", ["LlamaConfig", "PhiConfig", "GPT2Config", "OPTConfig"])
def test_a_loaded_model_gives_the_adapter_that_its_checkpoint_gives(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of packed and .gguf bases, taken with weights that can be read, so that both ways can be compared."""
    from safetensors.torch import load_file

    import llmva.export.adapters.parts as parts

    made(tmp_path, config, **DENSE[config])
    plan = make_plan(tmp_path)
    export_lora(plan, tmp_path / "read")
    monkeypatch.setattr(parts, "_readable", lambda plan: None)
    export_lora(plan, tmp_path / "through")
    wanted, got = (load_file(tmp_path / way / "adapter_model.safetensors") for way in ("read", "through"))
    assert set(got) == set(wanted)
    for key, tensor in wanted.items():
        assert far(got[key], tensor) < 1e-5, key
    settings = [json.loads((tmp_path / way / "adapter_config.json").read_text()) for way in ("read", "through")]
    assert settings[0] == settings[1]
    assert settings[0]["fan_in_fan_out"] == (config == "GPT2Config")


def test_experts_of_a_loaded_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmva.export.adapters.parts as parts

    made(tmp_path, "MixtralConfig", num_local_experts=4)
    monkeypatch.setattr(parts, "_readable", lambda plan: None)
    with pytest.raises(LlmvaError, match=r"no adapter for fused experts .*--as merged"):
        export_lora(make_plan(tmp_path), tmp_path / "adapter")


def test_experts_are_refused_and_merged_is_offered(tmp_path: Path) -> None:
    made(tmp_path, "MixtralConfig", num_local_experts=4)
    with pytest.raises(LlmvaError, match=r"no adapter for fused experts .*--as merged"):
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


def test_a_large_bias_costs_packed_projections_no_precision_at_bfloat16() -> None:
    """As a bias is on real packed linears, a parameter of their own: W + b rounds W away where b is the larger."""

    class Biased(Sealed):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear)
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self._linear[0].weight, self.bias)

    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(600, 32).to(torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(0.02 * torch.randn(32, 600, generator=generator))
    linear.bias.copy_(torch.randn(32, generator=generator))
    U = torch.randn(32, 5, generator=generator)
    packed = Biased(linear)
    found = read_through(packed, 600, U, torch.bfloat16)
    assert far(found, U.T @ linear.weight.float()) < 1e-5
    assert torch.equal(packed.bias, linear.bias)


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
