"""Replace a folder in one step: what was there stays whole until the new one is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from oneshot.checkpoint.seal import seal
from oneshot.distributed.phases import count, counting
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError

# names that nobody gives a folder of their own: what bears them beside a checkpoint is removed
PARTIAL, OLD = ".oneshot-partial", ".oneshot-old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(runtime: Runtime, folder: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, created by rank 0, that takes its place after the block. Collective.

    A crash at any moment leaves the old folder whole, and at most a half one (``PARTIAL``) beside it, which the next
    save removes. The temporary folder is removed if the block raises.

    Args:
        sync: whether all is on disk before the folder appears; if not, a power loss may leave it damaged

    Raises:
        UserError: on every rank, if there is no place for the folder; what was there before still is
    """
    folder = _real(folder)
    temporary = folder.with_name(folder.name + PARTIAL)
    with agree(runtime, f"creating {temporary}"):
        if runtime.is_main:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file where a folder is to be written: move it, or name another folder.")
            clean(folder)
            temporary.mkdir(parents=True)
    try:
        yield temporary
        with agree(runtime, f"putting {folder} in its place"):
            if runtime.is_main:
                with naming(temporary):
                    seal(temporary)
                if sync:
                    sync_folder(temporary)
                if counting():
                    count(written=bytes_in(temporary))
                _take_place(temporary, folder, sync)
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def clean(folder: Path) -> None:
    """Remove what an interrupted save left beside ``folder``; put the old folder back if it was moved aside."""
    put_back(folder)
    folder = _real(folder)
    old, partial = folder.with_name(folder.name + OLD), folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists():
        _remove(old, partial)


def clean_inside(parent: Path) -> None:
    """Do the same for every folder in ``parent``, which is not there yet if nothing was ever saved."""
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    for name in names:
        if name.endswith((PARTIAL, OLD)):
            clean(parent / name.removesuffix(PARTIAL).removesuffix(OLD))


def put_back(folder: Path) -> None:
    """Put a folder back that an interrupted save has moved aside and not replaced; any rank may come first."""
    folder = _real(folder)
    if not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # nothing is aside, or another rank was quicker
            os.replace(folder.with_name(folder.name + OLD), folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have the errors that the block meets on disk name ``path``, which some system calls and the Rust libraries don't.

    The latter raise bare exceptions, of which other ranks would not learn: they become errors of the user's disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:  # both or none, or the message is lost
            error.filename = str(path)
        raise
    except Exception as error:
        if type(error) is Exception or isinstance(error, SafetensorError):
            raise UserError(f"{path} could not be written: {error}") from error
        raise


def _take_place(temporary: Path, folder: Path, sync: bool) -> None:
    if not folder.exists():
        os.replace(temporary, folder)
    elif not _exchange(temporary, folder):
        # no exchange on this file system: for a moment only the moved-aside folder is whole, which clean() knows
        old = folder.with_name(folder.name + OLD)
        try:
            os.replace(folder, old)
            os.replace(temporary, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
        _remove(old, temporary)
    if sync:
        sync_entries(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # the new folder stands: what stays behind is the next save's to clean


def _remove(old: Path, partial: Path) -> None:
    """Remove a moved-aside folder, under the name of a half one: under its own it is whole, whenever a crash comes."""
    os.replace(old, partial)
    shutil.rmtree(partial, ignore_errors=True)


def _real(folder: Path) -> Path:
    """Return where ``folder`` is: of a link the target is replaced, on its own file system, and not the link."""
    return Path(os.path.realpath(folder))


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


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_folder(folder: Path) -> None:
    """Have all that is in the folder on disk, so that a rename cannot outlive the files that it promises."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_entries(Path(parent, name))
        sync_entries(Path(parent))


def sync_entries(folder: Path) -> None:
    """Have the entries of a folder, or the bytes of a file, on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
