"""Values that programs do not expect, and the ways in which any file breaks."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError

EVIL: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40),
    *(0.5, 1e308, math.nan, math.inf, "", "x", "1", "a.b", "\n", "a\nb", "\x00", "\u2028", "\ud800"),
    *("é" * 50, "x" * 9999, "../x", "/x", "{}", "%s"),
    *([], [1], [[]], {}, {"a": 1}, {"": None}, {"a.b": 3}, {"a.b": "0"}, [None, "x"]),
]


@dataclass(frozen=True)
class Kind:
    """One kind of file: `spoil` puts a broken one into a folder, `check` reads it and says how that went.

    `check` raises whatever is neither a clean error nor a working result. `room` is in MB.
    """

    name: str
    spoil: Callable[[Path, random.Random], None]
    check: Callable[[Path], str]
    room: int = 1024


def evil(rng: random.Random) -> Any:
    """A copy, since what holds it may be changed again."""
    return copy.deepcopy(rng.choice(EVIL))


def flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """One to eight bytes changed, before `end`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(min(end or len(changed), len(changed)))
        changed[at] = rng.randrange(256) if rng.random() < 0.5 else changed[at] ^ (1 << rng.randrange(8))
    return bytes(changed)


def cut_or_extend(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        return data[: rng.randrange(len(data))]
    return data + rng.randbytes(rng.choice((1, 4, 8, 100, 10000)))


def change(tree: Any, rng: random.Random, strangers: tuple[Any, ...] = ()) -> Any:
    """A copy of a JSON value with one to four of its parts gone, replaced, renamed, copied or moved elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 4))):
        spot, key = _spot(tree, rng)
        if key is None:
            continue
        kind = rng.random()
        if kind < 0.15:
            del spot[key]
        elif kind < 0.25 and isinstance(spot, dict):
            spot[rng.choice(("", "x", f"{key}s", *map(str, spot)))] = spot.pop(key)
        elif kind < 0.35:
            other, from_key = _spot(tree, rng)
            spot[key] = copy.deepcopy(other[from_key]) if from_key is not None else None
        elif kind < 0.5 and type(spot[key]) is int:
            spot[key] = rng.choice((-1, 0, 1, spot[key] + 1, spot[key] - 1, spot[key] * 2, rng.randrange(300)))
        elif strangers and kind < 0.7:
            spot[key] = copy.deepcopy(rng.choice(strangers))
        else:
            spot[key] = evil(rng)
    return tree


def _spot(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container in the tree and one of its keys; None for a key where there is none."""
    spot = tree
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot))) if isinstance(spot, list) else []
        if not keys:
            return spot, None
        key = rng.choice(keys)
        if isinstance(spot[key], dict | list) and spot[key] and rng.random() < 0.7:
            spot = spot[key]
            continue
        return spot, key


def json_file(value: Any, rng: random.Random) -> bytes:
    """The value as JSON, now and then broken as a text."""
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = rng.randrange(12)
    if kind == 0:
        return flip(data, rng)
    if kind == 1:
        return cut_or_extend(data, rng)
    if kind == 2:
        deep = rng.choice((b"[", b'{"a":')) * rng.choice((10, 1000, 100_000))
        return rng.choice(
            (b"", b"{}", b"[]", b"null", b'"x"', b"9" * 5000, b"\xff\xfe{}", b"\xef\xbb\xbf" + data, deep)
        )
    return data


def clean(error: LlmvaError) -> str:
    """How a refusal is counted.

    Raises AssertionError for one that is no sentence of its own, or comes from a lack of memory or time.
    """
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError | TimeoutError), f"refused after {cause!r}"
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    assert len(text.splitlines()) == 1, f"not one line: {text[:200]!r}"
    assert len(text) < 9999, f"too long: {text[:200]!r}"
    assert text.endswith("."), text[-200:]
    return f"refused ({type(error).__name__})"
