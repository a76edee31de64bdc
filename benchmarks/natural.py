"""A chat model that nobody made for us: untouched, the paper's recipe and the default run, at home and on foreign sets.

    python benchmarks/natural.py MODEL SHARED OUT [--recipes default,paper] [--seeds 1] [--per-source 128] [--rows 400]
        [--max-new-tokens 128] [--foreign 50] [--iterations 30] [--bundled] [--only]

SHARED is a folder with data/: the paper's four sets (S-Eval attack and risk, NQ, ORFuzz) and data/transfer/
(XSTest-safe, OKTest, AdvBench and attacks). Every run fits on the first --rows rows of the four training files, of
which it sets validation and test prompts aside, and is measured on its test prompts; --bundled fits on the bundled
prompts instead, --only leaves the bundled prompts out that are read beside them. Then the untouched model and each
edit answer --foreign rows of each foreign set and of the paper's
validation files, which no fit has seen; what the model's context does not hold is left out. What is done stays in OUT,
so the same command goes on after an interruption. It writes OUT/natural.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llmva
from llmva.alignment import RunOptions
from llmva.cli.inputs import quiet_libraries
from llmva.evaluation.evaluate import EvaluationSettings, evaluate
from llmva.files import write_json, write_text
from llmva.judges import make_judge
from llmva.metrics.rates import f_beta
from llmva.models.chat_model import ChatModel
from llmva.models.generate import context_length
from llmva.prompts.load import read_prompts

HOME = {True: ("nq", "orfuzzset"), False: ("seval_attack", "seval_risk")}  # benign: names
FOREIGN = {True: ("xstest_safe", "oktest"), False: ("advbench", "attack_aim", "attack_jailbroken", "attack_pair")}


def sets(shared: Path, count: int) -> dict[str, tuple[bool, str]]:
    """Name -> (benign, where its rows are), of what no fit has seen."""
    found = {}
    for benign, names in HOME.items():
        found |= {f"{name} (val)": (benign, f"{shared}/data/{name}_val.csv:input:train[0:{count}]") for name in names}
    for benign, names in FOREIGN.items():
        places = (f"{shared}/data/transfer/{name}.csv:input:train[0:{count}]" for name in names)
        found |= {name: (benign, place) for name, place in zip(names, places, strict=True)}
    return found


def measure(
    chat: ChatModel, edit: llmva.Edit | None, where: dict[str, tuple[bool, str]], tokens: int
) -> dict[str, Any]:
    """Per set: its kind, the share that failed, and n; and F1 over the foreign sets together."""
    prompts, parts = [], {}
    for name, (benign, place) in where.items():
        rows = read_prompts([] if benign else [place], [place] if benign else []).prompts
        limit = (context_length(chat.model) or 10**9) - tokens
        rows = [prompt for prompt in rows if len(chat.row(prompt.text)) <= limit]
        if rows:  # the model may be too small for all of a set
            parts[name] = (len(prompts), len(prompts) + len(rows))
            prompts += rows
    settings = EvaluationSettings(max_new_tokens=tokens, endings_tokens=0)
    applied = edit.apply(chat.model) if edit is not None and edit.factors else None
    try:
        found = evaluate(chat, prompts, make_judge("phrases"), settings, parts=parts)["parts"]
    finally:
        if applied is not None:
            applied.remove()
    rows = {}
    for name in parts:
        benign = where[name][0]
        rates = found[name]["before"]
        key = "orr" if benign else "asr"
        rows[name] = {"benign": benign, "rate": rates[key], "interval": rates[f"{key}_interval"]}
        rows[name]["n"] = rates["n_benign" if benign else "n_toxic"]
    foreign = [row for name, row in rows.items() if "(val)" not in name]
    home = [row for name, row in rows.items() if "(val)" in name]
    return {"sets": rows, "f1_foreign": f1_of(foreign), "f1_home": f1_of(home)}


def f1_of(rows: list[dict[str, Any]]) -> float:
    refused = sum(row["rate"] * row["n"] for row in rows if row["benign"])
    answered = sum(row["rate"] * row["n"] for row in rows if not row["benign"])
    benign = sum(row["n"] for row in rows if row["benign"])
    return f_beta(benign - refused, answered, refused, 1.0)


def page(model: str, cells: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(cells.values()))["unseen"]["sets"])
    lines = [f"# {Path(model).name}", "", "ASR of toxic sets, ORR of benign ones, [95% interval].", ""]
    lines.append("| | " + " | ".join(cells) + " |")
    lines.append("| --- |" + " --- |" * len(cells))
    for key in ("f1_home", "f1_foreign"):
        lines.append(f"| {key} | " + " | ".join(f"{cell['unseen'][key]:.3f}" for cell in cells.values()) + " |")
    for name in names:
        rows = [cell["unseen"]["sets"][name] for cell in cells.values()]
        side = "ORR" if rows[0]["benign"] else "ASR"
        shown = (f"{row['rate']:.3f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" for row in rows)
        lines.append(f"| {side} {name} (n = {rows[0]['n']}) | " + " | ".join(shown) + " |")
    for key in ("test F1", "test ASR", "test ORR", "validation F1", "KL", "generated tokens of the fit", "stopped"):
        lines.append(f"| {key} | " + " | ".join(str(cell["run"].get(key, "")) for cell in cells.values()) + " |")
    return "\n".join(lines) + "\n"


def summary(record: dict[str, Any]) -> dict[str, Any]:
    before, after = record["test"]["before"], record["test"]["after"]
    shown = {f"test {key.upper()}": f"{before[key]:.3f} > {after[key]:.3f}" for key in ("f1", "asr", "orr")}
    shown["validation F1"] = ", ".join(f"{entry['f1']:.3f}" for entry in record["iterations"])
    shown["KL"] = round(record["utility"].get("kl") or 0.0, 4)
    shown["generated tokens of the fit"] = record["cost"]["fit_tokens"]
    shown["stopped"] = record["stopped"]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", default="default,paper")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--per-source", type=int, default=128)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--foreign", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--bundled", action="store_true", help="fit on the bundled prompts")
    parser.add_argument("--only", action="store_true", help="leave the bundled prompts out")
    args = parser.parse_args()
    quiet_libraries()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = llmva.load_model(args.model)
    chat = ChatModel.of(model, tokenizer)
    where, cells = sets(args.shared, args.foreign), {}

    def unseen(name: str, edit: llmva.Edit | None) -> dict[str, Any]:
        path = args.out / f"{name}.json"
        if not path.is_file():
            write_json(path, measure(chat, edit, where, args.max_new_tokens))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    cells["untouched"] = {"run": {}, "unseen": unseen("untouched", None)}
    for seed in range(42, 42 + args.seeds):
        if args.bundled:
            prompts = llmva.PromptSet.bundled()
        else:
            toxic, benign = (
                [f"{args.shared}/data/{name}_train.csv:input:train[0:{args.rows}]" for name in HOME[side]]
                for side in (False, True)
            )
            prompts = llmva.PromptSet.load(toxic, benign, seed=seed, only=args.only)
        for recipe in args.recipes.split(","):
            name = f"{recipe}-{seed}"
            result = llmva.align(
                chat.decoder,
                tokenizer,
                prompts,
                seed=seed,
                out=args.out / f"run-{name}",
                options=RunOptions(name=Path(args.model).name),
                recipe=recipe,
                iterations=args.iterations,
                per_source=args.per_source,
                max_new_tokens=args.max_new_tokens,
                endings_tokens=0,
            )
            run = summary(dict(result.record))
            print(name, json.dumps(run), flush=True)
            cells[name] = {"run": run, "unseen": unseen(name, result.edit)}
            write_text(args.out / "natural.md", page(args.model, cells))
    print((args.out / "natural.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
