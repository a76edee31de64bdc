"""Pages, tables and charts of comparisons and ablations, on made-up records: the figures are drawn at random."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmva.errors import LlmvaError, UsageError
from llmva.report import ablation_table, comparison_table, write_ablation, write_comparison
from llmva.report.drawing.placing import Name, overlap, place
from llmva.report.study.ablation import ablation_csv, ablation_page
from llmva.report.study.comparison import comparison_page
from llmva.report.study.headline import headline
from llmva.report.study.methods import blocks, methods
from llmva.report.study.plane import looks, plane
from llmva.report.study.tables import comparison_csv, comparison_latex, latex

Record = dict[str, Any]
SOURCES = {"harmful": "toxic", "jailbreak": "toxic", "alarming": "benign", "plain": "benign"}
RATES = {  # ASR, ORR, kept, time a token
    ("none", None): (0.59, 0.45, 1.0, 1.0),
    ("vectorsteer", "paper"): (0.41, 0.38, 0.93, 1.02),
    ("vectorsteer", "tuned"): (0.21, 0.17, 0.91, 1.02),
    ("alphasteer", "paper"): (0.43, 0.36, 0.97, 1.04),
    ("alphasteer", "tuned"): (0.24, 0.19, 0.95, 1.04),
    ("alphasteer+", "paper"): (0.40, 0.35, 0.97, 1.04),
    ("alphasteer+", "tuned"): (0.23, 0.20, 0.95, 1.04),
    ("scans", "paper"): (0.05, 0.74, 0.88, 1.09),
    ("scans", "tuned"): (0.28, 0.21, 0.92, 1.08),
    ("cast", "paper"): (0.55, 0.46, 0.99, 1.06),
    ("cast", "tuned"): (0.34, 0.31, 0.98, 1.06),
    ("llmva", None): (0.04, 0.06, 0.965, 1.0),
}
VOID = {"meta", "link", "br", "img", "hr", "input"}


def f1_of(asr: float, orr: float) -> float:
    """With as many harmful prompts as benign ones."""
    return 2 * (1 - orr) / (2 - orr + asr)


def summed(values: list[float], half: float) -> Record:
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "spread": spread, "interval": [max(0.0, mean - half), min(1.0, mean + half)]}


def fake_row(method: str, setting: str | None, rng: random.Random, seeds: list[int]) -> Record:
    asr, orr, kept, latency = RATES[method, setting]
    runs = []
    for seed in seeds if method != "none" else [None]:
        one = min(1.0, max(0.0, asr + rng.gauss(0, 0.012))), min(1.0, max(0.0, orr + rng.gauss(0, 0.012)))
        apart = 0.6 * min(one[0], one[1], 0.2)
        rates = (one[0] - apart, one[0] + apart, one[1] + apart, one[1] - apart)
        runs.append(
            {
                "seed": seed,
                "f1": f1_of(*one),
                "asr": one[0],
                "orr": one[1],
                "garbled": 0.004 if method != "scans" else 0.03,
                "by_source": dict(zip(SOURCES, rates, strict=True)),
                "fit_seconds": 0.0 if method == "none" else rng.uniform(30, 400),
                "fit_answers": 0 if method == "none" else rng.randrange(256, 9000),
                "latency": latency,
                "kept": kept,
                "kl": 0.3 * (1 - kept),
                "perplexity": 1 + 0.5 * (1 - kept),
            }
        )
    mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0] if key not in ("seed", "by_source")}
    magnitude = setting == "paper" and method != "cast"
    return {
        "method": method,
        "setting": setting,
        "options": {"strength": 0.3, "blocks": [5, 6, 7], "kind_of": "mean_difference"} if setting else {},
        "runs": runs,
        **{key: summed([run[key] for run in runs], 0.04) for key in ("f1", "asr", "orr")},
        "garbled": summed([run["garbled"] for run in runs], 0.01),
        "by_source": {name: summed([run["by_source"][name] for run in runs], 0.06) for name in SOURCES},
        "skills": {"sum": {"before": 1.0, "after": kept - 0.02 if method != "none" else 1.0}},
        "cost": {key: mean[key] for key in ("fit_seconds", "fit_answers", "latency")}
        | {"latency_range": [latency - 0.01, latency + 0.01]},
        "utility": {key: mean[key] for key in ("kept", "kl", "perplexity")},
        "curve": [
            {
                "strength": s,
                "f1": 0.5 + 0.1 * s,
                "asr": 0.59 - (0.59 - asr) * s,
                "orr": 0.45 + (orr - 0.45) * s + 0.06 * s * s,
            }
            for s in (0.25, 0.5, 1.0, 1.5, 2.0)
            if 0.59 - (0.59 - asr) * s >= 0 and 0.45 + (orr - 0.45) * s + 0.06 * s * s <= 1
        ]
        if magnitude
        else [],
        "versus": None,
        "note": "It did not beat the untouched model on validation prompts."
        if (method, setting) == ("cast", "paper")
        else None,
    }


def fake_comparison(seeds: int = 3, seed: int = 0) -> Record:
    """Seven methods, baselines at their paper's settings and tuned; vectorsteer (tuned) is the best baseline."""
    rng = random.Random(seed)
    rows = [fake_row(method, setting, rng, list(range(seeds))) for method, setting in RATES]
    best = next(row for row in rows if (row["method"], row["setting"]) == ("vectorsteer", "tuned"))
    for row in rows:
        if row is not best:
            far = row["f1"]["mean"] - best["f1"]["mean"]
            p = 0.0004 if abs(far) > 0.05 else 0.31
            row["versus"] = {
                "baseline": "vectorsteer (tuned)",
                "prompts": 400,
                "mcnemar_p": p / 10,
                "mcnemar_p_holm": p,
                "f1_difference": far,
                "f1_difference_interval": [far - 0.03, far + 0.03],
                "f1_p": p / 10,
                "f1_p_holm": p,
            }
    return {
        "format": 1,
        "kind": "comparison",
        "llmva": "0.1.0",
        "versions": {"python": "3.11.2", "torch": "2.6.0"},
        "command": "llmva compare example/tiny-chat-1b --methods none,vectorsteer,llmva --out compared",
        "base": {"model": "example/tiny-chat-1b", "sha256": "3f" * 32, "dtype": "bfloat16"},
        "judge": "phrases-3",
        "seeds": list(range(seeds)),
        "sources": dict(SOURCES),
        "prompts": {"train": 512, "validation": 200, "test": 400},
        "rows": rows,
        "best_baseline": "vectorsteer (tuned)",
        "limits": ["The best baseline was chosen by its F1 on these test prompts, which flatters baselines."],
    }


