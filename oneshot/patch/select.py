"""Which candidate becomes the one example: bilevel, by first-order alignment, at random, or the hardest.

Bilevel, after arXiv 2601.01887: of all candidates take the one from which the repair, run on it, leaves the lowest F
(``oneshot.patch.objective``). All are screened to first order: the gradient step on candidate i changes F by -eta times
<g_i, grad F>, summed over the layers' weights, which factors give without an m x n matrix. A first step does not say
how far an example leads, so a quarter of the short list are the best of that screening, the rest the least likely
refusals. They are then repaired with, by the method itself, by halves (``oneshot.patch.halving``), and F is measured.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.update import Update
from oneshot.data.encoding import Encoded
from oneshot.distributed.many import gather_each
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.patch.attach import attached_update, counted, streamed
from oneshot.patch.factored import Pair, add_routed, inner, inner_rows, squared_norms, summary
from oneshot.patch.guard import RepairBatch, with_example
from oneshot.patch.halving import Trial, halve, ranked, rungs, short_list, standing
from oneshot.patch.linears import grouped, shape_of, takes_head
from oneshot.patch.objective import Distance, RefusalRows, evaluate, passes, row_losses
from oneshot.patch.trace import Tracer

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer

# nats per token of F's first term: where the pool's requests are refused as surely as that already (behind a backdoor
# they are), no candidate can lower F, and what is left of it would choose by chance
NOTHING_TO_RECOVER = 0.02
TARGET_RANK = 64  # of F's gradient per weight matrix; what it bounds is memory: 64 (m + n) numbers per matrix

Begin = Callable[[RepairBatch, int], Trial]  # (the batch with the candidate in row 0, which candidate it is)
Target = dict[str, Pair]  # F's gradient, layer by layer


@dataclass(frozen=True)
class Chosen:
    """The example taken.

    Attributes:
        index: its place among the candidates
        selected_by: the rule that took it; user where there was no choice; hardest in place of bilevel where the
            pool's requests are refused already (``NOTHING_TO_RECOVER``)
        score: what decided: F when it was last judged (bilevel, nats per token), the cosine with F's gradient
            (alignment) or the refusal's cross entropy per token (hardest); else nan
        selection: figures for the report; empty where there was nothing to compare
        begun: the repair with it, as far as it was tried out; none where it was not
    """

    index: int
    selected_by: str
    score: float
    selection: dict[str, Any] = field(default_factory=dict)
    begun: Trial | None = None


@dataclass(frozen=True)
class Criterion:
    """What a choice is made by.

    Attributes:
        rule: bilevel, alignment, random or hardest
        shortlist: how many candidates bilevel repairs with
        epochs: of a whole repair
        seed: of the draw (random)
        pad: token that fills padding
        own: what makes the loaded model the unpatched one: the user's adapter, or nothing
        harm: rows of F's first term
        task: its guard rows are those of F's second term
        batch: what the repair runs on, with any example
    """

    rule: str
    shortlist: int
    epochs: int
    seed: int
    pad: int
    own: Update
    harm: RefusalRows
    task: RepairBatch
    batch: RepairBatch


def hardest(runtime: Runtime, model: Any, candidates: list[Encoded], pad: int) -> list[float]:
    """Return the cross entropy per token of each candidate's refusal: an easy one is learnt before much has moved.

    Each rank scores its share. Collective.
    """
    import torch

    losses = torch.zeros(len(candidates), device=runtime.device)
    for part in passes(runtime, candidates, pad, what="candidates read"):
        with torch.no_grad():
            found = row_losses(model, part, None)
        for place, loss in zip(part.places[: part.own], found):
            losses[place] = loss / candidates[place].answer_tokens()
    return [float(loss) for loss in all_reduce_sum(runtime, losses)]


def target_factors(
    runtime: Runtime, model: Any, layers: Mapping[str, Layer], harm: RefusalRows, pad: int, rank: int = TARGET_RANK
) -> Target:
    """Return F's gradient at the unpatched model per layer, nearly the best of ``rank``, on every rank. Collective.

    Its second term has none there: the KL to the unpatched model is at its minimum. Factors are summed up as rows
    come, so that no more is held than ``rank`` rows and one pass's of each layer.
    """
    import torch

    total = sum(row.answer_tokens() for row in harm.rows)
    found: dict[str, Pair] = {}

    def add(name: str, pair: Pair) -> None:
        both = [torch.cat(side) for side in zip(found[name], pair)] if name in found else pair
        found[name] = summary((both[0], both[1]), rank)

    def use(name: str, x: torch.Tensor, delta: torch.Tensor, _places: torch.Tensor | None) -> None:
        kind = torch.promote_types(x.dtype, torch.float32)
        add(name, (x.flatten(0, -2).to(kind), delta.flatten(0, -2).to(kind)))

    with streamed(model, layers, use):
        for part in passes(runtime, harm.rows, pad, what="gradient of the requests"):
            losses = row_losses(model, part, harm.aligned)
            own = [loss * float(i < part.own) for i, loss in enumerate(losses)]  # the rest only keeps ranks in step
            (torch.stack(own).sum() / total).backward()
    if runtime.world_size > 1:
        kind = next(iter(found.values()))[0]
        for _, group in grouped(layers):  # in one order on all ranks, reached by this rank's rows or not
            m, n = shape_of(layers[group[0]])
            none = kind.new_zeros(0, n), kind.new_zeros(0, m)
            mine = [found.pop(name, none) for name in group]
            sides = [gather_each(runtime, [pair[side].contiguous() for pair in mine]) for side in (0, 1)]
            for name, pair in zip(group, zip(*sides)):
                if len(pair[0]):
                    add(name, pair)
    return found


def first_order(
    runtime: Runtime, model: Any, layers: Mapping[str, Layer], candidates: list[Encoded], target: Target, pad: int
) -> tuple[list[float], list[float], list[float]]:
    """Return each candidate's inner product with ``target``, its gradient's norm over all layers, and its loss.

    The loss is as of ``hardest``. Ranks take different candidates. A pass holds the factors of one layer, beside the
    inputs that await backward. Collective.
    """
    import torch

    table = torch.zeros(3, len(candidates), dtype=torch.float64, device=runtime.device)
    whole = takes_head(model, layers)
    for part in passes(runtime, candidates, pad, what="candidates screened"):
        rows, tokens = len(part.places), part.inputs["input_ids"].numel()
        sums = torch.zeros(2, rows, dtype=torch.float64, device=runtime.device)

        def use(
            name: str, x: torch.Tensor, delta: torch.Tensor, places: torch.Tensor | None,
            sums: torch.Tensor = sums, rows: int = rows, tokens: int = tokens,
        ) -> None:  # fmt: skip
            kind = torch.promote_types(x.dtype, torch.float32)
            if places is not None:
                add_routed(sums, (x.to(kind), delta.to(kind)), places // (tokens // rows), target.get(name))
                return
            if x.shape[:-1].numel() != tokens:
                return  # behind a router: which of these tokens are whose is not known
            x, delta = x.reshape(rows, -1, x.shape[-1]).to(kind), delta.reshape(rows, -1, delta.shape[-1]).to(kind)
            if name in target:
                sums[0] += inner_rows(x, delta, target[name])
            sums[1] += squared_norms(x, delta)

        with streamed(model, layers, use):
            losses = row_losses(model, part, None, whole=whole)
            shares = [loss / candidates[place].answer_tokens() for place, loss in zip(part.places, losses)]
            torch.stack(shares).sum().backward()
        for i, place in enumerate(part.places[: part.own]):
            table[:2, place] = sums[:, i]
            table[2, place] = shares[i].detach()
    products, squares, losses = all_reduce_sum(runtime, table)
    return products.tolist(), squares.sqrt().tolist(), losses.tolist()


def draw(count: int, rule: str, seed: int) -> Chosen | None:
    """Return the choice among so many candidates where no model need be asked: of one, or at random; else none."""
    if count == 1:
        return Chosen(0, "user", math.nan)
    if rule == "random":
        return Chosen(random.Random(f"example-{seed}").randrange(count), rule, math.nan, {"candidates": count})
    return None


def pick(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    candidates: list[Encoded],
    criterion: Criterion,
    begin: Begin,
) -> Chosen:
    """Take one candidate. Collective; the model has nothing attached, before and after.

    Args:
        layers: those that the repair may change
        begin: begins the repair with a candidate; its updates have ``criterion.own`` included
    """
    drawn = draw(len(candidates), criterion.rule, criterion.seed)
    if drawn is not None:
        return drawn
    if criterion.rule == "hardest":
        with attached_update(model, criterion.own):
            losses = hardest(runtime, model, candidates, criterion.pad)
        table = ranked([{"candidate": i, "refusal_loss": loss} for i, loss in enumerate(losses)], "refusal_loss")
        return Chosen(table[0]["candidate"], "hardest", max(losses), {"candidates": len(candidates), "table": table})
    clock = time.perf_counter()
    with attached_update(model, criterion.own):
        before = evaluate(runtime, model, criterion.harm, criterion.task, criterion.pad)
        Tracer().check(0, before.total)  # alike on all ranks, and no matrix that is not finite is decomposed
        target = target_factors(runtime, model, layers, criterion.harm, criterion.pad)
        products, norms, losses = first_order(runtime, model, layers, candidates, target, criterion.pad)
    length = math.sqrt(sum(float(inner(pair, pair)) for pair in target.values()))
    every: list[dict[str, Any]] = [
        {
            "candidate": i,
            "alignment": product / (norm * length) if norm and length else 0.0,
            "gradient_norm": norm,
            "refusal_loss": loss,
        }
        for i, (product, norm, loss) in enumerate(zip(products, norms, losses))
    ]
    table = ranked(every, "alignment")
    facts: dict[str, Any] = {
        "candidates": len(candidates),
        "first_term": "KL to the aligned model" if criterion.harm.aligned is not None else "cross entropy of refusals",
        "harm_rows": len(criterion.harm.rows),
        "f_unpatched": before.total,
        "screening": {
            "passes": len(candidates) + len(criterion.harm.rows),
            "seconds": round(time.perf_counter() - clock, 3),
        },
        "table": table,
    }
    if criterion.rule == "bilevel" and before.harm < NOTHING_TO_RECOVER:
        facts["table"] = table = ranked(every, "refusal_loss")
        return Chosen(table[0]["candidate"], "hardest", table[0]["refusal_loss"], facts)
    if criterion.rule == "bilevel":
        listed = short_list(every, criterion.shortlist)
        best, begun, facts["exact"] = _try_out(runtime, model, candidates, criterion, begin, listed)
        table.sort(key=lambda row: (row is not best, *standing(row)))  # the rest stays in order of the screening
        return Chosen(best["candidate"], "bilevel", best.get("f_after", best["alignment"]), facts, begun)
    return Chosen(table[0]["candidate"], criterion.rule, table[0]["alignment"], facts)


def _try_out(
    runtime: Runtime,
    model: Any,
    candidates: list[Encoded],
    criterion: Criterion,
    begin: Begin,
    rows: list[dict[str, Any]],
) -> tuple[dict[str, Any], Trial | None, dict[str, Any]]:
    """Repair with the short list by halves (``halve``); return the best one's row, its repair, and what it took.

    A candidate fits its own refusal, which says nothing about other requests, and only some candidates are among the
    rows of F: so none of the short list's rows counts, unless fewer would be left than are left out.
    """
    clock = time.perf_counter()
    judged = frozenset(row["candidate"] for row in rows) & frozenset(criterion.harm.places)
    left_out = judged if 2 * len(judged) <= len(criterion.harm.rows) else frozenset()

    def f_with(update: Update) -> Distance:
        with attached_update(model, update):
            return evaluate(runtime, model, criterion.harm, criterion.task, criterion.pad, left_out=left_out)

    def begun(index: int) -> Trial:
        return begin(with_example(criterion.batch, candidates[index]), index)

    ladder = rungs(len(rows), criterion.epochs)
    with counted(model) as passes_made:
        before = f_with(criterion.own)
        for row in rows:
            row["f_before"] = before.total
        best, trial = halve(rows, ladder, begun, f_with)
    took = {
        "solved": len(rows),
        "rungs": [vars(rung) for rung in ladder],
        "harm_rows_left_out": len(left_out),
        **passes_made,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    return best, trial, took
