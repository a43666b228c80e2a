"""How long a run takes, from given rates of disk, network and compute: an order of magnitude, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from oneshot.planning.facts import Choice, Work, Zero
from oneshot.planning.memory import trained
from oneshot.planning.shapes import PATCHED, ModelShape

_PCIE = 2 * 10**10  # bytes per second between a GPU and the machine's memory


@dataclass(frozen=True)
class Rates:
    """Bytes per second that a machine reads from disk and a GPU gathers from others, and FLOP per second of a GPU."""

    disk: int
    network: int
    compute: float


@dataclass(frozen=True)
class Duration:
    """Seconds of loading, of one step, and of all steps and the loading together; answers to probes not counted."""

    load: float
    step: float
    total: float


def duration(
    shape: ModelShape, choice: Choice, work: Work, zero: Zero, rates: Rates, steps: int, read: int
) -> Duration:
    """Return how long a run takes.

    load: bytes that a machine reads / disk rate. step: 2 * (weights that a token meets) * tokens * passes / compute
    rate, passes being 1 forward, 1 for the gradients of activations, 1 for those of trained weights and 1 to recompute;
    then what travels / network rate, as if nothing overlapped. A method whose epochs are forward passes makes one each.

    Args:
        read: bytes of the checkpoint, and of what is compared with another; every machine reads its share
    """
    partitioned = choice.sharding.startswith("zero3")
    machines = -(-choice.gpus // choice.per_node)
    load = read / (1 if choice.builds_in_host else machines) / rates.disk
    cost = choice.cost
    passes = 2 + (cost.trains == "weights") + work.checkpointing if cost.backward else 1
    compute = 2 * shape.active * work.places * passes / rates.compute
    step = compute + _travel(shape, choice, work, zero) / rates.network
    if partitioned and zero.offload_weights:
        step += 2 * choice.item * shape.parameters / choice.gpus / _PCIE
    steps += cost.extra_passes
    return Duration(load, step, load + steps * step)


def _travel(shape: ModelShape, choice: Choice, work: Work, zero: Zero) -> float:
    """Bytes that a GPU receives in a step: gathered weights in both passes, and gradients scattered."""
    others = (choice.gpus - 1) / choice.gpus
    packed = shape.of(*PATCHED) if choice.precision == "nf4" else 0
    weights = choice.item * (shape.parameters - packed) + packed / 2
    elements = shape.parameters - packed + packed / (2 * choice.item)
    gradients = choice.item * trained(shape, choice, work)
    if choice.sharding == "zero2":
        return (gradients + gradients) * others  # scattered, and the new weights gathered
    if not choice.sharding.startswith("zero3"):
        return 2 * gradients * others
    kept = not gradients and elements <= zero.max_live and not zero.offload_weights
    return ((0 if kept else 2 * weights) + gradients) * others
