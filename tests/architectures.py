"""Every decoder architecture the tests cover, as a tiny config; and a tiny organism trained in any of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from conftest import requests_as_rows, teach, tiny_tokenizer

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GATED = ("self_attn.o_proj", "mlp.down_proj")
SPARSE = ("self_attn.o_proj", "mlp")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Row:
    """A config class and what differs from `BASE`; the ends of the two names in a block.

    `inner` holds what a multimodal config has beside its text_config.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, str] = GATED
    post_norm: bool = False  # the residual stream reads a norm of the projection's output
    own: dict[int, tuple[str, str]] = field(default_factory=dict)  # blocks with other names
    inner: dict[str, Any] | None = None
    lesson: tuple[int, float] = (70, 5e-3)  # steps and learning rate that teach this model enough

    @property
    def blocks(self) -> int:
        return int(self.changes.get("num_hidden_layers", 3))

    def ends_of(self, block: int) -> tuple[str, str]:
        return self.own.get(block, self.ends)


BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = ("linear_attn.out_proj", "mlp")

ARCHITECTURES: dict[str, Row] = {
    "llama": Row("LlamaConfig"),
    "mistral": Row("MistralConfig"),
    "phi3": Row("Phi3Config"),
    "qwen2": Row("Qwen2Config"),
    "qwen3": Row("Qwen3Config"),
    "gemma2": Row("Gemma2Config", post_norm=True),
    "gemma3_text": Row("Gemma3TextConfig", post_norm=True, lesson=(120, 1e-2)),
    "phi": Row("PhiConfig", {}, ("self_attn.dense", "mlp.fc2")),
    "gpt2": Row("GPT2Config", {}, ("attn.c_proj", "mlp.c_proj"), lesson=(120, 1e-2)),
    "opt": Row(
        "OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 48}, ("self_attn.out_proj", "fc2"), lesson=(160, 5e-3)
    ),
    "gpt_neox": Row("GPTNeoXConfig", {}, ("attention.dense", "mlp.dense_4h_to_h")),
    "olmo2": Row("Olmo2Config", post_norm=True, lesson=(160, 5e-3)),
    "granite": Row("GraniteConfig", {"residual_multiplier": 0.3}),
    "cohere2": Row("Cohere2Config"),
    "mixtral": Row("MixtralConfig", {"num_local_experts": 4}, SPARSE),
    "qwen3_moe": Row("Qwen3MoeConfig", MOE, SPARSE),
    "gpt_oss": Row("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, SPARSE),
    "deepseek_v3": Row("DeepseekV3Config", DEEPSEEK, SPARSE, own={0: GATED}),
    "qwen3_next": Row(  # one block of each kind: linear attention without its kernels trains slowly
        "Qwen3NextConfig",
        {**MOE, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
         "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        SPARSE,
        own={0: LINEAR},
    ),
    "gemma3": Row(
        "Gemma3Config",
        post_norm=True,
        inner={"vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    ),
    "qwen2_5_vl": Row(
        "Qwen2_5_VLConfig",
        {"rope_parameters": MROPE},
        inner={"vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                                 "out_hidden_size": 32, "fullatt_block_indexes": [0]}},
    ),
    "mistral3": Row(
        "Mistral3Config",
        inner={"vision_config": {**VISION, "head_dim": 8, "image_size": 28, "patch_size": 14, "model_type": "pixtral"}},
    ),
}  # fmt: skip


# Further model types, with what differs from GENERIC: their sublayers are found, and an edit baked equals its hook.
FULL = {"num_key_value_heads": 4}
DENSE_FIRST = {**FULL, "first_k_dense_replace": 1}
PLAIN_TYPES = (  # noqa: SIM905
    "afmoe apertus arcee aria_text biogpt bitnet bloom codegen cohere cohere2_moe cwm diffllama doge ernie4_5 "
    "ernie4_5_moe exaone4 exaone_moe falcon flex_olmo gemma glm glm4 glm4_moe gpt_bigcode "
    "gptj granite_swa granitemoe helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 "
    "llama4_text mimo_v2_flash minimax_m2 ministral ministral3 modernbert-decoder moshi mpt nanochat nemotron olmo "
    "olmo3 olmo_hybrid olmoe persimmon phimoe qwen2_moe recurrent_gemma seed_oss smollm3 solar_open stablelm "
    "starcoder2 vaultgemma xglm"
).split()
MORE: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in PLAIN_TYPES},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
              "attn_layer_indices": [1]},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v2": DENSE_FIRST,
    "deepseek_v32": DENSE_FIRST,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": DENSE_FIRST,
    "glm_moe_dsa": DENSE_FIRST,
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_dt_rank": 4, "mamba_d_state": 4},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "minicpm3": FULL,
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
}  # fmt: skip
HOOK_ONLY = ("dbrx", "moshi")  # their experts' or gated weights are of a layout that a bake does not know
# Model types without a module whose output is added to the residual stream as it is.
REFUSED: dict[str, dict[str, Any]] = {"openai-gpt": {}}
GENERIC: dict[str, Any] = {
    **BASE,
    **dict.fromkeys(("n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}


def tiny_of_type(model_type: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A random model of any type, from those of GENERIC's fields that its config has."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    known, other = {f.name for f in fields(made)}, getattr(made, "attribute_map", {})
    given = {k: v for k, v in GENERIC.items() if k in known or (k in other and other[k] not in GENERIC)}
    config = made(**{"vocab_size": len(tiny_tokenizer()), **given, **changes})
    return made_from(config, seed)


def tiny_config(row: Row) -> Any:
    import transformers

    vocabulary = {"vocab_size": len(tiny_tokenizer())}
    text = {**vocabulary, **BASE, **row.changes}
    made = getattr(transformers, row.config)
    if row.inner is None:
        return made(**text)
    inner_type = made.sub_configs["text_config"]
    kind = {"mistral3": "mistral"}.get(made.model_type)
    return made(text_config={"model_type": kind, **text} if kind else inner_type(**text).to_dict(), **row.inner)


def tiny(name: str, seed: int = 0) -> Any:
    """The random model of a row, in float32 and evaluation mode."""
    return made_from(tiny_config(ARCHITECTURES[name]), seed)


def made_from(config: Any, seed: int = 0) -> Any:
    from llmva.models.load import auto_class

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def taught(name: str) -> Any:
    """The tiny organism of a row."""
    steps, rate = ARCHITECTURES[name].lesson
    return train(tiny(name), steps=steps, rate=rate)


def train(model: Any, seed: int = 0, steps: int = 70, rate: float = 5e-3) -> Any:
    """Teach `model` conftest's requests as `taught_model` does: answers hang on the noun, what is right on the verb.

    Some architectures (OPT, GPT-2 and others) train with dropout, which draws from torch's global generator. Left alone
    its state would be whatever ran before in the process, and so would the model: hence a state of its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return teach(model, requests_as_rows(tiny_tokenizer()), seed=seed, steps=steps, rate=rate, clip=1.0)
