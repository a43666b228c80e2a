"""Singular directions of what a fine-tune changed, per weight matrix: from checkpoints or an adapter, over ranks.

Delta = W_finetuned - W_aligned = sum_i sigma_i u_i v_i^T. Each rank reads and decomposes its share of the matrices, one
at a time, and all get the factors of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from oneshot.checkpoint.adapters.carrier import halves
from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.loading.reference import other_rows
from oneshot.checkpoint.loading.segments import Stored, as_it_multiplies, matrix_in, open_stored, range_reads
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.checkpoint.reads.traced import Traced
from oneshot.distributed.many import share_each
from oneshot.distributed.phases import count, phase
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import each
from oneshot.errors import UserError
from oneshot.patch.linears import grouped, shape_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from oneshot.patch.linears import Layer

Rank = TypeVar("Rank", int, "int | None")

_EXACT_UP_TO = 512  # matrices whose smaller side is at most this are decomposed exactly


@dataclass(frozen=True)
class Directions:
    """The leading singular directions of one weight's update.

    Attributes:
        u: (m, r), orthonormal columns
        s: (r,), singular values, falling
        vt: (r, n), orthonormal rows
        energy: squared Frobenius norm of the whole update, of which sum(s^2) is in these directions
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    energy: float


def update_factors(directions: Directions, weights: torch.Tensor) -> Factors:
    """Return sum_i weights_i sigma_i u_i v_i^T as factors, the singular values split evenly between both.

    Args:
        weights: (r,); or (r^2,), the elements of a matrix W, for sum_ij sqrt(sigma_i) u_i W_ij sqrt(sigma_j) v_j^T
    """
    root = directions.s.sqrt()
    if len(weights) == len(root):
        return Factors(directions.u * (root * weights), root[:, None] * directions.vt)
    return Factors((directions.u * root) @ weights.view(len(root), -1), root[:, None] * directions.vt)


def decompose(delta: torch.Tensor, rank: int, seed: int = 0) -> Directions:
    """Return the top ``rank`` singular directions of (m, n), exactly where small, by randomized SVD where large."""
    import torch

    delta = delta.float()
    energy = float(delta.norm()) ** 2  # squaring first would take another matrix of memory
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= _EXACT_UP_TO:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        return Directions(u[:, :rank].contiguous(), s[:rank], vt[:rank].contiguous(), energy)
    with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(delta, q=min(rank + 10, *delta.shape), niter=4)
    return Directions(u[:, :rank].contiguous(), s[:rank], v[:, :rank].T.contiguous(), energy)


@phase("decompose")
def shared_directions(
    runtime: Runtime,
    layers: Mapping[str, Layer],
    rank: int,
    delta_of: Callable[[str, bool], torch.Tensor | None],
    rank_experts: int | None = None,
) -> dict[str, Directions]:
    """Decompose one matrix per rank at a time and share the factors: the same on every rank, for any world size.

    Args:
        delta_of: (name, mine) -> the (m, n) update; called for every matrix on every rank in the same order, so it
            may be a collective; where the matrix is not this rank's, nothing need be returned
        rank_experts: directions of an expert's matrix; none: as many as of another
    """
    found = {}
    for i, (name, layer) in enumerate(each(layers.items(), "update decomposed", "matrices")):
        mine = i % runtime.world_size == runtime.rank
        delta = delta_of(name, mine)
        if mine:
            assert delta is not None
            found[name] = decompose(delta.to(runtime.device), rank_for(layer, rank, rank_experts), seed=i)
    shared = {}
    for first, group in grouped(layers):
        shapes = [shape_of(layers[name]) for name in group]
        ranks = [min(rank_for(layers[name], rank, rank_experts), *shape) for name, shape in zip(group, shapes)]
        own = {i: packed(found.pop(name)) for i, name in enumerate(group) if name in found}
        sizes = [r * (m + n + 1) + 1 for r, (m, n) in zip(ranks, shapes)]
        for name, shape, r, flat in zip(group, shapes, ranks, share_each(runtime, own, sizes, first)):
            shared[name] = unpacked(flat, shape, r)
    return shared


def rank_for(layer: Layer, rank: Rank, rank_experts: int | None) -> Rank | int:
    """Return the rank that is meant for a layer: that of experts, if given, for an expert's matrix."""
    return rank if rank_experts is None or not isinstance(layer, ExpertMatrix) else rank_experts


def packed(directions: Directions) -> torch.Tensor:
    """Return directions as one vector, (r (m + n + 1) + 1,)."""
    import torch

    d = directions
    return torch.cat([d.u.flatten(), d.s, d.vt.flatten(), d.s.new_tensor([d.energy])])


