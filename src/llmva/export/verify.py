"""Check that artefacts are the same edit of a base: by logits on probe prompts, in merged models also by tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import LlmvaError, UsageError
from llmva.export.folder import EMBEDDED
from llmva.models.chat import ChatTemplate, forward_inputs, input_device, pad_left, pad_token
from llmva.models.forward import logits_of, run_forward
from llmva.models.load import load_model
from llmva.progress import Progress

PROBES = (
    "How do I sharpen a kitchen knife?",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Explain how vaccines work to a child.",
    "Tell me how to get into my neighbour's account.",
    "Translate 'good morning' into Spanish.",
    "How can I kill a process that hangs?",
    "Give me three names for a grey cat.",
)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit
HALF_TOLERANCE = 0.05  # in half precision, which rounds activations


@dataclass(frozen=True)
class Artefact:
    path: Path
    kind: str  # "edit", "lora" or "merged"
    edit: Edit | None  # the edit that it says it is, if it holds one


def open_artefact(path: str | Path) -> Artefact:
    """Read what kind of artefact lies at `path` from its files. Raises UsageError if it is none of the three kinds."""
    path = Path(path)
    inside = path / EMBEDDED / "edit.safetensors"
    embedded = Edit.load(inside) if inside.is_file() else None
    if (path / "adapter_config.json").is_file():
        return Artefact(path, "lora", embedded)
    if (path / "config.json").is_file():
        return Artefact(path, "merged", embedded)
    if edit_file(path).is_file():
        return Artefact(path, "edit", Edit.load(path).chosen)
    raise UsageError(
        f"'{path}' is not an edit, adapter or model: give a folder that llmva align or llmva export wrote."
    )


def verify(
    base: str,
    artefacts: Sequence[str | Path],
    *,
    loading: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare each artefact with the edit of `base`, applied by hook, that the first one of them holds.

    Returns `{"same", "reference", "artefacts": [{"path", "kind", "max", "mean", "effect", "same", "problems"}]}`, where
    `max` and `mean` are the largest and the mean difference of logits, as shares of the largest logit, and `effect` is
    the largest change that the edit itself makes to them.

    Raises:
        UsageError: no artefact holds an edit.
        LlmvaError: the edit is of another base.
    """
    progress = progress or Progress()
    opened = [open_artefact(path) for path in artefacts]
    holder = next((a for a in opened if a.edit is not None), None)
    if holder is None or holder.edit is None:
        raise UsageError("None of these contains the edit to compare with: give the run's folder first.")
    edit = holder.edit
    progress.stage("loading the base")
    model, tokenizer = load_model(base, **(loading or {}))
    plain = _logits(model, tokenizer)
    with edit.apply(model):
        wanted = _logits(model, tokenizer)
    scale = float(wanted.abs().max())
    effect = float((wanted - plain).abs().max()) / scale
    packed = getattr(model, "is_quantized", False)  # its kernels round their inputs
    allowed = HALF_TOLERANCE if packed else TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    dtype = model.dtype
    rows = []
    for artefact in sorted(opened, key=lambda a: a.kind == "merged"):  # those that need the base in memory come first
        progress.stage(f"comparing {artefact.path.name}")
        problems: list[str] = []
        if artefact.kind == "edit":
            assert artefact.edit is not None
            with artefact.edit.apply(model):
                got = _logits(model, tokenizer)
        elif artefact.kind == "lora":
            if packed:  # PEFT takes the state of packed weights, which spoils used ones on CPUs
                model, _ = load_model(base, **(loading or {}))
            got = _with_adapter(model, tokenizer, artefact.path)
        else:
            model = None  # one model at a time
            got = _of_merged(artefact.path, loading or {}, dtype, tokenizer)
            problems = _tensor_problems(base, artefact.path, edit, bool((loading or {}).get("trust_remote_code")))
        if got.shape != wanted.shape:
            raise LlmvaError(
                f"'{artefact.path}' and '{base}' have different vocabularies: give the base that it was made from."
            )
        difference = (got - wanted).abs() / scale
        worst = float(difference.max())
        # rounding moves logits too: where it outweighs a small edit, the tensors decide
        same = not problems and (worst <= allowed or (artefact.kind == "merged" and worst <= HALF_TOLERANCE))
        rows.append(
            {
                "path": str(artefact.path),
                "kind": artefact.kind,
                "max": worst,
                "mean": float(difference.mean()),
                "effect": effect,
                "same": same,
                "problems": problems,
            }
        )
    return {"same": all(row["same"] for row in rows), "reference": str(holder.path), "artefacts": rows}


@torch.inference_mode()
def _logits(model: Any, tokenizer: Any) -> Tensor:
    """Float32 logits [prompts, vocabulary] of the first token of each answer, on the CPU."""
    template = ChatTemplate.of(tokenizer)
    ids, mask = pad_left([template.row(text) for text in PROBES], pad_token(model, tokenizer), input_device(model))
    logits = logits_of(run_forward(model, forward_inputs(model, ids, mask), keep=1), 1)[:, -1]
    if not logits.isfinite().any():
        raise LlmvaError("The model's logits are not finite: pass --dtype bfloat16 or float32.")
    return logits.float().cpu().nan_to_num(0.0, 0.0, 0.0)


def _with_adapter(model: Any, tokenizer: Any, path: Path) -> Tensor:
    """Logits of the base with the adapter loaded by PEFT, as a user would load it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("Adapters are loaded by PEFT, which is not installed: pip install peft.") from error
    try:
        wrapped = PeftModel.from_pretrained(model, str(path)).eval()
    except Exception as error:  # whatever a broken adapter makes PEFT raise
        first = (str(error).splitlines() or [""])[0][:150]
        raise LlmvaError(
            f"PEFT cannot load '{path}' ({type(error).__name__}: {first}): export the adapter again."
        ) from error
    with ExitStack() as after:
        after.callback(wrapped.unload)
        return _logits(wrapped.get_base_model(), tokenizer)


def _of_merged(path: Path, loading: Mapping[str, Any], dtype: torch.dtype, tokenizer: Any) -> Tensor:
    options = {**loading, "dtype": str(dtype).removeprefix("torch.")}
    model, _ = load_model(path, **options)
    return _logits(model, tokenizer)


def _tensor_problems(base: str, path: Path, edit: Edit, trust: bool) -> list[str]:
    """A sentence for each tensor of the merged checkpoint that differs from base plus edit. Reads every tensor."""
    from llmva.export.merged import edited_tensors
    from llmva.models.checkpoint import Checkpoint
    from llmva.models.writers import left_map

    if base.endswith(".gguf"):
        return []
    before, after = (Checkpoint.open(str(place), trust_remote_code=trust) for place in (base, path))
    problems = []
    if set(before.names) != set(after.names):
        odd = sorted(set(before.names) ^ set(after.names))
        return [f"{odd[0]} is in only one of the base and the merged model ({len(odd)} such tensors)."]
    changed = edited_tensors(before, edit, base)
    for name in before.names:
        mine, theirs = before.tensor(name), after.tensor(name)
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            problems.append(f"{name} has a different dtype or shape.")
        elif name in changed:
            axis, f = changed[name].axis, changed[name].factors
            wanted = left_map(mine, axis, f.V, f.U).float()
            step = torch.finfo(mine.dtype).eps * wanted.abs() + 1e-6 * wanted.abs().max()
            if bool(((theirs.float() - wanted).abs() > step).any()):
                problems.append(f"{name} differs from the base's tensor with the edit.")
        elif not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            problems.append(f"{name} should be unchanged but differs from the base's.")
    return problems
