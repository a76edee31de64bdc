"""Does an edit that is fitted with --harden hold under attacks that the fit did not use? On organisms.

    python benchmarks/harden.py OUT [--models MODEL ...] [--seeds 42 7]    # the bundled organism without --models

Each model is aligned plainly and with --harden, by each seed, and its test prompts are asked under every attack that
fits into its context. Printed are ASR and ORR in the mean over models and seeds: untouched, plain edit, --harden; and
the means over attacks that the fit did not use. Runs and evaluations lie in OUT; the same command goes on where it
was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import llmva
from llmva.alignment import RunOptions
from llmva.attacks import Attack, bundled_attacks
from llmva.cli.inputs import choose_prompts, demo_model, quiet_libraries
from llmva.cli.options import Sources
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.files import write_json
from llmva.judges import make_judge
from llmva.method.harden import FITTED
from llmva.models.chat_model import ChatModel
from llmva.models.reading.context import context_length

TOKENS = 32  # of an answer
SMALL: dict[str, Any] = {"per_source": 64, "max_new_tokens": TOKENS, "endings_tokens": 0}
PLAIN = "as asked"
Rates = Mapping[str, Mapping[str, Any]]  # by attack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--models", nargs="+", default=[str(demo_model())])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 7])
    args = parser.parse_args()
    quiet_libraries()
    pairs = [
        [
            measure(path, seed, hardened, args.out / f"{i}-{seed}-{name}")
            for name, hardened in (("plain", False), ("harden", True))
        ]
        for i, path in enumerate(args.models)
        for seed in args.seeds
    ]
    print("\n".join(table(pairs)))


def measure(path: str, seed: int, hardened: bool, folder: Path) -> dict[str, Any]:
    """The record of `evaluate` of one edit, made where it is not there yet."""
    kept = folder / "attacks.json"
    if kept.is_file():
        record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return record
    model, tokenizer = llmva.load_model(path)
    prompts = choose_prompts(path, Sources(), seed)
    options = RunOptions(name=Path(path).name)
    result = llmva.align(model, tokenizer, prompts, seed=seed, out=folder, options=options, harden=hardened, **SMALL)
    chat, how = ChatModel.of(model, tokenizer), EvaluationSettings(seed, TOKENS, endings_tokens=0)
    attacks = [attack for attack in bundled_attacks() if fits(chat, attack, prompts)]
    record = evaluate(chat, prompts.test, make_judge("phrases"), how, edit=result.edit, attacks=attacks)
    del record["failed"]
    write_json(kept, record)
    return record


def fits(chat: ChatModel, attack: Attack, prompts: llmva.PromptSet) -> bool:
    limit = context_length(chat.model)
    rows = chat.rows([attack.apply(prompt).asked for prompt in prompts.test])
    return limit is None or max(map(len, rows)) + TOKENS <= limit


def table(pairs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown; a rate is the mean over runs."""
    first = pairs[0][0]
    names = [PLAIN, *(one["name"] for one in first["attacks"])]
    unseen = [name for name in names if name not in (PLAIN, *FITTED)]
    lines = ["| asked | in the fit | untouched | plain edit | with `--harden` |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        fitted = "yes" if name in (PLAIN, *FITTED) else "no"
        lines.append(f"| {name} | {fitted} | {' | '.join(cells(pairs, [name]))} |")
    lines.append(f"| mean of those not in the fit | | {' | '.join(cells(pairs, unseen))} |")
    for label, which in (("plain edit", 0), ("with --harden", 1)):
        after = [pair[which]["test"]["after"]["f1"] for pair in pairs]
        kept = [pair[which]["utility"]["kept"] for pair in pairs]
        lines.append(f"\n{label}: F1 as asked {mean(after):.3f}, next tokens kept {mean(kept):.3f}")
    return lines


def cells(pairs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> list[str]:
    """ASR and ORR in the mean over `names`: untouched, plain edit, hardened edit."""
    made = []
    for which, when in ((0, "before"), (0, "after"), (1, "after")):
        rates = [of_name(pair[which], name)[when] for pair in pairs for name in names]
        made.append(" / ".join(f"{mean(rate[key] for rate in rates):.3f}" for key in ("asr", "orr")))
    return made


def of_name(record: Mapping[str, Any], name: str) -> Rates:
    found: Rates = record["test"] if name == PLAIN else next(a for a in record["attacks"] if a["name"] == name)
    return found


if __name__ == "__main__":
    main()
