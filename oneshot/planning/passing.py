"""What comes and goes within one pass of a rank: activations, factored gradients, logits, and the allocator's holes.

All of it is an estimate, in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from oneshot.planning.facts import CHUNK, Choice, Device, Work
from oneshot.planning.shapes import PATCHED, ModelShape

Blocks = list[tuple[int, float]]  # bytes of a tensor, and how many such there are


def within_pass(shape: ModelShape, choice: Choice, work: Work, device: Device, weights: int) -> int:
    """Return the most that a pass holds beside weights, states and gradients of weights.

    Args:
        weights: bytes of all weights
    """
    cost = choice.cost
    traced = work if cost.guard_gradient else replace(work, guard=0)
    count = passes(shape, choice, traced, max(device.room, weights // 2))
    guard = max(0, int(traced.places / count) - traced.rows * traced.tokens)
    traced = replace(traced, guard=guard) if count > 1 else traced
    holes = device.lora_holes if cost.trains == "adapter" else device.holes
    low = int(low_rank(shape, choice, work) * (1 + device.pair_holes))
    found = _held(_activations(shape, choice, traced), device, holes) + low + _logits(shape, choice, work, count)
    if cost.factors:  # activations are gone once all pairs are there
        captured = _held(_captured(shape, choice, traced), device, holes)
        pairs = cost.factors * _held(_pairs(shape, choice, work), device, device.pair_holes)
        found = max(int(found + pairs * (1 - 1 / count)), captured + low + pairs)
    return found + _cast(shape, choice)


def passes(shape: ModelShape, choice: Choice, work: Work, room: int) -> float:
    """Return in how many passes of the largest size a repair's step is taken (``oneshot.patch.dealing.passes_of``).

    No whole number, so that an estimate does not grow where there are more GPUs and fewer passes.
    """
    if work.finetune or choice.cost.trains != "nothing" or not work.guard:
        return 1.0
    held = work.places * choice.item * sum(sum(weight.shape) * weight.count for weight in shape.patched)
    return max(1.0, held / room)


def low_rank(shape: ModelShape, choice: Choice, work: Work) -> int:
    """Return the bytes of what a method holds as low-rank factors, in fp32.

    Directions and update; or the update, a trial and the gradient's kept directions.
    """
    cost = choice.cost
    return (
        4 * (3 if cost.factors else 2) * shape.low_rank(work.rank, work.rank_experts) if cost.trains == "nothing" else 0
    )


def _held(blocks: Iterable[tuple[int, float]], device: Device, holes: float) -> int:
    """What an allocator holds for blocks: those that are mapped one by one leave no holes."""
    return int(sum(size * count * (1 + (holes if size < device.mapped else 0)) for size, count in blocks))


def _activations(shape: ModelShape, choice: Choice, work: Work) -> Blocks:
    """What autograd keeps of the model's blocks from the forward to the backward pass.

    Inputs of linear layers are part of it where a weight or a factored gradient needs them, and under ZeRO-3, whose own
    linear function keeps them. Keys and values count as repeated for every head, which attention under a mask needs.
    """
    places, item, cost = work.places, choice.item, choice.cost
    trains = cost.trains == "weights"
    inputs = cost.trains != "nothing" or cost.factors > 0 or choice.sharding.startswith("zero3")
    hidden, wide, inner = (places * n for n in (shape.hidden, shape.heads * shape.head_dim, shape.ffn))
    block: Blocks = [(4 * hidden, 2), (item * hidden, 2 * (trains + inputs)), (4 * places * shape.heads, 1)]
    block += [(item * wide, 4), (item * inner, 2 + shape.gated + inputs)]
    if cost.trains == "adapter" and item == 2:  # each LoRA computes on an fp32 copy of its layer's input
        block += [(4 * places * w.shape[1], w.count / shape.layers) for w in shape.patched]
    if not work.checkpointing:
        return [(size, count * shape.layers) for size, count in block]
    # factored gradients need the inputs of linear layers all the same
    return [(item * hidden, shape.layers), *block, *(_inputs(shape, choice, work) if cost.factors else [])]


def _logits(shape: ModelShape, choice: Choice, work: Work, count: float) -> int:
    """Logits, their gradients and the reference's, and the fp32 probabilities of the positions that count.

    Args:
        count: passes of a step; the reference's are there throughout
    """
    item = choice.item
    if work.finetune:  # in one place, in fp32
        return shape.vocabulary * work.answers * (4 if item == 4 else 4 + item)
    chunks = 4 * CHUNK if work.held else 0  # of probabilities
    held = work.reference + max(work.reference, int(2 * work.held / count))  # or two of each, while they are made
    return shape.vocabulary * (item * (2 * work.answers + held) + 3 * 4 * work.answers) + chunks


def _cast(shape: ModelShape, choice: Choice) -> int:
    """16-bit copies of fp32 weights, which autocast makes and autograd keeps for the backward pass."""
    if choice.cost.trains != "weights" or choice.sharding != "none" or choice.item == 4:
        return 0
    return choice.item * (shape.of(*PATCHED, "fused") + shape.vocabulary * shape.hidden)


def _pairs(shape: ModelShape, choice: Choice, work: Work) -> Blocks:
    """One generation of factored gradients, in fp32: a rank's share of the layers."""
    rows = work.total if choice.cost.guard_gradient else work.tokens
    linears = [(4 * rows * size, w.count / choice.gpus) for w in shape.patched for size in w.shape]
    return [*linears, *((4 * tokens, count / choice.gpus) for tokens, count in _routed(shape, work, rows))]


def _captured(shape: ModelShape, choice: Choice, work: Work) -> Blocks:
    """Inputs and output gradients of all layers, as a backward pass leaves them on a rank."""
    item = choice.item * work.places
    found = [*_inputs(shape, choice, work), *((item * w.shape[0], w.count) for w in shape.patched)]
    return [*found, *((choice.item * size, count) for size, count in _routed(shape, work, work.places))]


def _routed(shape: ModelShape, work: Work, tokens: int) -> Blocks:
    """Elements of what fused experts take and give, a tensor of its own for each, where a patch has factors of them."""
    if not work.rank_experts:
        return []
    fused = [w for w in shape.weights if w.kind == "fused" and w.alone and w.matrices]
    own = {w: tokens * (shape.chosen or w.shape[0]) / w.shape[0] for w in fused}  # of the tokens, one expert's
    return [(int(own[w] * size), w.count * w.shape[0]) for w in fused for size in w.shape[1:]]


def _inputs(shape: ModelShape, choice: Choice, work: Work) -> Blocks:
    """What all linear layers take, each tensor once."""
    item = choice.item * work.places
    wide = shape.heads * shape.head_dim
    return [(item * shape.hidden, 2 * shape.layers), (item * wide, shape.layers), (item * shape.ffn, shape.layers)]
