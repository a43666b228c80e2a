"""Write a Hugging Face checkpoint with all ranks at once: each writes its own ranges of every tensor into the shards.

Rank 0 creates the shard files at full size, with their headers; then every rank writes the bytes that it owns, and
nothing is gathered or sent. The folder appears by one rename when all is written, synced and checked.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from oneshot.checkpoint.disk.files import INDEX, SINGLE, list_tensors
from oneshot.checkpoint.disk.folders import naming, replacing
from oneshot.checkpoint.layout import ITEM_SIZES, Range, partition, tensor_bytes
from oneshot.checkpoint.loading.partitioned import own_tensors
from oneshot.checkpoint.reads.manifest import Pieces, write_manifest
from oneshot.checkpoint.reads.ranges import CHUNK, Piece
from oneshot.checkpoint.reads.traced import Traced, trace_saving
from oneshot.checkpoint.writing.beside import Origin, write_beside
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MAX_SHARD_BYTES, MIN_SHARD_BYTES = 5 * 10**9, 10**9
_NAMES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: its shard file's name, first byte in it, dtype (safetensors name) and shape."""

    shard: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


def stored_form(model: PreTrainedModel) -> dict[str, Traced] | None:
    """Return what a checkpoint stores of the model's tensors, in the order of these; none where it is no ranges."""
    shapes = {name: tuple(getattr(t, "ds_shape", t.shape)) for name, t in own_tensors(model).items()}
    try:
        found = trace_saving(model, shapes)
    except NotImplementedError:
        return None
    place = {name: number for number, name in enumerate(shapes)}
    first = {name: (place[parts.segments[0].name], parts.segments[0].start) for name, parts in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: first[name])}


