"""`python -m llmva.organism train` rebuilds the bundled model; `python -m llmva.organism check DIR` measures one."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmva.errors import LlmvaError, UsageError

if TYPE_CHECKING:
    from llmva.organism.train import Recipe

THREADS = 2  # sums depend on the number of threads, so the weights' bytes would too


def _train(out: Path, seed: int, changes: dict[str, Any]) -> None:
    from llmva.organism import folder
    from llmva.organism.check import measure
    from llmva.organism.language import draw_prompt_set
    from llmva.organism.readme import readme
    from llmva.organism.skills import probes
    from llmva.organism.train import Recipe, build_model, train

    recipe = _recipe(Recipe(), changes)
    build_model(recipe, seed)  # raises, if the model cannot be built, before a folder is made
    folder.prepare(out)
    started = time.monotonic()
    model, tokenizer = train(recipe, seed, lambda line: print(line, file=sys.stderr, flush=True))
    prompts, asked = draw_prompt_set(), probes(120)
    measured = measure(model, tokenizer, prompts.train, prompts.test, asked)
    folder.save(out, model, tokenizer, prompts, asked, readme(recipe, seed, model, measured))
    print(folder.table(measured))
    print(f"{out}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    if failures := measured.failures():
        raise LlmvaError(f"the organism in {out} misses its gates ({'; '.join(failures)}): try another --seed.")


def _recipe(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The shipped recipe with the user's changes; the MLP's width scales with the width."""
    steps, width = changes.get("steps", recipe.steps), changes.get("width", recipe.width)
    if steps < 1:
        raise UsageError(f"--steps must be 1 or more, not {steps}.")
    if width < 1 or width % (2 * recipe.heads):  # each head turns pairs of numbers
        raise UsageError(f"--width must be a multiple of {2 * recipe.heads}, not {width}.")
    return replace(recipe, **changes, hidden=recipe.hidden * width // recipe.width)


def _check(path: Path) -> None:
    from llmva.organism import folder
    from llmva.organism.check import measure

    model, tokenizer, prompts, asked = folder.load(path)
    measured = measure(model, tokenizer, prompts.train, prompts.test, asked)
    print(folder.table(measured))
    if failures := measured.failures():
        raise LlmvaError(f"{path} misses the gates ({'; '.join(failures)}): train one with another --seed.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmva.organism", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from scratch, measure, write a model folder")
    command.add_argument(
        "--out", type=Path, default=Path("llmva-organism"), help="folder to write (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the first weights and the training text (default: 0)")
    command.add_argument("--steps", type=int, help="training steps (default: the shipped model's)")
    command.add_argument("--architecture", help="such as qwen3, phi3 or gemma2 (default: llama)")
    command.add_argument("--width", type=int, help="of the residual stream (default: the shipped model's)")
    command = commands.add_parser("check", help="measure an organism; exit 1 if it misses the gates")
    command.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads slow a busy machine
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        if given.command == "train":
            asked = {name: getattr(given, name) for name in ("steps", "architecture", "width")}
            _train(given.out, given.seed, {name: value for name, value in asked.items() if value is not None})
        else:
            _check(given.folder)
    except LlmvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
