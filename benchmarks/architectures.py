"""Write docs/architectures.md: every architecture's taught model aligned, and the paper's models by their shapes.

    python benchmarks/architectures.py

The small models are those of tests/architectures.py; tests/test_architectures.py checks the page against them. The
paper's models are built on the meta device, from the numbers in their config.json, so nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ITERATIONS = 30  # the paper's
ENDS = re.compile(r"^.*?\.\d+\.")
# config class, vocabulary, width, inner width, blocks, heads, key-value heads, the rest
PAPER: dict[str, tuple[str, int, int, int, int, int, int, dict[str, Any]]] = {
    "Llama-3.1-8B": ("LlamaConfig", 128256, 4096, 14336, 32, 32, 8, {}),
    "gemma-2-9b": ("Gemma2Config", 256000, 3584, 14336, 42, 16, 8, {"head_dim": 256, "tie_word_embeddings": True}),
    "Mistral-7B-v0.3": ("MistralConfig", 32768, 4096, 14336, 32, 32, 8, {}),
    "Phi-3.5-mini": ("Phi3Config", 32064, 3072, 8192, 32, 32, 32, {}),
    "Phi-4-mini": ("Phi3Config", 200064, 3072, 8192, 32, 24, 8, {"tie_word_embeddings": True}),
    "Phi-4": ("Phi3Config", 100352, 5120, 17920, 40, 40, 10, {}),
    "Qwen2.5-3B": ("Qwen2Config", 151936, 2048, 11008, 36, 16, 2, {"tie_word_embeddings": True}),
    "Qwen2.5-7B": ("Qwen2Config", 152064, 3584, 18944, 28, 28, 4, {}),
    "Qwen2.5-14B": ("Qwen2Config", 152064, 5120, 13824, 48, 40, 8, {}),
    "Qwen3-4B": ("Qwen3Config", 151936, 2560, 9728, 36, 32, 8, {"head_dim": 128, "tie_word_embeddings": True}),
    "Qwen3-8B": ("Qwen3Config", 151936, 4096, 12288, 36, 32, 8, {"head_dim": 128}),
    "Qwen3-14B": ("Qwen3Config", 151936, 5120, 17408, 40, 40, 8, {"head_dim": 128}),
}

HEAD = """# Architectures

`python benchmarks/architectures.py` writes this page.

## Every form of the edit, and a model aligned end to end

For each row, a model of 3 blocks (2 for qwen3_next), 32 wide, is trained for seconds to answer and refuse for the
wrong reason. Then it is aligned with the defaults, except for at most 6 iterations and a patience of 3. The tests
(`tests/test_architectures.py`, `tests/test_sublayers.py`) prove that the sublayers are found in float32 and bfloat16
and that a capture holds their outputs. They also prove that all forms of the edit give the same logits to 1e-4: by
hook, baked, as a merged checkpoint and, if the table says yes, as a LoRA adapter loaded by PEFT.

If F1 is unchanged, no iteration was better on validation prompts, and the run kept the untouched model. On these tiny
models a first step often overshoots until everything is answered, and the run ends there. This comes from the small
model and the short training, not from the architecture at its real size. The training of gemma3_text, gpt2, opt and
olmo2 was made longer after their first tries failed, with these results in view.

| model_type | edited modules | F1 before | F1 after | LoRA |
| --- | --- | --- | --- | --- |
"""
FURTHER = """
## Further model types

A random model of each type is tested too: its sublayers are found, and the baked edit equals the edit by hook.

{more}.

By hook only, because a bake does not know the layout of their weights: {hook}.

"""
SIZES = """
## The models of the paper

The sizes below follow from the models' real shapes, on the meta device. There, names alone find the sublayers; with
weights, one forward pass proves them. L is the number of sublayers that the paper's alignment edits by default, and
sizes are those of {iterations} such alignments. The edit has 2 d float32 values for each alignment and sublayer.
The size of an adapter depends on the chosen modules: the table gives its maximum, with the L widest chosen each time.
Merging holds the largest changed tensor in bfloat16 and a part of it in float32, for each of at most 4 shards that are
written at once, in addition to the memory of Python and torch.

