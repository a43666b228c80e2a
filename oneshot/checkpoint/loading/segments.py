"""Read any range of a model's tensors from a checkpoint that holds them under other names, in parts or merged.

Each tensor is an ordered list of contiguous ranges of stored ones; no more bytes are read than asked for, and checked
against the manifest on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.disk.files import TensorEntry, find_weight, list_tensors
from oneshot.checkpoint.layout import FLOATS, ITEM_SIZES, Range
from oneshot.checkpoint.quantized.scaled import Scaled, numbers, scaled_tensors
from oneshot.checkpoint.reads.manifest import Pieces, read_pieces
from oneshot.checkpoint.reads.ranges import Read, read_all
from oneshot.checkpoint.reads.traced import Loading, Segment, Traced, trace_loading, whole
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stored:
    """A checkpoint's files as a model's tensors.

    Attributes:
        folder: of the checkpoint
        tensors: what its files hold, by the files' names
        pieces: their checksums
        loading: how the model's tensors are made of them
        scaled: what they hold in fewer bits with scales, by the name of the numbers
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    pieces: Pieces
    loading: Loading
    scaled: dict[str, Scaled] = field(default_factory=dict)

    def is_float(self, segment: Segment) -> bool:
        """Return whether a range is of floating-point numbers, or of what stands for them."""
        return segment.name in self.scaled or self.entry(segment).dtype in FLOATS

    def entry(self, segment: Segment) -> TensorEntry:
        """Return the stored tensor that a range is of, which is not in fewer bits with scales."""
        return self.tensors[segment.stored]

    def behind(self, segment: Segment) -> tuple[str, TensorEntry, Range]:
        """Return the stored tensor that a range is read of, and which of its elements."""
        if (scaled := self.scaled.get(segment.name)) is not None:
            wanted = scaled.stored_range(segment.start, segment.stop)
            return scaled.name, dataclasses.replace(scaled.entry, dtype="U8"), wanted
        start, stop, entry = segment.start, segment.stop, self.entry(segment)
        if segment.is_turned and start < stop:  # whole matrices
            each = math.prod(entry.shape[-2:])
            start, stop = start // each * each, -(-stop // each) * each
        return segment.stored, entry, Range(start, stop, stop - start)

    def files_names(self, name: str) -> set[str]:
        """Return what the files call that which a tensor is made of: itself, or its bytes and their scales."""
        scaled = self.scaled.get(name)
        return {name} if scaled is None else {scaled.name, scaled.scales[0]}

    def nbytes(self, parts: Traced) -> int:
        """Return how many bytes of the files a tensor takes."""
        behind = (self.behind(segment) for segment in parts.segments)
        return sum(wanted.numel * ITEM_SIZES[entry.dtype] for _, entry, wanted in behind)


def open_stored(folder: Path, model: Any = None) -> Stored:
    """Return what a folder holds, as the tensors of a model.

    Args:
        model: on any device, also partitioned; none: every tensor is by its stored name

    Raises:
        UserError: as ``list_tensors`` and ``read_pieces``
    """
    return checked(described(folder, list_tensors(folder), model))


def described(folder: Path, tensors: dict[str, TensorEntry], model: Any = None) -> Stored:
    """Do as ``open_stored`` with tensors that are known, and leave the checksums out."""
    scaled = scaled_tensors(folder, tensors)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    shapes |= {name: each.shape for name, each in scaled.items()}
    loading = Loading(whole(shapes), {}, []) if model is None else trace_loading(model, shapes)
    return Stored(folder, tensors, {}, loading, scaled)


def checked(stored: Stored) -> Stored:
    """Return the same with the checksums of its manifest, where it has one.

    Raises:
        UserError: as ``read_pieces``
    """
    return dataclasses.replace(stored, pieces=read_pieces(stored.folder, stored.tensors))


def parts_of(stored: Stored, name: str) -> Traced:
    """Return the ranges that a tensor of the model is.

    Raises:
        UserError: the checkpoint lacks it, or holds it in a form that is no list of ranges
    """
    found, reason = stored.loading.made.get(name), stored.loading.reasons.get(name)
    if found is None and reason is not None:
        raise UserError(f"{stored.folder} cannot be read tensor by tensor, as {reason}: save it again as one that can.")
    if found is None and (other := find_weight(stored.tensors, name.removesuffix(".weight"))) is not None:
        return whole({other: stored.tensors[other].shape})[other]
    if found is None:
        of = name.removesuffix(".weight")
        raise UserError(f"{stored.folder} holds no weight for {of}: is it a checkpoint of the same architecture?")
    return found


def matrix_in(stored: Stored, name: str, target: Any) -> Traced:
    """Return the ranges that a target's matrix is: of a linear layer (m, n), of an expert as its parameter holds it.

    Args:
        target: an ``ExpertMatrix``, or a linear layer named ``name``

    Raises:
        UserError: as ``parts_of``; or the experts are others than the model's
    """
    if not isinstance(target, ExpertMatrix):
        return parts_of(stored, f"{name}.weight")
    held = parts_of(stored, target.parameter)
    own, shape = expert_range(target)
    if held.shape[1:] != shape or own.stop > math.prod(held.shape):
        raise UserError(
            f"{stored.folder} holds {target.parameter} of shape {list(held.shape)}, where an expert's matrix in the "
            f"model is {list(shape)}: give a checkpoint of the same architecture."
        )
    return Traced(shape, tuple(held.take(own.start, own.stop)))


