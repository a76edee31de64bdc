"""Every run, comparison, ablation and study below a folder: a page with links, and what is not finished."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from llmva.report.estimates import estimate
from llmva.report.fitting import Fitting
from llmva.report.pages import Outcome, page, title, write_text
from llmva.report.study.headline import headline
from llmva.report.values import DASH, counted, dicts, finite, part, printable, score, share, strings

if TYPE_CHECKING:
    from rich.table import Table

STYLES = ("style.css", "comparison.css")
KINDS = (  # the file, the field and value that tell it, what it is, its page
    ("study.json", ("kind", "study"), "study", "study.html"),
    ("compare.json", ("kind", "comparison"), "comparison", "compare.html"),
    ("ablate.json", ("kind", "ablation"), "ablation", "ablate.html"),
    ("run.json", ("format", "llmva-run"), "run", "report.html"),
)
SKIPPED = ("cells", "claims", "__pycache__")


Figures = tuple[str, str, str, str]  # F1 before, F1, ASR, ORR
UNKNOWN: Figures = (DASH, DASH, DASH, DASH)


@dataclass(frozen=True)
class Entry:
    """A line of the index. `state` is "finished", "at work" or "stands still"; texts are ready to be shown."""

    kind: str
    path: str  # below the folder
    model: str
    state: str
    changed: float  # seconds since 1970
    figures: Figures = UNKNOWN
    said: str = ""
    page: str = ""  # below the folder, as a link; "" if there is none


def entries(folder: Path, at_work: Callable[[Path], bool] = lambda place: False) -> list[Entry]:
    """What lies below a folder, last changed first. The runs of a comparison and of an ablation are part of it.

    Args:
        at_work: whether a process works in a folder.
    """
    return sorted(_below(folder, folder, at_work), key=lambda entry: (-entry.changed, entry.path))


def _below(folder: Path, top: Path, at_work: Callable[[Path], bool]) -> Iterator[Entry]:
    for where, folders, files in os.walk(folder):
        place, names = Path(where), set(files)
        named = [kind for kind in KINDS if kind[0] in names]
        for file, (field, value), kind, shown in named:
            record = _read(place / file)
            if record is not None and record.get(field) == value:
                yield _entry(kind, record, place, top, at_work, shown if shown in names else "")
        cells = "cells" in folders and "identity.json" in names
        if cells and not named:
            yield _begun(place, top, at_work)
        skipped = cells or "run.json" in names
        folders[:] = [] if skipped else sorted(f for f in folders if f not in SKIPPED and not f.startswith("."))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _entry(
    kind: str, record: dict[str, Any], place: Path, top: Path, at_work: Callable[[Path], bool], shown: str
) -> Entry:
    path = place.relative_to(top).as_posix()
    file = next(name for name, _, of, _ in KINDS if of == kind)
    named = str(record.get("title") or "Study") if kind == "study" else title(record)
    figures, said, finished = {"run": _run, "study": _study}.get(kind, _comparison)(record)
    places = [place, *(place / str(panel.get("folder")) for panel in dicts(record.get("panels")))]
    state = "finished" if finished else "at work" if any(map(at_work, places)) else "stands still"
    link = quote((f"{path}/{shown}" if path != "." else shown).encode("utf-8", "surrogateescape")) if shown else ""
    return Entry(kind, path, named, state, (place / file).stat().st_mtime, figures, said, link)


def _run(record: dict[str, Any]) -> tuple[Figures, str, bool]:
    before, after = part(record, "test", "before"), part(record, "test", "after")
    done = dicts(record.get("iterations"))
    if after:
        f1, f1_after, asr, orr = (finite(before.get("f1")), *(finite(after.get(key)) for key in ("f1", "asr", "orr")))
        return (score(f1), score(f1_after), share(asr), share(orr)), counted(len(done) - 1, "iteration"), True
    return UNKNOWN, f"{counted(max(0, len(done) - 1), 'iteration')} so far, no test figures", False


def _comparison(record: dict[str, Any]) -> tuple[Figures, str, bool]:
    """The untouched model beside our method, or the best one where ours is not among them."""
    rows = [row for row in dicts(record.get("rows")) if estimate(row.get("f1")).mean is not None]
    if not rows:
        return UNKNOWN, f"{len(dicts(record.get('series')))} series", True
    untouched = next((row for row in rows if row.get("method") == "none"), {})
    shown = next((row for row in rows if row.get("method") == "llmva"), rows[0])
    f1, asr, orr = (estimate(shown.get(key)).mean for key in ("f1", "asr", "orr"))
    return (
        (score(estimate(untouched.get("f1")).mean), score(f1), share(asr), share(orr)),
        headline(record).verdict,
        True,
    )


def _study(record: dict[str, Any]) -> tuple[Figures, str, bool]:
    rows = dicts(record.get("methods"))
    figures, _, _ = _comparison({"rows": rows})
    missing = strings(record.get("missing"))
    total = finite(record.get("cells")) or 0
    said = f"{total - len(missing):.0f} of {total:.0f} cells, {counted(len(dicts(record.get('panels'))), 'comparison')}"
    return figures, said, not missing


def _begun(place: Path, top: Path, at_work: Callable[[Path], bool]) -> Entry:
    """A comparison or an ablation whose record is not written yet."""
    cells = list((place / "cells").glob("*.json"))
    changed = max((cell.stat().st_mtime for cell in cells), default=place.stat().st_mtime)
    state = "at work" if at_work(place) else "stands still"
    path = place.relative_to(top).as_posix()
    return Entry("comparison", path, place.name, state, changed, said=f"{counted(len(cells), 'cell')} so far")


def index_table(shown: Sequence[Entry]) -> Fitting:
    """The index for a terminal."""
    return Fitting([lambda: _table(shown)], [""])


def _table(shown: Sequence[Entry]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("path", "kind", "model", "state", "changed"):
        table.add_column(head)
    for head in ("F1 before", "F1", "ASR", "ORR"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("what")
    for one in shown:
        texts = (one.path, one.kind, one.model, one.state, when(one.changed), *one.figures, one.said)
        table.add_row(*(Text(printable(text)) for text in texts))
    return table


def when(changed: float) -> str:
    """Day and time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))


def write_index(folder: Path, shown: Sequence[Entry]) -> Path:
    """Write index.html into the folder. Raises LlmvaError if it cannot be written."""
    counts = {state: sum(one.state == state for one in shown) for state in ("finished", "at work", "stands still")}
    said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    still = counts["stands still"]
    outcome = Outcome(
        counted(len(shown), "record"),
        "mixed" if still else "good",
        f"Below this folder lie {said}." if said else "Below this folder lies no run, comparison or study.",
        ("What stands still goes on with the command that began it.",) if still else (),
    )
    text = page(
        "index.html",
        STYLES,
        kind="index",
        title=folder.resolve().name,
        outcome=outcome,
        entries=shown,
        when=when,
        command=None,
        facts=[],
        limits=["Figures are of test prompts, and of different ones where runs have different prompts."],
    )
    return write_text(folder / "index.html", text)
