"""The notebook runs from top to bottom on the bundled model, and is kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "align.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    every: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == kind]


def run(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; the value of its last line, if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return (
        eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if isinstance(last, ast.Expr) else None
    )


def test_it_is_kept_without_outputs() -> None:
    assert [cell["id"] for cell in cells("code") if cell["outputs"] or cell["execution_count"] is not None] == []


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
