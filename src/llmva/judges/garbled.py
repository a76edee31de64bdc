"""Garbled texts, which are no answer at all: empty, looping, or without words."""

from __future__ import annotations

import itertools
import re
import unicodedata

from llmva.judges.text import MARK, words

LOOP_SHARE = 0.4  # a loop makes the text garbled when it covers this share of it
LOOP_REPEATS = {1: 8, 2: 5}  # words in a loop -> repeats that count; longer loops need four
MAX_LOOP = 12  # words in a loop
STUCK_WORDS = 12  # from so many words on, a text is stuck if fewer than one in six of them differ
CHAR_LOOP = 40  # characters that a loop within one word must cover


def why_garbled(text: str) -> str | None:
    """Why folded `text` is garbled, or None. Only long repetition counts: 'yes', '42' and 'ha ha ha' are answers, and
    so are lists, tables, code and refrains."""
    if not any(char.isalnum() for char in text):
        return "no words" if text.strip() else "empty"
    solid = [char for char in text if char != " "]
    bad = sum(_unprintable(char) for char in solid)
    if bad >= 4 and bad > 0.15 * len(solid):
        return "unprintable characters or leaked special tokens"
    if len(solid) >= 40 and sum(char.isalnum() for char in solid) < 0.1 * len(solid):
        return "symbols without words"
    return _stuck(text) or _char_loop(text) or _no_language(text)


def _unprintable(char: str) -> bool:
    return char in (MARK, "\ufffd") or unicodedata.category(char) in ("Cc", "Co", "Cn", "Cs")


def _stuck(text: str) -> str | None:
    all_words = words(text)
    # Numbers and single signs are left out first, since a times table rightly repeats everything else.
    tokens = [word for word in all_words if word == "i" or (not word.isdigit() and (len(word) > 1 or word > "\u02ff"))]
    if len(tokens) >= STUCK_WORDS and len(set(tokens)) <= max(2.0, len(tokens) / 6):
        return f"only {len(set(tokens))} different words in {len(tokens)}"
    stutters = sum(one == other for one, other in itertools.pairwise(tokens))
    if len(tokens) >= STUCK_WORDS and stutters >= 0.5 * len(tokens):
        return "stutters"
    return _word_loop(tokens, 1, text) or _word_loop(all_words, 2, text)


def _word_loop(tokens: list[str], patience: int, text: str) -> str | None:
    enough = LOOP_SHARE * sum(char.isalnum() for char in text)
    for period in range(1, min(MAX_LOOP, len(tokens) // 3) + 1):
        start, end = _longest_run(tokens, period)
        covered = sum(len(token) for token in tokens[start:end])
        if end - start >= period * patience * LOOP_REPEATS.get(period, 4) and covered >= enough:
            return f'repeats "{" ".join(tokens[start : start + period])[:40]}"'
    return None


def _longest_run(tokens: list[str], period: int) -> tuple[int, int]:
    """Bounds of the longest stretch in which every token equals the one `period` before it."""
    best, start = (0, 0), 0
    for i in range(period, len(tokens)):
        if tokens[i] != tokens[i - period]:
            start = i - period + 1
        elif i + 1 - start > best[1] - best[0]:
            best = (start, i + 1)
    return best


def _char_loop(text: str) -> str | None:
    for match in re.finditer(r"(\w{1,8}?)\1{4,}", text):
        length = match.end() - match.start()
        if length >= CHAR_LOOP and length >= LOOP_SHARE * len(text):
            return f'repeats "{match.group(1)}"'
    return None


def _no_language(text: str) -> str | None:
    """One unbroken string of Latin letters, too long for a word and with too few vowels for language."""
    for match in re.finditer(r"[a-z]{40,}", text):
        run = match.group()
        if len(run) >= LOOP_SHARE * len(text) and sum(run.count(vowel) for vowel in "aeiouy") < 0.2 * len(run):
            return "a long string without words"
    return None
