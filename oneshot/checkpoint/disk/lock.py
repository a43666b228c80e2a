"""One run, one folder: a lock file that a second run finds, on the same machine or on another one of the cluster.

The file appears by a hard link, whole, which is atomic on NFS and Lustre too, where file locks of the kernel may be
off. It says who holds it, and a thread counts up a number in it. Where the holder runs on this machine its process is
looked up; elsewhere a lock whose number stands still for ``STALE`` seconds is a dead run's, whatever the clocks say.

A run that was taken for dead and is not (stopped, or cut off from the storage) finds another's lock in the place of its
own before it puts a folder into its place, and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import hashlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oneshot.checkpoint.disk.holder import described, first_line_of, holder_of, own_line, runs, where
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError
from oneshot.whole import disk_full, is_full, umask

LOCK = ".oneshot-lock"
BEAT, STALE = 10.0, 90.0  # seconds between two signs of life; and after how many without one a run counts as dead
_MOST = 4096  # bytes of a lock file


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        covers: the folder that it is for
        made: folders that were made for the file, the innermost first
    """

    path: Path
    covers: Path
    line: bytes
    descriptor: int
    made: list[Path]
    process: int = field(default_factory=os.getpid)
    thread: int = field(default_factory=threading.get_ident)
    ended: threading.Event = field(default_factory=threading.Event)
    beating: threading.Thread | None = None


_held: dict[Path, _Held] = {}


def take(folder: Path, *, beside: bool = False) -> None:
    """Lock a folder until ``released`` or the process ends. Locked twice by one thread it is locked once.

    Args:
        folder: made where it is missing, unless ``beside``
        beside: put the file beside the folder, for one that is to appear when it is complete

    Raises:
        UserError: another run that lives holds it
        OSError: the file cannot be written
    """
    covers = Path(os.path.realpath(folder))
    path = covers.with_name(covers.name + LOCK) if beside else covers / LOCK
    held = _held.get(path)
    if held is not None and (held.process, held.thread) == (os.getpid(), threading.get_ident()):
        return
    missing = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    line = own_line()
    try:
        while not _put(path, line):
            seen = _read(path)
            if seen is None:  # released meanwhile
                continue
            if _lives(path, seen, folder):
                raise UserError(
                    f"{folder} is being written by another run ({described(seen)}): wait for it or end it, or name "
                    "another folder."
                )
            if _take_over(path, seen, line, folder):
                break
    except BaseException as error:
        _remove_empty(missing)
        if is_full(error):
            raise disk_full(path, len(line)) from error
        raise
    _remove_left(path)
    _held[path] = held = _Held(path, covers, line, os.open(path, os.O_WRONLY), missing)
    held.beating = threading.Thread(target=_beat, args=(held,), name="lock", daemon=True)
    held.beating.start()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release at the end of the block, or of the function that this decorates, the locks taken in it by this thread."""
    before = _own()
    try:
        yield
    finally:
        for path in _own() - before:
            _release(path)


def _own() -> set[Path]:
    """The locks of this thread: another one's are of another run."""
    return {path for path, held in list(_held.items()) if held.thread == threading.get_ident()}


@contextlib.contextmanager
def locked(runtime: Runtime, folder: Path) -> Iterator[None]:
    """Hold the lock beside a folder for the block, on rank 0. Collective.

    Raises:
        UserError: on every rank, if another run that lives holds it
    """
    with released():
        with agree(runtime, f"locking {folder}"):
            if runtime.is_main:
                take(folder, beside=True)
        yield


def still_held(folder: Path) -> None:
    """Return if the locks of this process that cover a folder are still its own; one that was removed is set again.

    Raises:
        UserError: another run has taken one over
    """
    real = Path(os.path.realpath(folder))
    for held in list(_held.values()):
        if held.process != os.getpid() or not (held.covers == real or held.covers in real.parents):
            continue
        found = _read(held.path)
        if found is None and _put(held.path, held.line):
            os.close(held.descriptor)
            held.descriptor = os.open(held.path, os.O_WRONLY)
        elif found is None or first_line_of(found) != held.line:
            raise UserError(
                f"{held.covers} was taken over by another run ({described(found or b'')}), for which this one looked "
                f"dead: {folder} is left as that run has it; start this one again when it has ended."
            )


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        _release(path)


