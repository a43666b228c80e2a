"""What is looked at before a run on several machines reads its checkpoint: do ranks see the same, and can they talk?

Seconds, against the minutes or hours after which these would show otherwise, on one machine of many and namelessly.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, all_reduce_sum, barrier, gather_objects
from oneshot.errors import UserError
from oneshot.versions import PACKAGES, package_version

if TYPE_CHECKING:
    import torch

_PACKAGES = (*PACKAGES, "safetensors")
_REDUCED = {"cpu": 1 << 21, "cuda": 1 << 26}  # elements of the all-reduce that is timed: 8 and 256 MB
_FREE = 0.8  # share of a GPU's memory that nobody else may hold
_SKEW = 5.0  # seconds between clocks; file times and logs of the machines could not be compared beyond
_VISIBLE_WITHIN = 10.0  # seconds until a file written on one machine is to be seen on the others (NFS caches)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what
        found: what was seen, for people
        culprit: what is wrong and on which machine; empty if all is well
    """

    name: str
    found: str
    culprit: str = ""


def machines(runtime: Runtime) -> int:
    """Return on how many machines the ranks run. Collective."""
    return len(set(gather_objects(runtime, _host())))


@phase("preflight")
def preflight(runtime: Runtime, folder: Path, needed: int) -> list[Check]:
    """Look at one thing after the other, on all ranks, up to the first that is wrong. Collective; alike on every rank.

    Args:
        folder: where the run writes; all ranks must see it
        needed: bytes that the run will write there
    """
    hosts = gather_objects(runtime, _host())
    looks: list[Callable[[], Check]] = [
        lambda: _software(runtime, hosts),
        lambda: _clocks(runtime, hosts),
        lambda: _folder(runtime, hosts, folder),
        lambda: _space(runtime, hosts, folder, needed),
        lambda: _all_reduce(runtime, hosts),
    ]
    if runtime.device.type == "cuda":
        looks.append(lambda: _gpus(runtime, hosts))
    checks: list[Check] = []
    for look in looks:
        checks.append(look())
        if checks[-1].culprit:  # a folder that is not there, for one, has no free space either
            break
    return checks


def refuse(checks: list[Check]) -> None:
    """Raise UserError with the first culprit, if there is one."""
    for check in checks:
        if check.culprit:
            raise UserError(f"Preflight: {check.culprit}")


def _software(runtime: Runtime, hosts: list[str]) -> Check:
    mine = {"python": platform.python_version(), "code": _code()}
    mine |= {name: package_version(name) or "missing" for name in _PACKAGES}
    ranks = gather_objects(runtime, mine)
    for rank, theirs in enumerate(ranks):
        for name, version in theirs.items():
            if version != ranks[0][name]:
                return Check(
                    "software",
                    f"{name} differs",
                    f"rank {rank} on {hosts[rank]} has {name} {version}, rank 0 on {hosts[0]} has {ranks[0][name]}: "
                    "give all machines the same environment.",
                )
    return Check("software", f"torch {mine['torch']}, oneshot's code {mine['code']} on all ranks")


