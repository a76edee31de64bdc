"""Where a model's turn ends, and special tokens that stand in a user's text.

Both are about tokens that a template writes between turns. A model may end its turn with one that its configs do not
name; and a prompt may hold one as text, which the tokenizer reads as the token itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmva.models.chat.marks import KNOWN, discover
from llmva.models.chat.places import default_template
from llmva.models.chat.template import QUESTION, REPLY, SYSTEM


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an answer.

    None where it writes none, and where thoughts end with it too, since such a model goes on after it.
    """
    text = default_template(tokenizer)
    special = _special_tokens(tokenizer)
    if text is None or not special:
        return None
    tail = _after_reply(tokenizer, text)
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    if not ids or ids[0] not in special.values() or ids[0] == getattr(tokenizer, "bos_token_id", None):
        return None
    name = next(token for token, i in special.items() if i == ids[0])
    return None if _ends_thoughts(name, text, tokenizer) else ids[0]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn: those that are named as such, and the one that the chat template ends answers with.

    Where configs do not name that one, transformers lets a model go on into turns of its own making, which are no part
    of its answer.
    """
    turn = turn_end(tokenizer)
    return named_ends(model, tokenizer) | (set() if turn is None else {turn})


def named_ends(model: Any, tokenizer: Any) -> set[int]:
    """The end tokens of the generation config, the config and the tokenizer."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else None
    known: set[int] = set()
    for holder in (getattr(model, "generation_config", None), config, inner, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        known |= {i for i in (ids if isinstance(ids, list | tuple) else [ids]) if type(i) is int and i >= 0}
    return known


def ending_limits(model: Any, tokenizer: Any) -> list[str]:
    """What is told of end tokens that the model's files do not name, for the limits of its figures."""
    named, turn = named_ends(model, tokenizer), turn_end(tokenizer)
    place = "eos_token_id of generation_config.json"
    if turn is not None and turn not in named:
        return [
            f"The chat template ends an answer with {tokenizer.convert_ids_to_tokens(turn)}, which is none of the "
            f"model's end tokens: answers were cut there. Put {turn} into {place}, or other programs go on after it."
        ]
    if not named:
        return [
            "Neither the model nor its tokenizer names an end token, so that every answer is as long as it may be: put "
            f"the model's into {place}."
        ]
    return []


def special_in_text(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """A sentence on the texts that hold special tokens of the model, as a list of one; empty where none does."""
    special = sorted((token for token in _special_tokens(tokenizer) if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    hits = [] if pattern is None else [match.group() for text in texts if (match := pattern.search(text))]
    if not hits:
        return []
    some = f"{len(hits):,} prompts hold" if len(hits) > 1 else "1 prompt holds"
    return [
        f"{some} special tokens of the model, such as {hits[0]}, which it reads as such and not as text: remove them "
        "if they are no part of a prompt."
    ]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Every special token that the tokenizer finds in text, by what it looks like."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    held = {str(token): int(i) for i, token in added.items() if getattr(token, "special", False)}
    names, ids = (getattr(tokenizer, f"all_special_{what}", None) or () for what in ("tokens", "ids"))
    return {**{str(token): int(i) for token, i in zip(names, ids, strict=False)}, **held}


def _after_reply(tokenizer: Any, text: str) -> str:
    """What the template writes after the answer of a whole dialogue; "" where that cannot be told."""
    bare: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    for with_system, in_parts in ((False, False), (False, True), (True, False), (True, True)):
        turns = [{"role": "system", "content": SYSTEM}, *bare] if with_system else bare
        if in_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            rendered: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=False, chat_template=text
            )
        except Exception:  # a template is a program of the model's: it may fail in any way
            continue
        if REPLY in rendered:
            return rendered.rpartition(REPLY)[2].lstrip()
    return ""


def _ends_thoughts(name: str, text: str, tokenizer: Any) -> bool:
    """Whether a token stands in what closes a thought of this model, of which all special tokens are known here."""
    known = {*_special_tokens(tokenizer), *re.findall(r"<\|[^<>|]+\|>", text)}
    marks = (*KNOWN, *discover(text, known, getattr(tokenizer, "response_template", None)))
    closings = [one.closing for one in marks if name in one.closing]
    return any(set(re.findall(r"<\|[^<>|]+\|>", closing)) <= known for closing in closings)
