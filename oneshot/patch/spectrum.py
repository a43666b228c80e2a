"""The spectrum of the safety gradient: how few directions hold it, whether other examples share them, and how it lies
to the gradients of harmful and of harmless data.

Everything is computed from the factors (X, delta) of each layer's gradient delta^T X, none of which is ever formed. A
conversation's loss is the cross entropy of its answer in nats per token; a group's gradient is the sum over its
conversations. Held on a rank, of every world_size-th layer only: the factors and singular directions of the one
example, tokens x (m + n) numbers each, and those of one group at a time, at most 2 min(m, n) rows of (m + n) numbers
(where a group has more tokens it is re-compressed, exactly). During a pass, X and delta of all layers, of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import Encoded
from oneshot.distributed.runtime import Runtime, all_reduce_sum, gather_objects
from oneshot.distributed.steps import each, steps
from oneshot.errors import UserError
from oneshot.patch.attach import Gradients
from oneshot.patch.directions import Directions
from oneshot.patch.factored import Pair, inner
from oneshot.patch.linears import shape_of
from oneshot.patch.summed import COUNTED, gradient_factors
from oneshot.settings import SpectrumSettings

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer

OTHERS = "safety"  # the group of further safety examples, whose subspaces are compared with the example's
COMPARED = 20  # directions compared where the settings name no number, as in the paper


@dataclass(frozen=True)
class Matrix:
    """What was found of one weight matrix (m x n).

    Attributes:
        rank: numerical rank of the example's gradient
        norm: its Frobenius norm
        singular_values: all that are not zero, falling
        effective_rank: exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007)
        directions_90, directions_99: least k with a cumulative energy ratio of at least 0.9 and 0.99
        compared: how many leading directions of the example, and of the other examples' gradient, were compared
        overlap_left, overlap_right: ||U^T U'||_F^2 / min(k, k') of the two subspaces of outputs (of inputs), 0 to 1
        chance_left, chance_right: what random subspaces of these dimensions would have on average
        norms: group -> norm of its gradient, per conversation
        cosines: group -> cosine between its gradient and the example's; nan where one is zero
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    singular_values: list[float]
    effective_rank: float
    directions_90: int
    directions_99: int
    compared: tuple[int, int] = (0, 0)
    overlap_left: float = math.nan
    overlap_right: float = math.nan
    chance_left: float = math.nan
    chance_right: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spectrum:
    """Every matrix, and the same cosines over all of them together.

    Attributes:
        cosines: group -> cosine between the group's gradient and the example's
        each: group -> the cosine of every conversation of the group by itself
    """

    matrices: list[Matrix]
    cosines: dict[str, float]
    each: dict[str, list[float]]


def decomposed(pair: Pair) -> Directions:
    """Return all min(T, m, n) singular directions of delta^T X: QR of both factors, SVD of the small core."""
    import torch

    qx, rx = torch.linalg.qr(pair[0].T)
    qd, rd = torch.linalg.qr(pair[1].T)
    u, s, vt = torch.linalg.svd(rd @ rx.T, full_matrices=False)
    return Directions(qd @ u, s, vt @ qx.T, float(s.double().square().sum()))


def rank_of(directions: Directions) -> int:
    """Return how many singular values are above what rounding leaves (as numpy's ``matrix_rank`` decides)."""
    import torch

    s, side = directions.s, max(directions.u.shape[0], directions.vt.shape[1])
    return int((s > torch.finfo(s.dtype).eps * side * s.max()).sum()) if len(s) else 0


def energy_ratios(s: torch.Tensor) -> torch.Tensor:
    """Return the cumulative energy ratios, (k,) in float64: [k - 1] is the share of sum(s^2) in the first k."""
    energy = s.double().square().cumsum(0)
    return energy / energy[-1]


