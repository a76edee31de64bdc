"""Broken files: the readers refuse them in one line or give a working result. `benchmarks/fuzz.py` tries far more."""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmva.edit import Edit
from llmva.errors import LlmvaError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(str(BENCHMARKS))
    fuzz: Any = import_module("fuzzing.edits")
    script: Any = import_module("fuzz")


@pytest.fixture(scope="module")
def model() -> Any:
    return fuzz.tiny()


@pytest.fixture(scope="module")
def files(model: Any) -> list[bytes]:
    found: list[bytes] = fuzz.seeds(model)
    return found


def outcome(data: bytes, model: Any, folder: Path) -> str:
    path = folder / "edit.safetensors"
    path.write_bytes(data)
    found: str = fuzz.check(path, model, folder / "again.safetensors")
    return found


def test_the_files_that_are_broken_are_whole(model: Any, files: list[bytes], tmp_path: Path) -> None:
    found = [outcome(data, model, tmp_path) for data in files]
    assert found == ["loaded and applied", "loaded and applied", "loaded, not applied: refused (LlmvaError)"]
    for data in files[:2]:  # taken apart and put together again
        header, note, body = fuzz.parse(data)
        assert outcome(fuzz.whole(header, note, body, random.Random(0)), model, tmp_path) == "loaded and applied"


def test_thousands_of_broken_edits(model: Any, files: list[bytes], tmp_path: Path) -> None:
    rng = random.Random(7)
    outcomes = Counter(outcome(fuzz.broken(files, rng), model, tmp_path) for _ in range(1000))
    assert outcomes["refused (LlmvaError)"] > 300
    assert outcomes["loaded and applied"] > 15  # not all are refused at the door
    assert outcomes["loaded, not applied: refused (LlmvaError)"] > 15


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("model", "sha256", "model_type", "blocks", "hidden_size", "parameters", "hashes", "dtype")
NAMES = st.sampled_from(["a.b", "c.d"]) | st.text(max_size=6)
TENSORS = st.lists(
    st.tuples(
        st.builds("{}.{}".format, NAMES, st.sampled_from(["V", "U", "iteration", "W"])) | st.text(max_size=6),
        st.sampled_from(fuzz.DTYPES[:11]) | JSON,
        st.lists(st.integers(0, 2**64) | st.sampled_from([0, 1, 6]), max_size=3) | JSON,
        st.tuples(st.integers(-4, 64), st.integers(-4, 64)) | JSON,
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2),
    tensors=st.none() | TENSORS,
    note=st.dictionaries(st.sampled_from(["format", "version", "best", "base", "x"]), JSON, max_size=3),
    base=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    body=st.none() | st.binary(max_size=80),
    tail=st.binary(max_size=8),
)
def test_any_header_note_and_body(
    model: Any,
    files: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tensors: list[tuple[str, Any, Any, Any]] | None,
    note: dict[str, Any],
    base: dict[str, Any],
    body: bytes | None,
    tail: bytes,
) -> None:
    header, known, whole = fuzz.parse(files[seed])
    if tensors is not None:
        header = [(n, {"dtype": d, "shape": s, "data_offsets": o}) for n, d, s, o in tensors]
    fields = {**dict(known), "base": {**dict(known)["base"], **base}, **note}
    data = fuzz.whole(header, list(fields.items()), (whole if body is None else body) + tail, random.Random(0))
    outcome(data, model, tmp_path_factory.getbasetemp())


def note_of(files: list[bytes], **changes: Any) -> bytes:
    header, note, body = fuzz.parse(files[0])
    return bytes(fuzz.whole(header, list({**dict(note), **changes}.items()), body, random.Random(0)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": True}, "best iteration True"),
        ({"best": 2**31}, "best iteration 2147483648"),  # torch cannot compare int32 with what is beyond it
        ({"best": 10**40}, "best iteration beyond 64 bits"),
        ({"version": True}, "version True"),
        ({"version": 0}, "version 0"),
        ({"version": "x" * 99999}, "version 'xxx"),
        ({"version": 10**40}, "update llmva"),
        ({"base": {"model": 3}}, "no base model"),
        ({"base": {"model": "a\nb"}}, "no base model"),
        ({"base": {"hashes": {"a.b": 3}}}, "no base model"),
        ({"base": {"hidden_size": "6"}}, "no base model"),
        ({"base": {"hidden_size": math.nan}}, "ValueError"),
        ({"base": {"hashes": {"a.b": "0"}}}, "c.d is of no sublayer"),
    ],
)
def test_wrong_notes(files: list[bytes], changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(note_of(files, **changes))
    with pytest.raises(LlmvaError, match=words) as caught:
        Edit.load(path)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_factor_without_columns_is_refused(files: list[bytes], tmp_path: Path) -> None:
    """It would apply, and change nothing."""
    header = [
        (f"a.b.{part}", {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]})
        for part, dtype, shape in (("V", "F32", [6, 0]), ("U", "F32", [6, 0]), ("iteration", "I32", [0]))
    ]
    _, note, _ = fuzz.parse(files[0])
    path = tmp_path / "edit.safetensors"
    path.write_bytes(fuzz.whole(header, note, b"", random.Random(0)))
    with pytest.raises(LlmvaError, match=r"a\.b has wrong shapes"):
        Edit.load(path)