def fake_point(x: float | None, label: str, f1: float, rng: random.Random) -> Record:
    runs = [{"seed": s, **{k: v + rng.gauss(0, 0.01) for k, v in figures(f1).items()}} for s in range(3)]
    keys = ("f1", "asr", "orr")
    return {"x": x, "label": label, **{k: summed([run[k] for run in runs], 0.04) for k in keys}, "runs": runs}


def figures(f1: float) -> dict[str, float]:
    return {"f1": f1, "asr": 0.9 * (1 - f1) + 0.01, "orr": 1.2 * (1 - f1) + 0.01}


def fake_ablation() -> Record:
    """Two series against degrees, one of names."""
    rng = random.Random(0)
    angles = (0, 15, 30, 45, 60, 75, 90)
    random_ = [fake_point(a, f"{a}°", 0.95 - 0.4 * (a / 90) ** 2, rng) for a in angles]
    one = [fake_point(a, f"{a}°", 0.95 - 0.2 * (a / 90) ** 2, rng) for a in angles]
    names = (("difference of means", 0.91), ("logistic regression", 0.94), ("exact SVM, no harmless metric", 0.88))
    others = [fake_point(None, name, f1, rng) for name, f1 in names]
    return {
        "format": 1,
        "kind": "ablation",
        "what": "vectors",
        "llmva": "0.1.0",
        "versions": {"python": "3.11.2"},
        "command": "llmva ablate example/tiny-chat-1b --what vectors --out ablated",
        "base": {"model": "example/tiny-chat-1b"},
        "judge": "phrases-3",
        "seeds": [0, 1, 2],
        "untouched": {"f1": 0.509, "asr": 0.59, "orr": 0.45},
        "x_label": "degrees",
        "series": [
            {"name": "turned at random", "points": random_},
            {"name": "benign vector only", "points": one},
            {"name": "fitted otherwise", "points": others},
        ],
        "limits": ["The choice of sublayers stays that of the vectors as they were."],
    }


