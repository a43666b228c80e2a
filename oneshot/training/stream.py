"""Which conversations make up which optimizer step: pure functions of seed and step, the same for any world size."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE, Encoded, pad_batch
from oneshot.training.objective import MicroBatch

if TYPE_CHECKING:
    import torch


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


def micro_batches(
    encoded: list[Encoded],
    indices: list[int],
    *,
    pad_id: int,
    rank: int,
    world_size: int,
    accumulation: int,
    device: torch.device | Any,
) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step; one without work gets a conversation that counts for nothing.

    Every rank must run the same number of forward passes, since under ZeRO-3 and DDP each of them is a collective.
    """
    total = sum(encoded[i].answer_tokens() for i in indices)
    batches = []
    for k in range(accumulation):
        mine = [encoded[i] for i in indices[rank + k * world_size :: world_size * accumulation]]
        tokens = sum(len(row.input_ids) for row in mine)
        if not mine:
            start = encoded[indices[0]].input_ids[:2]
            mine = [Encoded(start, [IGNORE] * len(start))]
        tensors = {name: tensor.to(device) for name, tensor in pad_batch(mine, pad_id).items()}
        labels = tensors.pop("labels")
        batches.append(MicroBatch(tensors, labels, total, tokens))
    return batches