def test_a_folder_with_braces_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "{}{0}{x}%s" / "edit.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"x")
    with pytest.raises(LlmvaError, match=r"\{x\}%s"):
        Edit.load(path)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from safetensors import safe_open
from llmva.edit import Edit
from llmva.errors import LlmvaError
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, resource.RLIM_INFINITY))
for path in sys.argv[1:]:
    try:
        Edit.load(path)
        print("loaded")
    except LlmvaError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit memory")
def test_memory_is_not_taken_on_a_files_word(files: list[bytes], tmp_path: Path) -> None:
    """128 MB are left: enough for small files, whatever they claim."""
    header, note, body = fuzz.parse(files[0])
    claims = {
        "header": struct.pack("<Q", 2**62) + files[0][8:],
        "shape": fuzz.whole(
            [("a.b.V", {"dtype": "F32", "shape": [2**30, 2**10], "data_offsets": [0, 2**42]})],
            note,
            body,
            random.Random(0),
        ),
        "long": struct.pack("<Q", 2**23) + b'{"__metadata__":{"llmva":"' + b"[]," * 2**21 + b'"}}',
        "nested": fuzz.whole(header, "[" + "[]," * 10**6 + "1]", body, random.Random(0)),
        "deep": fuzz.whole(header, "[" * 10**6, body, random.Random(0)),
    }
    paths = []
    for name, data in claims.items():
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(data)
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as file:
        file.write(files[0])
        file.truncate(2**36)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, [*paths, sparse])], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths) + 1
    assert all("is not a whole edit" in line or "is no llmva edit" in line for line in lines), lines


@pytest.mark.parametrize("name", script.all_kinds())
def test_every_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few dozen of each, most of which are refused, and some of which are whole enough."""
    monkeypatch.setattr(script, "limit_memory", lambda room: None)
    kind = script.all_kinds()[name]
    outcomes, slowest, _ = script.fuzz(kind, 60, random.Random(5), tmp_path)
    assert not [outcome for outcome in outcomes if outcome.startswith("FAULT")], outcomes
    assert sum(n for outcome, n in outcomes.items() if "refused" in outcome) > 20
    assert slowest < script.SECONDS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["runs", "prompts", "prompt-sets", "configs", "tokenizers", "checkpoints"])
def test_what_is_broken_was_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every file would be refused for the same reason."""
    for module in ("runs", "prompts", "models"):
        monkeypatch.setattr(f"fuzzing.{module}.change", lambda tree, *_: tree)
        monkeypatch.setattr(f"fuzzing.{module}.json_file", lambda tree, _: json.dumps(tree).encode(), raising=False)
    kind, outcomes = script.all_kinds()[name], Counter[str]()
    for seed in range(24):
        for path in tmp_path.iterdir():
            path.unlink()
        kind.spoil(tmp_path, random.Random(seed))
        outcomes[kind.check(tmp_path)] += 1
    assert outcomes["read"] >= 2


def test_the_templates_that_are_broken_were_whole(tmp_path: Path) -> None:
    models: Any = sys.modules["fuzzing.models"]
    for text in models.TEMPLATES:
        (tmp_path / "chat_template.jinja").write_text(text)
        assert models.check_template_file(tmp_path) == "rendered"


def test_faults_are_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By exception, and by a refusal that hides a lack of memory."""
    monkeypatch.setattr(script, "limit_memory", lambda room: None)
    common: Any = sys.modules["fuzzing.common"]

    def check(folder: Path) -> str:
        if (folder / "file").read_text() == "crash":
            raise KeyError("crash")
        refusal = LlmvaError("This is too large: make it smaller.")
        refusal.__cause__ = MemoryError()
        return str(common.clean(refusal))

    def spoil(folder: Path, rng: random.Random) -> None:
        (folder / "file").write_text(rng.choice(("crash", "large")))

    outcomes, _, _ = script.fuzz(common.Kind("kind", spoil, check), 20, random.Random(0), tmp_path)
    assert sorted(outcome.split(":")[0] for outcome in outcomes) == ["FAULT AssertionError", "FAULT KeyError"]
    assert sorted(path.joinpath("file").read_text() for path in tmp_path.iterdir()) == ["crash", "large"]
