"""Every decoder architecture the tests cover, as a tiny config; and a tiny organism trained in any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from conftest import taught_requests, tiny_tokenizer

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
    "gemma3_text": Row("Gemma3TextConfig", post_norm=True),
    "phi": Row("PhiConfig", {}, ("self_attn.dense", "mlp.fc2")),
    "gpt2": Row("GPT2Config", {}, ("attn.c_proj", "mlp.c_proj")),
    "opt": Row("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 48}, ("self_attn.out_proj", "fc2")),
    "gpt_neox": Row("GPTNeoXConfig", {}, ("attention.dense", "mlp.dense_4h_to_h")),
    "olmo2": Row("Olmo2Config", post_norm=True),
    "granite": Row("GraniteConfig", {"residual_multiplier": 0.3}),
    "cohere2": Row("Cohere2Config"),
    "mixtral": Row("MixtralConfig", {"num_local_experts": 4}, SPARSE),
    "qwen3_moe": Row("Qwen3MoeConfig", MOE, SPARSE),
    "gpt_oss": Row("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, SPARSE),
    "deepseek_v3": Row("DeepseekV3Config", DEEPSEEK, SPARSE, own={0: GATED}),
    "qwen3_next": Row(
        "Qwen3NextConfig",
        {**MOE, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
        SPARSE,
        own={0: LINEAR, 1: LINEAR, 2: LINEAR},
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
    return tiny_of(ARCHITECTURES[name], seed)


def tiny_of(row: Row, seed: int = 0) -> Any:
    from llmva.models.load import auto_class

    config = tiny_config(row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def train(model: Any, seed: int = 0, steps: int = 70, rate: float = 5e-3) -> Any:
    """Teach `model` conftest's requests as `taught_model` does: answers hang on the noun, what is right on the verb."""
    from llmva.models.chat import render

    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    rows = [(ids(render(tokenizer, text)), [*ids(answer), 2]) for text, _, answer in taught_requests()]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.zeros(32, width, dtype=torch.long), torch.full((32, width), -100)
        for row, i in enumerate(torch.randint(len(rows), (32,), generator=generator).tolist()):
            prompt, answer = rows[i]
            x[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            y[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        optimiser.zero_grad()
        model(input_ids=x, attention_mask=(x != 0).long(), labels=y).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval().requires_grad_(False)
