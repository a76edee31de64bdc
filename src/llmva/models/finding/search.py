"""The modules of each block whose outputs are added to the residual stream: found by pushes, proved by other pushes.

A *writer* is a module whose output, pushed at a token, moves the residual stream by that push times a scale, at that
token and at no other, while all other modules with weights are frozen (`probe`). If a post-norm lies between, the
stream moves by what the norm's output moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.finding.names import ATTENTION, MLP, Found
from llmva.models.finding.probe import TOKENS, Pushes, Record, has_weights, is_leaf, push
from llmva.models.finding.tensors import is_norm
from llmva.models.writers import find_writers, is_linear

TOLERANCE = 0.05  # relative error: bfloat16 sums of large residuals lose two digits
ALIKE = 0.02  # relative difference of two outputs that are one, but for a scale
HELD = 0.3  # cosine of a module's move and the push of the stream: its output holds the stream itself
FAINT = 8.0  # a push that moves the stream by fewer roundings of it shows nothing
MANY = 5  # writers of a block that are proved in one pass
EACH = 2  # tokens at which a module is pushed
STREAM = (1, 2)  # tokens at which the block's input is pushed
PLACES = tuple(range(3, TOKENS - 1))  # tokens at which modules are pushed; the first and the last are left alone
LATEST = PLACES[::-1]


@dataclass(frozen=True)
class Pass:
    """What all passes of a search share."""

    model: Any
    ids: Tensor
    epsilon: float  # of the model's dtype
    generator: torch.Generator

    def push(self, record: Record, places: Sequence[int]) -> Tensor:
        """A random push [t, d] at some tokens, as large as the stream is there, and zero elsewhere."""
        assert record.after is not None
        size = record.after.norm(dim=-1).amax(0).clamp_min(1e-30)
        pushed = torch.zeros(record.after.shape[1:], dtype=torch.float64)
        for place in places:
            direction = torch.randn(pushed.shape[1], generator=self.generator, dtype=torch.float64)
            pushed[place] = direction / direction.norm() * size[place]
        return pushed


def find_writers_of(run: Pass, records: Sequence[Record]) -> list[list[Found]]:
    """The writers of each block, in the order in which they end, each proved; an empty list where there are none."""
    shared = _shared(records)
    candidates = [
        [name for name in record.raw if _is_candidate(record, name) and record.block.get_submodule(name) not in shared]
        for record in records
    ]
    free: list[frozenset[str]] = [frozenset() for _ in records]
    while True:
        direct, holders = _search(run, records, candidates, free)
        more = [
            old | {name for name in held if _is_plain_leaf(record, name)}
            for record, held, old in zip(records, holders, free, strict=True)
        ]
        if more == free:
            break
        free = more
    chosen = [_choose(record, writing) for record, writing in zip(records, direct, strict=True)]
    return _prove(run, records, chosen, free)


def _search(
    run: Pass, records: Sequence[Record], candidates: Sequence[Sequence[str]], free: Sequence[frozenset[str]]
) -> tuple[list[set[str]], list[set[str]]]:
    """Of each block, the candidates whose pushes arrive at the stream, and those that hold the stream themselves."""
    direct: list[set[str]] = [set() for _ in records]
    holders: list[set[str]] = [set() for _ in records]
    share = len(PLACES) // EACH
    for start in range(0, max(map(len, candidates)), share):
        some = [names[start : start + share] for names in candidates]
        for i, (arrived, held) in enumerate(_direct(run, records, some, free)):
            direct[i] |= arrived - held
            holders[i] |= held
    return direct, holders


def _is_plain_leaf(record: Record, name: str) -> bool:
    """Whether a module that holds the stream is one that scales it on its way: frozen, it would hide what is added."""
    module = record.block.get_submodule(name)
    return is_leaf(module) and not is_norm(module) and not is_linear(module)


def _shared(records: Sequence[Record]) -> set[nn.Module]:
    """Modules that several blocks have: an edit would act in all of them at once."""
    seen: set[nn.Module] = set()
    several: set[nn.Module] = set()
    for record in records:
        own = set(record.block.modules())
        several |= seen & own
        seen |= own
    return several


def _is_candidate(record: Record, name: str) -> bool:
    module = record.block.get_submodule(name)
    return any(map(has_weights, module.modules())) and record.output(name) is not None


def _direct(
    run: Pass, records: Sequence[Record], candidates: Sequence[Sequence[str]], free: Sequence[frozenset[str]]
) -> list[tuple[set[str], set[str]]]:
    """`_search` of as many candidates as one pass can push."""
    # what ends first is pushed last: what leaks on to later tokens, as through a convolution, meets what ends earlier
    places = [{name: LATEST[EACH * i : EACH * i + EACH] for i, name in enumerate(names)} for names in candidates]
    pushes = [
        Pushes(
            {name: run.push(record, at) for name, at in where.items()},
            run.push(record, STREAM),
            free=freed,
            watched=frozenset(where),
        )
        for record, where, freed in zip(records, places, free, strict=True)
    ]
    results = push(run.model, records, run.ids, pushes)
    writing = []
    for record, where, pushed, result in zip(records, places, pushes, results, strict=True):
        assert pushed.stream is not None
        own = pushed.stream[list(STREAM)]
        writing.append(
            (
                {
                    name
                    for name, at in where.items()
                    if arrives(record, result.stream, pushed.modules[name], at, run.epsilon)
                },
                {name for name in where if abs(_cosine(result.outputs[name][list(STREAM)], own)) >= HELD},
            )
        )
    return writing


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30))


def arrives(record: Record, moved: Tensor | None, pushed: Tensor, places: Sequence[int], epsilon: float) -> bool:
    """Whether the streams [k, t, d] moved at these tokens by the push [t, d] times a scale.

    One residual stream has one scale for all tokens. Several streams have a scale for each and at each token, which the
    model computes from what it has read.
    """
    if moved is None or record.after is None or not bool(moved.isfinite().all()):
        return False
    at = list(places)
    moved, pushed, size = moved[:, at], pushed[at], record.after[:, at].norm(dim=-1)
    scale = (moved * pushed).sum(-1) / pushed.pow(2).sum(-1).clamp_min(1e-300)  # [k, places]
    if len(moved) == 1:
        weight = pushed.norm(dim=-1) / (TOLERANCE * moved[0].norm(dim=-1) + 2 * epsilon * size[0]).clamp_min(1e-300)
        scale = ((scale * weight.pow(2)).sum() / weight.pow(2).sum()).expand_as(scale)
    wanted = scale[..., None] * pushed
    error, noise = (moved - wanted).norm(dim=-1), 2 * epsilon * size
    faint = wanted.norm(dim=-1).amax(0) <= FAINT * epsilon * size.amax(0)
    return not bool(faint.any()) and bool((error <= TOLERANCE * wanted.norm(dim=-1).amax(0) + noise).all())


# -- which of them -----------------------------------------------------------------------------------------------


def _choose(record: Record, direct: set[str]) -> list[Found]:
    """The fewest modules that are all of what `direct` modules add, the innermost that are edited as one weight."""
    modules = dict(record.block.named_modules())
    units: dict[str, Found] = {}  # by the module whose output is added
    for name in direct:
        if not is_norm(modules[name]):
            units[name] = name, name
        elif (projection := _normed(record, name)) is not None:
            units[name] = projection, name
    order = list(record.raw)
    outermost: list[str] = []
    for name in sorted(units, key=lambda name: (name.count("."), order.index(name))):
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
    chosen = [unit for outer in outermost for unit in _inner(record, units, outer)]
    return sorted(chosen, key=lambda unit: order.index(unit[0]))


def _normed(record: Record, norm: str) -> str | None:
    """The module whose output is all that this norm is shown."""
    shown = record.inputs.get(norm)
    order = list(record.raw)
    if shown is None:
        return None
    fitting = [
        name
        for name in order[: order.index(norm)]
        if _is_candidate(record, name)
        and not is_norm(record.block.get_submodule(name))
        and _same(shown, record.output(name))
    ]
    return min(fitting, key=lambda name: _preference(record, name), default=None)


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two outputs are one, but for a scale."""
    if other is None:
        return False
    scale = (one * other).sum() / other.pow(2).sum().clamp_min(1e-300)
    return bool((one - scale * other).norm() <= ALIKE * one.norm()) and float(scale.abs()) > 0


