"""Arithmetic on factored gradients: inner products, norms and singular values that never form an m x n matrix.

One layer's gradient on T tokens is delta^T X, given as the pair (X, delta) of shapes (T, n) and (T, m). For two pairs
<g, h> = sum((X_g X_h^T) * (delta_g delta_h^T)), which costs T_g x T_h x (m + n) in place of m x n x (T_g + T_h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]  # X (T, n) and delta (T, m) of one layer, one dtype and device


def inner(first: Pair, second: Pair) -> torch.Tensor:
    """Return the Frobenius inner product of two gradients of one layer, as a scalar in float64.

    The products of tokens are summed in float64, since they cancel where gradients are nearly orthogonal.
    """
    x = (first[0] @ second[0].T).double()
    delta = (first[1] @ second[1].T).double()
    return (x * delta).sum()


def singular_values(pair: Pair) -> torch.Tensor:
    """Return the min(T, m, n) leading singular values of delta^T X, falling; the rest are zero."""
    import torch

    x, delta = pair
    right = torch.linalg.qr(x.T, mode="r").R
    left = torch.linalg.qr(delta.T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)
