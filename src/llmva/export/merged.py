"""The edited model as a checkpoint like its base's: same shards, names and dtypes, written with one tensor in memory.

What the edit leaves alone is copied by the kernel, byte for byte. A changed tensor is computed in float32 and rounded
once. The folder gets its name, and its config.json, only when all is there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Factors
from llmva.errors import LlmvaError, UsageError
from llmva.export.card import card, embed
from llmva.export.plan import Plan
from llmva.models.checkpoint import WEIGHTS, Checkpoint, in_file_order
from llmva.models.writers import left_map
from llmva.progress import Progress
from llmva.run import peak_bytes

MARGIN = 64 * 2**20  # bytes of disk beyond what is written
PIECE = 2**26  # bytes that the kernel copies in a call
SKIPPED = ("llmva", ".cache", ".git", ".locks")  # folders that do not belong to a model


def export_merged(plan: Plan, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the merged model into the new folder `out`; returns facts about it.

    Raises:
        UsageError: `out` is there already.
        LlmvaError: another base, packed weights, or too little disk, all told before anything is written.
    """
    started = time.monotonic()
    progress = progress or Progress()
    out = fresh(out)
    if plan.base.endswith(".gguf"):
        with in_workplace(out) as work:
            changed = _from_gguf(plan, work)
            _finish(plan, work)
    else:
        progress.stage("reading the base")
        if plan.edit.base.get("quantize") is not None:
            raise LlmvaError(
                f"The edit was fitted on '{plan.title}' packed to {plan.edit.base['quantize']}: export with --as lora, "
                "serve it by hook, or align the unpacked model."
            )
        checkpoint = Checkpoint.open(plan.base)
        edited = edited_tensors(checkpoint, plan)
        others = _others(checkpoint.folder)
        _check_disk(out, sum(file.stat().st_size for file in [*checkpoint.files, *others]))
        with in_workplace(out) as work:
            changed = len(edited)
            for index, file in enumerate(checkpoint.files):
                progress.stage(f"writing {file.name} ({index + 1}/{len(checkpoint.files)})")
                _write_shard(checkpoint, file, work / file.name, edited)
            for path in others:
                target = work / path.relative_to(checkpoint.folder)
                if target == work / "README.md":
                    target = work / "README-base.md"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            _finish(plan, work, checkpoint.folder / "config.json")
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        "out": str(out),
        "files": sorted(str(path.relative_to(out)) for path in files),
        "bytes": sum(path.stat().st_size for path in files),
        "changed": changed,
        "warnings": [],
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak_bytes(),
    }


def edited_tensors(checkpoint: Checkpoint, plan: Plan) -> dict[str, tuple[int, Factors]]:
    """The tensors that the edit changes: the axis that runs over the outputs, and the map.

    Raises LlmvaError where the checkpoint is another base, packed, or lacks some of them.
    """
    checkpoint.check(plan.edit.base, plan.edit.factors)
    edited = {
        place.name: (place.axis, plan.edit.factors[module])
        for module, places in checkpoint.writers_of(plan.edit.factors).items()
        for place in places
    }
    for name, (axis, f) in edited.items():
        if (wide := checkpoint.stored[name].shape[axis]) != len(f.V):
            raise LlmvaError(
                f"The edit is {len(f.V)} wide and {name} of '{plan.base}' {wide}: give the edit's own model with "
                "--base."
            )
    return edited


def fresh(out: str | Path) -> Path:
    """A folder that does not exist, or is empty. Raises UsageError otherwise."""
    path = Path(os.path.abspath(out))  # noqa: PTH100 (resolve() would follow a link that is to be replaced)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"'{out}' is there already: choose another --out, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"'{out}' cannot be written ({error.strerror}): choose another --out.") from error
    return path


@contextmanager
def in_workplace(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name at the end, or goes if anything fails; a killed export's goes too.

    Raises LlmvaError where the disk is full or cannot be written.
    """
    work = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        if out.is_dir():
            out.rmdir()
        work.rename(out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise LlmvaError(
                f"'{out}' cannot be written ({error.strerror}): free space or choose another --out."
            ) from error
        raise


def _others(folder: Path) -> list[Path]:
    """All that travels along beside the weights."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or inside.parts[0] in SKIPPED or str(inside) == "config.json":
            continue
        if path.suffix == ".safetensors" or any(fnmatch(path.name, pattern) for pattern in WEIGHTS):
            continue
        found.append(path)
    return found


def _check_disk(out: Path, size: int) -> None:
    needed = size + MARGIN
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise LlmvaError(
            f"The merged model needs {needed / 1e9:.1f} GB and '{out.parent.name or out.parent}' has {free / 1e9:.1f} "
            "free: free space or choose another --out."
        )


def _write_shard(checkpoint: Checkpoint, source: Path, target: Path, edited: dict[str, tuple[int, Factors]]) -> None:
    """Copy the file up to the next changed tensor, which a second thread computes meanwhile, write that, and so on."""
    changed = [(name, place) for name, place in in_file_order(checkpoint.stored, source) if name in edited]

    def compute(name: str) -> Tensor:
        axis, f = edited[name]
        return left_map(checkpoint.tensor(name), axis, f.V, f.U)

    with (
        source.open("rb", buffering=0) as reader,
        target.open("wb", buffering=0) as writer,
        ThreadPoolExecutor(1) as worker,
    ):
        done = 0
        for name, place in changed:
            coming = worker.submit(compute, name)  # not earlier: one changed tensor in memory at a time
            _copy(reader.fileno(), writer.fileno(), done, place.begin)
            _write(writer.fileno(), place.begin, coming.result())
            done = place.end
            del coming
        _copy(reader.fileno(), writer.fileno(), done, source.stat().st_size)


def _copy(reader: int, writer: int, begin: int, end: int) -> None:
    """Bytes `begin` to `end`, to the same place; in the kernel where it can."""
    while begin < end:
        size = min(PIECE, end - begin)
        try:
            n = os.copy_file_range(reader, writer, size, begin, begin)
        except (OSError, AttributeError):  # other systems, and file systems that cannot
            n = os.pwrite(writer, os.pread(reader, size, begin), begin)
        if n == 0:
            raise LlmvaError("The base model's file grew shorter while it was copied: export again.")
        begin += n


def _write(writer: int, begin: int, tensor: Tensor) -> None:
    data: Any = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(data):
        n = os.pwrite(writer, data, begin)
        data, begin = data[n:], begin + n


def _from_gguf(plan: Plan, work: Path) -> int:
    """A .gguf holds packed weights under names of its own: it is unpacked in memory and saved as a plain checkpoint."""
    from llmva.models.load import load_model

    model, tokenizer = load_model(plan.base, device="cpu")
    plan.edit.bake(model)
    _check_disk(work, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "config.json").rename(work / "config.json.part")
    return len(plan.edit.factors)


def _finish(plan: Plan, work: Path, config: Path | None = None) -> None:
    """Card and edit, and config.json last: without it nothing loads."""
    (work / "README.md").write_text(card(plan, "merged"), encoding="utf-8")
    embed(plan, work)
    if config is not None:
        shutil.copyfile(config, work / "config.json.part")
    (work / "config.json.part").rename(work / "config.json")
