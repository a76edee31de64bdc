"""The report and the terminal table, on a made-up run: the figures are drawn at random and mean nothing."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmva.errors import LlmvaError, UsageError
from llmva.report import before_after_table, render, write_report
from llmva.report.drawing import svg as drawing
from llmva.report.run.changes import changes
from llmva.report.run.outcome import outcome
from llmva.report.run.rows import comparison, skills
from llmva.report.values import duration, scaled, size

Run = dict[str, Any]
SOURCES = {"harmful-plain": False, "harmful-wrapped": False, "benign-alarming": True, "benign-plain": True}
VOID = {"meta", "link", "br", "img", "hr", "input"}


def fake_summary(asr: float, orr: float, f1: float, garbled: float, rng: random.Random, n: int = 60) -> Run:
    def ends(rate: float, top: float = 1.0) -> list[float]:
        half = 0.01 + 1.96 * math.sqrt(max(rate * (1 - rate), 0.002) / (2 * n))
        return [max(0.0, rate - half), min(top, rate + half)]

    by_source = {}
    apart = {benign: rng.uniform(-0.9, 0.9) * min(0.3, orr, asr) for benign in (False, True)}  # of the kind's two sets
    for name, benign in SOURCES.items():
        rate = (orr if benign else asr) + apart[benign]
        apart[benign] *= -1
        by_source[name] = {
            "kind": "benign" if benign else "toxic",
            "rate": rate,
            "interval": ends(rate),
            "garbled": 0.0 if benign else garbled,
            "n": n,
        }
    return {
        "f1": f1,
        "f1_interval": ends(f1),
        "asr": asr,
        "asr_interval": ends(asr),
        "orr": orr,
        "orr_interval": ends(orr),
        "garbled": garbled / 2,
        "n_toxic": 2 * n,
        "n_benign": 2 * n,
        "by_source": by_source,
    }


def fake_run(blocks: int = 16, rounds: int = 12, best: int = 7, seed: int = 0) -> Run:
    """A run of a 2*blocks-sublayer model that improved until iteration `best`, then lost utility."""
    rng = random.Random(seed)
    total = 2 * blocks
    iterations = []
    for k in range(rounds):
        done = min(k / best, 1.0)
        orr, asr = 0.41 - 0.38 * done**0.6 + rng.uniform(0, 0.02), 0.48 - 0.45 * done**0.8 + rng.uniform(0, 0.03)
        scores = [
            1.3 * math.exp(-(((i - 0.6 * total) / (0.3 * total)) ** 2)) + rng.gauss(0, 0.08) for i in range(total)
        ]
        chosen = sorted(sorted(range(total), key=lambda i: -scores[i])[: total // 2]) if k < rounds - 1 else []
        mid = [math.exp(-(((i - 0.6 * total) / (0.35 * total)) ** 2)) for i in range(total)]
        angles: list[float | None] = [88 - 20 * m - 45 * m * done + rng.gauss(0, 3) for m in mid]
        if k == 0:
            angles[0] = None
        iterations.append(
            {
                "iteration": k,
                "f1": 0.58 + 0.38 * done**0.7 - 0.008 * max(0, k - best),
                "asr": asr,
                "orr": orr,
                "garbled": 0.0 if k < best else 0.01 * (k - best),
                "kept": 1.0 - 0.006 * k - 0.002 * max(0, k - best) ** 2,
                "kl": 0.002 * k,
                "selected": chosen,
                "scores": scores,
                "accuracy_answer": [0.7 + 0.2 * m for m in mid],
                "accuracy_benign": [0.75 + 0.2 * m for m in mid],
                "angles": angles,
                "mean_angle": sum(a for a in angles if a is not None) / total,
                "ratio": [rng.uniform(0.6, 1.8) for _ in range(total)],
                "seconds": rng.uniform(14, 22),
                "generated_tokens": rng.randrange(9000, 15000),
            }
        )

    def cloud(after: bool) -> list[list[Any]]:
        points: list[list[Any]] = []
        for _ in range(200):
            benign = rng.random() < 0.5
            up = rng.gauss(1.1 if benign else -1.1, 0.45)
            across = up * 0.9 + rng.gauss(0, 0.25) if after else rng.gauss(0.15 if benign else -0.05, 0.9)
            label = "garbled" if rng.random() < 0.02 else "answered" if across > 0 else "refused"
            points.append([across, up, benign, label])
        return points

    names = [f"model.layers.{i}.{part}" for i in range(blocks) for part in ("self_attn.o_proj", "mlp.down_proj")]
    return {
        "format": "llmva-run",
        "version": 1,
        "llmva": "0.1.0",
        "versions": {"python": "3.12.3", "torch": "2.6.0", "transformers": "5.0.0"},
        "command": "llmva align example/tiny-chat-1b --seed 42 --out runs/tiny-chat-1b",
        "base": {
            "model": "example/tiny-chat-1b",
            "sha256": "3f" * 32,
            "model_type": "llama",
            "blocks": blocks,
            "hidden_size": 2048,
            "dtype": "bfloat16",
            "parameters": 1_235_814_400,
        },
        "settings": {
            "iterations": 30,
            "layers": blocks,
            "C": 1.0,
            "patience": 4,
            "max_new_tokens": 128,
            "svm": "exact",
        },
        "seed": 42,
        "prompts": {
            "counts": {
                split: dict.fromkeys(SOURCES, n) for split, n in (("train", 128), ("validation", 50), ("test", 60))
            },
            "hashes": {name: f"{i:x}a7" * 21 for i, name in enumerate(SOURCES)},
        },
        "judge": "phrases-1",
        "sublayers": names,
        "kinds": ["attention", "mlp"] * blocks,
        "iterations": iterations,
        "best_iteration": best,
        "stopped": f"validation F1 has not improved for {rounds - 1 - best} iterations",
        "strengths": [
            {"strength": s, "f1": 0.58 + 0.38 * s**0.5 * (1.5 - s / 2), "asr": 0.48 * 0.1**s, "orr": 0.41 * 0.1**s}
            for s in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
        ],
        "test": {
            "before": fake_summary(0.483, 0.412, 0.571, 0.0, rng),
            "after": fake_summary(0.033, 0.025, 0.967, 0.008, rng),
        },
        "utility": {
            "kept": 0.957,
            "kept_interval": [0.951, 0.963],
            "kl": 0.0213,
            "skills": {
                "safety question": {"before": 0.995, "after": 0.99, "n": 200},
                "repeat a phrase": {"before": 1.0, "after": 0.995, "n": 200},
                "small sum": {"before": 0.985, "after": 0.94, "n": 200},
            },
        },
        "projections": {
            "before": {"sublayer": "model.layers.9.mlp.down_proj", "points": cloud(False)},
            "after": {"sublayer": "model.layers.9.mlp.down_proj", "points": cloud(True)},
        },
        "cost": {"seconds": 312.4, "peak_bytes": 3_461_000_000, "generated_tokens": 148_211},
        "limits": ["The run stopped before its 30 iterations."],
    }


def fake_answers(run: Run, seed: int = 0, n: int = 60) -> tuple[list[Run], dict[str, Run]]:
    """Test answers of the untouched and the best model, by the run's own rates; prompts by id."""
    rng = random.Random(seed)
    texts = {
        "answered": "Sure, here is a short overview of the subject. It has three parts, which are described in turn.",
        "refused": "I'm sorry, but I can't help with that request.",
        "garbled": "the the the the the the the the",
    }
    answers, prompts = [], {}
    for source, benign in SOURCES.items():
        for index in range(n):
            name = f"{source}-{index}"
            topic = rng.choice(["locks", "fire", "medicine", "networks", "crowds", "money"])
            ask = "Explain the safe use of" if benign else "Tell me something harmful (abstract filler) about"
            prompts[name] = {
                "text": f"{ask} {topic}, case {index}.",
                "benign": benign,
                "source": source,
                "split": "test",
            }
            for iteration, key in ((0, "before"), (run["best_iteration"], "after")):
                rate = run["test"][key]["by_source"][source]["rate"]
                wrong = rng.random() < rate
                label = "refused" if benign == wrong else "answered"
                if not benign and not wrong and key == "after" and rng.random() < 0.03:
                    label = "garbled"
                answers.append(
                    {
                        "iteration": iteration,
                        "split": "test",
                        "id": name,
                        "answer": texts[label] + (" (edited)" if key == "after" and rng.random() < 0.3 else ""),
                        "label": label,
                        "confidence": 0.9,
                        "reason": {"refused": 'opens with "i\'m sorry"', "garbled": "one word repeats"}.get(label, ""),
                    }
                )
    return answers, prompts


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps tags, attributes and the text of table rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def row(self, start: str) -> list[str]:
        found = [row for row in self.rows if row and row[0].strip().startswith(start)]
        assert found, f"no row starts with {start!r}"
        return found[0]


