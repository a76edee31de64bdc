"""Which attacks there are, and which a user names."""

from __future__ import annotations

from collections.abc import Sequence

from llmva.attacks.base import Attack
from llmva.attacks.dialogues import dialogue_attacks
from llmva.attacks.encodings import encoding_attacks
from llmva.attacks.frames import frame_attacks
from llmva.attacks.splitting import splitting_attack
from llmva.attacks.translation import NAME, translation_attack
from llmva.errors import UsageError

ALL = "all"


def bundled_attacks() -> list[Attack]:
    """Every attack that needs no file, in the order of docs/attacks.md."""
    prefilled, *others = dialogue_attacks()
    return [prefilled, *frame_attacks(), *encoding_attacks(), splitting_attack(), *others]


def parse_attacks(given: Sequence[str]) -> list[Attack]:
    """The attacks named, with commas between them: `all` is every bundled one, `translation=FILE` reads a file.

    Raises UsageError for a name that is not known, and as `translation_attack`.
    """
    known = {attack.name: attack for attack in bundled_attacks()}
    chosen: dict[str, Attack] = {}
    for term in (term.strip() for value in given for term in value.split(",")):
        name, equals, path = term.partition("=")
        if term == ALL:
            chosen |= known
        elif name == NAME and path:
            chosen[name] = translation_attack(path)
        elif name == NAME:
            raise UsageError(f"The attack {NAME} needs a file of translated prompts: write {NAME}=FILE.")
        elif name not in known or equals:
            raise UsageError(f"There is no attack {term!r}: choose some of {', '.join(known)}, {NAME}=FILE, or {ALL}.")
        else:
            chosen[name] = known[name]
    return list(chosen.values())
