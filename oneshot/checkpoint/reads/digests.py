"""Digests of a checkpoint's tensors, every byte of them: what tells it from any other.

They do not depend on how it is cut into shards. Where its manifest has the checksums that they are made of, no weight
is read; else the files are read once, in parallel, and what was found is kept in the user's cache by path, size and
time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from oneshot.checkpoint.disk.files import TensorEntry, list_tensors
from oneshot.checkpoint.layout import ITEM_SIZES, tensor_bytes
from oneshot.checkpoint.reads.manifest import Pieces, read_pieces
from oneshot.checkpoint.reads.ranges import CHUNK
from oneshot.data.cache import folder_of, put
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import BYTES, steps
from oneshot.errors import UserError

_THREADS = min(8, os.cpu_count() or 1)
_HASHED = "weights hashed"
_YOUNG = 2.0  # seconds: a file that has just changed may change again within the clock's tick


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return a digest of each tensor of a checkpoint: of its dtype, shape and all of its bytes."""
    tensors = list_tensors(folder)
    found = _from_manifest(tensors, read_pieces(folder, tensors))
    by_shard: dict[Path, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        if name not in found:
            by_shard[entry.shard][name] = entry
    total = sum(_size(entry) for entries in by_shard.values() for entry in entries.values())
    with steps(_HASHED, total, BYTES) as going:
        for shard, entries in by_shard.items():
            before = going.done
            found |= _of_shard(shard, entries)
            going.add(before + sum(map(_size, entries.values())) - going.done)  # of those that were known
    return found


def list_hash(tensors: dict[str, TensorEntry]) -> str:
    """Return a hash of the names, dtypes and shapes of a checkpoint's tensors."""
    rows = [[name, entry.dtype, list(entry.shape)] for name, entry in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """Return a hash that tells a checkpoint from all others."""
    return hashlib.sha256(json.dumps(sorted(tensor_digests(folder).items())).encode()).hexdigest()


def shared_fingerprint(runtime: Runtime, folder: Path) -> str:
    """Return the ``fingerprint``, which rank 0 takes for all. Collective."""
    found = ""
    with agree(runtime, f"reading {folder}"):
        if runtime.is_main:
            found = fingerprint(folder)
    return gather_objects(runtime, found)[0]


def _size(entry: TensorEntry) -> int:
    return tensor_bytes(entry.shape, entry.dtype)


def _step(entry: TensorEntry) -> int:
    return CHUNK // ITEM_SIZES[entry.dtype]


def _digest(entry: TensorEntry, checksums: list[str]) -> str:
    told = json.dumps([entry.dtype, list(entry.shape), checksums])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _from_manifest(tensors: dict[str, TensorEntry], pieces: Pieces) -> dict[str, str]:
    """Digests of those whose checksums are of 16 MiB each, as they are where one rank wrote the tensor."""
    found = {}
    for name, parts in pieces.items():
        entry = tensors[name]
        if all(start % _step(entry) == 0 for start, _, _ in parts):
            found[name] = _digest(entry, [checksum for _, _, checksum in parts])
    return found


def _of_shard(shard: Path, entries: dict[str, TensorEntry]) -> dict[str, str]:
    state = os.stat(shard)
    key = json.dumps([os.path.realpath(shard), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    kept = folder_of("digests") / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    known = _kept(kept, key)
    if entries.keys() <= known.keys():
        return {name: known[name] for name in entries}
    found = _hashed(shard, entries)
    if time.time() - max(state.st_mtime, state.st_ctime) > _YOUNG:
        put(json.dumps({"key": key, "digests": {**known, **found}}).encode(), kept)
    return found


def _kept(path: Path, key: str) -> dict[str, str]:
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
        found = held["digests"] if held["key"] == key else {}
        return found if isinstance(found, dict) and all(isinstance(one, str) for one in found.values()) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _hashed(shard: Path, entries: dict[str, TensorEntry]) -> dict[str, str]:
    descriptor = os.open(shard, os.O_RDONLY)

    def checksum(offset: int, size: int) -> str:
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{shard} ended too soon: the file was cut off, copy it again.")
        return xxhash.xxh3_64_hexdigest(data)

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            coming = {}
            for name, entry in entries.items():
                size = _size(entry)
                starts = range(0, size, _step(entry) * ITEM_SIZES[entry.dtype])
                coming[name] = [
                    pool.submit(checksum, entry.offset + start, min(starts.step, size - start)) for start in starts
                ]
            digests = {}
            with steps(_HASHED, sum(map(_size, entries.values())), BYTES) as going:
                for name, parts in coming.items():
                    digests[name] = _digest(entries[name], [one.result() for one in parts])
                    going.add(_size(entries[name]))
            return digests
    finally:
        os.close(descriptor)
