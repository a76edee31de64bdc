"""Step 5 of an iteration: the edit that aligns the answer vector with the benign vector."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from llmva.edit import Edit
from llmva.method.identify import Vectors
from llmva.models.sublayers import Sublayer


def align_sublayers(
    edit: Edit,
    sublayers: Iterable[Sublayer],
    vectors: Vectors,
    chosen: list[int],
    iteration: int,
    step: float = 1.0,
    writers: Tensor | None = None,
) -> Edit:
    """Add a rank-one map to `edit` in every chosen sublayer.

    Args:
        sublayers: all sublayers of the model.
        vectors: of the model with `edit`.
        chosen: indices of the sublayers to edit.
        iteration: number that the new columns carry.
        step: share of the full step, above 0.
        writers: float64 [S, d], along which r o.v_b - o.v_a is written (`gradients.gradient_writers`). None writes the
            map of least norm with o'.v_a = r o.v_b (docs/method.md, step 5).
    """
    all_sublayers = list(sublayers)
    for s in chosen:
        v_a, v_b = vectors.directions[s]
        if not v_a.any():
            continue  # the sublayer's output is zero or the same for all prompts
        gain = all_sublayers[s].gain
        writer, reader = align_one(v_a, v_b, float(vectors.ratio[s]), gain)
        if writers is not None:
            writer = _before(writers[s], gain)
        edit = edit.then(all_sublayers[s].name, step * writer, reader, iteration)
    return edit


def _before(x: Tensor, gain: Tensor | None) -> Tensor:
    """The least projection output that moves the residual stream along `x` [d] by |x|, up to the norm's scalar."""
    if gain is None:
        return x
    y = gain.to(x) * x
    return y * (x.dot(x) / y.dot(y).clamp_min(1e-30))


def align_one(v_a: Tensor, v_b: Tensor, r: float, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(v, u)` of the map o' = (I + v u^T) o of least norm with o'.v_a = r o.v_b, both [d].

    Behind a post-norm the residual stream receives c * gain * o, with a scalar c per token. The vectors are fitted
    there, so the covectors on the projection's own output are gain * v (docs/method.md, "Where we differ from the
    paper, and why").
    """
    if gain is not None:
        v_a, v_b = gain.to(v_a) * v_a, gain.to(v_b) * v_b
    return v_a / v_a.dot(v_a), r * v_b - v_a
