"""What v_b reads: AUC of o.v_b on prompts of other origin, by what it is fitted on. No answer is generated.

    python benchmarks/readers.py MODEL SHARED OUT [--per-source 128] [--seeds 1] [--edit DIR] [--rows 200]

SHARED is a folder with data/ as benchmarks/natural.py takes it. Vectors are fitted on up to twice --per-source prompts
of each of the paper's four training files, of each bundled kind, and of both: as the paper does (M = I, C = 1), with a
cost in units of the outputs' deviation, in the metric of random messages too, and as the default run does, quiet on
differences between sources as well. AUC is the share of pairs, one benign prompt and one toxic one, that o.v_b orders
rightly. It is given as the mean over the middle two thirds of the sublayers, and with --edit over the sublayers of that
edit; in brackets the least of them. The last column is the accuracy on the validation files of the summed readings
o.v_b / sigma_b. Captures of the untouched model stay in OUT, named after a hash of the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmva
from llmva.cli.inputs import quiet_libraries
from llmva.edit import Edit
from llmva.method.context import READ_TIMES, SCALED_C, SOURCE_WEIGHT
from llmva.method.identify import Fit, benign_vector
from llmva.method.left_out import auc
from llmva.models.chat_model import ChatModel
from llmva.models.generate import answer_prompts
from llmva.models.harmless import random_messages
from llmva.prompts.load import read_prompts
from llmva.prompts.types import Prompt
from natural import FOREIGN, HOME

HOW = {  # each adds something to the one before
    "paper": Fit(),
    "scaled cost": Fit(C=SCALED_C, scaled=True),
    "harmless metric": Fit(C=SCALED_C, scaled=True),
    "default": Fit(C=SCALED_C, scaled=True, source_weight=SOURCE_WEIGHT),
}
PAIRS = {
    "XSTest / AdvBench": ("xstest_safe", "advbench"),
    "OKTest / AdvBench": ("oktest", "advbench"),
    "both / attacks": ("xstest_safe+oktest", "attack_aim+attack_jailbroken+attack_pair"),
    "NQ / S-Eval attack": ("nq (val)", "seval_attack (val)"),
    "ORFuzz / S-Eval risk": ("orfuzzset (val)", "seval_risk (val)"),
    "bundled test": ("alarming (test)+plain (test)", "harmful (test)+jailbreak (test)"),
}


def texts_of(shared: Path, rows: int) -> dict[str, tuple[bool, list[str]]]:
    """Name -> (benign, texts) of every set: (train) is for fits, all others are for AUC."""
    sets: dict[str, tuple[bool, list[str]]] = {}
    bundled = llmva.PromptSet.bundled()
    for split, prompts in (("train", bundled.train), ("test", bundled.test)):
        for prompt in prompts:
            sets.setdefault(f"{prompt.source} ({split})", (prompt.benign, []))[1].append(prompt.text)
    for benign in (True, False):
        files = {f"{name} (train)": f"{shared}/data/{name}_train.csv" for name in HOME[benign]}
        files |= {f"{name} (val)": f"{shared}/data/{name}_val.csv" for name in HOME[benign]}
        files |= {name: f"{shared}/data/transfer/{name}.csv" for name in FOREIGN[benign]}
        for name, file in files.items():
            place = f"{file}:input:train[0:{rows}]"
            prompts = read_prompts([] if benign else [place], [place] if benign else []).prompts
            sets[name] = (benign, [prompt.text for prompt in prompts])
    return sets


def captured(chat: ChatModel, name: str, texts: list[str], out: Path) -> Tensor:
    """Outputs of the sublayers, [S, n, d], from OUT if they lie there."""
    key = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    file = out / f"{name.replace(' ', '-')}-{key}.safetensors"
    if not file.is_file():
        outputs = answer_prompts(chat, texts, max_new_tokens=0).outputs
        save_file({"outputs": outputs.float().contiguous()}, file)
        print(f"{name}: {len(texts)} prompts", flush=True)
    return load_file(file)["outputs"]


def aucs(benign: Tensor, toxic: Tensor) -> Tensor:
    """AUC by sublayer, [S], of projections [S, n] and [S, m]."""
    return torch.tensor([auc(one, other) for one, other in zip(benign, toxic, strict=True)], dtype=torch.float64)


def fit_on(train: dict[str, tuple[bool, Tensor]], count: int, seed: int, harmless: Tensor | None, how: Fit) -> Tensor:
    """v_b of every sublayer, [S, d], on a draw of `count` prompts of each source."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    prompts: list[Prompt] = []
    for name, (benign, outputs) in train.items():
        drawn = torch.randperm(outputs.shape[1], generator=generator)[:count]
        parts.append(outputs[:, drawn])
        prompts += [Prompt(f"{name} {i}", benign, name) for i in range(len(drawn))]
    features = torch.cat(parts, 1)
    return torch.stack(
        [
            benign_vector(x.double(), prompts, how.metric(None if harmless is None else harmless[s]), how)
            for s, x in enumerate(features)
        ]
    )


