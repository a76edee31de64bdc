"""`llmva chat`: talk to the model as a user would, to original and edited side by side if wanted."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import Choice, EditDir, Loading, ModelArg, Output, SettingOptions, setting_option
from llmva.errors import UsageError

if TYPE_CHECKING:
    from llmva.models.chat import ChatTemplate

COMMANDS = {
    "/help": "/reset forgets the dialogue; Ctrl-D or an empty line ends. Everything else is asked. Options: "
    "llmva chat --help.",
    "/reset": "The dialogue begins anew.",
}


def chat(
    model: ModelArg,
    *,
    edit: EditDir = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the original's answer beside the edited model's.")
    ] = False,
    turns: Annotated[
        bool,
        typer.Option("--turns", help="With --compare, keep the dialogue from one message to the next, as without it."),
    ] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one prompt and end.")] = None,
    choice: Choice,
    max_new_tokens: Annotated[int, setting_option("max_new_tokens")] = 256,
    as_fitted: Annotated[dict[str, Any], SettingOptions("system", otherwise="as in the edit's run", title=None)],
    loading: Loading,
    output: Output,
) -> None:
    """Chat with MODEL, with or without an edit.

    Answers are greedy. End with Ctrl-D or an empty line. Type /help for what else there is.
    """
    from llmva.cli import inputs

    place = inputs.model_place(model)
    inputs.quiet_libraries(place)
    from llmva.cli.terminal.ask import ask
    from llmva.cli.terminal.console import Display, emit
    from llmva.models.chat import ChatTemplate, ending_limits
    from llmva.models.forward import check_features
    from llmva.models.load import load_model, loading_limits

    loaded_edit = inputs.load_edit(edit, choice, Display(output.quiet).note)
    if compare and loaded_edit is None:
        raise UsageError("--compare needs an edit to compare with: add --edit DIR.")
    system, *about_system = inputs.system_prompt(edit, as_fitted)
    for sentence in (one for sentences in about_system for one in sentences):
        Display(output.quiet).note(sentence)
    loaded, tokenizer = load_model(place, **asdict(loading), note=Display(output.quiet).note)
    check_features(loaded)
    template = ChatTemplate.of(tokenizer, system)
    for limit in (*loading_limits(loaded), *template.limits, *ending_limits(loaded, tokenizer)):
        Display(output.quiet).note(limit)
    if loaded_edit is not None:
        for sentence in inputs.changes_since_fit(edit, loaded, tokenizer):
            Display(output.quiet).note(sentence)
        loaded_edit.apply(loaded).remove()  # is it of this model? asked once, since hashing the weights takes time
    names = ["original", "edited"] if compare else ["edited" if loaded_edit else "original"]
    keeps = turns or not compare
    dialogues: dict[str, list[dict[str, str]]] = {name: [] for name in names}  # each has its own answers
    asked: list[dict[str, str]] = []
    if prompt is None and sys.stdin.isatty():
        Display(output.quiet).note(_banner(inputs.model_title(place), names, keeps))
    while True:
        text = prompt if prompt is not None else ask("> " if sys.stdin.isatty() and not output.quiet else "")
        if not text:
            break
        if prompt is None and text in COMMANDS:
            if text == "/reset":
                dialogues = {name: [] for name in names}
            Display(output.quiet).note(COMMANDS[text])
            continue
        turn = {"prompt": text}
        for name in names:
            dialogue = dialogues[name] if keeps else []
            dialogue.append({"role": "user", "content": text})
            with loaded_edit.apply(loaded, check=False) if loaded_edit and name == "edited" else nullcontext():
                title = f"{name}: " if compare else ""
                answer = _reply(loaded, template, dialogue, max_new_tokens, title, shown=not output.json)
            dialogue.append({"role": "assistant", "content": answer})
            turn[name] = answer
        asked.append(turn)
        if prompt is not None:
            break
    if output.json:
        emit({"model": model, "edit": None if edit is None else str(edit), "system": system, "turns": asked})
    elif not asked and not output.quiet:
        Display().line("nothing was asked")


def _banner(title: str, names: list[str], keeps: bool) -> str:
    turns = "It remembers the dialogue." if keeps else "Each message stands alone (--turns keeps the dialogue)."
    return f"{title}, {' and '.join(names)}. {turns} /help says more."


def _reply(
    model: Any, template: ChatTemplate, dialogue: list[dict[str, str]], max_new_tokens: int, title: str, shown: bool
) -> str:
    """The answer without thoughts, for which a model that thinks has tokens of its own; `shown` writes it to stdout."""
    import torch

    from llmva.cli.terminal.answer import Answer
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
    writer = Answer(reader, title, shown)
    ids = torch.tensor([row]).to(input_device(model))
    thought: str | None = None
    answer = ""
    for budget in (max_new_tokens, max_new_tokens + TOKENS):
        tokens = budget if limit is None else min(budget, limit - len(row))
        writer.restart()
        with torch.inference_mode():
            every = generate_greedily(model, template.tokenizer, ids, torch.ones_like(ids), tokens, streamer=writer)
        new = every[0].tolist()
        answer, thought = reader.read(new)
        if thought is None or len(new) < tokens:
            break
    said = answer.strip() or ("" if thought is None else f"(it was still thinking after {len(new)} tokens)")
    writer.finish(said)
    return said
