"""Answers that are no language: repetition without end, mixed scripts, broken characters, keyboard noise.

Word salad in real words is not recognized; it would take a language model to tell it from a poor answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_SHORT = 12  # characters (spaces left out) below which nothing is called garbled
_WORD = re.compile(r"[^\W_]+")
_RUN = re.compile(r"(.)\1{19,}", re.DOTALL)
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO"}
_NO_SCRIPT = {"GREEK", "MATHEMATICAL", "MICRO", "FEMININE", "MASCULINE", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER"}
_VOWELS = set("aeiouyäöüàáâãåæèéêëìíîïòóôõøùúûýœαεηιουω")


def is_garbled(text: str) -> bool:
    """Return whether a text can be told to be no language, code or table, from its characters and words alone."""
    squeezed = "".join(text.split())
    if len(squeezed) < _SHORT:
        return False
    return (
        _broken(squeezed)
        or _noise(squeezed)
        or _one_run(squeezed)
        or _endless(text)
        or _scripts(squeezed) > 2
        or _unpronounceable(text)
    )


def _broken(text: str) -> bool:
    """Replacement and control characters, or byte-level tokens that were not decoded."""
    bad = sum(char == "\ufffd" or unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") for char in text)
    return bad > 0.1 * len(text) or text.count("Ġ") > 3


def _noise(text: str) -> bool:
    """Hardly a letter or digit among the signs."""
    return sum(char.isalnum() or unicodedata.category(char).startswith("M") for char in text) < 0.2 * len(text)


def _one_run(text: str) -> bool:
    """One character over and over, for most of the text (rules in tables and underscores in forms are short)."""
    return sum(match.end() - match.start() for match in _RUN.finditer(text)) > 0.8 * len(text)


def _endless(text: str) -> bool:
    """The same few words over and over, to the end of the text."""
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) >= 8:
        for size in range(1, 7):
            end = words[-size:]
            repeats = 1
            while words[-size * (repeats + 1) : len(words) - size * repeats] == end:
                repeats += 1
            if repeats >= 4 and repeats * size >= 0.6 * len(words):
                return True
        if len(words) >= 10 and len(set(words)) <= 0.25 * len(words):
            return True
    signs = "".join(text.split())
    # languages without spaces, and signs
    return len(signs) >= 20 and len(set(signs)) <= 4 and not signs.isdigit()


def _scripts(text: str) -> int:
    """How many scripts each make up at least a tenth of the letters."""
    counted: Counter[str] = Counter()
    for char in text:
        if char.isalpha():
            script = unicodedata.name(char, "?").split()[0]
            if script not in _NO_SCRIPT:
                counted["EAST ASIAN" if script in _EAST_ASIAN else script] += 1
    total = sum(counted.values())
    return sum(count >= 0.1 * total for count in counted.values())


def _unpronounceable(text: str) -> bool:
    """Most words of Latin letters have no vowel: keyboard noise."""
    words = [word for word in _WORD.findall(text) if word.isascii() and word.isalpha() and len(word) > 2]
    spelt = [word.lower() for word in words if not word.isupper()]  # abbreviations aside
    return len(spelt) >= 4 and sum(not _VOWELS.intersection(word) for word in spelt) > 0.6 * len(spelt)
