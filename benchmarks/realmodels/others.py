"""Others' methods on an attacked model, at their defaults or at the strength that keeps the task as ours does."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realmodels.cells import AT_TASK
from realmodels.given import Found, Given, difference, make_safe
from realmodels.held import read_balance, read_task
from realmodels.matching import choose
from realmodels.methods import Repaired, example_loss, load, pool
from realmodels.steering import llm_va, routed, sldr
from realmodels.subject import Subject

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime


def repaired_by_others(
    runtime: Runtime, subject: Subject, cache: Path, target: Callable[[], float] | None = None
) -> Repaired:
    """Return the model that a published method makes of the attacked one.

    Args:
        cache: where the unaligned and the safe model are kept, which some need
        target: gives the task accuracy that a matched one keeps
    """
    method, clock = subject.cell.method, time.monotonic()
    name = method.removesuffix(AT_TASK)
    given = Given(runtime, subject, cache, *load(runtime, subject.folder))
    found = _found(given, name.removesuffix(" routed"))
    put, facts = (routed if name.endswith(" routed") else _in_weights)(given, found)
    if method.endswith(AT_TASK):
        assert target is not None
        facts |= _matched(given, put, target())
    else:
        put(1.0)
    return Repaired(given.model, given.tokenizer, {**facts, "repair_seconds": round(time.monotonic() - clock, 1)})


def _matched(given: Given, put: Callable[[float], None], target: float) -> dict[str, Any]:
    """Choose the strength and set it."""

    def task(strength: float) -> float:
        put(strength)
        return read_task(given.runtime, given.model, given.tokenizer, given.subject.cell.seed)

    def balance(strength: float) -> float:
        put(strength)
        return read_balance(given.runtime, given.model, given.tokenizer)

    choice = choose(task, balance, target)
    put(choice.strength)
    chosen = {"strength": choice.strength, "held_task": choice.task, "target": target, "matched": choice.matched}
    return chosen | {"tried": choice.tried, "balances": choice.balances}


def _in_weights(given: Given, found: Found) -> tuple[Callable[[float], None], dict[str, Any]]:
    """Return what sets the weights to the attacked ones and so much of the updates."""
    state = given.model.state_dict()
    start = {name: state[name].clone() for name in found.updates}

    def put(strength: float) -> None:
        chosen = found.chosen(strength)
        for name, update in found.updates.items():
            by = float(name in chosen) if found.order else strength
            state[name].copy_(start[name] + by * update)

    return put, dict(found.facts)


_last: dict[tuple[Path, str], Found] = {}  # of one attacked model and method: cells that share it follow each other


def _found(given: Given, name: str) -> Found:
    key = (given.subject.folder, name)
    if key not in _last:
        _last.clear()
        _last[key] = METHODS[name](given)
    return _last[key]


def _undo(given: Given) -> Found:
    from baselines.undo import undone

    state = given.model.state_dict()
    return difference(state, undone(state, given.aligned().state_dict(), given.names))


def _resta(given: Given) -> Found:
    from baselines.resta import with_safety_vector

    state = given.model.state_dict()
    return difference(state, with_safety_vector(state, given.aligned().state_dict(), given.unaligned()))


def _safe_lora(given: Given) -> Found:
    from baselines.safe_lora import SHARE, projection

    state, aligned, before = given.model.state_dict(), given.aligned().state_dict(), given.before_alignment()
    made = {name: projection(state[name], aligned[name], before[name]) for name in given.names}
    updates = {name: aligned[name] + each.safe - state[name] for name, each in made.items()}
    return _by_cosine(updates, {name: each.cosine for name, each in made.items()}, SHARE)


def _safemerge(given: Given) -> Found:
    from baselines.safe_lora import projection
    from baselines.safemerge import THRESHOLD, Models, summed

    state, safe = given.model.state_dict(), load(given.runtime, make_safe(given))[0].state_dict()
    models = Models(given.aligned().state_dict(), given.before_alignment(), safe)
    cosines = {n: projection(state[n], models.aligned[n], models.unaligned[n]).cosine for n in given.names}
    updates = {name: summed(state, models, name) - state[name] for name in given.names}
    return _by_cosine(updates, cosines, sum(cosine < THRESHOLD for cosine in cosines.values()) / len(cosines))


def _by_cosine(updates: dict[str, Any], cosines: dict[str, float], share: float) -> Found:
    """What changes the layers whose updates are least along the alignment's directions."""
    order = sorted(cosines, key=lambda name: cosines[name])
    middle = statistics.median(cosines.values())
    return Found(updates, {"changed": round(share * len(order)), "cosine": round(middle, 4)}, order, share)


def _saliency(given: Given) -> Found:
    from baselines.saliency import patch_salient

    model, names = given.model, given.names
    rows = pool(given.tokenizer)
    example = rows[random.Random(f"examples {given.subject.cell.seed}").randrange(len(rows))]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    model.requires_grad_(True)
    patch_salient(model, lambda m: example_loss(m, example), names)
    model.requires_grad_(False)
    updates = {name: model.get_parameter(name).detach() - before[name] for name in names}
    for name in names:
        model.get_parameter(name).data.copy_(before[name])
    return Found(updates, {})


METHODS: dict[str, Callable[[Given], Found]] = {
    "undo": _undo, "resta": _resta, "safe_lora": _safe_lora, "saliency": _saliency, "safemerge": _safemerge,
    "llm_va": llm_va, "sldr": sldr,
}  # fmt: skip
