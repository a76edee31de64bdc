"""The edited model as a checkpoint like its base's: same shards, names and dtypes, written one tensor at a time.

The kernel copies unchanged bytes. A changed tensor is computed in float32 and rounded once. The folder gets its name
and its config.json only when everything is there.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit, Factors
from llmva.errors import LlmvaError
from llmva.export.base import check_weights
from llmva.export.folder import describe, fresh, in_workplace, written
from llmva.export.plan import Plan
from llmva.models.checkpoint import Checkpoint
from llmva.models.files.belonging import CARD, belonging, left_out
from llmva.models.files.headers import in_file_order
from llmva.models.writers import left_map
from llmva.progress import Progress
from llmva.runs.environment import peak_bytes

MARGIN = 64 * 2**20  # bytes of disk to leave free
MAX_SHARDS = 4  # at once, each with a tensor in memory
PIECE = 2**26  # bytes that the kernel copies in one call
MAX_NAMED = 5  # files that were left out, in a warning
OTHER_CARD = "README-base.md"


def export_merged(plan: Plan, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the merged model into the new folder `out`; returns facts about it.

    Only files that belong to the base model are copied (`models.files.belonging`); `left_out` and a warning name the
    others.

    Raises:
        UsageError: `out` exists already, or the base's folder cannot be read.
        LlmvaError: another base, packed weights, or too little disk. Nothing stays written then.
    """
    started = time.monotonic()
    progress = progress or Progress()
    out = fresh(out)
    others, warnings = list[str](), list[str]()
    if plan.base.endswith(".gguf"):
        with in_workplace(out) as work:
            changed, reasons = _from_gguf(plan, work)
            reasons |= _finish(plan, work)
    else:
        progress.stage("reading the base")
        if plan.edit.base.get("quantize") is not None:
            raise LlmvaError(
                f"The edit was fitted on '{plan.title}' packed to {plan.edit.base['quantize']}: export with --as lora, "
                "serve it by hook, or align the unpacked model."
            )
        checkpoint = Checkpoint.open(plan.base, trust_remote_code=plan.trust_remote_code)
        edited = edited_tensors(checkpoint, plan.edit, plan.base)
        warnings += check_weights(checkpoint, plan.edit)
        folder = checkpoint.folder
        reasons = belonging(folder, checkpoint.weights)
        others = left_out(folder, reasons)
        _check_disk(out, sum((folder / name).stat().st_size for name in reasons))
        with in_workplace(out) as work:
            changed = len(edited)
            _write_shards(checkpoint, plan, work, edited, progress)
            _copy_others(folder, work, reasons, checkpoint.weights.shards)
            if CARD in reasons:
                reasons[OTHER_CARD] = reasons.pop(CARD)
            reasons |= _finish(plan, work, folder / "config.json")
    return {
        **written(out, reasons),
        "changed": changed,
        "left_out": others,
        "warnings": [*warnings, *_of_left_out(others)],
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak_bytes(),
    }


def _copy_others(folder: Path, work: Path, reasons: Mapping[str, str], shards: tuple[str, ...]) -> None:
    """Copy what belongs to the model beside its shards; a link becomes the file that it leads to."""
    for name in reasons:
        if name in shards or name == "config.json":
            continue
        target = work / (OTHER_CARD if name == CARD else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)


def _of_left_out(others: list[str]) -> list[str]:
    if not others:
        return []
    more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    return [
        f"Left out what loaders do not read as part of the model: {', '.join(others[:MAX_NAMED])}{more}. If the model "
        "needs one of them, copy it into the folder."
    ]


@dataclass(frozen=True)
class Change:
    """How a tensor of `module` changes. `axis` runs over the outputs; the module's hash may still be `unproved`."""

    module: str
    axis: int
    factors: Factors
    unproved: bool = False


def edited_tensors(checkpoint: Checkpoint, edit: Edit, base: str) -> dict[str, Change]:
    """The tensors that the edit changes, in the base that a user knows by the name `base`.

    If all of them are stored under their modules' names, one is checked here and the others when they are read to be
    written. This saves reading them twice, and importing the model's code.

    Raises LlmvaError if the checkpoint is another base, packed, or lacks some of them.
    """
    factors, hashes = edit.factors, edit.base.get("hashes", {})
    plain = {module: checkpoint.plain(module, len(f.V)) for module, f in factors.items() if module in hashes}
    if len(plain) == len(factors) and all(plain.values()) and not checkpoint.packed:
        first = min(factors, key=lambda module: math.prod(checkpoint.stored[f"{module}.weight"].shape))
        if checkpoint.plain_hash(first) == hashes[first]:
            return {
                place.name: Change(module, place.axis, factors[module], unproved=place.axis == -2)
                for module, places in plain.items()
                for place in places or []
            }
    checkpoint.check(edit.base, factors)
    edited = {
        place.name: Change(module, place.axis, factors[module])
        for module, places in checkpoint.writers_of(factors).items()
        for place in places
    }
    for name, change in edited.items():
        if (wide := checkpoint.stored[name].shape[change.axis]) != len(change.factors.V):
            raise LlmvaError(
                f"The edit is {len(change.factors.V)} wide and {name} of '{base}' {wide}: give the edit's own "
                "model with --base."
            )
    return edited


