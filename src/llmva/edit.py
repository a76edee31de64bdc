"""The edit: per sublayer a low-rank map on its output, o' = o + V (U^T o), applied by hook or baked into the weights.

One step of the method is o' = (I + v u^T) o, and steps compose exactly (method.md):

    (I + v u^T)(I + V U^T) = I + [V v] [U, u + U V^T u]^T

so a whole run is two d x k matrices a sublayer, and the model after any iteration is their first columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llmva.errors import LlmvaError, UsageError
from llmva.files import write_tensors
from llmva.models.fingerprint import module_hash
from llmva.models.writers import Writer, find_writers, left_map

Broken = Callable[[str], LlmvaError]  # the error that says why a file is refused

FORMAT = "llmva-edit"
VERSION = 1
PARTS = ("V", "U", "iteration")
LAST = 2**31 - 1  # iterations are int32
HEADER_BYTES = 2**22  # names and the base model: 40 times those of a model with 160 sublayers
FILE_BYTES = 2**32  # four times the edit of a model 16,384 wide with 252 sublayers after 30 iterations


@dataclass(frozen=True)
class Factors:
    """V and U, float32 [d, k], and the iteration that each column came from, int32 [k], not decreasing.

    Iterations count from 1; 0 are the columns of an earlier edit, which the run began with (`llmva.extend`).
    """

    V: Tensor
    U: Tensor
    iteration: Tensor

    @classmethod
    def empty(cls, width: int) -> Factors:
        return cls(torch.zeros(width, 0), torch.zeros(width, 0), torch.zeros(0, dtype=torch.int32))

    def then(self, v: Tensor, u: Tensor, iteration: int) -> Factors:
        """Follow this map by I + v u^T. The product is formed in float64 and kept in float32."""
        v, u = v.to("cpu", torch.float64), u.to("cpu", torch.float64)
        pulled_back = u + self.U.double() @ (self.V.double().T @ u)
        return Factors(
            torch.cat([self.V, v[:, None].float()], 1),
            torch.cat([self.U, pulled_back[:, None].float()], 1),
            torch.cat([self.iteration, torch.tensor([iteration], dtype=torch.int32)]),
        )


@dataclass(frozen=True)
class Edit:
    """Factors by the name of the projection they act on, and the fingerprint of the model they were fitted on."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    best: int | None = None  # the iteration that applying uses, where later ones were tried and found worse
    strength: float = 1.0  # and how much of it; counts only where `best` is set

    @property
    def iterations(self) -> int:
        """The last iteration that left a column; 0 for an edit that changes nothing."""
        return max((int(f.iteration[-1]) for f in self.factors.values() if len(f.iteration)), default=0)

    @property
    def held(self) -> list[int]:
        """The iterations that left columns. One that is missing between them was undone."""
        return sorted({i for f in self.factors.values() for i in f.iteration.tolist()})

    def then(self, name: str, v: Tensor, u: Tensor, iteration: int) -> Edit:
        """This edit with I + v u^T, both [d], after it at sublayer `name`."""
        before = self.factors.get(name, Factors.empty(len(v)))
        return replace(self, factors={**self.factors, name: before.then(v, u, iteration)})

    def at(self, iteration: int) -> Edit:
        """The edit as it was after `iteration` iterations (0: what the run began with, mostly none)."""
        if iteration < 0:
            raise UsageError(f"There is no iteration {iteration}: choose 0 or more.")
        kept = {}
        for name, f in self.factors.items():
            k = int((f.iteration <= iteration).sum())
            if k:
                kept[name] = Factors(f.V[:, :k].contiguous(), f.U[:, :k].contiguous(), f.iteration[:k].contiguous())
        return replace(self, factors=kept, best=None, strength=1.0)

    def asked(self, iteration: int, path: str | Path) -> Edit:
        """The edit after an iteration that a user names. Raises UsageError where that at `path` does not hold it."""
        if not 0 <= iteration <= self.iterations:
            raise UsageError(f"'{path}' holds iterations 0 to {self.iterations}: choose --iteration among them.")
        if iteration and iteration not in self.held:  # at() would give the one that the run went back to
            held = ", ".join(map(str, sorted({0, *self.held})))
            raise UsageError(f"Iteration {iteration} of '{path}' was undone: choose --iteration among {held}.")
        return self.at(iteration)

    @property
    def chosen(self) -> Edit:
        """The edit as its run chose it: what `apply` and `bake` use."""
        if self.best is None:
            return self
        edit = self.at(self.best)
        return edit if self.strength == 1.0 else edit.scaled(self.strength)

    def scaled(self, strength: float) -> Edit:
        """o' = o + strength V (U^T o): 0 is the base model, 1 the edit as fitted. Less than 0 would undo refusals."""
        if not 0 <= strength < float("inf"):
            raise UsageError(f"An edit cannot have the strength {strength}: choose 0 or more, 1 being as fitted.")
        return replace(self, factors={n: replace(f, V=f.V * strength) for n, f in self.factors.items()})

    def as_start(self) -> Edit:
        """The edit as its run chose it, to be continued: all its columns are then of iteration 0."""
        chosen = self.chosen
        factors = {n: replace(f, iteration=torch.zeros_like(f.iteration)) for n, f in chosen.factors.items()}
        return replace(chosen, factors=factors)

    def digest(self) -> str:
        """sha256 of the factors (16 hex digits), to tell one edit from another."""
        found = hashlib.sha256()
        for name, f in sorted(self.factors.items()):
            found.update(name.encode())
            for part in (f.V, f.U):
                found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    # -- use -----------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, check: bool = True) -> Applied:
        """Add the edit to `model` by forward hooks, whatever its weights' dtype or packing.

        Works at once and until `.remove()`; or as a context manager, until its end. Raises LlmvaError when the edit
        is of another model, or changes nothing (with `check` only: the loop begins with an empty edit).
        """
        factors = self.chosen.factors
        projections = self._projections(model, factors, check)
        return Applied([_hook(projections[name], f) for name, f in factors.items()])

    @torch.no_grad()
    def bake(self, model: nn.Module, *, check: bool = True) -> None:
        """Write the edit into the weights: W' = W + V (U^T W), b' = b + V (U^T b), in float32, rounded once.

        In a mixture of experts, into every expert's. Raises LlmvaError, before anything is changed, where weights are
        packed or lie on another medium.
        """
        factors = self.chosen.factors
        projections = self._projections(model, factors, check)
        plans = [(projections[name], f, _writable(name, projections[name], len(f.V))) for name, f in factors.items()]
        for projection, f, writers in plans:
            for writer in writers:
                parameter = projection.get_parameter(writer.name)
                parameter.data.copy_(left_map(parameter.data, writer.axis, f.V, f.U))

    def _projections(self, model: nn.Module, names: Mapping[str, Factors], check: bool) -> dict[str, Any]:
        modules = dict(model.named_modules())
        # a list of modules has a name too, and a hook on it would never be called
        missing = [n for n in names if n not in modules or type(modules[n]).forward is nn.Module.forward]
        if missing:
            raise LlmvaError(f"The edit belongs to {self._title()}: this model has no sublayer {missing[0]}.")
        if check:
            self._check_base(model, modules, names)
        return {name: modules[name] for name in names}

    def _check_base(self, model: Any, modules: Mapping[str, nn.Module], names: Mapping[str, Factors]) -> None:
        if not names:
            raise LlmvaError(
                f"The edit of {self._title()} changes nothing: choose an iteration after 0, or use the model as it is."
            )
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)
        for name, f in names.items():
            if width is not None and len(f.V) != width:
                raise LlmvaError(
                    f"The edit belongs to {self._title()} and is {len(f.V)} wide at {name}, and this model is {width} "
                    "wide: give the model that the edit was made from."
                )
        hashes = self.base.get("hashes", {})
        for name in names:
            if name in hashes and hashes[name] != (here := module_hash(modules[name])):
                raise LlmvaError(
                    f"The edit belongs to {self._title()}, whose {name} has hash {hashes[name]}, and this model's "
                    f"has {here}: give the model that the edit was made from."
                )

    def _title(self) -> str:
        return f"the {self.base.get('model_type', '')} model '{self.base.get('model', 'unknown')}'".replace("  ", " ")

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write `edit.safetensors` (into `path` if that is a folder), equal bytes for equal edits."""
        path = edit_file(path)
        tensors = {}
        for name, f in sorted(self.factors.items()):
            tensors[f"{name}.V"], tensors[f"{name}.U"], tensors[f"{name}.iteration"] = f.V, f.U, f.iteration
        note: dict[str, Any] = {"format": FORMAT, "version": VERSION, "best": self.best, "base": dict(self.base)}
        if self.best is not None and self.strength != 1.0:
            note["strength"] = self.strength
        # one entry only: safetensors does not keep the order of several
        write_tensors(path, tensors, {"llmva": json.dumps(note, sort_keys=True)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read and check an edit. Raises UsageError if there is none, LlmvaError if it is broken or too new."""
        from safetensors import SafetensorError, safe_open

        path = edit_file(path)
        if not path.is_file():
            raise UsageError(f"There is no edit at '{path}': give the folder that llmva align wrote.")

        def broken(why: str) -> LlmvaError:
            return LlmvaError(f"'{path}' is not a whole edit ({why}): run llmva align again or copy the file anew.")

        try:
            _check_size(path, broken)
            with safe_open(path, framework="pt") as file:
                note = json.loads(
                    (file.metadata() or {}).get("llmva", "null"), object_pairs_hook=_no_twice, parse_constant=_no_number
                )
                if not isinstance(note, dict) or note.get("format") != FORMAT:
                    raise LlmvaError(f"'{path}' is no llmva edit: give the folder that llmva align wrote.")
                version = note.get("version")
                if type(version) is int and version > VERSION:
                    raise LlmvaError(
                        f"'{path}' is of format version {_short(version)} and this llmva reads {VERSION}: update llmva."
                    )
                if type(version) is not int or version < 1:
                    raise broken(f"version {_short(version)}")
                names = sorted(file.keys())
                _check_header({key: file.get_slice(key) for key in names}, broken)
                # clones, since the tensors lie in the file, which may be replaced while they are in use
                tensors = {key: file.get_tensor(key).clone() for key in names}
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise broken(type(error).__name__) from error
        base, best = note.get("base"), note.get("best")
        if not isinstance(base, dict) or not _is_base(base):
            raise broken("no base model")
        if best is not None and (type(best) is not int or not 0 <= best <= LAST):
            raise broken(f"best iteration {_short(best)}")
        strength = note.get("strength", 1.0)
        if type(strength) not in (int, float) or not 0 <= strength < float("inf"):
            raise broken(f"strength {_short(strength)}")
        factors, hashes = _factors(tensors, broken), base.get("hashes")
        # a name that was not hashed may be a module that nothing calls, whose hook would do nothing
        if hashes and (strange := [name for name in factors if name not in hashes]):
            raise broken(f"{_short(strange[0])[1:-1]} is of no sublayer of its base model")
        return cls(factors, base, best, float(strength))


