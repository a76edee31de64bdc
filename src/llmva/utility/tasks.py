"""The benchmarks and their documents: looked up by name in lm-evaluation-harness, drawn once for all models."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmva.errors import LlmvaError, UsageError
from llmva.utility.quiet import quiet_harness, seeded

PAPER = ("cola", "mnli", "rte", "mrpc", "sst2", "gsm8k", "mmlu")  # arXiv 2601.19487 has all but MMLU
GLUE = ("cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli")  # scored by F1, as there
EXAMPLES = 256  # of a task, as in the paper
OTHER_EXAMPLES = {"gsm8k": 500}  # likewise


@dataclass(frozen=True)
class ChosenTask:
    """One line of the result: a benchmark, or a group of them whose documents are pooled (MMLU's 57 subjects)."""

    name: str
    parts: Mapping[str, Any]  # the harness's tasks by name; one unless this is a group
    documents: Mapping[str, list[int]]  # of each part, ascending
    total: int  # documents in all, of which some are drawn

    @property
    def n(self) -> int:
        return sum(map(len, self.documents.values()))


def load_tasks(
    names: Sequence[str] = PAPER,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 42,
) -> list[ChosenTask]:
    """Find the tasks, read their data and draw their documents.

    Args:
        names: tasks, groups or tags of lm-evaluation-harness, or of the YAML files in `include_path`. A tag stands
            for all its tasks, a group for one whose documents are pooled.
        include_path: a folder of task files in addition to the harness's own.
        limit: documents of a task; None is the paper's number. A task with fewer gives all it has.
        seed: of the draw, which is even over a task's documents.

    Raises:
        UsageError: the harness is not installed, there is no such task, or llmva cannot run it.
        LlmvaError: a task's data cannot be read.
    """
    manager_class = _task_manager()
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UsageError("There are no tasks to run: name some, as in --tasks cola,gsm8k.")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} documents of a task are too few: give --utility-limit 1 or more.")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"There is no folder '{include_path}': give --include-path the folder of your task files.")
    with quiet_harness(), seeded(seed):  # a task may shuffle its documents with a global generator
        try:
            manager = _manager(manager_class, names, include_path)
        except Exception as error:  # whatever a file of the user's makes the harness raise
            raise UsageError(
                f"The task files in '{include_path}' cannot be read ({_first_line(error)}): mend or remove them."
            ) from error
        for name in names:
            _check_known(name, manager.all_tasks)
        tasks = [chosen for name in names for chosen in _load(manager, name, limit, seed)]
    repeated = [task.name for i, task in enumerate(tasks) if task.name in [other.name for other in tasks[:i]]]
    if repeated:
        raise UsageError(f"The task '{repeated[0]}' is named twice: leave one of them out.")
    return tasks


def main_metric(task: Any) -> str | None:
    """The metric that a task of the harness lists first; None where it computes its metrics by code of its own."""
    listed = task.get_config("metric_list") or []
    first = listed[0].get("metric") if listed else None
    return first if isinstance(first, str) else None


def _task_manager() -> Any:
    try:
        from lm_eval.models import huggingface  # noqa: F401 (so that a broken installation fails here)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("Benchmarks need lm-evaluation-harness: pip install 'llmva[eval]'.") from error
    if not hasattr(TaskManager, "load"):
        raise UsageError("This lm-evaluation-harness is too old: pip install --upgrade 'llmva[eval]'.")
    return TaskManager


def _manager(manager_class: Any, names: Sequence[str], include_path: str | Path | None) -> Any:
    """A manager of the folder's tasks, and of the harness's own only if needed: reading those files takes seconds."""
    if include_path is None:
        return _whole(manager_class)
    own = manager_class(include_path=str(include_path), include_defaults=False)
    if all(name in own.all_subtasks for name in names):
        return own
    if all(name in own.all_tasks for name in names):
        try:
            own.load(list(names))
        except Exception:  # a group of the folder may name tasks of the harness; a real error is raised later
            pass
        else:
            return own
    return manager_class(include_path=str(include_path))


@cache
def _whole(manager_class: Any) -> Any:
    """A manager of the harness's tasks, thousands of files, which are read once in a process."""
    return manager_class()


def _check_known(name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 3)
    mend = f"did you mean {' or '.join(near)}?" if near else "give a name that lm-evaluation-harness knows."
    raise UsageError(f"There is no task '{name}': {mend}")


def _load(manager: Any, name: str, limit: int | None, seed: int) -> list[ChosenTask]:
    try:
        loaded = manager.load([name])
        sizes = {part: len(task.eval_docs) for part, task in loaded["tasks"].items()}
    except Exception as error:  # datasets, the hub client and a task's own code raise anything
        raise LlmvaError(
            f"The task '{name}' cannot be loaded ({_first_line(error)}): its data must be reachable or in the Hugging "
            "Face cache, so go online once, or leave the task out by naming the others with --tasks."
        ) from error
    tasks: dict[str, Any] = loaded["tasks"]
    for part, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"The task '{part}' runs code that the model writes, which llmva does not: leave it out.")
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"The task '{part}' is about more than text: leave it out.")
        if not sizes[part]:
            raise UsageError(f"The task '{part}' has no documents: leave it out.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    alike = len({(main_metric(task), task.get_config("output_type")) for task in tasks.values()}) == 1
    if loaded.get("groups") and alike and len(tasks) > 1:
        return [_draw(name, tasks, sizes, limit, seed)]
    return [_draw(part, {part: task}, sizes, limit, seed) for part, task in tasks.items()]


def _draw(name: str, tasks: Mapping[str, Any], sizes: Mapping[str, int], limit: int | None, seed: int) -> ChosenTask:
    """An even draw from all documents, so a pooled group weighs its parts by their size, as the harness does."""
    places = [(part, i) for part in tasks for i in range(sizes[part])]
    count = min(len(places), limit or OTHER_EXAMPLES.get(name, EXAMPLES))
    # its own draw for each task, whatever other tasks are named
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    documents: dict[str, list[int]] = {}
    for k in sorted(generator.choice(len(places), count, replace=False).tolist()):
        part, i = places[k]
        documents.setdefault(part, []).append(i)
    return ChosenTask(name, {part: tasks[part] for part in documents}, documents, len(places))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": .")
