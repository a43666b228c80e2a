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


def inner_rows(x: torch.Tensor, delta: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Return the inner products of k gradients of one layer with another one, (k,) in float64.

    Args:
        x: (k, T, n), the layer's inputs, one gradient's tokens after the other's
        delta: (k, T, m), the gradients at its output
    """
    return ((x @ pair[0].T).double() * (delta @ pair[1].T).double()).sum(dim=(1, 2))


def squared_norms(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norms of k gradients of one layer, (k,) in float64; arguments as ``inner_rows``."""
    return ((x @ x.mT).double() * (delta @ delta.mT).double()).sum(dim=(1, 2))


def add_routed(sums: torch.Tensor, pair: Pair, owners: torch.Tensor, target: Pair | None) -> None:
    """Add an expert's share to each conversation's inner product with the target and its squared norm, (2, rows).

    Args:
        pair: the tokens that were sent to it, of all conversations
        owners: int64 (tokens,), whose they are
    """
    x, delta = pair
    if target is not None:
        products = ((x @ target[0].T).double() * (delta @ target[1].T).double()).sum(dim=1)
        sums[0].index_add_(0, owners, products)
    squares = (x @ x.T).double() * (delta @ delta.T).double() * (owners[:, None] == owners)
    sums[1].index_add_(0, owners, squares.sum(dim=1))


def singular_values(pair: Pair) -> torch.Tensor:
    """Return the min(T, m, n) leading singular values of delta^T X, falling; the rest are zero."""
    import torch

    x, delta = pair
    right = torch.linalg.qr(x.T, mode="r").R
    left = torch.linalg.qr(delta.T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def summary(pair: Pair, rank: int) -> Pair:
    """Return a gradient of at most ``rank`` tokens close to the given one; the same one where it has no more.

    By a randomized range finder (arXiv 0909.4061, algorithm 4.4, one power iteration, seeded): of delta^T X is kept
    what lies in ``rank`` orthonormal output directions, nearly the leading ones. That takes products with T x rank
    matrices only, where QR of the factors would cost more than the passes that they come from.
    """
    import torch

    x, delta = pair
    if len(x) <= rank:
        return pair
    generator = torch.Generator(device=x.device).manual_seed(0)
    start = torch.randn(x.shape[1], min(rank, x.shape[1]), generator=generator, device=x.device, dtype=x.dtype)
    basis = torch.linalg.qr(delta.T @ (x @ start)).Q
    basis = torch.linalg.qr(x.T @ (delta @ basis)).Q
    basis = torch.linalg.qr(delta.T @ (x @ basis)).Q
    return (basis.T @ delta.T) @ x, basis.T.contiguous()
