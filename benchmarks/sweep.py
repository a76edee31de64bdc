"""Sweep over all types that the installed transformers maps to a causal or an image-and-text model.

    python benchmarks/sweep.py [TYPE ...]

Of each type a tiny random model is made, its sublayers are found and proved, and proved again by other pushes
(`holds`). Without names, the result replaces the section of docs/architectures.md between the two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sweep_models import BESIDE, tiny_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- sweep -->\n", "<!-- end of sweep -->\n"
SEED = 1  # of the second proof; llmva's own has another
TOKENS = 11
PUSH = 0.1  # of the output's length, which may be none
EXACT = 1e-5  # relative, in float64
ROUNDED = 2e-7  # of the stream: some models sum it in float32, whatever their dtype


def all_types() -> list[str]:
    """Every model type of the two mappings."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def holds(model: Any, decoder: Any) -> list[str]:
    """The sublayers that a second proof in float64 denies: its own hooks, tokens and pushes.

    All other sublayers of the block give what they gave before, and where there are several residual streams, so does
    what mixes them. Then the stream that the next block reads must move at
    the pushed token by the push times a scale, or by what the post-norm's output moved, and at no other token.
    """
    import torch

    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others know no float64
    generator = torch.Generator().manual_seed(SEED)
    rows = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(3, min(rows, 60), (1, TOKENS), generator=generator)
    options = {} if type(model).__name__.startswith("XLM") else {"use_cache": False}
    blocks = {s.block: model.get_submodule(s.name.split(f".{s.block}.")[0])[s.block] for s in decoder.sublayers}
    given: dict[Any, Any] = {}
    whole: dict[Any, Any] = {}
    streams: dict[int, Any] = {}

    def first(output: Any) -> Any:
        return output[0] if isinstance(output, tuple | list) else output

    def again(output: Any, x: Any) -> Any:
        return (x, *output[1:]) if isinstance(output, tuple | list) else x

    def ends(index: int, into: dict[int, Any]) -> Any:
        return lambda module, args, output: into.__setitem__(index, first(output).detach().clone())

    def run(handles: list[Any]) -> None:
        try:
            with torch.inference_mode():
                model(input_ids=ids, **options)
        finally:
            for handle in handles:
                handle.remove()

    def keep(module: Any, args: Any, output: Any) -> None:
        given[module] = first(output).detach().clone()
        whole[module] = output

    watched = {m for s in decoder.sublayers for m in (s.projection, s.output)}
    inside = {part for m in watched for part in m.modules()}
    held = [
        part
        for block in blocks.values()
        for part in block.modules()
        if decoder.streams > 1 and part not in inside and weighs(part)
    ]
    handles = [m.register_forward_hook(keep) for m in (*watched, *held)]
    run(handles + [block.register_forward_hook(ends(i, streams)) for i, block in blocks.items()])
    denied = []
    rounds = max(sum(s.block == i for s in decoder.sublayers) for i in blocks)
    for turn in range(rounds):  # one sublayer of each block in a pass; blocks hand on what they gave before
        tested = {}
        for i in blocks:
            own = [s for s in decoder.sublayers if s.block == i]
            if turn < len(own):
                tested[i] = own[turn]
        token = 2 + int(torch.randint(TOKENS - 4, (1,), generator=generator))
        moved: dict[int, Any] = {}
        pushes, outputs = {}, {}

        def push(module: Any, args: Any, output: Any, sublayer: Any, token: int = token, pushes: Any = pushes) -> Any:
            x = first(output).clone()
            flat = x.reshape(TOKENS, -1)
            delta = torch.randn(flat.shape[1], generator=generator, dtype=torch.float64)
            pushes[sublayer] = delta * PUSH * max(1.0, float(flat.norm())) / delta.norm()
            flat[token] += pushes[sublayer]
            return again(output, flat.reshape(x.shape))

        def still(module: Any, args: Any, output: Any) -> Any:
            return again(output, given[module].clone())

        def note(module: Any, args: Any, output: Any, sublayer: Any, outputs: Any = outputs) -> None:
            outputs[sublayer] = (first(output) - given[module]).reshape(TOKENS, -1)

        def hand_on(index: int, into: Any = moved) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                into[index] = first(output).detach().clone()
                return again(output, streams[index].clone())

            return hook

        handles = [part.register_forward_hook(lambda m, a, o: whole[m]) for part in held]
        for s in decoder.sublayers:
            if tested.get(s.block) is s:
                handles.append(s.projection.register_forward_hook(lambda m, a, o, s=s, push=push: push(m, a, o, s)))
                handles.append(s.output.register_forward_hook(lambda m, a, o, s=s, note=note: note(m, a, o, s)))
            else:
                handles.append(s.output.register_forward_hook(still))
        run(handles + [block.register_forward_hook(hand_on(i)) for i, block in blocks.items()])
        for i, s in tested.items():
            change = _streams(moved[i] - streams[i], decoder.width)
            wanted = outputs[s]
            scale = (change * wanted).sum(-1) / wanted.pow(2).sum(-1).clamp_min(1e-300)
            error = change - scale[..., None] * wanted
            size = wanted.norm() * scale.abs().max()
            leaked = change[:, [t for t in range(TOKENS) if t != token]].norm()
            shown = size > 1e-4 * wanted.norm() > 0
            allowed = EXACT * size + ROUNDED * streams[i].norm()
            if not shown or max(error.norm(), leaked) > allowed:
                denied.append(s.name)
    return denied