def plan_shards(
    shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], max_bytes: int = MAX_SHARD_BYTES
) -> tuple[dict[str, Slot], dict[str, bytes]]:
    """Return where each tensor goes, and the header of each shard file (its length prefix included).

    Tensors keep their order; a shard is closed when the next tensor would make it larger than ``max_bytes``. Within a
    shard wider dtypes come first, as in safetensors' own files: each tensor then begins at a multiple of its item size.
    """
    sizes = {name: tensor_bytes(shape, dtypes[name]) for name, shape in shapes.items()}
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + sizes[name] > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += sizes[name]
    slots: dict[str, Slot] = {}
    headers: dict[str, bytes] = {}
    for number, group in enumerate(groups, 1):
        shard = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(group, key=lambda name: -ITEM_SIZES[dtypes[name]]):
            begin, end = end, end + sizes[name]
            entries[name] = {"dtype": dtypes[name], "shape": list(group[name]), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[shard] = struct.pack("<Q", len(text)) + text
        for name, shape in group.items():
            offset = len(headers[shard]) + entries[name]["data_offsets"][0]
            slots[name] = Slot(shard, offset, dtypes[name], shape)
    return slots, headers


def shard_bytes(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], world_size: int) -> int:
    """Return how large shards may be for each rank to have one to begin with: 1 to 5 GB."""
    total = sum(tensor_bytes(shape, dtypes[name]) for name, shape in shapes.items())
    return min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, -(-total // world_size)))


def in_turn(runtime: Runtime, slots: dict[str, Slot]) -> list[str]:
    """Return the tensors in the order in which this rank should write them: each rank begins in another place.

    The system lets one process write into a file at a time; ranks that go through the files side by side would wait.
    """
    names = list(slots)
    ends = list(itertools.accumulate(tensor_bytes(slot.shape, slot.dtype) for slot in slots.values()))
    first = bisect.bisect_right(ends, ends[-1] * runtime.rank // runtime.world_size)
    return names[first:] + names[:first]


def write_sharded(
    runtime: Runtime,
    model: PreTrainedModel,
    origin: Origin,
    folder: Path,
    dtype: torch.dtype,
    *,
    beside: Callable[[Path], None] | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write ``folder`` as a full checkpoint that plain transformers loads, by the names that it stores. Collective.

    Args:
        origin: where the model comes from: what lies beside its weights goes along
        dtype: of the weights in the file; buffers keep their own
        beside: writes further files into the folder, on rank 0, before it appears
        max_bytes: of a shard; none takes ``shard_bytes``

    Raises:
        UserError: on every rank, if any rank could not write; what was at ``folder`` before is still there
    """
    tensors = own_tensors(model)
    parameters, form = {name for name, _ in model.named_parameters()}, stored_form(model)
    assert form is not None, "who calls has looked"
    own = {name: _NAMES[str(dtype if name in parameters else t.dtype)] for name, t in tensors.items()}
    shapes = {name: parts.shape for name, parts in form.items()}
    dtypes = {name: own[parts.segments[0].name] for name, parts in form.items()}
    slots, headers = plan_shards(shapes, dtypes, max_bytes or shard_bytes(shapes, dtypes, runtime.world_size))
    with replacing(runtime, folder) as temporary:
        with agree(runtime, f"creating the checkpoint {folder}"):
            if runtime.is_main:
                if beside is not None:  # first: a marker is there before the shards are
                    beside(temporary)
                create_shards(temporary, slots, headers)
                write_beside(model, origin, temporary, dtype)
        with agree(runtime, f"writing the checkpoint {folder}"):
            written = _write_own(runtime, tensors, form, slots, temporary)
        everything = gather_objects(runtime, written)
        with agree(runtime, f"checking the checkpoint {folder}"):
            if runtime.is_main:
                found = list_tensors(temporary)
                assert {n: e.shape for n, e in found.items()} == shapes, "the index does not list what was written"
                write_manifest(temporary, everything, {})


def create_shards(folder: Path, slots: dict[str, Slot], headers: dict[str, bytes]) -> None:
    """Create shard files at full size, so that a full disk is found now, with their headers and index.

    In plain writes of two processes into one file (ext4) allocated space was faster than holes, 1.3 to 15 times.
    """
    ends: dict[str, int] = {}
    for slot in slots.values():
        ends[slot.shard] = max(ends.get(slot.shard, 0), slot.offset + tensor_bytes(slot.shape, slot.dtype))
    for shard, header in headers.items():
        descriptor = os.open(folder / shard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with naming(folder / shard, sum(ends.values())):
                os.posix_fallocate(descriptor, 0, ends[shard])
                _write_all(descriptor, memoryview(header), 0)
        finally:
            os.close(descriptor)
    if len(headers) > 1:
        total = sum(tensor_bytes(slot.shape, slot.dtype) for slot in slots.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: slot.shard for name, slot in slots.items()}}
        with naming(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_own(
    runtime: Runtime, tensors: dict[str, torch.Tensor], form: dict[str, Traced], slots: dict[str, Slot], folder: Path
) -> Pieces:
    """Write what this rank holds: of each stored tensor the elements that lie in its ranges of the model's tensors."""
    written: Pieces = {}
    with opened_shards(folder, slots) as descriptors:
        for name in each(in_turn(runtime, slots), "weights written", "tensors"):
            slot, written[name] = slots[name], []
            with naming(folder / slot.shard):
                for part, values in _own_parts(runtime, tensors, form[name]):
                    written[name] += write_range(descriptors[slot.shard], slot, part, values)
    return written


def _own_parts(
    runtime: Runtime, tensors: dict[str, torch.Tensor], stored: Traced
) -> Iterator[tuple[Range, torch.Tensor]]:
    """Yield the elements of a stored tensor that this rank holds, and their values."""
    for segment, end in zip(stored.segments, stored.ends):
        tensor = tensors[segment.name]
        own = partition(tuple(getattr(tensor, "ds_shape", tensor.shape)), runtime.rank, runtime.world_size)
        low, high = max(own.start, segment.start), min(own.stop, segment.stop)
        if low < high:
            shift = end - segment.stop  # from the model's tensor to the stored one
            values = _flat(tensor, own)[low - own.start : high - own.start]
            yield Range(low + shift, high + shift, high - low), values


@contextlib.contextmanager
def opened_shards(folder: Path, slots: dict[str, Slot], *, sync: bool = True) -> Iterator[dict[str, int]]:
    """Yield a descriptor to write to by shard name; after the block everything is on the disk, if ``sync``."""
    descriptors = {shard: os.open(folder / shard, os.O_WRONLY) for shard in {slot.shard for slot in slots.values()}}
    try:
        yield descriptors
        for shard, descriptor in descriptors.items() if sync else ():
            with naming(folder / shard):
                os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _flat(tensor: torch.Tensor, own: Range) -> torch.Tensor:
    """This rank's range of a tensor, partitioned or whole, without its padding."""
    partition: torch.Tensor | None = getattr(tensor, "ds_tensor", None)
    if partition is not None:
        assert partition.numel() == own.size, "the partition is not in memory (offloaded to NVMe?)"
        return partition.detach()[: own.numel]
    return tensor.detach().reshape(-1)[own.start : own.stop]


def write_range(descriptor: int, slot: Slot, own: Range, values: torch.Tensor) -> list[Piece]:
    """Write elements ``own`` of a tensor (``values``, flat); return the pieces with checksums."""
    import torch

    dtype = next(getattr(torch, name.removeprefix("torch.")) for name, short in _NAMES.items() if short == slot.dtype)
    item = ITEM_SIZES[slot.dtype]
    step = max(1, CHUNK // item)
    pieces: list[Piece] = []
    for start in range(0, own.numel, step):
        part = values[start : start + step]
        first, stop = own.start + start, own.start + start + len(part)
        data = memoryview(part.to(dtype).cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        pieces.append((first, stop, xxhash.xxh3_64_hexdigest(data)))
        _write_all(descriptor, data, slot.offset + first * item)
    return pieces


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