def effective_rank(s: torch.Tensor) -> float:
    """Return exp(-sum p log p) of p = s / sum(s): the number of equal directions that are as spread out."""
    import torch

    share = s.double() / s.double().sum()
    return float(torch.special.entr(share).sum().exp())


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return ||first^T second||_F^2 / min(k, k') of orthonormal columns: 1 where one subspace holds the other."""
    return float((first.T @ second).double().square().sum()) / min(first.shape[1], second.shape[1])


def check_rank(rank: int, setting: str, example: Encoded, layers: Mapping[str, Layer]) -> None:
    """Raise UserError where the example's gradient has fewer than ``rank`` directions in every matrix."""
    tokens, side = len(example.input_ids), max(min(shape_of(module)) for module in layers.values())
    if rank > min(tokens, side):
        why = f"the example has {tokens} tokens" if tokens <= side else f"the largest matrix has rank {side}"
        raise UserError(
            f"Setting {setting} asks for {rank} directions of the example's gradient, whose rank is at most "
            f"{min(tokens, side)} ({why}): give {min(tokens, side)} or less."
        )


def measure(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    example: Encoded,
    groups: Mapping[str, list[Encoded]],
    pad: int,
    options: SpectrumSettings,
) -> Spectrum:
    """Measure the example's gradient and how those of the groups lie to it. Collective; every rank gets all of it.

    Args:
        groups: name -> conversations; that named ``OTHERS`` is also compared direction by direction
        options: its rank is of the directions compared, its batch_size of a pass

    Raises:
        UserError: the rank is over that of the example's gradient in every matrix
    """
    import torch

    if options.rank is not None:
        check_rank(options.rank, "spectrum.rank", example, layers)
    gradients = Gradients(layers)
    sums = {name: torch.zeros(len(rows), 2, dtype=torch.float64) for name, rows in groups.items()}
    rows_of_all = 1 + sum(map(len, groups.values()))
    with gradients.capturing(model), steps(COUNTED, rows_of_all, "conversations"):
        pairs = gradient_factors(runtime, model, gradients, [example], pad)
        parts = {name: decomposed(pair) for name, pair in each(pairs.items(), "gradient decomposed", "matrices")}
        found = {name: _matrix(name, part) for name, part in parts.items()}
        for group, rows in groups.items():
            totals_of = sums[group]

            def add(i: int, name: str, pair: Pair, total: torch.Tensor = totals_of) -> None:
                if name in pairs:
                    total[i] += torch.stack([inner(pairs[name], pair), inner(pair, pair)]).cpu()

            whole = gradient_factors(runtime, model, gradients, rows, pad, batch_size=options.batch_size, seen=add)
            for name, matrix in found.items():
                if name not in whole:
                    continue
                square, dot = float(inner(whole[name], whole[name])), float(inner(pairs[name], whole[name]))
                matrix.norms[group] = math.sqrt(max(square, 0.0)) / len(rows)
                matrix.cosines[group] = _cosine(dot, matrix.norm**2, square)
                if group == OTHERS:
                    compared = _compared(parts[name], decomposed(whole[name]), options.rank or COMPARED)
                    found[name] = Matrix(**(vars(matrix) | compared))
    order = {name: place for place, name in enumerate(layers)}
    every = [Matrix(**one) for part in gather_objects(runtime, [asdict(m) for m in found.values()]) for one in part]
    every.sort(key=lambda matrix: order[matrix.name])
    energy = sum(matrix.norm**2 for matrix in every)
    totals = {group: all_reduce_sum(runtime, each.to(runtime.device)).tolist() for group, each in sums.items()}
    return Spectrum(
        every,
        {group: cosine_over(every, group) for group in groups},
        {group: [_cosine(dot, energy, square) for dot, square in each] for group, each in totals.items()},
    )


def _matrix(name: str, directions: Directions) -> Matrix:
    m, n = directions.u.shape[0], directions.vt.shape[1]
    rank = rank_of(directions)
    if not rank:
        return Matrix(name, (m, n), 0, 0.0, [], 0.0, 0, 0)
    s = directions.s[:rank]
    ratios = energy_ratios(s)
    return Matrix(
        name, (m, n), rank, math.sqrt(directions.energy), s.tolist(), effective_rank(s),
        int((ratios < 0.9).sum()) + 1, min(int((ratios < 0.99).sum()) + 1, rank),
    )  # fmt: skip


def _compared(example: Directions, others: Directions, rank: int) -> dict[str, Any]:
    """Overlaps of the leading directions; none where one of the gradients is zero."""
    k, other = min(rank, rank_of(example)), min(rank, rank_of(others))
    if not k or not other:
        return {}
    most = max(k, other)
    return {
        "compared": (k, other),
        "overlap_left": overlap(example.u[:, :k], others.u[:, :other]),
        "overlap_right": overlap(example.vt[:k].T, others.vt[:other].T),
        "chance_left": most / example.u.shape[0],
        "chance_right": most / example.vt.shape[1],
    }


def _cosine(dot: float, first: float, second: float) -> float:
    """Cosine from an inner product and two squared norms."""
    return dot / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def cosine_over(matrices: list[Matrix], group: str) -> float:
    """Return the cosine between the group's gradient and the example's over several matrices together."""
    known = [m for m in matrices if math.isfinite(m.cosines.get(group, math.nan))]
    dot = sum(m.cosines[group] * m.norm * m.norms[group] for m in known)
    return _cosine(dot, sum(m.norm**2 for m in matrices), sum(m.norms.get(group, 0.0) ** 2 for m in matrices))
