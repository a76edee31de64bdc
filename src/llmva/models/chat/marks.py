"""How models mark their thoughts, and where thoughts end and answers begin in what one wrote.

Text is read here with its special tokens, since many marks are such tokens. What a model wrote is cut into spans that
are thoughts, marks included, and spans that are answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think", "longcat_think")
# in the names of template variables, tags and special tokens that have to do with thinking
THINKS = re.compile(
    r"think|thought|reason|ponder|muse|reflect|deliberat|scratch|monolog|(?:^|[^a-z])(?:cot|inner)(?:[^a-z]|$)", re.I
)
_ANSWER_NAMES = "response|answer|solution"
# around an answer that comes after thoughts: it is neither
_WRAPPERS = ("<response>", "<answer>", "<solution>", "<|start_response|>", "<|start_text|>", "<|begin_of_solution|>",
             "<|open|>response<|sep|>")  # fmt: skip
_WRAPPER = re.compile(rf"\s*(?:{'|'.join(map(re.escape, _WRAPPERS))})", re.I)
_WRAPPER_END = re.compile(rf"\s*(?:</(?:{_ANSWER_NAMES})>|\[END FINAL RESPONSE\])\s*\Z", re.I)
LONGEST = 160  # letters of an opening mark, attributes included


@dataclass(frozen=True)
class Marks:
    """What opens and closes a thought: `opening` and `closing` as a model writes them, `open` and `close` as patterns.

    `partial` matches what may still become an opening mark. Marks that are ordinary words count `only_first`, at the
    beginning of a text. `after` stands between the closing mark and the answer.
    """

    opening: str
    closing: str
    open: re.Pattern[str]
    close: re.Pattern[str]
    partial: re.Pattern[str] | None = None
    only_first: bool = False
    after: str = "\n\n"


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text: a thought with these `marks`, or answer (None)."""

    marks: Marks | None
    start: int
    end: int
    closed: bool = True  # False: the text ends inside this thought


def pair(opening: str, closing: str, *, only_first: bool = False) -> Marks:
    """Marks that are always written the same."""
    return Marks(opening, closing, _literal(opening), _literal(closing), only_first=only_first)


def tag(name: str, *, only_first: bool = False) -> Marks:
    """<name>, perhaps with attributes, to </name>."""
    escaped = re.escape(name)
    return Marks(
        f"<{name}>",
        f"</{name}>",
        re.compile(rf"<{escaped}(?:\s[^<>]*)?>", re.I),
        re.compile(rf"</{escaped}\s*>", re.I),
        re.compile(rf"<{escaped}\s[^<>]*\Z", re.I),
        only_first,
    )


def _literal(mark: str) -> re.Pattern[str]:
    """White space may be between the words and signs of a mark: some tokenizers put it there."""
    return re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|\W", mark))), re.I)


