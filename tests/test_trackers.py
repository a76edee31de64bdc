"""`--log`: figures and the table go to a tracker too, and its failures end no run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Said
from llmva.cli.terminal import trackers
from llmva.cli.terminal.trackers import Tracked, check_tracker, tracked
from llmva.errors import LlmvaError, UsageError
from llmva.progress import Progress

Command = Callable[..., Said]
FAST = ("--per-source", 30, "--max-new-tokens", 8, "--iterations", 2, "--only", "--quiet")
TEXT = "the lamp"  # in prompts of the taught model, and so in nothing that is sent


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Kept:
    """A tracker in memory."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self.config = name, config
        self.figures: list[tuple[int, dict[str, float]]] = []
        self.rows: list[list[str]] = []
        self.finished = 0

    def log(self, figures: Mapping[str, float], step: int) -> None:
        print("what a library prints")
        self.figures.append((step, dict(figures)))

    def table(self, columns: Any, rows: Any) -> None:
        self.rows = [list(row) for row in rows]

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    """The trackers that commands start, under a name whose module is at hand."""
    made: list[Kept] = []

    def make(name: str, config: Mapping[str, Any]) -> Kept:
        made.append(Kept(name, config))
        return made[-1]

    monkeypatch.setitem(trackers.TRACKERS, "json", make)
    return made


def test_a_run_sends_iterations_figures_and_the_table(
    taught_folder: Path, tmp_path: Path, command: Command, kept: list[Kept]
) -> None:
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    said = command("align", taught_folder, *sides, *FAST, "--out", tmp_path / "run", "--log", "json", "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)  # nothing of what the library printed
    (tracker,) = kept
    assert (tracker.name, tracker.finished) == ("run", 1)
    assert tracker.config["model"] == str(taught_folder)
    steps = [step for step, _ in tracker.figures]
    assert steps == [*range(len(record["iterations"])), len(record["iterations"])]
    for (_, figures), entry in zip(tracker.figures, record["iterations"], strict=False):
        assert figures["validation/f1"] == entry["f1"]
        assert figures["validation/asr"] == entry["asr"]
    last = tracker.figures[-1][1]
    assert last["before/F1"] == record["test"]["before"]["f1"]
    assert last["after/F1"] == record["test"]["after"]["f1"]
    assert "after/ASR, toxic" in last
    assert [row[0] for row in tracker.rows if not row[0].startswith(" ")][:2] == ["F1", "ASR"]
    assert tracker.rows[0][3].startswith(f"{record['test']['after']['f1']:.3f} [")
    assert TEXT in (taught_folder / "toxic.txt").read_text()
    assert TEXT not in repr(vars(tracker))


def test_a_tracker_that_fails_ends_no_run(
    taught_folder: Path, tmp_path: Path, command: Command, kept: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(Kept, "log", fail)
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    loud = [option for option in FAST if option != "--quiet"]
    said = command("align", taught_folder, *sides, *loud, "--out", tmp_path / "run", "--log", "json")
    assert said.code == 0
    assert said.err.count("The tracker takes nothing more (no route). The run goes on") == 1
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_cannot_track_is_told_before_anything_is_loaded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("align", "no/such-model", "--log", "paper")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert "There is no tracker 'paper': choose --log trackio, wandb, mlflow." in said.err
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    said = command("demo", "--log", "mlflow")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert "mlflow is not installed: pip install 'mlflow-skinny', or leave --log out." in said.err
    with pytest.raises(UsageError):
        check_tracker("trackio")
    check_tracker(None)


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, config: Mapping[str, Any]) -> Any:
        raise RuntimeError("no\naccount")

    monkeypatch.setitem(trackers.TRACKERS, "json", fail)
    told = r"json does not start \(no account\): mend that, or leave --log out"
    with pytest.raises(LlmvaError, match=told), tracked(Notes(), "json", tmp_path, "model"):
        pass


def test_without_a_tracker_the_display_is_told_all_the_same(tmp_path: Path) -> None:
    notes = Notes()
    with tracked(notes, None, tmp_path, "model") as progress:
        progress.note("hello")
        progress.result({"iterations": []})
    assert notes.notes == ["hello"]


def test_wandb_is_called_as_its_documentation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not installed here; trackio and mlflow are tried for real where they are."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, figures: Any, step: int | None = None) -> None:
            calls.append(("log", (figures, step)))

        def finish(self) -> None:
            calls.append(("finish", None))

    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **how: (calls.append(("init", how)), Run())[1]
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    with tracked(Notes(), "wandb", tmp_path / "run", "model") as progress:
        progress.iteration({"iteration": 0, "f1": 0.5, "kept": None, "selected": [1]}, 0, 3)
    assert calls[0] == (
        "init",
        {
            "project": "llmva", "name": "run", "id": "run", "resume": "allow",
            "config": {"model": "model", "folder": str(tmp_path / "run")},
        },
    )  # fmt: skip
    assert calls[1:] == [("log", ({"validation/f1": 0.5, "best_iteration": 0.0}, 0)), ("finish", None)]


RECORD: dict[str, Any] = {
    "iterations": [{}],
    "test": {when: {"f1": f1, "asr": 0.25, "orr": 0.125} for when, f1 in (("before", 0.5), ("after", 0.875))},
}


def send(name: str, folder: Path) -> None:
    with tracked(Notes(), name, folder / "run", "model") as progress:
        assert isinstance(progress, Tracked)
        progress.iteration({"iteration": 0, "f1": 0.5}, 0, 3)
        progress.result(RECORD)


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    send("mlflow", tmp_path)
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("llmva").experiment_id])
    assert run.data.metrics["validation/f1"] == 0.5
    assert run.data.metrics["after/F1"] == 0.875
    assert run.data.params["model"] == "model"
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "store").rglob("test-prompts.json"))


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    send("trackio", tmp_path)
    assert any("llmva" in path.name for path in (tmp_path / "store").iterdir())
