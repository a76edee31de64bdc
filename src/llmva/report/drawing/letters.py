"""How wide text is in Helvetica, by the metrics that come with the format PDF, and its letters as PDF writes them."""

from __future__ import annotations

# Thousandths of the size of the letters, from the space to the tilde.
WIDTHS = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556, 556, 556, 556,
    556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833,
    722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556,
    556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334,
    260, 334, 584,
)  # fmt: skip
OTHER = 556  # of letters beyond, nearly all of which are letters with an accent
BOLD = 1.06  # bold letters are wider by about this


def width(text: str, size: float, bold: bool = False) -> float:
    """Units that a text is wide in letters of a size."""
    thousandths = sum(WIDTHS[ord(one) - 32] if 32 <= ord(one) < 127 else OTHER for one in text)
    return thousandths * size / 1000 * (BOLD if bold else 1.0)


def encoded(text: str) -> bytes:
    """The text in PDF's WinAnsiEncoding; a letter that it lacks is a question mark."""
    return text.replace("\N{MINUS SIGN}", "\N{EN DASH}").encode("cp1252", "replace")
