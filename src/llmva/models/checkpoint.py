"""A safetensors checkpoint on disk, read tensor by tensor, with the names that the model in memory has for them.

Tensors are read by their place in the file rather than through a memory map, whose pages would count as the process's
memory until the kernel takes them back.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.errors import LlmvaError, UsageError
from llmva.models.fingerprint import parts_hash, slices_hash, tensor_hash
from llmva.models.load import auto_class
from llmva.models.writers import PLAIN, find_writers

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.ckpt")  # other forms of them


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Place:
    """A tensor of the checkpoint that an edit changes, and its axis (-1 or -2) that runs over the outputs."""

    name: str
    axis: int


class Checkpoint:
    """Names, places and meaning of the tensors in a model's folder."""

    def __init__(self, folder: Path, stored: Mapping[str, Stored], config: Any) -> None:
        self.folder, self.stored, self.config = folder, stored, config
        self._known: tuple[Any, dict[str, list[str]], set[str]] | None = None

    @classmethod
    def open(cls, source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """A local folder, or a model of the hub, which is downloaded into the hub's cache.

        Raises UsageError where there is no such model and LlmvaError where its files are broken.
        """
        folder = local_folder(str(source))
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers reports a bad config by many classes of error
            raise LlmvaError(f"The config.json of '{source}' cannot be read: download the model again.") from error
        stored: dict[str, Stored] = {}
        for file in _shards(folder):
            stored |= read_header(file)[1]
        return cls(folder, stored, config)

    @property
    def names(self) -> list[str]:
        return list(self.stored)

    @property
    def files(self) -> list[Path]:
        """The shards, in order of their names."""
        return sorted({place.file for place in self.stored.values()})

    @property
    def packed(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    def tensor(self, name: str) -> Tensor:
        """One tensor, in a buffer of its own."""
        place = self.stored[name]
        if place.dtype not in DTYPES:
            raise LlmvaError(f"{name} is stored as {place.dtype}, which is unknown: give the unpacked model.")
        data = bytearray(place.end - place.begin)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.begin)
            view, got = memoryview(data), 0
            while got < len(data) and (n := file.readinto(view[got:])):
                got += n
        if got < len(data):
            raise LlmvaError(f"'{place.file}' ends within {name}: download the model again.")
        dtype = DTYPES[place.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(place.shape)

    def writers_of(self, modules: Iterable[str]) -> dict[str, list[Place]]:
        """For each edited module, the tensors that carry its output. Raises LlmvaError where they are not all there."""
        model, sources, transposed = self._model()
        found = {}
        by_name = dict(model.named_modules())
        for module in modules:
            if module not in by_name:
                raise LlmvaError(f"The edit has a sublayer {module}, and '{self.folder.name}' has none: give its base.")
            width = int(self.config.get_text_config().hidden_size)
            writers = find_writers(by_name[module], width, prove=False)
            places = []
            for writer in writers:
                parameter = f"{module}.{writer.name}"
                whole = tuple(model.get_parameter(parameter).shape)
                for name in sources.get(parameter, []):
                    places.append(Place(name, self._axis(name, whole, writer.axis, name in transposed)))
            covered = {w.name for w in writers if sources.get(f"{module}.{w.name}")}
            if not writers or covered != {w.name for w in writers}:
                raise LlmvaError(
                    f"The weights of {module} are packed or missing in '{self.folder.name}': serve the edit by hook, "
                    "or give the unpacked model with --base."
                )
            found[module] = places
        return found

    def check(self, base: Mapping[str, Any], modules: Iterable[str]) -> None:
        """Raises LlmvaError if the edit with this `base` was fitted on another model."""
        model, sources, transposed = self._model()
        hashes = base.get("hashes", {})
        by_name = dict(model.named_modules())
        for module in modules:
            if module not in hashes or module not in by_name:
                continue
            parts = []
            for writer in find_writers(by_name[module], 0, prove=False):
                names = sources.get(f"{module}.{writer.name}", [])
                whole = model.get_parameter(f"{module}.{writer.name}").shape
                parts.append((writer.name, self._hash(names, len(whole), transposed)))
            here = parts_hash(parts)
            if here != hashes[module]:
                raise LlmvaError(
                    f"The edit belongs to the model '{base.get('model')}', whose {module} has hash {hashes[module]}, "
                    f"and that of '{self.folder.name}' has {here}: give the edit's own model with --base."
                )

    def _hash(self, names: list[str], ndim: int, transposed: set[str]) -> str:
        from llmva.models.fingerprint import HASHED_VALUES

        def read(name: str) -> Tensor:
            tensor = self.tensor(name)
            return tensor.transpose(-1, -2).contiguous() if name in transposed else tensor

        if ndim == 3 and len(self.stored[names[0]].shape) == 2:  # an expert a tensor
            return slices_hash(tensor_hash(read(n), max(HASHED_VALUES // len(names), 4096)) for n in names)
        return tensor_hash(read(names[0]))

    def _axis(self, name: str, whole: tuple[int, ...], axis: int, transposed: bool) -> int:
        place = self.stored[name]
        if DTYPES.get(place.dtype) not in PLAIN:
            raise LlmvaError(
                f"{name} is packed as {place.dtype}: serve the edit by hook, or give the unpacked model with --base."
            )
        wanted = whole[-len(place.shape) :]
        turned = (*wanted[:-2], *reversed(wanted[-2:]))
        if place.shape != (turned if transposed else wanted):
            raise LlmvaError(f"{name} has the shape {list(place.shape)}, which its config does not explain.")
        return (-3 - axis) if transposed else axis

    def _model(self) -> tuple[Any, dict[str, list[str]], set[str]]:
        """The model on the meta device; parameter -> its tensors in order; tensors stored the other way round."""
        if self._known is None:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import Transpose, WeightConverter, rename_source_key

            with torch.device("meta"):
                model = auto_class(self.config).from_config(self.config)
            mapping = get_model_conversion_mapping(model)
            converters = [t for t in mapping if isinstance(t, WeightConverter)]
            renamings: Any = [t for t in mapping if not isinstance(t, WeightConverter)]
            turned = {
                pattern
                for converter in converters
                if any(isinstance(operation, Transpose) for operation in converter.operations)
                for pattern in converter.source_patterns
            }
            state = model.state_dict()
            sources: dict[str, list[str]] = {}
            transposed = set()
            for name in sorted(self.stored, key=_natural):
                target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
                sources.setdefault(target, []).append(name)
                if pattern in turned:
                    transposed.add(name)
            self._known = model, sources, transposed
        return self._known


def local_folder(source: str) -> Path:
    """The folder of a model, downloaded if it is one of the hub's."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.exists():
        raise UsageError(f"There is no folder '{source}': say with --base where the base model lies.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=list(WEIGHTS)))
    except Exception as error:  # the hub client reports a missing model and a missing network by many classes
        raise UsageError(
            f"'{source}' is neither a local folder nor a model that the hub gives: say with --base where it lies."
        ) from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise LlmvaError(f"'{index}' cannot be read: download the model again.") from error
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UsageError(f"'{folder}' lacks {file.name}: give a model with its weights in safetensors.")
    return files


def read_header(file: Path) -> tuple[int, dict[str, Stored]]:
    """Where the data begins, and each tensor's place. Raises LlmvaError where the file is no whole safetensors file."""
    broken = LlmvaError(f"'{file}' is no whole safetensors file: download the model again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise broken
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise broken
        try:
            header = json.loads(stream.read(length))
            begin = 8 + length
            stored = {
                name: Stored(
                    file, entry["dtype"], tuple(entry["shape"]), *(begin + int(o) for o in entry["data_offsets"])
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise broken from error
    for place in stored.values():
        bits = DTYPES[place.dtype].itemsize * math.prod(place.shape) if place.dtype in DTYPES else None
        if not begin <= place.begin <= place.end <= size or (bits is not None and bits != place.end - place.begin):
            raise broken
    return begin, stored


def _natural(name: str) -> list[tuple[int, str]]:
    """experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_file_order(stored: Mapping[str, Stored], file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of one shard, by their place in it."""
    mine = [(name, place) for name, place in stored.items() if place.file == file]
    yield from sorted(mine, key=lambda pair: pair[1].begin)