class Page(HTMLParser):
    """Tags, table rows and text of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def row(self, name: str, number: int = 0) -> list[str]:
        """The cells of the `number`-th table row with that name."""
        return [re.sub(r"\s+", " ", cell).strip() for cell in [r for r in self.rows if r and r[0] == name][number]]


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def record() -> Record:
    return fake_comparison()


@pytest.fixture(scope="module")
def html(record: Record) -> str:
    return comparison_page(record)


def row_of(record: Record, method: str, setting: str | None = None) -> Record:
    return next(row for row in record["rows"] if (row["method"], row["setting"]) == (method, setting))


# -- files -------------------------------------------------------------------------------------------------------


def test_a_comparison_becomes_three_files(tmp_path: Path, record: Record) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(record))
    made = write_comparison(tmp_path)
    assert [path.name for path in made] == ["compare.html", "compare.csv", "compare.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["compare.json", *(p.name for p in made)])
    assert made[0].read_text(encoding="utf-8") == comparison_page(record)


def test_an_ablation_becomes_two_files(tmp_path: Path) -> None:
    (tmp_path / "ablate.json").write_text(json.dumps(fake_ablation()))
    assert [path.name for path in write_ablation(tmp_path)] == ["ablate.html", "ablate.csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Cannot read"),
        ("{", "not valid JSON"),
        ("[]", "not the record of a comparison"),
        ('{"kind": "ablation", "format": 1}', "not the record of a comparison"),
        ('{"kind": "comparison"}', "format version None"),
        ('{"kind": "comparison", "format": 2}', "update llmva"),
    ],
)
def test_records_that_cannot_be_read_are_usage_errors(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        write_comparison(tmp_path)
    assert "llmva" in str(caught.value)
    assert not list(tmp_path.glob("*.html"))


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, record: Record) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(record))
    (tmp_path / "compare.html").mkdir()  # a folder, which no rename replaces
    with pytest.raises(LlmvaError, match="cannot be written") as caught:
        write_comparison(tmp_path)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.glob("*.part"))


def test_drawing_needs_neither_torch_nor_numpy() -> None:
    words = "import sys, llmva.report; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


# -- page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["comparison", "ablation"])
def test_pages_are_well_formed_and_fetch_nothing(which: str, html: str) -> None:
    text = html if which == "comparison" else ablation_page(fake_ablation())
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(str(a["href"])[1:] in ids for tag, a in page.tags if tag == "a")
    assert "://" not in text
    assert "url(" not in text
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for tag, a in page.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for tag, attributes in page.tags:
        if tag == "svg" and attributes.get("class") == "chart":
            assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)
    scrolling = [a for tag, a in page.tags if tag == "div" and a.get("class") == "scroll" and "role" in a]
    assert scrolling  # a reader with a keyboard can get to what lies outside
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    assert all("scope" in a for tag, a in page.tags if tag == "th")


def test_figures_on_the_page_are_those_of_the_record(record: Record, html: str) -> None:
    page = Page(html)
    ours = row_of(record, "llmva")

    def words(value: Record, mark: str) -> str:
        ends = ", ".join(f"{100 * end:.1f}" for end in value["interval"])
        return f"{100 * value['mean']:.1f}%{mark} ±{100 * value['spread']:.1f} [{ends}]"

    cells = page.row("llmva")
    f1 = ours["f1"]
    ends = f"[{f1['interval'][0]:.3f}, {f1['interval'][1]:.3f}]"
    assert cells[1] == f"{f1['mean']:.3f}★† ±{f1['spread']:.3f} {ends}"
    assert cells[2] == words(ours["asr"], "★")
    assert cells[3] == words(ours["orr"], "★")
    versus = ours["versus"]
    low, high = versus["f1_difference_interval"]
    assert page.row("llmva", 1)[1:] == [f"+{versus['f1_difference']:.3f} [{low:.3f}, {high:.3f}]", "<0.001†", "<0.001"]
    assert page.row("llmva", 2)[1:] == [words(ours["by_source"][name], "★") for name in SOURCES]
    cost = page.row("cast (paper)", 3)
    assert cost[1:5] == ["99.0%★", "0.0030★", "1.005×★", "97.0%★"]
    assert cost[-1] == "1.060×"
    for run in ours["runs"]:
        assert any(row[:2] == ["llmva", str(run["seed"])] and row[2] == f"{run['f1']:.3f}" for row in page.rows)
    assert any(row[:2] == ["untouched model", "–"] for row in page.rows)  # it has no seed
    for told in (record["command"], record["base"]["sha256"], "strength = 0.3", *record["limits"]):
        assert told in page.text()
    assert "It did not beat the untouched model" in page.text()


def test_every_method_is_a_named_point_with_its_cross(record: Record) -> None:
    drawn = str(plane(methods(record)))
    for row in methods(record):
        assert re.search(rf"</svg> {re.escape(row.name)}</li>", drawn)  # named in the legend, beside its mark
        assert f">{row.name}</text>" not in drawn
        assert f"<title>{row.name}: ASR {100 * (row['asr'].mean or 0):.1f}%" in drawn
    assert drawn.count('class="bar ') == 2 * len(record["rows"])
    assert drawn.count('class="equal"') == 5
    assert drawn.count("<polyline") == sum(len(row["curve"]) > 1 for row in record["rows"]) == 4
    assert ">ideal<" in drawn


def test_lines_of_equal_f1_are_where_f1_is_equal(record: Record) -> None:
    """Also where there are twice as many harmful prompts as benign ones, which the runs' figures give away."""
    for k in (1.0, 2.0):
        rows = copy.deepcopy(record)
        for row in rows["rows"]:
            for run in row["runs"]:
                run["f1"] = 2 * (1 - run["orr"]) / (2 - run["orr"] + k * run["asr"])
        drawn = str(plane(methods(rows)))
        found = re.findall(
            r'class="equal" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"><title>F1 = ([\d.]+)', drawn
        )
        assert len(found) == 5
        for *ends, f1 in found:
            x1, y1, x2, y2 = map(float, ends)
            for x, y in ((x1, y1), (x2, y2)):
                asr, orr = (x - 60) / (436 - 60), (400 - y) / (400 - 30)
                assert 2 * (1 - orr) / (2 - orr + k * asr) == pytest.approx(float(f1), abs=2e-4)