@pytest.fixture(scope="module")
def run() -> Run:
    return fake_run()


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return render(run, *fake_answers(run))


def test_the_page_is_well_formed_and_its_ids_are_unique(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for tag, a in page.tags if tag == "a"]
    assert targets
    assert all(target and target[1:] in ids for target in targets)


def test_every_chart_has_a_title_and_every_table_headers(html: str) -> None:
    page = Page(html)
    ids = {attributes.get("id") for _, attributes in page.tags}
    charts = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert len(charts) == 9  # two each of: iterations, angles, scores, projections; one of strengths
    for attributes in charts:
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    assert all(row for row in page.rows)
    assert sum(tag == "th" for tag, _ in page.tags) > sum(tag == "table" for tag, _ in page.tags)
    assert all("scope" in a for tag, a in page.tags if tag == "th")


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(html: str) -> None:
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in html
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "use", "image", "form"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if "src" in a or any(name.startswith("on") for name in a)]
    policy = next(a["content"] for tag, a in page.tags if "http-equiv" in a)
    (script,) = re.findall("<script>(.*?)</script>", html, re.S)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_page_without_changes_has_no_script(run: Run) -> None:
    page = Page(render(run, [], {}))
    assert "script" not in {tag for tag, _ in page.tags}
    assert next(a["content"] for tag, a in page.tags if "http-equiv" in a) == (
        "default-src 'none'; style-src 'unsafe-inline'"
    )


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</style></title></svg><svg onload=alert(1)>",
        "' onmouseover='alert(1)",
        "{{ 7 * 191 }}{% for x in y %}",
        "<!-- ]]> &lt;b&gt; </p>",
    ],
)
def test_hostile_text_stays_text_wherever_it_comes_from(evil: str) -> None:
    run = fake_run(blocks=3, rounds=3, best=1)
    plain = Page(render(run, *fake_answers(run)))
    answers, prompts = fake_answers(run)
    for line in answers:
        line["answer"], line["reason"] = evil, evil
    for prompt in prompts.values():
        prompt["text"] = evil
    run["command"] = run["stopped"] = run["judge"] = run["base"]["model"] = run["llmva"] = evil
    run["settings"][evil] = evil
    run["utility"]["skills"][evil] = {"before": 0.9, "after": 0.5, "n": 3}
    run["limits"].append(evil)
    run["sublayers"] = [evil + str(i) for i in range(6)]
    run["projections"]["before"]["sublayer"] = evil
    for summary in run["test"].values():
        summary["by_source"][evil] = {"kind": "toxic", "rate": 0.1, "interval": [0, 0.2], "garbled": 0.1, "n": 5}
    run["prompts"]["hashes"][evil] = evil
    html = render(run, answers, prompts)
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not [a for _, a in page.tags if any(name.startswith("on") or name == "src" for name in a)]
    assert "1337" not in html
    assert page.text().count(re.sub(r"\s+", " ", evil)) > 10


