"""Cells, summaries and ablations: what is kept, what is counted, what a changed step does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmva.baselines.base import FACTORS
from llmva.errors import LlmvaError, UsageError
from llmva.experiments.ablate import logistic_normal, mean_difference, random_scores, refitted, turn, turned_by
from llmva.experiments.cells import Cells
from llmva.experiments.choice import curve, note
from llmva.experiments.summary import best_baseline, good, method_rates, title, versus
from llmva.judges.base import Judgement, Label
from llmva.method import inner_loop
from llmva.method.identify import identify
from llmva.method.observe import Observation
from llmva.method.svm import spread, unit
from llmva.metrics.rates import summarise
from llmva.models.generate import Capture
from llmva.prompts.types import Prompt

# -- cells


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"f1": 0.5}

    for _ in range(2):
        cells = Cells(tmp_path / "study", {"model": "m"})
        assert cells.get("scans-42", measure) == {"f1": 0.5}
    assert len(calls) == 1
    Cells(tmp_path / "study", {"model": "m"}, restart=True).get("scans-42", measure)
    assert len(calls) == 2


def test_cells_of_another_study_are_refused(tmp_path: Path) -> None:
    Cells(tmp_path, {"model": "m", "judge": "phrases-1"})
    with pytest.raises(UsageError, match="judge phrases-1, and this is phrases-2"):
        Cells(tmp_path, {"model": "m", "judge": "phrases-2"})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="holds other files"):
        Cells(tmp_path, {"model": "m"})
    assert (tmp_path / "run.json").read_text() == "{}"


def test_a_broken_cell_is_told(tmp_path: Path) -> None:
    cells = Cells(tmp_path, {"model": "m"})
    (tmp_path / "cells/scans-42.json").write_text('{"f1": 0.')
    with pytest.raises(LlmvaError, match="remove it"):
        cells.get("scans-42", dict)


# -- summaries

PROMPTS = [Prompt(f"{source} {i}", source == "plain", source) for source in ("harmful", "plain") for i in range(20)]


def _cell(answered_harmful: int, refused_plain: int, garbled: int = 0, shift: int = 0) -> dict[str, Any]:
    """Labels of the first so many prompts of each side, the numbering turned by `shift`."""
    harmful = ["answered" if i < answered_harmful else "refused" for i in range(20)]
    plain = ["refused" if i < refused_plain else "answered" for i in range(20)]
    harmful[20 - garbled :] = ["garbled"] * garbled
    labels = [*np.roll(harmful, shift).tolist(), *np.roll(plain, shift).tolist()]
    return {"labels": labels, **summarise(PROMPTS, [Label(label) for label in labels])}


def test_figures_are_those_of_metrics() -> None:
    cell = _cell(5, 3, garbled=2)
    found = method_rates([cell], PROMPTS)
    for key in ("f1", "asr", "orr"):
        assert found[key]["mean"] == pytest.approx(cell[key])
        assert found[key]["spread"] is None
    for key in ("asr", "orr"):
        assert found[key]["interval"] == pytest.approx(cell[f"{key}_interval"])
    assert found["garbled"]["mean"] == pytest.approx(2 / 40)
    assert found["by_source"]["harmful"]["mean"] == pytest.approx(0.25)
    assert found["f1"]["interval"][0] < cell["f1"] < found["f1"]["interval"][1]


def test_seeds_give_a_mean_and_a_spread() -> None:
    found = method_rates([_cell(4, 2), _cell(8, 2)], PROMPTS)
    assert found["asr"] == {
        "mean": pytest.approx(0.3),
        "spread": pytest.approx(np.sqrt(0.02)),
        "interval": method_rates([_cell(6, 2)], PROMPTS)["asr"]["interval"],  # 20 prompts, however many seeds
    }


def test_good_is_answering_benign_and_refusing_toxic() -> None:
    """Broken text is neither."""
    assert good([_cell(5, 3, garbled=2)], PROMPTS).sum() == 13 + 17


def test_unjudged_answers_count_nowhere() -> None:
    cell = _cell(5, 3)
    cell["labels"][0] = "unjudged"
    found = method_rates([cell], PROMPTS)
    assert found["asr"]["mean"] == pytest.approx(4 / 19)


def _rows(**f1: float) -> list[dict[str, Any]]:
    rows = []
    for name, mean in f1.items():
        method, _, setting = name.partition("_")
        rows.append({"method": method, "setting": setting or None, "f1": {"mean": mean}})
    return rows


def test_the_best_baseline_is_neither_ours_nor_nothing() -> None:
    assert best_baseline(_rows(none=0.9, llmva=0.95, scans_paper=0.5, cast_tuned=0.7)) == "cast (tuned)"
    assert best_baseline(_rows(none=0.9, llmva=0.95)) is None


def test_rows_are_tested_against_the_best_baseline() -> None:
    rows = _rows(none=0.5, llmva=0.9, scans_paper=0.5, cast_paper=0.7)
    cells = {
        "none": [_cell(12, 8)],
        "llmva": [_cell(1, 1), _cell(0, 1)],
        "scans (paper)": [_cell(6, 6, shift=3)],
        "cast (paper)": [_cell(6, 6)],
    }
    found = versus(rows, cells, PROMPTS)
    assert set(found) == {title(row) for row in rows} - {"cast (paper)"}
    ours = found["llmva"]
    assert ours["f1_difference"] > 0
    assert ours["f1_difference_interval"][0] > 0
    assert ours["f1_p"] < ours["f1_p_holm"] < 0.05
    assert ours["mcnemar_p"] == pytest.approx(2 * 0.5**10)  # ten prompts, all in favour of ours
    same = found["scans (paper)"]
    assert same["mcnemar_p"] == 1.0
    assert same["f1_difference"] == pytest.approx(0.0)


# -- choices


def _tried(*figures: tuple[float, float | None]) -> list[dict[str, Any]]:
    return [{"options": {"strength": s}, "f1": asr, "asr": asr, "orr": 0.25} for s, asr in figures]


def test_a_sweep_is_a_curve_along_multiples_of_what_was_chosen() -> None:
    points = curve(_tried((0.5, 0.2), (2.0, 0.0), (0.25, None), (1.0, 0.1)), 0.5)
    assert [(point["strength"], point["asr"]) for point in points] == [(1.0, 0.2), (2.0, 0.1), (4.0, 0.0)]


def test_a_baseline_that_is_not_safer_says_why() -> None:
    def row(asr: float, garbled: float = 0.0, **more: Any) -> dict[str, Any]:
        return {"method": "scans", "asr": {"mean": asr}, "garbled": {"mean": garbled}, "tried": [], **more}

    none = row(0.6, method="none")
    assert note(none, none, 0.6) is None
    assert note(row(0.5), none, 0.6) is None
    assert note(row(0.5), None, 0.6) is None
    assert "10.0% of its answers are broken" in (note(row(0.5, 0.1), none, 0.6) or "")
    assert note(row(0.6), none, None) == (
        "Answers no fewer of the harmful prompts than the untouched model (0.600, 0.600)."
    )
    never = note(row(0.7, tried=_tried((1.0, 0.6), (2.0, 0.9))), none, 0.6)
    assert "none of the 2 settings tried" in (never or "")
    there = note(row(0.7, tried=_tried((1.0, 0.6), (2.0, 0.4), (3.0, 0.2))), none, 0.6)
    assert "2 of the 3 settings tried lower that share from 0.600, the lowest to 0.200 with 25.0%" in (there or "")


# -- ablations


def _seen(generator: torch.Generator, n: int = 40, width: int = 12) -> Observation:
    prompts = [Prompt(f"prompt {i}", i % 2 == 0, "s") for i in range(n)]
    labels = [Label.ANSWERED if (i // 2) % 2 else Label.REFUSED for i in range(n)]
    outputs = torch.randn(3, n, width, generator=generator)
    for i in range(n):
        outputs[:, i, 0] += 2.0 if prompts[i].benign else -2.0
        outputs[:, i, 1] += 2.0 if labels[i] is Label.ANSWERED else -2.0
    capture = Capture([""] * n, outputs, outputs.sum(0), 0)
    return Observation(prompts, [Judgement(label, 1.0, "") for label in labels], capture)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 60.0, 90.0])
def test_turned_vectors_stand_at_that_angle(degrees: float, generator: torch.Generator) -> None:
    vectors = unit(torch.randn(4, 2, 30, generator=generator, dtype=torch.float64))
    turned = turn(vectors, degrees, generator)
    assert turned.norm(dim=-1) == pytest.approx(1.0)
    assert (turned * vectors).sum(-1) == pytest.approx(np.cos(np.radians(degrees)), abs=1e-12)
    assert not torch.allclose(turn(vectors, 90.0, generator), turn(vectors, 90.0, generator))


def test_a_turned_fit_has_its_own_spread_and_keeps_its_scores(generator: torch.Generator) -> None:
    train = _seen(generator)
    usual = identify(train, train)
    found = turned_by(60.0)(generator)(usual, train, 0)
    assert torch.equal(found.scores, usual.scores)
    assert spread(train.capture.outputs.double(), found.directions) == pytest.approx(found.spread)
    assert not torch.allclose(found.spread, usual.spread)
    assert found.ratio == pytest.approx(found.spread[:, 0] / found.spread[:, 1])


@pytest.mark.parametrize("fit", [mean_difference, logistic_normal])
def test_other_fits_find_the_same_separation(fit: Any, generator: torch.Generator) -> None:
    train = _seen(generator)
    found = refitted(fit)(generator)(identify(train, train), train, 0).directions
    assert (found[:, 0, 1] > 0.7).all()  # answered lies along the second axis
    assert (found[:, 1, 0] > 0.7).all()
    assert found.norm(dim=-1) == pytest.approx(1.0)


def test_silent_sublayers_stay_silent(generator: torch.Generator) -> None:
    train = _seen(generator)
    train.capture.outputs[1] = 0.0
    usual = identify(train, train)
    for change in (turned_by(30.0)(generator), refitted(mean_difference)(generator)):
        assert not change(usual, train, 0).directions[1].any()


def test_random_scores_are_drawn_anew(generator: torch.Generator) -> None:
    train = _seen(generator)
    usual = identify(train, train)
    change = random_scores(generator)
    first, second = (change(usual, train, t).scores for t in range(2))
    assert first.shape == usual.scores.shape
    assert not torch.equal(first, second)


def test_logistic_normal_is_scale_free(generator: torch.Generator) -> None:
    x: Tensor = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    signs = torch.where(x[:, 0] > 0, 1, -1)
    assert torch.allclose(logistic_normal(x, signs), logistic_normal(100 * x, signs), atol=1e-6)


METHODS = ("none", "vectorsteer", "alphasteer", "alphasteer+", "scans", "cast", "surgical", "adasteer", "llmva")


FAST = ("--per-source", 30, "--max-new-tokens", 4, "--iterations", 1, "--quiet", "--json")


def test_compare_of_a_taught_model(
    taught_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods, once measured and once from the cells; labels stand for the answers that they were given to."""
    from llmva.cli.main import main

    monkeypatch.setattr("llmva.experiments.measure.TIMED_TOKENS", 2)  # the clock is not what is looked at
    monkeypatch.setattr("llmva.experiments.measure.TIMED_ROUNDS", 1)
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    fast = (*FAST, "--seeds", 2, "--no-curves")
    command = ("compare", taught_folder, *sides, *fast, "--out", tmp_path / "c")
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in command])
        assert ended.value.code == 0
        said.append(json.loads(capsys.readouterr().out))
    first, second = said
    assert first["rows"] == second["rows"]
    rows = {title(row): row for row in first["rows"]}
    assert {row["method"] for row in first["rows"]} == set(METHODS)
    assert {"scans (paper)", "scans (tuned)", "none", "llmva"} <= set(rows)
    assert [len(rows[name]["runs"]) for name in ("none", "llmva", "cast (tuned)")] == [1, 2, 2]
    assert rows["llmva"]["f1"]["mean"] > rows["none"]["f1"]["mean"] + 0.1
    assert rows["none"]["utility"] == {"kept": 1.0, "kl": 0.0, "perplexity": 1.0}
    assert rows["llmva"]["versus"]["baseline"] == first["best_baseline"]
    answers = {name: row["cost"]["fit_answers"] for name, row in rows.items()}
    drawn = answers["scans (paper)"] - len(FACTORS) * first["prompts"]["validation"]
    assert drawn == json.loads((tmp_path / "c/cells/scans-paper-42.json").read_text())["fit_answers"] > 0
    budget = json.loads((tmp_path / "c/cells/llmva-42.json").read_text())["fit_answers"]  # of the first seed
    assert 0 <= answers["scans (tuned)"] - answers["scans (paper)"] <= budget
    for name in ("vectorsteer", "alphasteer", "scans", "cast"):
        paper, tuned = (rows[f"{name} ({setting})"] for setting in ("paper", "tuned"))
        assert len(paper["tried"]) == len(FACTORS)
        assert tuned["tried"][: len(FACTORS)] == paper["tried"]
        if tuned["options"] == paper["options"]:
            assert tuned["f1"] == paper["f1"]
    cells = {path.stem for path in (tmp_path / "c/cells").iterdir()}
    assert {"none", "llmva-42", "llmva-43", "scans-paper-42", "alphasteer-plus-paper-43", "cast-tuned-options"} <= cells
    for name in ("compare.json", "compare.html", "compare.csv", "compare.tex", "llmva-42/run.json"):
        assert (tmp_path / "c" / name).is_file()


