"""Find the 2N sublayers of a decoder: the modules whose outputs are added to the residual stream.

A block's update of the residual stream is a sum, `x_out - x_in = c (o_attention + o_mlp)`. Names suggest which
modules give the two terms; one forward pass of a few tokens then proves it. If the named modules do not explain the
update, the block is searched for a pair that does. If there is none, the model is refused, because an edit of the wrong
module would look like a run and do harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from llmva.errors import LlmvaError, UsageError
from llmva.models.at_rest import at_rest, told_hooks
from llmva.models.chat.inputs import input_device, takes
from llmva.models.writers import is_linear

# Name endings, inside a block, of the projection that writes a sublayer's output.
ATTENTION = (
    "self_attn.o_proj",  # llama, mistral, qwen2, qwen3, gemma, phi3, olmo2, granite, cohere
    "self_attn.dense",  # phi
    "self_attn.out_proj",  # opt
    "self_attention.dense",  # falcon, bloom
    "attention.dense",  # gpt_neox
    "attention.o_proj",
    "attention.out_proj",
    "attn.c_proj",  # gpt2
    "attn.o_proj",
    "attn.out_proj",  # gpt_j, mpt
    "attn.attention.out_proj",  # gpt_neo
    "norm_attn_norm.attn.out_proj",  # dbrx
    "linear_attn.out_proj",  # qwen3_next
    "linear_attn.o_proj",  # olmo_hybrid
    "mamba.out_proj",  # jamba, bamba, granitemoehybrid
    "conv.out_proj",  # lfm2
    "mixer.out_proj",
)
MLP = (
    "mlp.down_proj",  # llama, mistral, qwen2, qwen3, gemma, phi3, olmo2, granite, cohere
    "mlp.c_proj",  # gpt2
    "mlp.fc2",  # phi
    "mlp.dense_4h_to_h",  # gpt_neox, falcon, bloom
    "mlp.fc_out",  # gpt_j
    "ffn.down_proj",  # mpt
    "feed_forward.w2",  # lfm2
    "feed_forward.down_proj",  # jamba, bamba, llama4
    "block_sparse_moe",  # mixtral: the block's output is linear in every expert's down projection
    "fc2",  # opt
    "mlp",  # mixture of experts: the module that sums them
    "feed_forward",  # likewise: llama4, jamba, lfm2_moe
    "ffn",  # likewise: dbrx
)
# Children of a block whose outputs (attention, MLP) are added instead of the projections' own.
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # gemma2, gemma3, olmo2, exaone4
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # glm4
)
PROBE_TOKENS = 5
NOISE = 1e-4  # relative difference of two passes over the same tokens
TOLERANCE = 0.05  # relative error: bfloat16 sums of large residuals lose two digits


@dataclass(frozen=True)
class Sublayer:
    """One attention or MLP sublayer. `projection` is edited; the output of `output` (a post-norm, if any) is `o`."""

    name: str  # path of the projection in the model
    kind: str  # "attention" or "mlp"
    block: int
    projection: nn.Module
    output: nn.Module

    @property
    def gain(self) -> torch.Tensor | None:
        """The post-norm's gain per channel, float32 [d], or None if the projection writes to the residual stream."""
        if self.output is self.projection:
            return None
        return _gain(self.output)


@torch.no_grad()
def _gain(norm: Any) -> torch.Tensor:
    """The measured gain, because Gemma's norms multiply by 1 + weight and others by weight.

    A vector of +1 and -1 is already normalised, so its output shows the gain.
    """
    weight = norm.weight
    signs = torch.ones_like(weight, dtype=torch.float32 if not isinstance(norm, nn.LayerNorm) else weight.dtype)
    signs[1::2] = -1.0
    # forward() runs no hooks of a capture; half the difference removes the bias of a LayerNorm
    gain: torch.Tensor = (norm.forward(signs) - norm.forward(-signs)) / 2 * signs
    return gain.float()


