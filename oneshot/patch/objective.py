"""What the choice of the example is judged by: how far a model is from where it should be, on other requests.

F(theta) = KL(pi_aligned || pi_theta) on requests to refuse + KL(pi_finetuned || pi_theta) on the guard's prompts, each
in nats per token of teacher-forced answers: the upper objective of arXiv 2601.01887. The requests are a sample of the
candidate pool with their refusals. Without an aligned model the cross entropy of the refusals is the first term.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.reads.digests import shared_fingerprint
from oneshot.data.cache import folder_of, read_cached, write_cached
from oneshot.data.encoding import IGNORE, Encoded, pad_batch
from oneshot.distributed.runtime import Runtime, all_gather_int, all_reduce_sum
from oneshot.distributed.steps import steps
from oneshot.distributed.watchdog import alive
from oneshot.errors import UserError
from oneshot.measure.generate import share_of
from oneshot.patch.guard import RepairBatch, repair_loss
from oneshot.training.objective import kl_sum, logits_at

if TYPE_CHECKING:
    import torch

HARM_ROWS = 32
ROWS_PER_PASS = 8  # more would only hold more logits and inputs of layers at a time

Aligned = dict[int, Any]  # place of a row -> the aligned model's logits on its answer, (answer tokens, vocabulary)


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass.

    Attributes:
        places: which rows these are, by place in the list that is worked on
        own: so many of them are this rank's; the rest is there so that every rank makes as many passes
        inputs: input_ids and attention_mask, int64 (rows, tokens)
        kept: int64 (rows, longest answer), places of the logits that predict the answers, in the rows laid end to end
        targets: int64 (rows, longest answer), what they are to predict; -100 beyond a row's answer
    """

    places: list[int]
    own: int
    inputs: dict[str, torch.Tensor]
    kept: torch.Tensor
    targets: torch.Tensor

    def logits(self, model: Any, *, whole: bool = False) -> list[torch.Tensor]:
        """Return each row's logits on its answer, (answer tokens, vocabulary).

        Args:
            whole: the output head is given every place, which somebody who looks at its input relies on
        """
        if whole:
            logits = model(**self.inputs, use_cache=False).logits
            found = logits.flatten(0, 1)[self.kept]
        else:
            found = logits_at(model, self.inputs, self.kept)
        return [row[targets != IGNORE] for row, targets in zip(found, self.targets)]


@dataclass(frozen=True)
class RefusalRows:
    """The first term's rows, the same list on every rank.

    Attributes:
        places: of the rows among the candidates
        rows: prompts with their refusals
        aligned: the aligned model's logits on the rows that this rank takes; none where there is no such model
    """

    places: list[int]
    rows: list[Encoded]
    aligned: Aligned | None = None


@dataclass(frozen=True)
class Distance:
    """F and its two terms, in nats per token."""

    harm: float
    task: float

    @property
    def total(self) -> float:
        return self.harm + self.task


def sample(candidates: list[Encoded], seed: int) -> RefusalRows:
    """Return the rows of the first term: at most ``HARM_ROWS`` of the candidates, drawn with the seed."""
    places = sorted(random.Random(f"harm-{seed}").sample(range(len(candidates)), min(HARM_ROWS, len(candidates))))
    return RefusalRows(places, [candidates[place] for place in places])


def passes(
    runtime: Runtime, rows: list[Encoded], pad: int, size: int = ROWS_PER_PASS, what: str = "rows read"
) -> Iterator[Pass]:
    """Deal rows out to ranks, and this rank's to passes of ``size`` rows; every rank gets as many passes.

    Args:
        what: the passes are called while one waits for them
    """
    indices, own = share_of([len(row.input_ids) for row in rows], runtime.rank, runtime.world_size)
    with steps(what, len(rows), "rows") as going:
        for start in range(0, len(indices), size):
            places = indices[start : start + size]
            yield _pass(runtime, rows, places, min(max(own - start, 0), len(places)), pad)
            going.add(len(places) * runtime.world_size)


def _pass(runtime: Runtime, rows: list[Encoded], places: list[int], own: int, pad: int) -> Pass:
    alive()
    tensors = {k: v.to(runtime.device) for k, v in pad_batch([rows[i] for i in places], pad).items()}
    kept, targets = _predicting(tensors.pop("labels"))
    return Pass(places, own, tensors, kept, targets)


def logits_on(runtime: Runtime, model: Any, rows: list[Encoded], pad: int) -> list[torch.Tensor]:
    """Return the model's logits on every row's answer, (answer tokens, vocabulary), on the CPU of every rank.

    Collective: all ranks compute all of them.
    """
    import torch

    found = list[torch.Tensor]()
    with steps("aligned model read", len(rows), "rows") as going:
        for start in range(0, len(rows), ROWS_PER_PASS):
            places = list(range(start, min(start + ROWS_PER_PASS, len(rows))))
            with torch.no_grad():
                found += [row.cpu().clone() for row in _pass(runtime, rows, places, len(places), pad).logits(model)]
            going.add(len(places))
    return found


