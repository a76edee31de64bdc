"""Passes over a few tokens: one that records what each block computes, and ones that push and freeze its modules.

A module that is *frozen* gives what it gave in the recorded pass, whatever it is shown. If all modules with weights
are frozen, nothing but plain arithmetic is left between a module's output and the residual stream, so that a push there
arrives at the stream as the module's output does. Each block is shown its recorded input, so that one pass
serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmva.models.chat.inputs import input_device, takes
from llmva.models.finding.tensors import copied, first_tensor, hooked, streams_of, with_first
from llmva.models.writers import is_linear

TOKENS = 26  # of the probe
STEP = 7919  # a prime: tokens from all over the vocabulary


@dataclass(eq=False)
class Record:
    """What one block computed: raw outputs by module and call, and tensors in float64 on the CPU."""

    block: nn.Module
    width: int  # d
    runs: int = 0  # how often it was run
    shown: Any = None  # its input, as it was
    before: Tensor | None = None  # the residual streams at its beginning, [k, t, d]
    after: Tensor | None = None  # and as the next block reads them
    raw: dict[str, list[Any]] = field(default_factory=dict)  # of modules, in the order in which they end
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of leaves, [t, d]

    def output(self, name: str) -> Tensor | None:
        """What a module that runs once gives, [t, d]; None if it has no such shape."""
        calls = self.raw.get(name, [])
        return _flat(calls[0], self) if len(calls) == 1 else None


def _flat(output: Any, record: Record) -> Tensor | None:
    tensor = first_tensor(output) if not isinstance(output, tuple | list) or len(output) else None
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or record.before is None:
        return None
    shape = record.before.shape[1:]
    if tensor.numel() != shape.numel() or tensor.shape[-1] != shape[1]:
        return None
    return tensor.detach().to("cpu", torch.float64).reshape(shape)


def probe_ids(model: Any, config: Any, last: int = 0) -> Tensor:
    """The tokens of the probe, int64 [1, t]; with `last` the last one is another."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    size = min(rows, getattr(config, "vocab_size", None) or rows)
    ids = torch.arange(1, TOKENS + 1) * STEP % size
    ids[-1] = (ids[-1] + last) % size
    return ids.unsqueeze(0)


def read(model: Any, ids: Tensor, handles: list[Any]) -> None:
    """A forward pass with hooks, which are removed after it."""
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    with hooked(handles), torch.inference_mode():
        model(input_ids=ids.to(input_device(model)), **options)


def has_weights(module: nn.Module) -> bool:
    """Whether a module itself has weights. Packed ones are buffers, or lie where only its own code finds them."""
    return is_linear(module) or bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has weights of its own, and no module inside it has any."""
    return has_weights(module) and not any(has_weights(child) for child in list(module.modules())[1:])


def shown_to(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def record_blocks(model: Any, blocks: Sequence[nn.Module], width: int, ids: Tensor) -> list[Record]:
    """What each block computes for the tokens `ids`."""
    records = [Record(block, width) for block in blocks]
    tokens = ids.shape[1]
    reached: list[Record] = []

    def start(record: Record) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            record.runs += 1
            x = first_tensor(shown_to(args, kwargs))
            if not isinstance(x, Tensor) or record.runs > 1:
                return
            record.shown = copied(x)
            record.before = streams_of(record.shown.to("cpu", torch.float64), tokens, width)
            if reached:
                reached[-1].after = record.before
            reached.append(record)

        return hook

    def end(record: Record) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = first_tensor(output)
            if isinstance(x, Tensor):
                record.after = streams_of(x.detach().to("cpu", torch.float64).clone(), tokens, width)

        return hook

    def keep(record: Record, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.raw.setdefault(name, []).append(copied(output))
            if args and isinstance(args[0], Tensor) and is_leaf(module):
                shown = _flat(args[0], record)
                if shown is not None:
                    record.inputs[name] = shown.clone()

        return hook

    handles = []
    for record in records:
        handles.append(record.block.register_forward_pre_hook(start(record), with_kwargs=True))
        for name, module in record.block.named_modules():
            if name:
                handles.append(module.register_forward_hook(keep(record, name)))
        handles.append(record.block.register_forward_hook(end(record)))
    read(model, ids, handles)
    return records


@dataclass
class Pushed:
    """How far the pushes of one pass moved what a block gives: float64 [k, t, d], and [t, d] by watched module.

    Of a module that is frozen or pushed itself, what it would have given without that.
    """

    stream: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pushes:
    """What is pushed in a block: its modules' outputs and its input, [t, d] each; `free` modules are not frozen."""

    modules: Mapping[str, Tensor]
    stream: Tensor | None = None
    free: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()


def push(model: Any, records: Sequence[Record], ids: Tensor, pushes: Sequence[Pushes]) -> list[Pushed]:
    """Read the tokens again, with all leaves frozen, and each block shown its recorded input."""
    results = [Pushed() for _ in records]
    handles: list[Any] = []
    for index, (record, pushed) in enumerate(zip(records, pushes, strict=True)):
        previous = results[index - 1] if index else None
        handles.append(
            record.block.register_forward_pre_hook(
                _shows(record, pushed, records[index - 1] if index else None, previous), with_kwargs=True
            )
        )
        for name, module in record.block.named_modules():
            if name in record.raw and (is_leaf(module) or name in pushed.modules or name in pushed.watched):
                frozen = is_leaf(module) and name not in pushed.free
                handles.append(module.register_forward_hook(_acts(record, pushed, results[index], name, frozen)))
    last, result = records[-1], results[-1]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        result.stream = _moved(first_tensor(output), last)

    handles.append(last.block.register_forward_hook(end))
    read(model, ids, handles)
    return results


def _moved(now: Tensor, record: Record) -> Tensor | None:
    assert record.after is not None
    streams = streams_of(now.detach().to("cpu", torch.float64), record.after.shape[1], record.width)
    return streams - record.after if streams is not None and streams.shape == record.after.shape else None


def _shows(record: Record, pushed: Pushes, before: Record | None, previous: Pushed | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if before is not None and previous is not None:
            previous.stream = _moved(first_tensor(shown_to(args, kwargs)), before)
        shown = copied(record.shown)
        if pushed.stream is not None and record.before is not None:
            streams = streams_of(shown, record.before.shape[1], record.width)
            assert streams is not None
            streams += pushed.stream.to(shown)  # a view of `shown`
        if args:
            return (with_first(args[0], shown), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": with_first(kwargs["hidden_states"], shown)}

    return hook


def _acts(record: Record, pushed: Pushes, result: Pushed, name: str, frozen: bool) -> Callable[..., Any]:
    calls = iter(record.raw[name])

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        recorded = next(calls, None)
        if name in pushed.watched:
            now, then = _flat(output, record), record.output(name)
            if now is not None and then is not None:
                result.outputs[name] = now - then
        given = copied(recorded) if frozen and recorded is not None else output
        added = pushed.modules.get(name)
        if added is not None:
            x = first_tensor(given)
            given = with_first(given, x + added.to(x.device, x.dtype).reshape(x.shape))
        return given if frozen or added is not None else None

    return hook
