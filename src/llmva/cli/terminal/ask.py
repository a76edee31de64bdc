"""Questions to a person: asked on stderr, answered by a line of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from llmva.errors import LlmvaError, UsageError


def ask(question: str) -> str:
    """A line of standard input, which is UTF-8 whatever the locale says; "" at its end. Raises UsageError otherwise."""
    if question:
        print(question, end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.buffer.readline().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is not UTF-8: type or pipe UTF-8 text.") from error


def pick(points: Mapping[int, str], deeds: Mapping[str, Callable[[int], None]]) -> None:
    """Ask for a point and what to do with it, until the answer is empty. What fails is told, and another may be picked.

    Args:
        points: numbers of points, and why one cannot be picked, or "".
        deeds: by name, of which the first letters are enough.
    """
    while True:
        number = ask("Point (empty ends): ")
        if not number:
            return
        if not number.isdecimal() or int(number) not in points:
            print(f"There is no point {number}: give a number of the table.", file=sys.stderr)
            continue
        if points[int(number)]:
            print(points[int(number)], file=sys.stderr)
            continue
        word = ask(f"What now ({', '.join(deeds)}; empty picks another): ")
        chosen = [name for name in deeds if word and name.startswith(word)]
        if len(chosen) == 1:
            try:
                deeds[chosen[0]](int(number))
            except LlmvaError as error:
                print(f"error: {error}", file=sys.stderr)
        elif word:
            print(f"{word} is none of these: {', '.join(deeds)}.", file=sys.stderr)