def expert_range(matrix: ExpertMatrix) -> tuple[Range, tuple[int, int]]:
    """Return which elements of its parameter an expert's matrix is, and its shape there."""
    shape = (matrix.out_features, matrix.in_features)
    numel = math.prod(shape)
    return Range(matrix.index * numel, (matrix.index + 1) * numel, numel), shape[::-1] if matrix.transposed else shape


def range_reads(stored: Stored, parts: Traced, wanted: Range, out: torch.Tensor, sign: int = 0) -> list[Read]:
    """Return the reads that fill ``out`` with a range of a tensor.

    Args:
        wanted: elements of the tensor, flattened
        out: (wanted.size,), as of ``Read``; beyond ``wanted.numel`` it becomes zero
        sign: 1 or -1 adds or subtracts what is read, for which ``out`` is on the CPU; 0 puts it there
    """
    segments = list(parts.take(wanted.start, wanted.stop))
    if not segments:  # an empty partition: a read of nothing, which zeroes the padding
        end = parts.segments[-1].stop
        segments = [Segment(parts.segments[-1].name, end, end)]
    reads, at = [], 0
    for segment in segments:
        numel = segment.stop - segment.start
        name, entry, part = stored.behind(segment)
        place, take = out[at : at + numel], None
        if segment.name in stored.scaled:
            take = _unscaled(stored.scaled[segment.name], segment, place, sign)
            place = place.new_zeros(1).expand(part.numel)  # nothing is put there
        elif segment.is_turned:
            take = _turned(entry.shape, segment, place, sign)
            place = place.new_zeros(1).expand(part.numel)
        elif sign:
            take = _added(segment, place, sign)
        reads.append(Read(entry, part, place, name, stored.pieces.get(name, ()), take))
        at += numel
    out[wanted.numel :] = 0
    return reads


_AT_ONCE = 1 << 20  # numbers put in place at a time
_ONE_AT_A_TIME = threading.Lock()  # two files' requests for the same elements may come in at once


def _added(segment: Segment, place: torch.Tensor, sign: int) -> Callable[[int, torch.Tensor], None]:
    def take(start: int, values: torch.Tensor) -> None:
        with _ONE_AT_A_TIME:
            place[start - segment.start :][: len(values)].add_(values, alpha=sign)

    return take


def _unscaled(scaled: Scaled, segment: Segment, place: torch.Tensor, sign: int) -> Callable[[int, torch.Tensor], None]:
    """What puts the numbers of a range where they go, of bytes and their scales."""
    scales = functools.cache(scaled.read_scales)

    def take(start: int, data: torch.Tensor) -> None:
        for at, values in numbers(scaled, scales(), start, data):
            _put(segment, place, sign, at, values)

    return take


def _turned(
    shape: tuple[int, ...], segment: Segment, place: torch.Tensor, sign: int
) -> Callable[[int, torch.Tensor], None]:
    """What puts the numbers of a range where they go, of whole matrices that are stored as their transposes.

    Args:
        shape: as stored
    """
    import torch

    rows, columns = shape[-2:]

    def take(start: int, values: torch.Tensor) -> None:
        for begin in range(0, len(values), _AT_ONCE):
            part = values[begin : begin + _AT_ONCE]
            where = torch.arange(start + begin, start + begin + len(part))
            row, column = where // columns, where % columns  # rows of all matrices
            at = (row // rows * columns + column) * rows + row % rows
            _put(segment, place, sign, at, part)

    return take


def _put(segment: Segment, place: torch.Tensor, sign: int, at: torch.Tensor, values: torch.Tensor) -> None:
    """Put or add numbers where they go, those that are within the range.

    Args:
        at: which elements of the tensor they are, int64 (n,), each once
    """
    inside = (at >= segment.start) & (at < segment.stop)
    at, found = (at[inside] - segment.start).to(place.device), values[inside].to(place.device, place.dtype)
    with _ONE_AT_A_TIME:
        place[at] = place[at] + sign * found if sign else found


def read_matrix(stored: Stored, name: str, target: Any) -> torch.Tensor:
    """Return a target's matrix (m, n) as it multiplies, fp32, on the CPU.

    Args:
        target: as of ``matrix_in``

    Raises:
        UserError: as ``matrix_in`` and ``read_in_order``
    """
    return as_it_multiplies(_read(stored, matrix_in(stored, name, target)), target)


def read_parameter(stored: Stored, name: str) -> torch.Tensor:
    """Return a tensor of the model whole, fp32, on the CPU.

    Raises:
        UserError: as ``parts_of`` and ``read_in_order``
    """
    return _read(stored, parts_of(stored, name))


def _read(stored: Stored, parts: Traced) -> torch.Tensor:
    import torch

    numel = math.prod(parts.shape)
    values = torch.empty(numel)
    read_all(range_reads(stored, parts, Range(0, numel, numel), values))
    return values.view(parts.shape)


def as_it_multiplies(values: torch.Tensor, target: Any) -> torch.Tensor:
    """Return a matrix, as a parameter holds it, as (m, n)."""
    return values.T.contiguous() if isinstance(target, ExpertMatrix) and target.transposed else values
