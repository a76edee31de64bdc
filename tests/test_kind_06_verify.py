"""verify cannot be fooled: an artefact is compared with what the edit changes, also where rounding changes as much.

Every case of FOOLED passed before in bfloat16, when 5% of the largest logit was tolerated, and those of BELONGINGS in
every dtype. The exact artefacts passed before, and are to pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.export.adapters.peft import export_lora
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.export.verify import Artefact, Reference, _row, verify
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from llmva.models.writers import left_map

STRENGTH = 0.02  # an edit whose effect bfloat16 hides


@dataclass(frozen=True)
class Made:
    """A model, an edit of it, and the edit's other forms; copy before you change them."""

    base: Path
    edit: Path
    lora: Path
    merged: Path


def an_edit(base: Path, strength: float, seed: int = 0) -> Edit:
    (base.parent / "edit").mkdir(exist_ok=True)
    decoder = find_decoder(load_model(base)[0])
    edit, generator = Edit({}, fingerprint(decoder, str(base))), torch.Generator().manual_seed(seed)
    for name in decoder.names[:4]:
        v, u = torch.randn(2, decoder.width, generator=generator)
        edit = edit.then(name, v / v.norm(), u / u.norm() * strength, 1)
    return edit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("verify")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    an_edit(folder / "base", STRENGTH).save(folder / "edit")
    plan = make_plan(folder / "edit")
    export_lora(plan, folder / "lora")
    export_merged(plan, folder / "merged")
    return Made(folder / "base", folder / "edit", folder / "lora", folder / "merged")


def problems(made: Made, artefact: Path, dtype: str = "bfloat16") -> list[str]:
    """Of one artefact, beside the edit that it should be."""
    _, row = verify(str(made.base), [made.edit, artefact], loading={"dtype": dtype})["artefacts"]
    sentences: list[str] = row["problems"]
    assert row["same"] == (not sentences)
    return sentences


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exact_forms_are_the_same_edit(made: Made, dtype: str) -> None:
    record = verify(str(made.base), [made.edit, made.lora, made.merged], loading={"dtype": dtype})
    assert record["same"], record
    for row in record["artefacts"]:
        assert row["effect"] > 0
        assert (row["noise"] < 1e-5) == (dtype == "float32")


def adapter(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})

    return changed


def config(**fields: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return changed


def scaled(part: str, by: float) -> Callable[[Path], None]:
    return adapter(lambda tensors: {k: v * by if part in k else v for k, v in tensors.items()})


def one_more(folder: Path) -> None:
    """An adapter that also changes a projection which the edit leaves alone."""

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "base_model.model.model.layers.2.self_attn.q_proj"
        return {
            **tensors,
            f"{name}.lora_A.weight": torch.ones(1, 32),
            f"{name}.lora_B.weight": torch.ones(32, 1) * 1e-4,
        }

    adapter(add)(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    config(target_modules=[*fields["target_modules"], "model.layers.2.self_attn.q_proj"])(folder)


LAYER = "layers.1.mlp.down_proj"
FOOLED: dict[str, tuple[Callable[[Path], None], str]] = {
    "does nothing": (scaled("lora_B", 0.0), "off by 100% of what the edit changes"),
    "half of it": (scaled("lora_B", 0.5), "off by 50%"),
    "a little more": (scaled("lora_A", 1.03), "off by 3%"),
    "the other way": (scaled("lora_B", -1.0), "off by 200%"),
    "one module short": (
        adapter(lambda tensors: {k: v for k, v in tensors.items() if LAYER not in k}), f"{LAYER} is off by 100%",
    ),
    "not among the targets": (
        lambda folder: config(
            target_modules=[
                name
                for name in json.loads((folder / "adapter_config.json").read_text())["target_modules"]
                if LAYER not in name
            ]
        )(folder),
        f"{LAYER} is not changed by the adapter",
    ),
    "another alpha": (config(lora_alpha=3), "off by 200%"),
    "one module more": (one_more, "q_proj is changed, and the edit leaves it as it is"),
    "DoRA": (config(use_dora=True), "is scaled by DoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOOLED)
def test_an_adapter_that_is_not_the_edit(case: str, made: Made, tmp_path: Path) -> None:
    change, says = FOOLED[case]
    shutil.copytree(made.lora, tmp_path / "lora")
    change(tmp_path / "lora")
    assert any(says in sentence for sentence in problems(made, tmp_path / "lora"))


@pytest.mark.parametrize("strength", [0.97, 1.5])
def test_an_edit_of_another_strength(strength: float, made: Made, tmp_path: Path) -> None:
    Edit.load(made.edit).scaled(strength).save(tmp_path)
    assert all("off by" in sentence for sentence in problems(made, tmp_path))
    assert len(problems(made, tmp_path)) == 4
    an_edit(made.base, STRENGTH, seed=1).save(tmp_path)
    assert problems(made, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_merged_model_without_the_whole_edit(dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    """In bfloat16 every value is within a rounding step of the base's."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    tiny_model().to(dtype).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    edit = an_edit(base, STRENGTH)
    edit.save(tmp_path / "edit")
    export_merged(make_plan(tmp_path / "edit"), merged)
    assert verify(str(base), [tmp_path / "edit", merged])["same"]
    tensors = load_file(base / "model.safetensors")
    for name, f in edit.factors.items():
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = left_map(weight, -2, f.V * share, f.U)
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    (row,) = verify(str(base), [merged])["artefacts"]
    assert "differs from the base's tensor with the edit" in row["problems"][0]


def test_an_edit_that_rounding_loses_is_told(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model().bfloat16().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    an_edit(base, 1e-4).save(tmp_path / "edit")
    plan = make_plan(tmp_path / "edit")
    export_merged(plan, tmp_path / "merged")
    export_lora(plan, tmp_path / "lora")
    lora, merged = verify(str(base), [tmp_path / "lora", tmp_path / "merged"])["artefacts"]
    assert lora["same"]
    (sentence,) = merged["problems"]
    assert sentence.startswith("Rounding to bfloat16 keeps ")
    assert sentence.endswith("of so small an edit: export it --as lora.")


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("<bos> please help . " + path.read_text())


def field(name: str, **fields: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return changed


BELONGINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "chat template": (template, "the chat template"),
    "tokenizer": (field("tokenizer.json", normalizer=None), "the tokenizer"),
    "generation config": (field("generation_config.json", repetition_penalty=1.3), "the generation config"),
    "end tokens": (field("generation_config.json", eos_token_id=[2, 9]), "the generation config"),
    "config": (field("config.json", rms_norm_eps=1e-2), "the config"),
}


@pytest.mark.parametrize("case", BELONGINGS)
def test_a_merged_model_with_other_belongings(case: str, made: Made, tmp_path: Path) -> None:
    change, says = BELONGINGS[case]
    shutil.copytree(made.merged, tmp_path / "merged")
    change(tmp_path / "merged")
    assert any(s.startswith("Not as in the base: ") and says in s for s in problems(made, tmp_path / "merged"))


def test_what_cannot_be_told_is_not_called_the_same() -> None:
    """As of a merged .gguf, whose tensors have other names, in half precision."""
    plain = torch.zeros(2, 5)
    reference = Reference(plain, plain + 0.1, 0.05, 0.05, "bfloat16")
    artefact = Artefact(Path("merged"), "merged", None)
    row = _row(artefact, reference, plain + 0.1, [], proved=False)
    assert row["problems"] == ["In bfloat16 rounding outweighs what this edit changes: pass --dtype float32."]
    assert _row(artefact, reference, plain + 0.1, [], proved=True)["same"]
