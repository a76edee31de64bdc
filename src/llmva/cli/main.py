"""`llmva align | demo | evaluate | chat | inspect`; the other commands have modules of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmva.cli import data as data_command
from llmva.cli import extend as extend_command
from llmva.cli import shipping, studies
from llmva.cli.arguments import check_text
from llmva.cli.options import (
    BatchTokens,
    Benign,
    Data,
    Device,
    DeviceMap,
    Dtype,
    EditDir,
    IncludePath,
    Iteration,
    Json,
    JudgeName,
    KeepDuplicates,
    Markdown,
    ModelArg,
    PerSet,
    Point,
    Quantize,
    QuietFlag,
    Seed,
    Strength,
    Tasks,
    ThinkingMode,
    ThinkingTokens,
    Toxic,
    Trust,
    Utility,
    UtilityChat,
    UtilityLimit,
    loading_options,
    utility_options,
)
from llmva.errors import LlmvaError, UsageError

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a chat model answer what is benign and refuse what is harmful, by editing its weights in closed form.",
    epilog="Start with: llmva demo",
)


@app.command()
def align(
    model: ModelArg,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="folder of the run [default: llmva-MODEL]")
    ] = None,
    toxic: Toxic = None,
    benign: Benign = None,
    data: Data = None,
    per_set: PerSet = None,
    skills: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--skills", metavar="FILE", help="JSONL of probes with known answers, measured before and after"),
    ] = None,
    judge: JudgeName = "phrases",
    iterations: Annotated[int, typer.Option("--iterations", help="most iterations")] = 30,
    layers: Annotated[Optional[int], typer.Option("--layers", help="most sublayers edited at once")] = None,  # noqa: UP045
    step: Annotated[float, typer.Option("--step", help="share of the way that one iteration goes")] = 1.0,
    passes: Annotated[int, typer.Option("--passes", help="most alignments from one round of answers")] = 8,
    svm: Annotated[str, typer.Option("--svm", help="exact, or sklearn as in the paper")] = "exact",
    harmless_weight: Annotated[
        float,
        typer.Option(
            "--harmless-weight", "--quiet-readers", help="weight of harmless text in the fit; 0 is the paper's"
        ),
    ] = 1.0,
    per_source: Annotated[int, typer.Option("--per-source", help="training prompts drawn from each data set")] = 128,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="most tokens of an answer")] = 128,
    thinking: ThinkingMode = "off",
    thinking_tokens: ThinkingTokens = 512,
    patience: Annotated[int, typer.Option("--patience", help="iterations without gain before stopping; 0: never")] = 3,
    prefer: Annotated[str, typer.Option("--prefer", help="safety, balance or usefulness")] = "balance",
    max_asr: Annotated[Optional[float], typer.Option("--max-asr", help="most harmful prompts answered")] = None,  # noqa: UP045
    max_orr: Annotated[Optional[float], typer.Option("--max-orr", help="most benign prompts refused")] = None,  # noqa: UP045
    min_kept: Annotated[
        float,
        typer.Option("--min-kept", "--min-utility", help="least share of harmless next tokens that the edit must keep"),
    ] = 0.98,
    max_kl: Annotated[float, typer.Option("--max-kl", help="most divergence on harmless text, in nats")] = 0.05,
    restart: Annotated[bool, typer.Option("--restart", help="discard an earlier run in DIR")] = False,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    batch_tokens: BatchTokens = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Align MODEL and write the edit, its figures and a report to DIR.

    Needs no options. Killed, it goes on where it was when the same command is run again.
    """
    from llmva.cli.commands import run_align

    run_align(
        model,
        out=out,
        toxic=toxic or [],
        benign=benign or [],
        data=data or [],
        per_set=per_set,
        skills=skills,
        settings={
            "iterations": iterations,
            "layers": layers,
            "step": step,
            "passes": passes,
            "svm": svm,
            "harmless_weight": harmless_weight,
            "per_source": per_source,
            "max_new_tokens": max_new_tokens,
            "thinking": thinking,
            "thinking_tokens": thinking_tokens,
            "patience": patience,
            "prefer": prefer,
            "max_asr": max_asr,
            "max_orr": max_orr,
            "min_kept": min_kept,
            "max_kl": max_kl,
        },
        judge=judge,
        seed=seed,
        restart=restart,
        loading=loading_options(device, dtype, device_map, quantize, trust_remote_code),
        batch_tokens=batch_tokens,
        json=json_,
        quiet=quiet,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the run")] = Path("llmva-demo"),
    restart: Annotated[bool, typer.Option("--restart", help="discard an earlier run in DIR")] = False,
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Align the small model that ships with llmva: no downloads, no options, about a minute."""
    from llmva.cli.commands import run_align
    from llmva.cli.inputs import DEMO_NAME, demo_model

    run_align(str(demo_model()), name=DEMO_NAME, out=out, seed=seed, restart=restart, json=json_, quiet=quiet)


@app.command()
def evaluate(
    model: ModelArg,
    edit: EditDir = None,
    toxic: Toxic = None,
    benign: Benign = None,
    data: Data = None,
    per_set: PerSet = None,
    keep_duplicates: KeepDuplicates = False,
    markdown: Markdown = None,
    iteration: Iteration = None,
    strength: Strength = None,
    point: Point = None,
    judge: JudgeName = "phrases",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="most tokens of an answer")] = 128,
    thinking: ThinkingMode = None,
    thinking_tokens: ThinkingTokens = None,
    utility: Utility = False,
    tasks: Tasks = None,
    utility_limit: UtilityLimit = None,
    utility_chat: UtilityChat = False,
    include_path: IncludePath = None,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    batch_tokens: BatchTokens = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """ASR, ORR and F1 of MODEL on test prompts, with and without an edit.

    With --toxic and --benign on exactly those prompts; with --data on test prompts of public data sets, one by one;
    else on the test prompts of the edit's run. The model thinks first if --thinking says so, else if it did so in the
    edit's run. With --utility also what is left of benchmark scores.
    """
    from llmva.cli.commands import run_evaluate

    run_evaluate(
        model,
        edit=edit,
        toxic=toxic or [],
        benign=benign or [],
        data=data or [],
        sets={"per_set": per_set, "keep_duplicates": keep_duplicates, "markdown": markdown},
        iteration=iteration,
        strength=strength,
        point=point,
        judge=judge,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        thinking_tokens=thinking_tokens,
        seed=seed,
        loading=loading_options(device, dtype, device_map, quantize, trust_remote_code),
        batch_tokens=batch_tokens,
        utility=utility_options(utility, tasks, utility_limit, utility_chat, include_path),
        json=json_,
        quiet=quiet,
    )


@app.command()
def chat(
    model: ModelArg,
    edit: EditDir = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="show the original's answer beside the edited one's")
    ] = False,
    prompt: Annotated[Optional[str], typer.Option("--prompt", "-p", help="ask this one thing and end")] = None,  # noqa: UP045
    iteration: Iteration = None,
    strength: Strength = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="most tokens of an answer")] = 256,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Talk to MODEL, with or without an edit; end with Ctrl-D or an empty line. Answers are greedy."""
    from llmva.cli.talk import run_chat

    run_chat(
        model,
        edit=edit,
        compare=compare,
        prompt=prompt,
        iteration=iteration,
        strength=strength,
        max_new_tokens=max_new_tokens,
        loading=loading_options(device, dtype, device_map, quantize, trust_remote_code),
        json=json_,
        quiet=quiet,
    )


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run, or an edit.safetensors")],
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """What a run or an edit holds: base model, sublayers, iterations, figures."""
    from llmva.cli.commands import run_inspect

    run_inspect(directory, json=json_, quiet=quiet)


extend_command.add_to(app)
shipping.add_to(app)
studies.add_to(app)
data_command.add_to(app)


def _version(value: bool) -> None:
    if value:
        from llmva import __version__

        typer.echo(f"llmva {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every foreseen failure is one sentence on stderr and exit code 2 (usage) or 1 (run)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty() or {"--quiet", "-q"} & set(arguments):
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of downloads and of unpacking; read when tqdm is imported
    try:
        for argument in arguments:
            check_text(argument)
        code: Any = app(args=arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LlmvaError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("Interrupted: run the same command again to go on.", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage: their class has moved between its versions
            raise
        _fail(f"{error.format_message().rstrip('.')}: see llmva --help.", UsageError.exit_code)


def _fail(sentence: str, code: int) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)
