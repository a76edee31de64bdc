"""Check that artefacts are the same edit of a base: by their tensors, and by logits on probe prompts.

Tensors tell how exact an artefact is, whatever the dtype; logits tell that it is applied at all. Differences of logits
are compared with the change that the edit itself makes. In half precision rounding may change logits as much. How much,
is measured on the base by rounding the outputs of its sublayers otherwise. If that outweighs the edit and the tensors
cannot be compared, an artefact is not called the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import LlmvaError, UsageError
from llmva.export.adapters.gguf_reading import adding, read_additions
from llmva.export.adapters.gguf_writing import ADAPTER as GGUF_ADAPTER
from llmva.export.folder import EMBEDDED
from llmva.export.proof import PACKED_SHARE, adapter_problems, addition_problems, edit_problems, merged_problems
from llmva.export.proof import SHARE as TENSOR_SHARE
from llmva.models.chat import ChatTemplate, forward_inputs, input_device, pad_left, pad_token
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.forward import logits_of, run_forward
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from llmva.models.writers import PLAIN
from llmva.progress import Progress
from llmva.runs.identity import TITLES, belongings
from llmva.runs.record import read_run
from llmva.settings import make_settings

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
SHARE = 0.05  # of the largest change that the edit makes to logits
ROUNDINGS = 3  # of the base, that say how far rounding moves logits
MARGIN = 4  # an artefact's logits may differ by this many times what these change
BELONGINGS = ("config", "generation", "tokenizer", "chat_template")  # that a merged model has as its base


@dataclass(frozen=True)
class Reference:
    """Logits of the base and of the base with the edit by hook, and how far rounding moves them.

    `noise` is of the dtype that the model computes in, `stored` of the one that its weights are stored in.
    """

    plain: Tensor
    wanted: Tensor
    noise: float
    stored: float
    dtype: str

    @property
    def effect(self) -> float:
        """The largest change that the edit makes."""
        return float((self.wanted - self.plain).abs().max())


@dataclass(frozen=True)
class Artefact:
    path: Path
    kind: str  # "edit", "lora", "gguf" or "merged"
    edit: Edit | None  # the edit that it says it is, if it holds one


def open_artefact(path: str | Path) -> Artefact:
    """Read what kind of artefact lies at `path` from its files. Raises UsageError if it is none of these kinds."""
    path = Path(path)
    inside = path / EMBEDDED / "edit.safetensors"
    embedded = Edit.load(inside) if inside.is_file() else None
    if (path / "adapter_config.json").is_file():
        return Artefact(path, "lora", embedded)
    if (path / GGUF_ADAPTER).is_file():
        return Artefact(path, "gguf", embedded)
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

    Returns `{"same", "reference", "artefacts": [{"path", "kind", "max", "mean", "effect", "noise", "same",
    "problems", "notes"}]}`. `max` and `mean` are the largest and the mean difference of logits, `effect` is the largest
    change that the edit itself makes to them, and `noise` the largest that rounding makes: all as shares of the largest
    logit. An artefact is the same edit if it has no problems.

    Raises:
        UsageError: no artefact holds an edit.
        LlmvaError: the edit is of another base.
    """
    progress, options = progress or Progress(), dict(loading or {})
    opened = [open_artefact(path) for path in artefacts]
    holder = next((a for a in opened if a.edit is not None), None)
    if holder is None or holder.edit is None:
        raise UsageError("None of these contains the edit to compare with: give the run's folder first.")
    edit = holder.edit
    progress.stage("loading the base")
    model, tokenizer = load_model(base, **options)
    ask = partial(_logits, system=system_of([artefact.path for artefact in opened]))
    options["dtype"] = str(model.dtype).removeprefix("torch.")
    plain = ask(model, tokenizer)
    with edit.apply(model):
        wanted = ask(model, tokenizer)
    epsilon = torch.finfo(model.dtype).eps
    steps = (epsilon, _stored_epsilon(base, epsilon))
    noise = {step: _rounding_noise(partial(ask, model, tokenizer), model, plain, step) for step in set(steps)}
    reference = Reference(plain, wanted, noise[steps[0]], noise[steps[1]], options["dtype"])
    known = {**belongings(model, tokenizer), "generation": _generation(model)}
    packed = getattr(model, "is_quantized", False)
    share = PACKED_SHARE if packed else TENSOR_SHARE
    rows = []
    for artefact in sorted(opened, key=lambda a: a.kind == "merged"):  # those that need the base in memory come first
        progress.stage(f"comparing {artefact.path.name}")
        proved = True  # whether the tensors were compared
        if artefact.kind == "edit":
            assert artefact.edit is not None
            problems = edit_problems(edit, artefact.edit)
            with artefact.edit.apply(model):
                got = ask(model, tokenizer)
        elif artefact.kind == "lora":
            if packed:  # PEFT takes the state of packed weights, which spoils used ones on CPUs
                model, _ = load_model(base, **options)
            with _with_adapter(model, artefact.path) as inside:
                got, problems = ask(inside, tokenizer), adapter_problems(inside, edit, share)
        elif artefact.kind == "gguf":
            added = read_additions(artefact.path / GGUF_ADAPTER, str(edit.base.get("model_type")), list(edit.factors))
            with adding(model, added):
                got, problems = ask(model, tokenizer), addition_problems(model, edit, added, share)
        else:
            model = None  # one model at a time
            merged, own_tokenizer = load_model(artefact.path, **options)
            got = ask(merged, tokenizer)
            problems = _other_belongings(known, merged, own_tokenizer, base)
            problems += merged_problems(base, artefact.path, edit, bool(options.get("trust_remote_code")))
            proved = not base.endswith(".gguf")
            del merged
        if got.shape != wanted.shape:
            raise LlmvaError(
                f"'{artefact.path}' and '{base}' have different vocabularies: give the base that it was made from."
            )
        rows.append(_row(artefact, reference, got, problems, proved=proved))
    return {"same": all(row["same"] for row in rows), "reference": str(holder.path), "artefacts": rows}


