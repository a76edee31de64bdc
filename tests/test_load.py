"""A model that cannot be used is refused in one sentence, and one that can is loaded once, as asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import tiny_model, tiny_tokenizer
from llmva.errors import LlmvaError, UsageError
from llmva.models.load import check_weights, load_model, pick_device, pick_dtype


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network: the hub's client reads its switch when it is imported."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def one_sentence(error: pytest.ExceptionInfo[LlmvaError], code: int) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ": " in text  # what is wrong, and then the mend
    assert error.value.exit_code == code
    assert len(text) < 500


def test_a_folder_is_loaded_as_it_was_saved(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder, device="cpu")
    saved = tiny_model().state_dict()
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer("open the door")["input_ids"] == tiny_tokenizer()("open the door")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_as_asked(model_folder: Path, dtype: str) -> None:
    model, _ = load_model(str(model_folder), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("token", ["pad", "pad and eos"])
def test_a_tokenizer_without_padding_gets_some(folder: Path, token: str) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = None
    if "eos" in token:
        config["eos_token"] = None
    path.write_text(json.dumps(config))
    _, tokenizer = load_model(folder, device="cpu")
    assert tokenizer.pad_token_id == (0 if "eos" in token else 2)


def nan(folder: Path) -> None:
    change(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[5].fill_(float("nan")))


def infinite(folder: Path) -> None:
    change(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[5].fill_(-float("inf")))


def change(folder: Path, work: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    work(tensors)
    save_file(tensors, path, {"format": "pt"})


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def set_field(name: str, value: Any) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return work


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "NaN": (nan, 1, r"NaN or infinite weights in model\.layers\.1\.mlp\.down_proj\.weight"),
    "infinity": (infinite, 1, "NaN or infinite weights"),
    "no config": (lambda f: (f / "config.json").unlink(), 2, "config.json"),
    "config cut short": (rewrite("config.json", '{"model_type": "lla'), 2, "config.json"),
    "config is a list": (rewrite("config.json", "[]"), 2, "config.json"),
    "config is empty": (rewrite("config.json", "{}"), 2, "model_type"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), 2, "config.json"),
    "unknown model type": (set_field("model_type", "nonesuch"), 2, "nonesuch"),
    "no decoder": (set_field("model_type", "vit"), 2, "vit|decoder|chat model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 2, "holds no weights"),
    "weights cut short": (truncate, 1, "cannot be loaded"),
    "weights are text": (rewrite("model.safetensors", "some text"), 1, "cannot be loaded"),
    "weights are a pointer": (rewrite("model.safetensors", "version https://git-lfs"), 1, "git lfs pull"),
    "a weight is missing": (
        lambda f: change(f, lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
        1,
        r"lacks the weights model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "weights of another size": (set_field("intermediate_size", 64), 1, "sizes|cannot be loaded"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.iterdir() if "token" in p.name or "template" in p.name],
        1,
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, folder: Path) -> None:
    work, code, words = BROKEN[name]
    work(folder)
    with pytest.raises(LlmvaError, match=words) as caught:
        load_model(folder, device="cpu")
    one_sentence(caught, code)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("~/nowhere-at-all", "no folder"),
        ("a/b/c", "no folder"),
        ("", "name is empty"),
        (" ", "name is empty"),
        ("nowhere.gguf", "no file"),
        ("someone/no-such-model", "neither a local folder nor a model"),
        ("no-such-model", "neither a local folder nor a model"),
        ("not a name", "neither a local folder nor a model"),
    ],
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_model(name, device="cpu")
    one_sentence(caught, 2)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UsageError, match=r"is a file that is no \.gguf") as caught:
        load_model(text)
    one_sentence(caught, 2)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + bytes(range(200)), b"hello" * 99])
def test_garbage_gguf(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(LlmvaError) as caught:
        load_model(path, device="cpu")
    one_sentence(caught, 1)
    assert str(path) in str(caught.value)


def test_unknown_dtype_and_device(model_folder: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'int4' is unknown: use auto, bfloat16, float16, float32") as caught:
        load_model(model_folder, dtype="int4")
    one_sentence(caught, 2)
    for device in ("nonesuch", "cuda:77"):
        with pytest.raises(UsageError, match=f"device '{device}' cannot be used here") as caught:
            load_model(model_folder, device=device)
        one_sentence(caught, 2)


def test_code_in_a_model_is_not_run_unasked(folder: Path) -> None:
    set_field("auto_map", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    set_field("model_type", "evil")(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageError, match="--trust-remote-code") as caught:
        load_model(folder, device="cpu")
    one_sentence(caught, 2)
    assert not (folder / "ran").exists()


def test_pick_dtype() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype(torch.float32, cpu) == torch.float32
    assert pick_dtype(torch.float16, cpu) == torch.float32
    assert pick_dtype(torch.bfloat16, cpu) in (torch.float32, torch.bfloat16)
    assert pick_dtype(torch.bfloat16, gpu) == torch.bfloat16
    assert pick_device("cpu") == cpu


def test_check_weights_reads_every_floating_dtype() -> None:
    """Of packed models too: float8 has no minimum of its own in torch."""
    model = nn.Linear(4, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        model.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
        check_weights(model, "m")
        model.weight = nn.Parameter((torch.ones(4, 4) * float("nan")).to(dtype), requires_grad=False)
        with pytest.raises(LlmvaError, match="NaN or infinite weights in weight"):
            check_weights(model, "m")
    model.weight = nn.Parameter(torch.ones(4, 4).to(torch.int8), requires_grad=False)
    check_weights(model, "m")
