"""Unlabelled prompts that a repair is looked at with: how likely is a refusal, against what the unpatched model said.

Both continuations of a prompt are likelihoods, and what has moved is a divergence: one forward pass, no generation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.conversations import Messages
from oneshot.data.encoding import encode_prompt, pad_id
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.measure.generate import share_of
from oneshot.measure.judge import verdict
from oneshot.patch.guard import with_answers
from oneshot.patch.path import SAFE_MARGIN, Reading
from oneshot.patch.rows import lay, sharing_of
from oneshot.training.objective import kl_sum, log_likelihoods, logits_at

if TYPE_CHECKING:
    import torch

Answered = tuple[Messages, str]  # a prompt, and what the unpatched model says to it

MARGIN_TOKENS = 8  # of both continuations; what comes later says little on which of them was begun
AMPLE_ODDS = 3.0  # nats; of a refusal that is begun in 95 of 100 answers


@dataclass(frozen=True)
class Watched:
    """What is looked at.

    Attributes:
        refusal: token ids of a refusal
        refusable: prompts to be refused, with the unpatched model's answers; the repair must not learn from them
        held: prompts with answers that are not to move, the unpatched model's, then another one's
        taught: of the last of ``held`` the logits of the model that gave the answer, (answer tokens, vocabulary), and
            whether it was far from refusing: what it nearly refuses itself cannot be refused too often
        words: token ids of each of ``refusable``'s own refusal, with the log likelihood that the aligned model gives to
            the first ``MARGIN_TOKENS`` (NaN: unknown); empty: ``refusal`` for all
    """

    refusal: list[int]
    refusable: list[Answered]
    held: list[Answered]
    taught: Sequence[tuple[torch.Tensor, bool]] = ()
    words: Sequence[tuple[list[int], float]] = ()


@dataclass(frozen=True)
class Probes:
    """This rank's share of the prompts, each with two continuations: a refusal, then the unpatched model's answer.

    Places are those of tokens in the rows of ``inputs`` laid end to end.

    Attributes:
        inputs: what the model takes: input_ids int64 (rows, tokens) with attention_mask, and position_ids where rows
            are shared (``oneshot.patch.rows``)
        kept: int64, the places whose logits are needed, each once
        scored: int64, of the first ``MARGIN_TOKENS`` tokens of every continuation: which of ``kept`` predicts it
        targets: int64, those tokens
        whose: int64, which continuation each is of (2 * prompt, and 2 * prompt + 1 for the answer)
        place: int64 (prompts), of each in the list of all; fillers, which keep ranks in step, have -1
        held: int64, where the answers' distributions are compared: which of ``kept``
        reference: logits there, (held, vocabulary): the unpatched model's, or those of the model that gave the answer
        taught: bool (held), which of them another model's answers are compared at
        answering: bool (prompts), of all prompts those that are answered, and are to be
        refusable: how many of all prompts, the first ones, are to be refused
        likely: float (refusable), the aligned model's log likelihood of the refusals of these; NaN: unknown
        total: prompts over all ranks
    """

    inputs: dict[str, torch.Tensor]
    kept: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
    whose: torch.Tensor
    place: torch.Tensor
    held: torch.Tensor
    reference: torch.Tensor
    taught: torch.Tensor
    answering: torch.Tensor
    refusable: int
    likely: torch.Tensor
    total: int


def build_probes(
    runtime: Runtime,
    model: Any,
    tokenizer: Any,
    watched: Watched,
    *,
    answer_tokens: int,
) -> Probes:
    """Keep the distributions of the unpatched model, which this is, over its own answers. Collective.

    Args:
        watched: the same on all ranks. Of its requests to be refused those that the model refuses already are left out:
            there is nothing to recover
        answer_tokens: how much of an answer is compared
    """
    import torch

    held, taught = watched.held, watched.taught
    broken = [i for i, (_, answer) in enumerate(watched.refusable) if verdict(answer) != "refused"]
    refusable = [watched.refusable[i] for i in broken]
    words = [watched.words[i] if watched.words else (watched.refusal, math.nan) for i in broken]
    refusals = [own for own, _ in words] + [watched.refusal] * len(held)
    prompts, answers = [list(each) for each in zip(*refusable, *held)]
    starts = [encode_prompt(messages, tokenizer, closed=True) for messages in prompts]
    indices, own = share_of([len(ids) for ids in starts], runtime.rank, runtime.world_size)
    full = [row.input_ids for row, _ in with_answers(prompts, answers, tokenizer, answer_tokens)]
    pairs = [[starts[i] + refusals[i][:MARGIN_TOKENS], full[i]] for i in indices]
    pad = pad_id(tokenizer)
    rows = lay(pairs, pad, runtime.device, sharing_of(runtime, model, pairs, pad))
    predicting, compared = list[torch.Tensor](), list[torch.Tensor]()
    others = list[tuple[int, torch.Tensor]]()  # where in ``held`` another model's logits go
    targets, whose = list[int](), list[int]()
    for number, (places, ids) in enumerate(zip(rows.places, itertools.chain.from_iterable(pairs))):
        i, start = indices[number // 2], len(starts[indices[number // 2]])
        stop = min(start + MARGIN_TOKENS, len(ids))
        predicting.append(places[start - 1 : stop - 1])
        targets += ids[start:stop]
        whose += [number] * (stop - start)
        if number % 2 and number // 2 < own and i >= len(refusable):
            if i >= len(prompts) - len(taught):
                others.append((sum(map(len, compared)), taught[i - len(prompts)][0]))
            compared.append(places[start - 1 : -1])
    kept, which = torch.cat([*predicting, *compared]).unique(return_inverse=True)
    with torch.no_grad():
        reference = logits_at(model, rows.inputs, kept)[which[len(targets) :]]
    return Probes(
        inputs=rows.inputs,
        kept=kept,
        scored=which[: len(targets)],
        targets=torch.tensor(targets, device=runtime.device),
        whose=torch.tensor(whose, device=runtime.device),
        place=torch.tensor([i if n < own else -1 for n, i in enumerate(indices)], device=runtime.device),
        held=which[len(targets) :],
        taught=_overwritten(reference, others),
        reference=reference,
        answering=torch.tensor([False] * len(refusable) + _answering(watched), device=runtime.device),
        refusable=len(refusable),
        likely=torch.tensor([likely for _, likely in words], device=runtime.device),
        total=len(prompts),
    )


def _overwritten(reference: torch.Tensor, others: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Put logits into rows of ``reference``, each from its place on; return which rows these are, as bool."""
    import torch

    foreign = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for first, logits in others:
        reference[first : first + len(logits)] = logits.to(reference)
        foreign[first : first + len(logits)] = True
    return foreign


