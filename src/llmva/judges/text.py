"""The text that a judge reads: what is visible of an answer, folded so that spelling variants agree.

Everything here is *prefix-stable*: if the answer grows, the folded text only grows too (`Folder.stable` cuts off
the few characters of which that is not yet certain). `PhraseJudge.settled` rests on it.
"""

from __future__ import annotations

import re
import unicodedata

MARK = "\ufffc"  # stands for one special token that leaked into the answer, so that a flood of them stays visible

_THINK = "think|thinking|thought|reasoning"
_TAGS = re.compile(
    rf"(?P<open><(?:{_THINK})>)|(?P<close></(?:{_THINK})>)"
    r"|(?P<token><\|[^<>|]{1,40}\|>|</?s>|<(?:pad|unk|eos|bos|mask|sep|cls)>|<(?:start|end)_of_turn>|\[/?INST\])",
    re.IGNORECASE,
)
_LONGEST_TAG = 44
_UNFINISHED_TAG = re.compile(r"(?:<[^<>]*|\[/?[INST]*)\Z", re.IGNORECASE)
_MARKDOWN = "*_`#>~"
_QUOTES = {"'": "‘’‚‛ʼ´′", '"': "“”„‟«»「」『』〝〞″", "-": "‐‑‒–—―−"}  # NFKC leaves these as they are


class Folder(dict[int, str]):
    """A table for `str.translate` that folds character by character, and remembers the characters it has met.

    Case folding, compatibility forms (NFKC), accents dropped from Latin, Greek and Cyrillic letters, plain quotes and
    dashes, every white space a blank; markdown marks and invisible characters are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        for plain, variants in _QUOTES.items():
            self.update({ord(variant): plain for variant in variants})
        self[ord("ı")] = "i"

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._fold(chr(code))
        return folded

    @staticmethod
    def _fold(char: str) -> str:
        if char.isspace():
            return " "
        category = unicodedata.category(char)
        if char in _MARKDOWN or category == "Cf" or "\ufe00" <= char <= "\ufe0f" or "\u0300" <= char <= "\u036f":
            return ""  # marks, joiners and direction signs, variation selectors, loose accents
        base = unicodedata.normalize("NFKD", char)
        if ord(base[0]) < 0x0530:  # Latin, Greek, Cyrillic
            return "".join(c for c in base if not "\u0300" <= c <= "\u036f").casefold()
        return unicodedata.normalize("NFKC", char).casefold()

    def pattern(self, regex: str) -> str:
        """The same folding for the text of a regular expression, whose own signs are all left alone."""
        return "".join(char if char.isascii() else char.translate(self) for char in regex)

    def view(self, answer: str) -> str:
        """What a reader sees of `answer`, folded; special tokens become `MARK`, thinking blocks vanish.

        An unclosed thinking block hides all that follows it.
        """
        parts: list[str] = []
        hidden, end = False, 0
        for tag in _TAGS.finditer(answer):
            if not hidden:
                parts.append(answer[end : tag.start()].translate(self))
                parts.append(MARK if tag.lastgroup == "token" else " ")
            hidden = tag.lastgroup == "open" or (hidden and tag.lastgroup != "close")
            end = tag.end()
        if not hidden:
            parts.append(answer[end:].translate(self))
        return re.sub(r" +", " ", "".join(parts)).lstrip()

    def stable(self, answer: str) -> str:
        """The part of `view(answer)` that no continuation can alter: an unfinished tag at the end is left out."""
        unfinished = _UNFINISHED_TAG.search(answer, max(0, len(answer) - _LONGEST_TAG))
        if unfinished:
            answer = answer[: unfinished.start()]
        return self.view(answer)


def words(text: str) -> list[str]:
    """Words of folded text; where a script sets no blanks (Chinese, Japanese, Thai), characters."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0eff\u3040-\u9fff]+", text)


def sentences_end(text: str, count: int) -> int:
    """Offset at which the first `count` sentences of folded text end (its length if it has fewer)."""
    ends = [m.end() for m in re.finditer(r"[.!?]+[\"')\]]*(?= )|[。।؟]+", text)]
    return ends[count - 1] if len(ends) >= count else len(text)


def visible(answer: str) -> str:
    """`answer` as its reader sees it, without thinking, for judges that read meaning.

    An unclosed block hides all that follows it. A closing tag alone ends a block that the chat template opened, so it
    hides all that comes before it. Unlike `Folder.view` this is not prefix-stable.
    """
    parts: list[str] = []
    hidden, end = False, 0
    for tag in _TAGS.finditer(answer):
        if tag.lastgroup == "token":
            continue
        if tag.lastgroup == "close" and not hidden:
            parts = []
        elif not hidden:
            parts.append(answer[end : tag.start()])
        hidden = tag.lastgroup == "open" or (hidden and tag.lastgroup != "close")
        end = tag.end()
    if not hidden:
        parts.append(answer[end:])
    return "".join(parts).strip()


def defused(text: str) -> str:
    """`text` with a blank inside everything that a guard's tokenizer could read as a special token.

    Otherwise an answer with "[/INST]" or "<|im_end|>" could end its own part of the guard's prompt. What UTF-8 cannot
    hold becomes "?".
    """
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is text in Python only

    def split(tag: re.Match[str]) -> str:
        whole = tag.group()
        return whole if tag.lastgroup != "token" else f"{whole[0]} {whole[1:]}"

    return _TAGS.sub(split, text).replace("<<SYS>>", "< <SYS>>").replace("<</SYS>>", "< </SYS>>")
