"""Replace a folder in one step: what was there stays whole until the new one is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from oneshot.checkpoint.disk.lock import still_held
from oneshot.checkpoint.disk.seal import seal
from oneshot.distributed.phases import count, counting
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.errors import UserError
from oneshot.whole import PARTIAL as PARTIAL
from oneshot.whole import disk_full, is_full, sync_entry

OLD = ".oneshot-old"  # like PARTIAL: what bears these names beside a checkpoint is removed
_UNIQUE = r"(\.[0-9a-f]{8})?"  # before PARTIAL: no two saves write into one folder
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(runtime: Runtime, folder: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, created by rank 0, that takes its place after the block. Collective.

    A crash at any moment leaves the old folder whole, and at most a half one (``PARTIAL``) beside it, which the next
    save removes. The temporary folder is removed if the block raises. Saves of two processes into one folder are kept
    apart by their lock (``oneshot.checkpoint.disk.lock``), at the latest before the renaming.

    Args:
        sync: whether all is on disk before the folder appears; if not, a power loss may leave it damaged

    Raises:
        UserError: on every rank, if there is no place for the folder, or another run has put one there meanwhile; what
            was there before still is
    """
    folder = _real(folder)
    unique = gather_objects(runtime, secrets.token_hex(4) if runtime.is_main else "")[0]
    temporary = folder.with_name(f"{folder.name}.{unique}{PARTIAL}")
    before = None
    with agree(runtime, f"creating {temporary}"):
        if runtime.is_main:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file where a folder is to be written: move it, or name another folder.")
            clean(folder)
            before = _stands(folder)
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
                still_held(folder)
                if _stands(folder) != before:
                    raise UserError(
                        f"{folder} was written by another program while this run was writing it, and is left as it is: "
                        "name another folder."
                    )
                _take_place(temporary, folder, sync)
    except BaseException:
        if runtime.is_main:
            _remove(temporary)
        raise


def clean(folder: Path) -> None:
    """Remove what an interrupted save left beside ``folder``; put the old folder back if it was moved aside."""
    put_back(folder)
    folder = _real(folder)
    old = folder.with_name(folder.name + OLD)
    if old.exists():
        discard(old)
    half = re.compile(re.escape(folder.name) + _UNIQUE + re.escape(PARTIAL))
    for path in list(folder.parent.iterdir()) if folder.parent.is_dir() else []:
        if half.fullmatch(path.name):
            _remove(path)


def clean_inside(parent: Path) -> None:
    """Do the same for every folder in ``parent``, which is not there yet if nothing was ever saved."""
    for name in [path.name for path in parent.iterdir()] if parent.is_dir() else []:
        saved = re.fullmatch(f"(.+?)(?:{_UNIQUE}{re.escape(PARTIAL)}|{re.escape(OLD)})", name)
        if saved:
            clean(parent / saved[1])


def refuse_half(folder: Path) -> None:
    """Raise UserError for a folder that a run was killed over while it wrote (or removed) it; it may look whole."""
    if Path(os.path.realpath(folder)).name.endswith(PARTIAL):
        raise UserError(
            f"{folder} is half a folder, which a run that was killed has left: run its command again, which removes it."
        )


def discard(folder: Path) -> None:
    """Remove a folder, under the name of a half one: under its own it is whole, whenever a crash comes."""
    partial = folder.with_name(f"{folder.name.removesuffix(OLD)}.{secrets.token_hex(4)}{PARTIAL}")
    os.replace(folder, partial)
    _remove(partial)


def _remove(folder: Path) -> None:
    """Remove a folder as far as the system lets, weights first: no model is left without its marker."""
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put a folder back that an interrupted save has moved aside and not replaced; any rank may come first."""
    folder = _real(folder)
    if not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # nothing is aside, or another rank was quicker
            os.replace(folder.with_name(folder.name + OLD), folder)


@contextlib.contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Have the errors that the block meets on disk name ``path``, which some system calls and the Rust libraries don't.

    The latter raise bare exceptions, of which other ranks would not learn: they become errors of the user's disk.

    Args:
        needed: bytes that the block writes, for the error of a full disk
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:  # both or none, or the message is lost
            error.filename = str(path)
        if needed is not None and is_full(error):
            raise disk_full(path, needed) from error
        raise
    except Exception as error:
        if type(error) is Exception or isinstance(error, SafetensorError):
            if is_full(error):
                raise disk_full(path, needed) from error
            raise UserError(f"{path} could not be written: {error}") from error
        raise


def _take_place(temporary: Path, folder: Path, sync: bool) -> None:
    if _stands(folder) is None:
        os.replace(temporary, folder)  # refused by the system if the folder has got something in it since
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
        discard(old)
    if sync:
        sync_entries(folder.parent)
    _remove(temporary)  # the new folder stands: what stays behind is the next save's to clean


def _stands(folder: Path) -> tuple[int, int] | None:
    """Which folder stands there, if any; an empty one is none."""
    with contextlib.suppress(FileNotFoundError):
        if any(folder.iterdir()):
            found = folder.stat()
            return found.st_dev, found.st_ino
    return None


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
    with naming(folder):
        sync_entry(folder)