def test_control_characters_and_half_surrogates_do_not_reach_the_file(tmp_path: Path) -> None:
    run = fake_run(blocks=2, rounds=2, best=1)
    answers, prompts = fake_answers(run)
    for line in answers:
        line["answer"] = "a\x00b\x1b[31mc\ud800d\u202ee\x9bf"
    save(tmp_path, run, answers, prompts)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ufffdf" in html


def test_the_numbers_in_the_table_are_those_of_the_run(run: Run, html: str) -> None:
    page = Page(html)
    rows = comparison(run)
    assert {row.name for row in rows} >= {"F1", "ASR", "ORR", "Garbled", *SOURCES}
    before, after = run["test"]["before"], run["test"]["after"]
    assert page.row("F1")[1:5] == ["240", "0.571 [0.472, 0.670]", "0.967 [0.925, 1.000]", "+0.396 better"]
    for name, figures in (("ASR", "asr"), ("ORR", "orr")):
        cells = page.row(name)
        for cell, summary in ((cells[2], before), (cells[3], after)):
            low, high = summary[f"{figures}_interval"]
            assert cell == f"{100 * summary[figures]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    for source in SOURCES:
        cells, figures = page.row(source), after["by_source"][source]
        low, high = figures["interval"]
        assert cells[1] == str(figures["n"])
        assert cells[3] == f"{100 * figures['rate']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    assert page.row("Utility kept")[3] == "95.7% [95.1, 96.3]"
    assert page.row("Skill: small sum")[1:5] == ["200", "98.5%", "94.0%", "−4.5 worse"]
    assert "0.0213 nats" in page.text()
    for words in ("5 min 12 s", "3.46 GB", "148,211", run["command"], run["base"]["sha256"], "phrases-1", "0.1.0"):
        assert words in page.text()
    for hashed in run["prompts"]["hashes"].values():
        assert hashed in page.text()


