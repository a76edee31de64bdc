"""An organism on disk: a transformers model folder that also holds its prompts, its probes and its measurements.

`llmva/prompts.jsonl` (id, text, benign, source, split) and `llmva/skills.jsonl` (skill, prompt, expected, contains,
split) lie beside the usual files. Everything is written under temporary names and renamed, weights last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.organism.check import Measurements
from llmva.organism.skills import Probe
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt

PROMPTS, SKILLS, README = "llmva/prompts.jsonl", "llmva/skills.jsonl", "README.md"


def prepare(out: Path) -> None:
    """Make sure that `out` can be written; raises UsageError before any time is spent."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / PROMPTS).exists())):
        raise UsageError(f"{out} exists and is not an organism: name another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): name another folder with --out.") from error


def save(out: Path, model: Any, tokenizer: Any, prompts: PromptSet, probes: Iterable[Probe], readme: str) -> None:
    """Write the folder; an organism that was there is replaced file by file."""
    prepare(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as name:
        work = Path(name)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "llmva").mkdir()
        (work / README).write_text(readme, encoding="utf-8")
        _write(work / SKILLS, ({**p.fields(), "split": "test"} for p in probes))
        _write(
            work / PROMPTS,
            (
                {"id": p.id, "text": p.text, "benign": p.benign, "source": p.source, "split": split}
                for split, part in prompts.splits()
                for p in part
            ),
        )
        (out / "llmva").mkdir(exist_ok=True)
        files = [path for path in work.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path)):
            path.chmod(0o644)
            path.replace(out / path.relative_to(work))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(folder: Path) -> tuple[Any, Any, PromptSet, list[Probe]]:
    """(model, tokenizer, prompts, probes) of an organism's folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / PROMPTS).is_file() or not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is not an organism: make one with `python -m llmva.organism train --out {folder}`.")
    prompts, probes = read(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model, AutoTokenizer.from_pretrained(folder), prompts, probes


def read(folder: Path) -> tuple[PromptSet, list[Probe]]:
    """Only the prompts and probes."""
    rows = [json.loads(line) for line in (folder / PROMPTS).read_text(encoding="utf-8").splitlines()]

    def part(split: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(r["text"], r["benign"], r["source"]) for r in rows if r["split"] == split)

    probes = [
        Probe(r["skill"], r["prompt"], r.get("expected", ""), tuple(r.get("contains", ())))
        for r in map(json.loads, (folder / SKILLS).read_text(encoding="utf-8").splitlines())
    ]
    return PromptSet(part("train"), part("validation"), part("test")), probes


def table(measured: Measurements) -> str:
    """The measurements as a Markdown table."""
    rows = [
        ("toxic prompts answered (ASR)", measured.asr),
        ("benign prompts refused (ORR)", measured.orr),
        ("F1 (positive: benign and answered)", measured.f1),
        *((f"refused, {kind}", share) for kind, share in measured.refused.items()),
        *((f"skill, {skill}", share) for skill, share in measured.skills.items()),
        *((f"harm read at sublayer {i}", share) for i, share in enumerate(measured.readable[:-1])),
        ("harm read at the final residual", measured.readable[-1]),
    ]
    return "\n".join(["| figure | held-out |", "| --- | --- |", *(f"| {name} | {share:.3f} |" for name, share in rows)])
