"""What rollback learns: how much of each direction of the fine-tune's update is undone, and what of it is left.

Of a full fine-tune one coefficient c_i per leading direction: the update's other directions stay, and with them most of
what was learnt. An adapter is nothing but its directions, so that a request that is to be refused and the task share
each of them; of it a whole matrix K (r, r) is learnt, U sqrt(S) K sqrt(S) V^T, which can be at work on the one and not
on the other. I leaves all as it is, 0 undoes all, and K never lengthens anything: the repaired adapter does nothing
that the adapter could not do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapters.carrier import halves
from oneshot.checkpoint.adapters.update import Factors
from oneshot.patch.directions import Directions
from oneshot.patch.weighted import Layout, layout_of

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer

# undoing a direction once is not enough where others, that are left out, carry the damage, too
MAX_COEFFICIENT = 3.0
# step of an element of K beside its diagonal, times sqrt(r): r^2 of them lengthen by about 2 sqrt(r) such steps
BESIDE = 0.8
# undone of each direction before the first epoch, of coefficients and of cores: from the fine-tuned model it takes
# several to come as far, and from wholly undone only the guard pulls, along all directions back
BEGUN, BEGUN_CORES = 0.75, 0.5


@dataclass(frozen=True)
class Coefficients:
    """One number per direction, 0 to ``MAX_COEFFICIENT``: the share of it that is taken away from the weights.

    Attributes:
        layout: of all in one vector
    """

    layout: Layout

    def begun(self, nothing: torch.Tensor) -> torch.Tensor:
        """Return the vector that is on the way from nothing undone: every direction alike."""
        return nothing + BEGUN

    def added(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what is added of each direction."""
        return -flat

    def pull(self, flat: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        """Return the mean square of what is left of the directions."""
        return (1 - flat)[reached].clamp(min=0).square().mean()

    def keep_within(self, flat: torch.Tensor) -> torch.Tensor:
        """Put the vector within its bounds, in place; return it, without its graph."""
        return flat.detach().clamp_(0.0, MAX_COEFFICIENT)

    def undone(self, flat: torch.Tensor, reached: torch.Tensor) -> float:
        """Return the mean share that is undone."""
        return float(flat[reached].mean())


@dataclass(frozen=True)
class Cores:
    """A matrix K (r, r) per matrix of an adapter, of which the vector holds (I - K) / ``step``.

    Attributes:
        layout: of all in one vector
        ranks: matrix -> r
        ones: (elements,), the matrices I
        step: (elements,), how far an element goes with a step of the optimizer, against one on the diagonal; 0: stays
    """

    layout: Layout
    ranks: dict[str, int]
    ones: torch.Tensor
    step: torch.Tensor

    def begun(self, nothing: torch.Tensor) -> torch.Tensor:
        """Return the vector that is on the way from nothing undone: every direction alike."""
        return nothing + BEGUN_CORES * self.ones

    def added(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the matrices K."""
        return self.ones - flat * self.step

    def pull(self, flat: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        """Return the mean square of what is left of the directions."""
        return self.added(flat)[reached].square().sum() / self.ones[reached].sum()

    def keep_within(self, flat: torch.Tensor) -> torch.Tensor:
        """Shorten what K lengthens, in place; return the vector, without its graph."""
        import torch

        held = flat.detach()
        left = self.added(held)
        if not bool(left.isfinite().all()):  # the next epoch's loss says so
            return held
        for rank in sorted(set(self.ranks.values())):
            own = [self.layout.own(name) for name, r in self.ranks.items() if r == rank]
            u, s, vt = torch.linalg.svd(torch.stack([left[each] for each in own]).view(-1, rank, rank))
            for each, shortened in zip(own, (u * s.clamp(max=1.0)[:, None]) @ vt):
                left[each] = shortened.flatten()
        held.copy_(torch.where(self.step > 0, (self.ones - left) / self.step, 0.0))
        return held

    def undone(self, flat: torch.Tensor, reached: torch.Tensor) -> float:
        """Return the mean share of each direction that is undone."""
        return float(flat[reached & (self.ones > 0)].mean())


def learnt_of(
    layers: Mapping[str, Layer],
    directions: Mapping[str, Directions],
    device: torch.device,
    *,
    kept: bool,
    still: Collection[str] = (),
) -> Coefficients | Cores:
    """Return what is to be learnt of directions; 0 everywhere leaves the fine-tune as it is.

    Args:
        kept: they are an adapter's, which the model lacks
        still: names of an adapter's matrices that stay as they are
    """
    import torch

    ranks = {name: len(found.s) for name, found in directions.items()}
    if not kept:
        return Coefficients(layout_of(layers, ranks))
    layout = layout_of(layers, {name: rank**2 for name, rank in ranks.items()})
    ones, step = (torch.zeros(sum(layout.sizes), device=device) for _ in range(2))
    for name, rank in ranks.items():
        eye = torch.eye(rank, device=device)
        ones[layout.own(name)] = eye.flatten()
        beside = BESIDE / math.sqrt(rank) * _together(name, directions[name])
        step[layout.own(name)] = torch.where(eye > 0, eye, beside).flatten() * (name not in still)
    return Cores(layout, ranks, ones, step)


def _together(name: str, directions: Directions) -> torch.Tensor:
    """Which directions may be mixed, (r, r), 1 or 0: not those of an expert's gate and up that have each their own."""
    import torch

    u = directions.u
    if halves(name, Factors(u, directions.vt)) is None:
        return u.new_ones(u.shape[1], u.shape[1])
    upper = u[: len(u) // 2].ne(0).any(dim=0)
    return torch.eq(upper[:, None], upper).to(u.dtype)
