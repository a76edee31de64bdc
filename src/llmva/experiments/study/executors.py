"""Who starts the worker processes of a study: this machine, a Ray cluster, or Slurm through submitit.

Whoever starts them, they share the study's folder and claim its cells, so an executor knows nothing of cells: it runs
commands, and tells how each ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.experiments.study.local import LOOK, run_workers

Words = Sequence[str]  # what follows `llmva` on a command line
Look = Callable[[], None]  # called about every second
RETRIES = 3  # of a worker whose machine is lost, by Ray
NAMES = ("local", "ray", "slurm", "slurm:local")


def run_with(
    executor: str, commands: Sequence[Words], look: Look, folder: Path, resources: Mapping[str, Any]
) -> list[int]:
    """Run `llmva` with each of the lists of words; returns their exit codes.

    Args:
        executor: of NAMES. "ray" uses the cluster that RAY_ADDRESS names or that runs here, and else starts one of this
            machine alone. "slurm:local" is submitit's own executor of local processes.
        folder: where submitit keeps its logs.
        resources: of each worker, as Ray's `options` or submitit's `update_parameters` take them.

    Raises:
        UsageError: there is no such executor, its package is not installed, or it does not know a resource.
    """
    if executor == "local":
        if resources:
            raise UsageError("--resources are for --executor ray and slurm: leave them out.")
        return run_workers(commands, look)
    if executor == "ray":
        return _ray(commands, look, resources)
    if executor in ("slurm", "slurm:local"):
        return _slurm(commands, look, folder, resources, executor.partition(":")[2] or None)
    raise UsageError(f"There is no executor '{executor}': choose {', '.join(NAMES)}.")


def parse_resources(text: str) -> dict[str, Any]:
    """'num_gpus=1,partition=long' as a dict; numbers become numbers. Raises UsageError for anything else."""
    resources: dict[str, Any] = {}
    for term in filter(None, (term.strip() for term in text.split(","))):
        name, equals, value = (part.strip() for part in term.partition("="))
        if not (name and equals and value):
            raise UsageError(f"--resources '{term}' is not NAME=VALUE: write such as num_gpus=1.")
        number = float(value) if value.replace(".", "", 1).isdecimal() else None
        resources[name] = value if number is None else int(number) if number.is_integer() else number
    return resources


def run_words(words: Words, place: str) -> int:
    """Run `llmva` in a process of its own, in the folder `place`; its exit code."""
    command = [sys.executable, "-m", "llmva", *words]
    return subprocess.run(command, cwd=place, check=False).returncode


def _ray(commands: Sequence[Words], look: Look, resources: Mapping[str, Any]) -> list[int]:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray needs another package: pip install 'llmva[ray]'.") from error
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except Exception as error:  # Ray raises this very class where it does not start in time
            raise LlmvaError(
                f"Ray does not start here ({error}): start a cluster first, or use --executor local."
            ) from error
    try:
        try:
            start = ray.remote(run_words).options(max_retries=RETRIES, **resources)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Ray does not know these --resources ({error}): see the options of its tasks.") from error
        left = started = [start.remote(list(words), str(Path.cwd())) for words in commands]
        try:
            while left:
                _, left = ray.wait(left, num_returns=len(left), timeout=LOOK)
                look()
        except BaseException:
            for one in started:
                ray.cancel(one, force=True)
            raise
        try:
            codes: list[int] = ray.get(started)
        except ray.exceptions.RayError as error:
            raise LlmvaError(f"Ray lost a worker ({type(error).__name__}): run the same command again.") from error
        return codes
    finally:
        if own:
            ray.shutdown()


def _slurm(
    commands: Sequence[Words], look: Look, folder: Path, resources: Mapping[str, Any], cluster: str | None
) -> list[int]:
    try:
        import submitit
    except ImportError as error:
        raise UsageError("--executor slurm needs another package: pip install 'llmva[slurm]'.") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster or "slurm")
        executor.update_parameters(name="llmva", **resources)
        jobs = [executor.submit(run_words, list(words), os.fspath(Path.cwd())) for words in commands]
    except (NameError, RuntimeError, TypeError, OSError) as error:  # as submitit tells wrong names, and no Slurm
        raise UsageError(f"Slurm takes no jobs here ({error}): check --resources and the machine.") from error
    try:
        while not all(job.done() for job in jobs):
            time.sleep(LOOK)
            look()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    codes = []
    for job in jobs:
        try:
            codes.append(int(job.result()))
        except Exception:  # of the job, whose log has it
            codes.append(1)
    return codes