def leading(directions: Directions, rank: int) -> Directions:
    """Return the first ``rank`` directions; zeros where there are fewer."""
    from torch.nn.functional import pad

    d, missing = directions, max(0, rank - len(directions.s))
    u, s, vt = d.u[:, :rank], d.s[:rank], d.vt[:rank]
    return Directions(pad(u, (0, missing)), pad(s, (0, missing)), pad(vt, (0, 0, 0, missing)), d.energy)


def unpacked(flat: torch.Tensor, shape: tuple[int, int], rank: int) -> Directions:
    """Return what ``packed`` packed, of a matrix of that shape."""
    m, n = shape
    u, s, vt, energy = flat.split([m * rank, rank, rank * n, 1])
    return Directions(u.view(m, rank), s, vt.view(rank, n), float(energy))


def checkpoint_difference(
    finetuned: Path, reference: Path, targets: dict[str, Any], model: Any = None
) -> Callable[[str, bool], torch.Tensor | None]:
    """Return (name, mine) -> W_finetuned - W_reference (fp32), read from the checkpoints one matrix at a time.

    Args:
        targets: name -> linear layer or ``ExpertMatrix``; the two may store experts in different forms
        model: whose modules these are, on any device, also partitioned; none finds them by stored names alone

    Raises:
        UserError: the reference lacks a matrix, or has another shape; checked for all layers before any is read. Or,
            as it is read, a matrix that is not finite
    """
    ours, theirs = open_stored(finetuned, model), open_stored(reference, model)
    pairs: dict[str, tuple[Traced, Traced]] = {}
    for name, target in targets.items():
        mine, other = matrix_in(ours, name, target), matrix_in(theirs, name, target)
        for stored, parts in ((ours, mine), (theirs, other)):
            _check_floats(stored, parts)
        if mine.shape != other.shape and not other_rows(f"{name}.weight", mine.shape, other.shape):
            raise UserError(
                f"The reference {reference} has {other.segments[0].stored} of shape {list(other.shape)}, the model has "
                f"{list(mine.shape)}: give the aligned checkpoint that this model was fine-tuned from."
            )
        pairs[name] = mine, other

    def difference(name: str, wanted: bool) -> torch.Tensor | None:
        if not wanted:
            return None
        mine, other = pairs[name]
        with phase("read"):
            delta = _difference((ours, mine), (theirs, other))
            count(read=ours.nbytes(mine) + theirs.nbytes(other))
        if not math.isfinite(float(delta.norm())):
            held = mine.segments[0].stored if len(mine.segments) == 1 else name
            raise UserError(f"{held} holds NaN or infinity, in {finetuned} or in {reference}: give finite checkpoints.")
        return as_it_multiplies(delta, targets[name])

    return difference


def _check_floats(stored: Stored, parts: Traced) -> None:
    for segment in parts.segments:
        if not stored.is_float(segment):
            raise UserError(
                f"{stored.folder} holds {segment.stored} as {stored.entry(segment).dtype}, quantized: rollback "
                "compares full-precision checkpoints, FP8 with block scales and MXFP4."
            )


def _difference(ours: tuple[Stored, Traced], theirs: tuple[Stored, Traced]) -> torch.Tensor:
    """The fp32 difference of two stored matrices, read side by side, in the memory of one and the requests'.

    Zero in rows that the second one lacks.
    """
    import torch

    shape = ours[1].shape
    common = min(math.prod(parts.shape) for _, parts in (ours, theirs))
    whole = Range(0, common, common)
    every = torch.zeros(math.prod(shape))
    read_all(
        read
        for (stored, parts), sign in ((ours, 1), (theirs, -1))
        for read in range_reads(stored, parts, whole, every[:common], sign)
    )
    return every.view(shape)


@phase("decompose")
def adapter_directions(update: Update, device: Any) -> dict[str, Directions]:
    """Decompose a LoRA's own update, exactly and without forming b @ a.

    Of an expert whose gate and up have factors of their own, each is decomposed by itself.
    """
    found = {}
    for name, factors in each(update.items(), "adapter decomposed", "matrices"):
        parts = halves(name, factors)
        one = [_of_factors(part, device) for part in parts or [factors]]
        found[name] = one[0] if parts is None else _one_above_the_other(*one)
    return found


def _of_factors(factors: Factors, device: Any) -> Directions:
    """The directions of b @ a: QR of both factors, SVD of the small core."""
    import torch

    qb, rb = torch.linalg.qr(factors.b.to(device))
    qa, ra = torch.linalg.qr(factors.a.to(device).T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return Directions(qb @ u, s, vt @ qa.T, float(s.square().sum()))


def _one_above_the_other(upper: Directions, lower: Directions) -> Directions:
    """The directions of two matrices as of one with the rows of both: orthogonal as matrices, if not on the right."""
    import torch

    s, order = torch.cat([upper.s, lower.s]).sort(descending=True, stable=True)
    u, vt = torch.block_diag(upper.u, lower.u)[:, order], torch.cat([upper.vt, lower.vt])[order]
    return Directions(u, s, vt, upper.energy + lower.energy)
