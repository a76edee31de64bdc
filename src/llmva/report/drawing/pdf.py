"""An SVG of `alone` as a PDF of one page: lines, rectangles, circles, straight paths and text in Helvetica.

It knows what our charts are made of and no more. The same figure has the same bytes.
"""

from __future__ import annotations

import re
import zlib
from xml.etree import ElementTree as ET

from llmva.report.drawing.letters import encoded, width

FONTS = {"F1": "Helvetica", "F2": "Helvetica-Bold", "F3": "Helvetica-Oblique"}
ROUND = 0.5523  # of a radius: where the handles of a quarter circle are
SCALE = 0.75  # points in a unit of the drawing


def pdf_bytes(root: ET.Element) -> bytes:
    """The contents of a PDF file."""
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    drawn = [f"{SCALE} 0 0 -{SCALE} 0 {_n(high * SCALE)} cm 1 j", *_drawn(root)]
    title = next((node.text or "" for node in root if node.tag == "title"), "")
    fonts = " ".join(f"/{key} {number} 0 R" for number, key in enumerate(FONTS, start=5))
    box = f"[0 0 {_n(wide * SCALE)} {_n(high * SCALE)}]"
    stream = zlib.compress(b"\n".join(one if isinstance(one, bytes) else one.encode("ascii") for one in drawn))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox{box}/Contents 4 0 R/Resources<</Font<<{fonts}>>>>>>".encode("ascii"),
        b"<</Length %d/Filter/FlateDecode>>\nstream\n%b\nendstream" % (len(stream), stream),
        *(
            f"<</Type/Font/Subtype/Type1/BaseFont/{name}/Encoding/WinAnsiEncoding>>".encode("ascii")
            for name in FONTS.values()
        ),
        b"<</Title %b>>" % _string(title),
    ]
    return _file(objects)


def _file(objects: list[bytes]) -> bytes:
    """Numbered objects, the table of their places, and the trailer; the first is the catalog, the last the title."""
    data, places = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"), []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start, count = len(data), len(objects)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (count + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"trailer\n<</Size %d/Root 1 0 R/Info %d 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (count + 1, count, start)
    return bytes(data)


def _drawn(node: ET.Element) -> list[str | bytes]:
    """The operators of what an element holds."""
    drawn: list[str | bytes] = []
    for child in node:
        moved = re.match(r"translate\((\S+) (\S+)\)", child.get("transform", ""))
        if child.tag == "text":
            drawn += _text(child)
        elif moved:
            drawn += [f"q 1 0 0 1 {_n(float(moved[1]))} {_n(float(moved[2]))} cm", *_drawn(child), "Q"]
        elif child.tag not in ("title", "desc"):
            drawn += _shape(child)
    return drawn


def _shape(node: ET.Element) -> list[str]:
    fill, stroke = node.get("fill", "#000000"), node.get("stroke", "none")
    outline = _outline(node)
    if node.tag == "line":
        fill = "none"
    paint = {(True, True): "B", (True, False): "f", (False, True): "S"}.get((fill != "none", stroke != "none"))
    if not outline or paint is None:
        return []
    state = [] if fill == "none" else [f"{_colour(fill)} rg"]
    if stroke != "none":
        dashes = re.sub(r"[^\d. ]", "", node.get("stroke-dasharray", ""))
        state += [f"{_colour(stroke)} RG {_n(float(node.get('stroke-width', '1')))} w [{dashes}] 0 d"]
    return [*state, outline, paint]


def _outline(node: ET.Element) -> str:
    def of(*names: str) -> list[float]:
        return [float(node.get(name, "0")) for name in names]

    if node.tag == "line":
        x1, y1, x2, y2 = of("x1", "y1", "x2", "y2")
        return f"{_n(x1)} {_n(y1)} m {_n(x2)} {_n(y2)} l"
    if node.tag == "rect":
        return f"{' '.join(map(_n, of('x', 'y', 'width', 'height')))} re"
    if node.tag == "circle":
        return _circle(*of("cx", "cy", "r"))
    if node.tag == "polyline":
        spots = [spot.split(",") for spot in node.get("points", "").split()]
        return " ".join(f"{x} {y} {'l' if i else 'm'}" for i, (x, y) in enumerate(spots))
    steps = re.findall(r"([ML])(\S+) ([^MLZ]+)", node.get("d", ""))
    closed = " h" if node.get("d", "").endswith("Z") else ""
    return " ".join(f"{x} {y} {step.lower()}" for step, x, y in steps) + closed


def _circle(x: float, y: float, r: float) -> str:
    k = ROUND * r
    corners = (
        (x + r, y + k, x + k, y + r, x, y + r),
        (x - k, y + r, x - r, y + k, x - r, y),
        (x - r, y - k, x - k, y - r, x, y - r),
        (x + k, y - r, x + r, y - k, x + r, y),
    )
    return f"{_n(x + r)} {_n(y)} m " + " ".join(f"{' '.join(map(_n, corner))} c" for corner in corners) + " h"


def _text(node: ET.Element) -> list[str | bytes]:
    """A line of text with its parts that are smaller, raised or lowered, around its anchor."""
    size, bold = float(node.get("font-size", "12")), node.get("font-weight") == "bold"
    font = "F2" if bold else "F3" if node.get("font-style") == "italic" else "F1"
    parts = [(node.text or "", size, 0.0)]
    for child in node:
        if child.tag == "tspan":
            parts.append((child.text or "", float(child.get("font-size", size)), float(child.get("dy", "0"))))
        parts.append((child.tail or "", size, 0.0))
    total = sum(width(text, letters, bold) for text, letters, _ in parts)
    x, y = float(node.get("x", "0")), float(node.get("y", "0"))
    x -= {"middle": total / 2, "end": total}.get(node.get("text-anchor", "start"), 0.0)
    drawn: list[str | bytes] = [f"{_colour(node.get('fill', '#000000'))} rg"]
    for text, letters, down in parts:
        y += down
        if text:
            drawn.append(
                f"BT /{font} {_n(letters)} Tf 1 0 0 -1 {_n(x)} {_n(y)} Tm ".encode("ascii") + _string(text) + b" Tj ET"
            )
        x += width(text, letters, bold)
    return drawn


def _string(text: str) -> bytes:
    return b"(" + re.sub(rb"([\\()])", rb"\\\1", encoded(re.sub(r"\s+", " ", text))) + b")"


def _colour(colour: str) -> str:
    return " ".join(_n(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))


def _n(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
