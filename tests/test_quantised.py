"""Packed weights: bitsandbytes on the CPU, and stand-ins that let nobody read them."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conftest
import llmva
from conftest import taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.alignment import RunOptions
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.models.fingerprint import module_hash, tensor_hash
from llmva.models.load import check_weights, load_model
from llmva.models.writers import find_writers
from llmva.prompts import PromptSet

BITS = ("4bit", "8bit")
# the limits on harmless text are wide: 64 numbers a token hold little beside the decision
FAST = {"iterations": 2, "passes": 2, "per_source": 32, "max_new_tokens": 8, "min_kept": 0.9, "max_kl": 1.0}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model as wide as bitsandbytes asks for: its kernel for CPUs takes inputs in blocks of 64."""
    folder = tmp_path_factory.mktemp("wide") / "taught"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "tiny_model", partial(tiny_model, hidden_size=64, intermediate_size=128, head_dim=16))
        taught_model(steps=50).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts() -> PromptSet:
    rows = taught_requests()
    return PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.arange(1, 12)[None]).logits
    return found.float()


def packed_state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers as they would be saved; not the scales, which bitsandbytes lays out anew on first use."""
    model = copy.deepcopy(model)  # of used 4-bit weights, taking the state spoils the next use
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: t.clone() for name, t in model.state_dict().items() if name in names}


def load_packed(folder: Path, bits: str) -> tuple[Any, Any]:
    pytest.importorskip("bitsandbytes", reason="real 4-bit and 8-bit linears need bitsandbytes")
    return load_model(folder, device="cpu", quantize=bits)


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_align_on_real_packed_linears(wide_folder: Path, tmp_path: Path, bits: str) -> None:
    model, tokenizer = load_packed(wide_folder, bits)
    kind = type(model.model.layers[0].mlp.down_proj).__name__
    assert kind == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    before, plain = packed_state(model), logits(model)
    result = llmva.align(model, tokenizer, prompts(), out=tmp_path / "run", **FAST)
    assert result.edit.factors
    after = packed_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    fresh, _ = load_packed(wide_folder, bits)  # as one who serves it: applied before the first forward pass
    edit = Edit.load(tmp_path / "run").at(2)
    with edit.apply(fresh):
        edited = logits(fresh)
    assert float((edited - plain).abs().max()) > 0.05 * float(plain.abs().max())
    assert torch.equal(logits(fresh), plain)
    with pytest.raises(LlmvaError, match=r"cannot be edited in place.*hook"):
        edit.bake(fresh)
    assert all(torch.equal(before[name], t) for name, t in packed_state(fresh).items())


@pytest.mark.parametrize("bits", BITS)
def test_a_stored_packed_checkpoint_loads_as_it_is(wide_folder: Path, tmp_path: Path, bits: str) -> None:
    model, tokenizer = load_packed(wide_folder, bits)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    again, _ = load_model(tmp_path / "packed", device="cpu")
    name = "model.layers.1.mlp.down_proj"
    assert type(again.get_submodule(name)) is type(model.get_submodule(name))
    assert torch.equal(logits(again), logits(model))
    assert module_hash(again.get_submodule(name)) == module_hash(model.get_submodule(name))
    with pytest.raises(UsageError, match="quantised already: leave --quantize out"):
        load_model(tmp_path / "packed", device="cpu", quantize=bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_hash_of_a_packed_linear_outlives_its_first_use(wide_folder: Path, bits: str) -> None:
    """On its first call bitsandbytes may lay the weights out anew."""
    model, _ = load_packed(wide_folder, bits)
    modules = [layer.mlp.down_proj for layer in model.model.layers]
    fresh = [module_hash(module) for module in modules]
    assert len(set(fresh)) == len(fresh)
    used = logits(model)
    assert [module_hash(module) for module in modules] == fresh
    assert torch.equal(logits(model), used)  # and hashing does it no harm


def test_an_edit_of_packed_weights_refuses_the_unpacked_model(wide_folder: Path) -> None:
    from llmva.models.fingerprint import fingerprint

    model, _ = load_packed(wide_folder, "4bit")
    decoder = llmva.find_decoder(model)
    name = decoder.names[0]
    edit = Edit({}, fingerprint(decoder, "taught")).then(name, torch.ones(64), torch.ones(64), 1)
    whole, _ = load_model(wide_folder, device="cpu")
    with pytest.raises(LlmvaError, match=f"whose {name} has hash"):
        edit.apply(whole)


def test_packed_as_bfloat16_is_still_packed(wide_folder: Path) -> None:
    """4-bit weights may be stored under a dtype that looks plain, and their bits may spell NaN."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(32, 32, bias=False, quant_storage=torch.bfloat16)
    linear.weight = bnb.nn.Params4bit(torch.randn(32, 32), quant_storage=torch.bfloat16, requires_grad=False)
    linear.to("cpu")
    assert linear.weight.dtype == torch.bfloat16
    linear.weight.data.fill_(float("nan"))
    check_weights(linear, "packed")
    assert find_writers(linear, 32) == ()