@dataclass(frozen=True)
class Decoder:
    """A model with the parts that the method reads and edits."""

    model: Any
    sublayers: tuple[Sublayer, ...]
    last_block: nn.Module  # its output is the final residual stream, before the final norm
    width: int
    steady: bool = True  # whether the same tokens gave the same numbers twice

    @property
    def names(self) -> list[str]:
        return [sublayer.name for sublayer in self.sublayers]

    @property
    def vocabulary(self) -> int:
        """The number of logits; a tokenizer may have fewer tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])


def find_decoder(model: Any, *, verify: bool = True) -> Decoder:
    """Find the sublayers, in the order attention, MLP, attention, MLP, ... Raises UsageError if one is uncertain.

    Without `verify` names alone decide, as on the meta device, which has no numbers. Do not edit by such a result.
    """
    prefix, blocks = _blocks(model)
    width = getattr(text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise UsageError(
            f"The config of this {kind} model names no hidden_size: add it, or an attribute_map that leads to it."
        )
    updates, steady = None, True
    if verify:
        with at_rest(model):
            updates = _probe(model, blocks)
            steady = _repeats(model, blocks[-1], updates[-1]["output"])
    sublayers: list[Sublayer] = []
    for index, block in enumerate(blocks):
        pair = _by_name(block)
        if updates is not None:
            pair = _proved(block, pair, updates[index], torch.finfo(model.dtype).eps)
        if pair is None and not steady:
            raise UsageError(
                f"Block {index} of this {text_config(model).model_type} model adds something else to the residual "
                "stream each time that it reads the same tokens: switch off what is random in it, such as a dropout "
                "that ignores eval() or a hook."
            )
        if pair is None and (hooks := told_hooks(model)):
            raise UsageError(
                f"In block {index} of this {text_config(model).model_type} model no two modules explain what the block "
                f"adds to the residual stream, and it has {hooks}: remove them."
            )
        if pair is None:
            raise UsageError(
                f"In block {index} of this {text_config(model).model_type} model no two modules explain what the "
                "block adds to the residual stream: the architecture is not supported."
            )
        for kind, (projection, output) in zip(("attention", "mlp"), pair, strict=True):
            modules = dict(block.named_modules())
            name = f"{prefix}.{index}.{projection}"
            sublayers.append(Sublayer(name, kind, index, modules[projection], modules[output]))
    return Decoder(model, tuple(sublayers), blocks[-1], width, steady)


def text_config(model: Any) -> Any:
    """The config of the text decoder, also in a multimodal model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: the one ModuleList of the length in the config, outside vision and audio towers."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not any(word in name for word in ("vision", "visual", "audio", "encoder"))
        and any(True for _ in module[0].children())
    ]
    if len(candidates) != 1:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise UsageError(
            f"The decoder blocks of this {kind} model cannot be told apart: the architecture is not supported."
        )
    return candidates[0]


Pair = tuple[tuple[str, str], tuple[str, str]]  # (projection, output) of the attention and of the MLP


def _by_name(block: nn.Module) -> Pair | None:
    names = {name for name, _ in block.named_modules()}
    attention = next((name for name in ATTENTION if name in names), None)
    mlp = next((name for name in MLP if name in names), None)
    if attention is None or mlp is None:
        return None
    outputs = next((pair for pair in POST_NORMS if names.issuperset(pair)), (attention, mlp))
    return (attention, outputs[0]), (mlp, outputs[1])


@torch.inference_mode()
def _probe(model: Any, blocks: nn.ModuleList) -> list[dict[str, torch.Tensor]]:
    """For each block: its `input`, `output`, and each inner module's output of the same shape, float64 [1, t, d]."""
    records: list[dict[str, torch.Tensor]] = [{} for _ in blocks]
    handles = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if name:
                handles.append(module.register_forward_hook(_recorder(records[index], name)))
        handles.append(block.register_forward_pre_hook(_input_recorder(records[index]), with_kwargs=True))
        handles.append(block.register_forward_hook(_recorder(records[index], "output")))
    with hooked(handles):
        _read_probe(model)
    for index, record in enumerate(records):
        if not record["output"].isfinite().all():
            kind = str(model.dtype).removeprefix("torch.")
            raise LlmvaError(f"What block {index} computes overflows in {kind}: pass --dtype bfloat16 or float32.")
        shape = record["output"].shape
        for name in [n for n, t in record.items() if t.numel() != record["output"].numel() or t.shape[-1] != shape[-1]]:
            del record[name]
    return [{name: t.reshape(record["output"].shape) for name, t in record.items()} for record in records]


