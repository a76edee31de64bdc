"""Whether a checkpoint on disk is the model that an edit was made from: all of its weights, without loading it.

The edited tensors are proved where they are read. This is for the others, which an edit takes for granted. Their hashes
are kept in the user's cache folder, by shard, so that they are read once: a file of the same size, times and place on
the disk is the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.files import cache_folder, write_json
from llmva.models.checkpoint import Checkpoint
from llmva.models.files.headers import DTYPES
from llmva.models.fingerprint import PACKED, own_tensors, parts_hash, slices_hash, weight_holder, whole_hash
from llmva.models.writers import PLAIN

MAX_SHARDS = 4  # at once, each with a tensor in memory
FRESH = 2.0  # seconds: a file changed so recently may change again within the same tick of its clock
FORMAT = 1


def check_weights(checkpoint: Checkpoint, edit: Edit) -> list[str]:
    """Compare every tensor with the base of an edit; returns warnings on what could not be compared.

    The edited projections are left out, since they are checked where they are read.

    Raises LlmvaError that names the first module whose weights differ.
    """
    base = edit.base
    wanted = {
        name: value
        for name, value in base.get("weights", {}).items()
        if not value.startswith(PACKED) and not (name in edit.factors and name in base.get("hashes", {}))
    }
    if not wanted:
        return []
    here = _by_holder(_stored_hashes(checkpoint).items())
    # a tied tensor may be stored once
    tied = [value for value in wanted.values() if list(wanted.values()).count(value) > 1]
    odd = [n for n, value in wanted.items() if here.get(n) != value and not (n not in here and value in tied)]
    unknown = []
    for name, value in _as_in_memory(checkpoint, odd).items() if odd else ():
        if value is None:
            unknown.append(name)
        elif value != wanted[name]:
            raise LlmvaError(
                f"The edit belongs to the model '{base.get('model')}', and {name} of '{checkpoint.folder.name}' has "
                "other weights: give the edit's own model with --base."
            )
    if not unknown:
        return []
    more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
    return [
        f"Whether {unknown[0]}{more} of '{checkpoint.folder.name}' are the weights that the edit was made on is not "
        "known: they are stored otherwise than they lie in memory."
    ]


def _by_holder(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    parts: dict[str, list[tuple[str, str]]] = {}
    for tensor, value in hashes:
        holder, inside = weight_holder(tensor)
        parts.setdefault(holder, []).append((inside, value))
    return {holder: parts_hash(pairs) for holder, pairs in parts.items()}


def _as_in_memory(checkpoint: Checkpoint, holders: list[str]) -> dict[str, str | None]:
    """Hashes of modules whose tensors have other names, or another shape, in the file; None where that is unknown."""
    pairs_of: dict[str, list[tuple[str, str]] | None] = {holder: [] for holder in holders}
    skeleton, held = checkpoint.skeleton()
    tensors = [
        (f"{module_name}.{leaf}" if module_name else leaf, tensor)
        for module_name, module in skeleton.named_modules()
        for leaf, tensor in own_tensors(module).items()
    ]
    stored_as = {id(tensor): name for name, tensor in tensors if name in held}  # of tied ones, that of one
    for name, tensor in tensors:
        holder, inside = weight_holder(name)
        pairs = pairs_of.get(holder)
        if pairs is None:
            continue
        try:
            pairs.append((inside, _hash_in_memory(list(checkpoint.parts(stored_as.get(id(tensor), name))))))
        except LlmvaError:
            pairs_of[holder] = None
    return {holder: parts_hash(pairs) if pairs else None for holder, pairs in pairs_of.items()}


def _hash_in_memory(parts: list[Tensor]) -> str:
    if len(parts) == 1:
        return whole_hash(parts[0])
    if parts[0].ndim == 1:  # a bias an expert
        return whole_hash(torch.stack(parts))
    return slices_hash(whole_hash(part) for part in parts)


def _stored_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """The `whole_hash` of every tensor of plain numbers, by its name in the files."""
    files = sorted({place.file for place in checkpoint.stored.values()})
    hashes: dict[str, str] = {}
    # a shard's sums are as fast as its reading
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, MAX_SHARDS)) as workers:
        for of_file in workers.map(lambda file: _of_file(checkpoint, file), files):
            hashes |= of_file
    return hashes


def _of_file(checkpoint: Checkpoint, file: Path) -> dict[str, str]:
    names = [n for n, place in checkpoint.stored.items() if place.file == file and DTYPES.get(place.dtype) in PLAIN]
    state = _state(file)
    kept = cache_folder() / "weights" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["format"] == FORMAT and entry["state"] == state:
            return {name: str(entry["tensors"][name]) for name in names}
    hashes = {name: whole_hash(checkpoint.tensor(name)) for name in names}
    changed = max(file.stat().st_mtime, file.stat().st_ctime)
    if _state(file) == state and time.time() - changed > FRESH:
        with suppress(OSError, LlmvaError):  # without a cache it is only slower
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"format": FORMAT, "state": state, "tensors": hashes})
    return hashes


def _state(file: Path) -> list[int]:
    """What changes with the file's content, but by the clock's tick."""
    facts = file.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_dev, facts.st_ino]
