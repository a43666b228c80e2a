"""How much memory a run takes, per GPU and per machine, from the model's shape, the method and the sharding.

What is held between steps follows from this package's and DeepSpeed's own bookkeeping and is exact. What comes and goes
within a step (activations, holes that the allocator leaves) is an estimate, compared with measured peaks in
``docs/plan.md``. ``lower`` counts only what cannot be avoided: a run is refused by it alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from oneshot.checkpoint.layout import partition_size
from oneshot.checkpoint.quantized.experts_nf4 import is_packable
from oneshot.planning.facts import CHUNK, Choice, Device, Work, Zero
from oneshot.planning.passing import low_rank, within_pass
from oneshot.planning.shapes import PATCHED, ModelShape, Weight


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes.

    Attributes:
        load, steady, step, save: of a GPU: peak of loading, between steps, peaks of a step and of saving
        host: of a machine, all its ranks together
        lower: of a GPU, at the very least
        host_lower: of a machine, at the very least
    """

    load: int
    steady: int
    step: int
    save: int
    host: int
    lower: int
    host_lower: int

    @property
    def peak(self) -> int:
        return max(self.load, self.steady, self.step, self.save)


@dataclass(frozen=True)
class _Weights:
    """Bytes of the weights: whole, a rank's share, scales (whole on every rank), the largest, the largest 4-bit one
    unpacked for its product; and the elements that DeepSpeed counts."""

    whole: int
    share: int
    scales: int
    largest: int
    unpacked: int
    elements: int


