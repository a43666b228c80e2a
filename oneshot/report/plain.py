"""Text from models and users as harmless plain text: no key, no control code, nothing that turns its surroundings."""

from __future__ import annotations

import re

from oneshot.redact import redacted

# Control codes (a terminal's colours and cursor among them), marks that turn the direction of what follows, letters
# without width, separators that some programs take for new lines, and halves of surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(text: object) -> str:
    """Return the text with keys struck out, and with control codes and marks without width made visible.

    An escape becomes "<U+001B>", which every font has; tabs and new lines stay.
    """
    return _CONTROL.sub(_shown, redacted(str(text)).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """Return ``plain`` text in one line."""
    return " ".join(plain(text).split())


def shortened(text: str, most: int) -> str:
    """Return the text cut to ``most`` characters, with a word on how many are left out."""
    if len(text) <= most:
        return text
    return f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"


def _shown(found: re.Match[str]) -> str:
    return f"<U+{ord(found[0]):04X}>"
