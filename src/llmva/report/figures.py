"""The charts of a run, a comparison or an ablation as files, for papers and slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from markupsafe import Markup

from llmva import files
from llmva.errors import LlmvaError, UsageError
from llmva.report.drawing.alone import alone, svg_text
from llmva.report.drawing.pdf import pdf_bytes
from llmva.report.run.page import read_run_record, run_panels
from llmva.report.study.ablation import ablation_panels
from llmva.report.study.comparison import comparison_panels
from llmva.report.study.records import read_record

FORMATS = ("svg", "pdf")


def write_figures(directory: Path, out: Path, kind: str) -> list[Path]:
    """Write each chart of the reports in `directory` to a file of its own in `out`; return their paths.

    A chart has its title and its legend in the file. Names are those of the charts, after `compare-` and `ablate-`
    for those of studies.

    Args:
        kind: 'svg' or 'pdf'.

    Raises:
        UsageError: another kind, no record in `directory`, or one that this version cannot read.
        LlmvaError: a file cannot be written.
    """
    if kind not in FORMATS:
        raise UsageError(f"--format {kind} is unknown: use {', '.join(FORMATS)}.")
    drawn = list(_panels(directory))
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmvaError(f"'{out}' cannot be made ({error.strerror}): choose another folder.") from error
    for prefix, panel in drawn:
        name, figure = alone(panel)
        path = out / f"{prefix}{name}.{kind}"
        files.write_bytes(path, pdf_bytes(figure) if kind == "pdf" else svg_text(figure).encode("utf-8"))
        written.append(path)
    return written


def _panels(directory: Path) -> Iterator[tuple[str, Markup]]:
    """Prefix and panel of every chart in a folder."""
    kinds: tuple[tuple[str, str, Callable[[], list[Markup]]], ...] = (
        ("run.json", "", lambda: run_panels(read_run_record(directory))),
        ("compare.json", "compare-", lambda: comparison_panels(read_record(directory, "compare", "comparison"))),
        ("ablate.json", "ablate-", lambda: ablation_panels(read_record(directory, "ablate", "ablation"))),
    )
    there = [(prefix, draw) for name, prefix, draw in kinds if (directory / name).is_file()]
    if not there:
        raise UsageError(
            f"'{directory}' holds no run.json, compare.json or ablate.json: give the folder that llmva align, compare "
            "or ablate wrote."
        )
    for prefix, draw in there:
        yield from ((prefix, panel) for panel in draw())
