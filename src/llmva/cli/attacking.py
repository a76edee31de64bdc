"""Options of `llmva evaluate` on attackers: which attacks, how many answers, how long they search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer


def _list_attacks(given: list[str]) -> list[str]:
    """Print what attacks there are and end, where that is asked for."""
    if "list" in given:
        from llmva.attacks import bundled_attacks
        from llmva.attacks.translation import NAME

        for attack in bundled_attacks():
            typer.echo(f"{attack.name}: {attack.about} ({attack.source})")
        typer.echo(f"{NAME}=FILE: asks in another language, by a table with the columns text and translation")
        raise typer.Exit
    return given


@dataclass(frozen=True)
class Attacking:
    """Under which attacks the prompts are asked too, and how often each is."""

    attack: Annotated[
        list[str],
        typer.Option(
            "--attack",
            metavar="NAME,...",
            help="Ask the prompts under these attacks too: all, or names that --attack list shows. Repeatable.",
            callback=_list_attacks,
            is_eager=True,
        ),
    ] = field(default_factory=list)
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="K",
            min=1,
            help="Draw this many answers to each prompt; ASR counts prompts answered in any of them.",
            show_default="one answer, greedy",
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="With --samples, draw at this temperature.")
    ] = 1.0
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="P", help="With --samples, draw from the likeliest tokens of this share."),
    ] = 1.0

    adaptive: Annotated[
        int | None,
        typer.Option(
            "--adaptive",
            metavar="BUDGET",
            min=1,
            help="Also search for a form in which each toxic prompt is answered, in at most so many answers or steps.",
        ),
    ] = None
    search: Annotated[
        str,
        typer.Option(
            "--search",
            metavar="KIND",
            help="What --adaptive searches: transforms, which asks alone; suffix, by gradients; or both.",
        ),
    ] = "transforms"
    suffix_tokens: Annotated[
        int, typer.Option("--suffix-tokens", metavar="N", min=1, help="With --search suffix, its length.")
    ] = 10
    candidates: Annotated[
        int,
        typer.Option("--candidates", metavar="N", min=1, help="With --search suffix, suffixes tried in a step."),
    ] = 64

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings of samples and of searches."""
        return {name: value for name, value in vars(self).items() if name != "attack"}
