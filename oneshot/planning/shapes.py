"""Every weight of a model, and the numbers of its config that a run's needs depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["linear", "expert", "fused", "head", "embedding", "tower", "other"]
FP32, NF4, NF4_DOUBLE = "fp32", "nf4", "nf4, scales quantized"  # forms of a checkpoint's files
PATCHED: tuple[Kind, ...] = ("linear", "expert")  # what a patch may change and NF4 quantizes


@dataclass(frozen=True)
class Weight:
    """Weights of one shape.

    Attributes:
        kind: linear (a linear layer), expert (a linear layer of one expert), fused (all experts of a layer in one
            parameter, a matrix for each), head (the output head, where it is not the embedding), embedding, tower (what
            a multimodal model has beside its language part, which text never meets), or other (norms, biases,
            convolutions, routers that are no linear layers)
        shape: as the model holds it; (out, in) for a linear layer, and for a Conv1D, which holds it transposed
        count: how many of them
        alone: whether each of fused experts can be computed by itself, without which NF4 does not hold them
    """

    kind: Kind
    shape: tuple[int, ...]
    count: int
    alone: bool = False

    @property
    def matrices(self) -> bool:
        """Whether each expert has a matrix in it, and not only a bias."""
        return len(self.shape) == 3

    @property
    def numel(self) -> int:
        """Elements of one of them."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A model's weights, and what its activations depend on.

    Attributes:
        weights: grouped by kind and shape
        layers, hidden, heads, head_dim, vocabulary: as in its config; of a multimodal model its text part's
        ffn: inner width that one token sees; of a mixture of experts that of its chosen and shared experts together
        gated: whether the MLP is gate * up (3 matrices) or up (2)
        active: parameters of matrices that one token is multiplied with, output head included
        chosen: experts of a layer that a token is sent to; 0 where the config does not say
        apart: whether a patch holds each expert's gate and up by themselves, with a factor A of its own each
    """

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int
    ffn: int
    gated: bool
    active: int
    chosen: int = 0
    apart: bool = False

    @property
    def parameters(self) -> int:
        return sum(weight.numel * weight.count for weight in self.weights)

    @property
    def largest(self) -> int:
        """Elements of the largest weight."""
        return max(weight.numel for weight in self.weights)

    @property
    def patched(self) -> list[Weight]:
        """Weights of the linear layers that a patch may change."""
        return [weight for weight in self.weights if weight.kind in PATCHED]

    def of(self, *kinds: Kind) -> int:
        """Elements of all weights of these kinds."""
        return sum(weight.numel * weight.count for weight in self.weights if weight.kind in kinds)

    def low_rank(self, rank: int, rank_experts: int = 0) -> int:
        """Elements of rank-``rank`` factors of every linear layer that a patch may change.

        Args:
            rank_experts: of the factors of each matrix of fused experts; 0: without these
        """
        layers = sum(min(rank, *w.shape) * sum(w.shape) * w.count for w in self.patched)
        return layers + sum(many * min(rank_experts, m, n) * (m + n) for many, m, n in self.experts)

    def written(self, rank: int, rank_experts: int = 0) -> int:
        """Elements of the same factors in the form in which a repair writes them."""
        gates = sum(many * min(rank_experts, m, n) * n for many, m, n in self._gates) if self.apart else 0
        return self.low_rank(rank, rank_experts) + gates

    @property
    def _gates(self) -> list[tuple[int, int, int]]:
        """Matrices of fused experts that are gate and up in one: of a parameter that comes before another one."""
        return self.experts[:-1:2] if len(self.experts) > 1 else []

    @property
    def experts(self) -> list[tuple[int, int, int]]:
        """The matrices of fused experts that a patch may change: how many, and both their sizes.

        In the order that the parameter has them; those that cannot be computed each by itself are left out.
        """
        fused = [w for w in self.weights if w.kind == "fused" and w.alone and w.matrices]
        return [(w.count * w.shape[0], w.shape[1], w.shape[2]) for w in fused]

    @property
    def reached(self) -> int:
        """Elements of the weights that a patch may change."""
        return self.of(*PATCHED) + sum(many * m * n for many, m, n in self.experts)


def stored_bytes(shape: ModelShape, form: str = "", *, reached: bool = False) -> int:
    """Return the bytes of a checkpoint's weights as its files hold them.

    Args:
        form: mxfp4 (of fused experts: 4 bits, and a byte of scale for 32 numbers), fp8 (of linear layers and experts: a
            byte, and 4 of scale for 128 x 128 numbers), nf4 (of linear layers: 4 bits, and 4 bytes of scale for 64
            numbers, or one if the scales are quantized), fp32 or "", 16 bits; what has no such form is in 16 bits
        reached: only of what a patch may change
    """
    experts = sum(many * m * n for many, m, n in shape.experts)
    fused = experts if reached else sum(w.numel * w.count for w in shape.weights if w.kind == "fused" and w.matrices)
    every = shape.reached if reached else shape.parameters
    if form == "mxfp4":
        return 2 * (every - fused) + fused * 17 // 32
    if form == "fp8":
        packed = fused + shape.of(*PATCHED)
        return 2 * (every - packed) + packed + 4 * packed // 128**2
    if form in (NF4, NF4_DOUBLE):
        packed = shape.of(*PATCHED)
        return 2 * (every - packed) + packed // 2 + packed * (1 if form == NF4_DOUBLE else 4) // 64
    return (4 if form == FP32 else 2) * every


def as_plain(shape: ModelShape) -> dict[str, Any]:
    """Return the shape as values that JSON holds."""
    return asdict(shape)


def from_plain(values: Mapping[str, Any]) -> ModelShape:
    """Return the shape that ``as_plain`` gave, its tuples having become lists."""
    weights = tuple(Weight(**{**weight, "shape": tuple(weight["shape"])}) for weight in values["weights"])
    return ModelShape(**{**values, "weights": weights})
