"""Hooks: add low-rank updates to linear layers without touching their weights, capture factored gradients, count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.added import check_fits
from oneshot.checkpoint.adapters.experts import BareMatrix, ExpertMatrix, layers_of
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.quantized.experts_forward import Hook
from oneshot.patch.expert_hook import hooked
from oneshot.patch.linears import shape_of

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer

FIRST_DECREASE = 0.1  # a first step along a factored gradient aims, to first order, at this share of the loss


@contextlib.contextmanager
def _at_each(layers: Mapping[str, Layer], hook: Hook) -> Iterator[None]:
    """Within the block ``hook`` is called at every layer that computes: see ``experts_forward.Hook``.

    Of a linear layer x and y are whole, (..., n) and (..., m), and the rows none. Routers are passed over.
    """
    from torch import nn

    def at(name: str) -> Any:
        return lambda _module, args, output: hook(name, args[0], output, None)

    linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    handles = [module.register_forward_hook(at(name)) for name, module in linears.items()]
    try:
        with hooked(layers, hook):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def attached(layers: Mapping[str, Layer], update: Mapping[str, Factors]) -> Iterator[None]:
    """Within the block each layer computes with W + b @ a; W itself, partitioned or 4-bit, stays as it is.

    ``update`` is looked up at each forward pass, of experts only for those that a token is sent to, so its entries may
    be replaced in between, and they may carry an autograd graph. The correction is computed in the precision of the
    factors and rounded once.
    """

    def add(name: str, x: torch.Tensor, y: torch.Tensor, _rows: torch.Tensor | None) -> torch.Tensor | None:
        factors = update.get(name)
        if factors is None:
            return None
        low = (x.to(factors.a.dtype) @ factors.a.T) @ factors.b.T
        return y + low.to(y.dtype)

    with _in_place_of_weights(layers, update), _at_each(layers, add):
        yield


@contextlib.contextmanager
def _in_place_of_weights(layers: Mapping[str, Layer], update: Mapping[str, Factors]) -> Iterator[None]:
    """Within the block the routers among the layers compute with W + b @ a: what they make of it is no product alone.

    The sum hides the parameter while the module computes, so that a partitioned one is gathered as ever.
    """

    def before(name: str) -> Any:
        def add(module: Any, _args: Any) -> None:
            factors = update.get(name)
            if factors is not None:
                module.__dict__["weight"] = module.weight + (factors.b @ factors.a).to(module.weight.dtype)

        return add

    def after(module: Any, _args: Any, _output: Any) -> None:
        module.__dict__.pop("weight", None)

    routers = {name: layer.module for name, layer in layers.items() if isinstance(layer, BareMatrix)}
    handles = [module.register_forward_pre_hook(before(name)) for name, module in routers.items()]
    handles += [module.register_forward_hook(after, always_call=True) for module in routers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def attached_update(model: Any, update: Mapping[str, Factors]) -> Iterator[dict[str, Layer]]:
    """Attach an update by module name, on the device of the model; yields the layers that it changes.

    Raises:
        UserError: the update does not fit the model
    """
    known = layers_of(model) if update else {}
    for name, factors in update.items():
        check_fits(known, name, factors)
    layers = {name: known[name] for name in update}
    with attached(layers, update):
        yield layers


@contextlib.contextmanager
def streamed(
    model: Any,
    layers: Mapping[str, Layer],
    use: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor | None], None],
) -> Iterator[None]:
    """Within the block every backward pass hands each layer's factors to ``use``, and keeps none of them.

    ``use`` takes the layer's name, its input (..., n), the loss's gradient at its output (..., m), and for an expert,
    where they are (rows, n) and (rows, m), which of the batch's tokens these rows are (rows,); layer after layer as
    backward reaches them. The weights are frozen, so the embedding's output is made to require a gradient: that alone
    makes autograd walk the model. A forward pass that is run again (gradient checkpointing) leaves nothing the first
    time, as it has no graph then.
    """

    def watch(name: str, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor | None) -> None:
        if y.requires_grad:
            x = x.detach()
            y.register_hook(lambda gradient: use(name, x, gradient.detach(), rows))

    model.enable_input_require_grads()
    try:
        with _at_each(layers, watch):
            yield
    finally:
        model.disable_input_require_grads()


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

    Rows are the tokens of the batch that ``keep`` selects, of an expert those among them that were sent to it. With
    gradient checkpointing the forward pass is run again for backward; the last inputs seen are the ones that belong to
    the gradient.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.inputs: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor | None] = {}
        self.keep: torch.Tensor | None = None

    @contextlib.contextmanager
    def capturing(self, model: Any) -> Iterator[None]:
        """Within the block every backward pass of ``model`` leaves its factors here."""
        with streamed(model, self.layers, self._keep):
            yield

    def clear(self) -> None:
        """Forget what the last pass left."""
        self.inputs.clear()
        self.deltas.clear()
        self.rows.clear()

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (X, delta) of one layer: (rows, n) and (rows, m); no rows where the loss did not reach it.

        In fp32, or in fp64 where the model computes in that.
        """
        import torch

        if name not in self.deltas:
            (m, n), known = shape_of(self.layers[name]), next(iter(self.deltas.values()))
            kind = torch.promote_types(known.dtype, torch.float32)
            return known.new_zeros(0, n, dtype=kind), known.new_zeros(0, m, dtype=kind)
        x, delta, rows = self.inputs[name].flatten(0, -2), self.deltas[name].flatten(0, -2), self.rows[name]
        if self.keep is not None:
            kept = self.keep.flatten()
            kept = kept if rows is None else kept[rows]
            x, delta = x[kept], delta[kept]
        kind = torch.promote_types(x.dtype, torch.float32)
        return x.to(kind), delta.to(kind)

    def places(self, name: str) -> torch.Tensor | None:
        """Return which of the batch's tokens, laid end to end, an expert's rows are, int64 (rows,), rising.

        None of a layer to which every token goes.
        """
        import torch

        if not isinstance(self.layers[name], ExpertMatrix):
            return None
        rows = self.rows.get(name)
        if rows is None:
            return torch.zeros(0, dtype=torch.int64, device=next(iter(self.deltas.values())).device)
        return rows if self.keep is None else rows[self.keep.flatten()[rows]]

    def _keep(self, name: str, x: torch.Tensor, delta: torch.Tensor, rows: torch.Tensor | None) -> None:
        self.inputs[name], self.deltas[name], self.rows[name] = x, delta, rows
