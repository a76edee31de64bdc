"""What runs, comparisons and ablations are read by: pages for people, tables for terminals and papers."""

from .ablation import ablation_table, write_ablation
from .comparison import write_comparison
from .html import render, write_report
from .points import front_table, write_front
from .tables import comparison_table
from .terminal import before_after_table, tasks_table
from .transfer import transfer_markdown, transfer_table

__all__ = [
    "ablation_table",
    "before_after_table",
    "comparison_table",
    "front_table",
    "render",
    "tasks_table",
    "transfer_markdown",
    "transfer_table",
    "write_ablation",
    "write_comparison",
    "write_front",
    "write_report",
]
