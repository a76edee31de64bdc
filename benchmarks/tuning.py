"""Is there anything to tune? The default run against a grid and against the paper's fixed recipe, on organisms.

    python benchmarks/tuning.py --keep DIR [--architectures llama qwen3 gemma2 phi3] [--seeds 1 2 3 4 5] [--no-grid]
    python benchmarks/tuning.py --keep DIR --model REAL --toxic ... --benign ...    # a model of one's own

Trains what is missing in DIR (5 to 10 minutes each), then for each model, all on the same prompts:

- default: `llmva.align` without any setting;
- recipe: the paper's, 42 of 64 sublayers, 30 iterations of full steps, plain SVMs, best validation iteration;
- grid: 6 numbers of sublayers x 3 steps x 15 iterations, every point measured on the test prompts, the best of which is
  chosen there: no run could do so, it is what tuning could reach at most.

Cost is generated tokens of training and validation answers. Every part is kept in DIR/cells, so a killed run goes on.
A grid takes about 20 minutes a model on two idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llmva
from llmva.alignment import RunOptions
from llmva.cli.inputs import choose_probes, choose_prompts, quiet_libraries
from llmva.cli.options import Sources
from llmva.experiments.cells import Cells
from llmva.judges import make_judge
from llmva.method.identify import papers_count
from llmva.method.observe import observe
from llmva.metrics.rates import point_rates
from llmva.models.chat_model import ChatModel
from llmva.models.sublayers import find_decoder

SHARES = (0.25, 0.375, 0.5, 0.65625, 0.8125, 1.0)
STEPS = (0.25, 0.5, 1.0)
GRID_ITERATIONS, RECIPE_ITERATIONS = 15, 30
FREE = {"min_kept": 0.0, "max_kl": 1e9, "passes": 1, "patience": 0}  # nothing but F1 counts, nothing stops early
WIDTHS = {"llama": 96, "qwen3": 96, "phi3": 96, "gemma2": 128}


def organism(architecture: str, seed: int, keep: Path) -> Path:
    path = keep / f"{architecture}-{seed}"
    if not (path / "model.safetensors").is_file():
        sizes = ["--architecture", architecture, "--width", str(WIDTHS.get(architecture, 96))]
        command = [sys.executable, "-m", "llmva.organism", "train", "--seed", str(seed), "--out", str(path), *sizes]
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
            print(f"{path.name} misses its gates; measured all the same", flush=True)
    return path


class Case:
    """A model with its prompts and the parts measured on it."""

    def __init__(self, name: str, path: str, cells: Cells, toxic: Sequence[str], benign: Sequence[str]) -> None:
        self.name, self.cells = name, cells
        self.model, self.tokenizer = llmva.load_model(path)
        self.prompts = choose_prompts(path, Sources(toxic, benign), 42)
        self.probes = choose_probes(path, None)
        self.decoder = find_decoder(self.model)
        self.judge = make_judge("phrases")

    def tested(self, edit: llmva.Edit) -> dict[str, Any]:
        with edit.apply(self.model, check=False):
            seen = observe(
                ChatModel.of(self.decoder, self.tokenizer), self.prompts.test, self.judge, max_new_tokens=128
            )
        return point_rates(seen.prompts, seen.labels)

    def default(self) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            record = llmva.align(self.model, self.tokenizer, self.prompts, skills=self.probes).record
            names = ("iterations", "best_iteration", "stopped", "test", "utility", "cost")
            return {name: record[name] for name in names}

        return self.cells.get(f"{self.name}-default", run)

    def plain(self, name: str, iterations: int, tested: bool, **settings: Any) -> dict[str, Any]:
        """A run that nothing stops early: figures by iteration, with the tokens generated up to each."""

        def run() -> dict[str, Any]:
            result = llmva.align(
                self.model,
                self.tokenizer,
                self.prompts,
                options=RunOptions(measure_test=False),
                **{**FREE, "iterations": iterations, **settings},
            )
            last = len(result.record["iterations"]) - 1
            best = result.record["best_iteration"]
            wanted = range(last + 1) if tested else (best,)
            return {
                "tokens": result.record["cost"]["fit_tokens"],
                "iterations": last,
                "best": best,
                "validation": [entry["f1"] for entry in result.record["iterations"]],
                "kl": [entry.get("kl") for entry in result.record["iterations"]],
                "test": {str(t): self.tested(result.every.at(t))["f1"] for t in wanted},
            }

        return self.cells.get(f"{self.name}-{name}", run)


def report(case: Case, grid: bool) -> dict[str, Any]:
    found = case.default()
    sublayers = len(case.decoder.sublayers)
    before, after = found["test"]["before"], found["test"]["after"]
    # what the choice cost: the iterations' answers, not those of the final report
    tokens = found["cost"]["fit_tokens"]
    recipe = case.plain("recipe", RECIPE_ITERATIONS, False, layers=papers_count(sublayers), harmless_weight=0.0)
    recipe_f1 = recipe["test"][str(recipe["best"])]
    row: dict[str, Any] = {
        "name": case.name,
        "before": before["f1"],
        "default": after["f1"],
        "interval": after["f1_interval"],
        "recipe": recipe_f1,
        "tokens to recipe": tokens / recipe["tokens"],
        "kl": found["utility"].get("kl"),
        "perplexity": found["utility"].get("perplexity"),
        "skills": {k: v["after"] / v["before"] for k, v in found["utility"]["skills"].items() if v["before"]},
    }
    if grid:
        counts = sorted({max(1, round(share * sublayers)) for share in SHARES})
        runs = [
            case.plain(f"grid-{n}-{step}", GRID_ITERATIONS, True, layers=n, step=step) for n in counts for step in STEPS
        ]
        row["grid"] = max(f1 for run in runs for f1 in run["test"].values() if f1 is not None)
        row["tokens to grid"] = tokens / sum(run["tokens"] for run in runs)
    return row


def show(row: Mapping[str, Any]) -> None:
    low, high = row["interval"]
    skills = " ".join(f"{name} {kept:.3f}" for name, kept in row["skills"].items())
    grid = f" | grid {row['grid']:.3f} at {1 / row['tokens to grid']:.0f} times the tokens" if "grid" in row else ""
    recipe = f"recipe {row['recipe']:.3f} at {1 / row['tokens to recipe']:.1f} times the tokens"
    kl = "" if row["kl"] is None else f" | kl {row['kl']:.4f} perplexity {row['perplexity']:.3f}"
    print(
        f"{row['name']}: F1 {row['before']:.3f} > {row['default']:.3f} [{low:.3f}, {high:.3f}] | {recipe}{grid}{kl} | "
        f"left of skills: {skills}",
        flush=True,
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> None:
    from scipy.stats import wilcoxon

    print(f"\n{len(rows)} models")
    ours, theirs = [r["default"] for r in rows], [r["recipe"] for r in rows]
    differ = any(a != b for a, b in zip(ours, theirs, strict=True))
    p = wilcoxon(ours, theirs, alternative="greater").pvalue if differ else 1.0
    print(f"mean F1: default {statistics.mean(ours):.4f}, recipe {statistics.mean(theirs):.4f}, Wilcoxon p {p:.4f}")
    worse = [r["name"] for r in rows if r["interval"][1] < r["before"]]
    print(f"below the untouched model by more than the interval: {', '.join(worse) or 'none'}")
    kept = [r["name"] for r in rows if all(left >= 0.99 for left in r["skills"].values())]
    print(f"every skill keeps 99%: {len(kept)} of {len(rows)}")
    print(f"tokens over the recipe's, most: {max(r['tokens to recipe'] for r in rows):.3f}")
    if gridded := [r for r in rows if "grid" in r]:
        near = sum(r["default"] >= 0.98 * r["grid"] for r in gridded)
        print(f"at least .98 of the best of the grid: {near} of {len(gridded)}")
        print(f"tokens over the grid's, most: {max(r['tokens to grid'] for r in gridded):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder for models and cells")
    parser.add_argument("--architectures", nargs="+", default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--no-grid", action="store_true")
    parser.add_argument("--model", help="instead of organisms")
    parser.add_argument("--toxic", action="append", default=[])
    parser.add_argument("--benign", action="append", default=[])
    args = parser.parse_args()
    quiet_libraries()
    cells = Cells(args.keep / "tuning", {"shares": SHARES, "steps": STEPS, "toxic": args.toxic, "benign": args.benign})
    rows = []
    if args.model:
        names = [(Path(args.model).name, args.model)]
    else:
        names = [(f"{a}-{s}", str(organism(a, s, args.keep))) for s in args.seeds for a in args.architectures]
    for name, path in names:
        rows.append(report(Case(name, path, cells, args.toxic, args.benign), not args.no_grid))
        show(rows[-1])
    summary(rows)


if __name__ == "__main__":
    main()