def test_methods_differ_in_more_than_colour() -> None:
    names = [(f"baseline {i}", setting) for i in range(5) for setting in ("paper", "tuned")]
    found = looks([("none", None), ("llmva", None), *names])
    assert len({look.shape for look in found}) == 7
    assert len({(look.shape, "hollow" in look.class_) for look in found}) == len(found)
    assert len({(look.shape, look.class_) for look in looks([(f"baseline {i}", None) for i in range(25)])}) == 25


# -- places of names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 14])
@pytest.mark.parametrize("spread", [0.0, 3.0, 25.0])
def test_names_of_points_close_together_do_not_overlap(count: int, spread: float) -> None:
    rng = random.Random(count)
    points = [(200 + rng.uniform(-spread, spread), 200 + rng.uniform(-spread, spread)) for _ in range(count)]
    names = [Name(x, y, 130, 14) for x, y in points]
    bounds = (51.0, 20.0, 458.0, 407.0)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    found = place(names, bounds, taken)
    assert found == place(names, bounds, taken)
    for i, one in enumerate(found):
        assert bounds[0] <= one.box[0] < one.box[2] <= bounds[2]
        assert bounds[1] <= one.box[1] < one.box[3] <= bounds[3]
        assert all(overlap(one.box, other.box) == 0 for other in found[:i])
        assert all(overlap(one.box, mark) < 20 for mark in taken)
        gap = max(one.box[0] - names[i].x, names[i].x - one.box[2], one.box[1] - names[i].y, names[i].y - one.box[3])
        assert gap < 10 or one.leader is not None  # a name away from its point is led to it


