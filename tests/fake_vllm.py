"""A vLLM of our own for tests: the calls that we make of it, answered by transformers a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

AT_ONCE = 3  # tokens of a row that are shown together


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


@dataclass
class LoRARequest:
    name: str
    number: int
    path: str


@dataclass
class Asked:
    row: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    new: list[int] = field(default_factory=list)


class LLM:
    """`log` has what every instance was asked for, the last one last."""

    log: list[LLM] = []  # noqa: RUF012 (emptied by `fake_vllm`)
    deaf = False  # whether it takes no edit, as a version with a defect would

    def __init__(self, model: str, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.options, self.reloads, self.aborted, self.steps, self.ended = options, 0, 0, 0, False
        self.cached_by = self.weights = 0
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()
        self._asked = dict[str, Asked]()
        self.engine_core = SimpleNamespace(shutdown=self._shutdown)
        self.llm_engine = self
        self.loras = list[LoRARequest]()
        LLM.log.append(self)

    def add_request(self, name: str, prompt: Any, params: SamplingParams, lora_request: LoRARequest | None) -> None:
        assert params.temperature == 0.0
        assert params.ignore_eos
        assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.options["max_model_len"]
        if lora_request is not None:
            assert self.options["enable_lora"]
            known = {one.number: one.path for one in self.loras}
            assert known.get(lora_request.number, lora_request.path) == lora_request.path
            self.loras.append(lora_request)
        assert name not in self._asked
        self._asked[name] = Asked(list(prompt["prompt_token_ids"]), params, lora_request)

    @torch.inference_mode()
    def step(self) -> list[Any]:
        outputs = []
        self.steps += 1
        for name, asked in list(self._asked.items()):
            finished = False
            with self._adapted(asked.lora):
                for _ in range(AT_ONCE):
                    logits = self._model(input_ids=torch.tensor([asked.row + asked.new])).logits
                    asked.new.append(int(logits[0, -1].argmax()))
                    finished = asked.new[-1] in asked.params.stop_token_ids or len(asked.new) == asked.params.max_tokens
                    if finished:
                        del self._asked[name]
                        break
            part = SimpleNamespace(token_ids=tuple(asked.new))
            outputs.append(SimpleNamespace(request_id=name, outputs=[part], finished=finished))
        return outputs

    def abort_request(self, names: list[str]) -> None:
        self.aborted += len(names)
        for name in names:
            self._asked.pop(name, None)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        assert method == "reload_weights"
        changed = load_file(Path(kwargs["weights_path"]) / "model.safetensors")
        self.reloads, self.weights = self.reloads + 1, self.weights + 1
        if not LLM.deaf:
            missing = self._model.load_state_dict(changed, strict=False)
            assert not missing.unexpected_keys

    def reset_prefix_cache(self) -> None:
        self.cached_by = self.weights

    def _shutdown(self) -> None:
        self.ended = True

    @contextmanager
    def _adapted(self, lora: LoRARequest | None) -> Iterator[None]:
        """W + B A in place of W."""
        from safetensors.torch import load_file

        if lora is None or LLM.deaf:
            yield
            return
        parts = load_file(Path(lora.path) / "adapter_model.safetensors")
        before = {}
        for key, A in parts.items():
            if not key.endswith("lora_A.weight"):
                continue
            assert len(A) <= self.options["max_lora_rank"]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = self._model.get_submodule(module).weight
            before[module] = weight.data
            weight.data = weight.data + parts[key.replace("lora_A", "lora_B")] @ A
        yield
        for module, data in before.items():
            self._model.get_submodule(module).weight.data = data


def modules(device: str = "cpu") -> dict[str, ModuleType]:
    """What `import vllm` and its parts find."""
    LLM.log, LLM.deaf = [], False
    whole, lora, request, platforms = (
        ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.platforms")
    )
    whole.__spec__ = ModuleSpec("vllm", None)
    vars(whole).update(LLM=LLM, SamplingParams=SamplingParams)
    vars(request).update(LoRARequest=LoRARequest)
    vars(platforms).update(current_platform=SimpleNamespace(device_type=device))
    return {module.__name__: module for module in (whole, lora, request, platforms)}
