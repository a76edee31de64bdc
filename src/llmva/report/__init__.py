"""Reports of runs, comparisons and ablations: pages for people, tables for terminals and papers.

`run/` shows one run or one edit, `study/` several runs, `drawing/` has the charts, `templates/` the pages. All of it
reads records as plain dicts, so a machine without the model can draw a report.
"""

from llmva.report.run.attacks import attacks_markdown, attacks_table
from llmva.report.run.evaluation import write_evaluation
from llmva.report.run.front import front_table, write_front
from llmva.report.run.page import render, write_report
from llmva.report.run.terminal import before_after_html, before_after_table, tasks_table
from llmva.report.run.transfer import transfer_markdown, transfer_table
from llmva.report.study.ablation import ablation_table, write_ablation
from llmva.report.study.comparison import write_comparison
from llmva.report.study.many import study_tables, write_study
from llmva.report.study.tables import comparison_table

__all__ = [
    "ablation_table",
    "attacks_markdown",
    "attacks_table",
    "before_after_html",
    "before_after_table",
    "comparison_table",
    "front_table",
    "render",
    "study_tables",
    "tasks_table",
    "transfer_markdown",
    "transfer_table",
    "write_ablation",
    "write_comparison",
    "write_evaluation",
    "write_front",
    "write_report",
    "write_study",
]
