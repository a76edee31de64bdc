"""An answer on stdout: word by word on a terminal, whole elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llmva.cli.terminal.console import say, write

if TYPE_CHECKING:
    from llmva.models.chat import AnswerReader

BROKEN = "\N{REPLACEMENT CHARACTER}"  # the end of a text whose last letter is not whole yet


class Answer:
    """A streamer as `generate` of transformers calls it. Thoughts are not shown.

    Args:
        title: what stands before the answer.
        shown: False shows nothing at all, as with --json.
    """

    def __init__(self, reader: AnswerReader, title: str, shown: bool) -> None:
        self.reader, self.title, self.shown = reader, title, shown
        self.streams = shown and sys.stdout.isatty()
        self.written = ""
        self.restart()

    def restart(self) -> None:
        """The answer is generated again, at greater length: what was written stays."""
        self.row: list[int] = []
        self.prompt_is_next = True

    def put(self, tokens: Any) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.row += tokens.flatten().tolist()
        if self.streams:
            self._write((self.reader.so_far(self.row) or "").strip().rstrip(BROKEN))

    def end(self) -> None:
        """Transformers calls it; `finish` ends the line."""

    def finish(self, answer: str) -> None:
        """Write what is left of the answer."""
        if not self.streams:
            if self.shown:
                say(f"{self.title}{answer}")
            return
        if not answer.startswith(self.written):  # its end told that its beginning was no answer
            write("\n")
            self.written = ""
        self._write(answer)
        write("\n")

    def _write(self, text: str) -> None:
        if text.startswith(self.written) and text != self.written:
            write(f"{'' if self.written else self.title}{text[len(self.written) :]}")
            self.written = text
