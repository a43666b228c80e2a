"""Is a checkpoint or training state whole? Every byte is read once, one tensor range at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapter import read_adapter
from oneshot.checkpoint.files import (
    ADAPTER_TENSORS,
    MANIFEST,
    TensorEntry,
    is_adapter,
    list_tensors,
    read_header,
    read_json,
)
from oneshot.checkpoint.layout import FLOATS, Range, tensor_bytes
from oneshot.checkpoint.ranges import range_checksum, read_range, torch_dtype

_CHUNK = 16 << 20  # elements read at a time


@dataclass
class Shard:
    """What was found in one shard file: its tensors, their bytes and dtypes, and what is wrong with it."""

    name: str
    tensors: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def verify(folder: Path) -> list[Shard]:
    """Check every tensor of a checkpoint, adapter or training state: not empty, finite, and as its manifest says.

    Raises:
        UserError: a shard is missing or cut off, or the index does not fit the shards
    """
    tensors = _tensors(folder)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    shards: dict[str, Shard] = {}
    for name, entry in tensors.items():
        shard = shards.setdefault(entry.shard.name, Shard(entry.shard.name))
        shard.tensors += 1
        shard.bytes += tensor_bytes(entry.shape, entry.dtype)
        shard.dtypes.add(entry.dtype)
        shard.problems += [f"{name} {problem}" for problem in _problems(entry, manifest.get("pieces", {}).get(name))]
    for file, size in manifest.get("files", {}).items():
        path = folder / Path(file).name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            shard = shards.setdefault(path.name, Shard(path.name))
            shard.problems.append(f"has {found} bytes, the manifest says {size}" if found else "is missing")
    return list(shards.values())


def _tensors(folder: Path) -> dict[str, TensorEntry]:
    if is_adapter(folder):
        read_adapter(folder)
        return read_header(folder / ADAPTER_TENSORS)
    return list_tensors(folder)


def _problems(entry: TensorEntry, pieces: list[list[int]] | None) -> Iterator[str]:
    total = math.prod(entry.shape)
    if total == 0:
        yield "is empty"
    elif entry.dtype in FLOATS:
        bad = sum(int((~part.isfinite()).sum()) for part in _parts(entry, 0, total))
        if bad:
            yield f"holds {bad} values that are not finite"
    for start, stop, checksum in pieces or []:
        if range_checksum(entry, start, stop) != checksum:
            yield f"does not have its checksum in elements {start} to {stop}"
            break


def _parts(entry: TensorEntry, start: int, stop: int) -> Iterator[Any]:
    """Elements start to stop in the file's dtype, a bounded number at a time."""
    import torch

    dtype = torch_dtype(entry, str(entry.shard))
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        part = torch.empty(last - first, dtype=dtype)
        read_range(entry, Range(first, last, last - first), part)
        yield part
