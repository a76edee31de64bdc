"""Keep lm-evaluation-harness from printing, and restore the global state that it changes."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No log lines below an error and no progress bars, until the block ends.

    The harness draws bars with tqdm and offers no switch for all of them, so bars are made disabled meanwhile.
    """
    import datasets
    from tqdm import std

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    make = std.tqdm.__init__

    def make_disabled(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **{**options, "disable": True})

    std.tqdm.__init__ = make_disabled
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        std.tqdm.__init__ = make
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator that a task may draw from, and restore its state afterwards."""
    import numpy as np
    import torch

    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