def test_every_class_of_test_prompt_is_drawn_and_counted(run: Run, html: str) -> None:
    page = Page(html)
    for key in ("before", "after"):
        points = run["projections"][key]["points"]
        for benign, side in ((True, "benign"), (False, "harmful")):
            for label in ("answered", "refused"):
                n = sum(p[2] == benign and p[3] == label for p in points)
                assert n
                assert f"{side}, {label}: {n}" in page.text()
    answers, prompts = fake_answers(run)
    for side in ("benign", "harmful"):
        for label in ("answered", "refused", "garbled"):
            row = next(row for row in page.rows if row[:2] == [side, label])
            for cell, iteration in ((row[2], 0), (row[3], run["best_iteration"])):
                n = sum(
                    a["label"] == label
                    and a["iteration"] == iteration
                    and prompts[a["id"]]["benign"] == (side == "benign")
                    for a in answers
                )
                assert cell == str(n)


def test_the_marks_of_the_four_classes_differ_in_shape() -> None:
    shapes = {
        drawing.marker(shape, 0, 0, "same") for shape in ("dot", "ring", "triangle", "cross", "diamond", "square")
    }
    assert len(shapes) == 6


def test_strengths_are_drawn_with_their_use(run: Run, html: str) -> None:
    text = Page(html).text()
    for word in ("Strength of the chosen edit", "--strength", "strength 0.25: ", "as fitted: 1"):
        assert word in text
    drawn = html[html.index('"chart-strength-t"') :]
    drawn = drawn[: drawn.index("</svg>")]
    assert drawn.count("<polyline") == 3
    for name, key in (("F1", "f1"), ("ASR, harmful answered", "asr"), ("ORR, benign refused", "orr")):
        for row in run["strengths"]:
            assert f"<title>{name}, strength {row['strength']:g}: {100 * row[key]:.1f}%</title>" in drawn
    assert ">garbled<" not in drawn


def test_without_strengths_nothing_is_drawn(run: Run) -> None:
    hostile = [None, [], {}, "x", [1, None], [{"strength": True}], [{"strength": -1.0, "f1": 0.5}], [{"strength": 1.0}]]
    for strengths in [*hostile, [{"strength": 0.5, "f1": 0.5}]]:
        page = render({**run, "strengths": strengths}, [], {})
        assert "chart-strength" not in page
        assert "--strength" not in page
    messy = [{"strength": 1.0, "f1": 0.9}, {"strength": 0.0, "f1": None, "asr": math.nan, "garbled": 0.1}, 7]
    page = render({**run, "strengths": messy}, [], {})
    assert "chart-strength" in page
    assert "garbled, strength 0: 10.0%" in page


def test_selection_is_marked_in_the_heat_map(run: Run, html: str) -> None:
    picked = sum(len(entry["selected"]) for entry in run["iterations"])
    chosen = [a for tag, a in Page(html).tags if tag == "circle" and a.get("class") == "chosen"]
    assert len(chosen) == picked
    cells = [a for tag, a in Page(html).tags if tag == "rect" and a.get("class") == "cell"]
    assert len(cells) == len(run["iterations"]) * len(run["sublayers"])


def test_the_page_counts_the_sublayers_of_the_chosen_edit(run: Run) -> None:
    run = copy.deepcopy(run)
    for k, (selected, passes) in enumerate((([0, 1], 2), ([1, 5], 1), ([7], 1), ([9], 3))):
        run["iterations"][k] |= {"selected": selected, "passes": passes}
    run["iterations"][2]["undone"] = True
    run["best_iteration"] = 3
    assert "Iteration 3 was chosen: it edits 3 of 32 sublayers, in 3 alignments." in render(run, [], {})
    run["best_iteration"] = 1
    assert "it edits 2 of 32 sublayers, in 2 alignments." in render(run, [], {})


