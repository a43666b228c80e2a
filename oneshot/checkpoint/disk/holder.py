"""Who holds a lock: what stands in its file, and whether that process runs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


def first_line_of(raw: bytes) -> bytes:
    """What says who holds the lock; the number that is counted up comes after it."""
    return raw.partition(b"\n")[0]


def own_line() -> bytes:
    """Who this is, in a line that no other lock has."""
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), None)
    if job and os.environ.get("SLURM_RESTART_COUNT"):
        job = f"{job}, restart {os.environ['SLURM_RESTART_COUNT']}"
    who = {
        "host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "began": _began(os.getpid()), "where": where(), "token": secrets.token_hex(8),
    }  # fmt: skip
    return json.dumps(who).encode()


def holder_of(raw: bytes) -> dict[str, Any]:
    """What a lock says; nothing if it is damaged."""
    try:
        who = json.loads(first_line_of(raw))
    except (ValueError, RecursionError):
        return {}
    return who if isinstance(who, dict) else {}


def described(raw: bytes) -> str:
    """Return who holds a lock, for people."""
    who = holder_of(raw)
    words = {"pid": "process", "host": "on", "job": "job", "since": "since"}
    said = [f"{word} {who[name]}" for name, word in words.items() if isinstance(who.get(name), (int, str))]
    return "".join(letter for letter in ", ".join(said) if letter.isprintable())[:300] or "it does not say which"


def runs(process: int, began: Any) -> bool:
    """Whether a process of this machine runs, and is not one that got the number of an earlier one."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    found = _began(process)
    return found != "dead" and (not found or not began or found == began)


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did; "dead" of one that has ended; "" where that is not told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError, ValueError):
        return ""


@lru_cache
def where() -> str:
    """What processes share that see each other's numbers: the boot of a machine, and its processes' name space."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
