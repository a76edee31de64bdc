"""Names of the modules that write to the residual stream: what names alone suggest, and what to call a writer."""

from __future__ import annotations

from torch import nn

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
    "mixer.out_proj",  # mamba, mamba2, nemotron_h
    "mixer.o_proj",  # nemotron_h
)
MLP = (
    "mlp.down_proj",  # llama, mistral, qwen2, qwen3, gemma, phi3, olmo2, granite, cohere
    "mlp.c_proj",  # gpt2
    "mlp.fc2",  # phi
    "mlp.dense_4h_to_h",  # gpt_neox, falcon, bloom
    "mlp.fc_out",  # gpt_j
    "mixer.down_proj",  # nemotron_h
    "ffn.down_proj",  # mpt
    "feed_forward.w2",  # lfm2
    "feed_forward.down_proj",  # jamba, bamba, llama4
    "shared_mlp.output_linear",  # granitemoeshared
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
MIXERS = ("attn", "attention", "mamba", "ssm", "conv", "temporal", "recurrent", "rwkv", "lstm", "delta", "kda")
FEEDS = ("mlp", "ffn", "feed", "moe", "expert", "fc")

Found = tuple[str, str]  # inside the block: the module that is edited, and the one whose output is added


def by_name(block: nn.Module) -> list[tuple[str, Found]]:
    """(kind, (projection, output)) of a block, by names alone: at most one for each of the block's children."""
    names = {name for name, _ in block.named_modules()}
    chosen: dict[str, tuple[str, str]] = {}  # by the child of the block
    for kind, endings in (("attention", ATTENTION), ("mlp", MLP)):
        for ending in endings:
            child = ending.split(".")[0]
            if ending in names and child not in chosen:
                chosen[child] = kind, ending
    order = [name for name, _ in block.named_children()]
    kinds = [chosen[child] for child in sorted(chosen, key=lambda child: (chosen[child][0], order.index(child)))]
    norms = next((pair for pair in POST_NORMS if names.issuperset(pair)), None)
    if norms is not None and [kind for kind, _ in kinds] == ["attention", "mlp"]:
        return [(kind, (ending, norm)) for (kind, ending), norm in zip(kinds, norms, strict=True)]
    return [(kind, (ending, ending)) for kind, ending in kinds]


def kind_of(block: nn.Module, name: str, place: int, count: int) -> str:
    """What a writer at this `place` of `count` in a block is called: "attention", of any mixing of tokens, or "mlp"."""
    path = ""
    for part in name.split("."):
        path = f"{path}.{part}" if path else part
        made = type(block.get_submodule(path)).__name__.lower()
        if any(word in part.lower() for word in FEEDS) or ("mixer" in part and made.endswith(("mlp", "moe"))):
            return "mlp"
        if any(word in part.lower() for word in (*MIXERS, "mixer")):
            return "attention"
    return "attention" if place == 0 and count > 1 else "mlp"