def _predicting(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``Pass.kept`` and ``Pass.targets`` of labels (rows, tokens): as wide as the longest answer."""
    import torch

    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    # those that count to the front of each row, in their order
    order = (wanted == IGNORE).to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, : max(1, int((wanted != IGNORE).sum(dim=1).max()))]
    starts = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    return order + starts, wanted.gather(1, order)


def row_losses(model: Any, part: Pass, aligned: Aligned | None, *, whole: bool = False) -> list[torch.Tensor]:
    """Return each row's loss, summed over its answer's tokens: KL(aligned || model), or cross entropy where none.

    Args:
        whole: as of ``Pass.logits``
    """
    from torch.nn.functional import cross_entropy

    logits = part.logits(model, whole=whole)
    if aligned is None:
        targets = (row[row != IGNORE] for row in part.targets)
        return [cross_entropy(row.float(), wanted, reduction="sum") for row, wanted in zip(logits, targets)]
    return [kl_sum(row, aligned[place].to(row.device)) for row, place in zip(logits, part.places)]


def aligned_logits(
    runtime: Runtime, rows: list[Encoded], checkpoint: Path, loaded_as: str, pad: int, model: Any = None
) -> Aligned | None:
    """Return the aligned model's logits on this rank's rows, from the cache or from ``model``. Collective.

    In the model's dtype, on the CPU: at a vocabulary of 128,000 about 0.25 GB in bf16 over all ranks. Each rank reads
    and writes its own rows only, so that no folder need be shared between machines.

    Args:
        checkpoint: folder of the aligned model
        loaded_as: what else decides on its logits: dtype and quantization
        model: the aligned model; none looks into the cache only, and returns none unless all ranks find their rows
    """
    import torch

    content = shared_fingerprint(runtime, checkpoint)
    names = [hashlib.sha256(json.dumps([content, loaded_as, row.input_ids, row.labels]).encode()) for row in rows]
    files = [folder_of("aligned") / f"{name.hexdigest()}.safetensors" for name in names]
    found: Aligned = {}
    if model is None:
        indices, _ = share_of([len(row.input_ids) for row in rows], runtime.rank, runtime.world_size)
        for place in indices:
            logits = (read_cached(files[place]) or {}).get("logits")
            if logits is not None and len(logits) == rows[place].answer_tokens():
                found[place] = logits
        complete = all(place in found for place in indices)
        return found if all(all_gather_int(runtime, int(complete))) else None
    for part in passes(runtime, rows, pad, what="aligned model read"):
        with torch.no_grad():
            answered = part.logits(model)
        for i, place in enumerate(part.places):
            found[place] = answered[i].cpu().clone()
            if i < part.own:
                write_cached({"logits": found[place]}, files[place])
    return found


def evaluate(
    runtime: Runtime,
    model: Any,
    harm: RefusalRows,
    batch: RepairBatch,
    pad: int,
    *,
    left_out: frozenset[int] = frozenset(),
) -> Distance:
    """Return F of the model as it is now. Collective.

    Args:
        batch: its guard rows are those of the second term
        left_out: candidates whose rows do not count in the first
    """
    import torch

    sums = torch.zeros(len(harm.rows), dtype=torch.float64, device=runtime.device)
    with torch.no_grad():
        for part in passes(runtime, harm.rows, pad):
            losses = row_losses(model, part, harm.aligned)
            for place, loss in zip(part.places[: part.own], losses):
                sums[place] = loss
        task = repair_loss(model, batch, 1.0, runtime.world_size)[2]
    sums = all_reduce_sum(runtime, sums)
    kept = [i for i, place in enumerate(harm.places) if place not in left_out]
    tokens = sum(harm.rows[i].answer_tokens() for i in kept)
    return Distance(float(sums[kept].sum()) / tokens, float(all_reduce_sum(runtime, task)))


def check_same_tokens(candidates: list[Encoded], tokenizer: Any, reference: Path) -> None:
    """Raise UserError if the reference's tokenizer, where it has one, reads a token of the candidates otherwise."""
    from transformers import AutoTokenizer

    if not any((reference / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(reference)
    except Exception:
        return  # code that comes with it, or a library that is missing: its shapes have been compared
    used = sorted({token for row in candidates for token in row.input_ids})
    for token, one, two in zip(used, tokenizer.convert_ids_to_tokens(used), _tokens(theirs, used)):
        if one != two:
            raise UserError(
                f"The reference {reference} has another vocabulary: token {token} is {two!r} there and {one!r} in the "
                "model; give the aligned checkpoint that this model was fine-tuned from."
            )


def _tokens(tokenizer: Any, ids: list[int]) -> list[str | None]:
    known = len(tokenizer)
    return [tokenizer.convert_ids_to_tokens(i) if i < known else None for i in ids]
