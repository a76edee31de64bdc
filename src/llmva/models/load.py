"""Load a chat model and its tokenizer from the hub, a folder or a .gguf file, and check that they are usable."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmva.errors import LlmvaError, UsageError
from llmva.models.chat import ChatTemplate, pad_token
from llmva.models.chat.failures import first_line, panicked
from llmva.models.chat.places import find_in_files
from llmva.models.files import unpacked
from llmva.models.files.untold import dropped, untied
from llmva.models.files.weights import find_weights, model_inside, refuse_adapter, refuse_dangling

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANTIZED = ("4bit", "8bit")
# far beyond any model: with more, transformers makes modules for hours before it compares them with the weights
MAX_SIZES = {"num_hidden_layers": 10_000, "hidden_size": 10**6, "vocab_size": 10**8, "num_attention_heads": 10**5}


def pick_device(name: str = "auto") -> torch.device:
    """The device of a run: `name`, or for "auto" CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            if device.type == "meta":
                raise RuntimeError("it holds no numbers")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device '{name}' cannot be used here ({first_line(error)}): leave --device out."
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype if the device computes in it at full speed, otherwise float32."""
    if device.type == "cpu" and stored != torch.float32:
        # bfloat16 products are about three times faster than float32 on CPUs that have them, and much slower on others
        native = torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False
        return torch.bfloat16 if stored == torch.bfloat16 and native else torch.float32
    return stored


def load_model(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantize: str = "none",
    trust_remote_code: bool = False,
    revision: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in evaluation mode, in one copy.

    Args:
        name: a hub id, a local folder, or a .gguf file. Its weights are unpacked to `dtype`, once: see
            `llmva.models.files.unpacked`.
        device_map: spread the model over devices, as accelerate does; modules may also be mapped to "disk".
        quantize: "4bit" or "8bit" packs the linear layers with bitsandbytes. A checkpoint that is stored packed is
            loaded as it is with "none".
        note: told of what takes long.

    Raises UsageError if there is no such model and LlmvaError if its weights are unusable.
    """
    source, extra = locate(str(name))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **extra}
    if revision is not None:
        options["revision"] = revision
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is unknown: use auto, {', '.join(DTYPES)}.")
    if quantize not in ("none", *QUANTIZED):
        raise UsageError(f"quantize '{quantize}' is unknown: use none, {', '.join(QUANTIZED)}.")
    where = pick_device(device)
    if extra and quantize == "none":
        wanted = DTYPES.get(dtype) or pick_dtype(torch.float32, where)
        return _load_unpacked(Path(name).expanduser(), wanted, where, device_map, note)
    return _load(name, source, options, where, dtype, device_map, quantize, bool(extra))


def _load_unpacked(
    file: Path,
    dtype: torch.dtype,
    where: torch.device,
    device_map: str | dict[str, Any] | None,
    note: Callable[[str], None],
) -> tuple[Any, Any]:
    """A .gguf file from the cache of unpacked ones, or unpacked now."""
    kind = str(dtype).removeprefix("torch.")
    entry = unpacked.entry_of(file, kind)
    if unpacked.is_whole(entry):
        try:
            model, tokenizer = load_model(entry, device=str(where), device_map=device_map, dtype=kind)
        except LlmvaError:  # somebody has changed it
            shutil.rmtree(entry, ignore_errors=True)
        else:
            model.config._name_or_path, tokenizer.name_or_path = str(file), str(file.parent)
            return model, tokenizer
    note(f"unpacking {file.name} to {kind}, once: llmva cache shows what is kept")
    with unpacked.parsed_once():
        options = {"trust_remote_code": False, "gguf_file": file.name}
        model, tokenizer = _load(str(file), str(file.parent), options, where, kind, device_map, "none", True)
    if device_map is None:
        unpacked.keep(entry, file, kind, model, tokenizer)
    return model, tokenizer