def _weights(shape: ModelShape, choice: Choice) -> _Weights:
    ranks = choice.gpus if choice.sharding.startswith("zero3") else 1
    item = 4 if choice.cost.trains == "weights" and choice.sharding == "none" else choice.item
    whole = share = scales = unpacked = elements = 0
    for weight in shape.weights:
        numel = weight.numel
        if is_packed(weight, choice):
            at_once = numel // weight.shape[0] if weight.kind == "fused" else numel  # one expert at a time
            unpacked = max(unpacked, choice.item * at_once)
            blocks = -(-numel // 64)  # a scale each: 4 bytes, or 1 and another 4 for every 256 of them
            scales += weight.count * (blocks + 4 * -(-blocks // 256) if choice.double_quant else 4 * blocks)
            numel //= 2 * item  # two weights in a byte
        whole += weight.count * numel * item
        share += weight.count * partition_size(numel, ranks) * item
        elements += weight.count * numel
    return _Weights(whole, share, scales, shape.largest * item, unpacked, elements)


def is_packed(weight: Weight, choice: Choice) -> bool:
    """Return whether NF4 holds this weight in 4 bits.

    It does linear layers, but the head, that fill whole elements, and experts of which each fills whole blocks.
    """
    if weight.kind == "fused":
        return choice.precision == "nf4" and weight.alone and len(weight.shape) == 3 and is_packable(weight.shape)
    return choice.precision == "nf4" and weight.kind in PATCHED and weight.numel % (2 * choice.item) == 0


def estimate(shape: ModelShape, choice: Choice, work: Work, zero: Zero, device: Device) -> Memory:
    """Return what a run takes in memory."""
    sizes, cost = _weights(shape, choice), choice.cost
    partitioned = choice.sharding.startswith("zero3")
    away = partitioned and zero.offload_weights
    held = _states(shape, choice, work, zero)
    between = _between(sizes, choice, zero, device, partitioned, away)
    resting = sizes.scales + device.start + (0 if away else sizes.share)
    low, passing = low_rank(shape, choice, work), within_pass(shape, choice, work, device, sizes.whole)
    steady = resting + between.kept + held.device
    at_step = held.gradients + max(_adam(shape, choice, work, zero, device), _tied(shape, choice, device))
    # the head's gradient is there before any activation is gone, the others come as they go
    first = min(held.gradients, 4 * shape.vocabulary * shape.hidden) if cost.trains == "weights" else 0
    step = resting + held.device + max(between.peak + passing + first, between.kept + at_step)
    matrix = max((w.numel for w in shape.patched), default=0) if cost.decomposes else 0
    step = max(step, resting + low + 2 * 4 * matrix)  # an update is decomposed before the first step
    moved = 0 if cost.trains != "weights" or work.finetune else 3 * 4 * shape.largest  # what training changed, fp32
    save = steady + low + max(moved, CHUNK)
    load = resting - device.start + device.load + (sizes.largest if away else 0)
    host = _host(sizes, choice, zero, device, held, matrix)
    floor = sizes.scales + (0 if away else sizes.share) + held.device_lower
    if (partitioned and choice.gpus > 1) or away:
        floor += sizes.largest
    return Memory(load, steady, step, save, host, floor, _host_lower(sizes, choice, zero, held))


@dataclass(frozen=True)
class _Between:
    """Gathered weights beside a rank's share: what stays between passes, and the most within one."""

    kept: int
    peak: int


def _between(sizes: _Weights, choice: Choice, zero: Zero, device: Device, partitioned: bool, away: bool) -> _Between:
    if not partitioned or (choice.gpus == 1 and not away):
        return _Between(0, sizes.unpacked)
    copies = device.gather_copies * sizes.largest + sizes.unpacked
    per_element = sizes.whole / max(sizes.elements, 1)
    if choice.cost.trains == "nothing" and not away and sizes.elements <= zero.max_live:
        kept = sizes.whole - (1 - device.own_copies) * sizes.share
        return _Between(kept, kept + copies)  # engine.py gathers such a model once
    live = max(zero.max_live, zero.prefetch + int(sizes.largest / per_element))
    return _Between(0, min(sizes.whole, int(live * per_element)) + copies)


@dataclass(frozen=True)
class _States:
    """Optimizer states and buckets of a rank, on its device and (offloaded) in the machine's memory; and the gradients
    that come with a backward pass and go with the step."""

    device: int
    host: int
    device_lower: int
    gradients: int = 0


def trained(shape: ModelShape, choice: Choice, work: Work) -> int:
    """Return how many parameters the optimizer steps: all, those of the LoRA, or (frozen weights) none to speak of."""
    if choice.cost.trains == "weights":
        return shape.parameters
    return shape.low_rank(work.rank, work.rank_experts) if choice.cost.trains == "adapter" else 0


def optimizer_bytes(shape: ModelShape, choice: Choice, work: Work) -> int:
    """Return the bytes of fp32 weights, gradients and moments over all GPUs."""
    return 4 * (2 + choice.cost.moments) * trained(shape, choice, work)


def state_bytes(shape: ModelShape, choice: Choice, work: Work) -> int:
    """Return the bytes of a training state on disk: fp32 weights and moments."""
    return 4 * (1 + choice.cost.moments) * trained(shape, choice, work)


def _states(shape: ModelShape, choice: Choice, work: Work, zero: Zero) -> _States:
    count, cost = trained(shape, choice, work), choice.cost
    if not count:
        return _States(0, 0, 0)
    each = 4 * (2 + cost.moments)  # fp32 master and gradient, moments
    if choice.sharding == "none":  # weights are fp32 themselves, the LoRA's too
        states = (each - 4 if cost.trains == "weights" else each) * count
        buckets = 4 * count if choice.gpus > 1 else 0  # of DDP
        return _States(states - 4 * count + buckets, 0, states, 4 * count)
    own = -(-count // choice.gpus)
    bucket = choice.item * min(zero.reduce_bucket, count) * (2 if choice.sharding == "zero2" else 1)
    states = each * own
    adapter = 0
    if cost.trains == "adapter":  # PEFT makes it in fp32; partitions, their flat copy and what is gathered of them
        adapter = 16 * own if choice.sharding != "zero2" else 4 * count
    if zero.offload_states:
        return _States(bucket + adapter, states, 0)
    return _States(states + adapter + bucket, 0, states)


def _adam(shape: ModelShape, choice: Choice, work: Work, zero: Zero, device: Device) -> int:
    """What AdamW's step takes beside what is held: the gradients in one piece, and the copies that it works in."""
    count = trained(shape, choice, work)
    if not count or zero.offload_states:
        return 0
    if choice.sharding == "none":
        return 4 * count * device.adam_copies
    own = min(-(-count // choice.gpus), zero.sub_group)
    gathered = choice.item * min(zero.allgather_bucket, count) if choice.sharding == "zero2" else 0
    return max(4 * own * (1 + device.adam_copies), gathered)


def _tied(shape: ModelShape, choice: Choice, device: Device) -> int:
    """Copies of the gradient of an embedding that is the head as well, at the end of a backward pass (``tied.py``)."""
    if choice.cost.trains != "weights" or choice.sharding != "none" or shape.of("head"):
        return 0
    return 4 * shape.vocabulary * shape.hidden * (device.tied_copies if choice.gpus == 1 else 2)


def _host(sizes: _Weights, choice: Choice, zero: Zero, device: Device, held: _States, matrix: int) -> int:
    """Memory of a machine: its processes, what they load through it (``matrix``: elements of the largest that is
    decomposed), and what is offloaded to it."""
    rank = device.host + CHUNK + held.host + 4 * matrix
    partitioned = choice.sharding.startswith("zero3")
    if partitioned and zero.offload_weights:
        rank += sizes.share
    if choice.builds_in_host:
        rank += sizes.whole  # transformers builds the model there, in every process; ours reads it to the device
    return rank * choice.ranks_per_node


def _host_lower(sizes: _Weights, choice: Choice, zero: Zero, held: _States) -> int:
    if zero.nvme:
        return 0
    away = choice.sharding.startswith("zero3") and zero.offload_weights
    return (held.host + (sizes.share if away else 0)) * choice.ranks_per_node
