"""A tiny random model of every decoder type that the installed transformers has, by shrinking its default config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

LAYERS = 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("out_hidden_size", "output_hidden_size", "emb_dim", "input_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "d_ff", "d_inner"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("index_n_heads", "linear_num_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "kv_channels", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_topk", "router_hidden_size"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWERS = ("vision", "visual", "audio", "encoder", "qformer", "perceiver", "vq", "patcher", "dit")


def tiny_config(made: Any, changes: dict[str, Any], tower: bool = False) -> Any:
    """A config of the class `made`, shrunk in every part."""
    inner: dict[str, Any] = {}
    parts = getattr(made, "sub_configs", {})
    if parts:
        plain = made()
        for name in parts:
            part = getattr(plain, name, None)
            own = changes.get(name, {})
            if part is not None and isinstance(own, dict):
                beside = tower or any(word in name for word in TOWERS)
                inner[name] = tiny_config(type(part), own, beside).to_dict()
    known, other = {f.name for f in fields(made)}, getattr(made, "attribute_map", {})
    given = {k: v for k, v in SIZES.items() if k in known or (k in other and other[k] not in SIZES)}
    for name in ("layer_types", "mlp_layer_types", "block_types"):
        given.pop(name, None)
    flat = {k: v for k, v in changes.items() if k not in inner}
    return made(**{**given, **inner, **flat})


def tiny_of(model_type: str, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """The random model of a type, float32, in evaluation mode."""
    import torch
    from transformers import CONFIG_MAPPING

    from llmva.models.load import auto_class

    config = tiny_config(CONFIG_MAPPING[model_type], changes or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)