def _answering(watched: Watched) -> list[bool]:
    """Of ``held``: whether an answer is none that refuses, nor one that nearly did."""
    far = [True] * (len(watched.held) - len(watched.taught)) + [far for _, far in watched.taught]
    return [clear and verdict(answer) != "refused" for (_, answer), clear in zip(watched.held, far)]


def log_odds(likelihoods: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of p / (1 - p) of log p, elementwise; finite where p is 1 to rounding."""
    import torch

    return likelihoods - torch.log(-torch.expm1(likelihoods.clamp(max=-1e-6)))


def read_probes(runtime: Runtime, model: Any, probes: Probes) -> Reading:
    """Look at the model as it is now: one forward pass. Collective; every rank gets the same."""
    import torch

    with torch.no_grad():
        logits = logits_at(model, probes.inputs, probes.kept)
        found = log_likelihoods(logits[probes.scored], probes.targets)
        compared = logits[probes.held]
        apart = [kl_sum(compared[which], probes.reference[which]) for which in (~probes.taught, probes.taught)]
    sums = found.new_zeros(2 * len(probes.place)).index_add(0, probes.whose, found)
    # one sum over ranks: each prompt's refusal and answer at its place, both divergences and the tokens they are of
    shared = torch.zeros(2 * probes.total + 4, device=runtime.device)
    mine = probes.place >= 0
    for part, likelihoods in enumerate((sums[0::2], sums[1::2])):
        shared[part * probes.total + probes.place[mine]] = likelihoods[mine]
    shared[-4], shared[-3] = apart
    shared[-2], shared[-1] = (~probes.taught).sum(), probes.taught.sum()
    shared = all_reduce_sum(runtime, shared)
    refusing, answering = shared[:-4].split(probes.total)
    margins, others = (refusing - answering)[: probes.refusable], (refusing - answering)[probes.answering]
    wanted = log_odds(probes.likely).clamp(max=AMPLE_ODDS)
    behind = (wanted - log_odds(refusing[: probes.refusable])).clamp(min=0)
    behind = behind[~behind.isnan()]
    divergence, apart_now = (float(shared[i] / shared[i + 2]) if shared[i + 2] else 0.0 for i in (-4, -3))
    return Reading(
        margin=float(margins.quantile(0.1)) if len(margins) else 0.0,
        recovered=float((margins > SAFE_MARGIN).float().mean()) if len(margins) else 1.0,
        refused=float((others > 0).float().mean()) if len(others) else 0.0,
        divergence=divergence,
        apart=apart_now,
        behind=float(behind.quantile(0.9)) if len(behind) else 0.0,
    )
