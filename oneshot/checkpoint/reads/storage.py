"""What files lie on, and how they are best read there: in blocks of which size, how many at once, past the cache?

A file system over a network answers late and many at a time: requests are large, several are under way, and the page
cache, through which the kernel asks for little at once, is left out (O_DIRECT). A local disk is read through the cache,
from which a second run reads the same files, unless they would not all stay in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from oneshot.checkpoint.disk.folders import naming

ALIGNED = max(4096, mmap.PAGESIZE)  # O_DIRECT wants memory, first byte and length to be multiples of it
_DIRECT = getattr(os, "O_DIRECT", 0)
_VECTORS = 1024  # views that one call takes (IOV_MAX)

# as /proc/self/mountinfo names them; of FUSE's, which are called fuse.NAME, all are taken to be remote
_REMOTE = {
    "lustre", "gpfs", "beegfs", "wekafs", "panfs", "pvfs2", "ceph", "glusterfs", "afs", "9p", "virtiofs",
    "nfs", "nfs4", "cifs", "smb3",
}  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Storage:
    """How files are read.

    Attributes:
        kind: of file system, as the system names it; "" where it does not say
        block: bytes of a request
        in_flight: requests under way at once, of one process
        direct: whether to leave out the page cache
    """

    kind: str
    block: int
    in_flight: int
    direct: bool


def storage_of(files: Iterable[Path]) -> Storage:
    """Return how the files, which lie in one folder, are best read."""
    real = sorted({os.path.realpath(file) for file in files})
    kind = _kind(os.path.dirname(real[0])) if real else ""
    if kind in _REMOTE or kind.startswith("fuse"):
        return Storage(kind, 16 << 20, 3, direct=True)
    stay = sum(os.stat(file).st_size for file in real) <= _available() / 2
    return Storage(kind, 4 << 20, 8, direct=not stay)


@functools.lru_cache(maxsize=64)
def _kind(folder: str) -> str:
    """The type of the file system that a folder, its links resolved, is on."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of those mounted over one another the last is seen
            best, kind = len(point), after.split()[0]
    return kind


def _available() -> float:
    """Bytes of memory that the page cache may take; unlimited where the system does not say."""
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), float("inf"))


@dataclass
class OpenFile:
    """A file that is being read; ``direct``: past the page cache, for as long as its file system does that."""

    path: Path
    descriptor: int
    direct: bool


@contextlib.contextmanager
def opened(path: Path, direct: bool) -> Iterator[OpenFile]:
    """Open a file to be read, through the page cache where the file system does not know how to leave it out."""
    try:
        file = OpenFile(path, os.open(path, os.O_RDONLY | _DIRECT), bool(_DIRECT)) if direct else None
    except OSError:
        file = None
    file = file or OpenFile(path, os.open(path, os.O_RDONLY), False)
    try:
        yield file
    finally:
        os.close(file.descriptor)


def fill(file: OpenFile, offset: int, views: list[memoryview]) -> int:
    """Read into the views, one after the other; returns how many bytes there were, fewer where the file ends.

    Args:
        offset: in the file; of a direct one a multiple of ALIGNED, as address and length of its views are
    """
    done = reached = 0
    while views:
        try:
            with naming(file.path):
                got = os.preadv(file.descriptor, views[:_VECTORS], offset + done)
        except OSError as error:
            if not file.direct or error.errno != errno.EINVAL:
                raise
            file.direct = False  # opened, but refused
            fcntl.fcntl(file.descriptor, fcntl.F_SETFL, os.O_RDONLY)
            continue
        reached = done + got
        if file.direct and got < len(views[0]):
            got -= got % ALIGNED  # the file's end, or a read cut short: go on from where it may begin
        if got == 0:
            break
        done += got
        views = _behind(views, got)
    return reached


def _behind(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the views after so many bytes."""
    for number, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[number + 1 :]]
        done -= len(view)
    return []
