"""Whatever reading a user's file can raise, as one sentence that names the file; and what it may take, bounded.

Files come from strangers: they may be damaged, or made to hang whoever reads them. Every file that is not ours is
read within ``reading``, and what a file can have us compute (a pattern, a template, YAML's aliases) within ``limited``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.errors import UserError, first_line

if TYPE_CHECKING:
    import yaml

SECONDS = 10.0  # that reading or rendering one thing may take: the largest that are known take a tenth of one
MEMORY = 2 << 30  # bytes that it may take beyond what the process holds
_BLOCK = 1 << 20  # bytes hashed at a time
_AGAIN = 60.0  # seconds
_VALUES = 100_000  # that a YAML file may hold, its aliases written out: they are walked, and written again
_RESTORE = "restore it from its source"
_CAPPED = threading.Lock()  # held by the one block at a time that limits the process's memory


class _Overrun(BaseException):
    """The time is over. No Exception: what runs within must not take it for a failure of its own and go on."""


@contextlib.contextmanager
def reading(path: Path | str, advice: str = _RESTORE) -> Iterator[None]:
    """Turn whatever the block raises into a UserError that names the file; those that are one stay as they are.

    Args:
        advice: what to do about a file that cannot be read
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        missing = error.filename or path
        raise UserError(f"{missing} is missing: is this a complete folder?") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read: {advice}.") from error
    except OSError as error:
        said = error.strerror or first_line(error)
        raise UserError(f"{path} cannot be read ({said}): {advice}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {advice}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 text ({error.reason}, byte {error.start}): {advice}.") from error
    except Exception as error:  # libraries raise what they like, the Rust ones a bare Exception
        if type(error).__name__ == "OutOfMemoryError":  # torch's: says nothing of the file
            raise
        raise UserError(f"{path} cannot be read ({_said(error)}): {advice}.") from error


def _said(error: Exception) -> str:
    """A library's words; a bare name or number, as KeyError has it, with a word on what it means."""
    line = first_line(error)
    if isinstance(error, LookupError):
        return f"it lacks {line}"
    return line if len(line) <= 300 else line[:300] + " …"


@contextlib.contextmanager
def limited(what: str, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise UserError where the block takes longer, or more memory, than it may. Itself it takes 0.05 ms.

    Time is kept by a signal, which only the main thread is given: in other threads of Python users it is not kept.
    Memory is the process's: of blocks in several threads, or in each other, that come first the limit counts.

    Args:
        what: what takes it, and where it is from, for the message
        seconds: of time
        memory: bytes beyond what the process has
    """
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        handler, began = signal.signal(signal.SIGALRM, _overrun), time.monotonic()
        # again after the first time, for the case that something in the block caught it all the same; but not so soon
        # that it could come while the first is on its way out, which takes long where the machine is busy
        left, every = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    # of the process: a second block that found the first one's limit would leave that behind
    alone = _CAPPED.acquire(blocking=False)
    before = _cap(memory) if alone else None
    try:
        try:
            yield
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
    except (_Overrun, MemoryError) as error:
        most = f"{seconds:g} s or {memory >> 20} MiB"
        raise UserError(f"{what} takes more than {most}: it is damaged or hostile, leave it out.") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # where the last moment was the one in which it came
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
            if left:  # whoever had set it is to be told in time
                signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), every)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)
        if alone:
            _CAPPED.release()


def _overrun(number: int, frame: object) -> None:
    raise _Overrun


def _cap(memory: int) -> tuple[int, int] | None:
    """Let the process have so much more memory; returns the limit before, or none where nothing has changed."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux: time is kept all the same
        return None
    try:
        most = int(os.read(descriptor, 100).split()[0]) * resource.getpagesize() + memory
    finally:
        os.close(descriptor)
    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[0] != resource.RLIM_INFINITY and before[0] <= most:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    return before


def read_json(path: Path) -> Any:
    """Return the parsed JSON file.

    Raises:
        UserError: missing, not JSON, or nested too deeply
    """
    with reading(path):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid JSON ({error.reason}, byte {error.start}): {_RESTORE}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError for anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: {_RESTORE}.")
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of what a JSON file says, in hexadecimal digits, however it is laid out."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_yaml(text: str, loader: type[yaml.SafeLoader] | None = None) -> Any:
    """Return what a YAML text says, in plain values.

    Args:
        loader: of plain values only; none: yaml's own

    Raises:
        yaml.YAMLError: it is no YAML, or its aliases stand for more than there is room for, or for themselves
        ValueError, RecursionError: a value that is none, such as a 13th month; nested too deeply
    """
    import yaml

    made = (loader or yaml.SafeLoader)(text)
    try:
        node = made.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases stand for more than {_VALUES:,} values")
        return made.construct_document(node)
    finally:
        made.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds, aliases written out; too many for one that holds itself."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _VALUES + 1  # until it is known: it is met within itself
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
    known[id(node)] = min(1 + sum(_values(part, known) for part in parts), _VALUES + 1)
    return known[id(node)]


def first_match(patterns: dict[str, Any], name: str, where: Path) -> Any:
    """Return the value of the first pattern that PEFT would take to mean a module; none where there is none.

    Call it within ``limited``: a pattern can take for ever.

    Raises:
        UserError: one is no regular expression
    """
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"{where} has the pattern {pattern[:80]!r}, which is none ({error}): {_RESTORE}."
            ) from error
    return None