def test_both_projections_have_one_scale(run: Run) -> None:
    run = copy.deepcopy(run)
    run["projections"]["after"]["points"] = [
        [5 * x, 5 * y, *rest] for x, y, *rest in run["projections"]["after"]["points"]
    ]
    page = render(run, [], {})
    drawings = [re.search(f"chart-projection-{key}-t.*?</svg>", page, re.S) for key in ("before", "after")]
    ticks = [re.findall('<text [^>]*class="tick"[^>]*>([^<]*)</text>', found.group()) for found in drawings if found]
    assert len(ticks) == 2
    assert ticks[0] == ticks[1]


def line(name: str, iteration: int, label: str, answer: str = "x") -> Run:
    return {"iteration": iteration, "split": "test", "id": name, "label": label, "answer": answer, "reason": ""}


def test_changes_are_grouped_by_what_they_mean_and_the_newly_wrong_come_first() -> None:
    cases = {
        "a": (True, "answered", "refused", "worse"),
        "b": (True, "answered", "garbled", "worse"),
        "c": (False, "refused", "answered", "worse"),
        "d": (False, "refused", "garbled", "worse"),
        "e": (False, "garbled", "answered", "worse"),
        "f": (False, "answered", "refused", "jailbreaks"),
        "g": (True, "refused", "answered", "refusals"),
        "h": (True, "refused", "garbled", "neither"),
        "i": (False, "answered", "garbled", "neither"),
    }
    prompts = {name: {"text": name, "benign": case[0], "source": "s"} for name, case in cases.items()}
    lines = [line(name, i, case[i + 1]) for name, case in cases.items() for i in (0, 1)]
    lines += [line("same", 0, "answered"), line("same", 1, "answered", "other words"), line("a", 0, "answered")]
    prompts["same"] = {"text": "same", "benign": True, "source": "s"}
    lines += [line("lost", 0, "answered"), line("lost", 1, "refused"), {**line("f", 1, "answered"), "split": "train"}]
    found = changes(lines, prompts, 1)
    assert found.groups[0].key == "worse"
    got = {change.prompt: group.key for group in found.groups for change in group.members}
    assert got == {name: case[3] for name, case in cases.items()}
    assert (found.compared, found.reworded, found.unknown) == (11, 1, 1)


def many_changes(run: Run) -> tuple[list[Run], dict[str, Run]]:
    prompts, lines = {}, []
    for index in range(300):
        name, benign = f"p{index}", index % 2 == 0
        prompts[name] = {"text": name, "benign": benign, "source": f"s{index % 2}{index >= 200}"}
        better = index % 3 != 0
        before, after = ("refused", "answered") if benign == better else ("answered", "refused")
        lines += [line(name, 0, before), line(name, run["best_iteration"], after)]
    return lines, prompts


def test_all_changes_are_shown_the_newly_wrong_first(run: Run) -> None:
    lines, prompts = many_changes(run)
    found = changes(lines, prompts, run["best_iteration"])
    assert [(group.key, len(group.members)) for group in found.groups] == [
        ("worse", 100), ("jailbreaks", 100), ("refusals", 100)
    ]  # fmt: skip
    assert len({change.source for change in found.groups[1].members[:2]}) == 2
    page = Page(render(run, lines, prompts))
    assert sum(tag == "article" for tag, _ in page.tags) == 300
    assert set(prompts) <= set(page.text().split())
    assert page.text().index("Newly wrong") < page.text().index("Fixed jailbreaks")
    assert ("hidden", None) in next(a for _, a in page.tags if a.get("id") == "filter-bar").items()
    assert not [a for tag, a in page.tags if tag in ("article", "details") and "hidden" in a]


