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
    """List the unpacked .gguf files that llmva keeps, so that none is unpacked twice, or remove them."""
    from llmva.cli.terminal.console import emit, say
    from llmva.files import cache_folder
    from llmva.models.files.unpacked import clean as remove
    from llmva.models.files.unpacked import entries

    place, kept = str(cache_folder()), entries()
    if clean:
        freed = remove()
        if output.json:
            emit({"folder": place, "freed_bytes": freed})
        elif not output.quiet:
            say(f"{_size(freed)} freed in {place}")
        return
    if output.json:
        emit({"folder": place, "entries": [{"file": e.name, "dtype": e.dtype, "bytes": e.size} for e in kept]})
    elif not output.quiet:
        lines = [f"{entry.name}  {entry.dtype}  {_size(entry.size)}" for entry in kept]
        say("\n".join([*lines, f"{_size(sum(entry.size for entry in kept))} in {place}"]))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
