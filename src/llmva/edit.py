"""The edit: a low-rank map of each sublayer's output, o' = o + V (U^T o), applied by hook or baked into the weights.

One alignment is o' = (I + v u^T) o, and alignments compose exactly (docs/method.md):

    (I + v u^T)(I + V U^T) = I + [V v] [U, u + U V^T u]^T

So a whole run is two d x k matrices for each sublayer, and the edit after an iteration is their first columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llmva.edit_file import Parts, read_edit, write_edit
from llmva.errors import LlmvaError, UsageError
from llmva.models.at_rest import check_thread
from llmva.models.engines.applied import BAKED, OutputMap
from llmva.models.fingerprint import module_hash, other_weights, weight_hashes
from llmva.models.writers import Writer, find_writers, left_map


@dataclass(frozen=True)
class Factors:
    """V and U, float32 [d, k], and the iteration that each column came from, int32 [k], not decreasing.

    Iterations count from 1; columns of iteration 0 are those of an earlier edit (`llmva.extend`).
    """

    V: Tensor
    U: Tensor
    iteration: Tensor

    @classmethod
    def empty(cls, width: int) -> Factors:
        return cls(torch.zeros(width, 0), torch.zeros(width, 0), torch.zeros(0, dtype=torch.int32))

    def then(self, v: Tensor, u: Tensor, iteration: int) -> Factors:
        """This map, followed by I + v u^T. The product is computed in float64 and stored in float32."""
        v, u = v.to("cpu", torch.float64), u.to("cpu", torch.float64)
        pulled_back = u + self.U.double() @ (self.V.double().T @ u)
        return Factors(
            torch.cat([self.V, v[:, None].float()], 1),
            torch.cat([self.U, pulled_back[:, None].float()], 1),
            torch.cat([self.iteration, torch.tensor([iteration], dtype=torch.int32)]),
        )

    def digest(self) -> str:
        """sha256 of the map (16 hex digits)."""
        digest = hashlib.sha256()
        for part in (self.V, self.U):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


APPLIED = "An edit is applied to this model already: remove it first, by remove() of what apply() returned."


@dataclass(frozen=True, repr=False)
class Edit:
    """Factors by projection name, and `base`, the fingerprint of the model on which they were fitted."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    best: int | None = None  # the iteration to use, if later ones are worse; None uses all columns
    strength: float = 1.0  # of that iteration; only used if `best` is set

    def __repr__(self) -> str:
        model, n = self.base.get("model"), len(self.chosen.factors)
        return f"Edit({n} sublayer{'s' * (n != 1)}{f' of {model}' if model else ''}, {len(self.held)} iterations)"

    @property
    def iterations(self) -> int:
        """The last iteration with a column; 0 for an edit that changes nothing."""
        return max((int(f.iteration[-1]) for f in self.factors.values() if len(f.iteration)), default=0)

    @property
    def held(self) -> list[int]:
        """The iterations with columns, ascending. A missing one was undone."""
        return sorted({i for f in self.factors.values() for i in f.iteration.tolist()})

    def written(self, iteration: int) -> list[str]:
        """The sublayers with a column of this iteration."""
        return [name for name, f in self.factors.items() if iteration in f.iteration.tolist()]

    def then(self, name: str, v: Tensor, u: Tensor, iteration: int) -> Edit:
        """This edit with I + v u^T, both [d], after it at sublayer `name`."""
        before = self.factors.get(name, Factors.empty(len(v)))
        return replace(self, factors={**self.factors, name: before.then(v, u, iteration)})

    def at(self, iteration: int) -> Edit:
        """The edit after `iteration` iterations; 0 is the start of the run, usually an empty edit."""
        if iteration < 0:
            raise UsageError(f"There is no iteration {iteration}: choose 0 or more.")
        kept = {}
        for name, f in self.factors.items():
            k = int((f.iteration <= iteration).sum())
            if k:
                kept[name] = Factors(f.V[:, :k].contiguous(), f.U[:, :k].contiguous(), f.iteration[:k].contiguous())
        return replace(self, factors=kept, best=None, strength=1.0)

    def asked(self, iteration: int, path: str | Path) -> Edit:
        """The edit after an iteration that a user names. Raises UsageError if the edit at `path` does not have it."""
        if not 0 <= iteration <= self.iterations:
            raise UsageError(f"'{path}' holds iterations 0 to {self.iterations}: choose --iteration among them.")
        if iteration and iteration not in self.held:  # at() would return the iteration to which the run went back
            held = ", ".join(map(str, sorted({0, *self.held})))
            raise UsageError(f"Iteration {iteration} of '{path}' was undone: choose --iteration among {held}.")
        return self.at(iteration)

    @property
    def chosen(self) -> Edit:
        """The edit at the chosen iteration and strength, which `apply` and `bake` use."""
        if self.best is None:
            return self
        edit = self.at(self.best)
        return edit if self.strength == 1.0 else edit.scaled(self.strength)

    def scaled(self, strength: float) -> Edit:
        """o' = o + strength V (U^T o): 0 is the base model, 1 the edit as fitted. Values below 0 raise UsageError."""
        if not 0 <= strength < float("inf"):
            raise UsageError(f"An edit cannot have the strength {strength}: choose 0 or more, 1 being as fitted.")
        return replace(self, factors={n: replace(f, V=f.V * strength) for n, f in self.factors.items()})

    def as_start(self) -> Edit:
        """The chosen edit as the start of another run: all its columns get iteration 0."""
        chosen = self.chosen
        factors = {n: replace(f, iteration=torch.zeros_like(f.iteration)) for n, f in chosen.factors.items()}
        return replace(chosen, factors=factors)

    def digest(self) -> str:
        """sha256 of the factors (16 hex digits), which identifies the edit."""
        digest = hashlib.sha256()
        for name, f in sorted(self.factors.items()):
            digest.update(name.encode())
            for part in (f.V, f.U):
                digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- use -----------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, check: bool = True) -> Applied:
        """Apply the edit to `model` by forward hooks, for any dtype or packing of the weights.

        The hooks act from now until `.remove()`, or until the end of a `with` block.

        Raises LlmvaError and leaves the model as it is: if the same edit is applied to the model or baked into it
        already, or if another thread works with it. With `check` also if the edit belongs to another model or changes
        nothing, or if another edit is applied; the loop starts with an empty edit and does not check.
        """
        factors = self.chosen.factors
        projections = self._projections(model, factors, check)
        return Applied([projections[name].register_forward_hook(_Hook(f)) for name, f in factors.items()])

    @torch.no_grad()
    def bake(self, model: nn.Module, *, check: bool = True) -> None:
        """Write the edit into the weights: W' = W + V (U^T W), b' = b + V (U^T b), in float32, rounded once.

        In a mixture of experts, every expert is written. Raises LlmvaError, before anything is changed, if weights are
        packed or offloaded, or those of other modules too, if an edit is applied by hooks, and as `apply` does.
        """
        factors = self.chosen.factors
        check_untouched(model)
        projections = self._projections(model, factors, check)
        plans = [(projections[name], f, _writable(name, projections[name], len(f.V))) for name, f in factors.items()]
        _check_unshared(model, projections)
        for projection, f, writers in plans:
            for writer in writers:
                parameter = projection.get_parameter(writer.name)
                parameter.data.copy_(left_map(parameter.data, writer.axis, f.V, f.U))
            vars(projection)[BAKED] = (f.digest(), module_hash(projection))

    def _projections(self, model: nn.Module, names: Mapping[str, Factors], check: bool) -> dict[str, Any]:
        modules = dict(model.named_modules())
        # a list of modules has a name too, but a hook on it would never run
        missing = [n for n in names if n not in modules or type(modules[n]).forward is nn.Module.forward]
        if missing:
            raise LlmvaError(f"The edit belongs to {self._title()}: this model has no sublayer {missing[0]}.")
        if check:
            self._check_base(model, modules, names)
        projections = {name: modules[name] for name in names}
        check_thread(model)
        self._check_once(model, projections, check)
        return projections

    def _check_once(self, model: nn.Module, projections: Mapping[str, nn.Module], check: bool) -> None:
        """Raises LlmvaError where this edit acts on the model already, or with `check` where any does."""
        factors = self.chosen.factors
        if check and factors:
            check_untouched(model)
        for name, projection in projections.items():
            if any(hook.factors.digest() == factors[name].digest() for hook in _edit_hooks(projection)):
                raise LlmvaError(APPLIED)
            mark = vars(projection).get(BAKED)  # outlives weights that are loaded anew into the same module
            if mark is not None and mark == (factors[name].digest(), module_hash(projection)):
                raise LlmvaError(
                    "This edit is written into the weights of this model already: load the model anew to apply it "
                    "again."
                )

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
        if self.base.get("weights") and (other := other_weights(self.base, weight_hashes(model))):
            raise LlmvaError(
                f"The edit belongs to {self._title()}, and {other} of this model has other weights: give the model "
                "that the edit was made from."
            )

    def _title(self) -> str:
        return f"the {self.base.get('model_type', '')} model '{self.base.get('model', 'unknown')}'".replace("  ", " ")

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write `edit.safetensors` (into `path` if it is a folder); equal edits give equal bytes."""
        parts = {name: (f.V.numpy(), f.U.numpy(), f.iteration.numpy()) for name, f in self.factors.items()}
        return write_edit(path, Parts(parts, self.base, self.best, self.strength))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read and check an edit. Raises UsageError if there is none, LlmvaError if it is damaged or too new."""
        parts = read_edit(path)
        factors = {name: Factors(*map(torch.from_numpy, arrays)) for name, arrays in parts.factors.items()}
        return cls(factors, parts.base, parts.best, parts.strength)


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


