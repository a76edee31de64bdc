"""The model card that every export carries: what it is, what was measured, what it cannot do, and how to repeat it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import llmva
from llmva.edit import Edit
from llmva.export.plan import Plan
from llmva.report.figures import Row, comparison, finite, part, printable, skills, utility

PAPER = "https://arxiv.org/abs/2601.19487"
LIBRARY = {"lora": "peft", "merged": "transformers", "edit": "llmva"}
WHAT = {
    "lora": "a PEFT LoRA adapter that makes",
    "merged": "a merged model: the base's weights with an edit that makes",
    "edit": "an edit, two thin matrices a layer, that makes",
}
METRICS = {"f1": "F1 (positive: answered)", "asr": "harmful prompts answered (ASR)", "orr": "benign refused (ORR)"}
LIMITS = """- It is no guarantee. An attack unlike the prompts it was fitted on may still work.
- It can trade one failure for the other; the table says how it went on its test prompts.
- Other abilities may suffer. Only what the table names was measured.
- Refusals were told by the judge named below; read answers before you trust a number.
- The figures are of single turns with greedy answers."""


def card(plan: Plan, kind: str) -> str:
    """README.md for an export of `kind` "lora", "merged" or "edit": YAML metadata as the hub reads it, then text."""
    import yaml

    head = yaml.safe_dump(_metadata(plan, kind), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{_body(plan, kind)}"


def hub_id(plan: Plan) -> str | None:
    """The base's name on the hub; None for a model of this machine, whose path is nobody's business."""
    name = plan.title
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    return name if known and not Path(name).exists() and not name.endswith(".gguf") else None


def base_name(plan: Plan) -> str:
    """The base's name for people, without folders of this machine."""
    return hub_id(plan) or _inline(plan.title.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])


def public_edit(plan: Plan) -> Edit:
    """The edit as it may leave this machine: its base by name, not by path."""
    return replace(plan.edit, base={**plan.edit.base, "model": base_name(plan)})


def embed(plan: Plan, folder: Path) -> Path:
    """Keep the exact edit inside an export, so that `llmva verify` can later tell whether the export is that edit."""
    inside = folder / "llmva"
    inside.mkdir(exist_ok=True)
    return public_edit(plan).save(inside)


def measured(plan: Plan) -> bool:
    """Whether the run's test figures are of just what is shipped."""
    record = plan.record or {}
    return bool(part(dict(record), "test", "after")) and (
        plan.iteration == record.get("best_iteration") and plan.strength == 1.0
    )


def _metadata(plan: Plan, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": LIBRARY[kind],
        "pipeline_tag": "text-generation",
        "tags": ["llm-va", "safety", "over-refusal", "jailbreak", *(["lora"] if kind == "lora" else [])],
    }
    base = hub_id(plan)
    if base is not None:
        found = {"base_model": base, "base_model_relation": "adapter" if kind == "lora" else "finetune", **found}
    results = _results(plan)
    if results:
        found["model-index"] = [{"name": f"{base_name(plan)} with LLM-VA", "results": results}]
    return found


def _results(plan: Plan) -> list[dict[str, Any]]:
    if not measured(plan):
        return []
    after = part(dict(plan.record or {}), "test", "after")
    sources = sorted(str(name) for name in part(after, "by_source")) or ["test prompts"]
    metrics = [
        {"type": name, "name": text, "value": round(value, 4)}
        for name, text in METRICS.items()
        if (value := finite(after.get(name))) is not None
    ]
    dataset = {"name": _inline(", ".join(sources)), "type": "llm-va-test-prompts"}
    task = {"type": "text-generation", "name": "answering benign and refusing harmful prompts"}
    return [{"task": task, "dataset": dataset, "metrics": metrics}] if metrics else []


