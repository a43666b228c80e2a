"""What a run uses: memory of this process, peaks of every rank, and how large its model is."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.distributed.phases import OTHER, Spent, peaks, running
from oneshot.distributed.runtime import Runtime, gather_objects

if TYPE_CHECKING:
    from torch import nn

_M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped and unmapped one by one
_SMALL = 10_000_000  # weights


def measured(runtime: Runtime) -> dict[str, Any]:
    """Return peak_rss_bytes and peak_gpu_bytes, one value per rank (GPU: empty without one). Collective."""
    ranks = gather_objects(runtime, peaks())
    return {name: [rank[name] for rank in ranks if name in rank] for name in ("peak_rss_bytes", "peak_gpu_bytes")}


def where_time_went(runtime: Runtime) -> dict[str, Any]:
    """Return what the phases of this run took until now; nothing where no stage opened a clock. Collective.

    Returns:
        phases: name -> seconds of rank 0, which add up to the whole; what belongs to no phase is last
        profile: of a run with details, a row for each phase: phase, seconds and calls (of rank 0), slowest_seconds (of
            the rank that took longest), passes, tokens, read_bytes and written_bytes (of all ranks together),
            tokens_per_second, and peak_rss_bytes and peak_gpu_bytes (of the rank that held most; 0 where none held more
            than before)
    """
    clock = running()
    if clock is None:
        return {}
    ranks = [
        {name: Spent(**spent) for name, spent in rank.items()}
        for rank in gather_objects(runtime, {name: vars(spent) for name, spent in clock.spent.items()})
    ]
    names = [name for name in dict.fromkeys(name for rank in ranks for name in rank) if name != OTHER] + [OTHER]
    first = {name: ranks[0].get(name, Spent()) for name in names}
    found: dict[str, Any] = {"phases": {name: round(spent.seconds, 3) for name, spent in first.items()}}
    if clock.detailed:
        found["profile"] = [_row(name, first[name], [rank.get(name, Spent()) for rank in ranks]) for name in names]
    return found


def _row(name: str, first: Spent, ranks: list[Spent]) -> dict[str, Any]:
    totals = {of: sum(vars(one)[of] for one in ranks) for of in ("passes", "tokens", "read_bytes", "written_bytes")}
    most = {of: max(vars(one)[of] for one in ranks) for of in ("peak_rss_bytes", "peak_gpu_bytes")}
    return {
        "phase": name,
        "seconds": round(first.seconds, 3),
        "slowest_seconds": round(max(one.seconds for one in ranks), 3),
        "calls": first.calls,
        **totals,
        "tokens_per_second": round(totals["tokens"] / first.seconds, 1) if first.seconds else 0.0,
        **most,
    }


def reset_peak() -> int:
    """Set the process's peak resident memory back to what it holds now (Linux), and return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the process's peak resident memory since ``reset_peak``, in bytes (Linux)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Return the process's resident memory in bytes (Linux)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def give_back_freed_memory(runtime: Runtime, weights: int | None = None) -> None:
    """Let glibc return every large block to the system when it is freed (CPU only).

    By default it keeps blocks of up to 32 MiB, each hole of another size: activations, gradients and weights that come
    and go with every layer then hold up to twice what is in use.

    Args:
        weights: how many the model has; for a small one nothing is done, as a tenth of its time would go into mapping
    """
    if runtime.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    if weights is not None and weights < _SMALL:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)  # a fixed value also keeps glibc from raising it


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has, partitioned or whole; packed ones as they are packed."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Leave torch's number of threads as it was: a run on a small model takes one."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
