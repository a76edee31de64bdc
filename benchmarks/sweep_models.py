"""A tiny random model of every decoder type that the installed transformers has, by shrinking its default config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

LAYERS = 3
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(
        ("out_hidden_size", "output_hidden_size", "emb_dim", "input_embedding_size", "text_hidden_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "d_ff", "d_inner"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("index_n_heads", "linear_num_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 4),
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
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SECTIONED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SECTIONED_TYPES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "glm4v",
    "glm46v",
    "glm_ocr",
    "glmga",
)
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRID = ["mamba", "hybrid", "mamba"]
FULL = ["full_attention"] * LAYERS
# What the default config of a type needs beside smaller sizes.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention", "mamba"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
                   "n_groups": 1},
    "zamba": {"layer_types": ["mamba", "hybrid", "hybrid"], "mamba_dt_rank": 4, "attention_head_dim": 16},
    "zamba2": {"layer_types": HYBRID, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1,
               "hybrid_layer_ids": [1], "layers_block_type": HYBRID, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "longcat_flash": {"num_layers": 3, "expert_ffn_hidden_size": 16},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": SECTIONED}},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48, "layer_types": FULL,
                     "activation_sparsity_pattern": None, "laurel_rank": 4},
    **{name: {"text_config": {"rope_parameters": SECTIONED}} for name in SECTIONED_TYPES},
    **{name: {"text_config": {"rope_parameters": SECTIONED}} for name in ("cosmos3_edge", "hunyuan_vl", "hy_v4_vl")},
    **{
        name: {"rope_parameters": {"full_attention": SECTIONED, "sliding_attention": SECTIONED}}
        for name in ("cohere_compass_text",)
    },
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": SECTIONED, "sliding_attention": SECTIONED}}
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "granite4_vision": {"deepstack_layer_map": []},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**SECTIONED, "partial_rotary_factor": 1.0}}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
}  # fmt: skip
ENCODER = "an encoder with a head for text: not a chat decoder"
PAIR = "an encoder and a decoder: not a chat decoder"
OTHER = "a model that reads no text alone: not a chat decoder"
# Types of the mappings that are no decoders of text, and why.
ENCODERS = (  # noqa: SIM905
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
).split()
PAIRS = (  # noqa: SIM905
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet t5gemma2 trocr udop "
    "vision-encoder-decoder whisper florence2 musicgen musicgen_melody pix2struct pp_formulanet"
).split()
OTHERS = (  # noqa: SIM905
    "blip blip-2 idefics instructblip instructblipvideo kosmos-2 pi0 evolla gemma4_assistant gemma4_unified_assistant "
    "diffusion_gemma"
).split()
BESIDE = {
    **dict.fromkeys(ENCODERS, ENCODER),
    **dict.fromkeys(PAIRS, PAIR),
    **dict.fromkeys(OTHERS, OTHER),
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
            if part is not None and isinstance(own, dict) and hasattr(type(part), "sub_configs"):
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

    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}) if changes is None else changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1 or (parameter.ndim == 3 and parameter.shape[1] == 1):
                parameter.add_(
                    0.1 * torch.randn(parameter.shape)
                )  # gains of one and gates of zero would prove too much
    return model.eval().requires_grad_(False)
