"""What a run asks of the model: tokens through it, generated tokens, products, and seconds, phase by phase.

Counts do not depend on the machine. They are taken at the model's own `forward`, so code that works around the library
is counted too. A token counts as often as it goes through the model; padding does not count as tokens, but its products
do count, since the machine computes them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

PHASES = (  # module, object, attribute, phase; a function that is missing at some commit is left out
    ("llmva.method.context", "Context", "observe", "answering"),
    ("llmva.method.context", "Context", "predict_labels", "predicting labels"),
    ("llmva.method.context", "Context", "read", "reading bundled prompts"),
    ("llmva.method.context", "Context", "harm", "harmless text"),
    ("llmva.method.context", "Context", "first_token_kl", "length of steps"),
    ("llmva.method.context", "Context", "harmless_outputs", "harmless outputs"),
    ("llmva.method.inner_loop", None, "gradient_writers", "gradients"),
    ("llmva.method.inner_loop", None, "measure_slopes", "gradients"),
    ("llmva.method.inner_loop", None, "predict_with_slopes", "gradients"),
    ("llmva.alignment", None, "finish", "end of the run"),
    ("llmva.alignment", None, "prove", "looking at the model"),
)


@dataclass
class Counts:
    """Totals of a phase."""

    tokens: int = 0
    passes: int = 0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass
class Meter:
    """`phases`: name -> counts. A phase within another counts for the outer one alone."""

    phases: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    current: str | None = None

    def total(self, *, without: tuple[str, ...] = ()) -> Counts:
        kept = [counts for name, counts in self.phases.items() if name not in without]
        return Counts(*(sum(getattr(c, f) for c in kept) for f in ("tokens", "passes", "flops", "seconds")))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.current is not None:
            yield
            return
        self.current, started = name, time.perf_counter()
        try:
            yield
        finally:
            self.phases[name].seconds += time.perf_counter() - started
            self.current = None

    def table(self) -> str:
        lines = [f"{'phase':<24}{'tokens':>10}{'passes':>8}{'GFLOP':>10}{'seconds':>9}"]
        for name, c in [*self.phases.items(), ("total", self.total())]:
            lines.append(f"{name:<24}{c.tokens:>10,}{c.passes:>8}{c.flops / 1e9:>10,.0f}{c.seconds:>9.1f}")
        return "\n".join(lines)


@contextmanager
def counted(model: Any) -> Iterator[Meter]:
    """Count what goes through `model`, and the phases of `llmva.align`, inside the block."""
    import importlib

    meter = Meter()
    head = model.get_output_embeddings()
    own, inner = model.forward, sum(p.numel() for p in model.parameters())
    inner -= model.get_input_embeddings().weight.numel()
    tied = head.weight is model.get_input_embeddings().weight
    inner -= 0 if tied else head.weight.numel()
    undo: list[Callable[[], None]] = []

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask, counts = kwargs.get("attention_mask"), meter.phases[meter.current or "other"]
        new = ids.shape[1]
        real = int(mask[:, -new:].sum()) if mask is not None and mask.ndim == 2 else ids.numel()
        counts.tokens += real
        counts.passes += 1
        back = 2 if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and new == 1 else 1
        counts.flops += back * 2.0 * inner * ids.numel()
        return own(*args, **kwargs)

    def count_head(module: Any, args: Any, output: Any) -> None:
        counts = meter.phases[meter.current or "other"]
        counts.flops += 2.0 * output.numel() * module.weight.shape[1]

    model.forward = forward
    handle = head.register_forward_hook(count_head)
    for module_name, owner_name, attribute, phase in PHASES:
        module = importlib.import_module(module_name)
        owner = getattr(module, owner_name) if owner_name else module
        if hasattr(owner, attribute):
            undo.append(_wrapped(meter, owner, attribute, phase))
    try:
        yield meter
    finally:
        handle.remove()
        model.__dict__.pop("forward", None)
        for step in undo:
            step()


def _wrapped(meter: Meter, owner: Any, attribute: str, phase: str) -> Callable[[], None]:
    plain = getattr(owner, attribute)

    @wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(phase):
            return plain(*args, **kwargs)

    setattr(owner, attribute, timed)
    return lambda: setattr(owner, attribute, plain)