def _preference(record: Record, name: str) -> tuple[bool, bool, int]:
    """Names that are known first, which an adapter on a weight keeps, then one weight, then what is outermost."""
    linear = is_linear(record.block.get_submodule(name))
    return name not in ATTENTION + MLP, not linear, name.count(".")


def _inner(record: Record, units: dict[str, Found], outer: str) -> list[Found]:
    """What stands for `outer`: the weight inside it that gives all of its output, or weights whose sum does."""
    if is_linear(record.block.get_submodule(outer)) or is_norm(record.block.get_submodule(outer)):
        return [units[outer]]
    whole = record.output(outer)
    assert whole is not None
    inside = [name for name in units if name.startswith(f"{outer}.")]
    alike = [
        name
        for name in inside
        if _same(whole, record.output(name))
        and (units[name][0] != name or is_linear(record.block.get_submodule(name)) or name in ATTENTION + MLP)
    ]
    if alike:
        return [units[min(alike, key=lambda name: _preference(record, name))]]
    weights = [name for name in inside if is_linear(record.block.get_submodule(name))]
    if len(weights) > 1:
        terms = torch.stack([_output(record, name).flatten() for name in weights], 1)
        fit = torch.linalg.lstsq(terms, whole.flatten()[:, None]).solution
        if (terms @ fit - whole.flatten()[:, None]).norm() <= ALIKE * whole.norm():
            return [units[name] for name in weights]
    module = record.block.get_submodule(outer)
    parts = [
        name for name in inside if units[name][0] != name and is_linear(record.block.get_submodule(units[name][0]))
    ]
    if parts and not find_writers(module, whole.shape[-1], prove=False):  # then no export could have the whole
        return [units[name] for name in parts]
    return [units[outer]]


