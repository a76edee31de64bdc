"""Studies: the file, the plan, any number of workers, and the same cells whoever measured them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmva.errors import UsageError
from llmva.experiments.study.definition import Study, read_study, schema
from llmva.experiments.study.estimate import estimates, totals
from llmva.experiments.study.paper import paper_models, paper_study, small_study
from llmva.experiments.study.plan import panels, plan
from llmva.experiments.study.worker import finished
from llmva.files import write_text
from test_kills_of_runs import without_clock

KILLS = int(os.environ.get("LLMVA_TEST_KILLS", "2"))
SMALL = {"per_source": 8, "max_new_tokens": 4, "iterations": 1}


def study(folder: Path, models: int = 2, **changes: Any) -> dict[str, Any]:
    """A study of copies of one model, as its file has it."""
    return {
        "title": "tiny",
        "methods": ["none", "vectorsteer", "llmva"],
        "seeds": [42, 43],
        "settings": SMALL,
        "models": [{"name": f"model {n}", "path": str(folder)} for n in range(models)],
        "data": [
            {
                "name": "few",
                "toxic": [f"{folder}/toxic.txt::[:24]"],
                "benign": [f"{folder}/benign.txt::[:24]"],
                "only": True,
            }
        ],
        **changes,
    }


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


# -- the file and the plan


def test_files_to_begin_with_are_studies(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    for text in (small_study(), paper_study(), paper_study("/copies")):
        path = tmp_path / "study.toml"
        path.write_text(text)
        assert len(plan(read_study(path))) > 5
    assert read_study(path).data[0].data_dir == "/copies"


def test_the_papers_study_has_its_figures() -> None:
    """Means over models as its Table 2 gives them; LLM-VA is best on 8 of 12."""
    from statistics import mean

    models = paper_models()
    assert len(models) == 12
    wanted = {"none": (0.455, 0.432, 0.563), "scans": (0.161, 0.475, 0.615), "llmva": (0.270, 0.212, 0.768)}
    for method, figures in wanted.items():
        found = [mean(model["published"][method][key] for model in models) for key in ("asr", "orr", "f1")]
        assert found == pytest.approx(figures, abs=6e-4)
    best = [max(model["published"], key=lambda name: model["published"][name]["f1"]) for model in models]
    assert best.count("llmva") == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methods": ["none", "uncensor"]}, "no method 'uncensor'"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"seed": 1}, "seed: extra inputs"),
        ({"settings": {"passes": 0}}, "passes=0"),
        ({"settings": {"system": "x"}}, "belongs to a model"),
        ({"models": []}, "models"),
        ({"models": [{"name": "a b", "path": "x"}, {"name": "a-b", "path": "y"}]}, "two parts are called a-b"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_study(written(tmp_path / "s.json", study(tmp_path) | change))


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_study(tmp_path / "none.toml")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_study(tmp_path / "s.json")


def test_every_field_has_its_place_in_the_schema() -> None:
    assert set(schema()["properties"]) == set(Study.model_fields)


def test_a_cell_comes_after_what_it_needs(tmp_path: Path) -> None:
    everything = study(
        tmp_path,
        methods=["scans", "none", "llmva", "cast"],
        tuned=True,
        attacks=["rot13"],
        transfer=["xstest"],
        utility=["gsm8k"],
        judges=[{"name": "a"}, {"name": "b"}],
    )
    defined = Study.model_validate(everything)
    seen: set[str] = set()
    for cell in plan(defined):
        assert {f"{cell.panel.folder}/{name}" for name in cell.needs} <= seen, cell.title
        assert cell.title not in seen
        seen.add(cell.title)
    assert len(panels(defined)) == 4
    few = "model-0--few--a"
    assert {f"{few}/scans-tuned-43", f"{few}/llmva-42+attack-rot13", f"{few}/none+utility-gsm8k"} <= seen


def test_a_thousand_cells_are_planned_and_resumed_in_seconds(tmp_path: Path) -> None:
    defined = Study.model_validate(study(tmp_path, models=65, seeds=list(range(4))))
    began = time.monotonic()
    cells = plan(defined)
    assert len(cells) > 1000
    for cell in cells:
        cell.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        cell.path(tmp_path).write_text("{}")
    assert finished(tmp_path, cells) == {cell.title for cell in cells}
    assert time.monotonic() - began < 10


def test_a_plan_estimates_what_it_will_take(taught_folder: Path) -> None:
    defined = Study.model_validate(study(taught_folder))
    rows, notes = estimates(defined, plan(defined), "/nowhere", tflops=1.0)
    total = totals(rows)
    assert notes == []
    assert total["cells"] == len(rows)
    weights = sum(path.stat().st_size for path in taught_folder.glob("*.safetensors"))
    assert total["memory_bytes"] == pytest.approx(1.25 * weights + 1e9)
    untouched = next(row for row in rows if row["kind"] == "untouched")
    assert 10 * 4 < untouched["tokens"] < 10 * 100  # ten test prompts
    assert total["hours"] > 0
    unknown = Study.model_validate(study(taught_folder, models=1) | {"models": [{"name": "m", "path": "org/m"}]})
    rows, notes = estimates(unknown, plan(unknown), "/nowhere")
    assert totals(rows)["memory_bytes"] is None
    assert "size of m is not known" in notes[0]


# -- workers


def words(path: Path, out: Path, *more: object) -> list[str]:
    return [str(word) for word in ("study", path, "--out", out, "--quiet", *more)]


def worker(path: Path, out: Path, *more: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llmva", *words(path, out, *more)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def same_cells(one: Path, other: Path) -> None:
    names = [{path.relative_to(out).as_posix() for path in out.rglob("cells/*.json")} for out in (one, other)]
    assert names[0] == names[1]
    assert len(names[0]) > 10
    for name in names[0]:
        first, second = (without_clock(json.loads((out / name).read_text())) for out in (one, other))
        assert first == second, name


@pytest.fixture(scope="module")
def whole(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study's file, and its folder as one process leaves it."""
    place = tmp_path_factory.mktemp("study")
    path = written(place / "s.json", study(taught_folder, attacks=["rot13"]))
    process = worker(path, place / "out")
    assert process.wait() == 0, process.stderr and process.stderr.read()
    return path, place / "out"


