"""ROUGE-L: how much of the right answer's words an answer has, in their order."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def rouge_l(right: str, answer: str) -> float:
    """Return the F1 of the longest common subsequence of lower-case words, 0 to 1 (Lin, 2004, with beta = 1).

    Words are runs of letters, digits and underscores, unstemmed; a language without spaces counts as one word.
    """
    a, b = (_WORD.findall(text.lower()) for text in (right, answer))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        above_left = 0
        for place, other in enumerate(b, start=1):
            above = row[place]
            row[place] = above_left + 1 if word == other else max(above, row[place - 1])
            above_left = above
    return 2 * row[-1] / (len(a) + len(b))