def test_a_lonely_name_stands_right_of_its_point() -> None:
    (found,) = place([Name(100, 100, 60, 14)], (0, 0, 400, 400))
    assert found.box == (105, 93, 165, 107)
    assert found.leader is None
    (edge,) = place([Name(390, 100, 60, 14)], (0, 0, 400, 400), [(384, 94, 396, 106)])
    assert edge.box[2] <= 384 or edge.box[3] <= 94 or edge.box[1] >= 106


def test_strengths_have_no_more_digits_than_anyone_reads(record: Record) -> None:
    mine = copy.deepcopy(record)
    row_of(mine, "scans", "paper")["curve"][0]["strength"] = 1 / 3
    page = comparison_page(mine)
    assert "0.333" in page
    assert "0.3333" not in page


# -- headline ----------------------------------------------------------------------------------------------------


def test_the_headline_says_who_is_best_by_how_much_and_at_what_cost(record: Record) -> None:
    said = headline(record)
    ours = row_of(record, "llmva")
    assert (said.verdict, said.tone) == ("llmva is best", "good")
    assert f"{ours['versus']['f1_difference']:.3f} above vectorsteer (tuned), more than chance" in said.sentence
    assert "p below 0.001 after Holm's correction" in said.sentence
    assert "keeps 96.5%" in said.notes[0]
    assert "needs about as much time for a token" in said.notes[0]


def test_the_headline_does_not_call_chance_a_win(record: Record) -> None:
    mine = copy.deepcopy(record)
    row_of(mine, "llmva")["versus"]["f1_p_holm"] = 0.05
    said = headline(mine)
    assert (said.verdict, said.tone) == ("No clear winner", "mixed")
    assert "may be chance (p = 0.050" in said.sentence


def test_the_headline_says_so_where_a_baseline_wins(record: Record) -> None:
    mine = copy.deepcopy(record)
    ours = row_of(mine, "llmva")
    ours["f1"]["mean"], ours["versus"]["f1_difference"] = 0.7, -0.1
    said = headline(mine)
    assert (said.verdict, said.tone) == ("vectorsteer (tuned) is best", "bad")
    assert "0.100 above llmva, more than chance explains" in said.sentence
    assert "needs 2.0% more time for a token" in said.notes[0]
    row_of(mine, "vectorsteer", "tuned")["cost"]["latency_range"] = [0.99, 1.07]
    assert "needs about as much time for a token" in headline(mine).notes[0]


def test_the_headline_says_so_where_nothing_helps(record: Record) -> None:
    mine = copy.deepcopy(record)
    row_of(mine, "none")["f1"]["mean"] = 0.99
    said = headline(mine)
    assert said.verdict == "No method helped"
    assert "whose F1 is 0.990; the closest is llmva" in said.sentence
    mine["rows"] = mine["rows"][:1]
    assert headline(mine).verdict == "No figures yet"


def test_untested_leads_and_garbled_answers_are_told(record: Record) -> None:
    mine = copy.deepcopy(record)
    mine["seeds"] = [0]
    mine["rows"] = [row_of(mine, "llmva"), row_of(mine, "cast", "tuned")]
    for row in mine["rows"]:
        row["versus"] = None
    mine["rows"][0]["garbled"]["mean"] = 0.3
    said = headline(mine)
    assert said.tone == "mixed"
    assert "not tested" in said.sentence
    assert any("30.0% of the test answers of llmva are garbled" in note for note in said.notes)
    assert any("one seed only" in note for note in said.notes)


