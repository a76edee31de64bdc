"""The command line: thin commands over the Python API."""

from llmva.cli.main import main

__all__ = ["main"]