def edit_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "edit.safetensors"


def _check_size(path: Path, broken: Broken) -> None:
    """Refuse by the sizes that the file claims, before anything of it is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size > FILE_BYTES or header > HEADER_BYTES:
        raise broken("too large")


def _check_header(slices: Mapping[str, Any], broken: Broken) -> None:
    """Check names, dtypes and shapes, which come in threes, as the header states them."""
    names = {key.rsplit(".", 1)[0] for key in slices}
    for name in sorted(names):
        if not name or any(f"{name}.{part}" not in slices for part in PARTS):
            raise broken(f"{_short(name)[1:-1]} lacks a factor")
        parts = [slices[f"{name}.{part}"] for part in PARTS]
        V, U, iteration = (part.get_shape() for part in parts)
        dtypes = [part.get_dtype() for part in parts]
        # a factor without columns would be an edit that touches nothing, silently
        if len(V) != 2 or 0 in V or U != V or iteration != V[1:] or dtypes != ["F32", "F32", "I32"]:
            raise broken(f"{_short(name)[1:-1]} has wrong shapes or dtypes")
    if unexpected := set(slices) - {f"{name}.{part}" for name in names for part in PARTS}:
        raise broken(f"unexpected tensor {_short(min(unexpected))[1:-1]}")


def _factors(tensors: Mapping[str, Tensor], broken: Broken) -> dict[str, Factors]:
    """Group tensors by sublayer and check finiteness and the order of columns."""
    found = {}
    for name in sorted({key.rsplit(".", 1)[0] for key in tensors}):
        V, U, iteration = (tensors[f"{name}.{part}"] for part in PARTS)
        if not (torch.isfinite(V).all() and torch.isfinite(U).all()):
            raise broken(f"{_short(name)[1:-1]} holds NaN")
        if int(iteration[0]) < 0 or bool((iteration[1:] < iteration[:-1]).any()):
            raise broken(f"{_short(name)[1:-1]} has columns out of order")
        found[name] = Factors(V, U, iteration)
    return found


def _is_base(base: Mapping[str, Any]) -> bool:
    """Whether the fields that messages, exports and checks use have their types, and fit into one line."""
    hashes = base.get("hashes", {})
    texts = [base.get(name, "") for name in ("model", "sha256", "model_type", "dtype")]
    numbers = [base.get(name, 0) for name in ("blocks", "hidden_size", "parameters")]
    return (
        isinstance(hashes, dict)
        and all(isinstance(text, str) and _one_line(text) for text in (*texts, *hashes, *hashes.values()))
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


def _one_line(text: str) -> bool:
    return len(text) <= 4096 and text.splitlines() in ([], [text]) and "\0" not in text


def _short(value: object) -> str:
    """What a file says, quoted, so that a message stays one short line."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


