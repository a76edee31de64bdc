"""The versions and the device of a run, and its peak memory."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmva.models.engines.base import Engine


def versions(engine: Engine | None = None) -> dict[str, str]:
    """Versions of packages, the device and what writes answers; others may round differently."""
    import torch
    import transformers

    return {
        "llmva": version("llmva"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": version("tokenizers"),
        "engine": "transformers" if engine is None else engine.title,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def peak_bytes() -> int:
    """Peak memory of this process in bytes: resident on the CPU, plus allocated on every CUDA device."""
    import torch

    return _peak_resident() + sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def _peak_resident() -> int:
    """In bytes. On Linux, getrusage also counts the parent process, so /proc is read instead."""
    status = Path("/proc/self/status")
    if status.is_file():
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