def _read_probe(model: Any) -> None:
    rows = int(model.get_input_embeddings().weight.shape[0])
    size = min(rows, getattr(text_config(model), "vocab_size", None) or rows)
    ids = (torch.arange(1, PROBE_TOKENS + 1) * 7919 % size).unsqueeze(0)
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    model(input_ids=ids.to(input_device(model)), **options)


@torch.inference_mode()
def _repeats(model: Any, last_block: nn.Module, before: torch.Tensor) -> bool:
    """Whether the probe, read again, gives the last block's output that it gave `before`."""
    record: dict[str, torch.Tensor] = {}
    with hooked([last_block.register_forward_hook(_recorder(record, "output"))]):
        _read_probe(model)
    return nearly_equal(record["output"].reshape(before.shape), before, model.dtype)


def nearly_equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two passes over the same tokens, computed in `dtype`, gave the same.

    Some kernels add in another order each time, so the dtype's own noise is allowed.
    """
    off = (one - other).norm() / other.norm().clamp_min(1e-30)
    return float(off) <= max(NOISE, 4 * torch.finfo(dtype).eps)


def first_tensor(output: Any) -> torch.Tensor:
    """The output tensor of a module that returns a tensor, or a tuple that begins with it."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _recorder(record: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            record[name] = tensor.detach().to("cpu", torch.float64)

    return hook


def _input_recorder(record: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = args[0] if args else kwargs["hidden_states"]
        record["input"] = tensor.detach().to("cpu", torch.float64)

    return hook


def _misfit(record: dict[str, torch.Tensor], attention: str, mlp: str, epsilon: float) -> float:
    """The error of `x_out - x_in = c (o_attention + o_mlp)` at the worst token over the allowed error, with the best c.

    At most 1 if the two outputs explain the update. Besides TOLERANCE, the allowed error includes the rounding of the
    residual stream to its dtype, because a token with massive activations loses small updates; for the same reason each
    token weighs in c by what is allowed for it. Granite has c other than 1.
    """
    update, total = record["output"] - record["input"], record[attention] + record[mlp]
    allowed = TOLERANCE * update.norm(dim=-1) + 2 * epsilon * record["output"].norm(dim=-1)
    weight = allowed.clamp_min(1e-30).pow(-2)[..., None]
    scale = (weight * update * total).sum() / (weight * total.pow(2)).sum().clamp_min(1e-30)
    error = (update - scale * total).norm(dim=-1)
    return float((error / allowed.clamp_min(1e-30)).max())


def _proved(block: nn.Module, named: Pair | None, record: dict[str, torch.Tensor], epsilon: float) -> Pair | None:
    """The named pair if it explains the block's update, perhaps with post-norms, otherwise the only pair that does."""
    if named is not None:
        norms = [name for name in record if "norm" in name.lower() and "." not in name]
        outputs = [
            (attention, mlp)
            for attention, mlp in product([named[0][0], *norms], [named[1][0], *norms])
            if attention in record and mlp in record and attention != mlp
        ]
        # the best, not the first: a post-norm whose input is tiny compared with its epsilon is nearly a scalar
        misfits = {pair: _misfit(record, *pair, epsilon) for pair in outputs}
        best = min(misfits, key=misfits.__getitem__, default=None)
        if best is not None and misfits[best] <= 1:
            return (named[0][0], best[0]), (named[1][0], best[1])
    linear = [n for n, m in block.named_modules() if n in record and is_linear(m)]
    pairs = [(a, b) for i, a in enumerate(linear) for b in linear[i + 1 :]]
    fitting = [pair for pair in pairs if _misfit(record, *pair, epsilon) <= 1]
    if len(fitting) != 1:
        return None
    ((attention, mlp),) = fitting
    return (attention, attention), (mlp, mlp)


def contiguous_head(model: Any) -> Any:
    """A hook that makes the hidden states contiguous before the output embedding; remove it after the forward pass.

    transformers slices out the positions that need logits. For such a slice torch's linear copies the whole matrix once
    for each row: 57 MB a prompt on a 135M model, several GB a batch.
    """
    return model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
    )


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove these hooks at the end of the block, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
