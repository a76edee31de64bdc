"""An edit of an 8B-shaped model after its weights are loaded: seconds to read, check and apply it, and its size.

    python benchmarks/apply.py [--blocks 32] [--iterations 30] [--rounds 3]

Only o_proj and down_proj hold numbers (5 GB in bfloat16, since all are read for their hashes); the rest is on the meta
device. The edit has 42 of the 64 sublayers, each in every iteration.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmva.edit import Edit, Factors
from llmva.models.fingerprint import module_hash

WIDTH, INNER = 4096, 14336


def make(blocks: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(WIDTH * INNER, generator=generator).bfloat16()  # drawing all would take a minute
    for block in model.model.layers:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            shift = int(torch.randint(2**20, (), generator=generator))  # no two alike
            values = drawn.roll(shift)[: projection.weight.numel()].view(projection.weight.shape)
            projection.weight = nn.Parameter(values.clone(), requires_grad=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    model = make(args.blocks)
    every = [f"model.layers.{b}.{end}" for b in range(args.blocks) for end in ("self_attn.o_proj", "mlp.down_proj")]
    names = every[len(every) - len(every) * 42 // 64 :]
    generator = torch.Generator().manual_seed(1)
    k = args.iterations
    factors = {
        name: Factors(
            torch.randn(WIDTH, k, generator=generator) * 0.01,
            torch.randn(WIDTH, k, generator=generator) * 0.01,
            torch.arange(1, k + 1, dtype=torch.int32),
        )
        for name in names
    }
    hashes = {name: module_hash(model.get_submodule(name)) for name in every}
    with tempfile.TemporaryDirectory() as folder:
        path = Edit(factors, {"model": "random", "hashes": hashes}).save(Path(folder))
        seconds = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            applied = Edit.load(path).apply(model)
            seconds.append(time.perf_counter() - started)
            applied.remove()
        size = path.stat().st_size
    found = {
        "sublayers": len(names),
        "iterations": k,
        "weights_gb": sum(p.numel() * 2 for p in model.parameters() if p.device.type != "meta") / 1e9,
        "edit_mb": size / 1e6,
        "apply_seconds": [round(s, 2) for s in seconds],
        "passes": size < 100e6 and max(seconds) < 5,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
