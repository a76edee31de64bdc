"""`llmva replay`: the same run again gives the same bytes, and where it does not, the first difference is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import Said, taught_model, taught_requests, tiny_tokenizer
from llmva.alignment import RunOptions
from llmva.edit import Edit
from llmva.experiments.replay import replay
from llmva.report.run.replayed import replayed_sentences
from llmva.runs.parting import compare_runs

Command = Callable[..., Said]
SMALL: dict[str, Any] = {
    "per_source": 32, "max_new_tokens": 8, "endings_tokens": 0, "iterations": 3, "passes": 2, "seed": 5,
}  # fmt: skip


def requests(benign: bool, start: str = "") -> list[str]:
    return [text for text, side, _ in taught_requests() if side == benign and text.startswith(start)]


def align(folder: Path, out: Path, start: str = "", **changes: Any) -> Path:
    model, tokenizer = llmva.load_model(folder)
    prompts = llmva.PromptSet.from_lists(requests(False, start), requests(True, start))
    llmva.align(model, tokenizer, prompts, out=out, options=RunOptions(name=str(folder)), **SMALL | changes)
    return out


@pytest.fixture(scope="module")
def run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not write into it."""
    out = align(taught_folder, tmp_path_factory.mktemp("replayed") / "run")
    assert Edit.load(out).chosen.factors
    return out


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def changed(run: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the run whose record says otherwise."""
    shutil.copytree(run, out)
    record = record_of(out)
    change(record)
    (out / "run.json").write_text(json.dumps(record))
    return out


def test_a_replay_gives_the_same_bytes(run: Path, tmp_path: Path, command: Command) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    said = command("replay", run, "--out", tmp_path / "again")
    assert said.code == 0, said.err
    assert said.out.startswith("Equal: edit.safetensors and answers.jsonl are the same bytes")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert (tmp_path / "again" / "edit.safetensors").read_bytes() == before["edit.safetensors"]
    again = json.loads(command("replay", run, "--out", tmp_path / "again", "--json").out)  # finished: it only compares
    assert again["equal"]
    assert again["first"] is None
    assert again["answers"] == before["answers.jsonl"].count(b"\n")
    assert again["versions"] == []


def test_settings_that_were_not_given_stay_the_default(run: Path) -> None:
    """Before, run.json gave `layers` the number that the paper's share makes, and an extension took it for a wish."""
    assert record_of(run)["settings"]["layers"] is None


def test_runs_of_other_kinds_are_replayed_too(taught_folder: Path, run: Path, tmp_path: Path) -> None:
    model, tokenizer = llmva.load_model(taught_folder)
    hardened = align(taught_folder, tmp_path / "hard", harden=True, iterations=2)
    assert record_of(hardened)["hardened"]["train"]["persona"]
    assert replay(model, tokenizer, hardened, out=tmp_path / "hard-again").equal
    first = align(taught_folder, tmp_path / "first", "please", iterations=1, passes=1, layers=4)
    attack = [llmva.Prompt(text, False, "attack") for text in requests(False, "tell")]
    llmva.extend(model, tokenizer, first, attack, out=tmp_path / "more", iterations=2)
    assert record_of(tmp_path / "more")["extends"]
    assert replay(model, tokenizer, tmp_path / "more", out=tmp_path / "more-again").equal


def test_another_seed_parts_at_the_first_draw(taught_folder: Path, run: Path, tmp_path: Path) -> None:
    other = align(taught_folder, tmp_path / "other", seed=6)
    alike = compare_runs(run, other)
    assert not alike.equal
    assert alike.first is not None
    assert (alike.first.iteration, alike.first.what) == (0, "prompts")
    record = alike.as_record()
    assert replayed_sentences(record, [])[0].startswith("Not equal: the runs part in iteration 0: the train prompts")
    assert replayed_sentences(record, [])[-1].startswith("Versions are the same")
    other = ["torch is 3, and was 2 when the run began"]
    assert replayed_sentences(record, other)[-1].startswith("Computed otherwise")


def test_the_first_difference_is_named(run: Path, tmp_path: Path) -> None:
    figure = changed(run, tmp_path / "figure", lambda record: record["iterations"][1].update(kl=0.5))
    first = compare_runs(run, figure).first
    assert first is not None
    assert (first.iteration, first.what) == (1, "figures")
    assert first.sentence.startswith("iteration 1, kl: ")

    shutil.copytree(run, tmp_path / "edit")
    edit = Edit.load(run)
    iteration = edit.held[0]
    name = edit.written(iteration)[0]
    edit.factors[name].V[:, 0] *= 1 + 1e-3
    edit.save(tmp_path / "edit")
    alike = compare_runs(run, tmp_path / "edit")
    assert alike.first is not None
    assert (alike.first.iteration, alike.first.what) == (iteration - 1, "edit")
    assert name in alike.first.sentence
    assert alike.largest is not None
    assert 0 < alike.largest < 2e-3
    assert alike.same_bytes == {"edit.safetensors": False, "answers.jsonl": True}

    shutil.copytree(run, tmp_path / "answer")
    lines = (run / "answers.jsonl").read_bytes().split(b"\n")
    row = json.loads(lines[3])
    row["answer"] = row["answer"] + " now"
    lines[3] = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "answer" / "answers.jsonl").write_bytes(b"\n".join(lines))
    length = len(b"\n".join(lines))
    said = changed(tmp_path / "answer", tmp_path / "said", lambda record: record.update(answers_bytes=length))
    alike = compare_runs(run, said)
    assert alike.first is not None
    assert (alike.first.iteration, alike.first.what) == (row["iteration"], "answers")
    assert row["id"] in alike.first.sentence
    assert (alike.other_answers, alike.other_labels) == (1, 0)

    shorter = changed(run, tmp_path / "end", lambda record: record.update(best_strength=0.5))
    first = compare_runs(run, shorter).first
    assert first is not None
    assert (first.iteration, first.what) == (None, "end")


def test_what_cannot_be_replayed_is_refused(run: Path, tmp_path: Path, command: Command) -> None:
    unfinished = changed(run, tmp_path / "unfinished", lambda record: record.update(stopped=None))
    without = tmp_path / "without"
    shutil.copytree(run, without)
    (without / "prompts.jsonl").unlink()
    for folder, out, sentence in (
        (unfinished, tmp_path / "a", "is not finished"),
        (run, run, "choose another folder with --out"),
        (without, tmp_path / "b", "is missing, and without it nothing can be asked again"),
        (tmp_path / "none", tmp_path / "c", "holds no run"),
    ):
        said = command("replay", folder, "--out", out)
        assert said.code == 2
        assert sentence in said.err
        assert len(said.err.strip().splitlines()) == 1
    other = taught_model(seed=1)
    with pytest.raises(llmva.LlmvaError, match="give the model that the edit was made from"):
        replay(other, tiny_tokenizer(), run, out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_other_rounding_is_told_and_ends_with_1(run: Path, tmp_path: Path, command: Command) -> None:
    """A run that was computed in another way, here by another edit of the first iteration, does not look equal."""
    out = tmp_path / "again"
    shutil.copytree(run, out)
    edit = Edit.load(run)
    for factors in edit.factors.values():
        factors.U.add_(torch.finfo(torch.float32).eps)
    edit.save(out)
    said = command("replay", run, "--out", out)
    assert said.code == 1
    place = f"in iteration {edit.held[0] - 1}: the columns of iteration {edit.held[0]} at "
    assert said.out.startswith(f"Not equal: the runs part {place}")
