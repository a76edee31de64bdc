"""The model card of every export: what it is, what was measured, what it cannot do, and how to repeat it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmva
from llmva.edit import Edit
from llmva.export.loader import Loader, find_loader
from llmva.export.plan import Plan
from llmva.export.redact import one_line, public_prompt, public_text, without_paths
from llmva.report.run.outcome import outcome
from llmva.report.run.rows import Row, comparison, skills, utility
from llmva.report.run.truth import truth_rows
from llmva.report.values import counted, finite, part, strength_text
from llmva.settings import excerpt

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "https://arxiv.org/abs/2601.19487"
HERE = "path/to/this/repository"  # until a push knows its name
LIBRARY = {"lora": "peft", "gguf": "llama.cpp", "merged": "transformers", "edit": "llmva"}
RELATION = {"lora": "adapter", "gguf": "adapter", "merged": "finetune", "edit": "adapter"}
WHAT = {
    "lora": "This is a low-rank weight edit of {base} as a PEFT LoRA adapter",
    "gguf": "This is a low-rank weight edit of {base} as a LoRA adapter for llama.cpp",
    "merged": "This is {base} with a low-rank edit merged into its weights",
    "edit": "This is a low-rank weight edit of {base}",
}
METRICS = {"f1": "F1 (positive: answered)", "asr": "harmful prompts answered (ASR)", "orr": "benign refused (ORR)"}
METHOD = f"""LLM-VA ([arXiv 2601.19487]({PAPER})): in each chosen sublayer, the direction along which the model decides
whether to answer is aligned with the direction along which it tells benign from harmful. Both come from linear SVMs on
what the sublayer adds to the residual stream; the edit is in closed form, without training."""
INTENDED = """Use it for chat models that should refuse harmful requests and answer benign ones, and for research on
both failures. It is not meant to remove refusals of harmful requests, and does not help with that."""
LIMITS = """- It gives no guarantee. An attack unlike the prompts it was fitted on may still work. Conversations of more
  than one turn, other languages, tools and sampling were not tested. Use it as one safety layer among others.
- It can trade one failure for the other. The table shows both on the test prompts.
- It acts on every token, so other abilities may suffer. Only the abilities in the table were measured.
- The labels of the prompts decided what counts as benign, and the run's judge decided what counts as a refusal. Read
  answers before you trust a number.
- All results are for single turns with greedy decoding."""
LLAMA_CPP = """The base as .gguf, in any quantisation, and the adapter:

    llama-server -m base.gguf --lora adapter.gguf

Or with Ollama, after the FROM in the Modelfile leads to that base:

    ollama create NAME -f Modelfile"""
CACHED = re.compile(r".*[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]+)[/\\]?", re.ASCII | re.DOTALL)


def card(plan: Plan, kind: str, repo: str | None = None) -> str:
    """README.md for an export: YAML metadata as the hub reads it, then text.

    `kind` is "lora", "gguf", "merged" or "edit". `repo` is the name on the hub from which it will be loaded, where that
    is known.
    """
    loader = find_loader(plan)
    return f"---\n{_metadata(plan, kind, loader)}\n---\n\n{_body(plan, kind, repo or HERE, loader)}"


def hub_id(plan: Plan) -> str | None:
    """The base's name on the hub; None for a model of this machine, whose path stays private.

    A folder of the hub's cache is the hub's.
    """
    cached = CACHED.fullmatch(plan.title)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    name = plan.title
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII)
    return name if known and not Path(name).exists() and not name.endswith(".gguf") else None


def hub_revision(plan: Plan) -> str | None:
    """The commit of the base on the hub that the edit was made on; None where it is not known.

    A branch moves, and an adapter is put on whatever weights its name gives.
    """
    cached = CACHED.fullmatch(plan.title)
    if hub_id(plan) is None:
        return None
    return cached[3] if cached else plan.edit.base.get("revision")


def base_name(plan: Plan) -> str:
    """The base's name for people, one line without folders of this machine."""
    return hub_id(plan) or one_line(plan.title.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]) or "unnamed"


def public_edit(plan: Plan) -> Edit:
    """The edit as it may leave this machine: its base by name, not by path."""
    return replace(plan.edit, base={**plan.edit.base, "model": base_name(plan)})


def strength(plan: Plan) -> float:
    """Strength relative to the edit as fitted, including the factor by which an edit was scaled before a push."""
    before = finite(part(dict(plan.record or {}), "shipped").get("strength"))
    return plan.strength * (1.0 if before is None else before)


