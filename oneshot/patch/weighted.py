"""Coefficients of directions: where each matrix's are in one vector, what update they make, and which were reached."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.adapters.update import Factors
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.patch.directions import Directions, update_factors
from oneshot.patch.linears import grouped

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer


@dataclass(frozen=True)
class Layout:
    """Where in a vector of all that is learnt each matrix's numbers are.

    Attributes:
        sizes: of the vector's parts: one for each layer, and one for all experts of one parameter, so that autograd
            takes apart hundreds and not thousands
        starts: where each part starts
        places: matrix -> (number of its part, where in that part its own are)
    """

    sizes: list[int]
    starts: list[int]
    places: dict[str, tuple[int, slice]]

    def own(self, name: str) -> slice:
        """Return where in the whole vector a matrix's coefficients are."""
        part, within = self.places[name]
        return slice(self.starts[part] + within.start, self.starts[part] + within.stop)


def layout_of(layers: Mapping[str, Layer], counts: Mapping[str, int]) -> Layout:
    """Lay the coefficients of all layers out in one vector, in their order.

    Args:
        counts: how many each has
    """
    found = Layout([], [], {})
    for part, (_, group) in enumerate(grouped(layers)):
        at = 0
        for name in group:
            found.places[name] = part, slice(at, at := at + counts[name])
        found.starts.append(sum(found.sizes))
        found.sizes.append(at)
    return found


class Weighted(Mapping[str, Factors]):
    """The update that adds so much of each direction, of which a matrix's factors are made when they are asked for.

    With a graph anew each time: a forward pass that is run again (gradient checkpointing) must do what the first did.

    Attributes:
        asked: whose were asked for: of thousands of experts a pass reaches some
    """

    def __init__(self, directions: Mapping[str, Directions], layout: Layout, weights: torch.Tensor) -> None:
        self.asked: set[str] = set()
        self._made: dict[str, Factors] = {}
        self._directions, self._layout = directions, layout
        self._parts, self._anew = weights.split(layout.sizes), weights.requires_grad

    def __getitem__(self, name: str) -> Factors:
        if name in self._made:
            return self._made[name]
        self.asked.add(name)
        part, own = self._layout.places[name]
        made = update_factors(self._directions[name], self._parts[part][own])
        if not self._anew:
            self._made[name] = made
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._directions)

    def __len__(self) -> int:
        return len(self._directions)


@dataclass(frozen=True)
class Reach:
    """Which matrices a token has been sent to: all but some experts'.

    Attributes:
        missed: names of experts' matrices that none has been sent to yet
        pulled: bool (coefficients,), those of all others
    """

    layout: Layout
    missed: set[str]
    pulled: torch.Tensor

    def add(self, runtime: Runtime, names: Collection[str]) -> None:
        """Add what passes of this rank have reached, and those of the others. Collective."""
        import torch

        if not self.missed:
            return
        order = sorted(self.missed)
        asked = torch.tensor([name in names for name in order], dtype=torch.int32, device=runtime.device)
        for name, count in zip(order, all_reduce_sum(runtime, asked).tolist()):
            if count:
                self.pulled[self.layout.own(name)] = True
                self.missed.remove(name)


def reach_of(
    layers: Mapping[str, Layer], layout: Layout, coefficients: torch.Tensor, still: Collection[str] = ()
) -> Reach:
    """Return the reach before any pass: no expert, and every layer that all tokens go through.

    Args:
        still: names of matrices that are never pulled
    """
    import torch

    reach = Reach(layout, set(), torch.ones_like(coefficients, dtype=torch.bool))
    for name, layer in layers.items():
        if name in still:
            reach.pulled[layout.own(name)] = False
        elif isinstance(layer, ExpertMatrix):
            reach.missed.add(name)
            reach.pulled[layout.own(name)] = False
    return reach
