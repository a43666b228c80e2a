"""Text from models and users as harmless plain text: no key, no control code, nothing that turns its surroundings."""

from __future__ import annotations

from oneshot.shown import one_line, plain

__all__ = ["one_line", "plain", "shortened"]


def shortened(text: str, most: int) -> str:
    """Return the text cut to ``most`` characters, with a word on how many are left out."""
    if len(text) <= most:
        return text
    return f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"
