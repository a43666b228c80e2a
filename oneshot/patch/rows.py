"""Token sequences laid out as rows of one forward pass, what they have in common computed once.

Prompts share the head of their template and a system prompt, and both continuations of a prompt share the prompt. In a
shared row every distinct prefix stands once: each token has the position that it has in its sequence, and attends to
its own sequence's earlier tokens only. Where a model does not compute the same in such rows (a state that runs on,
positions or a mask that it does not take) every sequence has a row of its own; the model is asked, not a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import Encoded, pad_batch
from oneshot.distributed.runtime import Runtime, all_gather_int
from oneshot.training.objective import logits_at
from oneshot.training.packing import deal

if TYPE_CHECKING:
    import torch

# tokens of a shared row, about: what is shared is computed once a row, and attention, which costs its square, stays a
# small part of the work while a row is no longer than the model is wide
SHORTEST, LONGEST = 128, 1024
WORTH = 0.8  # of the places that separate rows take; beyond, longer attention costs what is saved
TRIED = 3  # sequences that the model is asked about
TRIED_TOKENS = 8  # at the end of each
EXACT, ROUNDED = 1e-4, 5e-2  # of the logits' spread: rounding of fp32, of 16 bits


@dataclass(frozen=True)
class Rows:
    """What goes through the model.

    Attributes:
        inputs: input_ids int64 (rows, tokens), with attention_mask, and position_ids where rows are shared
        places: of each sequence's tokens in the rows laid end to end, int64 (its tokens)
        real: bool (rows * tokens), false at padding
    """

    inputs: dict[str, torch.Tensor]
    places: list[torch.Tensor]
    real: torch.Tensor


@dataclass(frozen=True)
class Sharing:
    """How rows are shared.

    Attributes:
        length: tokens of a row, about
        additive: dtype of attention masks that are added to scores; none: they are boolean
    """

    length: int
    additive: torch.dtype | None = None


def separate(sequences: Sequence[list[int]], pad: int, device: torch.device) -> Rows:
    """Give every sequence a row of its own, padded on the right."""
    import torch

    tensors = pad_batch([Encoded(ids, ids) for ids in sequences], pad)
    del tensors["labels"]
    width = tensors["input_ids"].shape[1]
    places = [row * width + torch.arange(len(ids), device=device) for row, ids in enumerate(sequences)]
    inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Rows(inputs, places, inputs["attention_mask"].bool().flatten())


def lay(
    groups: Sequence[list[list[int]]], pad: int, device: torch.device, sharing: Sharing | None, *, apart: bool = False
) -> Rows:
    """Lay sequences out in rows, in the order of their groups.

    Args:
        groups: sequences that are to be in one row, as they have most in common
        sharing: how; none: every sequence has a row of its own
        apart: the first group shares no token with the others, though it may share a row
    """
    import torch

    if sharing is None:
        return separate([ids for group in groups for ids in group], pad, device)
    rows: list[_Row] = []
    places: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for hand in _dealt(groups, sharing.length, apart=apart):
        named = [(g, i) for g in hand for i in range(len(groups[g]))]
        rows.append(_merged([groups[g][i] for g, i in named], [apart and g == 0 for g, _ in named]))
        places |= {name: (len(rows) - 1, at) for name, at in zip(named, rows[-1].places)}
    width = max(len(row.tokens) for row in rows)
    inputs = _tensors(rows, width, pad, sharing)
    return Rows(
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        places=[row * width + torch.tensor(at, device=device) for _, (row, at) in sorted(places.items())],
        real=torch.cat([torch.arange(width, device=device) < len(row.tokens) for row in rows]),
    )


def sharing_of(runtime: Runtime, model: Any, groups: Sequence[list[list[int]]], pad: int) -> Sharing | None:
    """Return how the model takes shared rows; none where that saves little, or where it does not compute in them as in
    separate ones. Collective.

    It is asked about the longest sequence of this rank's, behind others, so that a window of attention that is shorter
    shows.

    Args:
        groups: as of ``lay``, at least one; ranks may have different ones
    """
    import torch

    sharing = _interface(model)
    if not all(all_gather_int(runtime, int(sharing is not None and _worth(groups, pad, sharing)))):
        return None
    tried, found = _tried([ids for group in groups for ids in group]), []
    for how in (None, sharing):
        rows = lay([tried], pad, runtime.device, how)
        kept = torch.cat([places[-TRIED_TOKENS:] for places in rows.places])
        with torch.no_grad():
            found.append(logits_at(model, rows.inputs, kept).float())
    off = (found[0] - found[1]).abs().max() / found[0].std()
    alike = float(off) <= (EXACT if model.dtype == torch.float32 else ROUNDED)
    return sharing if all(all_gather_int(runtime, int(alike))) else None


def _worth(groups: Sequence[list[list[int]]], pad: int, sharing: Sharing) -> bool:
    """Whether shared rows are enough smaller. A rank that has a single sequence leaves it to the others."""
    import torch

    together, alone = (lay(groups, pad, torch.device("cpu"), how) for how in (sharing, None))
    return len(alone.places) == 1 or len(together.real) <= WORTH * len(alone.real)


def _tried(sequences: list[list[int]]) -> list[list[int]]:
    """The longest sequence behind others."""
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
    others = [ids for i, ids in enumerate(sequences) if i != longest][: TRIED - 1]
    return [*others, sequences[longest]] if others else [sequences[longest][:-1], sequences[longest]]


def _interface(model: Any) -> Sharing | None:
    """How masks have to look, by the model's attention; none where it takes no such mask, or no positions."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    if kind not in ("sdpa", "eager") or "position_ids" not in inspect.signature(inner.forward).parameters:
        return None
    width = getattr(inner.config.get_text_config(), "hidden_size", SHORTEST)
    return Sharing(min(max(width, SHORTEST), LONGEST), None if kind == "sdpa" else inner.dtype)