# -- tables ------------------------------------------------------------------------------------------------------


def test_best_values_are_marked_ties_too_and_the_untouched_model_has_no_cost() -> None:
    record = fake_comparison()
    row_of(record, "cast", "tuned")["utility"]["kept"] = 0.98996  # 99.0%, as cast (paper) shows too
    found = {(column.group, column.title): column for block in blocks(record) for column in block.columns}
    names = blocks(record)[0].names
    best = {key: [n for n, cell in zip(names, c.cells, strict=True) if cell.best] for key, c in found.items()}
    assert best["", "F1"] == best["", "ASR"] == best["ASR", "jailbreak"] == ["llmva"]
    assert best["Utility", "kept"] == ["cast (paper)", "cast (tuned)"]
    assert best["Cost", "time a token"] == []  # times have no winner
    times = dict(zip(names, [cell.text for cell in found["Cost", "time a token"].cells], strict=True))
    assert times["scans (paper)"] == "1.090×"
    assert times["llmva"] == "about 1×"
    row_of(record, "none")["asr"]["mean"] = 0.001
    (asr,) = [c for c in blocks(record)[0].columns if c.title == "ASR"]
    assert [n for n, cell in zip(names, asr.cells, strict=True) if cell.best] == ["untouched model"]
    for row in record["rows"]:
        row["asr"]["mean"] = 0.25
    (asr,) = [c for c in blocks(record)[0].columns if c.title == "ASR"]
    assert not any(cell.best for cell in asr.cells)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_terminal_tables_fit_and_hold_every_figure(record: Record, width: int) -> None:
    text = printed(comparison_table(record), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    wanted = {cell.text for block in blocks(record) for column in block.columns for cell in column.cells}
    assert all(word in text for word in wanted)
    line = next(line for line in text.splitlines() if line.startswith("llmva   "))
    assert re.match(r"llmva +0\.957\*† ±0\.002 \[0\.917, 0\.997\]", line)
    if width >= 100:
        assert "continued" not in text
        assert len(line.split()) == 1 + 4 + 6


def test_many_data_sets_are_split_between_columns(record: Record) -> None:
    mine = copy.deepcopy(record)
    mine["sources"] = {f"{kind} set number {i}": kind for kind in ("toxic", "benign") for i in range(9)}
    for row in mine["rows"]:
        row["by_source"] = {name: {"mean": i / 20, "spread": 0.01} for i, name in enumerate(mine["sources"])}
    text = printed(comparison_table(mine))
    assert "By data set, continued" in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in text for name in mine["sources"])
    for width in range(40, 130, 3):
        rows = printed(comparison_table(mine), width).split("By data set\n")[1].splitlines()
        assert all(len(row) <= width for row in rows)
        # names are not folded to make room: each table has the row of the longest one
        assert sum(row.startswith("alphasteer+ (tuned) ") for row in rows) == sum(row.startswith("──") for row in rows)


def test_the_csv_has_every_digit(record: Record) -> None:
    lines = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [(line["method"], line["setting"] or None) for line in lines] == list(RATES)
    ours, mine = row_of(record, "llmva"), lines[-1]
    assert float(mine["f1_mean"]) == ours["f1"]["mean"]
    assert [float(mine["f1_low"]), float(mine["f1_high"])] == ours["f1"]["interval"]
    assert float(mine["source_jailbreak_spread"]) == ours["by_source"]["jailbreak"]["spread"]
    assert float(mine["latency"]) == 1.0
    assert float(mine["f1_p_holm"]) == ours["versus"]["f1_p_holm"]
    assert (mine["baseline"], mine["seeds"]) == ("vectorsteer (tuned)", "3")
    best = next(line for line in lines if (line["method"], line["setting"]) == ("vectorsteer", "tuned"))
    assert best["f1_p"] == best["baseline"] == ""


# -- LaTeX -------------------------------------------------------------------------------------------------------

