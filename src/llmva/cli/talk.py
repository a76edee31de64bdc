"""`llmva chat`: the model as a user would meet it, original and edited side by side if wanted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmva.cli import inputs
from llmva.cli.console import Display, emit, say
from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.models.chat import encode, input_device, render_dialogue
from llmva.models.generate import check_rows, context_length, generate_greedily


def run_chat(
    model: str,
    *,
    edit: Path | None,
    compare: bool,
    prompt: str | None,
    iteration: int | None,
    strength: float | None,
    max_new_tokens: int,
    loading: Mapping[str, Any],
    json: bool,
    quiet: bool,
) -> None:
    """One turn after another; original and edited each keep a dialogue of their own."""
    inputs.quiet_libraries(model)
    from llmva.models.load import load_model

    loaded_edit = inputs.load_edit(edit, iteration, strength)
    if compare and loaded_edit is None:
        raise UsageError("--compare needs an edit to compare with: add --edit DIR.")
    loaded, tokenizer = load_model(model, **loading)
    if loaded_edit is not None:
        loaded_edit.apply(loaded).remove()  # is it of this model? asked once, since hashing the weights takes time
    names = ["original", "edited"] if compare else ["edited" if loaded_edit else "original"]
    dialogues: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    turns: list[dict[str, str]] = []
    while True:
        text = prompt if prompt is not None else _ask(quiet)
        if not text:
            break
        turn = {"prompt": text}
        for name in names:
            dialogue = dialogues[name]
            dialogue.append({"role": "user", "content": text})
            answer = _reply(loaded, tokenizer, dialogue, loaded_edit if name == "edited" else None, max_new_tokens)
            dialogue.append({"role": "assistant", "content": answer})
            turn[name] = answer
            if not json:
                title = f"{name}: " if compare else ""
                say(f"{title}{answer}")
        turns.append(turn)
        if prompt is not None:
            break
    if json:
        emit({"model": model, "edit": None if edit is None else str(edit), "turns": turns})
    elif not turns and not quiet:
        Display().line("nothing was asked")


def _ask(quiet: bool) -> str:
    """The next message: typed at a terminal, or a line of standard input, which is UTF-8 whatever the locale says."""
    if sys.stdin.isatty() and not quiet:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.buffer.readline().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is not UTF-8: type or pipe UTF-8 text.") from error


@torch.inference_mode()
def _reply(model: Any, tokenizer: Any, dialogue: list[dict[str, str]], edit: Edit | None, max_new_tokens: int) -> str:
    row = encode(tokenizer, render_dialogue(tokenizer, dialogue))
    limit = context_length(model)
    if limit is not None and len(row) >= limit and len(dialogue) > 1:
        raise UsageError(f"The dialogue has grown beyond the {limit} tokens that the model reads: start a new one.")
    check_rows(model, [dialogue[-1]["content"]], [row], 1)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - len(row))
    ids = torch.tensor([row])
    ids = ids.to(input_device(model))
    applied = edit.apply(model, check=False) if edit is not None else None
    try:
        new = generate_greedily(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens)
    finally:
        if applied is not None:
            applied.remove()
    text: str = tokenizer.decode(new[0], skip_special_tokens=True)
    return text.strip()