_TURN = r"(?:<\|end\|>\s*)?(?:<\|start\|>\s*assistant\s*)?"
_FINAL = r"(?:final|answer|response)\b"
_HEAD_END = r"[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
CHANNELS = Marks(  # gpt-oss: every channel but the final one is a thought
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    re.compile(rf"{_TURN}<\|channel\|>\s*(?!{_FINAL}){_HEAD_END}", re.I),
    re.compile(rf"{_TURN}<\|channel\|>\s*{_FINAL}{_HEAD_END}", re.I),
    re.compile(
        r"(?:<\|end\|>\s*)?(?:(?:<\|start\|>\s*assistant\s*)?<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?|"
        r"<\|start\|>\s*(?:assistant\s*)?)\Z|<\|end\|>\s*\Z",
        re.I,
    ),
    after="",
)
_MY = r"here(?:'s|’s| is) my "
SENTENCES = Marks(  # Granite 3.2
    "Here is my thought process:",
    "Here is my response:",
    re.compile(rf"{_MY}(?:thought process|thoughts|thinking(?: process)?|reasoning(?: process)?)\s*:", re.I),
    re.compile(rf"{_MY}(?:final )?(?:response|answer)\s*:", re.I),
    re.compile(r"here(?:(?:'s|’s| is)(?: my(?: [a-z]*){0,2})?)?\s*\Z", re.I),
    only_first=True,
)
_CONTENT = re.compile(r"(?:<\|end\|>\s*)?(?:<\|begin\|>\s*assistant\s*)?<\|content\|>|<\|/think\|>|</\|think\|>", re.I)
KNOWN = (
    *map(tag, NAMES),
    CHANNELS,
    SENTENCES,
    pair("[THINK]", "[/THINK]"),  # Magistral
    pair("◁think▷", "◁/think▷"),  # Kimi
    pair("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    pair("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    pair("<unused94>thought", "<unused95>"),  # MedGemma
    pair("<|channel>thought", "<channel|>"),  # Gemma 4
    pair("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", only_first=True),  # Apriel
    pair("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    Marks("<|think|>", "<|end|><|begin|>assistant<|content|>", _literal("<|think|>"), _CONTENT, after=""),  # Solar
)

# -- of an unknown model -----------------------------------------------------------------------------------------

_LOOKS_LIKE_A_MARK = re.compile(r"<[^<>\s'\"{}]{1,60}>|\[/?[A-Z][A-Z_:]{1,40}\]|◁[^◁▷\s]{1,40}▷")
_BECOMES = (  # how the name of an opening mark becomes that of its closing mark
    (r"\A(<\||<|\[|◁)(?!/)", r"\1/"),
    (r"\A<\|(?!/)", r"</|"),
    (r"start", "end"),
    (r"begin", "end"),
    (r"open", "close"),
    (r"prefix", "suffix"),
    (r"\A<\|(\w+)>\Z", r"<\1|>"),
)
_NO_THOUGHTS = re.compile(
    rf"\A\W*(?:{_ANSWER_NAMES}|output|result|final|tools?|function|call|arg|param|value|key|doc|context|image|img|audio|"
    r"video|vision|file|code|python|json|xml|html|query|question|example|system|user|human|assistant|role|s|b|i|p|bos|"
    r"eos|pad|fim|im)(?![a-z])|tool|call|vision|image|function",
    re.I,
)


def discover(template: str, tokens: Iterable[str], response_template: Any = None) -> tuple[Marks, ...]:
    """Marks beside the known ones.

    Args:
        template: text of the chat template.
        tokens: that were added to the tokenizer's vocabulary.
        response_template: of the tokenizer, which names the fields of an answer, where it has one.
    """
    split_at = set(re.findall(r"split\(\s*['\"](</[^<>'\"]+>)['\"]", template))
    added = [token for token in tokens if _LOOKS_LIKE_A_MARK.fullmatch(token)]
    marks = list(dict.fromkeys([*_LOOKS_LIKE_A_MARK.findall(template), *added]))
    taken = {known.opening.lower() for known in KNOWN}
    of_model = []
    for opening in marks:
        closing = next((c for c in _closings(opening) if c in marks), None)
        if closing is None or opening.lower() in taken or "/" in opening:
            continue
        named = THINKS.search(opening) is not None or closing in split_at
        if not named and (_NO_THOUGHTS.search(opening) or opening not in added):
            continue
        taken.add(opening.lower())
        name = re.fullmatch(r"<([\w:.-]+)>", opening)
        # a pair of which the name says nothing may be anything, so it counts where an answer begins with it
        of_model.append(tag(name[1], only_first=not named) if name else pair(opening, closing, only_first=not named))
    return (*of_model, *_of_fields(response_template, taken))


def _closings(opening: str) -> list[str]:
    closings = []
    for old, new in _BECOMES:
        for one, other in ((old, new), (old.upper(), new.upper())) if old.isalpha() else ((old, new),):
            closing = re.sub(one, other, opening, count=1)
            if closing != opening:
                closings.append(closing)
    return closings


def _of_fields(response_template: Any, taken: set[str]) -> list[Marks]:
    fields = response_template.get("fields") if isinstance(response_template, dict) else None
    of_model = []
    for name, field in fields.items() if isinstance(fields, dict) else ():
        both = [field.get(key) for key in ("open", "close")] if isinstance(field, dict) else []
        words = [mark.strip() for mark in both if isinstance(mark, str) and mark.strip()]
        opening, closing = words if len(words) == 2 else ("", "")
        if closing and THINKS.search(str(name)) and opening.lower() not in taken:
            of_model.append(pair(opening, closing))
    return of_model


# -- reading -----------------------------------------------------------------------------------------------------


def spans(text: str, marks: Sequence[Marks], inside: Marks | None = None) -> list[Span]:
    """What of `text` is thought and what is answer, in order.

    Args:
        marks: to look for.
        inside: the marks of the thought that the prompt left open.

    A closing mark alone ends a thought whose opening nobody saw, so all before it is thought.
    """
    cut: list[Span] = []
    at, start = 0, 0  # where to look on; where the span that goes on began
    while True:
        if inside is not None:
            end = inside.close.search(text, at)
            if end is None:
                return [*cut, Span(inside, start, len(text), closed=False)]
            at = _past_wrapper(text, end.end())
            cut.append(Span(inside, start, at))
            start, inside = at, None
            continue
        begin, end_alone = _first(text, marks, at, "open"), _first(text, marks, at, "close")
        if end_alone is not None and (begin is None or end_alone[0].start() <= begin[0].start()):
            match, of = end_alone
            at = start = _past_wrapper(text, match.end())
            cut = [Span(of, 0, at)]  # nothing before it was an answer
        elif begin is not None:
            match, of = begin
            if match.start() > start:
                cut.append(Span(None, start, match.start()))
            start, at, inside = match.start(), match.end(), of
        else:
            return [*cut, Span(None, start, len(text))] if start < len(text) else cut


def _past_wrapper(text: str, at: int) -> int:
    """What marks the beginning of the answer belongs to the thoughts before it."""
    wrapper = _WRAPPER.match(text, at)
    return wrapper.end() if wrapper else at


def _first(text: str, marks: Sequence[Marks], at: int, what: str) -> tuple[re.Match[str], Marks] | None:
    """The earliest opening or closing mark from `at` on; of several there, the longest."""
    best: tuple[re.Match[str], Marks] | None = None
    for one in marks:
        match = _opening_at_first(one, text, at, what) if one.only_first else _search(one, text, at, what)
        if match and (best is None or (match.start(), -match.end()) < (best[0].start(), -best[0].end())):
            best = match, one
    return best


def _search(marks: Marks, text: str, at: int, what: str) -> re.Match[str] | None:
    pattern, mark = (marks.open, marks.opening) if what == "open" else (marks.close, marks.closing)
    if not mark[0].isalnum() and mark[0] not in text:  # an answer in plain words costs next to nothing
        return None
    return pattern.search(text, at)


def _opening_at_first(marks: Marks, text: str, at: int, what: str) -> re.Match[str] | None:
    begin = len(text) - len(text.lstrip())
    return marks.open.match(text, begin) if what == "open" and at <= begin else None


def answer_begins(text: str, marks: Sequence[Marks], inside: Marks | None = None) -> int | None:
    """Where the answer begins in the `text` of a model that goes on writing: its first letter after all thoughts.

    None while that is not known: a thought is open, or only blanks have come, or what may become an opening mark.
    """
    for span in spans(text, marks, inside):
        if span.marks is not None:
            if not span.closed:
                return None
            continue
        start = _past_wrapper(text, span.start)
        rest = text[start : span.end]
        start += len(rest) - len(rest.lstrip())
        if start < span.end:
            # an opening mark may be growing there, unless more came after it
            return None if span.end == len(text) and _may_become_a_mark(text[start:], marks) else start
    return None


def content(text: str, span: Span) -> str:
    """What a thought holds beside its marks: blank in the empty one of a model that is not to think."""
    inner = text[span.start : span.end]
    if span.marks is None:
        return inner
    opening = span.marks.open.match(inner)
    inner = inner[opening.end() :] if opening else inner
    closing = span.marks.close.search(inner)
    return inner[: closing.start()] if closing else inner


def growing(text: str, marks: Sequence[Marks]) -> Marks | None:
    """The marks whose opening `text` may become, where it is a piece of one."""
    text = text.strip()
    if not 0 < len(text) <= LONGEST:
        return None
    bare = _bare(text)
    return next((m for m in marks if _bare(m.opening).startswith(bare) or (m.partial and m.partial.match(text))), None)


def _may_become_a_mark(text: str, marks: Sequence[Marks]) -> bool:
    if len(text) > LONGEST:
        return False
    bare = _bare(text)
    return any(wrapper.startswith(bare) for wrapper in _WRAPPERS) or growing(text, marks) is not None


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def without_wrapper(answer: str) -> str:
    """An answer without the tags that some models put around one after they thought, and without blanks before it."""
    return _WRAPPER_END.sub("", answer[_past_wrapper(answer, 0) :]).lstrip()
