"""Who starts a study's workers does not change its cells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmva.errors import UsageError
from llmva.experiments.study.executors import parse_resources, run_with
from test_study import same_cells, whole, worker

__all__ = ["whole"]  # the fixture


def nothing() -> None:
    pass


def test_resources_are_read() -> None:
    assert parse_resources("num_gpus=0.5, partition=long,timeout_min=60") == {
        "num_gpus": 0.5,
        "partition": "long",
        "timeout_min": 60,
    }
    assert parse_resources("") == {}
    with pytest.raises(UsageError, match="'gpus' is not NAME=VALUE"):
        parse_resources("gpus")


def test_exit_codes_are_told(tmp_path: Path) -> None:
    assert run_with("local", [["--version"], ["no-such-command"]], nothing, tmp_path, {}) == [0, 2]


def test_executors_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no executor 'kubernetes'"):
        run_with("kubernetes", [], nothing, tmp_path, {})
    with pytest.raises(UsageError, match="leave them out"):
        run_with("local", [], nothing, tmp_path, {"num_gpus": 1})
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"pip install 'llmva\[{name}\]'"):
            run_with(name, [["--version"]], nothing, tmp_path, {})


@pytest.mark.parametrize(("executor", "package"), [("ray", "ray"), ("slurm:local", "submitit")])
def test_the_same_cells_whoever_starts_workers(
    executor: str, package: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    path, serial = whole
    process = worker(path, tmp_path / "out", "--workers", 2, "--executor", executor)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    same_cells(serial, tmp_path / "out")


def test_unknown_resources_are_told(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UsageError, match="Slurm takes no jobs here"):
        run_with("slurm:local", [["--version"]], nothing, tmp_path, {"colour": "red"})
