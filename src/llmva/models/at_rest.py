"""A model while we read it: in evaluation mode, in the hands of one thread, and computed as its weights are stored.

Hooks, the generation config and the mode belong to the model, not to a call. Two threads that read one model at once
would see each other's edits and captures, so the second one is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from llmva.errors import LlmvaError

P = ParamSpec("P")
T = TypeVar("T")
LIBRARIES = frozenset(("llmva", "torch", "transformers", "accelerate", "bitsandbytes", "peft"))  # put hooks on models
OWNER = "_llmva_owner"  # in the model's own dict: the thread that reads it, and the id of the model, which copies lose


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Keep `model` in evaluation mode and to this thread for the length of a block, and restore its mode after it.

    A module in training mode drops activations at random, so its answers would differ from one reading to the next.
    May be entered again by the thread that holds it. Raises LlmvaError where another thread does.
    """
    mine = (threading.get_ident(), id(model))
    kept = vars(model)
    if kept.get(OWNER, mine)[1] != id(model):  # of the model that this one was copied from
        kept.pop(OWNER, None)
    first = kept.setdefault(OWNER, mine) is mine  # one step, so that of two threads only one succeeds
    try:
        check_thread(model)
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with plain_torch() if first else nullcontext():
                yield
        finally:
            for module in training:
                module.training = True
    finally:
        if first:
            kept.pop(OWNER, None)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch as it starts for the length of a block: new tensors in float32 on the CPU, no autocast, no inference mode.

    A program may have set otherwise for its own work, or a library may have left it so after an error. What is computed
    here would then be rounded, fail between two dtypes, or be without the gradients that an edit is written along.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as after:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                after.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            after.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            after.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            after.callback(torch.set_default_dtype, dtype)
        yield


def reads_model(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function whose first argument is a ChatModel work with its model `at_rest`."""

    @wraps(function)
    def at_work(*args: P.args, **kwargs: P.kwargs) -> T:
        chat: Any = args[0] if args else kwargs["chat"]
        with at_rest(chat.model):
            return function(*args, **kwargs)

    return at_work


def told_hooks(model: Any) -> str | None:
    """The forward hooks on `model` that neither we nor the libraries put there, in words; None where there are none."""
    names = _hooks_of_others(model)
    more = f" and {len(names) - 1} more modules" if len(names) > 1 else ""
    return f"forward hooks that are not llmva's, on {names[0] or 'the model itself'}{more}" if names else None


def _hooks_of_others(model: Any) -> list[str]:
    """The names of modules; hooks that act on all modules of the process count as the model's, which is ""."""
    everywhere = torch.nn.modules.module
    registered = [*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()]
    names = [""] if any(map(_of_others, registered)) else []
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_of_others, hooks)) and name not in names:
            names.append(name)
    return names


def _of_others(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] not in LIBRARIES


def check_thread(model: Any) -> None:
    """Raises LlmvaError where another thread is reading `model`."""
    thread, of = vars(model).get(OWNER, (None, None))
    if of == id(model) and thread != threading.get_ident():
        raise LlmvaError(
            "Another thread of this program is working with this model: wait for its end, or load the model a second "
            "time."
        )