class Applied:
    """Hooks that keep an edit applied; use as a context manager or call `remove()`."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _hook(projection: nn.Module, factors: Factors) -> Any:
    moved: dict[torch.device, tuple[Tensor, Tensor]] = {}  # the output's device is known only at the first call

    def edited(module: nn.Module, args: Any, output: Any) -> Any:
        o = output[0] if isinstance(output, tuple) else output
        if o.device not in moved:
            # copies, since products round differently in memory of other alignment, as that of a file's tensors is
            V, U = factors.V.to(o.device, copy=True), factors.U.to(o.device, copy=True)
            moved[o.device] = (V.T.contiguous(), U)
        V_t, U = moved[o.device]
        wide = o.to(V_t.dtype)
        result = (wide + (wide @ U) @ V_t).to(o.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return projection.register_forward_hook(edited)


def _writable(name: str, projection: nn.Module, width: int) -> tuple[Writer, ...]:
    """The parameters to write. Raises for weights that cannot be written."""
    if any(p.device.type == "meta" for p in projection.parameters()):
        raise LlmvaError(f"The weights of {name} are offloaded: apply the edit by hook, or load the model whole.")
    writers = find_writers(projection, width)
    if not writers:
        raise LlmvaError(f"The weights of {name} cannot be edited in place: apply the edit by hook instead.")
    return writers
