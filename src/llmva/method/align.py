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
    """Follow `edit` by a rank-one map in every chosen sublayer.

    Without `writers` by the least map that makes o'.v_a = r o.v_b (method.md, step 5), else by what writes the same
    r o.v_b - o.v_a along `writers` [S, d] (`gradients.gradient_writers`). `step` is the share of the way that is gone.
    """
    all_sublayers = list(sublayers)
    for s in chosen:
        v_a, v_b = vectors.directions[s]
        if not v_a.any():
            continue  # a sublayer that puts out nothing, or always the same, decides nothing
        gain = all_sublayers[s].gain
        writer, reader = align_one(v_a, v_b, float(vectors.ratio[s]), gain)
        if writers is not None:
            writer = _before(writers[s], gain)
        edit = edit.then(all_sublayers[s].name, step * writer, reader, iteration)
    return edit


def _before(x: Tensor, gain: Tensor | None) -> Tensor:
    """The least output of a projection that moves the residual stream by |x| along `x` [d], up to the post-norm's c."""
    if gain is None:
        return x
    y = gain.to(x) * x
    return y * (x.dot(x) / y.dot(y).clamp_min(1e-30))


def align_one(v_a: Tensor, v_b: Tensor, r: float, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(v, u)` of the least map o' = (I + v u^T) o with o'.v_a = r o.v_b, both [d].

    Behind a post-norm the residual stream gets c * gain * o, c a scalar per token. The vectors live there, so on the
    projection's own output the covectors are gain * v (method.md, "Where we differ from the paper, and why").
    """
    if gain is not None:
        v_a, v_b = gain.to(v_a) * v_a, gain.to(v_b) * v_b
    return v_a / v_a.dot(v_a), r * v_b - v_a