class _Hook(OutputMap):
    """Changes the output of a projection by `factors`."""

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors.V, factors.U)
        self.factors = factors
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}  # the output's device is known only when called

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        o = output[0] if isinstance(output, tuple) else output
        if o.device not in self._moved:
            # copies: products round differently if memory is aligned differently, as in tensors read from a file
            V, U = (part.to(o.device, copy=True) for part in (self.factors.V, self.factors.U))
            self._moved[o.device] = (V.T.contiguous(), U)
        V_t, U = self._moved[o.device]
        wide = o.to(V_t.dtype)
        result = (wide + (wide @ U) @ V_t).to(o.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result


def _edit_hooks(module: nn.Module) -> list[_Hook]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, _Hook)]


def check_untouched(model: nn.Module) -> None:
    """Raises LlmvaError where an edit is applied to `model`, so that it does not answer as its weights say."""
    if any(_edit_hooks(module) for module in model.modules()):
        raise LlmvaError(APPLIED)


def _check_unshared(model: nn.Module, projections: Mapping[str, nn.Module]) -> None:
    """Raises LlmvaError where a projection's weights are another module's too, which would be changed with it."""
    holders: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            other = None if parameter is None else holders.setdefault(id(parameter), name)
            if other is None or other == name:
                continue
            if any(f"{one}.".startswith(f"{edited}.") for one in (name, other) for edited in projections):
                raise LlmvaError(
                    f"{other} and {name} share their weights, so that an edit of one would change both: apply it by "
                    "hook instead."
                )


def _writable(name: str, projection: nn.Module, width: int) -> tuple[Writer, ...]:
    """The parameters to write. Raises LlmvaError if they cannot be written."""
    if any(p.device.type == "meta" for p in projection.parameters()):
        raise LlmvaError(f"The weights of {name} are offloaded: apply the edit by hook, or load the model whole.")
    writers = find_writers(projection, width)
    if not writers:
        raise LlmvaError(f"The weights of {name} cannot be edited in place: apply the edit by hook instead.")
    return writers
