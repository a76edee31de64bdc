"""What a whole run costs, phase by phase: tokens through the model, products, seconds.

    python benchmarks/costs.py [MODEL] [--toxic SPEC ...] [--benign SPEC ...] [--per-source N] [--max-new-tokens N]

Without MODEL it is the run of `llmva demo`. Seconds depend on the machine, the other columns do not.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import llmva
from counting import counted
from llmva.alignment import RunOptions
from llmva.cli.inputs import Sources, choose_prompts, demo_model, quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    parser.add_argument("--toxic", action="append", default=[])
    parser.add_argument("--benign", action="append", default=[])
    parser.add_argument("--per-source", type=int, default=None)
    parser.add_argument("--max-new-tokens", type=int, default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-test", action="store_true", help="leave the end of the run out")
    args = parser.parse_args()
    quiet_libraries()
    model, tokenizer = llmva.load_model(args.model, dtype=args.dtype)
    prompts = choose_prompts(args.model, Sources(args.toxic, args.benign), seed=0)
    chosen = {"per_source": args.per_source, "max_new_tokens": args.max_new_tokens}
    settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    busy, started = time.process_time(), time.perf_counter()
    with counted(model) as meter:
        options = RunOptions(measure_test=not args.no_test)
        result = llmva.align(model, tokenizer, prompts, seed=args.seed, options=options, **settings)
    busy, passed = time.process_time() - busy, time.perf_counter() - started
    print(meter.table())
    fit = meter.total(without=("end of the run",))
    for entry in result.record["iterations"]:
        shown = {k: entry[k] for k in ("iteration", "f1", "asr", "orr", "kl", "foretold", "passes") if k in entry}
        print(json.dumps(shown))
    print(f"fit: {fit.tokens:,} tokens, {fit.flops / 1e12:.3f} TFLOP")
    print(f"generated: {result.record['cost']['generated_tokens']:,}, fit {result.record['cost'].get('fit_tokens'):,}")
    after = result.record.get("test", {}).get("after", {})
    print(
        f"test F1 {after.get('f1')}, stopped: {result.record['stopped']}, iteration {result.record['best_iteration']}"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"processor time {busy:.0f} s, wall {passed:.0f} s, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
