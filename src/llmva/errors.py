"""What goes wrong in a way the user can mend: one sentence, and an exit code.

Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

LONGEST = 4000  # letters; what a file says may be of any length


class LlmvaError(Exception):
    """A failure of the run (exit code 1). The message is one sentence that names the mend, on one line."""

    exit_code = 1

    def __init__(self, sentence: str) -> None:
        line = " ".join(sentence.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}")


class UsageError(LlmvaError):
    """The request itself cannot be carried out: a wrong option, a missing or unusable input (exit code 2)."""

    exit_code = 2
