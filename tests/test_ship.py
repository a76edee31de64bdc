"""`llmva export`, `verify` and `push` as a user meets them, on a run of a taught model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, tiny_model, tiny_tokenizer
from llmva.edit import Edit

Command = Callable[..., Said]


@pytest.fixture(scope="module")
def run_folder(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the taught model."""
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("ship") / "run"
    words = [
        "align", str(taught_folder), "--out", str(out), "--iterations", "3", "--passes", "1", "--per-source", "32",
        "--max-new-tokens", "8", "--only", "--toxic", str(taught_folder / "toxic.txt"), "--benign",
        str(taught_folder / "benign.txt"), "--quiet",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    assert Edit.load(out).chosen.factors
    return out


def test_adapter_and_merged_model_are_the_same_edit(
    command: Command, run_folder: Path, taught_folder: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert command("export", run_folder, "--as", "lora", "--out", adapter).code == 0
    assert command("export", run_folder, "--as", "merged", "--out", merged).code == 0
    said = command("verify", taught_folder, run_folder, adapter, merged, "--json", "--quiet")
    found = json.loads(said.out)
    assert said.code == 0
    assert [row["kind"] for row in found["artefacts"]] == ["edit", "lora", "merged"]
    assert found["same"]
    for row in found["artefacts"]:
        assert row["max"] < 1e-4
        assert row["effect"] > 10 * row["max"]
    for alone in (adapter, merged):  # each knows the edit that it was made from
        said = command("verify", taught_folder, alone)
        assert said.code == 0
        line = r"\): Same edit \(largest logit difference \d\S*; the edit itself moves logits by \d\S*\)\."
        assert re.search(re.escape(str(alone)) + r" \(\w+" + line, said.out)
    assert (adapter / "README.md").read_text().startswith("---\n")
    assert (merged / "README.md").read_text().startswith("---\n")


def test_verify_tells_another_edit_and_a_changed_tensor(
    command: Command, run_folder: Path, taught_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    half, merged = tmp_path / "half", tmp_path / "merged"
    assert command("export", run_folder, "--as", "lora", "--out", half, "--strength", "0.5").code == 0
    said = command("verify", taught_folder, run_folder, half)
    assert said.code == 1
    assert f"{half} (lora): NOT the same edit (largest logit difference " in said.out
    assert command("export", run_folder, "--as", "merged", "--out", merged).code == 0
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-6
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    said = command("verify", taught_folder, run_folder, merged)
    assert said.code == 1
    assert "model.norm.weight should be unchanged" in said.out


def test_verify_refuses_another_base(command: Command, run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model(seed=3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    said = command("verify", other, run_folder)
    assert said.code == 1
    assert "hash" in said.err


def test_strength_and_iteration_travel(command: Command, run_folder: Path, taught_folder: Path, tmp_path: Path) -> None:
    from llmva.models.load import load_model

    merged = tmp_path / "merged"
    arguments = ("--as", "merged", "--out", merged, "--strength", "0", "--iteration", "1")
    assert command("export", run_folder, *arguments).code == 0
    base, got = load_model(taught_folder)[0], load_model(merged)[0]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), got.parameters(), strict=True))


def test_diff_lists_what_changes_and_writes_nothing(command: Command, run_folder: Path) -> None:
    before = sorted(run_folder.rglob("*"))
    said = command("export", run_folder, "--as", "diff", "--json")
    rows = json.loads(said.out)["tensors"]
    assert said.code == 0
    names = {f"{name}.weight" for name in Edit.load(run_folder).chosen.factors}
    assert {row["tensor"] for row in rows} == names
    assert all(row["norm"] > 0 and row["rank"] >= 1 for row in rows)
    assert sorted(run_folder.rglob("*")) == before


def test_a_base_that_moved(command: Command, run_folder: Path, taught_folder: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run_folder, run)
    shutil.copytree(taught_folder, base)
    edit = Edit.load(run)
    moved: dict[str, Any] = {**edit.base, "model": str(tmp_path / "gone")}
    Edit(edit.factors, moved, edit.best).save(run)
    said = command("export", run, "--as", "lora", "--out", tmp_path / "a")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "--base" in said.err
    assert command("export", run, "--as", "lora", "--out", tmp_path / "a", "--base", base).code == 0


BAD: dict[str, tuple[str, ...]] = {
    "kind": ("--as", "onnx", "--out", "x"),
    "no out": ("--as", "lora"),
    "diff with out": ("--as", "diff", "--out", "x"),
    "rank of merged": ("--as", "merged", "--out", "x", "--rank", "16"),
    "odd rank": ("--as", "lora", "--out", "x", "--rank", "17"),
    "iteration": ("--as", "lora", "--out", "x", "--iteration", "99"),
    "untouched iteration": ("--as", "lora", "--out", "x", "--iteration", "0"),
    "strength": ("--as", "lora", "--out", "x", "--strength", "-1"),
    "strength nan": ("--as", "lora", "--out", "x", "--strength", "nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, command: Command, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("export", run_folder, *BAD[case])
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(command: Command, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for kind in ("lora", "merged"):
        said = command("export", run_folder, "--as", kind, "--out", tmp_path)
        assert said.code == 2
        assert said.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_dry_run_of_a_push_shows_all(command: Command, run_folder: Path) -> None:
    for kind in ("edit", "lora", "merged"):
        said = command("push", run_folder, "--repo", "someone/thing", "--as", kind, "--dry-run", "--json")
        assert said.code == 0
        found = json.loads(said.out)
        names = {file["path"] for file in found["files"]}
        assert "README.md" in names
        assert "answers.jsonl" not in names
        assert {"edit": "edit.safetensors", "lora": "adapter_model.safetensors", "merged": "model.safetensors"}[
            kind
        ] in names
        assert "README.md" in said.err
    assert command("push", run_folder, "--repo", "no slash", "--dry-run").code == 2
