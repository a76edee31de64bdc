"""edit.safetensors, broken with knowledge of its structure.

Every file begins as a whole one and is broken in bits, length, header (offsets, shapes, dtypes, names, duplicates,
nesting), metadata (version, best, base model) or values. What loads is cut, scaled, applied to a tiny module, run and
saved again.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fuzzing.common import EVIL, Kind, clean, cut_or_extend, evil, flip
from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.models.fingerprint import module_hash

WIDTH = 6
Pairs = list[tuple[str, Any]]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "", "x", 3, None]
NAMES = [
    "",
    ".",
    "..",
    "V",
    "a.V",
    ".V",
    "a.b.V",
    "a.b.W",
    "c.d.V",
    "a",
    "a.b",
    "__metadata__",
    "a\nb.V",
    "x" * 5000 + ".V",
]
NAMES += ["a.b.iteration", "\ud800.V", "{}.V", "%s.V", "\u202e.V"]


class Tiny(nn.Module):
    """Two sublayers, and what checks look at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Module(), nn.Module()
        self.a.b, self.c.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.config = SimpleNamespace(hidden_size=WIDTH)
        for p in self.parameters():
            p.data.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c.d(self.a.b(x))  # type: ignore[no-any-return]


def tiny() -> Tiny:
    return Tiny().requires_grad_(False).eval()


def seeds(model: Tiny) -> list[bytes]:
    """Whole files: one with hashes and a best iteration, one without, one of nothing."""
    g = torch.Generator().manual_seed(0)
    base = {
        "model": "tiny",
        "sha256": "0" * 64,
        "model_type": "llama",
        "blocks": 1,
        "hidden_size": WIDTH,
        "parameters": 78,
        "hashes": {name: module_hash(model.get_submodule(name)) for name in ("a.b", "c.d")},
    }
    edit = Edit(base=base, best=2)
    for t in (1, 2, 2, 3):
        for name in ("a.b", "c.d"):
            v, u = torch.nn.functional.normalize(torch.randn(2, WIDTH, generator=g, dtype=torch.float64), dim=1)
            edit = edit.then(name, v, u, t)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for one in (edit, Edit(edit.factors), Edit({}, base, 0)):
            found.append(one.save(folder).read_bytes())
    return found


# -- breaking an edit ------------------------------------------------------------------------------------------------


def parse(data: bytes) -> tuple[Pairs, Pairs, bytes]:
    """Header without metadata, the note inside the metadata, the body."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    note = json.loads(header.pop("__metadata__")["llmva"])
    return list(header.items()), list(note.items()), data[8 + size :]


def dumps(value: Any) -> str:
    """JSON in which a list of pairs is an object, so that names can occur twice."""
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value) + "}"
    return json.dumps(value)


def whole(header: Pairs, note: Any, body: bytes, rng: random.Random, metadata: Any = None) -> bytes:
    text = note if isinstance(note, str) else dumps(note)
    entries: Pairs = [("__metadata__", metadata if metadata is not None else {"llmva": text}), *header]
    data = dumps(entries).encode("utf-8", "surrogatepass")
    data += b" " * (rng.random() < 0.9 and -len(data) % 8)
    return struct.pack("<Q", len(data)) + data + body


def header_length(data: bytes, rng: random.Random) -> bytes:
    true = int.from_bytes(data[:8], "little")
    huge = (
        0,
        1,
        2,
        true - 1,
        true + 1,
        len(data),
        len(data) - 8,
        2**22,
        10**8,
        2**31,
        2**32 - 1,
        2**40,
        2**63,
        2**64 - 1,
    )
    return struct.pack("<Q", rng.choice(huge)) + data[8:]


def number(rng: random.Random, like: int) -> Any:
    return rng.choice((like - 1, like + 1, like * 2, rng.randrange(200), *(evil(rng) for _ in range(3))))


def tensors(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of what the header says of tensors."""
    header, note, body = parse(data)
    header = copy.deepcopy(header)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not header:
            break
        i = rng.randrange(len(header))
        name, facts = header[i]
        kind = rng.randrange(9)
        if not isinstance(facts, dict) or not {"shape", "dtype", "data_offsets"} <= facts.keys() or kind == 0:
            header[i] = (name, evil(rng))
        elif kind == 1 and isinstance(facts["shape"], list) and facts["shape"]:
            facts["shape"][rng.randrange(len(facts["shape"]))] = number(rng, WIDTH)
        elif kind == 2:
            shapes = ([], [0], [0, 10**18], [10**18, 0], [2**32, 2**32], [2**63, 2], [1] * 70, [WIDTH, WIDTH, 1], None)
            facts["shape"] = rng.choice(shapes)
        elif kind == 3 and isinstance(facts["data_offsets"], list) and facts["data_offsets"]:
            j = rng.randrange(len(facts["data_offsets"]))
            facts["data_offsets"][j] = number(rng, len(body))
        elif kind == 4:
            facts["dtype"] = rng.choice(DTYPES)
        elif kind == 5:
            header[i] = (rng.choice([*NAMES, *(n for n, _ in header)]), facts)
        elif kind == 6:
            header.append((rng.choice([name, *NAMES]), copy.deepcopy(rng.choice(header)[1])))
        elif kind == 7:
            del header[i]
        else:
            facts[rng.choice(("x", "shape", "dtype"))] = evil(rng)
    return whole(header, note, body, rng)


