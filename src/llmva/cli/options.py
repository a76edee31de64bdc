"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmva.errors import UsageError

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="hub id, local folder, or .gguf file")]
Toxic = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
    typer.Option("--toxic", metavar="PATH_OR_ID[:COLUMN[:SPLIT]]", help="prompts to refuse; repeatable"),
]
Benign = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--benign", metavar="PATH_OR_ID[:COLUMN[:SPLIT]]", help="prompts to answer; repeatable"),
]
Data = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--data", metavar="NAME[=PATH],...", help="data sets that llmva data list shows; repeatable"),
]
PerSet = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--per-set", min=1, help="most prompts of each side of a set of --data, drawn by the seed"),
]
KeepDuplicates = Annotated[
    bool, typer.Option("--keep-duplicates", help="with --data, also measure on prompts that the fit has seen")
]
Markdown = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--markdown", metavar="FILE", help="with --data, also write the table to a file in Markdown"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on stdout")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no table")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="seed of every random draw")]
EditDir = Annotated[Optional[Path], typer.Option("--edit", metavar="DIR", help="folder that llmva align wrote")]  # noqa: UP045
Iteration = Annotated[Optional[int], typer.Option("--iteration", help="use this iteration of the edit")]  # noqa: UP045
Strength = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--strength", help="0 is the original model, 1 the edit as fitted [default: as the run chose]"),
]
Point = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--point", metavar="K", help="a point that llmva front shows, in place of the one that was chosen"),
]
ThinkingMode = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--thinking", help="off, or end: let the model think first and read it where its thoughts end"),
]
ThinkingTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--thinking-tokens", min=1, help="most tokens of thoughts"),
]
JudgeName = Annotated[str, typer.Option("--judge", help="who decides whether an answer refuses")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16, float32")]
DeviceMap = Annotated[Optional[str], typer.Option("--device-map", help="spread the model over devices: auto")]  # noqa: UP045
Quantize = Annotated[str, typer.Option("--quantize", help="none, or 4bit or 8bit to pack the weights by bitsandbytes")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that the model brings along")]
BatchTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--batch-tokens", min=1, help="tokens in a batch; chosen by memory unless given"),
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run, or an edit.safetensors")]
Base = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--base", metavar="MODEL", help="where the base model lies, if not where the run found it"),
]
Rank = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--rank", help="one rank for all of an adapter: padded, or cut with the error told"),
]
Utility = Annotated[bool, typer.Option("--utility", help="run benchmarks too; needs llmva[eval]")]
Tasks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tasks", metavar="NAMES", help="benchmarks, with commas between [default: the paper's, and mmlu]"),
]
UtilityLimit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--utility-limit", min=1, help="documents of a benchmark [default: 256, gsm8k 500]"),
]
UtilityChat = Annotated[bool, typer.Option("--utility-chat", help="benchmarks in the model's chat template")]
IncludePath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--include-path", metavar="DIR", help="folder of task files of your own for --tasks"),
]


def utility_options(
    utility: bool, tasks: str | None, limit: int | None, chat: bool, include_path: Path | None
) -> dict[str, Any] | None:
    """What `run_evaluate` takes for benchmarks; None without them. Raises UsageError where --utility is missing."""
    given = {"--tasks": tasks, "--utility-limit": limit, "--utility-chat": chat, "--include-path": include_path}
    first = next((name for name, value in given.items() if value), None)
    if not utility and first:
        raise UsageError(f"{first} is about benchmarks: add --utility.")
    names = None if tasks is None else tasks.split(",")
    return {"names": names, "limit": limit, "chat": chat, "include_path": include_path} if utility else None


def loading_options(device: str, dtype: str, device_map: str | None, quantize: str, trust: bool) -> dict[str, Any]:
    """What `load_model` takes beside the name."""
    given: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map, "quantize": quantize}
    return {**given, "trust_remote_code": trust}
