"""Which conversations make up which optimizer step: pure functions of seed and step, the same for any world size."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from oneshot.data.encoding import IGNORE, Encoded, pad_batch
from oneshot.distributed.runtime import Runtime
from oneshot.training.objective import MicroBatch, answers
from oneshot.training.packing import Packing, deal, pack, rows_of, to_device


def step_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the examples of an optimizer step: each epoch is a fresh permutation, the last batch of one is short."""
    per_epoch = steps_per_epoch(count, batch_size)
    epoch, position = divmod(step, per_epoch)
    order = list(range(count))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order[position * batch_size : (position + 1) * batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return how many optimizer steps one pass over ``count`` examples takes."""
    return math.ceil(count / batch_size)


def share(sizes: Sequence[int], world_size: int, accumulation: int, *, by_tokens: bool) -> list[list[list[int]]]:
    """Share a step's conversations out: [accumulation step][rank] -> indices into ``sizes``, longest first.

    Args:
        sizes: tokens of each conversation
        by_tokens: shares have as equal a number of tokens as may be, for rows that are packed. Otherwise the shares of
            one accumulation step have equal numbers of conversations of similar lengths, so that little is padded.
            Either way the ranks, which wait for each other in every pass, have alike to do
    """
    if by_tokens:
        hands = deal(sizes, world_size * accumulation)
        hands.sort(key=lambda hand: -sum(sizes[i] for i in hand))
        return [hands[k * world_size : (k + 1) * world_size] for k in range(accumulation)]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    bounds = [len(order) * k // accumulation for k in range(accumulation + 1)]
    chunks = [order[low:high] for low, high in itertools.pairwise(bounds)]
    return [[chunk[rank::world_size] for rank in range(world_size)] for chunk in chunks]


def micro_batches(
    encoded: Sequence[Encoded],
    indices: list[int],
    runtime: Runtime,
    *,
    pad_id: int,
    accumulation: int,
    packing: Packing | None = None,
) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step; one without work gets a conversation that counts for nothing.

    Every rank must run the same number of forward passes, since under ZeRO-3 and DDP each of them is a collective.

    Args:
        packing: how conversations are packed into rows; none: a row for each, padded on the right
    """
    step = [encoded[i] for i in indices]
    sizes = [len(row.input_ids) for row in step]
    total = sum(row.answer_tokens() for row in step)
    batches = []
    for shares in share(sizes, runtime.world_size, accumulation, by_tokens=packing is not None):
        mine = [step[i] for i in shares[runtime.rank]]
        tokens = sum(len(row.input_ids) for row in mine)
        if not mine:
            start = step[0].input_ids[:2]
            mine = [Encoded(start, [IGNORE] * len(start))]
        if packing is None:
            tensors = pad_batch(mine, pad_id)
        else:
            rows = rows_of([len(row.input_ids) for row in mine], packing)
            tensors = pack([[mine[i] for i in row] for row in rows], pad_id, flat=packing.flat)
        kept, targets = answers(tensors.pop("labels"))
        tensors = to_device({**tensors, "kept": kept, "targets": targets}, runtime.device)
        batches.append(MicroBatch(tensors.pop("kept"), tensors.pop("targets"), tensors, total, tokens))
    return batches
