"""How near the float64 result is one bfloat16 bake, and how near are twenty edits of bfloat16 weights in place?

    python benchmarks/precision.py [--seeds 3] [--sizes 1024x4096 ...] [--no-organism]

Steps are W <- (I + v u^T) W with unit v = v_a and u = r v_b - v_a. In place there are two ways, and both are shown:

    outer   W <- W + v (u^T W), every product and W itself in bfloat16
    matrix  P = I + v u^T is made in bfloat16 first, W <- P W

Printed are relative Frobenius errors |W' - truth| / |truth|, those of the change |W' - truth| / |truth - W|, and how
many times farther from the truth than the one bake. One bake's error is that of rounding the exact W' to bfloat16, and
no bfloat16 weights can be nearer. Twenty independent such roundings add up to sqrt(20) = 4.5 times it.

The organism's steps are real: twenty iterations of the method on it. There the logits are compared too, in float64,
so that only the weights differ; the change of logits is that from the untouched model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import llmva
from llmva.cli.inputs import choose_prompts, demo_model, quiet_libraries
from llmva.cli.options import Sources
from llmva.edit import Edit, Factors
from llmva.judges import make_judge
from llmva.method.align import align_sublayers
from llmva.method.identify import identify
from llmva.models.chat import encode, render
from llmva.models.chat_model import ChatModel
from llmva.models.writers import left_map

STEPS = 20
WAYS = ("one bake", "outer", "matrix")
Step = tuple[Tensor, Tensor]


def random_steps(width: int, seed: int) -> list[Step]:
    """v_a and v_b random, r from .5 to 1.5."""
    g = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(STEPS):
        v_a, v_b = torch.nn.functional.normalize(torch.randn(2, width, generator=g, dtype=torch.float64), dim=1)
        steps.append((v_a, float(0.5 + torch.rand((), generator=g)) * v_b - v_a))
    return steps


def steps_of(factors: Factors) -> list[Step]:
    """The single steps back out of composed factors: U's column j is u_j + U_<j V_<j^T u_j."""
    V, U, steps = factors.V.double(), factors.U.double(), []
    for j in range(V.shape[1]):
        before = torch.eye(len(V), dtype=torch.float64) + U[:, :j] @ V[:, :j].T
        steps.append((V[:, j], torch.linalg.solve(before, U[:, j])))
    return steps


def edited(weight: Tensor, steps: Sequence[Step]) -> tuple[Tensor, dict[str, Tensor]]:
    """The float64 truth, and by way the bfloat16 weights, of bfloat16 `weight` [d, in]."""
    truth, outer, matrix = weight.double(), weight.clone(), weight.clone()
    factors, one = Factors.empty(len(weight)), torch.eye(len(weight), dtype=torch.bfloat16)
    for i, (v, u) in enumerate(steps):
        truth = truth + torch.outer(v, u @ truth)
        v_b, u_b = v.bfloat16(), u.bfloat16()
        outer = outer + torch.outer(v_b, u_b @ outer)
        matrix = (one + torch.outer(v_b, u_b)) @ matrix
        factors = factors.then(v, u, i + 1)
    return truth, dict(zip(WAYS, (left_map(weight, -2, factors.V, factors.U), outer, matrix), strict=True))


def far(x: Tensor, truth: Tensor, base: Tensor | None = None) -> float:
    scale = truth if base is None else truth - base.double()
    return float((x.double() - truth).norm() / scale.norm())


def row(label: str, errors: dict[str, float]) -> None:
    once = errors[WAYS[0]]
    words = [f"{way} {errors[way]:.2e} ({errors[way] / once:.2f}x)" for way in WAYS[1:]]
    print(f"{label:34} one bake {once:.2e}   {'   '.join(words)}", flush=True)


def organism_edit(iterations: int) -> tuple[Any, Any, Edit, list[str]]:
    """The untouched organism, and `iterations` steps of the method on all its sublayers."""
    model, tokenizer = llmva.load_model(str(demo_model()))
    decoder, judge, edit = llmva.find_decoder(model), make_judge("phrases"), Edit()
    prompts = choose_prompts(str(demo_model()), Sources(), 0)
    draw = prompts.draw(24, torch.Generator().manual_seed(0))
    held = list(prompts.validation)[:64]
    for t in range(iterations):
        with edit.apply(model, check=False):
            seen = llmva.observe(ChatModel.of(decoder, tokenizer), [*draw, *held], judge, max_new_tokens=16)
        train = seen.part(0, len(draw))
        if len(set(train.signs[0].tolist())) < 2:
            break
        vectors = identify(train, seen.part(len(draw), len(draw) + len(held)))
        edit = align_sublayers(edit, decoder.sublayers, vectors, range(len(decoder.sublayers)), t + 1)
    return model, tokenizer, edit, [prompt.text for prompt in held[:32]]


@torch.no_grad()
def organism() -> None:
    model, tokenizer, edit, texts = organism_edit(STEPS)
    model = model.to(torch.bfloat16).double()  # bfloat16 values, float64 arithmetic
    modules = dict(model.named_modules())
    rows = [encode(tokenizer, render(tokenizer, text)) for text in texts]

    def logits() -> Tensor:
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in rows])

    base = logits()
    weights = {name: modules[name].weight.data.bfloat16() for name in edit.factors}
    found = {name: edited(weights[name], steps_of(f)) for name, f in edit.factors.items()}
    squares = dict.fromkeys(WAYS, 0.0)
    size = change = 0.0
    for name, (truth, ways) in found.items():
        size += float(truth.norm() ** 2)
        change += float((truth - weights[name].double()).norm() ** 2)
        for way in WAYS:
            squares[way] += float((ways[way].double() - truth).norm() ** 2)
    print(f"organism: {edit.iterations} steps in each of {len(found)} sublayers")
    row("  weights", {way: (squares[way] / size) ** 0.5 for way in WAYS})
    row("  change of weights", {way: (squares[way] / change) ** 0.5 for way in WAYS})
    said = {}
    for way in ("truth", *WAYS):
        for name, (truth, ways) in found.items():
            modules[name].weight.data.copy_(truth if way == "truth" else ways[way])
        said[way] = logits()
    row("  logits", {way: far(said[way], said["truth"]) for way in WAYS})
    row("  change of logits", {way: far(said[way], said["truth"], base) for way in WAYS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["128x128", "512x2048", "1024x4096", "4096x1024"])
    parser.add_argument("--no-organism", action="store_true")
    args = parser.parse_args()
    quiet_libraries()
    for size in args.sizes:
        width, inner = (int(n) for n in size.split("x"))
        for seed in range(args.seeds):
            g = torch.Generator().manual_seed(1000 + seed)
            weight = (torch.randn(width, inner, generator=g) / inner**0.5).bfloat16()
            truth, ways = edited(weight, random_steps(width, seed))
            row(f"random {size}, seed {seed}", {way: far(w, truth) for way, w in ways.items()})
            row("  change", {way: far(w, truth, weight) for way, w in ways.items()})
    if not args.no_organism:
        organism()


if __name__ == "__main__":
    main()
