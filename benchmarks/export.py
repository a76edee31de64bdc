"""Merged export of a large sharded checkpoint beside `cp -r` on the same disk: throughput, peak memory, equal bytes.

    python benchmarks/export.py [--gb 6] [--folder DIR] [--rounds 3]

Random bfloat16 weights in shards of about 1 GB; an edit of rank 20 in 42 of 64 sublayers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmva.edit import Edit, Factors
from llmva.models.checkpoint import Checkpoint
from llmva.models.fingerprint import parts_hash, tensor_hash

WIDTH, BLOCKS, RANK = 2048, 32, 20
# VmHWM, since ru_maxrss begins with that of the process which started this one
CODE = """
import json, re, sys
from pathlib import Path
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
facts = export_merged(make_plan(sys.argv[1]), sys.argv[2])
status = Path("/proc/self/status")
if status.exists():
    facts["peak_bytes"] = int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) * 1024
print(json.dumps(facts))
"""


def make(folder: Path, gigabytes: float) -> None:
    """A Llama whose MLPs are as wide as the size asks for, written shard by shard."""
    from transformers import LlamaConfig, LlamaForCausalLM

    inner = int((gigabytes * 1e9 / 2 / BLOCKS - 4 * WIDTH * WIDTH) / (3 * WIDTH)) // 64 * 64
    config = LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=inner, num_hidden_layers=BLOCKS, num_attention_heads=16,
        dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    base = folder / "base"
    base.mkdir()
    config.save_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**24, generator=generator).bfloat16() * 0.02  # repeated: drawing 3e9 numbers takes minutes
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(s.numel() for s in shards[-1].values()) * 2 > 1e9:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            n: block.repeat(-(-s.numel() // len(block)))[: s.numel()].reshape(s).clone() for n, s in shard.items()
        }
        save_file(tensors, base / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    names = [f"model.layers.{b}.{end}" for b in range(BLOCKS) for end in ("self_attn.o_proj", "mlp.down_proj")][-42:]
    columns = torch.arange(1, RANK + 1, dtype=torch.int32)
    parts = {
        n: Factors(*(torch.randn(WIDTH, RANK, generator=generator) / WIDTH**0.5 for _ in "VU"), columns.clone())
        for n in names
    }
    checkpoint = Checkpoint.open(base)  # with hashes, as a run's edit has them: the export is to check them
    hashes = {n: parts_hash([("weight", tensor_hash(checkpoint.tensor(f"{n}.weight")))]) for n in names}
    Edit(parts, {"model": str(base), "hashes": hashes}).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; the default is the temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        make(folder, args.gb)
        copy, out = folder / "copy", folder / "out"
        copies, exports, processes = [], [], []
        for i in range(args.rounds + 1):
            started = time.monotonic()
            subprocess.run(["cp", "-r", str(folder / "base"), str(copy)], check=True)
            copies.append(time.monotonic() - started)
            shutil.rmtree(copy)
            started = time.monotonic()
            run = subprocess.run(
                [sys.executable, "-c", CODE, str(folder), str(out)], check=True, stdout=subprocess.PIPE
            )
            processes.append(time.monotonic() - started)
            facts = json.loads(run.stdout.splitlines()[-1])
            exports.append(facts["seconds"])
            if i < args.rounds:
                shutil.rmtree(out)
        before, after = Checkpoint.open(folder / "base"), Checkpoint.open(out)
        changed = {p.name for places in before.writers_of(Edit.load(folder).factors).values() for p in places}
        wrong = [n for n in before.names if torch.equal(before.tensor(n), after.tensor(n)) != (n not in changed)]
        # the first round warms the cache
        a, b, c = (statistics.median(times[1:]) for times in (copies, exports, processes))
        print(
            f"cp -r {a:.2f} s, export {b:.2f} s, {a / b:.2f} of its throughput ({a / c:.2f} with the start of Python), "
            f"peak {facts['peak_bytes'] / 1e9:.2f} GB"
        )
        print(f"{len(changed)} tensors changed, {len(before.names) - len(changed)} not, {len(wrong)} wrong")


if __name__ == "__main__":
    main()