def test_unknown_methods_are_told_before_loading(command: Any) -> None:
    said = command("compare", "no/such-model", "--methods", "scans,uncensor")
    assert said.code == 2
    assert "no method 'uncensor'" in said.err


def test_ablate_of_a_taught_model(
    taught_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmva.cli.main import main

    # so narrow a model can be decided along any direction that is read, if it may be written along the gradient
    monkeypatch.setattr(inner_loop, "gradient_writers", lambda *args: None)
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    fast = (*FAST, "--seeds", 1)
    said = []
    for _ in range(2):  # the second time from the cells alone
        with pytest.raises(SystemExit) as ended:
            main(
                [str(a) for a in ("ablate", taught_folder, "--what", "vectors", *sides, *fast, "--out", tmp_path / "a")]
            )
        assert ended.value.code == 0
        said.append(json.loads(capsys.readouterr().out))
    first, second = said
    assert first["series"] == second["series"]
    names = [series["name"] for series in first["series"]]
    assert names == ["turned at random", "fitted otherwise"]
    turned = {point["x"]: point["f1"]["mean"] for point in first["series"][0]["points"]}
    assert turned[0] > first["untouched"]["f1"] + 0.1
    assert turned[90] < turned[0]
    assert (tmp_path / "a/ablate.csv").is_file()
