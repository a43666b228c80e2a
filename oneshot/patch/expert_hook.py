"""Hooks on fused experts, which see each as the linear layers that it is.

What computes experts one after the other is in place while something is hooked on, so that a model on which nothing is
keeps transformers' own, faster functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.quantized.experts_forward import HOOKS, Hook, compute_one_by_one

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def hooked(layers: Mapping[str, Any], hook: Hook) -> Iterator[None]:
    """Within the block ``hook`` is called at every expert's matrix that is among the layers and that a token reaches.

    Of several hooks the ones put on later see, and may change, what the earlier ones returned. Layers of another kind
    are passed over.
    """
    modules = {matrix.path: matrix.module for matrix in layers.values() if isinstance(matrix, ExpertMatrix)}
    if not modules:
        yield
        return

    def chosen(name: str, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
        return hook(name, x, y, rows) if name in layers else None

    for path, module in modules.items():
        HOOKS.setdefault(module, []).append((path, chosen))
    compute_as_before = compute_one_by_one(modules.values())
    try:
        yield
    finally:
        compute_as_before()
        for path, module in modules.items():
            HOOKS[module].remove((path, chosen))
