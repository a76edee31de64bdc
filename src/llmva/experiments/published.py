"""What others have published for the same base, as a row of a comparison: a LoRA adapter, or all weights.

`adapter:PATH_OR_ID[@REVISION]` is applied by hooks, `model:PATH_OR_ID[@REVISION]` by putting its weights in the place
of the base's for as long as it is measured. Prompts, chat template and judge stay those of the comparison.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmva.errors import LlmvaError, UsageError
from llmva.models.chat_model import ChatModel
from llmva.models.load import load_model
from llmva.progress import Progress
from llmva.runs.identity import belongings

KINDS = ("adapter", "model")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model."
# of an adapter's config: what changes its arithmetic in ways that hooks on outputs do not follow
UNUSABLE = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "target_parameters", "layer_replication",
    "alora_invocation_tokens",
)  # fmt: skip


def is_published(method: str) -> bool:
    """Whether a method is named by its place."""
    return method.partition(":")[0] in KINDS and ":" in method


@dataclass(frozen=True)
class Published:
    """`applied` makes a context in which the model is as published; `about` is what a record says of it."""

    applied: Callable[[], Any]
    about: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_published(method: str, chat: ChatModel, base: str, progress: Progress | None = None) -> Published:
    """Read what `method` names, and check that it belongs to the loaded model.

    Args:
        base: what the comparison calls its model.

    Raises:
        UsageError: no such place, another base, or a kind of adapter that is not known here.
    """
    kind, _, place = method.partition(":")
    name, _, revision = place.partition("@") if not Path(place).expanduser().exists() else (place, "", "")
    if not name:
        raise UsageError(f"'{method}' names no place: write {kind}:PATH_OR_ID.")
    if kind == "adapter":
        return _adapter(name, revision or None, chat, base)
    return _weights(name, revision or None, chat, base, progress or Progress())


# -- adapters ----------------------------------------------------------------------------------------------------


def _adapter(name: str, revision: str | None, chat: ChatModel, base: str) -> Published:
    from safetensors.torch import load_file

    folder, commit = _folder(name, revision, [CONFIG, WEIGHTS, "README.md"])
    config = _json(folder / CONFIG, name)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"The adapter '{name}' is of the kind {config.get('peft_type')}: only LoRA is known here.")
    if unusable := [key for key in UNUSABLE if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise UsageError(
            f"The adapter '{name}' uses {unusable[0]}, which is not known here: merge it into its base, and name the "
            "merged weights as model:PATH."
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"The adapter '{name}' has no {WEIGHTS}: convert it, since other formats may run code.")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises an exception of its own
        raise UsageError(f"The file '{path}' cannot be read ({error}): download it again.") from error
    pairs = _pairs(name, tensors, config, chat.model)
    licence, told = _card(folder)
    about = {
        "kind": "adapter",
        "path": name,
        "revision": commit,
        "licence": licence,
        "base": config.get("base_model_name_or_path") or told,
        "sha256": _digest(path, folder / CONFIG),
        "modules": len(pairs),
    }
    return Published(partial(_hooked, pairs), about, _notes(about, base))


@dataclass(frozen=True)
class _Pair:
    """The output of `module` grows by scale * B A x; A [rank, in], B [out, rank], float32."""

    module: nn.Module
    A: Tensor
    B: Tensor
    scale: float

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(self.A.dtype)
        grown: Tensor = output + (self.scale * ((x @ self.A.T) @ self.B.T)).to(output.dtype)
        return grown


def _pairs(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: Any) -> list[_Pair]:
    modules = dict(model.named_modules())
    device = {key: parameter.device for key, parameter in model.named_parameters()}
    pairs = []
    for place in dict.fromkeys(_place(name, key) for key in tensors):
        A, B = (tensors.get(f"{KEY}{place}.lora_{side}.weight") for side in "AB")
        module = modules.get(place)
        if A is None or B is None:
            raise UsageError(f"The adapter '{name}' has half a pair for {place}: download it again.")
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if sizes != (A.shape[1], B.shape[0]) or A.shape[0] != B.shape[1]:
            here = "no such module" if module is None else f"{sizes[0]} to {sizes[1]}"
            raise UsageError(
                f"The adapter '{name}' is for another base: it changes {place}, {A.shape[1]} to {B.shape[0]}, and the "
                f"model has {here}."
            )
        where = device.get(f"{place}.weight", next(iter(device.values())))
        pairs.append(_Pair(module, A.float().to(where), B.float().to(where), _scale(config, place)))  # type: ignore[arg-type]
    if not pairs:
        raise UsageError(f"The adapter '{name}' holds no tensors: download it again.")
    return pairs


def _place(name: str, key: str) -> str:
    """The module of a tensor. Raises UsageError for one that is of no LoRA pair."""
    place, _, last = key.removeprefix(KEY).rpartition(".lora_")
    if not key.startswith(KEY) or last not in ("A.weight", "B.weight"):
        raise UsageError(
            f"The adapter '{name}' holds {key}, which is not known here: merge it into its base, and name the merged "
            "weights as model:PATH."
        )
    return place


def _scale(config: Mapping[str, Any], place: str) -> float:
    """alpha / rank of a module, by the first pattern that its name matches, as PEFT reads them."""

    def of(patterns: str, otherwise: str, default: float) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", place):
                return float(value)
        return float(config.get(otherwise) or default)

    rank, alpha = of("rank_pattern", "r", 8), of("alpha_pattern", "lora_alpha", 8)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


@contextmanager
def _hooked(pairs: list[_Pair]) -> Iterator[None]:
    handles = [pair.module.register_forward_hook(pair) for pair in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- weights -----------------------------------------------------------------------------------------------------


def _weights(name: str, revision: str | None, chat: ChatModel, base: str, progress: Progress) -> Published:
    if getattr(chat.model.config, "quantization_config", None) is not None:
        raise UsageError(f"Published weights cannot stand in for quantised ones: leave --quantize out, or '{name}'.")
    progress.note(f"loading {name}")
    dtype = str(chat.model.dtype).removeprefix("torch.")
    other, tokenizer = load_model(name, device="cpu", dtype=dtype, revision=revision)
    here, there = belongings(chat.model, chat.tokenizer), belongings(other, tokenizer)
    own, theirs = dict(chat.model.named_parameters()), dict(other.named_parameters())
    differing = next((key for key in own if key not in theirs or theirs[key].shape != own[key].shape), None)
    if differing or own.keys() != theirs.keys():
        which = differing or next(key for key in theirs if key not in own)
        raise UsageError(f"The weights '{name}' are for another base: {which} has another shape, or is in one alone.")
    if here["config"] != there["config"]:
        raise UsageError(f"The weights '{name}' are for another base: their config computes otherwise.")
    changed = {key: value.detach() for key, value in theirs.items() if not torch.equal(value, own[key].cpu())}
    folder = Path(name).expanduser()
    licence, told = _card(folder) if folder.exists() else _hub_card(name, revision)
    commit = getattr(other.config, "_commit_hash", None)
    about = {
        "kind": "model",
        "path": name,
        "revision": commit or revision,
        "licence": licence,
        "base": told,
        "sha256": _tensors_digest(changed),
        "tensors": len(changed),
    }
    notes = list(_notes(about, base))
    if not changed:
        notes.append(f"{name} has the weights of the base.")
    for part, title in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        if here[part] != there[part]:
            notes.append(f"{name} comes with another {title}; it is measured with that of the base.")
    return Published(partial(_swapped, own, changed), about, tuple(notes))


@contextmanager
def _swapped(own: Mapping[str, nn.Parameter], changed: Mapping[str, Tensor]) -> Iterator[None]:
    """The published values in the parameters, and at the end those of the base, to the bit."""
    before = {key: own[key].data for key in changed}
    try:
        for key, value in changed.items():
            own[key].data = value.to(own[key].device)
        yield
    finally:
        for key, value in before.items():
            own[key].data = value


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    from llmva.models.fingerprint import whole_hash

    lines = [f"{key} {whole_hash(value, exact=True)}" for key, value in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -- places and cards --------------------------------------------------------------------------------------------


def _folder(name: str, revision: str | None, files: list[str]) -> tuple[Path, str | None]:
    """Where the files are on this disk, and the commit of those from the hub."""
    local = Path(name).expanduser()
    if local.is_dir():
        return local, None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"There is no folder '{name}': give a folder with {CONFIG}, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of the hub's client, or of the network
        reason = str(error).strip().split("\n")[0]
        raise LlmvaError(
            f"'{name}' cannot be fetched from the hub ({reason}): check the name, or download it."
        ) from error
    return folder, folder.name


def _card(folder: Path) -> tuple[str | None, str | None]:
    """Licence and base as the model card in a folder states them; None for what it does not."""
    path = folder / "README.md"
    if not path.is_file():
        return None, None
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path).data
    except Exception:  # a card is free text, and its metadata may be anything
        return None, None
    return _text(getattr(data, "license", None)), _text(getattr(data, "base_model", None))


def _hub_card(name: str, revision: str | None) -> tuple[str | None, str | None]:
    try:
        folder, _ = _folder(name, revision, ["README.md"])
    except LlmvaError:
        return None, None
    return _card(folder)


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return None if value is None else str(value)


def _notes(about: Mapping[str, Any], base: str) -> tuple[str, ...]:
    notes = []
    if about["licence"] is None:
        notes.append(f"{about['path']} states no licence.")
    if about["base"] and Path(about["base"]).name != Path(base).name:
        notes.append(f"{about['path']} says that its base is {about['base']}; here it is applied to {base}.")
    return tuple(notes)


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{name}' has no readable {path.name}: give the folder of a PEFT adapter.") from error
    if not isinstance(value, dict):
        raise UsageError(f"'{name}' has no readable {path.name}: give the folder of a PEFT adapter.")
    return value


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
