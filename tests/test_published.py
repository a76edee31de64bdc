"""Adapters and weights that others have published, as rows beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.experiments.cells import file_name
from llmva.experiments.published import is_published, load_published

IDS = torch.tensor([[1, 5, 9, 12, 7, 20]])


def adapter(folder: Path, seed: int = 3, **options: Any) -> tuple[Path, Any]:
    """A folder as PEFT writes it, with random pairs; and the model to which PEFT itself has applied it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj", "down_proj", "q_proj"], **options)
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/tiny\n---\nAn adapter.\n")
    return folder, model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.o_proj": 8}}],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_does_what_peft_makes_of_it(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, theirs = adapter(tmp_path / "a", **options)
    model = tiny_model()
    before = logits(model)
    one = load_published(f"adapter:{folder}", chat_model(model, tiny_tokenizer()), "org/tiny")
    with one.applied():
        assert torch.allclose(logits(model), logits(theirs), atol=1e-5)
        assert not torch.allclose(logits(model), before, atol=1e-2)
    assert torch.equal(logits(model), before)
    assert one.about["licence"] == "apache-2.0"
    assert one.about["base"] == "org/tiny"
    assert one.about["modules"] == 9
    assert one.notes == ()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    wide = chat_model(tiny_model(intermediate_size=64), tiny_tokenizer())
    with pytest.raises(UsageError, match=r"another base: it changes .*down_proj, 48 to 32, and the model has 64 to 32"):
        load_published(f"adapter:{folder}", wide, "x")
    short = chat_model(tiny_model(num_hidden_layers=2), tiny_tokenizer())
    with pytest.raises(UsageError, match="no such module"):
        load_published(f"adapter:{folder}", short, "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"bias": "all"}, "uses bias"),
    ],
)
def test_adapters_that_are_not_known_are_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folder, _ = adapter(tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=told):
        load_published(f"adapter:{folder}", chat_model(tiny_model(), tiny_tokenizer()), "x")


def test_pickled_adapters_are_not_read(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        load_published(f"adapter:{folder}", chat_model(tiny_model(), tiny_tokenizer()), "x")


def test_places_that_are_not_there_are_told(tmp_path: Path) -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="There is no folder"):
        load_published(f"adapter:{tmp_path}/none", chat, "x")
    with pytest.raises(UsageError, match="names no place"):
        load_published("adapter:", chat, "x")


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_weights_stand_in_for_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "other", tiny_model(seed=7))
    model = tiny_model()
    before = logits(model)
    one = load_published(f"model:{folder}", chat_model(model, tiny_tokenizer()), "other")
    with one.applied():
        assert torch.equal(logits(model), logits(tiny_model(seed=7)))
    assert torch.equal(logits(model), before)
    assert one.about["tensors"] > 0
    assert any("states no licence" in note for note in one.notes)


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="for another base"):
        load_published(f"model:{saved(tmp_path / 'wide', tiny_model(intermediate_size=64))}", chat, "x")
    with pytest.raises(UsageError, match="their config computes otherwise"):
        load_published(f"model:{saved(tmp_path / 'eps', tiny_model(rms_norm_eps=1e-3))}", chat, "x")


def test_names_of_cells_tell_places_apart() -> None:
    assert is_published("adapter:a/b")
    assert not is_published("scans")
    first, second = (file_name(f"adapter:{place}/tuned", None) for place in ("a", "b"))
    assert first != second
    assert first.startswith("adapter-tuned-")


def test_compare_has_their_rows(taught_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    from llmva.experiments.compare import compare
    from llmva.models.load import load_model
    from llmva.prompts.prompt_set import PromptSet

    monkeypatch.setattr("llmva.experiments.measure.TIMED_TOKENS", 2)
    monkeypatch.setattr("llmva.experiments.measure.TIMED_ROUNDS", 1)
    folder = tmp_path / "adapter"
    get_peft_model(load_model(taught_folder)[0], LoraConfig(r=1, target_modules=["o_proj"])).save_pretrained(folder)
    method = f"adapter:{folder}"
    prompts = PromptSet.load([f"{taught_folder}/toxic.txt::[:24]"], [f"{taught_folder}/benign.txt::[:24]"], only=True)
    how: dict[str, Any] = {"methods": ("none", method), "seeds": (42, 43), "out": tmp_path / "c", "max_new_tokens": 4}
    record = compare(*load_model(taught_folder), prompts, **how)
    none, theirs = record["rows"]
    assert theirs["f1"]["mean"] == none["f1"]["mean"]  # PEFT begins with adapters that do nothing
    assert len(theirs["runs"]) == 1
    assert theirs["options"]["path"] == str(folder)
    assert any("states no licence" in limit for limit in record["limits"])
    assert compare(*load_model(taught_folder), prompts, **how)["rows"] == record["rows"]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    with pytest.raises(UsageError, match="has changed since it was measured"):
        compare(*load_model(taught_folder), prompts, **how)
