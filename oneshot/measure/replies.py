"""What a server says, looked at: the answer in it, its wishes, and its words where it has none."""

from __future__ import annotations

import json
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

from oneshot.data.thoughts import MARKS, THINK, written
from oneshot.measure.body import MOST
from oneshot.redact import SHORTEST, redacted

LONGEST_WISH = 300.0  # seconds that a server may ask for with Retry-After
OF_THIS_REQUEST = frozenset({400, 413, 422})  # too long for the server, or stopped by a filter of its own
_SHOWN = 200  # characters of a server's own words in a message


class Failed(Exception):
    """One try went wrong: the status, whether another is wise and after how many seconds at least."""

    def __init__(self, reason: str, *, again: bool, after: float = 0.0, status: int = 0) -> None:
        super().__init__(reason)
        self.again, self.after, self.status = again, after, status


def without_key(value: Any, key: str) -> Any:
    """Parsed JSON with the key struck out of its strings, however they were spelt."""
    if isinstance(value, str):
        return _struck(value, key)
    if isinstance(value, dict):
        return {without_key(name, key): without_key(item, key) for name, item in value.items()}
    return [without_key(item, key) for item in value] if isinstance(value, list) else value


def answer_in(found: Any, most: int = MOST) -> str:
    """The text in a chat completion, its first ``most`` characters; "" where the model said nothing.

    What a server puts into the reasoning stands before it as a thought, which is unfinished where no answer follows.
    """
    try:
        message = found["choices"][0]["message"]
        content = message["content"]
    except (TypeError, LookupError):
        raise Failed("JSON without an answer in it", again=True) from None
    if content is not None and not isinstance(content, str):
        raise Failed("JSON without an answer in it", again=True)
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought.strip():
        before, content = written(thought[:most]), (content or "")[:most]
        return before + content if content else before.rstrip().removesuffix(MARKS[THINK])
    return (content or "")[:most]


def cut_off(found: Any) -> bool:
    """Whether the server says that the answer was ended by its limit of tokens."""
    return bool(found["choices"][0].get("finish_reason") == "length")


def wish(header: str | None) -> float:
    """Seconds to wait, from a Retry-After header: a number or a date; 0 for none or nonsense."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_WISH) if seconds == seconds else 0.0


def short(text: str, key: str) -> str:
    """A server's words in one printable line."""
    text = text[: 100 * _SHOWN]  # so much of it, as JSON may spell the key in six characters for one
    try:
        text = json.dumps(without_key(json.loads(text), key), ensure_ascii=False)
    except (ValueError, RecursionError):
        text = re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda found: chr(int(found[1], 16)), text)
    struck = redacted(_struck(text, key))
    line = " ".join("".join(c if c.isprintable() else " " for c in struck[: 10 * _SHOWN]).split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


def _struck(text: str, key: str) -> str:
    """The text without the key; a short one, such as ``none`` where none is asked for, is a word of any text."""
    return text.replace(key, "***") if len(key) >= SHORTEST else text
