"""Kill align, extend, compare, export and push at random moments, and run them again: do they end with the same bytes?

    python benchmarks/kills.py [KILLS]

The tests of the suite, with more kills of runs (10 by default); exports and pushes are killed ten times in any case.
Prints a line for each, and ends with code 1 if one differs. Takes about five minutes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests"

if __name__ == "__main__":
    os.environ["LLMVA_TEST_KILLS"] = sys.argv[1] if len(sys.argv) > 1 else "10"
    files = [str(TESTS / "test_kills_of_runs.py"), str(TESTS / "test_kills.py")]
    sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *files]))
