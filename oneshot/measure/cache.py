"""Answers on disk, each from the moment it is there: what was answered once is not generated again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from oneshot.whole import disk_full, is_full

RESPONSES = "responses.jsonl"


def response_key(target: str, messages: Sequence[dict[str, str]], max_new_tokens: int) -> str:
    """Return the name of an answer: a hash of all that it depends on.

    Args:
        target: which model answers, such as a server's address with the model's name, or a checkpoint's fingerprint
    """
    asked = json.dumps([target, [dict(sorted(m.items())) for m in messages], max_new_tokens], ensure_ascii=True)
    return hashlib.sha256(asked.encode()).hexdigest()


class Responses:
    """The answers in a run folder's ``responses.jsonl``, one {key, answer} a line; only one process may write."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESPONSES
        self.known: dict[str, str] = {}
        self._torn: int | None = None  # where the last row begins, if a run died in the middle of it
        if not self.path.is_file():
            return
        raw = self.path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            self._torn = raw.rfind(b"\n") + 1
            raw = raw[: self._torn]  # its answer is had again
        for line in raw.split(b"\n"):
            try:
                entry = json.loads(line)
                key, answer = entry["key"], entry["answer"]
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(answer, str):
                self.known[key] = answer

    def put(self, key: str, answer: str) -> None:
        """Keep an answer; it is handed to the operating system before this returns."""
        # ASCII only: an answer may hold half a surrogate pair, which no encoding takes
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=True)
        try:
            if self._torn is not None:
                os.truncate(self.path, self._torn)
            with open(self.path, "a", encoding="ascii", opener=_private) as stream:
                stream.write(f"{line}\n")
        except OSError as error:
            if is_full(error):
                raise disk_full(self.path, len(line)) from error
            raise
        self._torn = None
        self.known[key] = answer


def _private(path: str, flags: int) -> int:
    """Open a file that, where it is new, the user alone may read."""
    return os.open(path, flags, 0o600)
