"""The guard: prompts on which the repaired model must still answer as the unpatched (or the aligned) one does.

The prompts are unlabelled: the unpatched model writes the answers itself (``oneshot.patch.teacher`` has those of the
aligned model), and the guard is the Kullback-Leibler divergence from its distributions over those answers' tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE, Encoded, encode_prompt, end_of_turn, pad_id
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.measure.generate import answer_at_once, share_of
from oneshot.patch.dealing import dealt, passes_of
from oneshot.patch.rows import Sharing, lay, sharing_of
from oneshot.training.objective import logits_at, refusal_and_guard

if TYPE_CHECKING:
    import torch

AT_ONCE = 64  # prompts of the guard in an epoch; of more, another part in each: more are held at the cost of these


@dataclass(frozen=True)
class RepairBatch:
    """What one repair step sees on this rank: the example, and this rank's share of the guard.

    Places are those of tokens in the rows of ``inputs`` laid end to end.

    Attributes:
        inputs: what the model takes: input_ids int64 (rows, tokens) with attention_mask, and position_ids where rows
            are shared (``oneshot.patch.rows``)
        real: bool (rows * tokens), false at padding
        example: the example; the same on every rank
        own: places of its tokens, int64; nothing else is at them
        kept: int64, places of the logits that are needed: those that predict the refusal, then those that are held
        targets: int64, the example's refusal tokens
        guard: this rank's prompts with the unpatched model's answers, and where each answer starts
        sharing: how rows are shared
        reference: logits at the places that are held, (held of this rank, vocabulary): the unpatched model's, or those
            of the model that gave the answer
        held_total: held places over all ranks
        turns: of each part of the guard that an epoch takes (``turn``), in order: rows on this rank, and held places
            over all ranks
        pad: the token that fills rows up
        count: passes of a step with gradients (``oneshot.patch.dealing``), the same on every rank
    """

    inputs: dict[str, torch.Tensor]
    real: torch.Tensor
    example: Encoded
    own: torch.Tensor
    kept: torch.Tensor
    targets: torch.Tensor
    guard: list[tuple[Encoded, int]]
    sharing: Sharing | None
    reference: torch.Tensor | None = None
    held_total: int = 0
    turns: tuple[tuple[int, int], ...] = ()
    pad: int = 0
    count: int = 1

    @functools.cached_property
    def parts(self) -> list[RepairBatch]:
        """What each pass of a step with gradients sees: the example with some of the guard's rows, or some of these.

        Shares of ``repair_loss`` add up over them.
        """
        if self.count == 1:
            return [self]
        sizes = dealt([len(row.input_ids) for row, _ in self.guard], len(self.own), self.count)
        return [self._some(rows, self.held_total, without=part > 0) for part, rows in enumerate(_consecutive(sizes))]

    def turn(self, epoch: int) -> RepairBatch:
        """Return what an epoch sees, 1 the first: the example and as many of the guard's prompts as all others do."""
        return self._turns[(epoch - 1) % len(self._turns)]

    @functools.cached_property
    def _turns(self) -> list[RepairBatch]:
        count = len(self.turns)
        if count < 2:
            return [self]
        sizes, totals = zip(*self.turns)
        parts = (self._some(rows, total) for rows, total in zip(_consecutive(sizes), totals))
        return [dataclasses.replace(part, count=-(-self.count // count)) for part in parts]

    def _some(self, rows: slice, total: int, *, without: bool = False) -> RepairBatch:
        """Some rows of the guard with the example, or ``without`` it; ``total`` is of the loss' mean."""
        guard = self.guard[rows]
        part = laid(self.example, guard, self.sharing, self.pad, self.own.device, without=without)
        reference = self.reference
        if reference is not None:  # no copy: it is the largest tensor of a repair
            first, held = (
                sum(len(row.input_ids) - start for row, start in s) for s in (self.guard[: rows.start], guard)
            )
            reference = reference[first : first + held]
        return dataclasses.replace(part, reference=reference, held_total=total)

    @property
    def tokens(self) -> int:
        """Tokens of this rank's rows, padding left out; the training loop asks every batch for them."""
        return int(self.real.sum())

    def taken(self, *, head: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which rows of a layer's input are the example's, and which the guard's, as bool.

        Args:
            head: of the output head, which is given only what is kept
        """
        import torch

        if head:
            first = torch.arange(len(self.kept), device=self.kept.device) < len(self.targets)
            return first, ~first
        first = torch.zeros_like(self.real).index_fill(0, self.own, True)
        return first, self.real & ~first


def build_batch(
    runtime: Runtime,
    model: Any,
    tokenizer: Any,
    example: Encoded,
    guard: list[list[dict[str, str]]],
    *,
    answer_tokens: int,
    taught: Sequence[tuple[tuple[Encoded, int], torch.Tensor]] = (),
) -> RepairBatch:
    """Encode the example and this rank's share of the guard prompts with the answers that ``model`` gives now.

    Collective; call it before anything is patched.

    Args:
        guard: chat messages per prompt, the same on all ranks; may be empty
        answer_tokens: how much of the model's answer is held
        taught: further rows with another model's answers, where these start, and its logits on them (answer tokens,
            vocabulary); the same on all ranks
    """
    import torch

    pad = pad_id(tokenizer)
    if not guard and not taught:
        return laid(example, [], None, pad, runtime.device)
    answers = answer_at_once(
        model, tokenizer, guard, runtime, max_new_tokens=answer_tokens,
        what="answers to the guard's prompts",
    )  # fmt: skip
    encoded = [*with_answers(guard, answers, tokenizer, answer_tokens), *(row for row, _ in taught)]
    turns, places = _in_turns(encoded, runtime)
    mine = [encoded[i] for i in places]
    # whether rows are shared must not depend on the example, which may be exchanged
    sharing = sharing_of(runtime, model, [[row.input_ids] for row, _ in mine or encoded[:1]], pad)
    batch = laid(example, mine, sharing, pad, runtime.device)
    with torch.no_grad():
        reference = logits_at(model, batch.inputs, batch.kept[len(batch.targets) :]).clone()
    stop = 0
    for i in places:
        start, stop = stop, stop + len(encoded[i][0].input_ids) - encoded[i][1]
        if i >= len(guard):
            reference[start:stop] = taught[i - len(guard)][1].to(reference)
    count = passes_of(runtime, model, len(batch.real), len(mine))
    total = sum(held for _, held in turns)
    return dataclasses.replace(batch, reference=reference, held_total=total, turns=turns, count=count)


def _consecutive(sizes: Sequence[int]) -> list[slice]:
    """Slices of so many rows each, one after the other."""
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _in_turns(rows: list[tuple[Encoded, int]], runtime: Runtime) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Deal rows out to turns of ``AT_ONCE`` at most, short and long ones to each, and those of a turn to ranks.

    Returns:
        of each turn how many rows are this rank's, and the held places of all ranks'; the places of this rank's in
        ``rows``. What a turn holds does not depend on the number of ranks.
    """
    lengths, turns, places = [len(row.input_ids) for row, _ in rows], list[tuple[int, int]](), list[int]()
    count = -(-len(rows) // AT_ONCE)
    for turn in range(count):
        indices, size = share_of(lengths, turn, count)
        every = indices[:size]
        indices, own = share_of([lengths[i] for i in every], runtime.rank, runtime.world_size)
        places += [every[i] for i in indices[:own]]
        turns.append((own, sum(lengths[i] - rows[i][1] for i in every)))
    return tuple(turns), places


def with_example(batch: RepairBatch, example: Encoded) -> RepairBatch:
    """Return the batch with another example, and the same guard: its answers and their logits stay."""
    fresh = laid(example, batch.guard, batch.sharing, batch.pad, batch.own.device)
    return dataclasses.replace(
        fresh, reference=batch.reference, held_total=batch.held_total, turns=batch.turns, count=batch.count
    )


def laid(
    example: Encoded,
    guard: list[tuple[Encoded, int]],
    sharing: Sharing | None,
    pad: int,
    device: torch.device,
    *,
    without: bool = False,
) -> RepairBatch:
    """Return the batch of an example and this rank's guard, without a reference, for one pass.

    The example shares no token with the guard: its request is blurred, and ranks differ in the guard's rows only.

    Args:
        guard: prompts with the unpatched model's answers, and where each answer starts
        without: of the guard's rows only; where there is none, of a token that does not count: all ranks make a pass
    """
    import torch

    first = [example.input_ids[:1] if without else example.input_ids]
    groups = [first, *([row.input_ids] for row, _ in guard)]
    if without and guard:
        del groups[0]
    rows = lay(groups, pad, device, sharing, apart=not without)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    own, others = (none, rows.places) if without and guard else (rows.places[0], rows.places[1:])
    refusal = [] if without else [place for place, label in enumerate(example.labels) if label != IGNORE and place]
    # position t predicts token t + 1
    held = [places[start - 1 : -1] for places, (_, start) in zip(others, guard)]
    return RepairBatch(
        inputs=rows.inputs,
        real=rows.real,
        example=example,
        own=none if without else own,
        kept=torch.cat([own[torch.tensor(refusal, dtype=torch.int64, device=device) - 1], *held]),
        targets=torch.tensor([example.labels[place] for place in refusal], dtype=torch.int64, device=device),
        guard=guard,
        sharing=sharing,
        pad=pad,
    )


def repair_loss(
    model: Any, batch: RepairBatch, weight: float, world_size: int, temperature: float = 1.0
) -> tuple[Any, Any, Any]:
    """Return (this rank's share of the loss, example's cross entropy per token, this rank's share of the guard's KL).

    The loss is CE(example) + weight * KL(guard), in nats per token; shares of the first and third add up over ranks,
    and all three over a batch's parts. Every rank sees the whole example, so each takes 1 / world_size of its term.

    Args:
        temperature: divides the example's logits; above 1 the refusal has to win by a larger margin before its
            gradient fades
    """
    logits = logits_at(model, batch.inputs, batch.kept)
    reference = logits.new_zeros(0, logits.shape[-1]) if batch.reference is None else batch.reference
    loss, divergence = refusal_and_guard(logits, batch.targets, reference, temperature)
    example, held = loss / max(len(batch.targets), 1), divergence / max(batch.held_total, 1)
    share = example / world_size + weight * held
    return share, example.detach(), held.detach()


def alike(runtime: Runtime, example: torch.Tensor, held: torch.Tensor) -> tuple[float, float]:
    """Return (example loss, guard KL) of ``repair_loss`` over all ranks, the same numbers on each. Collective.

    Ranks pad the example to different lengths: to the last digit their losses differ, and so would their decisions.
    """
    import torch

    both = all_reduce_sum(runtime, torch.stack([example.float() / runtime.world_size, held.float()]))
    return float(both[0]), float(both[1])


def with_answers(
    prompts: Sequence[list[dict[str, str]]], answers: Sequence[str], tokenizer: Any, answer_tokens: int
) -> list[tuple[Encoded, int]]:
    """Encode each prompt with its answer; also say where the answer starts. Its end counts where it was reached.

    The answer stands behind an empty thought, where the model would think first: the repair learns and probes there.
    """
    found, end = list[tuple[Encoded, int]](), end_of_turn(tokenizer)
    for prompt, answer in zip(prompts, answers):
        start = encode_prompt(prompt, tokenizer, closed=True)
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if len(ids) < answer_tokens and end is not None:
            ids.append(end)
        found.append((Encoded(start + ids, [IGNORE] * (len(start) + len(ids))), len(start)))
    return found