def _body(plan: Plan, kind: str) -> str:
    name = base_name(plan)
    record: dict[str, Any] = dict(plan.record or {})
    parts = [
        f"# {name} with LLM-VA",
        f"This is {WHAT[kind]} `{name}` answer what is benign and refuse what is harmful. It was made by "
        f"[llmva](https://pypi.org/project/llmva) {llmva.__version__}, without training.",
        "## Figures",
        _figures(plan, record),
        "## Use",
        _use(plan, kind),
        "## Method",
        f"LLM-VA ([arXiv 2601.19487]({PAPER})): in each chosen sublayer, the direction along which the model decides "
        "whether to answer is aligned with the direction along which it tells benign from harmful, in closed form. "
        f"What ships is iteration {plan.iteration} at strength {plan.strength:g}; {len(plan.edit.factors)} sublayers "
        "are edited.",
        _facts(plan, record),
        "## Intended use",
        "Chat models that are to refuse harmful requests and answer benign ones, and research on both failures. It is "
        "not meant for, and does not help with, removing refusals of harmful requests.",
        "## Limits",
        "\n".join([LIMITS, *(f"- {_inline(str(limit))}" for limit in record.get("limits") or [])]),
        "## Reproduce",
        _reproduce(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures(plan: Plan, record: dict[str, Any]) -> str:
    rows = [*comparison(record), *utility(record), *skills(record)] if part(record, "test", "after") else []
    if not rows:
        return "No test figures exist for this edit."
    lines = ["| test prompts | n | before | after |", "| --- | --- | --- | --- |"]
    lines += [_row(row) for row in rows]
    text = "\n".join(lines) + "\n\nBrackets are 95% intervals."
    if not measured(plan):
        text = (
            f"**These figures are of iteration {record.get('best_iteration')} at strength 1. What ships here is "
            f"iteration {plan.iteration} at strength {plan.strength:g}, which was not measured on them.**\n\n{text}"
        )
    return text


def _row(row: Row) -> str:
    cells = [
        ("- " if row.level else "") + _inline(row.name),
        "" if row.n is None else str(row.n),
        f"{row.before_text} {row.before_bracket}".strip(),
        f"{row.after_text} {row.after_bracket}".strip(),
    ]
    return "| " + " | ".join(cells) + " |"


def _use(plan: Plan, kind: str) -> str:
    base = hub_id(plan) or f"path/to/{base_name(plan)}"
    code = {
        "lora": f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/repository")""",
        "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/repository")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/repository")""",
        "edit": f"""import llmva

model, tokenizer = llmva.load_model({base!r})
edit = llmva.Edit.load("path/to/this/repository")
edit.apply(model)  # by hooks; edit.bake(model) writes it into the weights""",
    }[kind]
    return f"```python\n{code}\n```"


def _facts(plan: Plan, record: dict[str, Any]) -> str:
    base = plan.edit.base
    facts = [("base model", base_name(plan)), ("base sha256 (llmva's fingerprint)", base.get("sha256"))]
    facts += [(name, record.get(name)) for name in ("judge", "seed") if record.get(name) is not None]
    facts += [(f"setting {name}", value) for name, value in part(record, "settings").items()]
    for split, counts in part(record, "prompts", "counts").items():
        if isinstance(counts, dict):
            facts.append((f"{split} prompts", ", ".join(f"{k} {v}" for k, v in counts.items())))
    lines = ["| fact | value |", "| --- | --- |"]
    lines += [f"| {_inline(str(k))} | {_inline(str(v))} |" for k, v in facts if v is not None]
    return "\n".join(lines)


def _reproduce(record: dict[str, Any]) -> str:
    command = record.get("command")
    if not isinstance(command, str) or not command:
        return "The run was made from Python, so no command line is on record; its settings are above."
    versions = ", ".join(f"{k} {v}" for k, v in part(record, "versions").items() if k != "device")
    return f"```\n{printable(without_paths(command))}\n```\n\nWith {_inline(versions)}." if versions else command


def without_paths(command: str) -> str:
    """A command line with this machine's folders cut from its paths."""

    def short(word: str) -> str:
        return re.sub(r"(?:~|[A-Za-z]:)?[/\\](?:[^/\\:=]+[/\\])+", "", word)

    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(short(word) for word in words)


def _inline(text: str) -> str:
    """Text that stays on its line and in its cell."""
    return printable(" ".join(text.split())).replace("|", "\\|")