def _output(record: Record, name: str) -> Tensor:
    output = record.output(name)
    assert output is not None
    return output


# -- the proof ---------------------------------------------------------------------------------------------------


def _prove(
    run: Pass, records: Sequence[Record], chosen: Sequence[Sequence[Found]], free: Sequence[frozenset[str]]
) -> list[list[Found]]:
    """Those of the chosen writers that a pass of their own proves, with post-norms at work and other pushes.

    No token moves but those that are pushed. Where one does, each writer of the block is pushed alone.
    """
    proved: list[list[Found]] = [[] for _ in records]
    for start in range(0, max(map(len, chosen)), MANY):
        some = [writing[start : start + MANY] for writing in chosen]
        results = _pushed_at_once(run, records, some, free)
        for own, one in zip(proved, results, strict=True):
            own += one or []
        unsure = [writing if one is None else [] for writing, one in zip(some, results, strict=True)]
        for place in range(max(map(len, unsure))):
            alone = [writing[place : place + 1] for writing in unsure]
            for own, one in zip(proved, _pushed_at_once(run, records, alone, free), strict=True):
                own += one or []
    return proved


def _pushed_at_once(
    run: Pass, records: Sequence[Record], chosen: Sequence[Sequence[Found]], free: Sequence[frozenset[str]]
) -> list[list[Found] | None]:
    """Of each block, the writers that are proved; None where a token moved at which nothing was pushed."""
    places, pushes = [], []
    for record, writing, freed in zip(records, chosen, free, strict=True):
        where = {unit: PLACES[2 * i :: 2 * MANY] for i, unit in enumerate(writing)}  # every other token stays untouched
        norms = frozenset(output for projection, output in writing if output != projection)
        places.append(where)
        pushes.append(
            Pushes({u[0]: run.push(record, at) for u, at in where.items()}, free=freed | norms, watched=norms)
        )
    results = push(run.model, records, run.ids, pushes)
    proved: list[list[Found] | None] = []
    for record, where, pushed, result in zip(records, places, pushes, results, strict=True):
        touched = {place for at in where.values() for place in at}
        still = [place for place in range(TOKENS) if place not in touched]
        if result.stream is None or not _still(record, result.stream[:, still], still, run.epsilon):
            proved.append(None)
            continue
        own = []
        for (projection, output), at in where.items():
            moved = pushed.modules[projection] if output == projection else result.outputs.get(output)
            if moved is not None and arrives(record, result.stream, moved, at, run.epsilon):
                own.append((projection, output))
        proved.append(own)
    return proved


def _still(record: Record, moved: Tensor, places: Sequence[int], epsilon: float) -> bool:
    assert record.after is not None
    return bool((moved.norm(dim=-1) <= 4 * epsilon * record.after[:, list(places)].norm(dim=-1) + 1e-30).all())
