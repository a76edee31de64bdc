"""Small models made on the spot: random weights, a word-level tokenizer, any decoder architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = (
    "sure here is how to do it sorry i can not help with that no will please tell me explain the a an and of for "
    "make break open close paint build clean fix fence door table lamp garden kettle poem song trap lock fire tool "
    "user assistant : ? ."
).split()


def tiny_tokenizer(template: bool = True) -> Any:
    """Lower-case words; unknown ones are <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant :{% endif %}"
        )
    return tokenizer


def tiny_model(config_class: str = "LlamaConfig", seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; `changes` go to the config."""
    import transformers

    config: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
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
    made = getattr(transformers, config_class)(**{**config, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(made)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as an ordinary Hugging Face folder; do not write into it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and runs stay equal wherever they run."""
    torch.set_num_threads(1)
