"""Fused experts computed one after the other, so that hooks see each as the linear layers that it is.

transformers lets a model's experts be computed by any function that is registered with it. Ours is in place while
something is hooked on, so that a model on which nothing is keeps transformers' own, which are faster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from oneshot.checkpoint.experts import ExpertMatrix
from oneshot.checkpoint.experts_nf4 import forward_one_by_one

if TYPE_CHECKING:
    import torch
    from torch import nn

IMPLEMENTATION = "oneshot"  # the name that our function is registered by

# (name of the matrix, its input (rows, n), its output (rows, m), which of the tokens, laid end to end, these rows are,
# int64 (rows,), rising) -> another output, or none; of a layer to which every token goes there are no such rows
Hook = Callable[[str, "torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor | None"]

_HOOKS: WeakKeyDictionary[nn.Module, list[tuple[str, Hook]]] = WeakKeyDictionary()  # with the experts' path, each


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
    _register()

    def chosen(name: str, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
        return hook(name, x, y, rows) if name in layers else None

    configs: dict[int, Any] = {id(module.config): module.config for module in modules.values()}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for path, module in modules.items():
        _HOOKS.setdefault(module, []).append((path, chosen))
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        for path, module in modules.items():
            _HOOKS[module].remove((path, chosen))


@functools.cache
def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _with_hooks)


def _with_hooks(module: Any, *routed: torch.Tensor) -> torch.Tensor:
    """What transformers calls: the experts, with what is hooked on at each of their matrices."""
    hooks = _HOOKS.get(module, [])

    def at(projection: str, index: int, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        for path, hook in hooks:
            other = hook(f"{path}.{index}.{projection}", x, y, rows)
            y = y if other is None else other
        return y

    hidden_states, top_k_index, top_k_weights = routed
    return forward_one_by_one(module, hidden_states, top_k_index, top_k_weights, at)
