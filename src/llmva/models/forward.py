"""Forward passes that work with models whose code is not transformers' own, and the proof that it works at all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from llmva.errors import LlmvaError, UsageError
from llmva.models.chat.failures import first_line
from llmva.models.chat.inputs import forward_inputs, input_device, pad_left, takes
from llmva.models.finding.tensors import hooked, nearly_equal
from llmva.models.sublayers import contiguous, contiguous_head

TOLERANCE = 0.02  # of the largest logit, in float32; half precision rounds sums of another order
HALF_TOLERANCE = 0.1
WRAPPED = ("_orig_mod", "module")  # where torch.compile and DataParallel keep the model that they wrap
STEPS = 6  # tokens that are generated to see whether the cache holds what was read


def is_of_transformers(model: Any) -> bool:
    """Whether the model's class comes with transformers, rather than with the model."""
    return type(model).__module__.partition(".")[0] == "transformers"


def run_forward(model: Any, inputs: Mapping[str, Any], *, keep: int, use_cache: bool = False) -> Any:
    """A forward pass of which the last `keep` positions' logits are wanted; `logits` are what `logits_of` gives.

    Models that can are asked for no more. In others the output embedding is shown no more.
    """
    options: dict[str, Any] = {"use_cache": use_cache} if takes(model, "use_cache") else {}
    with ExitStack() as after:
        after.enter_context(hooked([contiguous_head(model)]))
        if takes(model, "logits_to_keep"):
            options["logits_to_keep"] = keep
        else:
            after.enter_context(hooked([_last_states(model, keep)]))
        return model(**inputs, **options)


def logits_of(result: Any, keep: int) -> Tensor:
    """The logits [rows, keep, V] of a forward pass, whatever it returns them in."""
    logits: Any = getattr(result, "logits", None)
    if logits is None and isinstance(result, Mapping):
        logits = result.get("logits")
    if logits is None and isinstance(result, tuple | list) and result:
        logits = result[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise UsageError(
            "The model's forward gives no logits [rows, tokens, vocabulary]: choose a causal language model."
        )
    return logits[:, -keep:]


def check_numbers(model: Any, logits: Tensor) -> None:
    """Raises LlmvaError where logits are no numbers: the largest of them would be token 0, whatever the prompt."""
    if bool(logits.isnan().any()):
        kind = str(model.dtype).removeprefix("torch.")
        mend = "choose a smaller strength or --step" if kind == "float32" else "pass --dtype bfloat16 or float32"
        raise LlmvaError(f"What the model computes for a prompt overflows in {kind}: {mend}.")


def _last_states(model: Any, keep: int) -> Any:
    """A hook that hands the output embedding the last positions alone."""
    return model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: tuple(
            contiguous(a[:, -keep:]) if isinstance(a, Tensor) and a.ndim == 3 else a for a in args
        )
    )


# -- code of its own ---------------------------------------------------------------------------------------------


def check_features(model: Any) -> None:
    """Raises UsageError for a model that lacks what answering prompts needs."""
    kind = type(model).__name__
    for name in WRAPPED:
        if isinstance(getattr(model, name, None), torch.nn.Module) and not hasattr(type(model), "generate"):
            raise UsageError(f"The model is wrapped in {kind}, which cannot be read: give what it holds, model.{name}.")
    if _is_empty(model):
        raise UsageError(
            "The model is on the meta device, where weights have no numbers: load it with llmva.load_model, or with "
            "from_pretrained on a device."
        )
    if not hasattr(type(model), "generate"):
        raise UsageError(
            f"The model's class {kind} has no generate(): let it inherit from GenerationMixin too, or choose a release "
            "of transformers that knows its type."
        )
    for name, what in (("get_input_embeddings", "input"), ("get_output_embeddings", "output")):
        try:
            part = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            part = None
        if part is None or not isinstance(getattr(part, "weight", None), Tensor):
            raise UsageError(
                f"The model's class {kind} gives no {what} embedding by {name}(): add the method to its code, or "
                "choose another model."
            )
    given = inspect.signature(model.forward).parameters.values()
    missing = [name for name in ("input_ids", "attention_mask") if not takes(model, name)]
    if missing and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in given):
        raise UsageError(
            f"The forward of the model's class {kind} takes no {missing[0]}, without which prompts cannot be answered "
            "in batches: add it to its code, or choose another model."
        )


def _is_empty(model: Any) -> bool:
    """Whether no weight has numbers, and accelerate does not bring any in."""
    parameters = list(model.parameters())
    brought = any(hasattr(module, "_hf_hook") for module in model.modules())
    return bool(parameters) and not brought and all(parameter.device.type == "meta" for parameter in parameters)


@torch.inference_mode()
def batches_well(model: Any, pad: int, rows: list[list[int]]) -> bool:
    """Whether two rows of different lengths give the same side by side as alone, and generating the same as reading.

    Asked of models with code of their own, which may ignore the padding or the cache.

    Raises:
        UsageError: the code fails, in one sentence.
    """
    from transformers import GenerationConfig

    device, kind = input_device(model), type(model).__name__
    try:
        together = run_forward(model, forward_inputs(model, *pad_left(rows, pad, device)), keep=1)
        side_by_side = logits_of(together, 1)[:, -1].float()
        again = run_forward(model, forward_inputs(model, *pad_left(rows, pad, device)), keep=1)
        steady = nearly_equal(logits_of(again, 1)[:, -1].float(), side_by_side, model.dtype)
        alone = []
        for row in rows:
            result = run_forward(model, forward_inputs(model, *pad_left([row], pad, device)), keep=1)
            alone.append(logits_of(result, 1)[:, -1].float())
        ids, mask = pad_left(rows[:1], pad, device)
        plain: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=STEPS, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
        )
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
        step_by_step = torch.cat(made.logits).float()
        whole = made.sequences[:, :-1]
        steps = len(step_by_step)
        read = run_forward(model, forward_inputs(model, whole, torch.ones_like(whole)), keep=steps)
        at_once = logits_of(read, steps)[0].float().to(step_by_step.device)
    except torch.OutOfMemoryError:
        raise
    except LlmvaError:
        raise
    except Exception as error:  # the code is the model's own: it may fail in any way
        raise UsageError(
            f"The code of the model's class {kind} fails when it answers ({type(error).__name__}: "
            f"{first_line(error)}): mend it, or choose a release of transformers that it was written for."
        ) from error
    allowed = TOLERANCE if model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    scale = float(side_by_side.abs().max().clamp_min(1e-6))
    if not steady:  # nothing can be proved of what is random; `find_decoder` sees it too, and says so
        return True
    if float((step_by_step - at_once).abs().max()) > allowed * scale:
        raise UsageError(
            f"The code of the model's class {kind} generates something else than its forward pass gives, so its "
            "cache is broken: mend it, or choose a release of transformers that it was written for."
        )
    return float((side_by_side - torch.cat(alone)).abs().max()) <= allowed * scale
