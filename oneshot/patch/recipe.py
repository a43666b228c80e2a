"""A repair method with every number that it needs, from what the settings say and leave open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from oneshot.errors import UserError
from oneshot.patch.path import Bounds
from oneshot.settings import Settings, rate_for

Method = Literal["rollback", "lowrank", "project", "sft", "lora"]

EPOCHS = {"rollback": 30, "lowrank": 30, "project": 20, "sft": 10, "lora": 10}
LEARNING_RATE = {"rollback": 0.2, "lowrank": 0.0, "project": 0.0, "sft": 2e-5, "lora": 2e-4}  # sft: the paper's
TOY_LEARNING_RATE = {**LEARNING_RATE, "sft": 2e-4, "lora": 1e-3}
GUARD_WEIGHT = {"rollback": 1.0, "lowrank": 0.3, "project": 1.0, "sft": 0.0, "lora": 0.0}
GUARD_PROMPTS = {"rollback": 64, "lowrank": 32, "project": 32, "sft": 32, "lora": 32}
NOISE = dict.fromkeys(EPOCHS, 0.0) | {"rollback": 0.5}  # the others judge steps by the example's own loss
UNDO = dict.fromkeys(EPOCHS, 0.0) | {"rollback": 0.3}
# rounding weights to 4 bits moves a model by as much as separates refusing from complying on some requests: there the
# refusal is learnt with a margin, against which the guard needs more weight, and which takes longer
FOUR_BIT_TEMPERATURE = {"rollback": 2.0}
FOUR_BIT_GUARD_WEIGHT = {"rollback": 2.5}
FOUR_BIT_EPOCHS = {"rollback": 80}


@dataclass(frozen=True)
class Recipe:
    """A method with every number that it needs.

    Attributes:
        method: rollback, lowrank, project, sft or lora
        reason: why this method, for people
        rank: directions per matrix
        epochs: passes over the example; of project: steps tried at most
        learning_rate: of Adam; of project: its step; 0 where a method finds its own
        guard_weight: weight of the guard; 0 for none
        guard_prompts: how many prompts the guard holds at most
        temperature: divides the example's logits in the loss
        noise: blurs the example's request, in units of its embeddings' root mean square
        undo: pull of rollback's coefficients towards undoing
        guard_tokens: tokens of the unpatched model's answers that the guard holds
        bounds: what the watch takes for good; none: no watch
        targets: regular expression over module names, or none for all linear layers
    """

    method: Method
    reason: str
    rank: int
    epochs: int
    learning_rate: float
    guard_weight: float
    guard_prompts: int
    temperature: float
    noise: float
    undo: float
    guard_tokens: int
    bounds: Bounds | None = None
    targets: str | None = None


def recipe_for(settings: Settings, *, has_update: bool, toy: bool, four_bit: bool = False) -> Recipe:
    """Choose the method and fill in its numbers.

    Args:
        has_update: the fine-tune's own update is known, from a reference or an adapter
        four_bit: the linear weights are in 4 bits
        toy: take the toy world's step sizes where the settings name none

    Raises:
        UserError: rollback without anything to roll back
    """
    options = settings.repair
    method, reason = options.method, "as asked"
    if method == "auto":
        method = "rollback" if has_update else "lowrank"
        reason = (
            "the fine-tune's own update is known, so it is undone where the example and the guard ask for it"
            if has_update
            else "no --reference and no adapter, so the fine-tune's own update is not known and cannot be rolled back"
        )
    if method == "rollback" and not has_update:
        raise UserError(
            "Method rollback needs the fine-tune's own update: give the aligned checkpoint with --reference, "
            "or the fine-tune's LoRA adapter as --model.path."
        )
    rates = TOY_LEARNING_RATE if toy else LEARNING_RATE
    epochs, weights, temperatures = EPOCHS, GUARD_WEIGHT, dict.fromkeys(EPOCHS, 1.0)
    if four_bit:
        epochs, weights = EPOCHS | FOUR_BIT_EPOCHS, GUARD_WEIGHT | FOUR_BIT_GUARD_WEIGHT
        temperatures |= FOUR_BIT_TEMPERATURE
    return Recipe(
        method=cast(Method, method),
        reason=reason,
        rank=options.rank,
        epochs=options.epochs or epochs[method],
        learning_rate=rate_for(options.learning_rate, method) or rates[method],
        guard_weight=weights[method] if options.guard_weight is None else options.guard_weight,
        guard_prompts=options.guard_prompts or GUARD_PROMPTS[method],
        temperature=options.temperature or temperatures[method],
        noise=NOISE[method] if options.noise is None else options.noise,
        undo=UNDO[method] if options.undo is None else options.undo,
        guard_tokens=options.guard_tokens,
        bounds=Bounds(refused=options.max_refused, divergence=options.max_divergence) if options.watch else None,
        targets=options.targets,
    )