BROWSER = """
const make = (more) => ({ hidden: false, value: "", dataset: {}, ...more });
const ids = {};
for (const name of ["bar", "words", "source", "change", "count"])
  ids[`filter-${name}`] = make({ addEventListener(_, call) { this.input = call; } });
const groups = given.map(([change, articles]) => make({ dataset: { change }, articles: articles.map(
  ([source, textContent]) => make({ dataset: { source }, textContent })),
  querySelectorAll() { return this.articles; } }));
const document = { getElementById: (id) => ids[id], querySelectorAll: () => groups };
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({}, [["Lock one", "lock two"], ["fire one"]]),
        ({"words": "ONE"}, [["Lock one"], ["fire one"]]),
        ({"words": " two  lock "}, [["lock two"], None]),
        ({"source": "2"}, [["lock two"], ["fire one"]]),
        ({"change": "refusals"}, [None, ["fire one"]]),
        ({"words": "one", "source": "2", "change": "worse"}, [None, None]),
    ],
)
def test_the_script_shows_what_is_asked_for(asked: dict[str, str], left: list[Any], html: str) -> None:
    """In a made-up document, with what the script asks of a browser."""
    given = [["worse", [["1", "Lock one"], ["2", "lock two"]]], ["refusals", [["2", "fire one"]]]]
    (script,) = re.findall("<script>(.*?)</script>", html, re.S)
    values = "".join(f"ids['filter-{name}'].value = {json.dumps(value)};" for name, value in asked.items())
    told = (
        "console.log(JSON.stringify([ids['filter-bar'].hidden, ids['filter-count'].textContent, groups.map((group) => "
        "group.hidden ? null : group.articles.filter((one) => !one.hidden).map((one) => one.textContent))]))"
    )
    code = f"const given = {json.dumps(given)};{BROWSER}{script}\n{values}ids['filter-words'].input();{told}"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    hidden, count, shown = json.loads(done.stdout)
    assert not hidden
    assert shown == left
    assert count == f"{sum(len(each or []) for each in left)} of 3 shown"


def test_a_long_answer_is_cut_and_says_so(run: Run) -> None:
    prompts = {"p": {"text": "q" * 1_000_000, "benign": True, "source": "s"}}
    lines = [line("p", 0, "refused"), line("p", run["best_iteration"], "answered", "w" * 5000)]
    html = render(run, lines, prompts)
    assert "(4,100 more characters)" in html
    assert "(999,100 more characters)" in html


@pytest.mark.parametrize("gone", sorted(fake_run(blocks=2, rounds=2, best=1)))
def test_any_one_field_may_be_missing_or_null(gone: str) -> None:
    run = fake_run(blocks=2, rounds=2, best=1)
    answers, prompts = fake_answers(run)
    Page(render({**run, gone: None}, answers, prompts))
    del run[gone]
    Page(render(run, answers, prompts))
    assert plain(before_after_table(run))


def test_an_unfinished_run_says_what_is_missing() -> None:
    empty = Page(render({}, [], {})).text()
    for words in (
        "The test has not been run yet",
        "Utility has not been measured",
        "No iteration has been judged",
        "No angles were recorded",
        "No scores were recorded",
        "No projections were recorded",
        "no test answers from both models",
        "The command was not recorded",
    ):
        assert words in empty
    run = fake_run()
    for key in ("test", "utility", "projections", "best_iteration", "stopped"):
        del run[key]
    text = Page(render(run, [], {})).text()
    assert "This run has no test figures yet" in text
    assert "on the validation prompts F1 went from 0.580 to" in text
    assert "so far, " in text


def test_nan_and_null_become_dashes_not_figures() -> None:
    run = fake_run(blocks=2, rounds=3, best=1)
    poison: list[Any] = [math.nan, None, math.inf, "x"]

    def spoil(value: Any, depth: int = 0) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item, depth + 1) for item in value]
        if isinstance(value, float):
            poison.append(poison.pop(0))
            return poison[0]
        return value

    bad = spoil(run)
    bad["iterations"][1]["scores"] = [0.5, None, math.nan, 0.7]
    html = render(bad, *fake_answers(run))
    drawn = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    assert not re.search(r'="(nan|inf|None)|\bnan\b|\binf\b', drawn)
    assert Page(html).row("ASR")[2:5] == ["–", "–", "–"]
    assert plain(before_after_table(bad))


@pytest.mark.parametrize(
    ("model", "title"),
    [("a/b", "a/b"), ("/x/y/z", "z"), ("./z", "z"), ("x/y/z.gguf", "z.gguf"), (None, "Unnamed model")],
)
def test_the_title_is_the_models_name_not_a_path(model: str | None, title: str) -> None:
    assert f"<h1>{title}</h1>" in render({"base": {"model": model}}, [], {})


@pytest.mark.parametrize(("blocks", "rounds"), [(1, 1), (1, 2), (64, 31)])
def test_any_size_of_model_and_run_is_drawn(blocks: int, rounds: int) -> None:
    run = fake_run(blocks=blocks, rounds=rounds, best=max(rounds - 1, 1))
    html = render(run, [], {})
    Page(html)
    assert len(html) < 2_000_000
    for x in re.findall(r'<(?:rect|circle)[^>]* c?x="([-\d.]+)"', html):
        assert 0 <= float(x) <= drawing.WIDTH


@pytest.mark.parametrize(
    ("asr", "orr", "f1", "best", "verdict", "words"),
    [
        (
            (0.48, 0.03),
            (0.41, 0.02),
            (0.57, 0.97),
            3,
            "Better on both sides",
            "answers 3% instead of 48% of the harmful",
        ),
        (
            (0.48, 0.03),
            (0.41, 0.02),
            (0.57, 0.97),
            3,
            "Better on both sides",
            "refuses 2% instead of 41% of the benign",
        ),
        ((0.40, 0.20), (0.10, 0.20), (0.7, 0.8), 3, "A trade: fewer harmful", "refuses 20% instead of 10%"),
        ((0.40, 0.30), (0.10, 0.60), (0.7, 0.5), 3, "It did not help: fewer harmful", "refuses 60% instead of 10%"),
        ((0.10, 0.20), (0.10, 0.20), (0.9, 0.8), 3, "It did not help", "answers 20% instead of 10%"),
        ((0.10, 0.10), (0.30, 0.20), (0.8, 0.9), 3, "Better on one side", "still answers 10%"),
        ((0.10, 0.10), (0.20, 0.20), (0.8, 0.8), 0, "Left as it was", "the model was not changed"),
        ((0.034, 0.032), (0.30, 0.20), (0.8, 0.9), 3, "Better on both sides", "answers 3.2% instead of 3.4%"),
        ((0.5, 0.004), (0.30, 0.20), (0.8, 0.9), 3, "Better on both sides", "answers 0.4% instead of 50.0%"),
        ((0.0149, 0.0098), (0.30, 0.20), (0.8, 0.9), 3, "Better on both sides", "answers 1.0% instead of 1.5%"),
    ],
)
def test_the_headline_is_honest(
    asr: tuple[float, float], orr: tuple[float, float], f1: tuple[float, float], best: int, verdict: str, words: str
) -> None:
    before, after = ({"asr": asr[i], "orr": orr[i], "f1": f1[i]} for i in (0, 1))
    found = outcome({"best_iteration": best, "test": {"before": before, "after": after}})
    assert found.verdict.startswith(verdict)
    assert words in found.sentence


def test_the_headline_names_chance_garbled_text_and_lost_skills(run: Run) -> None:
    assert any("small sum (98.5% to 94.0%)" in note for note in outcome(run).notes)
    doubtful = copy.deepcopy(run)
    doubtful["test"]["after"].update(f1_interval=[0.6, 0.9], garbled=0.2)
    notes = " ".join(outcome(doubtful).notes)
    assert "may be chance" in notes
    assert "20% of the edited model's test answers are garbled" in notes


def test_change_says_which_way_is_better(run: Run) -> None:
    rows = {row.name: row for row in [*comparison(run), *skills(run)]}
    assert rows["ASR"].direction == rows["F1"].direction == "better"
    assert rows["Skill: small sum"].direction == "worse"
    run = copy.deepcopy(run)
    run["test"]["after"]["asr"] = run["test"]["before"]["asr"] + 0.0001
    row = next(row for row in comparison(run) if row.name == "ASR")
    assert (row.change_text, row.direction) == ("0.0", "")


def plain(table: Any, width: int = 80) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_terminal_table_holds_the_figures_in_80_columns(run: Run) -> None:
    text = plain(before_after_table(run))
    assert max(len(one.rstrip()) for one in text.splitlines()) <= 80
    assert "\x1b" not in text
    for words in ("0.967 [0.925, 1.000]", "3.3% [", "95.7% [95.1, 96.3]", "Skill: small sum", "94.0%"):
        assert words in text
    for words in (*SOURCES, "5 min 12 s", "3.46 GB peak memory", "148,211 tokens generated"):
        assert words in text
    for row in comparison(run):
        assert row.before_text in text
        assert row.after_bracket in text


def test_the_terminal_table_takes_markup_and_long_names_as_they_are(run: Run) -> None:
    run = copy.deepcopy(run)
    name = "[red]\x1b[31msomeone/a-data-set-with-a-very-long-name-indeed[/red]"
    run["test"]["before"]["by_source"][name] = {"kind": "toxic", "rate": 0.5, "interval": [0.4, 0.6], "n": 9}
    text = plain(before_after_table(run))
    assert "[red]\ufffd[31m" in text
    assert "\x1b" not in text
    assert max(len(one.rstrip()) for one in text.splitlines()) <= 80
    assert "50.0%" in text
    assert "no test figures yet" in plain(before_after_table({}))


def test_intervals_are_left_out_before_names_are_folded(run: Run) -> None:
    run = copy.deepcopy(run)
    name = "someone/a-data-set-with-a-rather-long-name"
    run["test"]["before"]["by_source"][name] = {"kind": "toxic", "rate": 0.5, "interval": [0.4, 0.6], "n": 9}
    assert f"  {name} " in plain(before_after_table(run), 80)
    assert "Left out at this width: intervals." in plain(before_after_table(run), 80)
    assert "50.0% [40.0, 60.0]" in plain(before_after_table(run), 100)  # there names are folded for them


def save(directory: Path, run: Run, answers: list[Run], prompts: dict[str, Run]) -> None:
    (directory / "run.json").write_text(json.dumps(run))
    (directory / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    lines = (json.dumps({"id": name, **prompt}) + "\n" for name, prompt in prompts.items())
    (directory / "prompts.jsonl").write_text("".join(lines))


def test_write_report_reads_the_directory(tmp_path: Path, run: Run, html: str) -> None:
    save(tmp_path, run, *fake_answers(run))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == html
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "answers.jsonl",
        "prompts.jsonl",
        "report.html",
        "run.json",
    ]


def test_write_report_names_what_it_could_not_read(tmp_path: Path, run: Run) -> None:
    save(tmp_path, run, *fake_answers(run))
    (tmp_path / "prompts.jsonl").unlink()
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"iteration": 3, "answ\xff')
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text()
    assert "1 line of answers.jsonl could not be read" in text
    assert "prompts.jsonl could not be read" in text
    assert "240 answers belong to prompts that are not in prompts.jsonl" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "give the folder"),
        ("{", "not valid JSON"),
        ("[]", "not the record of an llmva run"),
        ('{"format": "other"}', "not the record of an llmva run"),
        ('{"format": "llmva-run", "version": 2}', "update llmva"),
    ],
)
def test_write_report_refuses_what_is_not_a_run(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_leaves_no_half_file(tmp_path: Path, run: Run) -> None:
    save(tmp_path, run, [], {})
    (tmp_path / "report.html").mkdir()
    with pytest.raises(LlmvaError, match="cannot be written"):
        write_report(tmp_path)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-2.4, 2.4, False, [-2, -1, 0, 1, 2]),
        (0, 3, True, [0, 1, 2, 3]),
        (0, 30, True, [0, 5, 10, 15, 20, 25, 30]),
        (5, 5, True, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert drawing.ticks(low, high, 7, whole) == pytest.approx(expected)


def test_figures_in_the_units_people_use() -> None:
    assert [duration(s) for s in (4.24, 48, 187, 4320, None)] == ["4.2 s", "48 s", "3 min 07 s", "1 h 12 min", "–"]
    assert scaled(1_235_814_400, ("", "thousand", "million", "billion")) == "1.24 billion"
    assert [size(n) for n in (512, 9_240, 999_600, 2_100_000_000)] == ["512 B", "9.24 kB", "1 MB", "2.1 GB"]


def test_the_package_ships_its_templates() -> None:
    """The pages' files lie in the package, and pyproject.toml's package data names every file that is no code."""
    from llmva.report.pages import TEMPLATES

    package = TEMPLATES.parents[1]
    toml = (package.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^\[tool\.setuptools\.package-data\]\nllmva = \[(.*?)\]", toml, re.MULTILINE | re.DOTALL)
    globs = re.findall(r'"(.*?)"', listed)
    shipped = {path for pattern in globs for path in package.glob(pattern) if path.is_file()}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert sorted(data - shipped) == []
    assert {path.name for path in shipped if path.parent == TEMPLATES} == {
        "ablation.html", "comparison.css", "comparison.html", "evaluation.html", "filter.js", "index.html",
        "page.html", "run.html", "study.html", "style.css",
    }  # fmt: skip