def system_of(plan: Plan) -> str | None:
    """The system prompt that the edit was fitted with; None if that was the chat template's own, or is not known."""
    system = part(dict(plan.record or {}), "settings").get("system")
    return system if isinstance(system, str) and system.strip() else None


def measured(plan: Plan) -> bool:
    """Whether the run's test results are for exactly what is shipped."""
    record = dict(plan.record or {})
    return bool(part(record, "test", "after")) and (
        plan.iteration == record.get("best_iteration") and strength(plan) == record.get("best_strength", 1.0)
    )


def _metadata(plan: Plan, kind: str, loader: Loader) -> str:
    """The card's fields as YAML, without the marks around them."""
    from huggingface_hub import ModelCardData

    base, results = hub_id(plan), _results(plan)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else RELATION[kind],
        license=_license(plan),
        library_name=LIBRARY[kind],
        pipeline_tag=loader.task,
        tags=["llm-va", "safety", "over-refusal", "jailbreak", *(["lora"] if kind in ("lora", "gguf") else [])],
        model_name=f"{base_name(plan)} with LLM-VA" if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _license(plan: Plan) -> str | None:
    """The licence in the base's own card, if that is in the folder of its weights."""
    from huggingface_hub import metadata_load

    try:
        fields = metadata_load(Path(plan.base).expanduser() / "README.md") or {}
    except Exception:  # no card, or one that the hub's own parser cannot read
        return None
    name = fields.get("license")
    return name if isinstance(name, str) and re.fullmatch(r"[a-z0-9][\w.-]{0,60}", name, re.ASCII) else None


def _results(plan: Plan) -> list[EvalResult]:
    """The test results of what ships, one for each metric; empty where it was not measured."""
    from huggingface_hub import EvalResult

    if not measured(plan):
        return []
    after = part(dict(plan.record or {}), "test", "after")
    sources = sorted(public_text(str(name)) for name in part(after, "by_source")) or ["test prompts"]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="answering benign and refusing harmful prompts",
            dataset_type="llm-va-test-prompts",
            dataset_name=one_line(", ".join(sources)),
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for metric, name in METRICS.items()
        if (value := finite(after.get(metric))) is not None
    ]


def _body(plan: Plan, kind: str, repo: str, loader: Loader) -> str:
    name = base_name(plan)
    record: dict[str, Any] = dict(plan.record or {})
    n = len(plan.edit.factors)
    at = strength_text(strength(plan))
    ships = f"iteration {plan.iteration} at strength {at}. It edits {counted(n, 'sublayer')}."
    noted = record.get("limits")
    limits = [f"- {_plain(public_text(str(limit)))}" for limit in (noted if isinstance(noted, list) else [])]
    sections = {
        "Results": _results_section(plan, record),
        "Use": (LLAMA_CPP if kind == "gguf" else f"```python\n{_code_of(plan, kind, repo, loader)}\n```")
        + _serving(plan),
        "Method": f"{METHOD}\n\nThis export is {ships}\n\n{_facts(plan, record)}",
        "Intended use": INTENDED,
        "Limits": "\n".join([LIMITS, *limits]),
        "Reproduce": _reproduce(plan, record),
    }
    lead = (
        f"{WHAT[kind].format(base=_code(name))}, meant to make it answer what is benign and refuse what is harmful. "
        f"It was made by llmva {llmva.__version__}, in closed form and without training. It behaves differently from "
        "its base model."
    )
    return f"# {_plain(name)} with LLM-VA\n\n{lead}\n" + "".join(f"\n## {k}\n\n{v}\n" for k, v in sections.items())


def _results_section(plan: Plan, record: dict[str, Any]) -> str:
    shown = (comparison, truth_rows, utility, skills)
    rows = [row for of in shown for row in of(record)] if part(record, "test", "after") else []
    if not rows:
        return "**This edit has no test results.** Measure it with `llmva evaluate` before you use it."
    headline = outcome(record)
    notes = [headline.sentence, *headline.notes]
    if not measured(plan):
        notes = [
            f"**These results are for iteration {record.get('best_iteration')} at strength "
            f"{strength_text(record.get('best_strength', 1.0))}. This export is iteration {plan.iteration} at strength "
            f"{strength_text(strength(plan))}, which was not measured on the test prompts.**"
        ]
    table = ["| test prompts | n | before | after |", "| --- | --- | --- | --- |", *(_row(row) for row in rows)]
    return "\n\n".join([" ".join(map(_text, notes)), "\n".join(table), "Brackets hold 95% confidence intervals."])


