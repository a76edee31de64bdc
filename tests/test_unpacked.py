"""A .gguf file is parsed once and unpacked once; what is kept of it is the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import llmva
from llmva.files import cache_folder
from llmva.models.files import unpacked
from test_cli import Command, write_gguf

TEXTS = ["cab", "a b", "zzz"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def same(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    for (name, a), (_, b) in zip(one[0].named_parameters(), other[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [one[1](text)["input_ids"] for text in TEXTS] == [other[1](text)["input_ids"] for text in TEXTS]
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "name_or_path", "chat_template"):
        assert getattr(one[1], name) == getattr(other[1], name), name
    assert one[0].config._name_or_path == other[0].config._name_or_path
    assert one[0].generation_config.eos_token_id == other[0].generation_config.eos_token_id
    assert "quantization_config" not in vars(other[0].config)


def test_the_second_time_nothing_is_parsed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    first = llmva.load_model(file, note=notes.append)
    assert len(notes) == 1
    assert "unpacking tiny.gguf to float32" in notes[0]
    monkeypatch.setattr(gguf, "GGUFReader", None)
    same(first, llmva.load_model(file, note=notes.append))
    assert len(notes) == 1


def test_the_first_time_it_is_parsed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    reader = gguf.GGUFReader

    class Counting(reader):
        def __init__(self, path: Any, mode: Any = "r") -> None:
            opened.append(str(path))
            super().__init__(path, mode)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    llmva.load_model(file)
    assert opened == [str(file)]
    assert gguf.GGUFReader is Counting


def test_another_file_or_dtype_is_another_entry(file: Path) -> None:
    llmva.load_model(file)
    model, _ = llmva.load_model(file, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert [(entry.name, entry.dtype) for entry in unpacked.entries()] == [
        ("tiny.gguf", "bfloat16"),
        ("tiny.gguf", "float32"),
    ]
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    llmva.load_model(file)
    assert len(unpacked.entries()) == 3


def test_an_entry_that_was_broken_is_made_anew(file: Path) -> None:
    first = llmva.load_model(file)
    (entry,) = unpacked.entries()
    (entry.folder / "model.safetensors").write_bytes(b"nothing")
    notes: list[str] = []
    same(first, llmva.load_model(file, note=notes.append))
    assert len(notes) == 1
    (again,) = unpacked.entries()
    assert again.size == entry.size


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("LLMVA_CACHE", str(blocked))
    same(llmva.load_model(file), llmva.load_model(file))
    assert unpacked.entries() == []


def test_a_tokenizer_that_would_not_come_back_is_not_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_same", lambda tokenizer, folder: False)
    llmva.load_model(file)
    assert unpacked.entries() == []
    assert list(cache_folder().rglob("*.safetensors")) == []  # nor its first half


def test_the_command(file: Path, command: Command) -> None:
    llmva.load_model(file)
    said = command("cache")
    assert said.out.splitlines()[0].startswith("tiny.gguf  float32")
    (entry,) = json.loads(command("cache", "--json").out)["entries"]
    assert entry["file"] == "tiny.gguf"
    freed = json.loads(command("cache", "--clean", "--json").out)["freed_bytes"]
    assert freed == entry["bytes"]
    assert json.loads(command("cache", "--json").out)["entries"] == []
