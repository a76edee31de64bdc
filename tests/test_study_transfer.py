"""Transfer in a study: the layout of the paper's Table 4, published rows beside ours, F1 over all sets."""

from __future__ import annotations

from typing import Any

import pytest

from llmva.experiments.study.paper import paper_models
from llmva.experiments.study.results import _f1_of_all
from llmva.report.study.many import grids, study_csv, study_latex, study_markdown
from llmva.report.study.transfer import attack_grid, transfer_grid

SIZES = {"advbench": (520, 0), "or-bench-toxic": (655, 0), "xstest": (174, 181), "or-bench-hard": (0, 1319)}


def rates(asr: float | None, orr: float | None, sizes: tuple[int, int]) -> dict[str, Any]:
    garbled = None if asr is None else 0.0
    return {"f1": None, "asr": asr, "orr": orr, "garbled": garbled, "n_toxic": sizes[0], "n_benign": sizes[1]}


def test_published_f1_is_that_of_the_published_rates() -> None:
    """So the figures were copied without a slip, and ours is the paper's F1."""
    apart = []
    for model in paper_models():
        for method, figures in model["published"].items():
            sets = [rates(one.get("asr"), one.get("orr"), SIZES[name]) for name, one in figures["transfer"].items()]
            assert set(figures["transfer"]) == set(SIZES)
            computed = _f1_of_all(sets)
            if computed != pytest.approx(figures["transfer_f1"], abs=1e-3):
                apart.append((model["name"], method, computed, figures["transfer_f1"]))
    assert apart == []


def test_f1_of_all_needs_both_sides_and_counts_broken_text() -> None:
    assert _f1_of_all([rates(0.5, None, (10, 0))]) is None
    assert _f1_of_all([]) is None
    sets = [rates(0.0, None, (10, 0)), rates(None, 0.0, (0, 30))]
    assert _f1_of_all(sets) == 1.0
    sets[0]["garbled"] = 0.5
    assert _f1_of_all(sets) == pytest.approx(60 / 65)


def record(**more: Any) -> dict[str, Any]:
    def row(title: str, asr: float, orr: float, f1: float | None, **others: Any) -> dict[str, Any]:
        sets = {"xs|test": rates(asr, orr, (4, 4)), "advbench": rates(asr, None, (4, 0))}
        return {"title": title, "method": title, "f1": {"mean": f1}, "transfer": sets, "transfer_f1": f1, **others}

    told = {"transfer": {"advbench": {"asr": 0.125}, "xs|test": {"asr": 0.25, "orr": 0.375}}, "transfer_f1": 0.7}
    rows = [
        row("untouched", 0.75, 0.5, 0.5, published={"f1": 0.4}),
        row("llmva", 0.25, 0.125, 0.9, published=told, attack={"rot13": rates(0.5, 0.25, (4, 4))}),
        {"title": "scans", "method": "scans", "f1": {"mean": 0.1}, "published": told},
    ]
    return {"panels": [{"model": "m", "rows": rows, "sources": {}}], "methods": [], **more}


def test_harmful_sets_come_first_and_published_rows_stand_below_ours() -> None:
    grid = transfer_grid(record())
    assert grid is not None
    assert grid.heads == ("Model", "Method", "xs|test ASR", "advbench ASR", "xs|test ORR", "F1")
    assert grid.rows == (
        ("m", "untouched", "75.0%", "75.0%", "50.0%", "0.500"),
        ("m", "llmva", "25.0%", "25.0%", "12.5%", "0.900"),
        ("m", "llmva (published)", "25.0%", "12.5%", "37.5%", "0.700"),
    )
    assert grid.best == {(1, 5)}  # of what was measured
    assert "Published rows are of others" in grid.about
    plain = record()
    del plain["panels"][0]["rows"][1]["published"]
    grid = transfer_grid(plain)
    assert grid is not None
    assert "Published" not in grid.about
    assert transfer_grid({"panels": [{"rows": [{"title": "x"}]}]}) is None


def test_every_form_has_it() -> None:
    assert [grid.key for grid in grids(record())] == ["models", "attack", "transfer"]
    assert r"| m | llmva (published) | 25.0% | 12.5% | 37.5% | 0.700 |" in study_markdown(record())
    assert "llmva (published)" in study_latex(record())
    head, _, ours, _ = study_csv(record()).splitlines()
    line = dict(zip(head.split(","), ours.split(","), strict=True))
    assert (line["transfer_xs|test_asr"], line["transfer_xs|test_asr_published"]) == ("0.25", "0.25")
    assert (line["transfer_f1"], line["transfer_f1_published"]) == ("0.9", "0.7")


def test_attacks_are_read_attack_by_attack() -> None:
    grid = attack_grid(record())
    assert grid is not None
    assert grid.heads == ("Model", "Method", "rot13 ASR", "rot13 ORR")
    assert grid.rows == (("m", "llmva", "50.0%", "25.0%"),)
