"""The parameters in which a sublayer's output is linear, and the map o' = (I + V U^T) o written into them.

For an ordinary projection they are its weight and bias. The output of a mixture of experts is a weighted sum over
experts, so the same map goes into every expert's down projection and bias, and into the shared expert's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of weights that are not packed
LAST = ("down_proj", "w2", "fc2", "c_proj", "output_linear", "dense_4h_to_h", "fc_out", "linear_2", "wo")
CHUNK = 2**19  # number of values of a weight that are converted to float32 at once
PROBES = 16


@dataclass(frozen=True)
class Writer:
    """A parameter by its path inside the sublayer's module, and its output axis (-1 or -2)."""

    name: str
    axis: int


def find_writers(module: nn.Module, width: int, *, prove: bool = True) -> tuple[Writer, ...]:
    """The parameters that write the output [.., width] of `module`; () if it has none that can be written.

    With `prove`, a mixture of experts is run on random input: a test map, written into these parameters, must map the
    outputs in the same way. Use prove=False on the meta device, which has no numbers.
    """
    if is_linear(module):
        return _of_linear(module)
    parts: list[Writer] = []
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if is_linear(child):
            if path.rsplit(".", 1)[-1] in LAST:
                own = _of_linear(child)
                if not own:
                    return ()
                parts += [Writer(prefix + writer.name, writer.axis) for writer in own]
        else:
            fused = _of_experts(child, width)
            if fused is None:
                return ()
            parts += [Writer(prefix + writer.name, writer.axis) for writer in fused]
    writers = tuple(parts)
    if writers and prove and not _proved(module, writers, width):
        return ()
    return writers


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _of_linear(module: Any) -> tuple[Writer, ...]:
    """The writers of a linear layer; () if it is packed. Conv1D stores its weight as (in, out)."""
    # packed weights, such as those of bitsandbytes, are subclasses of Linear and Parameter, perhaps with a plain dtype
    parameter = dict(module.named_parameters(recurse=False)).get("weight")
    if type(parameter) is not nn.Parameter or parameter.dtype not in PLAIN or parameter.ndim != 2:
        return ()
    weight = Writer("weight", -1 if type(module).__name__ == "Conv1D" else -2)
    return (weight,) if getattr(module, "bias", None) is None else (weight, Writer("bias", -1))


def _of_experts(module: nn.Module, width: int) -> list[Writer] | None:
    """The fused down projections [E, out, in] or [E, in, out] among this module's own parameters.

    None if they are packed, or if their layout is unknown.
    """
    writers = []
    for name, parameter in module.named_parameters(recurse=False):
        if name.removesuffix("_bias") not in LAST:
            continue
        if parameter.dtype not in PLAIN:
            return None
        if name.endswith("_bias"):
            writers.append(Writer(name, -1))
        elif parameter.ndim == 3:
            transposed = getattr(module, "is_transposed", None)
            if transposed is None and parameter.shape[-1] == parameter.shape[-2]:
                return None
            if transposed is None:
                transposed = parameter.shape[-1] == width
            writers.append(Writer(name, -1 if transposed else -2))
        else:
            return None
    return writers


@torch.no_grad()
def _proved(module: nn.Module, writers: tuple[Writer, ...], width: int) -> bool:
    """Whether reversing and scaling the outputs in the parameters equals doing so after the module."""
    parameters = dict(module.named_parameters())
    first = parameters[writers[0].name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBES, width, generator=generator).to(first.device, first.dtype)
    scale = (0.5 + torch.rand(width, generator=generator)).to(first.device, first.dtype)
    changed = {}
    for writer in writers:
        weight = parameters[writer.name]
        if weight.shape[writer.axis] != width:
            return False
        shaped = scale if writer.axis == -1 else scale[:, None]
        changed[writer.name] = weight.flip(writer.axis) * shaped
    plain, mapped = module(x), torch.func.functional_call(module, changed, (x,))
    plain, mapped = (o[0] if isinstance(o, tuple) else o for o in (plain, mapped))
    wanted = (plain.flip(-1) * scale).float()
    return bool((mapped.float() - wanted).norm() <= 0.02 * wanted.norm())


@torch.no_grad()
def left_map(weight: Tensor, axis: int, V: Tensor, U: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`weight` with I + V U^T applied along its outputs: same shape, dtype and device, rounded once.

    Args:
        weight: [d], [.., d, in] or [.., in, d].
        axis: -2 or -1, the axis of length d.
        V, U: [d, k].
        out: the tensor to write, which may be `weight` itself. None creates a new tensor.

    Computed in float32, a few rows at a time: they stay in the processor's cache, and only a few MB are needed besides
    the result.
    """
    V, U = V.to(weight.device, torch.float32), U.to(weight.device, torch.float32)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    if weight.ndim == 1:
        wide = weight.float()
        return result.copy_(wide + V @ (U.T @ wide))
    size = max(1, CHUNK // max(1, weight.shape[-1]))
    slices, targets = weight.reshape(-1, *weight.shape[-2:]), result.view(-1, *weight.shape[-2:])
    for source, target in zip(slices, targets, strict=True):
        if axis == -1:
            for start in range(0, len(source), size):
                wide = source[start : start + size].float()
                target[start : start + size] = wide.addmm(wide @ U, V.T)  # `wide` may be the source: not in place
            continue
        A = torch.zeros(U.shape[1], source.shape[1], device=weight.device)  # U^T W, a sum over all rows
        for start in range(0, len(source), size):
            A.addmm_(U[start : start + size].T, source[start : start + size].float())
        for start in range(0, len(source), size):
            wide = source[start : start + size].float()
            target[start : start + size] = wide.addmm(V[start : start + size], A)
    return result
