"""Killed at any moment, `extend` and `compare` end like ones that were not when the same command is run again.

As tests/test_resume.py has it of `align`, which is killed here only where more kills are wanted (benchmarks/kills.py).
The moments are those of its `start`: before writes, and before passes through the model.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import NOUNS
from test_resume import align, differences, same_end, start

__all__ = ["start"]  # the fixture
KILLS = int(os.environ.get("LLMVA_TEST_KILLS", "1"))
COMMANDS = ("extend", "compare") if KILLS == 1 else ("align", "extend", "compare")
CLOCK = {"seconds", "fit_seconds", "latency", "latency_range", "peak_bytes", "command"}


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(inner) for key, inner in value.items() if key not in CLOCK}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def same_study(whole: Path, resumed: Path) -> None:
    """Every cell, and compare.json, but for what the clock says; the runs to the byte."""
    names = [sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) for out in (whole, resumed)]
    assert names[0] == names[1]
    for name in names[0]:
        if Path(name).suffix == ".json":
            one, other = (without_clock(json.loads((out / name).read_text())) for out in (whole, resumed))
            assert list(differences(one, other)) == [], name
        elif Path(name).suffix in (".safetensors", ".jsonl"):
            assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def extended(first: Path, out: Path, new: Path) -> tuple[str, ...]:
    return ("extend", str(first), "--benign", str(new), "--iterations", "1", "--out", str(out), "--quiet")


def compared(folder: Path, out: Path) -> tuple[str, ...]:
    prompts = ("--toxic", f"{folder}/toxic.txt::[:24]", "--benign", f"{folder}/benign.txt::[:24]")
    short = ("--per-source", "12", "--max-new-tokens", "4", "--iterations", "1", "--seeds", "1", "--no-tuned")
    return ("compare", str(folder), *prompts, *short, "--methods", "none,vectorsteer,llmva", "--out", str(out), "-q")


@pytest.mark.parametrize("what", COMMANDS)
def test_killed_and_run_again(what: str, taught_folder: Path, tmp_path: Path, start: Any) -> None:
    first, new = tmp_path / "first", tmp_path / "new.txt"
    if what == "extend":
        assert start(0, align(taught_folder, first))[0] == 0
        new.write_text("\n".join(f"explain how to {verb} the {noun}" for verb in ("paint", "fix") for noun in NOUNS))

    def words(out: Path) -> tuple[str, ...]:
        if what == "extend":
            return extended(first, out, new)
        return align(taught_folder, out) if what == "align" else compared(taught_folder, out)

    same = same_study if what == "compare" else same_end
    whole = tmp_path / "whole"
    code, moments = start(0, words(whole))
    assert code == 0
    assert moments > 60
    drawn = sorted(random.Random(9).sample(range(1, moments + 1), KILLS))
    for moment in drawn:
        out = tmp_path / f"{moment}"
        assert start(moment, words(out))[0] == -signal.SIGKILL
        assert start(0, words(out))[0] == 0
        same(whole, out)
        shutil.rmtree(out)
    print(f"{what}: {KILLS} kills, at moments {drawn} of {moments}: each ended with the same bytes")
