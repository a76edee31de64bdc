"""From the value of --judge to a judge. No model is loaded or asked here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.files import cache_folder
from llmva.judges.base import Judge
from llmva.judges.model_based.cache import Cache
from llmva.judges.model_based.encoder import HUB, EncoderJudge
from llmva.judges.model_based.endpoint import GENERAL, EndpointJudge
from llmva.judges.model_based.guards import guards
from llmva.judges.model_based.local import LocalGuard
from llmva.judges.phrases import PhraseJudge
from llmva.servers.client import Limits

_FORMS = "NAME, NAME=FOLDER, NAME@URL#MODEL, llm@URL#MODEL, or several of these with commas between"


def make_judge(
    spec: str = "phrases",
    *,
    cache: str | Path | None = None,
    limits: Limits | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Judge:
    """The judge that `spec` describes (docs/judges.md).

    Args:
        spec: "phrases"; a guard by name, which the hub gives; "NAME=FOLDER", a guard from a local folder;
            "NAME@URL#MODEL", a guard on a server; "llm@URL#MODEL", a general model; several with commas: a panel.
        cache: folder in which judgements of models are kept; None asks LLMVA_CACHE, then takes the user's.
        limits: of requests to a server.
        device, dtype: of a guard that runs here, as `load_model` takes them.

    Raises UsageError, one sentence with its mend, for anything else.
    """
    specs = [part.strip() for part in spec.split(",")]
    options: dict[str, Any] = {"cache": cache, "limits": limits, "loading": {"device": device, "dtype": dtype}}
    judge: Judge
    if len(specs) == 1:
        judge = _one(specs[0], stand_in=True, **options)
    else:
        from llmva.judges.panel import Panel  # here, since it imports numpy

        # A guard that does not recognise refusals abstains in a panel: phrases in its place would vote twice.
        judge = Panel([_one(part, stand_in=False, **options) for part in specs])
    judge.spec = spec
    return judge


def _one(
    spec: str, *, stand_in: bool, cache: str | Path | None, limits: Limits | None, loading: dict[str, Any]
) -> Judge:
    name, sign, place = _split(spec)
    if name == "phrases" and not sign:
        return PhraseJudge()
    folder = cache_folder(cache)
    options: dict[str, Any] = {"cache": lambda judge: Cache(folder, judge)}
    known = guards()
    if name not in {*known, "minos", "llm"}:
        raise UsageError(
            f"There is no judge called '{name}'; choose one of: phrases, {', '.join([*known, 'minos', 'llm'])}, "
            f"written as {_FORMS}."
        )
    if name in known and not known[name].knows_refusals and stand_in:
        options["stand_in"] = PhraseJudge()
    if sign == "@":
        return _served(name, place, limits, options)
    if sign == "=":
        if not (Path(place).expanduser() / "config.json").is_file():
            raise UsageError(f"There is no config.json in '{place}': give the folder of the judge's model.")
        place = str(Path(place).expanduser())
    if name == "minos":
        return EncoderJudge(name, place or HUB, **loading, **options)
    if name == "llm":
        raise UsageError("A general model judges on a server: write llm@URL#MODEL.")
    if not place and known[name].hub is None:
        sizes = ", ".join(other for other in known if other.startswith(f"{name}-"))
        raise UsageError(f"'{name}' has several sizes: choose one of {sizes}, or write {name}=FOLDER.")
    return LocalGuard(name, known[name], place or str(known[name].hub), **loading, **options)


def _served(name: str, place: str, limits: Limits | None, options: dict[str, Any]) -> Judge:
    url, _, model = place.partition("#")
    if name == "minos":
        raise UsageError("minos is no chat model, so it cannot be on such a server: write minos, or minos=FOLDER.")
    guard = GENERAL if name == "llm" else guards()[name]
    model = model or guard.hub or ""
    if not model:
        raise UsageError(f"'{url}' needs the name of a model that it serves: write {name}@URL#MODEL.")
    title = f"llm-{model}" if name == "llm" else name
    return EndpointJudge(title, guard, url, model, limits=limits, **options)


def _split(spec: str) -> tuple[str, str, str]:
    """`(name, "@" or "=" or "", what follows)`."""
    match = re.fullmatch(r"([\w.-]+)(?:([@=])(.+))?", spec)
    if not match:
        raise UsageError(f"There is no judge called '{spec}'; choose one of: phrases, or write {_FORMS}.")
    return match.group(1), match.group(2) or "", match.group(3) or ""
