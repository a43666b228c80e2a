"""Hooks: add low-rank updates to linear layers without touching their weights, capture factored gradients, count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.load import check_fits
from oneshot.checkpoint.update import Factors

if TYPE_CHECKING:
    import torch
    from torch import nn

FIRST_DECREASE = 0.1  # a first step along a factored gradient aims, to first order, at this share of the loss


@contextlib.contextmanager
def attached(linears: Mapping[str, nn.Linear], update: Mapping[str, Factors]) -> Iterator[None]:
    """Within the block each layer computes with W + b @ a; W itself, partitioned or 4-bit, stays as it is.

    ``update`` is looked up at each forward pass, so its entries may be replaced in between, and they may carry an
    autograd graph. The correction is computed in the precision of the factors and rounded once.
    """

    def hook_for(name: str) -> Any:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            factors = update.get(name)
            if factors is None:
                return None
            low = (args[0].to(factors.a.dtype) @ factors.a.T) @ factors.b.T
            return output + low.to(output.dtype)

        return add

    handles = [module.register_forward_hook(hook_for(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def attached_update(model: Any, update: Mapping[str, Factors]) -> Iterator[dict[str, nn.Linear]]:
    """Attach an update by module name, on the device of the model; yields the layers that it changes.

    Raises:
        UserError: the update does not fit the model
    """
    modules = dict(model.named_modules())
    for name, factors in update.items():
        check_fits(modules, name, factors)
    layers = {name: modules[name] for name in update}
    with attached(layers, update):
        yield layers


@contextlib.contextmanager
def streamed(
    model: Any, linears: Mapping[str, nn.Linear], use: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Within the block every backward pass hands each layer's factors to ``use``, and keeps none of them.

    ``use`` takes the layer's name, its input (..., n) and the loss's gradient at its output (..., m), layer after
    layer as backward reaches them. The weights are frozen, so the embedding's output is made to require a gradient:
    that alone makes autograd walk the model. A forward pass that is run again (gradient checkpointing) leaves nothing
    the first time, as it has no graph then.
    """

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda gradient: use(name, x, gradient.detach()))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in linears.items()]
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Within the block count this rank's forward_passes, and token_passes: tokens, padding included, forward and back.

    A forward pass with gradients is taken to be followed by a backward pass.
    """
    import torch

    found = {"forward_passes": 0, "token_passes": 0}

    def count(_module: Any, args: tuple[torch.Tensor, ...], _output: Any) -> None:
        found["forward_passes"] += 1
        found["token_passes"] += args[0].numel() * (1 + torch.is_grad_enabled())

    counting = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield found
    finally:
        counting.remove()


class Gradients:
    """The factored gradients of a backward pass: per layer X (rows, n) and delta (rows, m), dL/dW = delta^T X.

    Rows are the tokens of the batch that ``keep`` selects. With gradient checkpointing the forward pass is run again
    for backward; the last inputs seen are the ones that belong to the gradient.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = linears
        self.inputs: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        self.keep: torch.Tensor | None = None

    @contextlib.contextmanager
    def capturing(self, model: Any) -> Iterator[None]:
        """Within the block every backward pass of ``model`` leaves its factors here."""
        with streamed(model, self.linears, self._keep):
            yield

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (X, delta) of one layer: (rows, n) and (rows, m); no rows where the loss did not reach it.

        In fp32, or in fp64 where the model computes in that.
        """
        import torch

        module = self.linears[name]
        if name not in self.deltas:
            device = next(iter(self.deltas.values())).device
            return torch.zeros(0, module.in_features, device=device), torch.zeros(0, module.out_features, device=device)
        x, delta = self.inputs[name].flatten(0, -2), self.deltas[name].flatten(0, -2)
        if self.keep is not None:
            x, delta = x[self.keep.flatten()], delta[self.keep.flatten()]
        kind = torch.promote_types(x.dtype, torch.float32)
        return x.to(kind), delta.to(kind)

    def _keep(self, name: str, x: torch.Tensor, delta: torch.Tensor) -> None:
        self.inputs[name], self.deltas[name] = x, delta