def _row(row: Row) -> str:
    name = ", ".join(_plain(text) for text in (row.name, row.hint) if text)
    cells = [
        f"in {_code(public_text(row.name))}" if row.level else name,
        "" if row.n is None else str(row.n),
        row.before_cell,
        row.after_cell,
    ]
    return "| " + " | ".join(cells) + " |"


def _code_of(plan: Plan, kind: str, repo: str, loader: Loader) -> str:
    """Python that loads what is shipped."""
    base, packing = hub_id(plan) or f"path/to/{base_name(plan)}", plan.edit.base.get("quantize")
    pinned = f", revision={commit!r}" if (commit := hub_revision(plan)) else ""
    own_code = ", trust_remote_code=True" if loader.own_code else ""
    half = plan.edit.base.get("dtype") == "float16"  # which rounds the weights that the edit knows
    form = f"{f', quantize={packing!r}' if packing else ''}{', dtype=' + repr('float16') if half else ''}"
    options = f"{form}{own_code}{pinned}"
    ours = f"llmva.load_model({base!r}{options})"
    if kind == "edit":
        known = repo != HERE
        imports = "import llmva\nfrom huggingface_hub import snapshot_download\n" if known else "import llmva"
        return f"""{imports}
model, tokenizer = {ours}
edit = llmva.Edit.load({f"snapshot_download({repo!r})" if known else repr(repo)})
edit.apply(model)  # by hooks; edit.bake(model) writes it into the weights"""
    if kind == "lora" and (packing or base.endswith(".gguf")):  # not loaded in this form by the name alone
        return f"""import llmva
from peft import PeftModel

model, tokenizer = {ours}
model = PeftModel.from_pretrained(model, {repo!r})"""
    name, place = (loader.whole, repo) if kind == "merged" else (loader.part, base)
    own_code += pinned if kind == "lora" else ""
    code = f"""from transformers import {name}, AutoTokenizer

model = {name}.from_pretrained({place!r}{own_code})
tokenizer = AutoTokenizer.from_pretrained({place!r}{own_code})"""
    if kind == "lora":
        code = f"from peft import PeftModel\n{code}\nmodel = PeftModel.from_pretrained(model, {repo!r})"
    return code


def _serving(plan: Plan) -> str:
    """What goes with every prompt, beside the template; "" for nothing."""
    system = system_of(plan)
    if system is None:
        return ""
    told = "The edit was fitted with this system prompt, so serve the model with it:"
    # indented, not fenced, as the command below
    return f"\n\n{told}\n\n    {one_line(excerpt(public_prompt(system)))}"


def _facts(plan: Plan, record: dict[str, Any]) -> str:
    facts = [
        ("base model", base_name(plan)),
        ("base sha256 (llmva's fingerprint)", plan.edit.base.get("sha256")),
        ("judge", record.get("judge")),
        ("seed", record.get("seed")),
    ]
    facts += [(f"setting {name}", value) for name, value in part(record, "settings").items() if name != "system"]
    if (system := system_of(plan)) is not None:
        facts.append(("setting system", excerpt(public_prompt(system))))
    for split, counts in part(record, "prompts", "counts").items():
        if isinstance(counts, dict):
            facts.append((f"{split} prompts", ", ".join(f"{k} {v}" for k, v in counts.items())))
    lines = [f"| {_plain(public_text(str(k)))} | {_code(public_text(str(v)))} |" for k, v in facts if v is not None]
    return "\n".join(["| fact | value |", "| --- | --- |", *lines])


def _reproduce(plan: Plan, record: dict[str, Any]) -> str:
    command = record.get("command")
    if not isinstance(command, str) or not command.strip():
        return "No command line was recorded: the run was made from Python, or this edit came without its `run.json`."
    versions = ", ".join(f"{_plain(str(k))} {_plain(str(v))}" for k, v in part(record, "versions").items())
    # indented, not fenced, so that nothing within the line can end the block
    shown = one_line(without_paths(command, plan.title, base_name(plan)))
    return f"    {shown}" + (f"\n\nVersions: {versions}." if versions else "")


def _text(text: str) -> str:
    """A sentence of ours with names in it: bold marks stay, what could open HTML, a link or a cell does not."""
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", one_line(text))


def _plain(text: str) -> str:
    """Text that shows as it is: on its line, in its cell, without markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(text))


def _code(text: str) -> str:
    """A code span, also in a table's cell."""
    inside = one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{inside}`" if inside else ""
