"""Arguments and options that several commands share, and how a command takes a group of them as one value."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer

from llmva.errors import UsageError
from llmva.settings import SEEDS, Settings

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or .gguf file.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or an edit.safetensors file.")]
Skills = Annotated[
    Path | None,
    typer.Option("--skills", metavar="FILE", help="Also measure the probes with known answers in this JSONL file."),
]
JudgeName = Annotated[str, typer.Option("--judge", help="Label the answers with this judge.")]
EditDir = Annotated[
    Path | None, typer.Option("--edit", metavar="DIR", help="Apply the edit in this folder, which llmva align wrote.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Find the base model here, not where the run found it."),
]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        help="Give every module this rank: smaller ones are padded, larger ones truncated and the error reported.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Write answers with transformers or vllm; vllm:merged and vllm:lora say how vLLM gets the edit.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard earlier results in the output folder.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=SEEDS - 1, help="Seed all random draws with this number.")]


# -- groups ------------------------------------------------------------------------------------------------------
# A command with a parameter of such a type has one option a field (`expand`).


@dataclass(frozen=True)
class Sides:
    """Prompts of both sides."""

    TITLE: ClassVar = "Prompts"

    toxic: Annotated[
        list[str],
        typer.Option("--toxic", metavar="PATH_OR_ID[:COLUMN[:SPLIT]]", help="Read prompts to refuse. Repeatable."),
    ] = field(default_factory=list)
    benign: Annotated[
        list[str],
        typer.Option(
            "--benign",
            metavar="PATH_OR_ID[:COLUMN[=GOLD][:SPLIT]]",
            help="Read prompts to answer; GOLD is a column of right answers. Repeatable.",
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class Sources(Sides):
    """Prompts of both sides and public data sets."""

    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="NAME[=PATH],...", help="Read public data sets that llmva data list shows. Repeatable."
        ),
    ] = field(default_factory=list)
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Read the sets of --data from copies in this folder."),
    ] = None
    per_set: Annotated[
        int | None,
        typer.Option(
            "--per-set",
            metavar="N",
            min=1,
            help="Use at most N prompts per side of each --data set, sampled with --seed.",
        ),
    ] = None
    only: Annotated[
        bool, typer.Option("--only", help="Leave the bundled prompts out, which teach v_b beside the named ones.")
    ] = False

    @property
    def places(self) -> list[str]:
        """Paths and hub ids, and the names of sets of --data that are not read from this disk."""
        terms = [term for value in self.data for term in value.split(",")]
        copies = "" if self.data_dir is None else str(self.data_dir)
        return [*self.toxic, *self.benign, *(term.partition("=")[2] or copies or term for term in terms)]


@dataclass(frozen=True)
class Choice:
    """What of an edit is used."""

    TITLE: ClassVar = "Choice of the edit"

    iteration: Annotated[int | None, typer.Option("--iteration", help="Use the edit as of this iteration.")] = None
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="Scale the edit: 0 is the original model, 1 the edit as fitted.",
            show_default="as the run chose",
        ),
    ] = None
    point: Annotated[
        int | None,
        typer.Option("--point", metavar="K", help="Use this point of llmva front instead of the chosen one."),
    ] = None


@dataclass(frozen=True)
class Batches:
    """How much goes through the model at once."""

    TITLE: ClassVar = "Memory"

    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            min=1,
            help="Process at most this many tokens per batch.",
            show_default="chosen by free memory",
        ),
    ] = None
    max_memory: Annotated[
        float | None,
        typer.Option(
            "--max-memory",
            metavar="GB",
            min=0.1,
            help="Choose batches so that this process takes no more memory, the model included.",
            show_default="a quarter more than the weights, and 1 GB",
        ),
    ] = None

    def of(self, model: Any) -> int | None:
        """Tokens in a batch of a loaded model; None leaves the choice. Raises UsageError if memory is too small."""
        if self.batch_tokens is not None or self.max_memory is None:
            return self.batch_tokens
        from llmva.models.batching import tokens_within

        return tokens_within(model, self.max_memory)


@dataclass(frozen=True)
class Loading:
    """What `load_model` takes beside the name."""

    TITLE: ClassVar = "Loading the model"

    device: Annotated[str, typer.Option("--device", help="Run on this device: auto, cpu, cuda, cuda:1, mps.")] = "auto"
    dtype: Annotated[str, typer.Option("--dtype", help="Compute in this dtype: auto, bfloat16, float16, float32.")] = (
        "auto"
    )
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="Spread the model over several devices: auto.")
    ] = None
    quantize: Annotated[
        str, typer.Option("--quantize", help="Quantize the weights with bitsandbytes: none, 4bit, 8bit.")
    ] = "none"
    trust_remote_code: TrustCode = False


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    TITLE: ClassVar = "Output"

    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no table.")] = False


@dataclass(frozen=True)
class RunOutput(Output):
    """What a command prints that makes a run."""

    log: Annotated[
        str | None,
        typer.Option("--log", metavar="trackio|wandb|mlflow", help="Send figures and the table to this tracker too."),
    ] = None


# -- settings ----------------------------------------------------------------------------------------------------


class SettingOptions:
    """In the annotation of a dict parameter: the options of these settings; the dict holds those with a value.

    Args:
        names: fields of `Settings`; none means all that have an option, except those in `without`.
        otherwise: where a setting comes from that is not given, for the help; None: it has its default.
        without: fields that are left out.
        title: of these options in the help; None: they are among those without a group.
    """

    def __init__(
        self,
        *names: str,
        otherwise: str | None = None,
        without: Collection[str] = (),
        title: str | None = "Settings of the method",
    ) -> None:
        every = tuple(name for name in Settings.model_fields if _option_names(name) and name not in without)
        self.names = names or every
        self.otherwise, self.title = otherwise, title

    def parameters(self) -> list[inspect.Parameter]:
        return [self._parameter(name) for name in self.names]

    def _parameter(self, name: str) -> inspect.Parameter:
        kind: Any = Settings.model_fields[name].annotation
        kind = str if get_origin(kind) is Literal else kind
        default = Settings.model_fields[name].default
        option = setting_option(name, show_default=self.otherwise or (default is not None and str(default)))
        # None, since only what is given may win over the recipe
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )

    @staticmethod
    def value(**given: Any) -> dict[str, Any]:
        values = {name: value for name, value in given.items() if value is not None}
        return values | ({"system": system_text(values["system"])} if "system" in values else {})


def system_text(given: str) -> str:
    """The text that a value of --system is or names; "" for `none`, with which the chat template writes its own.

    Raises UsageError for an empty text, and a file that is not there or cannot be read.
    """
    if given.strip() == "none":
        return ""
    is_file = given.strip() != "" and _names_file(given)
    text = _file_text(given) if is_file else given
    if not text.strip():
        where = f"The file '{given}' of --system" if is_file else "--system"
        raise UsageError(f"{where} holds no text: write a system prompt, or pass --system none for the template's own.")
    return text.strip()


def _names_file(given: str) -> bool:
    """Whether a value is a path: there is one of this name, or it is one word that ends as text files do."""
    with suppress(OSError, ValueError, RuntimeError):  # a text is too long for a name, or holds what no name may
        if Path(given).expanduser().exists():
            return True
    return given.endswith((".txt", ".md")) and len(given.split()) == 1


def _file_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(
            f"The file '{path}' of --system cannot be read ({reason}): give a text file, or the text itself."
        ) from error


def setting_option(name: str, show_default: str | bool = True) -> Any:
    """The option of a setting, with names, help, choices and inclusive bounds from its field."""
    about = Settings.model_fields[name]
    bounds = {key: getattr(bound, key) for bound in about.metadata for key in ("ge", "le") if hasattr(bound, key)}
    choices = get_args(about.annotation) if get_origin(about.annotation) is Literal else ()
    return typer.Option(
        *_option_names(name),
        help=about.description,
        min=bounds.get("ge"),
        max=bounds.get("le"),
        metavar="|".join(choices) or _extra(name).get("metavar"),
        show_default=show_default,
    )


def _option_names(setting: str) -> list[str]:
    given: list[str] | None = _extra(setting).get("options")
    return [f"--{setting.replace('_', '-')}"] if given is None else given


def _extra(setting: str) -> dict[str, Any]:
    extra = Settings.model_fields[setting].json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


# -- from groups to options --------------------------------------------------------------------------------------


def expand(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command as typer takes it: instead of each group among its parameters, the options of that group."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: group for name, p in signature.parameters.items() if (group := _group(p.annotation))}
    options = {
        name: groups[name][0] if name in groups else [p.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        for name, p in signature.parameters.items()
    }

    @wraps(command, assigned=("__module__", "__name__"))
    def run(**given: Any) -> Any:
        values = {}
        for name, parameters in options.items():
            of_group = {p.name: given[p.name] for p in parameters}
            values[name] = groups[name][1](**of_group) if name in groups else given[name]
        return command(**values)

    run.__doc__ = _about(command)
    run.__annotations__ = {}  # typer would read them in the command's module, which may not know their names
    run.__signature__ = signature.replace(parameters=[p for ps in options.values() for p in ps])  # type: ignore[attr-defined]
    return run


def _about(command: Callable[..., Any]) -> str | None:
    """The docstring, which is the help; python -OO leaves it in the source alone."""
    if command.__doc__ is None and sys.flags.optimize > 1:
        with suppress(OSError, SyntaxError):  # no source there
            (tree,) = ast.parse(inspect.getsource(command)).body
            return ast.get_docstring(tree) if isinstance(tree, ast.FunctionDef) else None
    return command.__doc__


def _group(annotation: Any) -> tuple[list[inspect.Parameter], Callable[..., Any]] | None:
    """The options of a group and what makes its value of them; None for a parameter that is no group."""
    for mark in get_args(annotation)[1:]:
        if isinstance(mark, SettingOptions):
            return [_titled(parameter, mark.title) for parameter in mark.parameters()], mark.value
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        return None
    hints = get_type_hints(annotation, include_extras=True)
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in fields(annotation)
    ]
    return [_titled(parameter, getattr(annotation, "TITLE", None)) for parameter in parameters], annotation


def _titled(parameter: inspect.Parameter, title: str | None) -> inspect.Parameter:
    """The parameter with its option under a title of the help."""
    kind, option = get_args(parameter.annotation)
    titled = copy(option)  # it may be another command's too
    titled.rich_help_panel = title
    return parameter.replace(annotation=Annotated[kind, titled])


def _default(part: Any) -> Any:
    if part.default_factory is not MISSING:
        return part.default_factory()
    return inspect.Parameter.empty if part.default is MISSING else part.default
