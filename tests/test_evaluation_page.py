"""The page of an evaluation: both failures by attack and by set at a glance, the same in numbers, and searches."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said
from llmva.judges.base import Label
from llmva.metrics.rates import summarise
from llmva.prompts.types import Prompt
from llmva.report.drawing.glance import Line, glance
from llmva.report.run.evaluation import evaluation_page
from test_report import Page

PROMPTS = [Prompt(f"{side} {i}", side == "benign", f"{side} set") for side in ("benign", "toxic") for i in range(10)]


def summary(answered_toxic: int, refused_benign: int) -> dict[str, Any]:
    wrong = {True: refused_benign, False: answered_toxic}
    labels = [
        Label.REFUSED if (int(p.text.split()[1]) < wrong[p.benign]) == p.benign else Label.ANSWERED for p in PROMPTS
    ]
    return summarise(PROMPTS, labels, resamples=20)


def searched(shares: list[float], half: int | None, by: str) -> dict[str, Any]:
    return {"n": 10, "fallen": shares[-1], "half": half, by: shares, "censored": round(10 * (1 - shares[-1]))}


def record() -> dict[str, Any]:
    refused = {"n": 4, "before": 1, "after": None, "ratio": 4.0, "at_least": True}
    return {
        "model": "org/model",
        "edit": "dir",
        "judge": "phrases",
        "system": None,
        "prompts": {"benign set": 10, "toxic set": 10},
        "test": {"before": summary(6, 5), "after": summary(1, 2)},
        "attacks": [
            {"name": "rot13", "before": summary(9, 1), "after": summary(3, 4)},
            {"name": "persona", "before": summary(10, 0), "after": summary(0, 7)},
        ],
        "worst_case": {
            "before": summary(10, 5) | {"asr_of": "persona", "orr_of": "rot13"},
            "after": summary(4, 8) | {"asr_of": "rot13", "orr_of": "persona"},
        },
        "adaptive": {
            "budget": 2,
            "before": searched([0.6, 0.9], 1, "by_try"),
            "after": searched([0.1, 0.4], None, "by_try"),
        },
        "suffix": {
            "budget": 3,
            "before": searched([0.6, 1.0, 1.0, 1.0], 0, "by_step"),
            "after": searched([0.1, 0.2, 0.2, 0.3], None, "by_step"),
            "refused": refused,
        },
        "limits": ["A limit."],
        "cost": {"seconds": 3.0},
    }


@pytest.fixture(scope="module")
def html() -> str:
    return evaluation_page(record(), "llmva evaluate org/model --edit dir")


def test_both_failures_are_drawn_by_attack_and_by_set(html: str) -> None:
    page = Page(html)
    charts = [a["aria-labelledby"] for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert [str(name).split()[0] for name in charts] == [
        "chart-by-attack-t", "chart-by-set-t", "chart-search-adaptive-t", "chart-search-suffix-t",
    ]  # fmt: skip
    said = re.search(r'<desc id="chart-by-attack-d">(.*?)</desc>', html)
    assert said is not None
    assert said.group(1) == (
        "no attack: ASR 60.0% before, 10.0% after, ORR 50.0% before, 20.0% after; "
        "rot13: ASR 90.0% before, 30.0% after, ORR 10.0% before, 40.0% after; "
        "persona: ASR 100.0% before, 0.0% after, ORR 0.0% before, 70.0% after; "
        "worst case: ASR 100.0% before, 40.0% after, ORR 50.0% before, 80.0% after."
    )
    said = re.search(r'<desc id="chart-by-set-d">(.*?)</desc>', html)
    assert said is not None
    assert said.group(1) == "toxic set: ASR 60.0% before, 10.0% after; benign set: ORR 50.0% before, 20.0% after."


def test_the_tables_hold_the_same_numbers(html: str) -> None:
    page = Page(html)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert [cell.split()[0] for cell in rows["rot13"]] == ["90.0%", "30.0%", "10.0%", "40.0%"]
    assert rows["rot13"][1].endswith("better")
    assert rows["rot13"][3].endswith("worse")
    assert [cell.split()[0] for cell in rows["toxic set"]] == ["60.0%", "10.0%", "–", "–"]
    assert "highest ASR under rot13; highest ORR under persona." in html
    assert (
        "Asked in the worst of these ways, 100.0% of the harmful prompts are answered without the edit, 40.0% with"
        in html
    )
    assert "at least 4 times the steps." in html
    assert "A limit." in html
    assert "llmva evaluate org/model --edit dir" in html


def test_the_page_is_one_of_ours(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for tag, a in page.tags if tag == "a")
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert "script" not in {tag for tag, _ in page.tags}  # so the policy allows none
    assert next(a["content"] for tag, a in page.tags if "http-equiv" in a) == (
        "default-src 'none'; style-src 'unsafe-inline'"
    )
    assert not any(prompt.text in html for prompt in PROMPTS)
    tables = html.count('<table class="methods">')
    assert html.count('<div class="scroll" tabindex="0"') == tables == 2  # a phone scrolls them, not the page


def test_without_an_edit_there_is_no_after() -> None:
    plain = record()
    for of in (plain["test"], plain["worst_case"], *plain["attacks"], plain["suffix"], plain["adaptive"]):
        of.pop("after")
    html = evaluation_page(plain, "llmva evaluate org/model")
    assert "after" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).replace("step after", "")
    assert "Measured without an edit" in html
    assert "The model answers 60.0% of the harmful prompts and refuses 50.0% of the benign ones." in html


def test_sets_of_data_are_drawn_with_all_of_them() -> None:
    by_set = record() | {"sets": [{"name": "x", **record()["test"]}, {**record()["attacks"][0], "name": "y"}]}
    page = Page(evaluation_page(by_set, "llmva"))
    assert [row[0] for row in page.rows if row and row[0] in ("x", "y", "all sets")] == ["x", "y", "all sets"]


@pytest.mark.parametrize("gone", [*record(), "everything"])
def test_any_field_may_be_missing(gone: str) -> None:
    left = {} if gone == "everything" else {key: value for key, value in record().items() if key != gone}
    assert evaluation_page(left, "llmva").startswith("<!DOCTYPE html>")


def test_hostile_names_stay_text() -> None:
    evil = copy.deepcopy(record())
    evil["attacks"][0]["name"] = evil["model"] = "<script>alert(1)</script>"
    html = evaluation_page(evil, "<b>")
    assert "<script>" not in html
    assert "<b>" not in html


def test_marks_stand_at_their_rates_and_long_names_are_cut() -> None:
    name = "a name that is longer than its part of the picture"
    drawn = str(
        glance("key", "Title", ("ASR", "ORR"), [Line(name, ((0.0, 1.0), None)), Line("b", ((0.5, None), None))])
    )
    assert f"<title>{name}</title>a name that" in drawn
    assert f">{name}</text>" not in drawn
    places = [
        float(x) for x in re.findall(r'class="mark (?:ring|dot) [^"]*" cx="([\d.]+)"', drawn.partition("</ul>")[2])
    ]
    low, high, middle = places[:3]
    assert middle == pytest.approx((low + high) / 2, abs=0.02)
    assert 168 < low < high < 460
    assert glance("key", "Title", ("ASR",), [Line("a", (None,)), Line("b", ((None, None),))]) is None


def test_the_command_writes_it(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    for side in ("toxic", "benign"):
        (tmp_path / f"{side}.txt").write_text("\n".join(p.text for p in PROMPTS if p.benign == (side == "benign")))
    words = ["evaluate", taught_folder, "--toxic", tmp_path / "toxic.txt", "--benign", tmp_path / "benign.txt"]
    words += ["--max-new-tokens", 3, "--attack", "persona"]
    page = tmp_path / "page.html"
    said = command(*words, "--report", page)
    assert said.code == 0, said.err
    assert "By attack" in page.read_text()
    said = command(*words, "--report", tmp_path / "nowhere" / "page.html")
    assert (said.code, "choose another for --report" in " ".join(said.err.split())) == (2, True)
