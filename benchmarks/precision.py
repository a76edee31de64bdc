"""How near the float64 result is one bfloat16 bake, and how near are twenty edits of bfloat16 weights in place?

    python benchmarks/precision.py [--width 1024] [--inner 4096] [--seeds 5]

Relative Frobenius errors of the edited weights. One bake's error is the one rounding to bfloat16.
"""

from __future__ import annotations

import argparse

import torch

from llmva.edit import Factors
from llmva.models.writers import left_map

STEPS = 20


def errors(width: int, inner: int, seed: int) -> tuple[float, float]:
    """(one bake, in place), of steps v = v_a, u = r v_b - v_a with random unit v_a and v_b and r from .5 to 1.5."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(width, inner, generator=g) / inner**0.5).bfloat16()
    truth, rough = weight.double(), weight.clone()
    factors = Factors.empty(width)
    for step in range(STEPS):
        v_a, v_b = torch.nn.functional.normalize(torch.randn(2, width, generator=g, dtype=torch.float64), dim=1)
        r = float(0.5 + torch.rand((), generator=g))
        u = r * v_b - v_a
        truth = truth + torch.outer(v_a, u @ truth)
        rough = rough + torch.outer(v_a.bfloat16(), u.bfloat16() @ rough)
        factors = factors.then(v_a, u, step + 1)
    baked = left_map(weight, -2, factors.V, factors.U)
    return tuple(float((w.double() - truth).norm() / truth.norm()) for w in (baked, rough))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    for seed in range(args.seeds):
        once, again = errors(args.width, args.inner, seed)
        print(f"seed {seed}: one bake {once:.3e}, {STEPS} in place {again:.3e}, {again / once:.2f} times farther")


if __name__ == "__main__":
    main()