def sizes(data: bytes, rng: random.Random) -> bytes:
    """A whole file by the format of safetensors, of other shapes, values and dtypes than an edit has."""
    _, note, _ = parse(data)
    header: Pairs = []
    body = b""
    for name in rng.choice((["a.b"], ["c.d", "a.b"], ["a"], [""], ["e.f"], ["a.b.V"], [f"a.b{i}" for i in range(300)])):
        d, k = rng.choice((WIDTH, WIDTH, 0, 1, WIDTH + 1)), rng.choice((0, 1, 2, 9))
        for part, shape in (("V", [d, k]), ("U", [d, k]), ("iteration", [k])):
            if rng.random() < 0.05:
                continue
            shape = rng.choice((shape, shape, shape, shape, shape[::-1], [*shape, 1], [0], [10**15, 0]))
            n = 4 * math.prod(shape)
            dtype = rng.choice(("F32", "I32")) if rng.random() < 0.1 else "I32" if part == "iteration" else "F32"
            values = [rng.choice((1.0, -2.0, 0.0, 3e38, 1e-45)) for _ in range(n // 4)]
            order = sorted(rng.choice((1, 1, 2, 3, 2**31 - 1)) for _ in values)
            body += struct.pack(f"<{n // 4}i", *order) if dtype == "I32" else struct.pack(f"<{n // 4}f", *values)
            header.append(
                (f"{name}.{part}", {"dtype": dtype, "shape": shape, "data_offsets": [len(body) - n, len(body)]})
            )
    return whole(header, note, body, rng)


def values(data: bytes, rng: random.Random) -> bytes:
    header, note, body = parse(data)
    found = bytearray(body)
    evil = (
        b"\x00\x00\xc0\x7f",
        b"\x00\x00\x80\x7f",
        b"\x00\x00\x80\xff",
        b"\xff\xff\xff\x7f",
        b"\x00\x00\x00\x80",
        b"\xff" * 4,
    )
    for _ in range(rng.choice((1, 2, 5))):
        if found:
            at = 4 * rng.randrange(len(found) // 4)
            found[at : at + 4] = rng.choice((*evil, bytes(4), rng.randbytes(4)))
    return whole(header, note, bytes(found), rng)


def metadata(data: bytes, rng: random.Random) -> bytes:
    """Another note: fields of other types, twice, missing or nested; or other metadata around it."""
    header, note, body = parse(data)
    note = copy.deepcopy(note)
    kind = rng.randrange(10)
    if kind < 3:
        i = rng.randrange(len(note))
        note[i] = (note[i][0], evil(rng))
    elif kind < 6:
        base = dict(note)["base"]
        keys = ["model", "sha256", "model_type", "blocks", "hidden_size", "parameters", "hashes", "dtype", "x"]
        for _ in range(rng.choice((1, 2))):
            base[rng.choice(keys)] = evil(rng)
    elif kind == 6:
        name, value = rng.choice(note)
        note.append((name, rng.choice((value, *rng.sample(EVIL, 3)))))
    elif kind == 7:
        del note[rng.randrange(len(note))]
    elif kind == 8:
        depth = rng.choice((10, 900, 3000, 50000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        deep = opening * depth + "1" + closing * (depth * (rng.random() < 0.7))
        where = rng.choice(("{}", '{{"format": "llmva-edit", "version": 1, "best": null, "base": {{"x": {}}}}}'))
        return whole(header, where.format(deep), body, rng)
    else:
        other = (
            {},
            {"llmva": 3},
            {"llmva": None},
            {"llmva": "null"},
            {"x": "y"},
            "x",
            [],
            3,
            {"llmva": {"format": "x"}},
        )
        digits = "9" * rng.choice((30, 5000))
        texts = (
            "",
            "{",
            "[" * 99,
            '{"format": ' + digits + "}",
            "\ud800",
            f'{{"format":"llmva-edit","version":{digits}}}',
        )
        return whole(header, rng.choice(texts), body, rng, rng.choice((None, *other)))
    return whole(header, note, body, rng)


def large(data: bytes, rng: random.Random) -> bytes:
    """Much text that is cheap to write and dear to hold."""
    header, note, body = parse(data)
    n = rng.choice((10**4, 10**5, 3 * 10**5))
    kind = rng.randrange(3)
    if kind == 0:
        return whole(header, "[" + "[]," * n + "1]", body, rng)
    if kind == 1:
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        return whole([(f"{i}.V", entry) for i in range(n // 30)], note, b"", rng)
    return whole([("a.b.V", {"dtype": "F32", "shape": [1] * n, "data_offsets": [0, 4]})], note, bytes(4), rng)


Breaker = Callable[[bytes, random.Random], bytes]
BREAKERS: list[Breaker] = [
    *(flip, lambda data, rng: flip(data, rng, 8 + int.from_bytes(data[:8], "little"))),
    *(cut_or_extend, header_length, tensors, tensors, tensors, sizes, values, metadata, metadata, metadata),
]


def broken(whole_files: list[bytes], rng: random.Random) -> bytes:
    data = rng.choice(whole_files)
    if rng.random() < 0.002:
        return large(data, rng)
    data = rng.choice(BREAKERS)(data, rng)
    return flip(data, rng) if data and rng.random() < 0.1 else data


def check(path: Path, model: Tiny, again: Path) -> str:
    """The outcome for one file. Raises whatever is no clean error."""
    try:
        edit = Edit.load(path)
    except LlmvaError as error:
        return clean(error)
    for one in (edit.at(1), edit.at(2**31 - 1), edit.chosen, edit.scaled(0.5)):
        assert one.iterations <= edit.iterations
    loaded = Edit.load(edit.save(again))
    assert (loaded.best, loaded.base, loaded.factors.keys()) == (edit.best, edit.base, edit.factors.keys())
    x = torch.ones(1, WIDTH)
    before = model(x)
    try:
        with edit.apply(model):
            assert model(x).shape == x.shape
    except LlmvaError as error:
        return f"loaded, not applied: {clean(error)}"
    assert torch.equal(model(x), before), "a hook was left behind"
    assert edit.chosen.factors, "applied, and changes nothing"
    return "loaded and applied"


def kind() -> Kind:
    model = tiny()
    files = seeds(model)

    def spoil(folder: Path, rng: random.Random) -> None:
        (folder / "edit.safetensors").write_bytes(broken(files, rng))

    return Kind(
        "edits", spoil, lambda folder: check(folder / "edit.safetensors", model, folder / "again.safetensors"), room=256
    )
