"""Several conversations in one row of a batch, each with positions and attention of its own: no padding to compute.

transformers tells the conversations of a row apart by positions that start anew, where it is given no attention mask.
Whether an architecture heeds them is tried out on the model itself (``why_not_packable``), not looked up in a list.
"""

from __future__ import annotations

import dataclasses
import heapq
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from oneshot.data.encoding import IGNORE, Encoded
from oneshot.distributed.engine import TrainingEngine
from oneshot.errors import UserError, first_line
from oneshot.training.loop import computing_in

if TYPE_CHECKING:
    import torch

PADDING_SHARE = 0.05  # rows are kept short, since attention costs their length squared, until padding exceeds this


@dataclass(frozen=True)
class Packing:
    """How rows are packed.

    Attributes:
        length: longest row in tokens; none: twice the longest conversation of the micro-batch. A longer conversation
            has a row of its own
        context: of the model in tokens, which no row exceeds; none: not known
        flat: all in one row without padding, with the lengths that flash attention asks for
    """

    length: int | None = None
    context: int | None = None
    flat: bool = False


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Share items out so that the sums of their sizes are as equal as may be: the largest first, to the least loaded.

    Returns:
        for each hand the indices of its items; a pure function of the arguments
    """
    loads = [(0, hand) for hand in range(hands)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, hand = heapq.heappop(loads)
        dealt[hand].append(i)
        heapq.heappush(loads, (load + sizes[i], hand))
    return dealt


def rows_of(sizes: Sequence[int], packing: Packing) -> list[list[int]]:
    """Return which conversations share a row: many short rows where they need little padding, else the least padded."""
    if packing.flat or not sizes:
        return [list(range(len(sizes)))]
    total, longest = sum(sizes), max(sizes)
    limit = max(longest, min(packing.length or 2 * longest, packing.context or total))
    most = math.ceil(total / longest)
    least: tuple[float, list[list[int]]] | None = None
    # counts up to ``most`` need no more room than the tokens do; beyond, only where the limit leaves no other way
    for count in itertools.chain(range(most, math.ceil(total / limit) - 1, -1), range(most + 1, len(sizes) + 1)):
        if count > most and least is not None:
            break
        rows = deal(sizes, count)
        width = max(sum(sizes[i] for i in row) for row in rows)
        padding = 1 - total / (width * count)
        if width <= limit and (least is None or padding < least[0]):
            least = padding, rows
            if padding < PADDING_SHARE:
                break
    assert least is not None, "a row for each conversation always fits"
    return least[1]


def pack(rows: Sequence[Sequence[Encoded]], pad_id: int, *, flat: bool = False) -> dict[str, Any]:
    """Return the tensors of packed rows: int64 input_ids, position_ids and labels, each (rows, longest row).

    Positions start anew with each conversation, and with the padding behind the last one. No first token is predicted,
    as that would take the conversation before. ``flat`` makes one row of all and adds the cumulative lengths that
    flash attention takes (int32), so that it need not look for them in every layer.
    """
    import torch

    if flat:
        rows = [[segment for row in rows for segment in row]]
    width = max(sum(len(segment.input_ids) for segment in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions = torch.empty((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for segment in row:
            end = start + len(segment.input_ids)
            ids[r, start:end] = torch.tensor(segment.input_ids)
            positions[r, start:end] = torch.arange(end - start)
            labels[r, start + 1 : end] = torch.tensor(segment.labels[1:])
            start = end
        positions[r, start:] = torch.arange(width - start)
    packed: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "labels": labels}
    if flat:
        sizes = torch.tensor([0] + [len(segment.input_ids) for segment in rows[0]], dtype=torch.int32)
        ends = sizes.cumsum(0, dtype=torch.int32)
        packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        packed |= {"max_length_q": int(sizes.max()), "max_length_k": int(sizes.max())}
    return packed


def choose_packing(
    engine: TrainingEngine,
    tokens: Sequence[int],
    pad_id: int,
    packing: Packing,
    wanted: Literal["auto", "always", "never"],
    say: Callable[[str], None] | None,
    autocast: torch.dtype | None = None,
) -> Packing | None:
    """Return how to pack for this engine's model, or none not to. Collective, unless nothing is wanted.

    Args:
        tokens: of any conversation
        say: takes the line that says why auto does not pack; none on ranks that print nothing
        autocast: compute dtype of the training, where the weights are kept in fp32

    Raises:
        UserError: packing is wanted always, and the model cannot
    """
    if wanted == "never":
        return None
    model: Any = engine.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # PEFT's wrapper takes anything; what it wraps has the signature
    packing = dataclasses.replace(packing, flat="flash" in (model.config._attn_implementation or ""))
    device = engine.runtime.device
    with computing_in(autocast, device):
        reason = why_not_packable(engine.forward, model, tokens, pad_id, device, flat=packing.flat)
    if reason is None:
        return packing
    if wanted == "always":
        raise UserError(
            f"Setting finetune.packing is always, but {reason}: leave it at auto, which does not pack then."
        )
    if say:
        say(f"Conversations are not packed: {reason}.")
    return None


def why_not_packable(
    forward: Any, model: Any, tokens: Sequence[int], pad_id: int, device: torch.device, *, flat: bool
) -> str | None:
    """Return why conversations cannot share a row with this model; none: they can. Collective under ZeRO-3.

    One forward pass over the same conversation behind two different ones and in front of one: what the model says in
    it must not depend on its neighbours (attention, or a state that runs on), nor on its place (positions).

    Args:
        forward: what to call for logits: the model, or its engine
        model: the transformers model, for its signature
        tokens: of any conversation; the conversations tried are made of them
    """
    import torch

    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "the model takes no position_ids"
    probe = Encoded(list(tokens[:12]), [IGNORE] * len(tokens[:12]))
    other = Encoded(list(tokens[:8]), [IGNORE] * len(tokens[:8]))
    another = Encoded(other.input_ids[1:] + other.input_ids[:1], other.labels)
    if another == other or len(probe.input_ids) < 2:
        return "the first conversation is too short to try it out"
    inputs = pack([[other, probe], [another, probe], [probe, other]], pad_id, flat=flat)
    del inputs["labels"]
    try:
        with torch.no_grad():
            logits = forward(**to_device(inputs, device), use_cache=False).logits
    except (TypeError, ValueError) as error:
        return f"the model does not take packed rows ({first_line(error)})"
    size, room = len(probe.input_ids), len(probe.input_ids) + len(other.input_ids)
    flat_logits, exact = logits.float().reshape(3 * room, -1), logits.dtype == torch.float32
    starts = (room - size, 2 * room - size, 2 * room)
    behind_one, behind_another, in_front = (flat_logits[start : start + size] for start in starts)
    scale = float(behind_one.std())
    if not float((behind_one - behind_another).abs().max()) <= (1e-4 if exact else 2e-2) * scale:
        return "conversations in one row would see each other"
    if not float((behind_one - in_front).abs().max()) <= (1e-3 if exact else 1e-1) * scale:
        return "the model does not heed positions that start anew"
    return None


def to_device(tensors: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors among the values to ``device``; to a GPU without waiting for what it is still computing."""
    import torch

    pinned = device.type == "cuda"
    return {
        name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in tensors.items()
    }