def _code() -> str:
    """A hash of the package's source files."""
    import oneshot

    assert oneshot.__file__ is not None
    digest = hashlib.sha256()
    for path in sorted(Path(oneshot.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _clocks(runtime: Runtime, hosts: list[str]) -> Check:
    barrier(runtime)
    times = gather_objects(runtime, time.time())
    off = [abs(t - sorted(times)[len(times) // 2]) for t in times]
    rank = off.index(max(off))
    culprit = f"the clock of {hosts[rank]} is {off[rank]:.0f} s off the others': synchronize it (NTP)."
    return Check("clocks", f"within {max(off):.1f} s", culprit if off[rank] > _SKEW else "")


def _folder(runtime: Runtime, hosts: list[str], folder: Path) -> Check:
    """Every rank writes a file, and sees those of all ranks."""
    name = gather_objects(runtime, f".oneshot-preflight-{os.getpid()}-{time.time_ns()}")[0]
    problem, shown = "", gather_objects(runtime, str(folder))[0]
    try:
        (folder / f"{name}-{runtime.rank}").write_text(str(runtime.rank), encoding="utf-8")
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
    barrier(runtime)
    wanted = [folder / f"{name}-{rank}" for rank in range(runtime.world_size)]
    deadline = time.monotonic() + _VISIBLE_WITHIN
    problems = gather_objects(runtime, problem)
    if not any(problems):
        missing = [rank for rank, path in enumerate(wanted) if not path.exists()]
        while missing and time.monotonic() < deadline:
            time.sleep(0.2)
            os.listdir(folder)  # has NFS look again
            missing = [rank for rank, path in enumerate(wanted) if not path.exists()]
        problem = f"does not show what rank {missing[0]} on {hosts[missing[0]]} wrote there" if missing else ""
        problems = gather_objects(runtime, problem)
    barrier(runtime)
    wanted[runtime.rank].unlink(missing_ok=True)
    for rank, found in enumerate(problems):
        if found:
            return Check(
                "shared folder", "not shared", f"{shown} {found}, seen from rank {rank} on {hosts[rank]}: name a "
                "folder that all machines share and may write.",
            )  # fmt: skip
    return Check("shared folder", f"{folder} is written and seen by all ranks")


def _space(runtime: Runtime, hosts: list[str], folder: Path, needed: int) -> Check:
    free, shown = gather_objects(runtime, shutil.disk_usage(folder).free), gather_objects(runtime, str(folder))[0]
    rank = free.index(min(free))
    culprit = f"{shown} has {free[rank] / 1e9:.1f} GB free on {hosts[rank]}, and the run writes {needed / 1e9:.1f} GB."
    return Check("free disk", f"{free[rank] / 1e9:.0f} GB", culprit if free[rank] < needed else "")


def _all_reduce(runtime: Runtime, hosts: list[str]) -> Check:
    """Sums that are exact in fp32, right on every rank; then the rate at which they come."""
    import torch

    size = _REDUCED[runtime.device.type]
    values = torch.arange(size, device=runtime.device, dtype=torch.float32) % 251
    wanted = values * (runtime.world_size * (runtime.world_size + 1) / 2)
    seconds = []
    for _ in range(3):
        barrier(runtime)
        clock = time.perf_counter()
        total = all_reduce_sum(runtime, values * (runtime.rank + 1))
        _wait(total)
        seconds.append(time.perf_counter() - clock)
    right = gather_objects(runtime, bool(torch.equal(total, wanted)))
    rate = 2 * (runtime.world_size - 1) / runtime.world_size * values.nbytes / sorted(seconds)[1]
    culprit = ""
    if not all(right):
        rank = right.index(False)
        culprit = f"rank {rank} on {hosts[rank]} got a wrong sum from an all-reduce: check its network and GPU."
    return Check("all-reduce", f"right on all ranks, {min(gather_objects(runtime, rate)) / 1e9:.2f} GB/s", culprit)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.synchronize(tensor.device)


def _gpus(runtime: Runtime, hosts: list[str]) -> Check:
    """A product whose result is known, and memory that nobody else holds."""
    import torch

    free, total = torch.cuda.mem_get_info(runtime.device)
    ones = torch.ones(1024, 1024, device=runtime.device, dtype=torch.bfloat16)
    mine: dict[str, Any] = {"right": bool((ones @ ones == 1024).all()), "free": free / total, "total": total}
    ranks = gather_objects(runtime, mine)
    for rank, gpu in enumerate(ranks):
        if not gpu["right"]:
            return Check(
                "GPUs", "wrong result", f"the GPU of rank {rank} on {hosts[rank]} multiplies wrongly: replace it."
            )
        if gpu["free"] < 0.8:
            culprit = (
                f"the GPU of rank {rank} on {hosts[rank]} has only {gpu['free']:.0%} of its memory free: end what "
            )
            return Check("GPUs", "in use", f"{culprit}else runs there.")
    return Check("GPUs", f"{len(ranks)} of {min(gpu['total'] for gpu in ranks) / 2**30:.0f} GiB, computing and free")


def _host() -> str:
    return socket.gethostname()
