"""What a model's folder holds beside its weights: config.json, tokenizer.json, chat templates, and the shards' index.

Each is read as `load_model` and `Checkpoint` read it; only the weights are not loaded, which would take too long.
"""

from __future__ import annotations

import json
import random
import string
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fuzzing.common import Kind, change, clean, cut_or_extend, flip, json_file
from llmva.errors import LlmvaError
from llmva.models.chat import ChatTemplate, encode, render
from llmva.models.checkpoint import Checkpoint
from llmva.models.load import auto_class, locate, read_config, read_tokenizer

# -- config.json -----------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PACKED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "rope_parameters": ROPE},
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES, "layer_types": ["full_attention"] * 2},
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **SIZES},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **SIZES},
        "vision_config": {"hidden_size": 8},
    },
    {"model_type": "llama", **SIZES, "quantization_config": PACKED},
    {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}, **SIZES},
)
TYPES = (
    "llama",
    "qwen3",
    "gemma3_text",
    "gpt_oss",
    "mamba",
    "bert",
    "t5",
    "whisper",
    "clip",
    "llava",
    "deepseek_v3",
    "",
)


def spoil_config(folder: Path, rng: random.Random) -> None:
    config = dict(rng.choice(CONFIGS))
    if rng.random() < 0.1:
        config["model_type"] = rng.choice(TYPES)
    (folder / "config.json").write_bytes(json_file(change(config, rng, ("llama", PACKED, ROPE, SIZES)), rng))


def check_config(folder: Path) -> str:
    try:
        source, options = locate(str(folder))
        auto_class(read_config("broken", source, {**options, "trust_remote_code": False}))
    except LlmvaError as error:
        return clean(error)
    return "read"


# -- tokenizer.json, tokenizer_config.json ---------------------------------------------------------------------------

