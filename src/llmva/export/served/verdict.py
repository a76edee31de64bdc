"""Does a server serve the edit? It is asked what the base and the edited model answer differently."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmva.edit_file import edit_file
from llmva.errors import LlmvaError, UsageError
from llmva.export.served.asking import Server
from llmva.export.served.probes import CANDIDATES, Probe, candidates, choose_probes
from llmva.export.verify import open_artefact, system_of
from llmva.models.load import load_model
from llmva.progress import Progress
from llmva.prompts.store import read_bundled, read_jsonl
from llmva.prompts.types import Prompt

MIN_PROBES = 6  # answers without which nothing is said
SHARE = 0.75  # of the answers that must begin as one model's
STARTS = (
    "start it with the edit (vLLM: --enable-lora --lora-modules NAME=FOLDER; llama.cpp: --lora FILE), or serve the "
    "merged model"
)


def verify_server(
    base: str,
    artefact: str | Path,
    server: Server,
    *,
    name: str | None = None,
    loading: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a server's answers with those of `base`, and of it with the edit that `artefact` holds, by hook.

    The server is asked which models it has before the base is loaded.

    Args:
        name: of the model on the server; None takes the only one.

    Returns `{"server", "served_name", "serves", "verdict", "probes", "edited", "base", "neither", "unanswered",
    "sentence", "answers": [{"prompt", "benign", "base", "edited", "server", "agrees"}]}`. `verdict` is "edited", "base"
    or "neither"; the numbers count the answers that begin as that model's.

    Raises:
        UsageError: no edit, or the server has several models.
        LlmvaError: the server is gone, or too few answers tell the models apart.
    """
    progress = progress or Progress()
    edit = open_artefact(artefact).edit
    if edit is None:
        raise UsageError(f"'{artefact}' holds no edit to compare with: give the folder that llmva align wrote.")
    progress.stage("asking which models the server has")
    asked_for, names = server.choose(name)
    progress.stage("loading the base")
    model, tokenizer = load_model(base, **dict(loading or {}))
    prompts = _prompts_of(Path(artefact))
    probes = choose_probes(model, tokenizer, edit, prompts, system_of([Path(artefact)]), progress)
    if len(probes) < MIN_PROBES:
        raise LlmvaError(
            f"The edit surely changes the first words of {len(probes)} of {len(prompts)} answers, too few to tell a "
            "server with it from one without: compare the files with llmva verify and no --server."
        )
    answers = server.answers(asked_for, probes, progress)
    return {
        "server": server.address.url,
        "served_name": asked_for,
        "serves": names,
        **judge(probes, answers, asked_for, names),
    }


def judge(probes: Sequence[Probe], answers: Sequence[str | None], name: str, names: Sequence[str]) -> dict[str, Any]:
    """The verdict on answers, None where there was none. Raises LlmvaError if there are too few."""
    rows = [
        {
            "prompt": probe.prompt.text,
            "benign": probe.prompt.benign,
            "base": probe.base_answer,
            "edited": probe.edited_answer,
            "server": answer,
            "agrees": None if answer is None else probe.agrees(answer),
        }
        for probe, answer in zip(probes, answers, strict=True)
    ]
    counts = Counter(probe.agrees(answer) for probe, answer in zip(probes, answers, strict=True) if answer is not None)
    came = counts.total()
    if came < MIN_PROBES:
        raise LlmvaError(f"The server answered {came} of {len(rows)} prompts, too few to tell: look into its log.")
    wanted = math.ceil(SHARE * came)
    verdict = next((of for of in ("edited", "base") if counts[of] >= wanted), "neither")
    return {
        "verdict": verdict,
        "probes": len(rows),
        "edited": counts["edited"],
        "base": counts["base"],
        "neither": counts["neither"],
        "unanswered": len(rows) - came,
        "sentence": _sentence(verdict, counts, came, name, names),
        "answers": rows,
    }


def _sentence(verdict: str, counts: Mapping[str, int], came: int, name: str, names: Sequence[str]) -> str:
    """The verdict, and the mend where it is not "edited"."""
    others = [other for other in names if other != name]
    served = f"'{name}'"
    if name not in names and names:
        served += f" (not among those that the server lists: {', '.join(names)})"
    if verdict == "edited":
        return f"{served} answers as the edited model: {counts['edited']} of {came} answers begin as its answers do."
    if verdict == "base":
        ask = f"ask for the edit's name with --served-name (it serves {', '.join(others)} too), or " if others else ""
        return (
            f"{served} answers as the base, without the edit ({counts['base']} of {came} answers begin as the base's, "
            f"{counts['edited']} as the edited model's): {ask}{STARTS}."
        )
    return (
        f"{served} answers neither as the edited model nor as the base ({counts['edited']} of {came} answers begin as "
        f"the edited model's, {counts['base']} as the base's): check that it serves this base with its own chat "
        "template, this edit at this strength, and no system prompt of its own."
    )


def _prompts_of(artefact: Path) -> list[Prompt]:
    """Those of the run, and bundled ones where it has few."""
    path = edit_file(artefact).parent / "prompts.jsonl"
    own = candidates(read_jsonl(path)) if path.is_file() else []
    return [*own, *(p for p in candidates(read_bundled()) if p not in own)][:CANDIDATES]
