"""How soon the command line answers: no torch for reading files, and little processor time for help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmva
from test_front import EASY

MARGIN = 3.0  # machines that test may be slower, and busy
HEAVY = {"torch", "transformers", "datasets", "sklearn", "scipy", "pandas", "huggingface_hub"}
SCRIPT = """
import json, os, sys
from llmva.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    times = os.times()
    report = {"code": end.code, "seconds": times.user + times.system, "modules": [*sys.modules]}
    print(json.dumps(report), file=sys.stderr)
"""


def started(*arguments: object) -> dict[str, Any]:
    """What a command took in a process of its own: the less of two tries."""
    tries = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        tries.append(json.loads(done.stderr.splitlines()[-1]))
    return min(tries, key=lambda one: float(one["seconds"]))


@pytest.fixture(scope="module")
def finished_run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("startup") / "run"
    model, tokenizer = llmva.load_model(taught_folder)
    prompts = llmva.PromptSet.load([str(taught_folder / "toxic.txt")], [str(taught_folder / "benign.txt")])
    llmva.align(model, tokenizer, prompts, out=out, **EASY)
    return out


@pytest.mark.parametrize("arguments", [("--help",), ("align", "--help"), ("--version",), ("data",), ("data", "tasks")])
def test_help_takes_little_time(arguments: tuple[str, ...]) -> None:
    took = started(*arguments)
    assert took["code"] == 0
    assert took["seconds"] < 0.3 * MARGIN
    assert not {*HEAVY, "numpy", "jinja2"} & set(took["modules"])


@pytest.mark.parametrize("words", [("front",), ("inspect",), ("figures", "--format", "pdf")])
def test_reading_files_needs_no_torch(words: tuple[str, ...], finished_run: Path) -> None:
    took = started(words[0], finished_run, *words[1:])
    assert took["code"] == 0
    assert took["seconds"] < 1.0 * MARGIN
    assert not HEAVY & set(took["modules"])
