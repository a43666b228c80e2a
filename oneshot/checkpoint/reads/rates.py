"""How fast a checkpoint's storage is, and how fast the load gets bytes from it: samples of a second each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oneshot.checkpoint.disk.files import TensorEntry, list_tensors
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.reads.ranges import Read, read_all
from oneshot.checkpoint.reads.storage import fill, opened, storage_of
from oneshot.distributed.preflight import Check
from oneshot.distributed.runtime import Runtime, barrier, gather_objects

_MOST, _LEAST = 256 << 20, 16 << 20  # bytes of a rank's sample; of less nothing can be said
_SECONDS = 1.0
_PLAIN = 4 << 20  # bytes of a request of the plain read


@dataclass(frozen=True)
class Rates:
    """Bytes per second of all ranks together, with nothing of it in the page cache.

    Attributes:
        storage: read plainly, in sequence, one request after the other, as dd does
        load: read as the load does
    """

    storage: float
    load: float


def look_at_storage(runtime: Runtime, folder: Path) -> Check:
    """Say what a checkpoint lies on, how it will be read and how fast that is. Collective."""
    shards = sorted({entry.shard for entry in list_tensors(folder).values()})
    way, rates = storage_of(shards), measured_rates(runtime, shards)
    how = f"{way.kind or 'unknown file system'}, {way.in_flight} requests of {way.block >> 20} MiB at a time"
    how += " past the page cache" if way.direct else ""
    if rates is None:
        return Check("storage", f"{how}, too small a checkpoint to be timed")
    return Check(
        "storage",
        f"{how}: {rates.load / 1e9:.2f} GB/s, {rates.load / rates.storage:.2f} of the {rates.storage / 1e9:.2f} GB/s "
        "of plain reading",
    )


def measured_rates(runtime: Runtime, shards: list[Path]) -> Rates | None:
    """Time both ways on samples that no two ranks share; none where the shards are too small. Collective."""
    import torch

    shard, slot = shards[runtime.rank % len(shards)], runtime.rank // len(shards)
    share = os.stat(shard).st_size // -(-runtime.world_size // len(shards))
    first, second, most = slot * share, slot * share + share // 2, min(share // 2, _MOST)
    if min(gather_objects(runtime, most)) < _LEAST:
        return None
    size, storage = _timed(runtime, lambda: _read_plainly(shard, first, most))
    # into the same memory over and over, as plain reading does: what new memory costs is not the storage's
    out = torch.ones(min(size, _LEAST), dtype=torch.uint8, device=runtime.device)
    entry, parts = TensorEntry(shard, "U8", (size,), second), range(0, size, len(out))
    ranges = [Range(start, min(start + len(out), size), len(out)) for start in parts]
    _leave_cache(shard, second, size)

    def read_as_loading() -> int:
        read_all(Read(entry, wanted, out[: wanted.numel]) for wanted in ranges)
        return size

    _, load = _timed(runtime, read_as_loading)
    return Rates(storage, load)


def _timed(runtime: Runtime, read: Callable[[], int]) -> tuple[int, float]:
    """The bytes that this rank has read, and the bytes per second of all ranks, which begin together."""
    barrier(runtime)
    clock = time.perf_counter()
    size = read()
    ranks = gather_objects(runtime, (size, time.perf_counter() - clock))
    return size, sum(done for done, _ in ranks) / max(seconds for _, seconds in ranks)


def _read_plainly(path: Path, first: int, most: int) -> int:
    """Read in sequence, for a second at most; returns the bytes."""
    done, deadline, memory = 0, time.perf_counter() + _SECONDS, memoryview(bytearray(_PLAIN))
    _leave_cache(path, first, most)
    with opened(path, direct=False) as file:
        while done < most and time.perf_counter() < deadline:
            done += fill(file, first + done, [memory[: most - done]])
    return done


def _leave_cache(path: Path, first: int, size: int) -> None:
    with opened(path, direct=False) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, first, size, os.POSIX_FADV_DONTNEED)
