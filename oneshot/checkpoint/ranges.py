"""Read element ranges of tensors straight from safetensors files: no more bytes than asked for, no full tensor.

Bytes that a manifest has checksums of are compared with them on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import xxhash

from oneshot.checkpoint.files import MANIFEST, TensorEntry
from oneshot.checkpoint.folders import naming
from oneshot.checkpoint.layout import ITEM_SIZES, Range
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes per read, and of a piece with a checksum: bounds the extra memory of a reader
Piece = tuple[int, int, str]  # first element of a tensor, last + 1, XXH3-64 of their bytes (hexadecimal)


def read_range(
    entry: TensorEntry, wanted: Range, out: torch.Tensor, name: str = "a tensor", pieces: Sequence[Piece] = ()
) -> None:
    """Fill the first ``wanted.numel`` elements of ``out`` with that range of the tensor; the rest becomes zero.

    A piece is checked by whoever wants its first element, so that ranks which share a tensor check each piece once.
    Where it goes on beyond the range, what is missing is read for the check alone.

    Args:
        out: (wanted.size,), contiguous, on any device; its dtype may differ from the file's
        name: the tensor's, for messages
        pieces: the whole tensor's, in order, of CHUNK bytes at most; none checks nothing

    Raises:
        UserError: the file ends too soon, its dtype cannot be read, or its bytes are not those that were written
    """
    import torch

    dtype = torch_dtype(entry, name)
    out[wanted.numel :] = 0
    direct = dtype == out.dtype and out.device.type == "cpu"
    descriptor = os.open(entry.shard, os.O_RDONLY)
    try:
        for start, stop, piece in _spans(wanted, pieces, max(1, CHUNK // ITEM_SIZES[entry.dtype])):
            place = slice(start - wanted.start, stop - wanted.start)
            part = out[place] if direct else torch.empty(stop - start, dtype=dtype)
            data = memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]
            _fill(descriptor, entry, start, data, name)
            if piece is not None:
                _check(descriptor, entry, piece, data, stop, name)
            if not direct:
                out[place] = part.to(out.device, out.dtype)
    finally:
        os.close(descriptor)


def check_piece(entry: TensorEntry, piece: Piece, name: str) -> None:
    """Read a piece for its checksum alone.

    Raises:
        UserError: as ``read_range``
    """
    descriptor = os.open(entry.shard, os.O_RDONLY)
    try:
        _check(descriptor, entry, piece, memoryview(b""), piece[0], name)
    finally:
        os.close(descriptor)


def _spans(wanted: Range, pieces: Sequence[Piece], most: int) -> Iterator[tuple[int, int, Piece | None]]:
    """Cut a range where the pieces that it has to check begin, and what it need not check into ``most`` elements."""
    own = [piece for piece in pieces if wanted.start <= piece[0] < wanted.stop]
    first = own[0][0] if own else wanted.stop
    for start in range(wanted.start, first, most):
        yield start, min(start + most, first), None
    for piece in own:
        yield piece[0], min(piece[1], wanted.stop), piece


def _check(descriptor: int, entry: TensorEntry, piece: Piece, read: memoryview, stop: int, name: str) -> None:
    """Compare a piece with its checksum; ``read`` are its bytes up to element ``stop``, the others are read here."""
    start, end, wanted = piece
    digest = xxhash.xxh3_64(read)
    if stop < end:
        rest = memoryview(bytearray((end - stop) * ITEM_SIZES[entry.dtype]))
        _fill(descriptor, entry, stop, rest, name)
        digest.update(rest)
    if digest.hexdigest() != wanted:
        raise UserError(
            f"{entry.shard} was altered: {name} does not have the checksum that {MANIFEST} gives for elements {start} "
            f"to {end}; copy the file again."
        )


def _fill(descriptor: int, entry: TensorEntry, start: int, out: memoryview, name: str) -> None:
    """Read the bytes of a tensor from element ``start`` on."""
    offset, done = entry.offset + start * ITEM_SIZES[entry.dtype], 0
    while done < len(out):
        with naming(entry.shard):
            got = os.preadv(descriptor, [out[done:]], offset + done)
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
