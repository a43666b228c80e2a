"""What an update of fused experts, and of routers, adds to a checkpoint's tensors, in whichever form it holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier import MIXTRAL, PLAIN, expert_of, singles
from oneshot.checkpoint.adapters.experts import BareMatrix, ExpertMatrix, bare_and_experts
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import find_weight, list_tensors
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.loading.segments import Stored, described, matrix_in, open_stored, range_reads
from oneshot.checkpoint.quantized.dequantize import through_nf4
from oneshot.checkpoint.quantized.experts_nf4 import is_packable
from oneshot.checkpoint.reads.ranges import read_all, torch_dtype
from oneshot.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch


@dataclass(frozen=True)
class Term:
    """One summand of a stored weight: scale * (b @ a), added to its rows from ``first`` on.

    Rows are those of the weight's last dimension, all the ones before it taken as one.
    """

    factors: Factors
    scale: float
    first: int = 0


@dataclass(frozen=True)
class StoredExperts:
    """A checkpoint's fused experts and routers, by matrix, and where their values lie in its files."""

    stored: Stored
    matrices: dict[str, ExpertMatrix | BareMatrix]


def experts_in(base: Path, model: Any) -> StoredExperts:
    """Return the experts and routers of a checkpoint.

    Args:
        model: its model, on any device
    """
    return StoredExperts(open_stored(base, model), bare_and_experts(model))


def quantized_experts(experts: StoredExperts) -> dict[str, str]:
    """Return the stored tensors of experts that oneshot loads in 4 bits, each with the parameter that it is a part of.

    Those of parameters that are no ranges of stored tensors, or hold more than that, are left out.
    """
    found: dict[str, str] = {}
    shapes = {name: entry.shape for name, entry in experts.stored.tensors.items()}
    matrices = [matrix for matrix in experts.matrices.values() if isinstance(matrix, ExpertMatrix)]
    for parameter in dict.fromkeys(matrix.parameter for matrix in matrices):
        parts = experts.stored.loading.made.get(parameter)
        if parts is None or not is_packable(parts.shape):
            continue
        names = {segment.stored for segment in parts.segments}
        if sum(math.prod(shapes[name]) for name in names) == math.prod(parts.shape):
            found |= dict.fromkeys(names, parameter)
    return found


def experts_through_nf4(
    experts: StoredExperts, parameter: str, device: torch.device, *, double: bool
) -> dict[str, torch.Tensor]:
    """Return what NF4 leaves of a parameter of experts, by stored tensor, flat, in the dtype of the file, on the CPU.

    Its scales are quantized together, as they are when it is loaded.
    """
    import torch

    stored = experts.stored
    parts = stored.loading.made[parameter]
    numel = math.prod(parts.shape)
    first = parts.segments[0]
    values = torch.empty(numel, dtype=torch_dtype(stored.entry(first), first.stored))
    read_all(range_reads(stored, parts, Range(0, numel, numel), values))
    values = through_nf4(values.view(parts.shape[0], -1), device, double=double)
    if first.is_turned:
        return {first.stored: values.view(parts.shape).transpose(-1, -2).reshape(-1)}
    sizes = {segment.name: math.prod(stored.tensors[segment.name].shape) for segment in parts.segments}
    found = {name: values.new_empty(size) for name, size in sizes.items()}
    at = 0
    for segment in parts.segments:
        size = segment.stop - segment.start
        found[segment.name][segment.start : segment.stop] = values[at : at + size]
        at += size
    return found


def by_layer(added: Mapping[str, Term], linears: Collection[str]) -> Iterator[tuple[str, Term]]:
    """Yield what is added to each matrix; where a model has a layer per expert, to that: gate and up apart again.

    Args:
        linears: names of the model's linear layers
    """
    for name, term in added.items():
        for names in (PLAIN, MIXTRAL) if expert_of(name) else ():
            own = singles(name, term.factors, names)
            if all(layer in linears for layer, _ in own):
                yield from ((layer, Term(factors, term.scale)) for layer, factors in own)
                break
        else:
            yield name, term


def expert_terms(what: str, name: str, term: Term, experts: StoredExperts) -> list[tuple[str, Term]]:
    """Return what is added to which stored tensors for a summand of one expert's matrix, or of a router's.

    Args:
        what: the update is called in messages
        name: of the matrix, see ``ExpertMatrix`` and ``BareMatrix``

    Raises:
        UserError: the checkpoint has no such matrix, has it in another shape, or stores it in no rows
    """
    base, matrix = experts.stored.folder, experts.matrices.get(name)
    if matrix is None:
        raise UserError(
            f"{what} changes {name}, an expert for which {base} holds no weight: it belongs to another architecture."
        )
    b, a = term.factors.b, term.factors.a
    if (len(b), a.shape[1]) != (matrix.out_features, matrix.in_features):
        raise UserError(
            f"{what} changes {name} by {len(b)} x {a.shape[1]}, but in {base} it is {matrix.out_features} x "
            f"{matrix.in_features}: it belongs to another base model."
        )
    parts = matrix_in(experts.stored, name, matrix)
    turned = parts.segments[0].is_turned
    if (isinstance(matrix, ExpertMatrix) and matrix.transposed) != turned:
        b, a = a.T, b.T
    found, at, width = [], 0, a.shape[1]
    for segment in parts.segments:
        size = segment.stop - segment.start
        if experts.stored.entry(segment).shape[-1] != width or any(
            place % width for place in (segment.start, at, size)
        ):
            raise UserError(
                f"{what} changes {name}, but {base} stores {segment.stored} in another form than transformers computes "
                "with: merge with PEFT instead."
            )
        own = Factors(b[at // width : (at + size) // width], a)
        found.append((segment.stored, Term(own, term.scale, segment.start // width)))
        at += size
    return found


def stored_tensors(base: Path, model: Any, names: Collection[str]) -> set[str]:
    """Return what a checkpoint's files call the tensors that hold the matrices of these names, scales among them.

    Args:
        model: the checkpoint's, on any device; needed where there are experts or routers among them
        names: of linear layers and of experts' and routers' matrices; what the checkpoint has no weight for is left out

    Raises:
        UserError: as ``matrix_in``
    """
    stored = described(base, list_tensors(base), model)
    matrices = {} if model is None else bare_and_experts(model)
    held = {own for name in names if name not in matrices and (own := find_weight(stored.tensors, name)) is not None}
    for name in matrices.keys() & names:
        held |= {segment.stored for segment in matrix_in(stored, name, matrices[name]).segments}
    return {own for name in held for own in stored.files_names(name)}
