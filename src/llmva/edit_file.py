"""edit.safetensors: written so that equal edits have equal bytes, and read with every field checked.

It is read by numpy, so that commands which only look at it need no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmva.errors import LlmvaError, UsageError
from llmva.files import write_tensors

FORMAT = "llmva-edit"
VERSION = 1
PARTS = ("V", "U", "iteration")
LAST = 2**31 - 1  # iterations are int32
HEADER_BYTES = 2**22  # names and the base model: 40 times those of a model with 160 sublayers
FILE_BYTES = 2**32  # four times the edit of a model 16,384 wide with 252 sublayers after 30 iterations

Damaged = Callable[[str], LlmvaError]  # the error that says why a file is refused
Array = NDArray[Any]
Arrays = tuple[Array, Array, Array]  # V and U, float32 [d, k], and the iteration of each column, int32 [k]


@dataclass(frozen=True)
class Parts:
    """What the file holds; `edit.Edit` says what the fields mean."""

    factors: Mapping[str, Arrays]
    base: Mapping[str, Any]
    best: int | None
    strength: float


def edit_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "edit.safetensors"


def write_edit(path: str | Path, edit: Parts) -> Path:
    """Write `edit.safetensors` (into `path` if that is a folder), equal bytes for equal edits."""
    import torch

    path = edit_file(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in sorted(edit.factors.items()):
        tensors |= {f"{name}.{part}": torch.from_numpy(array) for part, array in zip(PARTS, parts, strict=True)}
    note: dict[str, Any] = {"format": FORMAT, "version": VERSION, "best": edit.best, "base": dict(edit.base)}
    if edit.best is not None and edit.strength != 1.0:
        note["strength"] = edit.strength
    # one entry only: safetensors does not keep the order of several
    write_tensors(path, tensors, {"llmva": json.dumps(note, sort_keys=True)})
    return path


def read_edit(path: str | Path) -> Parts:
    """Read and check an edit. Raises UsageError if there is none, LlmvaError if it is damaged or too new."""
    from safetensors import SafetensorError, safe_open

    path = edit_file(path)
    if not path.is_file():
        raise UsageError(f"There is no edit at '{path}': give the folder that llmva align wrote.")

    def damaged(why: str) -> LlmvaError:
        return LlmvaError(f"'{path}' is not a whole edit ({why}): run llmva align again or copy the file anew.")

    try:
        _check_size(path, damaged)
        with safe_open(path, framework="np") as file:
            note = json.loads(
                (file.metadata() or {}).get("llmva", "null"), object_pairs_hook=_no_twice, parse_constant=_no_number
            )
            if not isinstance(note, dict) or note.get("format") != FORMAT:
                raise LlmvaError(f"'{path}' is no llmva edit: give the folder that llmva align wrote.")
            version = note.get("version")
            if type(version) is int and version > VERSION:
                raise LlmvaError(
                    f"'{path}' is of format version {_short(version)} and this llmva reads {VERSION}: update llmva."
                )
            if type(version) is not int or version < 1:
                raise damaged(f"version {_short(version)}")
            names = sorted(file.keys())
            _check_header({key: file.get_slice(key) for key in names}, damaged)
            # copies, since the arrays may lie in the file, which may be replaced while they are in use
            arrays = {key: np.array(file.get_tensor(key)) for key in names}
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise damaged(type(error).__name__) from error
    base, best = note.get("base"), note.get("best")
    if not isinstance(base, dict) or not _is_base(base):
        raise damaged("no base model")
    if best is not None and (type(best) is not int or not 0 <= best <= LAST):
        raise damaged(f"best iteration {_short(best)}")
    strength = note.get("strength", 1.0)
    if type(strength) not in (int, float) or not 0 <= strength < float("inf"):
        raise damaged(f"strength {_short(strength)}")
    factors, hashes = _factors(arrays, damaged), base.get("hashes")
    # a name that was not hashed may be a module that nothing calls, whose hook would do nothing
    if hashes and (strange := [name for name in factors if name not in hashes]):
        raise damaged(f"{_short(strange[0])[1:-1]} is of no sublayer of its base model")
    return Parts(factors, base, best, float(strength))


def _check_size(path: Path, damaged: Damaged) -> None:
    """Refuse by the sizes that the file claims, before anything of it is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size > FILE_BYTES or header > HEADER_BYTES:
        raise damaged("too large")


def _check_header(slices: Mapping[str, Any], damaged: Damaged) -> None:
    """Check names, dtypes and shapes, which come in threes, as the header states them."""
    names = {key.rsplit(".", 1)[0] for key in slices}
    for name in sorted(names):
        if not name or any(f"{name}.{part}" not in slices for part in PARTS):
            raise damaged(f"{_short(name)[1:-1]} lacks a factor")
        parts = [slices[f"{name}.{part}"] for part in PARTS]
        V, U, iteration = (part.get_shape() for part in parts)
        dtypes = [part.get_dtype() for part in parts]
        # a factor without columns would be an edit that touches nothing, silently
        if len(V) != 2 or 0 in V or U != V or iteration != V[1:] or dtypes != ["F32", "F32", "I32"]:
            raise damaged(f"{_short(name)[1:-1]} has wrong shapes or dtypes")
    if unexpected := set(slices) - {f"{name}.{part}" for name in names for part in PARTS}:
        raise damaged(f"unexpected tensor {_short(min(unexpected))[1:-1]}")


def _factors(arrays: Mapping[str, Array], damaged: Damaged) -> dict[str, Arrays]:
    """Group arrays by sublayer and check finiteness and the order of columns."""
    factors = {}
    for name in sorted({key.rsplit(".", 1)[0] for key in arrays}):
        V, U, iteration = (arrays[f"{name}.{part}"] for part in PARTS)
        if not (np.isfinite(V).all() and np.isfinite(U).all()):
            raise damaged(f"{_short(name)[1:-1]} holds NaN")
        if int(iteration[0]) < 0 or bool((iteration[1:] < iteration[:-1]).any()):
            raise damaged(f"{_short(name)[1:-1]} has columns out of order")
        factors[name] = (V, U, iteration)
    return factors


def _is_base(base: Mapping[str, Any]) -> bool:
    """Whether the fields that messages, exports and checks use have their types, and fit into one line."""
    hashes, weights = base.get("hashes", {}), base.get("weights", {})
    texts = [base.get(name, "") for name in ("model", "sha256", "model_type", "dtype")]
    numbers = [base.get(name, 0) for name in ("blocks", "hidden_size", "parameters")]
    return (
        isinstance(hashes, dict)
        and isinstance(weights, dict)
        and all(
            isinstance(text, str) and _one_line(text)
            for text in (*texts, *hashes, *hashes.values(), *weights, *weights.values())
        )
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


def _one_line(text: str) -> bool:
    return len(text) <= 4096 and text.splitlines() in ([], [text]) and "\0" not in text


def _short(value: object) -> str:
    """What a file says, quoted, so that a message stays one short line."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
