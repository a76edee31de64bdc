"""`llmva figures`: the charts of the reports as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmva.cli.options import Output


def figures(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, a comparison or an ablation.")],
    *,
    kind: Annotated[str, typer.Option("--format", metavar="svg|pdf", help="Write files of this format.")] = "svg",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write to this folder.", show_default="DIR/figures")
    ] = None,
    output: Output,
) -> None:
    """Write the charts of a report to files, one each.

    With title and legend, for papers and slides.
    """
    from llmva.cli.terminal.console import emit, show
    from llmva.report.figures import write_figures

    written = [str(path) for path in write_figures(directory, out or directory / "figures", kind)]
    if output.json:
        emit({"figures": written})
    else:
        show(output, *(written or ["There is nothing to draw yet."]))
