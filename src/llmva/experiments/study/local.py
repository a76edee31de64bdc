"""Worker processes of a study on this machine, one for each device. The folder is all that they share."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

LOOK = 1.0  # seconds between two looks at the processes
PATIENCE = 30.0  # seconds that a process has to end by itself after Ctrl-C


def devices(device: str, workers: int) -> list[str]:
    """The device of each worker: CUDA devices in turn, or `device` for all where it is named."""
    import torch

    count = torch.cuda.device_count() if device == "auto" else 0
    return [f"cuda:{number % count}" if count else device for number in range(workers)]


def run_workers(commands: Sequence[Sequence[str]], look: Callable[[], None]) -> list[int]:
    """Run `llmva` with each of the lists of words, each in a process; returns their exit codes.

    Ctrl-C reaches them too; they are waited for.

    Args:
        look: called about every second.
    """
    started = [subprocess.Popen([sys.executable, "-m", "llmva", *words]) for words in commands]
    try:
        while any(process.poll() is None for process in started):
            time.sleep(LOOK)
            look()
    except BaseException:
        _end(started)
        raise
    return [process.returncode for process in started]


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that a Ctrl-C of the terminal has reached, and end those that it has not."""
    until = time.monotonic() + PATIENCE
    for process in started:
        process.terminate()
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        if process.poll() is None:
            process.kill()