def read_proved(checkpoint: Checkpoint, edit: Edit, name: str, change: Change) -> Tensor:
    """Read a tensor that will change. Raises LlmvaError if it is not the one that the edit was fitted on."""
    tensor = checkpoint.tensor(name)
    if change.unproved:
        here = checkpoint.plain_hash(change.module, tensor)
        if here != edit.base["hashes"][change.module]:
            raise checkpoint.another(edit.base, change.module, here)
    return tensor


def _check_disk(out: Path, size: int) -> None:
    needed = size + MARGIN
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise LlmvaError(
            f"The merged model needs {needed / 1e9:.1f} GB and '{out.parent.name or out.parent}' has {free / 1e9:.1f} "
            "free: free space or choose another --out."
        )


def _write_shards(
    checkpoint: Checkpoint, plan: Plan, work: Path, edited: Mapping[str, Change], progress: Progress
) -> None:
    """Write all shards, some at once: the kernel copies for one thread while another computes."""
    files = checkpoint.files
    count = min(len(files), os.cpu_count() or 1, MAX_SHARDS)
    stop = Event()
    # a shard's products are too small to be worth several threads each
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        jobs = [
            workers.submit(_write_shard, checkpoint, plan.edit, file, work / name, edited, stop)
            for file, name in zip(files, checkpoint.weights.shards, strict=True)
        ]
        on_progress = progress.stage("writing shards", len(files))
        try:
            for job in as_completed(jobs):
                job.result()
                on_progress(1)
        except BaseException:
            stop.set()
            workers.shutdown(cancel_futures=True)
            raise


def _write_shard(
    checkpoint: Checkpoint, edit: Edit, source: Path, target: Path, edited: Mapping[str, Change], stop: Event
) -> None:
    """Copy the file up to the next changed tensor, compute that tensor and write it in its place, and so on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        done = 0
        for name, place in in_file_order(checkpoint.stored, source):
            change = edited.get(name)
            if change is None:
                continue
            if stop.is_set():
                return
            _copy(reader.fileno(), writer.fileno(), done, place.begin)
            tensor = read_proved(checkpoint, edit, name, change)
            left_map(tensor, change.axis, change.factors.V, change.factors.U, out=tensor)
            _write(writer.fileno(), place.begin, tensor)
            done = place.end
        _copy(reader.fileno(), writer.fileno(), done, source.stat().st_size)


def _copy(reader: int, writer: int, begin: int, end: int) -> None:
    """Copy bytes `begin` to `end` to the same place, in the kernel if it can."""
    while begin < end:
        size = min(PIECE, end - begin)
        try:
            n = os.copy_file_range(reader, writer, size, begin, begin)
        except (OSError, AttributeError):  # other systems, and file systems that cannot
            n = os.pwrite(writer, os.pread(reader, size, begin), begin)
        if n == 0:
            raise LlmvaError("The base model's file became shorter while it was copied: export again.")
        begin += n


def _write(writer: int, begin: int, tensor: Tensor) -> None:
    data: Any = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(data):
        n = os.pwrite(writer, data, begin)
        data, begin = data[n:], begin + n


def _from_gguf(plan: Plan, work: Path) -> tuple[int, dict[str, str]]:
    """Unpack a .gguf in memory and save it as a plain checkpoint: it holds packed weights under names of its own."""
    from llmva.models.load import load_model

    model, tokenizer = load_model(plan.base, device="cpu", trust_remote_code=plan.trust_remote_code)
    plan.edit.bake(model)
    _check_disk(work, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    reasons = {path.relative_to(work).as_posix(): "made from the .gguf file" for path in work.rglob("*")}
    (work / "config.json").rename(work / "config.json.part")
    return len(plan.edit.factors), reasons


def _finish(plan: Plan, work: Path, config: Path | None = None) -> dict[str, str]:
    """Write card and edit, and config.json last: without it nothing loads."""
    reasons = describe(plan, "merged", work)
    if config is not None:
        shutil.copyfile(config, work / "config.json.part")
    (work / "config.json.part").rename(work / "config.json")
    return reasons
