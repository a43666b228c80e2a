"""Read any range of a model's tensors from a checkpoint that holds them under other names, in parts or merged.

Each tensor is an ordered list of contiguous ranges of stored ones; no more bytes are read than asked for, and checked
against the manifest on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.experts import ExpertMatrix
from oneshot.checkpoint.files import TensorEntry, find_weight, list_tensors
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.manifest import Pieces, read_pieces
from oneshot.checkpoint.ranges import Read, read_all
from oneshot.checkpoint.traced import Loading, Segment, Traced, trace_loading, whole
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
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    pieces: Pieces
    loading: Loading


def open_stored(folder: Path, model: Any = None, loading: Loading | None = None) -> Stored:
    """Return what a folder holds, as the tensors of a model.

    Args:
        model: on any device, also partitioned; none: every tensor is by its stored name
        loading: of such a model from this folder, where it is known

    Raises:
        UserError: as ``list_tensors`` and ``read_pieces``
    """
    tensors = list_tensors(folder)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    if loading is None:
        loading = Loading(whole(shapes), {}, []) if model is None else trace_loading(model, shapes)
    return Stored(folder, tensors, read_pieces(folder, tensors), loading)


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


def range_reads(stored: Stored, parts: Traced, wanted: Range, out: torch.Tensor) -> list[Read]:
    """Return the reads that fill ``out`` with a range of a tensor.

    Args:
        wanted: elements of the tensor, flattened
        out: (wanted.size,), as of ``Read``; beyond ``wanted.numel`` it becomes zero
    """
    segments = list(parts.take(wanted.start, wanted.stop))
    if not segments:  # an empty partition: a read of nothing, which zeroes the padding
        end = parts.segments[-1].stop
        segments = [Segment(parts.segments[-1].name, end, end)]
    reads, at = [], 0
    for number, segment in enumerate(segments, 1):
        numel = segment.stop - segment.start
        size = wanted.size - at if number == len(segments) else numel
        part = Range(segment.start, segment.stop, size)
        pieces = stored.pieces.get(segment.name, ())
        reads.append(Read(stored.tensors[segment.name], part, out[at : at + size], segment.name, pieces))
        at += numel
    return reads


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
