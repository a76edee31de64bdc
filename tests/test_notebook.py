"""The notebooks run from top to bottom on the bundled model, and are kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import llmva
from llmva.prompts.public.registry import find

EXAMPLES = Path(__file__).parent.parent / "examples"


def cells(kind: str, notebook: str = "align") -> list[dict[str, Any]]:
    every: list[dict[str, Any]] = json.loads((EXAMPLES / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == kind]


def run(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; the value of its last line, if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.parametrize("notebook", ["align", "gpu"])
def test_it_is_kept_without_outputs(notebook: str) -> None:
    kept = cells("code", notebook)
    assert [cell["id"] for cell in kept if cell["outputs"] or cell["execution_count"] is not None] == []


def test_it_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run("".join(cell["source"]), names) for cell in cells("code")]
    assert "PromptSet(" in repr(shown[0])
    (result,) = [value for value in shown if hasattr(value, "_repr_html_")]
    assert "<table" in result._repr_html_()
    assert result.record["test"]["after"]["f1"] > result.record["test"]["before"]["f1"] + 0.3
    assert (tmp_path / "llmva-notebook" / "report.html").is_file()
    assert (tmp_path / "llmva-notebook-model" / "model.safetensors").is_file()
    answers = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    before, applied, baked = (answers[i : i + 2] for i in (0, 2, 4))
    assert applied == baked
    assert before[0] != applied[0]
    assert before[1] != applied[1]


def test_the_one_for_a_gpu_runs_on_a_small_model(
    taught_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a model, prompts and settings that a CPU can bear in place of the first cell's, and all else as it is."""
    monkeypatch.chdir(tmp_path)
    sides = {"toxic": [str(taught_folder / "toxic.txt")], "benign": [str(taught_folder / "benign.txt")]}
    load = llmva.PromptSet.load
    monkeypatch.setattr(llmva.PromptSet, "load", lambda data, per_set, seed: load(**sides, seed=seed, only=True))
    first, *others = ("".join(cell["source"]) for cell in cells("code", "gpu"))
    names: dict[str, Any] = {"__name__": "__main__"}
    run(first, names)
    assert all(find(name) for name in names["DATA"])
    names |= {"MODEL": str(taught_folder), "SETTINGS": {"max_new_tokens": 8, "per_source": 32, "iterations": 2}}
    shown = [run(cell, names) for cell in others]
    assert any(hasattr(value, "_repr_html_") for value in shown)
    out = capfd.readouterr().out
    assert "before {" in out
    assert "after {" in out
    assert (tmp_path / f"{names['OUT']}-lora" / "adapter_model.safetensors").is_file()
