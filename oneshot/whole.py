"""Small files are written whole: a process that dies or a full disk leaves the old file or the new one, never half."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from oneshot.errors import DiskFull

PARTIAL = ".oneshot-partial"  # ends names that nobody gives a file or folder of their own: what is half written
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_SAID = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b")  # as Rust libraries put it


def write_whole(path: Path, text: str, *, private: bool = False) -> Path:
    """Replace a text file in one step, on the disk before this returns; return its path.

    Args:
        private: readable by the user alone, as what holds prompts and answers is; else as the umask says

    Raises:
        DiskFull: there is no room; the old file is still there
    """
    raw = text.encode("utf-8", errors="replace")
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)  # of mode 0600
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        if not private:
            os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if is_full(error):
            raise disk_full(path, len(raw)) from error
        raise
    with contextlib.suppress(OSError):  # some file systems over a network sync no folders
        sync_entry(path.parent)
    return path


def remove_halves(folder: Path) -> None:
    """Remove the small files that processes which were killed have left half in a folder, which is locked."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(PARTIAL) and path.is_file():
            with contextlib.suppress(OSError):  # another user's
                path.unlink()


def sync_entry(path: Path) -> None:
    """Have the entries of a folder, or the bytes of a file, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable(folder: Path) -> None:
    """Let those read all in a folder whom the umask lets: libraries write some files for their user alone."""
    allowed = ~umask()
    for parent, _, names in os.walk(folder):
        for path, wanted in [(Path(parent), 0o777), *((Path(parent, name), 0o666) for name in names)]:
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode | (wanted & allowed) != mode and not path.is_symlink():
                with contextlib.suppress(PermissionError, NotImplementedError):  # a file system without modes
                    path.chmod(mode | (wanted & allowed))


def umask() -> int:
    """Return the process's umask."""
    with contextlib.suppress(OSError, IndexError, ValueError):  # setting it, even for a moment, is seen by all threads
        return int(Path("/proc/self/status").read_text(encoding="ascii").split("\nUmask:")[1].split()[0], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or the user's share of it, is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _FULL_SAID.search(str(error)) is not None


def disk_full(path: Path, needed: int | None = None) -> DiskFull:
    """Return the error of a full disk.

    Args:
        path: what was to be written
        needed: bytes that it takes; none where that is not known
    """
    real = Path(os.path.realpath(path))
    place = next((parent for parent in (real, *real.parents) if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    takes = "" if needed is None else f"{needed:,} bytes are needed, "
    return DiskFull(
        f"No space left on device, or in the user's quota: {path} could not be written ({takes}{free:,} bytes are "
        "free); make room, then start it again."
    )
