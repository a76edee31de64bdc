"""`llmva runs`: an index of what lies below a folder, with figures, links and what stands still."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llmva.experiments.claims import Claims, at_work
from llmva.files import is_locked, lock
from llmva.report.index import entries

RATES = {"f1": 0.5, "asr": 0.4, "orr": 0.3}


def run(finished: bool = True, iterations: int = 3, **more: Any) -> dict[str, Any]:
    test = {"before": RATES, "after": {"f1": 0.9, "asr": 0.1, "orr": 0.05}}
    record = {
        "format": "llmva-run",
        "version": 1,
        "base": {"model": "org/model"},
        "iterations": [{"iteration": t, **RATES} for t in range(iterations)],
        **more,
    }
    return record | ({"test": test} if finished else {})


def write(path: Path, record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def a_folder(top: Path) -> None:
    write(top / "a/run.json", run())
    write(top / "a/report.html", {})
    write(top / "deep/er/b/run.json", run(finished=False))
    rows = [
        {"method": name, "setting": None, **{k: {"mean": v} for k, v in RATES.items()}} for name in ("none", "llmva")
    ]
    write(top / "c/compare.json", {"format": 1, "kind": "comparison", "base": {"model": "m"}, "rows": rows})
    write(top / "c/identity.json", {})
    write(top / "c/cells/none.json", {})
    write(top / "c/llmva-42/run.json", run(finished=False))
    write(top / "d/identity.json", {})
    write(top / "d/cells/none.json", {})
    write(top / "s/study.json", {"kind": "study", "title": "S", "cells": 4, "missing": ["x/none"], "methods": rows})
    write(top / "other/run.json", {"format": "of another program"})
    (top / "half").mkdir()
    (top / "half/run.json").write_text('{"format": "llmva-run", ')


def test_what_lies_below_a_folder(tmp_path: Path) -> None:
    a_folder(tmp_path)
    by_path = {entry.path: entry for entry in entries(tmp_path)}
    assert set(by_path) == {"a", "deep/er/b", "c", "d", "s"}  # the run in a comparison is part of it
    assert by_path["a"].figures == ("0.500", "0.900", "10.0%", "5.0%")
    assert by_path["a"].page == "a/report.html"
    assert by_path["c"].page == ""
    states = {path: entry.state for path, entry in by_path.items()}
    still = dict.fromkeys(("deep/er/b", "d", "s"), "stands still")
    assert states == {"a": "finished", "c": "finished", **still}
    assert by_path["s"].said.startswith("3 of 4 cells")
    assert by_path["d"].said == "1 cell so far"


def test_who_is_at_work(tmp_path: Path) -> None:
    """A lock is another process's; a claim may be this one's too."""
    a_folder(tmp_path)
    code = (
        f"from pathlib import Path\nfrom llmva.files import lock\nheld = lock(Path({str(tmp_path / 'deep/er/b')!r}))\n"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    assert is_locked(tmp_path / "deep/er/b")
    with Claims(tmp_path / "d/claims").hold("none"):
        states = {entry.path: entry.state for entry in entries(tmp_path, at_work)}
    assert states["deep/er/b"] == states["d"] == "at work"
    held.communicate("\n")
    assert {entry.state for entry in entries(tmp_path, at_work) if entry.path in ("deep/er/b", "d")} == {"stands still"}
    assert not is_locked(tmp_path / "a")
    assert not (tmp_path / "a/.lock").exists()
    lock(tmp_path / "deep/er/b").close()  # the look did not take it


def test_the_page_escapes_and_links(tmp_path: Path, command: Any) -> None:
    a_folder(tmp_path)
    write(tmp_path / "<b>x/run.json", run(base={"model": "<script>alert(1)</script>"}))
    write(tmp_path / "<b>x/report.html", {})
    said = command("runs", tmp_path)
    assert said.code == 0
    text = (tmp_path / "index.html").read_text()
    assert "<script>" not in text
    assert '<a href="%3Cb%3Ex/report.html">' in text
    assert "stands still" in said.out
    told = json.loads(command("runs", tmp_path, "--json", "--quiet").out)
    assert len(told["entries"]) == 6


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, command: Any) -> None:
    said = command("runs", tmp_path / "none")
    assert said.code == 2
    assert "There is no folder" in said.err


def test_two_hundred_runs_take_seconds(tmp_path: Path, command: Any) -> None:
    record = run(iterations=30, filler=[[0.123456] * 64 for _ in range(400)])  # about as long as a run of a 7B model
    text = json.dumps(record)
    assert len(text) > 200_000
    for number in range(200):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "run.json").write_text(text)
    began = time.process_time()  # whatever else the machine does
    assert command("runs", tmp_path, "--quiet").code == 0
    assert time.process_time() - began < 3