# -- what cannot be quantised ------------------------------------------------------------------------------------------


def test_no_bitsandbytes_is_said_with_the_mend(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmva.models import load

    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        load_model(model_folder, device="cpu", quantize="4bit")
    model, _ = load_model(model_folder, device="cpu")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_a_stored_packed_checkpoint_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "hqq", "quant_config": {}}
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "hqq", None)
    with pytest.raises(UsageError, match="needs a package that is missing"):
        load_model(tmp_path, device="cpu")


def test_unknown_bits(model_folder: Path) -> None:
    with pytest.raises(UsageError, match="quantize '2bit' is unknown: use none, 4bit, 8bit"):
        load_model(model_folder, quantize="2bit")


# -- stand-ins ---------------------------------------------------------------------------------------------------------


class Sealed(nn.Linear):
    """A linear that computes, holds nothing that can be read, and fails whoever asks for its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        kept = linear.weight.detach().clone()
        self.compute = lambda x: nn.functional.linear(x, kept)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        raise AssertionError("somebody reads packed weights")

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        raise AssertionError("somebody reads packed weights")

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.compute(x)
        return found


def sealed(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(folder, device="cpu")
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = Sealed(layer.self_attn.o_proj), Sealed(layer.mlp.down_proj)
    return model, tokenizer


def test_align_and_apply_never_ask_for_weights(taught_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = sealed(taught_folder)
    result = llmva.align(model, tokenizer, prompts(), out=tmp_path / "run", **FAST)
    whole, _ = load_model(taught_folder, device="cpu")
    with result.edit.at(2).apply(whole, check=False):
        wanted = logits(whole)
    fresh, _ = sealed(taught_folder)
    edit = Edit.load(tmp_path / "run").at(2)
    with edit.apply(fresh):
        torch.testing.assert_close(logits(fresh), wanted)
    with pytest.raises(LlmvaError, match=r"cannot be edited in place.*hook"):
        edit.bake(fresh)
    name = next(name for name in edit.chosen.factors if name.endswith("o_proj"))
    layer = fresh.get_submodule(name.removesuffix(".o_proj"))
    layer.o_proj = Sealed(nn.Linear(32, 32, bias=False))  # another model, told by what its module puts out
    with pytest.raises(LlmvaError, match="o_proj has hash"):
        edit.apply(fresh)


def test_a_tensor_in_disguise_is_hashed_by_its_parts() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.randn(8, 8), torch.randn(8, 8)
    assert tensor_hash(TwoTensor(a, b)) == tensor_hash(TwoTensor(a.clone(), b.clone()))
    assert tensor_hash(TwoTensor(a, b)) != tensor_hash(TwoTensor(a, a))
    linear = nn.Linear(8, 8, bias=False)
    linear.weight = nn.Parameter(TwoTensor(a, b), requires_grad=False)
    assert find_writers(linear, 8) == ()


@pytest.mark.parametrize("bits", BITS)
def test_lora_of_a_stored_packed_checkpoint(wide_folder: Path, tmp_path: Path, bits: str) -> None:
    """The adapter is read off the packed projections' outputs, and PEFT puts it on the packed model."""
    peft = pytest.importorskip("peft")
    from llmva.export.adapters.peft import export_lora
    from llmva.export.plan import make_plan

    model, tokenizer = load_packed(wide_folder, bits)
    base = tmp_path / "packed"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, _ = load_model(base, device="cpu")
    llmva.align(
        model,
        tokenizer,
        prompts(),
        out=tmp_path / "run",
        options=RunOptions(name=str(base)),
        **{**FAST, "iterations": 1},
    )
    export_lora(make_plan(tmp_path / "run", iteration=1), tmp_path / "adapter")
    with make_plan(tmp_path / "run", iteration=1).edit.apply(model):
        wanted = logits(model)
    # PEFT takes the state of what it is put on, which spoils used 4-bit weights on CPUs
    fresh, _ = load_model(base, device="cpu")
    plain = logits(load_model(base, device="cpu")[0])
    adapted = logits(peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval())
    effect = float((wanted - plain).abs().max())
    assert effect > 0.1 * float(plain.abs().max())
    assert float((adapted - wanted).abs().max()) < 0.05 * effect  # packed linears compute in half precision
