"""What goes wrong in a way the user can mend: one sentence, and an exit code.

Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class LlmvaError(Exception):
    """A failure of the run (exit code 1). The message is one sentence that names the mend."""

    exit_code = 1


class UsageError(LlmvaError):
    """The request itself cannot be carried out: a wrong option, a missing or unusable input (exit code 2)."""

    exit_code = 2
