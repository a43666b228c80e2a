"""Show a folder through a file system as slow as one over a network: each request waits, and all share a rate.

    python benchmarks/storage/slow.py FOLDER MOUNTPOINT --seconds 0.01 --rate 4e8

Read only, until it is killed or unmounted. Needs FUSE (Debian: fuse3) and ``pip install mfusepy``. The kernel asks it
for 128 KiB at a time through the page cache, and for many larger requests at once past it, as it does of the clients
of many network file systems.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

import mfusepy

_SHOWN = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")


class Slow(mfusepy.Operations):  # type: ignore[misc]
    """The folder's files, their bytes late.

    Args:
        seconds: that each request takes, however small
        rate: bytes per second of all requests together
    """

    use_ns = True

    def __init__(self, folder: Path, seconds: float, rate: float) -> None:
        self.folder, self.seconds, self.rate = folder, seconds, rate
        self.in_turn, self.free = threading.Lock(), 0.0

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.stat(f"{self.folder}{path}")
        return {name: getattr(found, name) for name in _SHOWN}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(f"{self.folder}{path}")]

    def open(self, path: str, flags: int) -> int:
        return os.open(f"{self.folder}{path}", os.O_RDONLY)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        now = time.monotonic()
        with self.in_turn:
            self.free = max(self.free, now) + size / self.rate
            done = self.free + self.seconds
        data = os.pread(fh, size, offset)
        time.sleep(max(0.0, done - time.monotonic()))
        return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("mountpoint")
    parser.add_argument("--seconds", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=4e8)
    options = parser.parse_args()
    slow = Slow(options.folder.resolve(), options.seconds, options.rate)
    mfusepy.FUSE(slow, options.mountpoint, foreground=True, ro=True)
