"""Hashes that tell whether an edit belongs to a model; they do not depend on how the model was loaded.

There are two kinds. `hashes` are of the projections that an edit changes, sampled if they are large, and work for
packed weights too. `weights` are of every module, over all values: if other weights have changed, an edit has another
effect, and so has a run.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.sublayers import Decoder
from llmva.models.writers import PLAIN, find_writers

HASHED_VALUES = 2**22  # maximum number of hashed values of a tensor, evenly spread: a 70B model takes seconds


def tensor_hash(weight: Tensor, limit: int = HASHED_VALUES) -> str:
    """sha256 (16 hex digits) of the values rounded to bfloat16, equal for a model in float32 and in bfloat16.

    Loading in float16 rounds and clips first, so the hash equals only that of another float16 model or checkpoint.
    Fused experts [E, ..] are hashed one by one, because checkpoints store each as a separate tensor.
    """
    if hasattr(weight, "__tensor_flatten__"):  # a packed tensor of torchao: hash its parts
        return slices_hash(tensor_hash(getattr(weight, part)) for part in weight.__tensor_flatten__()[0])
    if weight.ndim == 3:
        return slices_hash(tensor_hash(part, max(limit // len(weight), 4096)) for part in weight)
    flat = weight.detach().reshape(-1)
    if flat.numel() > limit:
        flat = flat[:: -(-flat.numel() // limit)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).contiguous().view(torch.int16)
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(flat.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


PIECE = 2**20  # values that are summed at once
PACKED = "packed-"  # what the hash of a module begins with whose weights are no plain numbers


def whole_hash(weight: Tensor, *, exact: bool = False) -> str:
    """A hash of every value, rounded to bfloat16 as in `tensor_hash` unless `exact` (16 hex digits).

    It is the same on every device.

    A piece's four-value words are multiplied by odd constants of their places and summed modulo 2^64, which shows a
    change of one value for certain and any other but by a chance in 2^64, at the speed of reading memory. It guards
    against mistakes; who wants to can make another tensor with the same hash.
    """
    if weight.ndim == 3:  # fused experts, each of which may be stored alone
        return slices_hash(whole_hash(part, exact=exact) for part in weight)
    flat = weight.detach().reshape(-1)
    rounded = flat.is_floating_point() and not exact
    if flat.device.type not in ("cpu", "cuda"):  # other devices have no 64-bit integers, or slow ones
        flat = flat.cpu()
    size = 2 if rounded else flat.element_size()
    keys = _keys(-(-min(PIECE, flat.numel()) * size // 8), flat.device)
    pieces = torch.split(flat, PIECE) if flat.numel() else ()
    sums = [_keyed_sum(piece.to(torch.bfloat16) if rounded else piece, keys) for piece in pieces]
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _keyed_sum(piece: Tensor, keys: Tensor) -> Tensor:
    raw = piece.contiguous().view(torch.uint8)
    if over := raw.numel() % 8:
        raw = torch.nn.functional.pad(raw, (0, 8 - over))
    words = raw.view(torch.int64)
    if words.is_cuda:
        return (words * keys[: len(words)]).sum()
    return torch.dot(words, keys[: len(words)])


def _keys(count: int, device: torch.device) -> Tensor:
    """`count` odd 64-bit constants, one a place: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    keys = torch.arange(1, count + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    keys = (keys ^ (keys >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    return (keys ^ (keys >> 27)) | 1


def slices_hash(hashes: Iterable[str]) -> str:
    """The hash of a fused tensor from the hashes of its slices."""
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()[:16]


def module_hash(module: nn.Module) -> str:
    """The hash of the parameters that an edit of `module` would write; of all its tensors if weights are packed.

    If no tensor can be read, the hash of its outputs, which also depends on the device and its kernels.
    """
    written = {writer.name for writer in find_writers(module, 0, prove=False)}
    # and nothing else of the state: bitsandbytes changes the layout of its scales at first use
    names = written or {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    with _brought_in(module):
        try:
            state = _to_be_saved(module).state_dict()
            held = [(n, tensor_hash(t)) for n, t in state.items() if n in names and isinstance(t, Tensor)]
        except Exception:  # a packed tensor that cannot be read may raise anything
            if written:
                raise
            held = []
        return parts_hash(held or [("outputs", _outputs_hash(module))])


def _to_be_saved(module: nn.Module) -> nn.Module:
    """`module`, or a copy if reading its state would corrupt it.

    On CPUs bitsandbytes changes the layout of 4-bit weights for use and changes it back for saving, but not that of
    their scales.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in module.parameters())
    relaid = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return copy.deepcopy(module) if relaid else module


@contextmanager
def _brought_in(module: nn.Module) -> Iterator[None]:
    """Load weights that accelerate has offloaded to their device, until the end of the block."""
    with ExitStack() as after:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device

                after.enter_context(align_module_device(part))
        yield


@torch.no_grad()
def _outputs_hash(module: Any) -> str:
    """The hash of the outputs for two fixed inputs of unit length; the class name if the input width is unknown."""
    size = getattr(module, "in_features", None)
    if size is None:
        return type(module).__name__
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return tensor_hash(module((x / x.norm(dim=1, keepdim=True)).to(device)))


def parts_hash(parts: Iterable[tuple[str, str]]) -> str:
    """The hash of a module from the names and hashes of its tensors."""
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()[:16]


def weight_hashes(model: nn.Module, *, exact: bool = False) -> dict[str, str]:
    """A hash of every module that holds weights, by its name; list entries inside a block, such as experts, together.

    Tied weights have equal hashes wherever they are. Where a module's weights are packed, its hash begins with PACKED.
    `exact` is as for `whole_hash`.
    """
    parts: dict[str, list[tuple[str, str]]] = {}
    packed = set()
    known: dict[int, str] = {}  # of tied weights, which are read once, by the id of a tensor that the model holds
    for name, module in model.named_modules():
        own = own_tensors(module)
        if not own:
            continue
        if not all(_is_plain(tensor) for tensor in own.values()):
            holder, leaf = weight_holder(f"{name}.weight")
            packed.add(holder)
            parts.setdefault(holder, []).append((leaf, module_hash(module)))
            continue
        with _brought_in(module):
            for leaf, tensor in own_tensors(module).items():
                value = None if hasattr(module, "_hf_hook") else known.get(id(tensor))
                value = known[id(tensor)] = whole_hash(tensor, exact=exact) if value is None else value
                holder, inside = weight_holder(f"{name}.{leaf}" if name else leaf)
                parts.setdefault(holder, []).append((inside, value))
    return {holder: f"{PACKED if holder in packed else ''}{parts_hash(pairs)}" for holder, pairs in parts.items()}


def weights_digest(model: nn.Module, rounded: Mapping[str, str]) -> str:
    """One hash of all weights, to the last bit; `rounded` are their `weight_hashes`, which save reading them again."""
    tensors = (tensor for module in model.modules() for tensor in own_tensors(module).values())
    exact = any(tensor.is_floating_point() and tensor.dtype != torch.bfloat16 for tensor in tensors)
    return parts_hash((weight_hashes(model, exact=True) if exact else rounded).items())


def weight_holder(tensor: str) -> tuple[str, str]:
    """Under which name the tensor of a model is hashed, and what it is called there."""
    path = tensor.split(".")
    numbers = [place for place, part in enumerate(path) if part.isdigit()]
    cut = numbers[1] if len(numbers) > 1 else len(path) - 1
    return ".".join(path[:cut]), ".".join(path[cut:])


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters, and those buffers that are saved with them; not its children's."""
    fleeting = module._non_persistent_buffers_set
    buffers = {name: b for name, b in module.named_buffers(recurse=False) if name not in fleeting}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is the numbers that it shows; packed weights are of a type, or a dtype, of their own."""
    return type(tensor) in (nn.Parameter, Tensor) and (tensor.dtype in PLAIN or tensor.ndim < 2)


def other_weights(base: Mapping[str, Any], here: Mapping[str, str]) -> str | None:
    """The first module whose hash here differs from that in a `fingerprint`; None where all agree.

    A module that only one side holds counts as the same if it is tied to another there: it may or may not be stored.
    Packed weights and plain ones cannot be compared, and are left to the hashes of the edited projections.
    """
    there: Mapping[str, str] = base.get("weights", {})
    if not there:
        return None
    for name in (*there, *(name for name in here if name not in there)):
        mine, theirs = here.get(name), there.get(name)
        if mine is None or theirs is None:
            only, others = (there, theirs) if mine is None else (here, mine)
            if list(only.values()).count(others or "") < 2:
                return name
        elif mine != theirs and mine.startswith(PACKED) == theirs.startswith(PACKED):
            return name
    return None


def fingerprint(decoder: Decoder, name: str) -> dict[str, Any]:
    """The `base` of an edit: `model`, shape facts, hashes of weights, and `sha256` over these facts and hashes.

    `hashes` are of the sublayers' projections, `weights` of all modules.
    """
    config = decoder.model.config
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "blocks": len({sublayer.block for sublayer in decoder.sublayers}),
        "hidden_size": decoder.width,
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "hashes": {sublayer.name: module_hash(sublayer.projection) for sublayer in decoder.sublayers},
        "weights": weight_hashes(decoder.model),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    commit = getattr(config, "_commit_hash", None)  # of a model that came from the hub
    where = {"revision": commit} if isinstance(commit, str) else {}
    return {"model": name, **where, "quantize": _quantised(decoder.model), "sha256": digest, **facts}


def _quantised(model: Any) -> str | None:
    """How bitsandbytes packed the model when it was loaded, as a value of `load_model`; None if it did not."""
    return next((bits for bits in ("4bit", "8bit") if getattr(model, f"is_loaded_in_{bits}", False)), None)
