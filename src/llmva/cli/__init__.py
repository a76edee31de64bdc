"""The command line: thin commands over the Python API."""

import sys

try:
    from llmva.cli.main import main
except KeyboardInterrupt:  # the libraries of the command line take a moment
    print("Interrupted before the command began: run the same command again.", file=sys.stderr)
    sys.exit(130)

__all__ = ["main"]
