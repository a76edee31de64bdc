"""`llmva figures`: the charts of reports as files that need no style sheet and no page."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from llmva.errors import LlmvaError, UsageError
from llmva.report.drawing.alone import alone
from llmva.report.drawing.letters import encoded, width
from llmva.report.drawing.pdf import pdf_bytes
from llmva.report.figures import write_figures
from llmva.report.run.page import run_panels
from llmva.report.study.comparison import comparison_panels
from test_comparison_report import fake_ablation, fake_comparison
from test_report import fake_run

OF_RUN = [
    "rise", "fall", "strength", "front", "angle-attention", "angle-mlp", "scores-attention", "scores-mlp",
    "projection-before", "projection-after",
]  # fmt: skip


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    point = {"iteration": 1, "strength": 1, "on_front": True, "chosen": True, "point": 1, "asr": 0.1, "orr": 0.2}
    return {**fake_run(), "front": [point, {**point, "point": 0, "chosen": False, "asr": 0.5}]}


@pytest.fixture(scope="module")
def folder(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("figures")
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "compare.json").write_text(json.dumps(fake_comparison()))
    (directory / "ablate.json").write_text(json.dumps(fake_ablation()))
    return directory


def contents(data: bytes) -> bytes:
    """The operators of a PDF's page."""
    found = re.search(rb"/Length (\d+)/Filter/FlateDecode>>\nstream\n", data)
    assert found
    return zlib.decompress(data[found.end() : found.end() + int(found[1])])


def test_every_chart_becomes_a_file(folder: Path, command: Any, tmp_path: Path) -> None:
    for kind in ("svg", "pdf"):
        done = command("figures", folder, "--format", kind, "--out", tmp_path, "--json")
        assert done.code == 0, done.err
        written = [Path(path) for path in json.loads(done.out)["figures"]]
        assert all(path.is_file() and path.parent == tmp_path for path in written)
        names = [path.name.removesuffix(f".{kind}") for path in written]
        assert names[: len(OF_RUN)] == OF_RUN
        assert {"compare-plane", "compare-f1", "ablate-f1", "ablate-asr", "ablate-orr"} <= set(names)
        assert len(set(names)) == len(names)
    assert command("figures", folder).code == 0
    assert (folder / "figures" / "front.svg").is_file()


def test_a_figure_has_all_that_a_page_gives_its_chart(record: dict[str, Any]) -> None:
    """Title, legend and colours, with nothing left to a style sheet."""
    for panel in [*run_panels(record), *comparison_panels(fake_comparison())]:
        _, root = alone(panel)
        html = ET.fromstring(str(panel))
        words = " ".join(" ".join(root.itertext()).split())
        for item in [*html.iter("strong"), *html.iter("li")]:
            assert " ".join("".join(item.itertext()).split()) in words
        assert all(len(html.findall(f".//{tag}")) <= len(root.findall(f".//{tag}")) for tag in ("circle", "path"))
        for node in root.iter():
            if node.tag in ("circle", "path", "rect"):
                assert re.fullmatch("none|#[0-9a-f]{6}", node.get("fill", "")), node.attrib
            if node.tag in ("line", "polyline"):
                assert re.fullmatch("#[0-9a-f]{6}", node.get("stroke", "")), node.attrib
            assert not [key for key in node.attrib if "opacity" in key or key == "style"]
        high = float(root.get("height", "0"))
        assert all(0 <= float(node.get("y", "0")) <= high for node in root.iter("text"))


def test_methods_of_one_colour_class_keep_it_alone() -> None:
    """What is dashed, hollow or pale on the page is so in the file."""
    name, root = alone(comparison_panels(fake_comparison())[0])
    assert name == "plane"
    curve = next(node for node in root.iter("polyline") if "curve" in node.get("class", ""))
    assert curve.get("stroke-dasharray") == "4 3"
    hollow = next(node for node in root.iter("path") if "hollow" in node.get("class", ""))
    assert hollow.get("fill") == "#ffffff"
    assert hollow.get("stroke") != "#ffffff"


def test_a_pdf_is_whole_and_the_same_each_time(record: dict[str, Any]) -> None:
    for panel in run_panels(record):
        _, root = alone(panel)
        data = pdf_bytes(root)
        assert data == pdf_bytes(alone(panel)[1])
        start = int(data.split(b"startxref\n")[1].split(b"\n")[0])
        assert data[start:].startswith(b"xref\n")
        for number, place in enumerate(re.findall(rb"(\d{10}) 00000 n", data), start=1):
            assert data[int(place) :].startswith(b"%d 0 obj\n" % number)
        drawn = contents(data)
        assert drawn.count(b"q ") == drawn.count(b"Q")
        texts = [text for node in root.iter("text") for text in node.itertext() if text.strip()]
        shown = re.findall(rb"\(((?:\\.|[^\\()])*)\) Tj", drawn)
        assert len(shown) == len(texts)
        circles = len(list(root.iter("circle")))
        assert drawn.count(b" c h\n") == circles


def test_hostile_names_stay_text() -> None:
    record = fake_comparison()
    record["rows"][0]["method"] = "evil) Tj ET \\ (<script>&\x00\N{SNOWMAN}"
    for panel in comparison_panels(record):
        _, root = alone(panel)
        assert not list(root.iter("script"))
        drawn = contents(pdf_bytes(root))
        assert rb"evil\) Tj ET \\ \(<script>&??" in drawn


def test_widths_of_letters_are_those_of_helvetica() -> None:
    assert width("A", 1000) == 667
    assert width(" i~", 1000) == 278 + 222 + 584
    assert width("A", 10, bold=True) > width("A", 10)
    assert encoded("−1°") == b"\x961\xb0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "png"), "--format png is unknown"),
        (("--format", "svg", "--out", "FILE"), "cannot be made"),
    ],
)
def test_bad_requests_are_one_sentence(words: tuple[str, ...], said: str, folder: Path, command: Any) -> None:
    place = str(folder / "run.json")
    done = command("figures", folder, *(place if word == "FILE" else word for word in words))
    assert done.code in (1, 2)
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        write_figures(tmp_path, tmp_path / "out", "svg")
    assert not (tmp_path / "out").exists()
    (tmp_path / "run.json").write_text(json.dumps({"format": "llmva-run", "version": 99}))
    with pytest.raises(LlmvaError, match="newer than this llmva"):
        write_figures(tmp_path, tmp_path / "out", "svg")