@dataclass(frozen=True)
class _Row:
    """Distinct prefixes of some sequences: each one's last token, and the place in the row of the one before it (-1
    for none); and the places of each sequence's tokens."""

    tokens: list[int]
    before: list[int]
    places: list[list[int]]


def _merged(sequences: Sequence[list[int]], alone: Sequence[bool]) -> _Row:
    """Put sequences into a row, each distinct prefix once; one that is alone has its prefixes for itself."""
    row, known = _Row([], [], []), dict[tuple[int, int], int]()
    for number, (ids, own) in enumerate(zip(sequences, alone)):
        at, path = -2 - number if own else -1, []
        for token in ids:
            if (at, token) not in known:
                known[at, token] = len(row.tokens)
                row.tokens.append(token)
                row.before.append(max(at, -1))
            at = known[at, token]
            path.append(at)
        row.places.append(path)
    return row


def _dealt(groups: Sequence[list[list[int]]], length: int, *, apart: bool) -> list[list[int]]:
    """Deal groups out to as many rows as keep each near ``length``, those that cost the most first."""
    sizes = [len(_merged(group, [False] * len(group)).tokens) for group in groups]
    common = _common([ids for group in groups[int(apart) :] for ids in group])
    added = [size if apart and g == 0 else max(size - common, 1) for g, size in enumerate(sizes)]
    room = max(length - common, *added)
    return [sorted(hand) for hand in deal(added, -(-sum(added) // room)) if hand]


def _common(sequences: Sequence[list[int]]) -> int:
    """Length of the longest prefix of all."""
    if not sequences:
        return 0
    first, last = min(sequences), max(sequences)
    return next((i for i, (one, two) in enumerate(zip(first, last)) if one != two), min(len(first), len(last)))


def _tensors(rows: Sequence[_Row], width: int, pad: int, sharing: Sharing) -> dict[str, torch.Tensor]:
    """Return input_ids, position_ids (rows, width) and the mask (rows, 1, width, width) of who attends to whom."""
    import torch

    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    positions = torch.zeros((len(rows), width), dtype=torch.int64)
    seen = torch.eye(width, dtype=torch.bool).repeat(
        len(rows), 1, 1, 1
    )  # padding sees itself, or it would be no number
    for r, row in enumerate(rows):
        ids[r, : len(row.tokens)] = torch.tensor(row.tokens)
        for i, before in enumerate(row.before):
            if before >= 0:
                seen[r, 0, i] |= seen[r, 0, before]
                positions[r, i] = positions[r, before] + 1
    if sharing.additive is not None:
        low = torch.finfo(sharing.additive).min
        seen = torch.zeros(seen.shape, dtype=sharing.additive).masked_fill(~seen, low)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": seen}
