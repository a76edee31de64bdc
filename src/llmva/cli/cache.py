"""`llmva cache`: the unpacked .gguf files that llmva keeps."""

from __future__ import annotations

from typing import Annotated

import typer

from llmva.cli.options import Output


def cache(
    *,
    clean: Annotated[bool, typer.Option("--clean", help="Remove them all.")] = False,
    output: Output,
) -> None:
    """List or remove the unpacked .gguf files that llmva keeps.

    They are kept so that none is unpacked twice.
    """
    from llmva.cli.terminal.console import emit, say
    from llmva.files import cache_folder
    from llmva.models.files.unpacked import clean as remove
    from llmva.models.files.unpacked import entries
    from llmva.report.values import size

    place, kept = str(cache_folder()), entries()
    if clean:
        freed = remove()
        if output.json:
            emit({"folder": place, "freed_bytes": freed})
        elif not output.quiet:
            say(f"{size(freed)} freed in {place}")
        return
    if output.json:
        emit({"folder": place, "entries": [{"file": e.name, "dtype": e.dtype, "bytes": e.size} for e in kept]})
    elif not output.quiet:
        lines = [f"{entry.name}  {entry.dtype}  {size(entry.size)}" for entry in kept]
        say("\n".join([*lines, f"{size(sum(entry.size for entry in kept))} in {place}"]))