NASTY = r"a_b & 50% of $x #1 {y} ~z ^w \input{/etc/passwd} <u> |v| [w] é 中 “q” 'r' \\"


def compiled(tmp_path: Path, body: str) -> str:
    """The log of pdflatex over the tables."""
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("pdflatex is not installed")
    (tmp_path / "tables.tex").write_text(body, encoding="utf-8")
    start = r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}"
    (tmp_path / "all.tex").write_text(start + "\n\\input{tables}\n\\end{document}\n", encoding="utf-8")
    done = subprocess.run(
        [program, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    log = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    return log


def nasty(record: Record) -> Record:
    """The record with hostile text wherever text may be."""
    mine = copy.deepcopy(record)
    mine["command"] = mine["judge"] = mine["base"]["model"] = f"{NASTY}\n\\undefined"
    mine["sources"] = {NASTY: "toxic", "plain": "benign"}
    mine["limits"].append(NASTY)
    for row in mine["rows"]:
        row["by_source"][NASTY] = row["by_source"].pop("harmful")
        row["skills"][NASTY] = {"before": 0.9, "after": 0.8}
        row["note"], row["options"][NASTY] = NASTY, NASTY
        row["method"] = f"[{NASTY}" if row["method"] == "scans" else row["method"]
    return mine


def test_latex_compiles(tmp_path: Path, record: Record) -> None:
    log = compiled(tmp_path, comparison_latex(record))
    assert "Overfull" not in log


def test_latex_compiles_whatever_the_names_are(tmp_path: Path, record: Record) -> None:
    compiled(tmp_path, comparison_latex(nasty(record)))


def test_latex_is_escaped_and_structured(record: Record) -> None:
    assert latex("a_b & 50% {x} \\y") == r"a\_b \& 50\% \{x\} \textbackslash{}y"
    assert latex("é 中\n[z]") == "e U+4E2D {[}z{]}"
    body = comparison_latex(nasty(record))
    assert body.isascii()
    assert r"\undefined" not in body.replace(r"\textbackslash{}undefined", "")
    assert body.count(r"\begin{tabular}") == body.count(r"\bottomrule") == 4
    for table in body.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l\w+)\}", table)[1])  # type: ignore[index]
        for line in re.findall(r"^(.*) \\\\$", table, re.MULTILINE):
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + spans == columns - 1
    plain = comparison_latex(record)
    assert r"\textbf{0.957}$^\dagger$" in plain
    assert plain.count(r"\textbf{0.9") == 1


# -- what is missing or hostile ----------------------------------------------------------------------------------


def test_hostile_text_stays_text(record: Record) -> None:
    evil = "</style><script>alert(1)</script>{{ 7 * 191 }}\" onload='x"
    mine = copy.deepcopy(nasty(record))
    mine["command"] = mine["best_baseline"] = mine["base"]["model"] = evil
    mine["sources"] = {evil: "toxic"}
    for row in mine["rows"]:
        row["by_source"][evil] = {"mean": 0.5}
        row["note"], row["setting"], row["options"] = evil, evil, {evil: evil}
    html = comparison_page(mine)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "1337" not in html
    assert evil in page.text()
    broken = fake_ablation()
    broken["series"][0]["name"] = broken["series"][2]["points"][0]["label"] = broken["x_label"] = evil
    page = Page(ablation_page(broken))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in printed(comparison_table({**record, "best_baseline": "\x1b[31m"}))
    assert "[red]" in printed(ablation_table({**broken, "series": [{"name": "[red]", "points": [{"label": "x"}]}]}))


def holes(value: Any, rng: random.Random) -> Any:
    """The same JSON with about one value in ten replaced by null or something of another type."""
    if rng.random() < 0.1:
        return rng.choice([None, None, "text", -1, 1e300, float("nan"), [], {}, [None], True])
    if isinstance(value, dict):
        return {key: holes(one, rng) for key, one in value.items()}
    return [holes(one, rng) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(25))