TEXT = "Tell me how to bake 3 loaves, <eos> please — schön!"
PARTS: tuple[Any, ...] = (
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
    {"type": "BertProcessing", "sep": ["<eos>", 2**40], "cls": ["<bos>", -1]},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁▁", "prepend_scheme": "never", "split": True},
    {"type": "Fuse"}, {"type": "Strip", "content": "xx", "start": 2**40, "stop": 1}, {"type": "NFKC"},
    {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5},
    {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    {"id": 2**31, "content": "", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True,
     "special": True},
)  # fmt: skip


@cache
def tokenizers() -> tuple[dict[str, Any], ...]:
    """tokenizer.json of the three kinds that chat models have, and one of whole words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = [*special, *string.ascii_letters, *string.digits, *"ĠĊ,.!?<>—"]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate([*letters, "th", "Ġth"])}, [("t", "h"), ("Ġ", "th")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = Tokenizer(models.Unigram([(t, -float(i)) for i, t in enumerate([*letters, "▁", "▁how"])], 3, False))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *TEXT.lower().split()])}, "<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    for one in (bpe, pieces, words):
        one.add_special_tokens(special)
    return tuple(json.loads(one.to_str()) for one in (bpe, pieces, words))


TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<eos>", "lstrip": False, "normalized": False, "special": True},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "model_max_length": 64,
    "padding_side": "left",
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {"2": {"content": "<eos>", "special": True}},
    "extra_special_tokens": {"image_token": "<image>"},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
CLASSES = ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer", "T5Tokenizer", "Nothing", "../x", "")


def spoil_tokenizer(folder: Path, rng: random.Random) -> None:
    tokenizer, config = rng.choice(tokenizers()), dict(TOKENIZER_CONFIG)
    if rng.random() < 0.1:
        config["tokenizer_class"] = rng.choice(CLASSES)
    which = rng.random()
    if which < 0.7:
        tokenizer = change(tokenizer, rng, PARTS)
    if which > 0.6:
        config = change(config, rng, PARTS)
    (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
    (folder / "tokenizer.json").write_bytes(json_file(tokenizer, rng))
    (folder / "tokenizer_config.json").write_bytes(json_file(config, rng))


def check_tokenizer(folder: Path) -> str:
    try:
        tokenizer = read_tokenizer("broken", str(folder), {})
        row = encode(tokenizer, render(tokenizer, TEXT))
        tokenizer.decode(row)
    except LlmvaError as error:
        return clean(error)
    return "read" if row else "read, but it makes no tokens of text"


# -- chat templates --------------------------------------------------------------------------------------------------
# A template is a program, so one can be written that fills the memory or never ends. Those are not among the fragments.

TEMPLATES = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% set role = 'model' if message['role'] == 'assistant' "
    "else message['role'] %}{{ '<turn>' + role + '\n' + message['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "{%- macro show(m) -%}{%- for part in m.content -%}{{ part if part is string else part.text }}{%- endfor -%}"
    "{%- endmacro -%}{%- set ns = namespace(last=0) -%}{%- for m in messages[::-1] -%}{%- set ns.last = loop.index -%}"
    "{%- endfor -%}{%- for m in messages -%}[{{ m.role|upper }}] {{ show(m) }} [/{{ ns.last }}]{%- endfor -%}"
    "{{ strftime_now('%Y') }}{{ tools | tojson(indent=2) if tools }}",
)
FRAGMENTS = (
    "{{", "}}", "{%", "%}", "{#", "{% endif %}", "{% endfor %}", "{% for m in messages %}", "{% if x.y.z %}",
    "{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ messages[0].content * 100000 }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% extends x %}", "{% break %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.pop() }}", "{{ messages | tojson(indent=-1) }}",
    "{{ '%s' % () }}", "{{ none.x }}", "{{ range(-1) | list }}", "{{ '{:>1000}'.format(1) }}",
    "{{ strftime_now(messages) }}", "{{ undefined_function() }}", "\x00", "\ud800", "\u2028", "{{ 2**100000 }}",
    "{% generation %}", "{{ messages[0]['content'].split('')[0] }}", "{{ 'é' | int }}", "{% set messages = 3 %}",
)  # fmt: skip


def spoil_template(folder: Path, rng: random.Random) -> None:
    text = rng.choice(TEMPLATES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.random(), rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randrange(1, 20))
        if kind < 0.3:
            text = text[:at] + rng.choice(FRAGMENTS) + text[at:]
        elif kind < 0.5:
            text = text[:at] + text[end:]
        elif kind < 0.65:
            text = text[:at] + text[at:end] * 2 + text[end:]
        elif kind < 0.8:
            text = text[:at] + rng.choice("{}%#'\"[](). \n|~*-+,:") + text[at + 1 :]
        elif kind < 0.9:
            other = rng.choice(TEMPLATES)
            text = text[:at] + other[rng.randrange(len(other)) :]
        else:
            text = text[:at]
    (folder / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))


def check_template_file(folder: Path) -> str:
    """The tokenizer is whole, and read once; the template is set as reading the file would."""
    tokenizer = _whole_tokenizer()
    tokenizer.chat_template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "surrogatepass")
    try:
        ChatTemplate.of(tokenizer)
        encode(tokenizer, render(tokenizer, TEXT))
    except LlmvaError as error:
        return clean(error)
    return "rendered"


@cache
def _whole_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(json.dumps(tokenizers()[0]))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


# -- model.safetensors.index.json, and the headers of shards ---------------------------------------------------------


@cache
def shards() -> dict[str, bytes]:
    first = {"model.embed_tokens.weight": torch.ones(5, 4), "model.layers.0.mlp.down_proj.weight": torch.ones(4, 6)}
    second = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16), "lm_head.weight": torch.ones(5, 4)}
    return {"model-00001-of-00002.safetensors": save(first), "model-00002-of-00002.safetensors": save(second)}


def index() -> dict[str, Any]:
    places = {name: file for file, data in shards().items() for name in _header(data)}
    return {"metadata": {"total_size": 248}, "weight_map": places}


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header


STRANGERS = (*(f"model-0000{i}-of-00002.safetensors" for i in (1, 2, 3)), "config.json", ".", "..", "../x.safetensors")


def spoil_checkpoint(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
    files, places = dict(shards()), index()
    if rng.random() < 0.6:
        places = change(places, rng, STRANGERS)
    else:
        name = rng.choice(list(files))
        files[name] = _spoil_shard(files[name], rng)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    data = json_file(places, rng) if rng.random() < 0.9 else json.dumps(places).encode("utf-8", "surrogatepass")
    (folder / "model.safetensors.index.json").write_bytes(data)


def _spoil_shard(data: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return flip(data, rng)
    if kind < 0.4:
        return cut_or_extend(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(_header(data), rng)).encode("utf-8", "surrogatepass")
    length = len(header) if kind < 0.9 else rng.choice((0, 2**20, 2**40, 2**63, len(header) - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def check_checkpoint(folder: Path) -> str:
    try:
        checkpoint = Checkpoint.open(folder)
        for name in checkpoint.names:
            checkpoint.tensor(name)
    except LlmvaError as error:
        return clean(error)
    return "read"


def kinds() -> list[Kind]:
    return [
        Kind("configs", spoil_config, check_config),
        Kind("tokenizers", spoil_tokenizer, check_tokenizer),
        Kind("templates", spoil_template, check_template_file),
        Kind("checkpoints", spoil_checkpoint, check_checkpoint),
    ]
