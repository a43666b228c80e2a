"""The algebra of low-rank updates: what is added to linear layers, as factors, without ever forming it.

An update gives to each module the factors b (m x k) and a (k x n) of what is added to its weight (m x n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Factors:
    """A low-rank update of one weight W (m x n): W + b @ a.

    Attributes:
        b: (m, k)
        a: (k, n)
    """

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


Update = dict[str, Factors]  # module name -> its update
EDGE = 1e-2  # of the first singular value that is cut off: how near to it one fades


def on_device(update: Update, device: torch.device) -> Update:
    """Return the update with its factors on ``device``."""
    return {name: Factors(factors.b.to(device), factors.a.to(device)) for name, factors in update.items()}


def concatenated(first: Update, second: Update) -> Update:
    """Return the update that adds both: ranks add up where both touch a module."""
    import torch

    both = dict(first)
    for module, factors in second.items():
        if module in both:
            old = both[module]
            factors = Factors(torch.cat([old.b, factors.b], dim=1), torch.cat([old.a, factors.a], dim=0))
        both[module] = factors
    return both


def scaled(factors: Factors, weight: float) -> Factors:
    """Return the factors of weight * b @ a."""
    return Factors(factors.b * weight, factors.a)


def transposed(factors: Factors) -> Factors:
    """Return the factors of (b @ a) transposed."""
    return Factors(factors.a.T.contiguous(), factors.b.T.contiguous())


def norm(factors: Factors) -> float:
    """Return the Frobenius norm of b @ a, computed in fp64 from the factors' small Gram matrices."""
    b, a = factors.b.double(), factors.a.double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def fading(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Weights (kept,) of the ``kept`` largest singular values (descending) that make a cut steady.

    Where the last value kept and the first one dropped are nearly equal, rounding decides which direction stays. These
    weights are near 1 for what is clearly above the first one dropped and go to 0 towards it; 1 if nothing is dropped.
    """
    import torch

    if kept >= len(values):
        return torch.ones_like(values)
    above = values[:kept] - values[kept]
    return above / (above + EDGE * values[kept]).clamp(min=torch.finfo(values.dtype).tiny)


def compress(factors: Factors, rank: int | None, *, steady: bool = False) -> Factors:
    """Return the best rank-``rank`` factors of b @ a (none: only drop what is redundant), by QR and a small SVD.

    Args:
        steady: fade out what barely made the cut, see ``fading``
    """
    import torch

    m, n = factors.b.shape[0], factors.a.shape[1]
    limit = min(rank or factors.rank, factors.rank, m, n)
    if factors.rank <= limit:
        return factors
    qb, rb = torch.linalg.qr(factors.b)
    qa, ra = torch.linalg.qr(factors.a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = (s[:limit] * fading(s, limit) if steady else s[:limit]).sqrt()
    return Factors(qb @ (u[:, :limit] * root), (root[:, None] * vt[:limit]) @ qa.T)