def _load(
    name: str | Path,
    source: str,
    options: dict[str, Any],
    where: torch.device,
    dtype: str,
    device_map: str | dict[str, Any] | None,
    quantize: str,
    extra: bool,
) -> tuple[Any, Any]:
    placement: dict[str, Any] = {} if device_map is None else {"device_map": _check_map(device_map)}
    config = read_config(str(name), source, options)
    stored = torch.float32 if extra else (getattr(config, "dtype", None) or torch.float32)
    wanted = DTYPES[dtype] if dtype != "auto" else pick_dtype(stored, where)
    packed = getattr(config, "quantization_config", None) is not None or quantize != "none"
    if quantize != "none":
        _check_quantize(config, str(name), extra)
        placement["quantization_config"] = _bits(quantize, wanted)
    if packed:
        placement.setdefault("device_map", {"": where})  # packed weights are created on their device and stay there
    tokenizer = read_tokenizer(str(name), source, options)
    with _explained(str(name), "model"):
        if not extra:
            if Path(source).is_dir():
                find_weights(Path(source))  # refuses what no export could write
            options["use_safetensors"] = True  # a pickle of someone else's is not opened
            os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # nor one asked for that export cannot find
        loaded: Any = auto_class(config).from_pretrained(
            source, dtype=wanted, output_loading_info=True, **placement, **options
        )
        model, report = loaded
        if getattr(model, "_hf_peft_config_loaded", False):
            raise UsageError(
                f"'{name}' comes with an adapter, which no export would contain: merge it into the weights first "
                "(PEFT's merge_and_unload, then save_pretrained), and give that folder."
            )
        if "device_map" not in placement and where.type != "cpu":
            model.to(where)
    missing = sorted(report["missing_keys"])  # transformers fills them with random numbers and continues
    if missing:
        rest = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise LlmvaError(f"'{name}' lacks the weights {missing[0]}{rest}: download or convert the model whole.")
    model._llmva_limits = [*dropped(report, str(name)), *untied(model, str(name))]
    if extra:  # transformers still considers an unpacked .gguf quantised, and refuses to save it
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        model.config._name_or_path = str(Path(name).expanduser())  # transformers names the folder around it
    _check_ends(model, str(name))
    model.eval()
    model.requires_grad_(False)
    padding = pad_token(model, tokenizer)
    if tokenizer.pad_token_id != padding:  # it has none, or one that the model has no embedding of
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    check_weights(model, str(name))
    return model, tokenizer


def read_config(name: str, source: str, options: Mapping[str, Any]) -> Any:
    """The config of the model `name` at `source`, as transformers reads it. Raises LlmvaError for an unusable one."""
    from transformers import AutoConfig

    with _explained(name, "configuration"):
        config = AutoConfig.from_pretrained(source, **options)
        for part in (config, config.get_text_config()):
            for key, most in MAX_SIZES.items():
                value = getattr(part, key, None)
                if isinstance(value, int) and not 1 <= value <= most:
                    raise LlmvaError(
                        f"The config.json of '{name}' says {key} {value}, which no model has: download the model again."
                    )
        return config


def read_tokenizer(name: str, source: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer of the model `name` at `source`, with a chat template that can be rendered, if it has one."""
    from transformers import AutoTokenizer

    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        _take_template(tokenizer, source, {key: options[key] for key in ("revision",) if key in options})
        tokenizer.decode(ChatTemplate.loaded(tokenizer).row("hello"))
        return tokenizer


def loading_limits(model: Any) -> list[str]:
    """Sentences on what `load_model` left out of a model, for the limits of its figures."""
    return list(getattr(model, "_llmva_limits", ()))


def _check_ends(model: Any, name: str) -> None:
    """Refuse a generation config whose end tokens are no tokens; to have none is fine."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if type(end) is not int or not 0 <= end < 2**31:
            raise LlmvaError(
                f"The generation_config.json of '{name}' names the end token {end!r}, which is none: download it again."
            )


def _check_quantize(config: Any, name: str, gguf: bool) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"'{name}' is stored quantised already: leave --quantize out.")
    if gguf:
        raise UsageError(f"'{name}' is a .gguf file, which is unpacked as it is: leave --quantize out.")
    if find_spec("bitsandbytes") is None:
        raise UsageError("Quantising needs bitsandbytes, which is not installed: pip install bitsandbytes.")


