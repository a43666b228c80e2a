"""Factored gradients summed over conversations, each layer's on the one rank that keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from oneshot.checkpoint.adapters.update import Factors, compress
from oneshot.data.encoding import Encoded
from oneshot.distributed.many import gather_each
from oneshot.distributed.runtime import Runtime, gather_objects, gather_rows
from oneshot.patch.attach import Gradients
from oneshot.patch.factored import Pair
from oneshot.patch.linears import grouped, takes_head
from oneshot.patch.objective import ROWS_PER_PASS, Pass, passes, row_losses

COUNTED = "gradients"  # what all conversations are counted as
Seen = Callable[[int, str, Pair], None]  # (place among the conversations, layer, its factors)


def gradient_factors(
    runtime: Runtime,
    model: Any,
    gradients: Gradients,
    rows: list[Encoded],
    pad: int,
    *,
    batch_size: int = ROWS_PER_PASS,
    seen: Seen | None = None,
) -> dict[str, Pair]:
    """Return the factors of the summed gradients of all conversations. Collective, within ``gradients.capturing``.

    Ranks compute different conversations, in as many passes each; every layer's factors go to the one rank that
    keeps it.

    Args:
        batch_size: conversations in a pass, per rank
        seen: called with each conversation's own factors, in no fixed order, on the rank that keeps the layer

    Returns:
        layer -> (X, delta) of every world_size-th layer from this rank's on, of at most 2 min(m, n) rows; layers that
        no loss reaches have none
    """
    import torch

    held: dict[str, Pair] = {}
    whole = takes_head(model, gradients.layers)
    for part in passes(runtime, rows, pad, batch_size, COUNTED):
        losses = row_losses(model, part, None, whole=whole)
        torch.stack([loss / rows[place].answer_tokens() for place, loss in zip(part.places, losses)]).sum().backward()
        gradients.keep = part.inputs["attention_mask"].bool()
        gradients.keep[part.own :] = False  # those are there to keep the ranks in step
        places = [place for own in gather_objects(runtime, part.places[: part.own]) for place in own]
        counts = _rows_of_each(runtime, gradients, part, rows) if seen else {}
        for name, pair in _own_pairs(runtime, gradients):
            if seen is not None:
                for place, one, other in zip(places, *(side.split(counts[name]) for side in pair)):
                    seen(place, name, (one, other))
            held[name] = _joined(held.get(name), pair)
        gradients.clear()
    return held


def _own_pairs(runtime: Runtime, gradients: Gradients) -> Iterator[tuple[str, Pair]]:
    """The factors of every world_size-th layer from this rank's on, with the rows of all ranks, where there are any."""
    for at, group in grouped(gradients.layers):
        x, delta = (gather_each(runtime, side) for side in zip(*map(gradients.pair, group)))
        for i, name in enumerate(group):
            if (at + i) % runtime.world_size == runtime.rank and len(x[i]):
                yield name, (x[i], delta[i])


def _rows_of_each(runtime: Runtime, gradients: Gradients, part: Pass, rows: list[Encoded]) -> dict[str, list[int]]:
    """How many rows each conversation of all ranks' passes has, by layer: its tokens, of an expert those sent to it."""
    import torch

    width, own = part.inputs["input_ids"].shape[1], part.own
    tokens = [len(rows[place].input_ids) for place in part.places[:own]]  # of none where there are more ranks than rows
    lengths = torch.tensor(tokens, dtype=torch.int64, device=runtime.device)
    sent = [gradients.places(name) for name in gradients.layers]
    local = [lengths if at is None else torch.bincount(at // width, minlength=own) for at in sent]
    counts = gather_rows(runtime, torch.stack(local, dim=1))
    return dict(zip(gradients.layers, counts.T.tolist()))


def _joined(held: Pair | None, new: Pair) -> Pair:
    import torch

    if held is not None:
        new = (torch.cat([held[0], new[0]]), torch.cat([held[1], new[1]]))
    if len(new[0]) <= 2 * min(new[0].shape[1], new[1].shape[1]):
        return new
    small = compress(Factors(new[1].T, new[0]), None)
    return small.a, small.b.T.contiguous()