def test_no_record_is_too_broken_to_be_drawn(seed: int) -> None:
    rng = random.Random(seed)
    full = fake_comparison()
    full["rows"] = full["rows"][::3]
    record, ablation = ({k: holes(v, rng) for k, v in one.items()} for one in (full, fake_ablation()))
    for text in (comparison_page(record), ablation_page(ablation)):
        page = Page(text)
        shown = [a for tag, a in page.tags if tag in ("line", "text", "circle", "path", "polyline", "rect")]
        assert not re.search(r"\b(nan|inf)\b|[0-9]{12}", " ".join(str(v) for a in shown for v in a.values()))
    comparison_csv(record), comparison_latex(record), ablation_csv(ablation)
    assert printed(comparison_table(record)) is not None
    assert printed(ablation_table(ablation)) is not None


def test_a_comparison_without_figures_is_still_a_page() -> None:
    for record in ({}, {"rows": []}, {"rows": [{"method": "llmva"}]}):
        page = Page(comparison_page(record))
        assert "No figures yet" in page.text()
        assert "nothing to draw" in page.text() or "chart-f1" not in comparison_page(record)
        assert "No method" in printed(comparison_table(record))
    assert "no test figures yet" in printed(ablation_table({}))
    assert "nothing to draw" in Page(ablation_page({})).text()


# -- ablations ---------------------------------------------------------------------------------------------------


def test_an_ablation_is_drawn_against_x_and_by_name() -> None:
    record = fake_ablation()
    html = ablation_page(record)
    page = Page(html)
    assert html.count('class="chart"') == 6
    for key in ("f1", "asr", "orr"):
        drawn = html[html.index(f'id="chart-{key}-t"') :]
        drawn = drawn[: drawn.index("</svg>")]
        assert drawn.count("<polyline") == 2
        assert drawn.count('class="bar ') == 14
        assert ">90°</text>" in drawn
        assert "boundary" in drawn
        listed = html[html.index(f'id="chart-{key}-list-t"') :]
        listed = listed[: listed.index("</svg>")]
        assert listed.count('class="bar ') == 3
        assert "logistic regression" in listed
    first = record["series"][0]["points"][0]
    assert page.row("turned at random")[:2] == ["turned at random", "0°"]
    assert page.row("turned at random")[2].startswith(f"{first['f1']['mean']:.3f} ±{first['f1']['spread']:.3f} [")
    assert page.row("untouched model")[2:] == ["0.509", "59.0%", "45.0%"]
    assert "for “turned at random”, 90°; the untouched model has 0.509" in page.text()


def test_points_are_drawn_by_x_not_by_order() -> None:
    record = fake_ablation()
    straight = ablation_page(record)
    record["series"][0]["points"].reverse()
    assert ablation_page(record) == straight


def test_the_ablation_table_and_csv() -> None:
    record = fake_ablation()
    text = printed(ablation_table(record))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert re.search(r"^untouched model +0\.509 +59\.0% +45\.0%", text, re.MULTILINE)
    lines = list(csv.DictReader(io.StringIO(ablation_csv(record))))
    assert len(lines) == 1 + 7 + 7 + 3
    assert (lines[0]["series"], float(lines[0]["f1_mean"])) == ("untouched", 0.509)
    assert float(lines[1]["orr_high"]) == record["series"][0]["points"][0]["orr"]["interval"][1]
    assert [line["x"] for line in lines[-3:]] == ["", "", ""]


def test_an_ablation_names_no_winner_among_equals() -> None:
    points = [{"x": k, "label": str(k), "f1": f1} for k, f1 in enumerate((1.0, 0.9999, 1.0, 0.6))]
    record = {"format": 1, "kind": "ablation", "what": "layers", "x_label": "sublayers"}
    page = ablation_page(record | {"series": [{"name": "best scored", "points": points}]})
    assert "F1 is highest, 1.000, for 3 of 4 settings, and lowest, 0.600, for “best scored”, 3 sublayers." in page
    page = ablation_page(record | {"series": [{"name": "best scored", "points": points[:3]}]})
    assert "F1 is 1.000 for all 3 settings." in page
