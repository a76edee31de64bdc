"""Where a run says what it is doing. The loop talks to this interface; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Progress:
    """Says nothing; the base of what the command line shows."""

    def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Callable[[int], None]:
        """A piece of work of `total` units begins; the returned function is told as they are done."""
        return lambda n: None

    def iteration(self, record: Mapping[str, Any], best: int, limit: int) -> None:
        """An iteration was measured; `best` is the one that would be kept now, of `limit` at most."""

    def note(self, text: str) -> None:
        """One sentence that the user should know."""
