"""Broken files through the readers: only clean errors or a working result, never a crash, a hang or a huge allocation.

    python benchmarks/fuzz.py [--count 20000] [--kinds edits,runs,...] [--seed 0]

Kinds, of each of which `--count` files are made: edits (edit.safetensors), runs (run.json), prompts and prompt-sets
(files of prompts, and what runs store), configs, tokenizers, templates and checkpoints (config.json, tokenizer.json,
chat templates, shards with their index). Every file begins as a whole one and is broken with knowledge of its
structure, see benchmarks/fuzzing. A fault is anything but a one-line LlmvaError or a working result: another exception,
a MemoryError (the address space may grow by 1 GB over its size at the start, for edits and runs by 256 MB), or more
than 10 seconds. The first files with each fault are kept in the folder that is printed. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from fuzzing import edits, models, prompts, runs
from fuzzing.common import Kind

SECONDS = 10


def all_kinds() -> dict[str, Kind]:
    return {kind.name: kind for kind in (edits.kind(), runs.kind(), *prompts.kinds(), *models.kinds())}


def main() -> None:
    kinds = all_kinds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="files of each kind")
    parser.add_argument("--kinds", default=",".join(kinds), help="which, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _quiet()
    signal.signal(signal.SIGALRM, _too_long)
    kept = Path(tempfile.mkdtemp(prefix="llmva-fuzz-"))
    faults = 0
    for name in args.kinds.split(","):
        outcomes, slowest, seconds = fuzz(kinds[name], args.count, random.Random(f"{args.seed} {name}"), kept)
        print(f"{name}: {args.count:,} files in {seconds:.0f} s, slowest {slowest:.2f} s", flush=True)
        for outcome, n in sorted(outcomes.items(), key=lambda item: (item[0].startswith("FAULT"), -item[1])):
            print(f"{n:8,}  {outcome}", flush=True)
        faults += sum(n for outcome, n in outcomes.items() if outcome.startswith("FAULT"))
    print(f"{faults} faults{f', see {kept}' if faults else ''}")
    if not faults:
        kept.rmdir()
    sys.exit(1 if faults else 0)


def fuzz(kind: Kind, count: int, rng: random.Random, kept: Path) -> tuple[Counter[str], float, float]:
    """How many files went how, the longest that one took, and the time for all of them, in seconds."""
    outcomes: Counter[str] = Counter()
    slowest, started = 0.0, time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        folder = Path(place) / "files"
        folder.mkdir()
        kind.spoil(folder, rng)
        with suppress(BaseException):  # only so that imports do not count
            kind.check(folder)
        limit_memory(kind.room)
        for _ in range(count):
            for path in folder.iterdir():
                path.unlink()
            kind.spoil(folder, rng)
            begun = time.monotonic()
            signal.alarm(SECONDS)
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # a hang outside of Python
            try:
                outcome = kind.check(folder)
            except BaseException as error:  # the search is for any, and Rust panics are no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = f"FAULT {type(error).__name__}: {str(error)[:150]!r}"
                if outcome not in outcomes and len(list(kept.iterdir())) < 100:
                    shutil.copytree(folder, kept / f"{kind.name}-{sum(outcomes.values())}")
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - begun)
            outcomes[outcome] += 1
        faulthandler.cancel_dump_traceback_later()
    return outcomes, slowest, time.monotonic() - started


def limit_memory(room: int) -> None:
    """Let the address space grow by `room` MB only, where the system tells its size."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room * 2**20, resource.RLIM_INFINITY))


def _quiet() -> None:
    """The libraries complain of broken files too."""
    from llmva.cli.inputs import quiet_libraries

    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries()


def _too_long(*_: object) -> None:
    raise TimeoutError(f"{SECONDS} seconds")


if __name__ == "__main__":
    main()