| model | sublayers, L | edited tensors | outputs read from | edit, MB | adapter at most, MB | merging, MB |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Sizes:
    """What an edit of a model comes to; bytes."""

    sublayers: int
    count: int  # edited in an iteration
    tensors: list[tuple[str, tuple[int, ...]]]
    outputs: str
    edit_bytes: int
    adapter_bytes: int
    merge_bytes: int


def on_meta(name: str) -> Any:
    """A model of the paper without its weights."""
    import torch
    import transformers

    kind, vocabulary, width, inner, blocks, heads, groups, rest = PAPER[name]
    plain = {"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, kind)(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **{**plain, **rest},
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure(name: str, model: Any) -> Sizes:
    from llmva.export.merged import MAX_SHARDS
    from llmva.method.identify import papers_count
    from llmva.models.sublayers import find_decoder
    from llmva.models.writers import CHUNK, find_writers

    decoder = find_decoder(model, verify=False)
    count = papers_count(len(decoder.sublayers))
    tensors, widths, largest = {}, [], 0
    for sublayer in decoder.sublayers:
        for writer in find_writers(sublayer.projection, decoder.width, prove=False):
            parameter = sublayer.projection.get_parameter(writer.name)
            tensors[ENDS.sub("", f"{sublayer.name}.{writer.name}")] = tuple(parameter.shape)
            largest = max(largest, parameter.numel() * parameter.element_size())
        widths.append(sum(sublayer.projection.weight.shape))  # type: ignore[operator, arg-type]
    post = any(sublayer.output is not sublayer.projection for sublayer in decoder.sublayers)
    return Sizes(
        len(decoder.sublayers),
        count,
        list(tensors.items()),
        "post-norms" if post else "projections",
        ITERATIONS * count * 2 * decoder.width * 4,
        ITERATIONS * sum(sorted(widths)[-count:]) * 4,
        MAX_SHARDS * (largest + 2 * 4 * CHUNK),
    )


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from architectures import ARCHITECTURES, HOOK_ONLY, MORE, tiny
    from llmva.cli.inputs import quiet_libraries
    from llmva.models.sublayers import find_decoder
    from test_architectures import aligned, expressible

    quiet_libraries()
    torch.set_num_threads(1)
    text = HEAD
    for row in ARCHITECTURES:
        model = tiny(row)
        lora = expressible(model)
        ends = dict.fromkeys(ENDS.sub("", name) for name in find_decoder(model).names)
        f1 = "{:.3f} | {:.3f}".format(*aligned(row))
        kinds = ", ".join(f"`{end}`" for end in ends)
        text += f"| {row} | {kinds} | {f1} | {'yes' if lora else 'no: fused experts'} |\n"
        print(text.splitlines()[-1], flush=True)
    more = ", ".join(name for name in sorted(MORE) if name not in HOOK_ONLY)
    text += FURTHER.format(more=more, hook=", ".join(HOOK_ONLY))
    page = ROOT / "docs" / "architectures.md"
    old = page.read_text(encoding="utf-8")
    text += old[old.index("## Every decoder type") : old.index("## The models of the paper")].rstrip() + "\n"
    text += SIZES.format(iterations=ITERATIONS)
    for name in PAPER:
        s = measure(name, on_meta(name))
        edited = ", ".join(f"`{end}` {shape[0]} x {shape[1]}" for end, shape in s.tensors)
        sizes = " | ".join(f"{n / 1e6:.0f}" for n in (s.edit_bytes, s.adapter_bytes, s.merge_bytes))
        text += f"| {name} | {s.sublayers}, {s.count} | {edited} | {s.outputs} | {sizes} |\n"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
