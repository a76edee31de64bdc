"""The folder of a run: what is written when, and whose folders are left alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.runs.environment import peak_bytes, versions
from llmva.runs.record import read_run
from llmva.runs.run import Run

PROMPTS = PromptSet.from_lists([f"break number {i}" for i in range(10)], [f"paint number {i}" for i in range(10)])
RECORD: dict[str, Any] = {
    "base": {"model": "m", "sha256": "0" * 64, "dtype": "float32"},
    "settings": {"layers": 2},
    "seed": 1,
    "judge": "stub",
    "prompts": {"hashes": PROMPTS.hashes()},
}


def measured(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "f1": 0.5, "asr": 0.25, "orr": None}


def answer(iteration: int, text: str, **fields: str) -> dict[str, Any]:
    return {"iteration": iteration, "split": "train", "id": "x", "answer": text, "label": "answered", **fields}


def begin(folder: Path | None, **changes: Any) -> tuple[Run, bool]:
    return Run.open(folder, RECORD | changes, PROMPTS)


def test_a_run_in_memory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, resumed = begin(None)
    run.commit(Edit({}, RECORD["base"]))
    assert not resumed
    assert run.record["cost"]["peak_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_every_commit_adds_its_answers(tmp_path: Path) -> None:
    run, _ = begin(tmp_path / "a" / "run")
    path = tmp_path / "a" / "run" / "answers.jsonl"
    for t, text in enumerate(("plain", "schön \u2028 日本 \N{GRINNING FACE}", "a\nb\tc\x00d")):
        run.answers.append(answer(t, text))
        run.record["iterations"].append(measured(t))
        start = path.read_bytes()
        v = torch.ones(4, dtype=torch.float64)
        run.commit(run.edit.then("layer", v, v, t + 1))
        assert path.read_bytes().startswith(start)
        assert json.loads((path.parent / "run.json").read_text())["answers_bytes"] == path.stat().st_size
    again, resumed = begin(path.parent)
    assert resumed
    assert again.done == 3
    assert [row["answer"] for row in again.answers] == ["plain", "schön \u2028 日本 \N{GRINNING FACE}", "a\nb\tc\x00d"]
    assert again.edit.iterations == 3


def test_seconds_go_on_where_they_were(tmp_path: Path) -> None:
    run, _ = begin(tmp_path)
    run.record["iterations"].append(measured(0))
    run.record["stopped"] = "enough"
    run.commit()
    record = json.loads((tmp_path / "run.json").read_text())
    record["cost"]["seconds"] = 1000.0
    (tmp_path / "run.json").write_text(json.dumps(record))
    again, _ = begin(tmp_path)
    again.commit()
    assert again.record["cost"]["seconds"] >= 1000


def test_an_edit_without_the_columns_that_run_json_knows_of(tmp_path: Path) -> None:
    run, _ = begin(tmp_path)
    run.record["iterations"] += [measured(0), measured(1)]
    v = torch.ones(4, dtype=torch.float64)
    run.commit(run.edit.then("layer", v, v, 1).then("layer", v, v, 2))
    begin(tmp_path)
    run.edit.at(1).save(tmp_path)
    with pytest.raises(LlmvaError, match=r"of another run .* --restart"):
        begin(tmp_path)


@pytest.mark.parametrize("name", ["edit.safetensors", "answers.jsonl", "prompts.jsonl", "report.html"])
def test_files_of_someone_else_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"a file {name} that would be lost: choose another"):
        begin(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "run.json").exists()


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 2}, "the seed 1, and this one has 2"),
        ({"judge": "other"}, "the judge stub, and this one has other"),
        ({"settings": {"layers": 3}}, "the setting layers 2, and this one has 3"),
        ({"settings": {"layers": 2, "new": 1}}, "the setting new None, and this one has 1"),
        ({"base": RECORD["base"] | {"sha256": "1" * 64}}, "the model 'm' .0{12}., and this one has 'm' .1{12}."),
        ({"base": RECORD["base"] | {"dtype": "bfloat16"}}, "the dtype float32, and this one has bfloat16"),
        ({"prompts": {"hashes": {"toxic": "0"}}}, "the prompts .* with other texts"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    begin(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=f"holds a run with {says}.*: pass --restart"):
        begin(tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_may_have_moved(tmp_path: Path) -> None:
    """What counts is what its weights say, not where it lies or how the command was written."""
    begin(tmp_path)
    begin(tmp_path, base=RECORD["base"] | {"model": "elsewhere/m"}, command="llmva align elsewhere/m")


def test_a_failed_try_does_not_lock_out_the_next(tmp_path: Path) -> None:
    """In a notebook the traceback keeps the first run alive."""
    first, _ = begin(tmp_path)
    second, _ = begin(tmp_path)
    second.commit()
    assert first.directory == second.directory


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run, _ = begin(tmp_path)
    run.commit()


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    run, _ = begin(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    run.record["iterations"].append(measured(0) | {"kl": float("nan")})
    with pytest.raises(LlmvaError, match=r"not finite.*float32.*--dtype"):
        run.commit()
    assert (tmp_path / "run.json").read_bytes() == before


def test_harmless_texts() -> None:
    prompts = PromptSet(tuple(Prompt(f"t{i}", i % 2 == 0, "s") for i in range(8)), (Prompt("v", True, "s"),), ())
    ids = [prompt.id for prompt in prompts.train]
    answers = [
        answer(0, "a0", id=ids[0]),
        answer(0, "a1", id=ids[1]),  # toxic
        answer(0, "a2", id=ids[2], label="refused"),
        answer(0, "a4", id=ids[4], label="garbled"),
        answer(1, "a6", id=ids[6]),  # after an edit
        answer(0, "v", id=prompts.validation[0].id, split="validation"),
        answer(0, "a6", id=ids[6]),
    ]
    run, _ = Run.open(None, RECORD, prompts)
    run.answers = answers

    def harmless_texts(split: str, limit: int) -> list[tuple[str, str]]:
        return run.harmless_texts(prompts, split, limit)

    assert harmless_texts("train", 9) == [("t0", "a0"), ("t6", "a6")]
    assert harmless_texts("train", 1) == [("t0", "a0")]
    assert harmless_texts("validation", 9) == [("v", "v")]
    assert harmless_texts("test", 9) == []


def test_what_computed_the_run() -> None:
    import llmva

    assert versions()["llmva"] == llmva.__version__
    assert {"python", "torch", "transformers", "device"} <= versions().keys()
    assert 2**24 < peak_bytes() < 2**40


def test_a_folder_without_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read_run(tmp_path)