def weighs(module: Any) -> bool:
    """Whether a module has weights of its own, and none has any inside it."""
    own = [sum(1 for _ in part.parameters(recurse=False)) for part in module.modules()]
    return own[0] > 0 and not any(own[1:])


def _streams(x: Any, width: int) -> Any:
    """[k, t, d] of what a block gave."""
    count = x.numel() // (TOKENS * width)
    if count > 1 and not (x.shape[-2] == TOKENS and x.shape[-1] == width):
        return x.reshape(TOKENS, count, width).transpose(0, 1)
    return x.reshape(count, TOKENS, width)


def looked_at(model_type: str) -> tuple[bool, str]:
    """Whether the sublayers of a tiny model of this type are found and twice proved, and which they are, or why not."""
    from llmva.errors import LlmvaError
    from llmva.models.sublayers import find_decoder

    if model_type in BESIDE:
        return False, BESIDE[model_type]
    try:
        model = tiny_of(model_type)
    except Exception as error:
        return False, f"no tiny model: {type(error).__name__}"
    try:
        decoder = find_decoder(model)
    except LlmvaError as error:
        return False, str(error)
    except Exception as error:
        return False, f"it reads no text alone: {type(error).__name__}"
    try:
        denied = holds(model, decoder)
    except Exception as error:
        return False, f"the second proof fails: {type(error).__name__}"
    if denied:
        return False, f"WRONG: {', '.join(denied)}"
    ends = dict.fromkeys(s.name.split(f".{s.block}.", 1)[1] for s in decoder.sublayers)
    return True, ", ".join(f"`{end}`" for end in ends)


def main(names: list[str]) -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, found = "", 0
    decoders = [name for name in all_types() if name not in BESIDE]
    for name in names or all_types():
        proved, what = looked_at(name)
        found += proved
        rows += f"| {name} | {'yes' if proved else 'no'} | {what} |\n"
        print(rows.splitlines()[-1], flush=True)
    if not names:
        text = PAGE.read_text(encoding="utf-8")
        head = f"{found} of {len(decoders)} decoder types are found and proved.\n\n"
        table = "| model_type | proved | sublayers, or why not |\n| --- | --- | --- |\n" + rows
        before, rest = text.split(BEGIN)
        PAGE.write_text(before + BEGIN + head + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
