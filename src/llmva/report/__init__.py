"""What a run is read by: an HTML report for people, a table for the terminal."""

from .html import render, write_report
from .terminal import before_after_table

__all__ = ["before_after_table", "render", "write_report"]
