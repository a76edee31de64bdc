"""What a model can do apart from safety: benchmarks of lm-evaluation-harness, with and without an edit."""

from __future__ import annotations

from llmva.utility.measure import measure_tasks
from llmva.utility.tasks import PAPER, ChosenTask, load_tasks

__all__ = ["PAPER", "ChosenTask", "load_tasks", "measure_tasks"]