def _bits(quantize: str, compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if quantize == "8bit":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def auto_class(config: Any) -> Any:
    """The transformers class for this config: of a text generator, or of a multimodal model with one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (
        AutoModelForImageTextToText
        if whole and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def _take_template(tokenizer: Any, source: str, where: Mapping[str, Any]) -> None:
    """Give a tokenizer without chat template that of the model's processor, and try it.

    Raises LlmvaError for one that cannot be rendered; to have none is fine, and is told where the model is used.
    """
    if not getattr(tokenizer, "chat_template", None):
        file, text = next(find_in_files(source, **where), (None, None))
        if file is not None:
            tokenizer.chat_template = text
    ChatTemplate.loaded(tokenizer)


def check_weights(model: Any, name: str) -> None:
    """Refuse non-finite weights, which would make every result meaningless. Reads each tensor once.

    Packed weights are not read, because their bits are not numbers of their dtype, nor are offloaded weights.
    """
    for key, weight in model.named_parameters():
        if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
            continue
        if weight.numel() == 0 or weight.device.type == "meta":
            continue
        plain = weight.float() if weight.element_size() == 1 else weight  # torch cannot compare float8
        low, high = torch.aminmax(plain)  # NaN propagates, and the tensor is not copied
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise LlmvaError(f"'{name}' holds NaN or infinite weights in {key}: download or convert the model again.")


def locate(name: str) -> tuple[str, dict[str, Any]]:
    if not name.strip():
        raise UsageError("The model's name is empty: give a model's folder, hub id or .gguf file.")
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"There is no file '{name}': check the path of the .gguf model.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        refuse_dangling(path)
        refuse_adapter(path)
        config = path / "config.json"
        if not config.is_file():
            inside = model_inside(path)
            hint = "give the folder of a Hugging Face model" if inside is None else f"give '{inside}'"
            raise UsageError(f"'{name}' holds no config.json: {hint}.")
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"'{name}/config.json' cannot be read as JSON: download the model again.") from error
        if not isinstance(fields, dict):
            raise UsageError(f"'{name}/config.json' is no JSON object: download the model again.")
        return str(path), {}
    if path.is_file():
        raise UsageError(f"'{name}' is a file that is no .gguf: give a model's folder, hub id or .gguf file.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"There is no folder '{name}': check the path of the model.")
    return name, {}


def _check_map(device_map: str | dict[str, Any]) -> str | dict[str, Any]:
    """Check a device map; a string names a strategy or one device."""
    known = ("auto", "balanced", "balanced_low_0", "sequential")
    if isinstance(device_map, str) and device_map not in known:
        try:
            pick_device(device_map)
        except UsageError as error:
            raise UsageError(
                f"'{device_map}' is no device map and no device: use --device-map {', '.join(known)}, or leave it out."
            ) from error
    return device_map


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Turn any error of transformers while it reads `part` into one sentence.

    transformers raises many classes for a missing folder, a missing file or an unreadable file.
    """
    try:
        yield
    except LlmvaError:
        raise
    except torch.OutOfMemoryError as error:
        raise LlmvaError(f"'{name}' does not fit into memory: use a smaller model or --device-map auto.") from error
    except BaseException as error:
        if not isinstance(error, Exception) and not panicked(error):
            raise
        raise _explain(name, part, error) from error


def own_code(name: str) -> UsageError:
    """The error of a model whose code nobody has said to trust."""
    return UsageError(f"'{name}' brings code of its own: read it, then pass --trust-remote-code if you trust it.")


def _explain(name: str, part: str, error: BaseException) -> LlmvaError:
    text = str(error)
    local = Path(name).expanduser().exists()
    if "trust_remote_code" in text:
        return own_code(name)
    if not local and part == "model" and "safetensors" in text:
        return UsageError(
            f"'{name}' has no weights in safetensors on the hub: convert it with AutoModelForCausalLM.from_pretrained "
            "and save_pretrained in transformers if you trust its pickles, and give the new folder."
        )
    if not local and isinstance(error, OSError):
        return UsageError(
            f"'{name}' is neither a local folder nor a model that the hub gives: check its name and the network."
        )
    if re.search(r"flash.?attention|flash_attn", text, re.I):
        return UsageError(
            f"The config.json of '{name}' asks for an attention whose package is not here ({first_line(error)[:80]}): "
            "remove attn_implementation and _attn_implementation from it, and transformers takes its own."
        )
    if isinstance(error, ImportError):
        return UsageError(f"'{name}' needs a package that is missing ({first_line(error)}): install it with pip.")
    if "Unrecognized model" in text:
        return UsageError(f"The config.json of '{name}' names no model_type: download the model again.")
    if unknown := re.search(r"model type `?([\w.-]+)`? but", text):
        return UsageError(
            f"This transformers does not know the model type {unknown[1]} of '{name}': update transformers, or choose "
            "another model."
        )
    if "Unrecognized configuration class" in text:
        return UsageError(f"'{name}' is of a model type that is no decoder: choose a chat model that generates text.")
    if "no file named" in text:
        return UsageError(f"'{name}' holds no weights in safetensors: download the model whole or convert it.")
    if "ignore_mismatched_sizes" in text:
        return LlmvaError(f"The weights of '{name}' have other sizes than its config.json says: download it again.")
    return LlmvaError(
        f"The {part} of '{name}' cannot be loaded ({type(error).__name__}: {first_line(error)}): "
        "download or convert the model again."
    )
