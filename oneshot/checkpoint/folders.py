"""Replace a folder in one step: what was there stays whole until the new one is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from oneshot.distributed.runtime import Runtime, agree

PARTIAL, OLD = ".partial", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(runtime: Runtime, folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, created by rank 0, that takes its place after the block. Collective.

    A crash at any moment leaves the old folder whole, and at most a half one named ``.partial`` beside it, which the
    next save removes. The temporary folder is removed if the block raises.
    """
    temporary = folder.with_name(folder.name + PARTIAL)
    with agree(runtime, f"creating {temporary}"):
        if runtime.is_main:
            clean(folder)
            temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with agree(runtime, f"putting {folder} in its place"):
        if runtime.is_main:
            _sync(temporary)
            _take_place(temporary, folder)


def clean(folder: Path) -> None:
    """Remove what an interrupted save left beside ``folder``; put the old folder back if it was moved aside."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder.with_name(folder.name + PARTIAL), ignore_errors=True)


def _take_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(temporary, folder)
    elif _exchange(temporary, folder):
        shutil.rmtree(temporary)
    else:  # no exchange on this file system: for a moment only the moved-aside folder is whole, which clean() knows
        old = folder.with_name(folder.name + OLD)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    _sync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (Linux's renameat2); false where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(folder: Path) -> None:
    """Have the folder's entries on disk, so that a rename cannot outlive the files that it promises."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
