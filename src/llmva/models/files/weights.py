"""Which files of a folder are the model's weights: one rule for loading a model and for exporting it.

The order is that of transformers, so that an export writes what was loaded. What transformers would load and no export
could write, or what is not the model that the folder seems to hold, is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from llmva.errors import LlmvaError, UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
VARIANT = re.compile(r"model\.(\w+)(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.(\w+)\.json")
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLED = re.compile(r"pytorch_model(?:-\d{5}-of-\d{5})?\.bin(?:\.index\.json)?")
POINTER = b"version "  # how the text begins that a clone without Git LFS has in a large file's place
LINKED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")  # of the model's files that may be links
OTHER_FORMS = (".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".bin")


@dataclass(frozen=True)
class Weights:
    """The weights of a model's folder.

    Attributes:
        shards: paths relative to the folder, sorted.
        index: the file that names the shards, relative to the folder; None where there is one file.
        notes: sentences about weights beside them that are not read.
    """

    shards: tuple[str, ...]
    index: str | None
    notes: tuple[str, ...] = ()


def find_weights(folder: Path) -> Weights:
    """The weights that transformers loads from `folder`. None of them is read but its first bytes.

    Raises:
        UsageError: the weights are in a form that llmva does not read, not all there, links to what is gone, or an
            adapter lies beside them.
        LlmvaError: the index cannot be read.
    """
    refuse_dangling(folder)
    refuse_adapter(folder)
    names = sorted(path.name for path in folder.iterdir())
    if any(DISTRIBUTED.fullmatch(name) for name in names):
        raise UsageError(
            f"'{folder}' holds a distributed checkpoint, which no export can write: load it with transformers and save "
            "it with save_pretrained."
        )
    chosen = _named_by_config(folder) or next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)
    if chosen is None:
        raise _no_weights(folder, names)
    if not chosen.endswith(".index.json"):
        _check_all_there(folder, [chosen], "config.json")
        return Weights((chosen,), None, _beside(folder, chosen))
    shards = _indexed(folder, chosen)
    _check_all_there(folder, shards, chosen)
    return Weights(tuple(shards), chosen)


def refuse_adapter(folder: Path) -> None:
    """Raises UsageError where transformers would load an adapter with the model, or where there is only an adapter."""
    if not (folder / ADAPTER).is_file():
        return
    merge = "merge it into the weights first (PEFT's merge_and_unload, then save_pretrained)"
    if not (folder / "config.json").is_file():
        raise UsageError(f"'{folder}' is an adapter and no model: {merge}, or give its base model.")
    raise UsageError(
        f"'{folder}' holds an adapter beside the model ({ADAPTER}), which is loaded with it and which no export would "
        f"contain: {merge}, or move {ADAPTER} out of the folder."
    )


def refuse_dangling(folder: Path) -> None:
    """Raises UsageError for a link to a file that is gone, as a copy of the hub's cache without its blobs has them."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and path.suffix in LINKED:
            raise UsageError(
                f"'{path}' is a link to a file that is not there: download the model again, or copy it with what its "
                "links lead to (cp -rL)."
            )


def model_inside(folder: Path) -> Path | None:
    """The only folder inside `folder` that holds a model, as in the hub's cache; None if there is not exactly one."""
    inside = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]
    return inside[0] if len(inside) == 1 else None


def findable(name: str) -> str:
    """A model's name as it can be found from another folder: a path whole, a hub id as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name and path.exists() else name  # noqa: PTH100 (resolve() follows links)


def leaves_folder(name: str) -> bool:
    """Whether a path that a file names is absolute, on any system, or leads out of the folder it is relative to."""
    path = PureWindowsPath(name)  # which knows both kinds of slash
    return bool(path.drive or path.root) or ".." in path.parts or not path.parts


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where the file is missing, broken, or holds something else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _named_by_config(folder: Path) -> str | None:
    """The file that config.json names in `transformers_weights`, which goes before the usual names."""
    name = read_object(folder / "config.json").get("transformers_weights")
    if not isinstance(name, str):
        return None
    if leaves_folder(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UsageError(
            f"The config.json of '{folder}' names the weights '{name}', which are no safetensors in this folder: "
            "correct transformers_weights there, or download the model again."
        )
    return name


def _indexed(folder: Path, index: str) -> list[str]:
    """The shards that an index names."""
    fields = read_object(folder / index)
    places = fields.get("weight_map")
    if (
        not isinstance(fields.get("metadata"), dict)  # transformers reads it
        or not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) for name in places.values())
    ):
        raise LlmvaError(f"'{folder / index}' cannot be read as an index of weights: download the model again.")
    shards = sorted(set(places.values()))
    for name in shards:
        if leaves_folder(name):
            raise UsageError(
                f"'{folder / index}' names the shard '{name}', which is not in this folder: write the shard's path "
                "relative to the folder into it and put the shard there, or download the model again."
            )
        if not name.endswith(".safetensors"):
            raise UsageError(f"'{folder / index}' names '{name}', which is no safetensors file: convert the model.")
    return shards


def _check_all_there(folder: Path, shards: Sequence[str], named_in: str) -> None:
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        rest = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UsageError(
            f"'{folder}' lacks {missing[0]}{rest}, which {named_in} names: download the model whole, or put them back."
        )
    for name in shards:
        with (folder / name).open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise LlmvaError(
                    f"'{folder / name}' is a pointer of Git LFS and not the weights: run git lfs pull in '{folder}'."
                )


def _beside(folder: Path, chosen: str) -> tuple[str, ...]:
    """A note where another complete set of weights could be taken for the model."""
    if chosen != SINGLE or not (folder / INDEX).is_file():
        return ()
    return (
        f"'{folder}' holds {SINGLE}, which is read and exported, and {INDEX} with other files, which are not: remove "
        "what is not the model, since other programs may read the other.",
    )


def _no_weights(folder: Path, names: list[str]) -> UsageError:
    """Why there is nothing to read, with the mend that fits what lies there instead."""
    if any(SHARD.fullmatch(name) for name in names):
        return UsageError(f"'{folder}' holds shards but no {INDEX}: download the model whole.")
    variants = [match for name in names if (match := VARIANT.fullmatch(name))]
    if variants:
        variant = variants[0][1] or variants[0][2]
        return UsageError(
            f"'{folder}' holds only the variant '{variant}' of its weights ({variants[0][0]}): load it with "
            f"transformers (variant='{variant}') and save it with save_pretrained, or download {SINGLE}."
        )
    pickled = next((name for name in names if PICKLED.fullmatch(name)), None)
    if pickled is not None:
        return UsageError(
            f"'{folder}' holds no weights in safetensors, only {pickled}, a pickle that may run code and that llmva "
            f"does not open: if you trust it, convert it with AutoModelForCausalLM.from_pretrained('{folder}')"
            ".save_pretrained('NEW') in transformers, copy the tokenizer's files, and give NEW."
        )
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return UsageError(f"'{folder}' holds no weights in safetensors, but {gguf}: give '{folder / gguf}'.")
    other = next((name for name in names if name.endswith((".safetensors", *OTHER_FORMS))), None)
    if other is not None:
        return UsageError(
            f"'{folder}' holds no weights in safetensors under the name {SINGLE} or with {INDEX}, only {other}: "
            "convert the model with transformers (save_pretrained), or download it whole."
        )
    return UsageError(f"'{folder}' holds no weights in safetensors: download the model whole or convert it.")