def _row(artefact: Artefact, reference: Reference, got: Tensor, problems: list[str], *, proved: bool) -> dict[str, Any]:
    """One of `artefacts`; `proved` says whether its tensors were compared."""
    difference, effect = (got - reference.wanted).abs(), reference.effect
    worst, rounding, scale = float(difference.max()), MARGIN * reference.noise, float(reference.wanted.abs().max())
    problems = list(problems)
    # the weights of a merged model are rounded as they are stored
    allowed = MARGIN * reference.stored if artefact.kind == "merged" and proved else rounding
    if worst > max(SHARE * effect, allowed) and not problems:
        problems.append(
            f"Logits differ by {worst / effect:.0%} of what the edit changes." if effect else "Logits differ."
        )
    notes = []
    if worst > SHARE * effect and not problems and artefact.kind != "edit":
        notes.append(f"Rounding moves logits by up to {allowed / scale:.2g}, so the tensors decided.")
    if rounding > effect / 2 and not proved:  # then an artefact that does nothing could pass too
        problems.append(f"In {reference.dtype} rounding outweighs what this edit changes: pass --dtype float32.")
    return {
        "path": str(artefact.path),
        "kind": artefact.kind,
        "max": worst / scale,
        "mean": float(difference.mean()) / scale,
        "effect": effect / scale,
        "noise": reference.noise / scale,
        "same": not problems,
        "problems": problems,
        "notes": notes,
    }


def system_of(paths: Sequence[Path]) -> str | None:
    """The system prompt of the first run among the artefacts."""
    folders = (edit_file(path).parent for path in paths)
    record = next((read_run(folder) for folder in folders if (folder / "run.json").is_file()), None)
    return None if record is None else make_settings(system=record["settings"].get("system")).system


@torch.inference_mode()
def _logits(model: Any, tokenizer: Any, system: str | None = None) -> Tensor:
    """Float32 logits [prompts, vocabulary] of the first token of each answer, on the CPU."""
    template = ChatTemplate.loaded(tokenizer, system)
    ids, mask = pad_left([template.row(text) for text in PROBES], pad_token(model, tokenizer), input_device(model))
    logits = logits_of(run_forward(model, forward_inputs(model, ids, mask), keep=1), 1)[:, -1]
    if not logits.isfinite().any():
        raise LlmvaError("The model's logits are not finite: pass --dtype bfloat16 or float32.")
    return logits.float().cpu().nan_to_num(0.0, 0.0, 0.0)


def _stored_epsilon(base: str, epsilon: float) -> float:
    """The step of the dtype that the base's weights are stored in, relative to their size; at least `epsilon`."""
    if base.endswith(".gguf"):
        return epsilon
    from llmva.models.checkpoint import Checkpoint
    from llmva.models.files.headers import DTYPES

    dtypes = {DTYPES.get(place.dtype) for place in Checkpoint.open(base).stored.values()}
    return max([epsilon, *(torch.finfo(dtype).eps for dtype in dtypes if dtype in PLAIN and dtype is not None)])


def _rounding_noise(ask: Callable[[], Tensor], model: Any, plain: Tensor, epsilon: float) -> float:
    """The largest change of a logit when the outputs of all sublayers change by up to `epsilon` of their size.

    `ask` gives the logits of the model as it is.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(module: Any, args: Any, output: Any) -> Any:
        o = first_tensor(output)
        step = 2 * torch.rand(o.shape, generator=generator) - 1
        moved = (o.float() * (1 + epsilon * step.to(o.device))).to(o.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple | list) else moved

    projections = [sublayer.projection for sublayer in find_decoder(model).sublayers]
    with hooked([projection.register_forward_hook(rounded) for projection in projections]):
        return max(float((ask() - plain).abs().max()) for _ in range(ROUNDINGS))


@contextmanager
def _with_adapter(model: Any, path: Path) -> Iterator[Any]:
    """The base with the adapter loaded by PEFT, as a user would load it."""
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
    try:
        yield wrapped.get_base_model()
    finally:
        wrapped.unload()


def _generation(model: Any) -> dict[str, Any]:
    """How others generate with the model unless told otherwise."""
    fields: dict[str, Any] = model.generation_config.to_dict()
    return {k: v for k, v in fields.items() if k != "transformers_version" and not k.startswith("_")}


def _other_belongings(known: Mapping[str, Any], merged: Any, tokenizer: Any, base: str) -> list[str]:
    """A sentence on what a merged model has otherwise than its base, beside weights."""
    here = {**belongings(merged, tokenizer), "generation": _generation(merged)}
    # a .gguf file holds these in a form of its own, which has to be translated
    names = [n for n in BELONGINGS if here[n] != known[n] and not base.endswith(".gguf")]
    titles = {**TITLES, "generation": "the generation config"}
    return [f"Not as in the base: {', '.join(titles[name] for name in names)}."] if names else []
