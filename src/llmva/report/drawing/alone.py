"""A panel of a page as a figure of its own: title, legend and chart in one SVG that needs no style sheet.

Colours are those of the pages in the light. Every property stands at its element, since programs that place figures
in papers and slides read no style sheets; what is half transparent on a page is mixed with the paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.drawing.letters import width
from llmva.report.values import printable

SHEETS = Path(__file__).parent.parent / "templates"
TITLE, WORDS, LINE, GAP = 14.0, 12.5, 18.0, 16.0  # sizes of letters, height of a line of the legend, room between keys
WIDER = 1.15  # where there is no Helvetica, a viewer takes another font
OWN = "own"  # the colour of an element's class
COLOURS = {
    "c-f1": "blue", "c-benign": "blue", "c-after": "blue", "c-toxic": "red", "c-orr": "purple", "c-kept": "green",
    "c-before": "before", "c-muted": "before", "c-ink": "ink", "c-untouched": "ink", "c-low": "low",
    "m-0": "red", "m-1": "green", "m-2": "purple", "m-3": "gold", "m-4": "slate",
}  # fmt: skip
Rule = tuple[str, str, dict[str, str]]  # name of the element or "", classes, properties; a later rule wins
RULES: tuple[Rule, ...] = (
    ("text", "", {"fill": "muted", "font-size": f"{WORDS}", "font-family": "Helvetica, Arial, sans-serif"}),
    ("text", "corner", {"font-size": "11.5", "font-style": "italic"}),
    ("text", "flagged", {"fill": "ink", "font-weight": "bold"}),
    ("text", "named", {"fill": "ink", "font-weight": "bold"}),
    ("text", "strength", {"font-size": "10"}),
    ("", "grid", {"stroke": "rule", "stroke-width": "1"}),
    ("", "axis", {"stroke": "before", "stroke-width": "1"}),
    ("", "boundary", {"stroke": "ink", "stroke-width": "1.2", "stroke-dasharray": "4 3"}),
    ("", "flag", {"stroke": "ink", "stroke-width": "1.3"}),
    ("", "line", {"fill": "none", "stroke": OWN, "stroke-width": "2"}),
    ("", "mark", {"fill": OWN, "stroke": "paper", "stroke-width": ".8"}),
    ("", "mark ring", {"fill": "paper", "stroke": OWN, "stroke-width": "1.6"}),
    ("", "mark cross", {"fill": "none", "stroke": OWN, "stroke-width": "1.7"}),
    ("", "mark c-low", {"stroke": "blue"}),
    ("", "mark hollow", {"fill": "paper", "stroke": OWN, "stroke-width": "1.6"}),
    ("", "cell", {"fill": "blue"}),
    ("", "unknown", {"fill": "none", "stroke": "rule", "stroke-dasharray": "2 2"}),
    ("", "chosen", {"fill": "paper", "stroke": "ink", "stroke-width": "1.1"}),
    ("", "bar", {"stroke": OWN, "stroke-width": "1.3", "stroke-opacity": ".75"}),
    ("", "seed", {"fill": OWN, "fill-opacity": ".7"}),
    ("", "curve", {"fill": "none", "stroke": OWN, "stroke-width": "1.2", "stroke-dasharray": "4 3"}),
    ("", "equal", {"stroke": "muted", "stroke-width": ".7", "stroke-dasharray": "1 3"}),
)


def alone(panel: Markup) -> tuple[str, ET.Element]:
    """Name and SVG of a panel: an HTML figure with a caption, perhaps a legend, and a chart."""
    figure = ET.fromstring(printable(str(panel)))
    chart = figure.find("svg")
    caption, heading = figure.find("figcaption"), None if chart is None else chart.find("title")
    if chart is None or caption is None or heading is None:
        raise ValueError("not a panel")
    palette = _palette()
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    root.extend(node for node in chart if node.tag in ("title", "desc"))
    paper = ET.SubElement(root, "rect", {"x": "0", "y": "0", "fill": palette["paper"]})
    words = " ".join(" ".join(caption.itertext()).split())
    ET.SubElement(
        root, "text", {"x": "4", "y": f"{TITLE + 2:g}", "class": "flagged", "font-size": f"{TITLE:g}"}
    ).text = words
    top = _legend(root, figure.find("ul"), TITLE + 8)
    drawing = ET.SubElement(root, "g", {"transform": f"translate(0 {top:g})"})
    drawing.extend(node for node in chart if node.tag not in ("title", "desc"))
    height = top + float(chart.get("viewBox", "0 0 0 0").split()[3])
    size = {"width": f"{svg.WIDTH}", "height": f"{height:g}"}
    paper.attrib.update(size)
    root.attrib.update(size, viewBox=f"0 0 {svg.WIDTH} {height:g}", role="img")
    for node in root.iter():
        _dress(node, palette)
    return heading.get("id", "").removeprefix("chart-").removesuffix("-t"), root


def svg_text(root: ET.Element) -> str:
    """The SVG as the contents of a file."""
    return ET.tostring(root, encoding="unicode") + "\n"


def _legend(root: ET.Element, items: ET.Element | None, top: float) -> float:
    """Draw the keys in as many lines as they need; return where the last line ends."""
    x, lines = 4.0, 0
    for item in () if items is None else items:
        icon = item.find("svg")
        left, _, wide, _ = (0.0,) * 4 if icon is None else map(float, icon.get("viewBox", "0 0 0 0").split())
        words = " ".join("".join(item.itertext()).split())
        taken = wide + 4 + WIDER * width(words, WORDS)
        if lines == 0 or x + taken > svg.WIDTH:
            x, lines = 4.0, lines + 1
        y = top + LINE * (lines - 1)
        if icon is not None:
            mark = ET.SubElement(root, "g", {"transform": f"translate({x - left:g} {y:g})", "class": "key"})
            mark.extend(icon)
        ET.SubElement(root, "text", {"x": f"{x + wide + 4:g}", "y": f"{y + 11.5:g}"}).text = words
        x += taken + GAP
    return top + LINE * lines + 4


def _dress(node: ET.Element, palette: Mapping[str, str]) -> None:
    """Give an element the properties of its classes."""
    classes = set(node.get("class", "").split())
    own = next((palette[COLOURS[name]] for name in sorted(classes) if name in COLOURS), palette["ink"])
    properties: dict[str, str] = {}
    for name, needed, values in RULES:
        if name in ("", node.tag) and set(needed.split()) <= classes and (name or needed):
            properties.update(values)
    properties = {key: own if value == OWN else palette.get(value, value) for key, value in properties.items()}
    node.attrib.update({key: value for key, value in properties.items() if key not in node.attrib})
    for key in ("fill", "stroke"):
        opacity = node.attrib.pop(f"{key}-opacity", None)
        if opacity is not None:
            node.set(key, _mixed(node.get(key, own), palette["paper"], float(opacity)))


def _palette() -> dict[str, str]:
    """The pages' colours in the light, by name."""
    sheets = [(SHEETS / name).read_text(encoding="utf-8") for name in ("style.css", "comparison.css")]
    pairs = [pair for sheet in sheets for pair in re.findall(r"--(\w+): (#[0-9a-f]+)", sheet.partition("@media")[0])]
    palette = {name: _mixed(colour, "#ffffff", 1.0) for name, colour in pairs}
    return palette | {"low": _mixed(palette["blue"], palette["paper"], svg.PALEST)}


def _mixed(colour: str, paper: str, opacity: float) -> str:
    """'#rrggbb' of a colour over paper."""
    pairs = zip(_channels(colour), _channels(paper), strict=True)
    return "#" + "".join(f"{round(opacity * above + (1 - opacity) * below):02x}" for above, below in pairs)


def _channels(colour: str) -> list[int]:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
