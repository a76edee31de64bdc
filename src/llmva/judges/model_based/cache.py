"""Judgements on disk, by content, so that nothing is judged twice and a killed run keeps every judgement.

Each judge has a file with one JSON object a line, which is only appended to. A line holds a hash of the prompt and the
answer, not their text. A kill in the middle of a line leaves a torn line: reading skips it, and its answer is judged
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path

from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Judgement, Label
from llmva.prompts.types import Prompt


def content_key(judge: str, prompt: Prompt, answer: str) -> str:
    """sha256 (hex) of all that a judgement depends on."""
    content = json.dumps([judge, prompt.text, prompt.benign, answer])
    return hashlib.sha256(content.encode()).hexdigest()


class Cache:
    """Judgements of the judge called `judge`, in `folder`/judgements. Safe to use from several threads.

    Several processes may share a file too: each line is one write in append mode.
    """

    def __init__(self, folder: Path, judge: str) -> None:
        plain = re.sub(r"[^\w.-]+", "-", judge)[:80]
        self.path = folder / "judgements" / f"{plain}-{hashlib.sha256(judge.encode()).hexdigest()[:8]}.jsonl"
        self.torn = 0  # lines that could not be read
        self._known: dict[str, Judgement] | None = None
        self._file: int | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Judgement | None:
        """The judgement kept under `key`, or None. The file is read at the first call."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(key)

    def put(self, key: str, judgement: Judgement) -> None:
        """Keep `judgement`; once this returns, a kill of the process does not lose it.

        Raises UsageError if the folder cannot be written, LlmvaError if the disk is full.
        """
        row = {"key": key, "label": judgement.label.value, "confidence": judgement.confidence}
        line = json.dumps({**row, "reason": judgement.reason}).encode() + b"\n"
        with self._lock:
            if self._known is None:
                self._known = self._read()
            if self._file is None:
                self._file = self._open()
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(0, "the disk is full")
            except OSError as error:
                raise LlmvaError(f"'{self.path}' cannot be written ({error.strerror}): free space there.") from error
            self._known[key] = judgement

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if (size := os.lseek(file, 0, os.SEEK_END)) > 0:
                os.lseek(file, size - 1, os.SEEK_SET)
                if os.read(file, 1) != b"\n":  # a torn line must not swallow the next one
                    os.write(file, b"\n")
        except OSError as error:
            raise UsageError(
                f"The cache of judgements '{self.path.parent}' cannot be written ({error.strerror}): set LLMVA_CACHE "
                "to another folder."
            ) from error
        return file

    def _read(self) -> dict[str, Judgement]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(
                f"The cache of judgements '{self.path}' cannot be read ({error.strerror}): set LLMVA_CACHE to "
                "another folder."
            ) from error
        judgements: dict[str, Judgement] = {}
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                judgement = Judgement(Label(row["label"]), float(row["confidence"]), str(row["reason"]))
                judgements[str(row["key"])] = judgement
            except (ValueError, KeyError, TypeError):
                self.torn += 1
        return judgements