def test_a_study_of_two_models(whole: tuple[Path, Path]) -> None:
    path, out = whole
    cells = plan(read_study(path))
    assert finished(out, cells) == {cell.title for cell in cells}
    record = json.loads((out / "study.json").read_text())
    assert record["missing"] == []
    assert [panel["model"] for panel in record["panels"]] == ["model 0", "model 1"]
    first, second = record["panels"]
    assert [row["f1"] for row in first["rows"]] == [row["f1"] for row in second["rows"]]  # the same model twice
    compared = json.loads((out / first["folder"] / "compare.json").read_text())
    assert [row["f1"] for row in compared["rows"]] == [row["f1"] for row in first["rows"]]
    assert set(first["rows"][0]["attack"]) == {"rot13"}
    ours = next(row for row in record["methods"] if row["method"] == "llmva")
    assert ours["panels"] == 2
    assert record["tests"]["blocks"] == 2
    assert record["tests"]["control"] == "llmva"
    for name in ("study.html", "study.md", "study.csv", "study.tex", f"{first['folder']}/compare.html"):
        assert (out / name).is_file()
    assert list(out.rglob("claims/*")) == []


def test_two_processes_leave_the_same_cells(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, serial = whole
    together = worker(path, tmp_path / "out", "--workers", 2)
    assert together.wait() == 0, together.stderr and together.stderr.read()
    same_cells(serial, tmp_path / "out")


def test_a_file_that_many_write_at_once_is_whole_and_no_write_fails(tmp_path: Path) -> None:
    path, texts = tmp_path / "page.html", [f"{number}" * 200_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [write_text(path, text, shared=True) for _ in range(20)], texts))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_killed_workers_lose_and_repeat_nothing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, serial = whole
    out = tmp_path / "out"
    drawn = random.Random(4)
    steady = worker(path, out, "--worker", 1)
    for _ in range(KILLS):
        killed = worker(path, out)
        claims = out / "model-0--few--phrases" / "claims"
        until = time.monotonic() + 60
        while not list(claims.glob("*.[0-9]*")) and killed.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(drawn.random())
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert steady.wait() == 0, steady.stderr and steady.stderr.read()
    same_cells(serial, out)
    assert list(out.rglob("claims/*")) == []
    assert list(out.rglob("cells/*.part")) == []


def test_a_model_that_cannot_be_loaded_stops_no_other(taught_folder: Path, tmp_path: Path, command: Any) -> None:
    content = study(taught_folder, methods=["none"], seeds=[42])
    content["models"][0]["path"] = str(tmp_path / "none")
    path = written(tmp_path / "s.json", content)
    said = command(*words(path, tmp_path / "out"))
    assert said.code == 1
    assert "2 cells failed, the first of them model-0--few--phrases/none" in said.err
    record = json.loads((tmp_path / "out/study.json").read_text())
    assert [bool(panel["rows"]) for panel in record["panels"]] == [False, True]
    assert len(record["missing"]) == 2


def test_tuned_rows_and_a_resumed_study(
    whole: tuple[Path, Path], taught_folder: Path, tmp_path: Path, command: Any
) -> None:
    """More methods for the same folder: what is measured stays as it is."""
    _, serial = whole
    out = tmp_path / "out"
    shutil.copytree(serial, out)
    before = {cell: cell.read_bytes() for cell in out.rglob("cells/*.json") if cell.stem != "table"}
    for table in out.rglob("cells/table.json"):
        table.unlink()
    more = written(tmp_path / "s.json", study(taught_folder, tuned=True, attacks=["rot13"]))
    assert command(*words(more, out)).code == 0
    assert {cell: cell.read_bytes() for cell in before} == before
    titles = [row["title"] for row in json.loads((out / "study.json").read_text())["panels"][0]["rows"]]
    assert titles == ["none", "vectorsteer (paper)", "vectorsteer (tuned)", "llmva"]


def test_commands_of_a_study(tmp_path: Path, command: Any, taught_folder: Path) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "study.toml"
    assert command("study", "init", "--out", path).code == 0
    assert command("study", "init", "--out", path).code == 2
    assert json.loads(command("study", "schema").out)["title"] == "Study"
    said = command("study", written(tmp_path / "s.json", study(taught_folder)), "--dry-run", "--json", "--quiet")
    assert said.code == 0
    assert json.loads(said.out)["finished"] == 0
    assert "cells, 0 finished" in command("study", tmp_path / "s.json", "--dry-run").out