def _release(path: Path) -> None:
    held = _held.pop(path)
    if held.process != os.getpid():  # inherited by a fork, and its parent's
        return
    held.ended.set()
    if held.beating is not None:
        held.beating.join(1.0)
    with contextlib.suppress(OSError):
        found = _read(path)
        if found is not None and first_line_of(found) == held.line:
            path.unlink()
    if held.beating is None or not held.beating.is_alive():
        os.close(held.descriptor)
    _remove_empty(held.made)


def _beat(held: _Held) -> None:
    """Count up until the end. Written in place: the file of whoever took the lock over is another one."""
    count = 0
    while not held.ended.wait(BEAT):
        count += 1
        with contextlib.suppress(OSError):
            os.pwrite(held.descriptor, _count(count), len(held.line) + 1)
            os.fsync(held.descriptor)  # other machines see what has left this one's cache


def _remove_left(path: Path) -> None:
    """Remove what processes of this machine that are dead have left of their way to this lock."""
    for left in path.parent.glob(f"{glob.escape(path.name)}-*"):
        with contextlib.suppress(OSError):
            who = holder_of(_read(left) or b"")
            if who.get("where") == where() and type(who.get("pid")) is int and not runs(who["pid"], who.get("began")):
                left.unlink()


def _count(number: int) -> bytes:
    return f"{number:020d}\n".encode()


def _read(path: Path) -> bytes | None:
    """What is in a lock file, as far as it tells one state from another; none if there is no file."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MOST)
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's: its number cannot be read, but when it was written
        with contextlib.suppress(FileNotFoundError):
            return b"\n" + str(path.stat().st_mtime_ns).encode()
        return None


def _put(path: Path, line: bytes, *, over: bool = False) -> bool:
    """Have the file appear, whole; false if there is one. ``over``: in the place of the one that is there."""
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    try:
        _create(temporary, line)
        if over:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            return temporary.stat().st_nlink == 2  # a server over a network has done it, and its first answer was lost
        except OSError:  # no hard links here
            with contextlib.suppress(FileExistsError):
                _create(path, line)
                return True
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 & ~umask())
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(path.unlink, missing_ok=True)
            content = line + b"\n" + _count(0)
            if os.write(descriptor, content) != len(content):
                raise disk_full(path, len(content))
            os.fsync(descriptor)
            undo.pop_all()
    finally:
        os.close(descriptor)


def _take_over(path: Path, seen: bytes, line: bytes, folder: Path) -> bool:
    """Put our lock in the place of a dead run's; false if another run was quicker, or is doing it.

    Of those who see the same dead lock one makes the file that is named after it, and may.
    """
    right = path.with_name(f"{path.name}-{hashlib.sha256(first_line_of(seen)).hexdigest()[:16]}")
    if not _put(right, line):
        taker = _read(right)
        if taker is not None and not _lives(right, taker, folder):  # it died within these few calls
            right.unlink(missing_ok=True)
        time.sleep(0.05)
        return False
    try:
        now = _read(path)
        return now is not None and first_line_of(now) == first_line_of(seen) and _put(path, line, over=True)
    finally:
        right.unlink(missing_ok=True)


def _lives(path: Path, seen: bytes, folder: Path) -> bool:
    """Whether the run that holds a lock lives; of one on another machine that is seen only by waiting."""
    who = holder_of(seen)
    if who.get("where") == where() and type(who.get("pid")) is int:
        return runs(who["pid"], who.get("began"))
    print(
        f"{folder} is locked by a run that cannot be looked up from here ({described(seen)}): waiting up to "
        f"{STALE:.0f} s for a sign of life.",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE / 20))
        now = _read(path)
        if now is None or first_line_of(now) != first_line_of(seen):
            return False  # no longer that one's: whoever asked looks again
        if now != seen:
            return True
    return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
