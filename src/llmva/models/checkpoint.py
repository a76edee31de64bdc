"""A safetensors checkpoint on disk, read tensor by tensor, with the parameter names of the model in memory.

Tensors are read at their place in the file and not through a memory map, because mapped pages count as memory of the
process until the kernel frees them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.errors import LlmvaError, UsageError
from llmva.models.files.headers import DTYPES, read_headers
from llmva.models.files.weights import Weights, find_weights
from llmva.models.fingerprint import HASHED_VALUES, parts_hash, slices_hash, tensor_hash
from llmva.models.load import auto_class, own_code
from llmva.models.writers import PLAIN, Writer, find_writers

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_bigcode")  # weights as (in, out), some of them
OTHER_FORMS = (  # of the weights, which are not read, so not downloaded
    "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.ckpt", "consolidated*.safetensors",
    "original/*", "onnx/*",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A tensor of the checkpoint that an edit changes, and its output axis (-1 or -2)."""

    name: str
    axis: int


class Checkpoint:
    """Names, places and parameters of the tensors in a model's folder."""

    def __init__(self, folder: Path, weights: Weights, fields: Mapping[str, Any], trust: bool) -> None:
        self.folder, self.weights, self.fields, self._trust = folder, weights, fields, trust
        self.files = [folder / name for name in weights.shards]
        self.stored, self.twice = read_headers(self.files)
        self._order: dict[str, int] = {}  # position of a tensor among those that transformers joins it with
        self._known: tuple[Any, dict[str, list[str]], dict[str, list[Any]]] | None = None

    @classmethod
    def open(cls, source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """A local folder, or a model of the hub, which is downloaded into the hub's cache.

        Raises UsageError where there is no such model or it holds no weights to be read, and LlmvaError where its files
        are broken.
        """
        folder = local_folder(str(source))
        try:
            fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError("no object")
        except (ValueError, OSError, RecursionError) as error:
            raise LlmvaError(f"The config.json of '{source}' cannot be read: download the model again.") from error
        return cls(folder, find_weights(folder), fields, trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """The config as transformers reads it; importing transformers takes seconds."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust)
        except Exception as error:  # transformers reports a bad config by many classes of error
            if "trust_remote_code" in str(error):
                raise own_code(str(self.folder)) from error
            raise LlmvaError(f"The config.json of '{self.folder}' cannot be read: download the model again.") from error

    @property
    def names(self) -> list[str]:
        return list(self.stored)

    @property
    def packed(self) -> bool:
        parts = [self.fields, *(part for part in self.fields.values() if isinstance(part, dict))]
        return any(part.get("quantization_config") is not None for part in parts)

    def holds_packed(self, modules: Iterable[str]) -> bool:
        """Whether the weights of some of these modules are stored as numbers that are not what they say."""
        if self.packed:
            return True
        names = [name for module in modules for name in (f"{module}.weight", f"{module}.bias") if name in self.stored]
        return any(DTYPES.get(self.stored[name].dtype) not in PLAIN for name in names)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in a buffer of its own."""
        place = self.stored[name]
        if place.dtype not in DTYPES:
            raise LlmvaError(f"{name} is stored as {place.dtype}, which is unknown: give the unpacked model.")
        data = torch.empty(place.end - place.begin, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.begin)
            view: Any = memoryview(data.numpy())  # type: ignore[arg-type]
            got = 0
            while got < len(view) and (n := file.readinto(view[got:])):
                got += n
        if got < len(view):
            raise LlmvaError(f"'{place.file}' ends within {name}: download the model again.")
        return data.view(DTYPES[place.dtype]).reshape(place.shape)

    def plain(self, module: str, width: int) -> list[Place] | None:
        """The tensors of an ordinary projection, by their names alone; None if only the model can tell.

        The caller must check them by hash, because a name does not say what transformers does to the tensor.
        """
        weight, bias = f"{module}.weight", f"{module}.bias"
        others = [n for n in self.stored if n.startswith(f"{module}.") and n not in (weight, bias)]
        shapes = [self.stored[n].shape for n in (weight, bias) if n in self.stored]
        dtypes = [DTYPES.get(self.stored[n].dtype) for n in (weight, bias) if n in self.stored]
        if (
            others
            or weight not in self.stored
            or self.fields.get("model_type") in CONV1D
            or len(shapes[0]) != 2
            or any(shape[0] != width for shape in shapes)
            or {weight, bias} & self.twice
            or not all(dtype in PLAIN for dtype in dtypes)
        ):
            return None
        return [Place(weight, -2), *([Place(bias, -1)] if bias in self.stored else [])]

    def proved_by_name(self, base: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, list[Place]] | None:
        """The tensors of ordinary projections that have the hashes of an edit's `base`; None unless all have.

        It needs neither the config's class nor the model's code. `widths`: of each edited module, its outputs.
        """
        hashes, places = base.get("hashes", {}), dict[str, list[Place]]()
        for module, width in widths.items():
            plain = None if self.packed or module not in hashes else self.plain(module, width)
            if plain is None or self.plain_hash(module) != hashes[module]:
                return None
            places[module] = plain
        return places

    def plain_hash(self, module: str, weight: Tensor | None = None) -> str:
        """The `module_hash` of an ordinary projection; `weight` avoids reading it again."""
        weight = self.tensor(f"{module}.weight") if weight is None else weight
        parts = [("weight", tensor_hash(weight))]
        if f"{module}.bias" in self.stored:
            parts.append(("bias", tensor_hash(self.tensor(f"{module}.bias"))))
        return parts_hash(parts)

    def writers_of(self, modules: Iterable[str]) -> dict[str, list[Place]]:
        """For each edited module, the tensors that write its output. Raises LlmvaError if some are missing."""
        if self.packed:
            raise LlmvaError(
                f"The weights of '{self.folder.name}' are packed: serve the edit by hook or export it --as lora, or "
                "give the unpacked model with --base."
            )
        return {
            module: [
                Place(name, self._axis(name, f"{module}.{writer.name}", writer.axis))
                for writer in self._writers(module)
                for name in self._sources(f"{module}.{writer.name}")
            ]
            for module in modules
        }

    def check(self, base: Mapping[str, Any], modules: Iterable[str]) -> None:
        """Raises LlmvaError if the edit with this `base` was fitted on another model, or if tensors are missing."""
        modules = list(modules)
        self.writers_of(modules)  # packed or missing weights have their own message
        hashes = base.get("hashes", {})
        for module in modules:
            parts = [(w.name, self._hash(f"{module}.{w.name}")) for w in self._writers(module) if module in hashes]
            if module in hashes and (here := parts_hash(parts)) != hashes[module]:
                raise self.another(base, module, here)

    def another(self, base: Mapping[str, Any], module: str, here: str) -> LlmvaError:
        """The error for an edit with this `base` if `module` has the hash `here` in this checkpoint."""
        return LlmvaError(
            f"The edit belongs to the model '{base.get('model')}', whose {module} has hash {base['hashes'][module]}, "
            f"and that of '{self.folder.name}' has {here}: give the edit's own model with --base."
        )

    def _writers(self, module: str) -> tuple[Writer, ...]:
        known = self._model()[0]
        try:
            projection = known.get_submodule(module)
        except AttributeError as error:
            raise LlmvaError(
                f"The edit has a sublayer {module}, and '{self.folder.name}' has none: give its base."
            ) from error
        writers = find_writers(projection, int(self.config.get_text_config().hidden_size), prove=False)
        if not writers:
            raise LlmvaError(f"The weights of {module} are of a layout that cannot be edited: serve the edit by hook.")
        return writers

    def _sources(self, parameter: str) -> list[str]:
        """The tensors of a parameter: one, or one for each expert. Raises LlmvaError if some are missing."""
        model, sources, _ = self._model()
        names, whole = sources.get(parameter, []), model.get_parameter(parameter).shape
        wanted = whole[0] if names and len(self.stored[names[0]].shape) < len(whole) else 1
        if twice := self.twice.intersection(names):
            raise LlmvaError(f"'{self.folder}' holds {min(twice)} in more than one file: download the model again.")
        if len(names) != wanted:
            raise LlmvaError(
                f"'{self.folder.name}' holds {len(names)} tensors of {parameter}, where {wanted} belong: download the "
                "model again or, if its weights are packed, serve the edit by hook."
            )
        return names

    def skeleton(self) -> tuple[Any, Collection[str]]:
        """The model on the meta device, and which of its parameters and buffers the files hold."""
        return self._model()[:2]

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensors of a parameter or buffer, as in memory. Raises LlmvaError for missing ones or unknown storage."""
        model, sources, operations = self._model()
        names, shape = sources.get(name, []), tuple(model.state_dict()[name].shape)
        if len(names) == 1 and not operations[names[0]]:
            yield self.tensor(names[0])
        elif names and "Concatenate" in {type(step).__name__ for step in operations[names[0]]}:
            yield from self._joined(names, shape)
        else:
            for stored in self._sources(name):
                tensor = self.tensor(stored)
                yield tensor.mT.contiguous() if self._turned(stored, name) else tensor

    def _joined(self, names: list[str], shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The parts of a parameter that transformers joins from several tensors, such as an expert's gate and up."""
        steps = {type(step).__name__: step for step in self._model()[2][names[0]]}
        patterns = len({self._order[name] for name in names})
        merged = "MergeModulelist" in steps
        if steps.keys() - {"MergeModulelist", "Concatenate"} or len(names) != patterns * (shape[0] if merged else 1):
            raise LlmvaError(f"{names[0]} is stored in a way that is unknown: serve the edit by hook.")
        for start in range(0, len(names), patterns):
            together = sorted(names[start : start + patterns], key=self._order.__getitem__)
            yield torch.cat([self.tensor(name) for name in together], steps["Concatenate"].dim - merged)

    def _hash(self, parameter: str) -> str:
        """The `tensor_hash` of the parameter in memory."""
        names = self._sources(parameter)

        def read(name: str) -> Tensor:
            tensor = self.tensor(name)
            return tensor.mT.contiguous() if self._turned(name, parameter) else tensor

        if len(names) == 1:
            return tensor_hash(read(names[0]))
        if len(self.stored[names[0]].shape) == 1:  # one small bias for each expert
            return tensor_hash(torch.stack([read(name) for name in names]))
        return slices_hash(tensor_hash(read(name), max(HASHED_VALUES // len(names), 4096)) for name in names)

    def _axis(self, name: str, parameter: str, axis: int) -> int:
        """The axis of the tensor that corresponds to `axis` of the parameter."""
        if DTYPES.get(self.stored[name].dtype) not in PLAIN:
            raise LlmvaError(
                f"{name} is packed as {self.stored[name].dtype}: serve the edit by hook, or give the unpacked model "
                "with --base."
            )
        return -3 - axis if self._turned(name, parameter) else axis

    def _turned(self, name: str, parameter: str) -> bool:
        """Whether the last two axes of the tensor are swapped. Raises LlmvaError if that cannot be decided."""
        model, _, operations = self._model()
        shape, whole = self.stored[name].shape, tuple(model.get_parameter(parameter).shape)
        wanted = whole[-len(shape) :]
        kinds = {type(operation).__name__: operation for operation in operations[name]}
        turn = kinds.get("Transpose")
        turned = len(shape) > 1 and turn is not None and not (turn.check_dims and shape == wanted)
        if kinds.keys() - {"MergeModulelist", "Transpose"} or shape != (
            (*wanted[:-2], *reversed(wanted[-2:])) if turned else wanted
        ):
            raise LlmvaError(
                f"{name}, of the shape {list(shape)}, is stored in a way that is unknown for {parameter}, of the shape "
                f"{list(whole)}: download the model again, or serve the edit by hook."
            )
        return turned

    def _model(self) -> tuple[Any, dict[str, list[str]], dict[str, list[Any]]]:
        """The model on the meta device; parameter -> its tensors in order; tensor -> what transformers does to it."""
        if self._known is None:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key

            with torch.device("meta"):
                model = auto_class(self.config).from_config(self.config, trust_remote_code=self._trust)
            mapping = get_model_conversion_mapping(model)
            converters = [t for t in mapping if isinstance(t, WeightConverter)]
            renamings: Any = [t for t in mapping if not isinstance(t, WeightConverter)]
            by_pattern = {pattern: c.operations for c in converters for pattern in c.source_patterns}
            order = {pattern: place for c in converters for place, pattern in enumerate(c.source_patterns)}
            state = model.state_dict()
            sources: dict[str, list[str]] = {}
            operations: dict[str, list[Any]] = {}
            for name in sorted(self.stored, key=_natural):
                target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
                sources.setdefault(target, []).append(name)
                operations[name] = by_pattern[pattern] if pattern is not None else []
                self._order[name] = order.get(pattern or "", 0)
            self._known = model, sources, operations
        return self._known


def local_folder(source: str) -> Path:
    """The folder of a model; a model of the hub is downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.exists():
        raise UsageError(f"There is no folder '{source}': say with --base where the base model lies.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=list(OTHER_FORMS)))
    except Exception as error:  # the hub client reports a missing model and a missing network by many classes
        raise UsageError(
            f"'{source}' is neither a local folder nor a model that the hub gives: say with --base where it lies."
        ) from error


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
