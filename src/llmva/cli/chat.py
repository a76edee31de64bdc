"""`llmva chat`: talk to the model as a user would, to original and edited side by side if wanted."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import Choice, EditDir, Loading, ModelArg, Output, Seed, SettingOptions, setting_option
from llmva.errors import UsageError

if TYPE_CHECKING:
    from llmva.models.chat import ChatTemplate


def chat(
    model: ModelArg,
    *,
    edit: EditDir = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the original's answer beside the edited model's.")
    ] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one prompt and end.")] = None,
    choice: Choice,
    max_new_tokens: Annotated[int, setting_option("max_new_tokens")] = 256,
    as_fitted: Annotated[dict[str, Any], SettingOptions("system", otherwise="as in the edit's run")],
    seed: Seed = 42,
    loading: Loading,
    output: Output,
) -> None:
    """Chat with MODEL, with or without an edit. Answers are greedy. End with Ctrl-D or an empty line."""
    from llmva.cli import inputs

    inputs.quiet_libraries(model)
    from llmva.cli.terminal.console import Display, emit, say
    from llmva.models.chat import ChatTemplate, ending_limits
    from llmva.models.forward import check_features
    from llmva.models.load import load_model, loading_limits

    loaded_edit = inputs.load_edit(edit, choice, Display(output.quiet).note)
    if compare and loaded_edit is None:
        raise UsageError("--compare needs an edit to compare with: add --edit DIR.")
    system, *about_system = inputs.system_prompt(edit, as_fitted)
    for sentence in (one for sentences in about_system for one in sentences):
        Display(output.quiet).note(sentence)
    loaded, tokenizer = load_model(model, **asdict(loading), note=Display(output.quiet).note)
    check_features(loaded)
    template = ChatTemplate.of(tokenizer, system)
    for limit in (*loading_limits(loaded), *template.limits, *ending_limits(loaded, tokenizer)):
        Display(output.quiet).note(limit)
    if loaded_edit is not None:
        for sentence in inputs.changes_since_fit(edit, loaded, tokenizer):
            Display(output.quiet).note(sentence)
        loaded_edit.apply(loaded).remove()  # is it of this model? asked once, since hashing the weights takes time
    names = ["original", "edited"] if compare else ["edited" if loaded_edit else "original"]
    dialogues: dict[str, list[dict[str, str]]] = {name: [] for name in names}  # each has its own answers
    turns: list[dict[str, str]] = []
    while True:
        text = prompt if prompt is not None else _ask(output.quiet)
        if not text:
            break
        turn = {"prompt": text}
        for name in names:
            dialogue = dialogues[name]
            dialogue.append({"role": "user", "content": text})
            with loaded_edit.apply(loaded, check=False) if loaded_edit and name == "edited" else nullcontext():
                answer = _reply(loaded, template, dialogue, max_new_tokens)
            dialogue.append({"role": "assistant", "content": answer})
            turn[name] = answer
            if not output.json:
                title = f"{name}: " if compare else ""
                say(f"{title}{answer}")
        turns.append(turn)
        if prompt is not None:
            break
    if output.json:
        emit({"model": model, "edit": None if edit is None else str(edit), "system": system, "turns": turns})
    elif not turns and not output.quiet:
        Display().line("nothing was asked")


def _ask(quiet: bool) -> str:
    """The next message: typed at a terminal, or a line of standard input, which is UTF-8 whatever the locale says."""
    if sys.stdin.isatty() and not quiet:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.buffer.readline().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is not UTF-8: type or pipe UTF-8 text.") from error


def _reply(model: Any, template: ChatTemplate, dialogue: list[dict[str, str]], max_new_tokens: int) -> str:
    """The answer without thoughts, for which a model that thinks has tokens of its own."""
    import torch

    from llmva.models.chat import AnswerReader, input_device
    from llmva.models.generate import generate_greedily
    from llmva.models.reading.context import check_rows, context_length
    from llmva.models.thinking import TOKENS

    row = template.encode(template.render(dialogue))
    limit = context_length(model)
    if limit is not None and len(row) >= limit and len(dialogue) > 1:
        raise UsageError(f"The dialogue has grown beyond the {limit} tokens that the model reads: start a new one.")
    check_rows(model, [dialogue[-1]["content"]], [row], 1)
    reader = AnswerReader.of(template.tokenizer, template.marks)
    ids = torch.tensor([row]).to(input_device(model))
    thought: str | None = None
    answer = ""
    for budget in (max_new_tokens, max_new_tokens + TOKENS):
        tokens = budget if limit is None else min(budget, limit - len(row))
        with torch.inference_mode():
            new = generate_greedily(model, template.tokenizer, ids, torch.ones_like(ids), tokens)[0].tolist()
        answer, thought = reader.read(new)
        if thought is None or len(new) < tokens:
            break
    return answer.strip() or ("" if thought is None else f"(it was still thinking after {len(new)} tokens)")