def summed_accuracy(outputs: dict[str, tuple[bool, Tensor]], vectors: Tensor, chosen: list[int]) -> float:
    """Share of the prompts `outputs` on whose side the sum of o.v_b / sigma_b over the sublayers `chosen` is."""
    read = {name: torch.einsum("snd,sd->sn", x[chosen].double(), vectors[chosen]) for name, (_, x) in outputs.items()}
    sigma = torch.cat(list(read.values()), 1).std(1, correction=0)[:, None]
    right = [(read[name] / sigma).sum(0).sign() == (1 if benign else -1) for name, (benign, _) in outputs.items()]
    return float(torch.cat(right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-source", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--edit", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="of each file at most")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    quiet_libraries(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = llmva.load_model(args.model, dtype=args.dtype)
    chat = ChatModel.of(model, tokenizer)
    sets = texts_of(args.shared, args.rows)
    outputs = {name: (benign, captured(chat, name, texts, args.out)) for name, (benign, texts) in sets.items()}
    messages = random_messages(chat, 256, torch.Generator().manual_seed(0))
    harmless = captured(chat, "random messages", messages, args.out)

    number = len(chat.decoder.names)
    groups = {"middle": list(range(number // 6, number - number // 6))}
    if args.edit is not None:
        edited = Edit.load(args.edit).factors
        groups["edited"] = [s for s, name in enumerate(chat.decoder.names) if name in edited]
    bundled = llmva.PromptSet.bundled().counts()
    own = {f"{source} (train)": outputs[f"{source} (train)"] for source in bundled}
    papers = {f"{name} (train)": outputs[f"{name} (train)"] for names in HOME.values() for name in names}

    def projections(names: str, vectors: Tensor) -> Tensor:
        parts = [torch.einsum("snd,sd->sn", outputs[name][1].double(), vectors) for name in names.split("+")]
        return torch.cat(parts, 1)

    for group, chosen in groups.items():
        print(f"\n{Path(args.model).name}, {group} sublayers ({len(chosen)} of {number}), {args.per_source} a source\n")
        print("| fitted on | how | " + " | ".join(PAIRS) + " | right, validation files |")
        print("| --- | --- |" + " --- |" * (len(PAIRS) + 1))
        files = {f"{name} (val)": outputs[f"{name} (val)"] for names in HOME.values() for name in names}
        count = READ_TIMES * args.per_source
        for name, train in (("bundled", own), ("paper's four", papers), ("both", {**papers, **own})):
            for metric, how in HOW.items():
                text = None if metric in ("paper", "scaled cost") else harmless
                seeds = [fit_on(train, count, seed, text, how) for seed in range(args.seeds)]
                cells = []
                for benign, toxic in PAIRS.values():
                    each = torch.stack([aucs(projections(benign, v), projections(toxic, v)) for v in seeds]).mean(0)
                    cells.append(f"{each[chosen].mean():.3f} [{each[chosen].min():.2f}]")
                right = sum(summed_accuracy(files, v, chosen) for v in seeds) / len(seeds)
                print(f"| {name} | {metric} | " + " | ".join(cells) + f" | {right:.3f} |", flush=True)


if __name__ == "__main__":
    main()
