"""A repair method with every number that it needs, from what the settings say and leave open."""

from __future__ import annotations

from dataclasses import dataclass

from oneshot.errors import UserError
from oneshot.patch.method import Defaults, Method
from oneshot.patch.methods import METHODS
from oneshot.patch.path import Bounds
from oneshot.settings import RepairSettings, rate_for
from oneshot.settings.checks import Where, nowhere, unknown, wrong

AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """A method with every number that it needs.

    Attributes:
        method: one of ``METHODS``
        reason: why this method, for people
        rank: directions per matrix
        rank_experts: directions per matrix of a fused expert; none: as many as of another
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
    rank_experts: int | None = None
    bounds: Bounds | None = None
    targets: str | None = None


def method_named(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UserError: there is none
    """
    check_names(name)
    return METHODS[name]


def check_names(name: str, rate: float | dict[str, float] | None = None, where: Where = nowhere) -> None:
    """Raise UserError where settings name a method that there is not.

    Args:
        name: repair.method
        rate: repair.learning_rate, which may be given by method
        where: tells where a setting was given
    """
    if name not in (AUTO, *METHODS):
        known = [AUTO, *METHODS]
        raise wrong("repair.method", name, f"one of {', '.join(known)}", known, where)
    for other in rate if isinstance(rate, dict) else ():
        if other not in METHODS:
            raise unknown(f"repair.learning_rate.{other}", [f"repair.learning_rate.{one}" for one in METHODS], where)


def choose_method(name: str, *, has_update: bool) -> tuple[Method, str]:
    """Return the method that is asked for, or that ``auto`` takes, and why.

    Args:
        has_update: the fine-tune's own update is known, from a reference or an adapter

    Raises:
        UserError: no such method, or one that needs the fine-tune's update where that is not known
    """
    if name == AUTO:
        able = [method for method in METHODS.values() if method.reason and (has_update or not method.needs_update)]
        return able[0], able[0].reason
    method = method_named(name)
    if method.needs_update and not has_update:
        raise UserError(
            f"Method {name} needs the fine-tune's own update: give the aligned checkpoint with --reference, "
            "or the fine-tune's LoRA adapter as --model.path."
        )
    return method, "as asked"


def recipe_for(options: RepairSettings, *, has_update: bool, four_bit: bool = False) -> Recipe:
    """Choose the method and fill in its numbers.

    Args:
        has_update: the fine-tune's own update is known, from a reference or an adapter
        four_bit: the linear weights are in 4 bits

    Raises:
        UserError: a method that cannot be had, see ``choose_method``, or that cannot work on 4-bit weights
    """
    method, reason = choose_method(options.method, has_update=has_update)
    return with_method(options, method, reason, four_bit=four_bit)


def with_method(options: RepairSettings, method: Method, reason: str, *, four_bit: bool = False) -> Recipe:
    """Fill in a method's numbers, from the settings, else its own.

    Raises:
        UserError: it cannot work on 4-bit weights
    """
    numbers: Defaults | None = method.four_bit if four_bit else method.defaults
    if numbers is None:
        able = ", ".join(other.name for other in METHODS.values() if other.four_bit is not None)
        raise UserError(f"Method {method.name} trains all weights, which 4 bits do not allow: use one of {able}.")
    return Recipe(
        method=method,
        reason=reason,
        rank=options.rank,
        rank_experts=options.rank_experts,
        epochs=options.epochs or numbers.epochs,
        learning_rate=rate_for(options.learning_rate, method.name) or numbers.learning_rate,
        guard_weight=numbers.guard_weight if options.guard_weight is None else options.guard_weight,
        guard_prompts=options.guard_prompts or numbers.guard_prompts,
        temperature=options.temperature or numbers.temperature,
        noise=numbers.noise if options.noise is None else options.noise,
        undo=numbers.undo if options.undo is None else options.undo,
        guard_tokens=options.guard_tokens,
        bounds=Bounds(refused=options.max_refused, divergence=options.max_divergence) if options.watch else None,
        targets=options.targets,
    )
