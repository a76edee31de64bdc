"""The sublayers of a decoder: the modules whose outputs are added to the residual stream, one, two or more a block.

The method edits the output of a module, and needs no more of it than that the residual stream moves by what is added to
the output. So a module is a sublayer if that is shown: a push at its output moves the stream by the push, times a scale
or through a post-norm, at that token and at no earlier one (`finding/search.py`). What else a block adds may stay as it
is. If some block has no such module, the model is refused, because an edit of the wrong module would look like a run
and do harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmva.errors import LlmvaError, UsageError
from llmva.models.at_rest import at_rest, told_hooks
from llmva.models.finding.names import Found, by_name, kind_of
from llmva.models.finding.probe import Record, probe_ids, read, record_blocks
from llmva.models.finding.search import Pass, find_writers_of
from llmva.models.finding.tensors import first_tensor, nearly_equal, streams_of

SEED = 0  # of the pushes
NONE = "no module is shown to add its output to the residual stream"
TOWERS = ("vision", "visual", "audio")  # in names of what reads images and sound
TEXTS = ("language_model", "text_model")  # in names of the text part
LISTS = ("layers", "blocks", "h")  # names of lists of blocks


@dataclass(frozen=True)
class Sublayer:
    """A module that writes. `projection` is edited; the output of `output` (a post-norm, if any) is `o`."""

    name: str  # path of the projection in the model
    kind: str  # "attention", which is any that mixes tokens, or "mlp"
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
def _gain(norm: Any) -> torch.Tensor | None:
    """The measured gain, because Gemma's norms multiply by 1 + weight and others by weight.

    A vector of +1 and -1 is already normalised, so its output shows the gain.
    """
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
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
    streams: int = 1  # residual streams

    @property
    def names(self) -> list[str]:
        return [sublayer.name for sublayer in self.sublayers]

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The list of modules that ends with the last block; None if there is no such list."""
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module))
        return next((blocks for blocks in lists if blocks[-1] is self.last_block), None)

    @property
    def vocabulary(self) -> int:
        """The number of logits; a tokenizer may have fewer tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])


def find_decoder(model: Any, *, verify: bool = True) -> Decoder:
    """Find the sublayers, block by block and in each in the order of their outputs.

    Without `verify` names alone decide, as on the meta device, which has no numbers. Do not edit by such a result.

    Raises:
        UsageError: no writer is certain in some block.
        LlmvaError: what a block computes overflows.
    """
    prefix, blocks = _blocks(model)
    width = getattr(text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise UsageError(
            f"The config of this {kind} model names no hidden_size: add it, or an attribute_map that leads to it."
        )
    if not verify:
        named = {index: by_name(block) for index, block in enumerate(blocks)}
        missing = next((index for index, writing in named.items() if not writing), None)
        if missing is not None:
            raise UsageError(_refusal(model, missing, "names tell of no module whose output is added"))
        return _decoder(model, prefix, blocks, named, width)
    with at_rest(model):
        ids = probe_ids(model, text_config(model))
        records = record_blocks(model, list(blocks), width, ids)
        steady = _check_pass(model, records)
        run = [record for record in records if record.runs]  # of some, text alone runs only a part
        generator = torch.Generator().manual_seed(SEED)
        search = Pass(model, ids, torch.finfo(model.dtype).eps, generator)
        writing = dict(zip([records.index(record) for record in run], find_writers_of(search, run), strict=True))
    missing = next((index for index, writers in writing.items() if not writers), None)
    if missing is not None and not steady:
        raise UsageError(
            f"Block {missing} of this {text_config(model).model_type} model adds something else to the residual "
            "stream each time that it reads the same tokens: switch off what is random in it, such as a dropout "
            "that ignores eval() or a hook."
        )
    if missing is not None and (hooks := told_hooks(model)):
        raise UsageError(_refusal(model, missing, NONE, f", and it has {hooks}: remove them"))
    if missing is not None:
        raise UsageError(_refusal(model, missing, NONE))
    parts = {
        index: [(kind_of(blocks[index], pair[0], i, len(pairs)), pair) for i, pair in enumerate(pairs)]
        for index, pairs in writing.items()
    }
    assert run[-1].after is not None
    return _decoder(model, prefix, blocks, parts, width, steady, len(run[-1].after))


def _refusal(model: Any, block: int, why: str, mend: str = ": the architecture is not supported") -> str:
    return f"In block {block} of this {text_config(model).model_type} model {why}{mend}."


def _decoder(
    model: Any,
    prefix: str,
    blocks: nn.ModuleList,
    writing: Mapping[int, Sequence[tuple[str, Found]]],
    width: int,
    steady: bool = True,
    streams: int = 1,
) -> Decoder:
    sublayers = [
        Sublayer(
            f"{prefix}.{index}.{projection}",
            kind,
            index,
            blocks[index].get_submodule(projection),
            blocks[index].get_submodule(output),
        )
        for index, pairs in sorted(writing.items())
        for kind, (projection, output) in pairs
    ]
    return Decoder(model, tuple(sublayers), blocks[max(writing)], width, steady, streams)


def _check_pass(model: Any, records: Sequence[Record]) -> bool:
    """Whether the same tokens give the same numbers twice, and that nothing looks at later tokens.

    Raises UsageError for blocks that cannot be read or run several times, and for a model that reads ahead; LlmvaError
    for numbers that are none.
    """
    run = [record for record in records if record.runs]
    if not run:
        raise UsageError(_refusal(model, 0, "nothing is computed for text"))
    for index, record in enumerate(records):
        if record.runs > 1:
            raise UsageError(_refusal(model, index, "an edit would act several times, since the block is run again"))
        if record.runs and (record.before is None or record.after is None or record.before.shape != record.after.shape):
            raise UsageError(_refusal(model, index, "the residual stream cannot be told"))
        if record.after is not None and not bool(record.after.isfinite().all()):
            kind = str(model.dtype).removeprefix("torch.")
            raise LlmvaError(f"What block {index} computes overflows in {kind}: pass --dtype bfloat16 or float32.")
    last = run[-1]
    assert last.after is not None
    changed = _again(model, last, 1)
    if nearly_equal(changed[:, :-1], last.after[:, :-1], model.dtype):
        return True
    same = _again(model, last, 0)
    if not nearly_equal(same, last.after, model.dtype):
        return False
    raise UsageError(_refusal(model, records.index(last), "tokens are read before their turn"))


def _again(model: Any, last: Record, change: int) -> torch.Tensor:
    """The residual streams [k, t, d] after the last block, with another last token if `change`."""
    kept: list[torch.Tensor] = []
    handle = last.block.register_forward_hook(lambda module, args, output: kept.append(first_tensor(output).detach()))
    ids = probe_ids(model, text_config(model), change)
    read(model, ids, [handle])
    streams = streams_of(kept[-1].to("cpu", torch.float64), ids.shape[1], last.width)
    assert streams is not None
    return streams


def text_config(model: Any) -> Any:
    """The config of the text decoder, also in a multimodal model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: the one ModuleList of the length in the config, outside vision and audio towers.

    Some configs count sublayers, or layers of all parts; then it is the one list of blocks.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(word in name for word in TOWERS)
        and any(True for _ in module[0].children())
    ]
    candidates = [(name, module) for name, module in lists if len(module) == count]
    if not candidates:
        candidates = [(name, module) for name, module in lists if name.rsplit(".", 1)[-1] in LISTS]
    if len(candidates) > 1:  # of an encoder and a decoder, the decoder's
        candidates = [(name, module) for name, module in candidates if "encoder" not in name]
    if len(candidates) > 1:  # of a text part and others of as many layers, the text's
        text = [(name, module) for name, module in candidates if any(word in name for word in TEXTS)]
        candidates = text or candidates
    if len(candidates) > 1:  # lists inside the blocks of another
        outer = tuple(f"{name}." for name, _ in candidates)
        candidates = [(name, module) for name, module in candidates if not name.startswith(outer)]
    if len(candidates) != 1:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise UsageError(
            f"The decoder blocks of this {kind} model cannot be told apart: the architecture is not supported."
        )
    return candidates[0]


def contiguous_head(model: Any) -> Any:
    """A hook that makes the hidden states contiguous before the output embedding; remove it after the forward pass.

    transformers slices out the positions that need logits. For such a slice torch's linear copies the whole matrix once
    for each row: 57 MB a prompt on a 135M model, several GB a batch.
    """
    return model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: tuple(contiguous(a) if isinstance(a, torch.Tensor) else a for a in args)
    )


def contiguous(states: torch.Tensor) -> torch.Tensor:
    """`states` laid out by their shape alone. torch takes a slice of a single row for contiguous as it is, and its
    linear then copies its matrix all the same."""
    return states.contiguous() if len(states) > 1 else states.clone(memory_format=torch.contiguous_format)
