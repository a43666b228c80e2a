"""Read element ranges of tensors straight from safetensors files: no more bytes than asked for, no full tensor."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

from oneshot.checkpoint.files import TensorEntry
from oneshot.checkpoint.folders import naming
from oneshot.checkpoint.layout import ITEM_SIZES, Range
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

_CHUNK = 64 << 20  # bytes per read where the dtype changes on the way: bounds the extra memory


def read_range(entry: TensorEntry, wanted: Range, out: torch.Tensor, name: str = "a tensor") -> None:
    """Fill the first ``wanted.numel`` elements of ``out`` with that range of the tensor; the rest becomes zero.

    Args:
        out: (wanted.size,), contiguous, on any device; its dtype may differ from the file's
        name: the tensor's, for messages

    Raises:
        UserError: the file ends too soon, or its dtype cannot be read
    """
    import torch

    dtype = torch_dtype(entry, name)
    item = ITEM_SIZES[entry.dtype]
    out[wanted.numel :] = 0
    descriptor = os.open(entry.shard, os.O_RDONLY)
    try:
        if dtype == out.dtype and out.device.type == "cpu":
            _fill(descriptor, entry, entry.offset + wanted.start * item, out[: wanted.numel], name)
            return
        step = max(1, _CHUNK // item)
        for start in range(0, wanted.numel, step):
            stop = min(start + step, wanted.numel)
            part = torch.empty(stop - start, dtype=dtype)
            _fill(descriptor, entry, entry.offset + (wanted.start + start) * item, part, name)
            out[start:stop] = part.to(out.device, out.dtype)
    finally:
        os.close(descriptor)


def range_checksum(entry: TensorEntry, start: int, stop: int, name: str = "a tensor") -> int:
    """Return the CRC-32 of the bytes of elements ``start`` to ``stop`` as they are in the file."""
    import torch

    item, checksum = ITEM_SIZES[entry.dtype], 0
    descriptor = os.open(entry.shard, os.O_RDONLY)
    try:
        for offset in range(start * item, stop * item, _CHUNK):
            part = torch.empty(min(_CHUNK, stop * item - offset), dtype=torch.uint8)
            _fill(descriptor, entry, entry.offset + offset, part, name)
            checksum = zlib.crc32(part.numpy(), checksum)  # type: ignore[arg-type]
    finally:
        os.close(descriptor)
    return checksum


def _fill(descriptor: int, entry: TensorEntry, offset: int, out: torch.Tensor, name: str) -> None:
    """Read bytes into the memory of a CPU tensor."""
    import torch

    if not out.numel():
        return
    view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        with naming(entry.shard):
            got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise UserError(f"{entry.shard} ended in the middle of {name}: the file was cut off, copy it again.")
        done += got


def torch_dtype(entry: TensorEntry, name: str) -> torch.dtype:
    """Return torch's dtype of a stored tensor; UserError if it has none that oneshot reads."""
    import torch

    names = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    }  # fmt: skip
    if entry.dtype not in names:
        raise UserError(f"{entry.shard} holds {name} as {entry.dtype}, which oneshot cannot partition.")
    return names[entry.dtype]
