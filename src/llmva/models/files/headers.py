"""What a safetensors file holds, read from its header and checked, without a memory map."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmva.errors import LlmvaError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_headers(files: Iterable[Path]) -> tuple[dict[str, Stored], set[str]]:
    """Each tensor's place, and the names of tensors that lie in more than one file, of which the last counts."""
    stored: dict[str, Stored] = {}
    twice: set[str] = set()
    for file in files:
        header = read_header(file)[1]
        twice |= stored.keys() & header.keys()
        stored |= header
    return stored, twice


def read_header(file: Path) -> tuple[int, dict[str, Stored]]:
    """Where the data begins, and each tensor's place. Raises LlmvaError where the file is no whole safetensors file."""
    not_whole = LlmvaError(f"'{file}' is no whole safetensors file: download the model again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise not_whole
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise not_whole
        try:
            header = json.loads(stream.read(length))
            begin = 8 + length
            stored = {name: _entry(file, begin, entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise not_whole from error
    last = begin
    for place in sorted(stored.values(), key=lambda place: (place.begin, place.end)):
        bits = DTYPES[place.dtype].itemsize * math.prod(place.shape) if place.dtype in DTYPES else None
        if not last <= place.begin <= place.end <= size or (bits is not None and bits != place.end - place.begin):
            raise not_whole
        last = place.end
    return begin, stored


def _entry(file: Path, begin: int, entry: Any) -> Stored:
    first, last = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (first, last, *shape)):
        raise ValueError("no tensor")
    return Stored(file, dtype, shape, begin + first, begin + last)


def in_file_order(stored: Mapping[str, Stored], file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of one shard, by their place in it."""
    mine = [(name, place) for name, place in stored.items() if place.file == file]
    yield from sorted(mine, key=lambda pair: pair[1].begin)
