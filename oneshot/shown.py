"""What is shown on a terminal: no text that is not ours can colour it, move its cursor or be taken for markup."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from oneshot.redact import redacted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STDOUT = 1  # the descriptor: other languages know no other
_turned = threading.RLock()  # held while it leads elsewhere: a second thread would take that for where it belongs
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
    return _CONTROL.sub(_visible, redacted(str(text)).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """Return ``plain`` text in one line."""
    return " ".join(plain(text).split())


def open_console(**options: Any) -> Console:
    """Return a console of rich's for which all text is ``plain``, in tables and titles too.

    Square brackets are square brackets, and ``:smile:`` is no picture. A ``Text`` is taken as it is: make it of
    ``plain`` text.

    Args:
        options: of ``rich.console.Console``
    """
    made: Console = _kind()(**options)
    return made


@contextlib.contextmanager
def printed_plainly() -> Iterator[None]:
    """Have what libraries of other languages print on stdout in the block, past Python, come out ``plain``."""
    with _turned:
        sys.stdout.flush()
        try:
            before = os.dup(_STDOUT)
        except OSError:  # it is closed
            yield
            return
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), _STDOUT)
            try:
                yield
            finally:
                sys.stdout.flush()
                os.dup2(before, _STDOUT)
                os.close(before)
                file.seek(0)
                if said := file.read().decode("utf-8", errors="replace"):
                    sys.stdout.write(plain(said))


@lru_cache
def _kind() -> Any:
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(plain(text), **{**options, "markup": False, "emoji": False})

    return PlainConsole


def _visible(found: re.Match[str]) -> str:
    return f"<U+{ord(found[0]):04X}>"


@cache
def say_once(text: str) -> None:
    """Say a sentence on stderr, of rank 0, once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(one_line(text), file=sys.stderr, flush=True)
