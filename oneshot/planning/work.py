"""What a run computes on, from the settings: the batch of a rank, and how many steps there are."""

from __future__ import annotations

from oneshot.patch.guard import AT_ONCE
from oneshot.patch.methods import METHODS
from oneshot.planning.facts import Work
from oneshot.settings import Settings

FINETUNE = {"full": "sft", "lora": "lora"}
"""A fine-tune by the settings' word for it -> the method that holds and computes what it does."""
_ANSWER, _GUARD_PROMPT = 128, 64  # tokens of an answer that carry the loss, and of a guard prompt


def planned_methods(settings: Settings) -> list[str]:
    """Return the methods of the stage that is planned, the one first that is taken by default where it can be."""
    return list(FINETUNE.values() if settings.plan.stage == "finetune" else METHODS)


def work_of(settings: Settings, method: str, gpus: int) -> Work:
    """Return what a rank computes on in one pass, from the settings."""
    repair, tune = settings.repair, settings.finetune
    tokens = min(settings.plan.tokens, settings.model.max_length or settings.plan.tokens)
    answers = min(tokens, _ANSWER)
    checkpointing = settings.model.gradient_checkpointing
    if settings.plan.stage == "finetune":
        rows = -(-tune.batch_size // (gpus * tune.gradient_accumulation_steps))
        rank = tune.lora_rank
        return Work(
            rows, tokens, rows * answers, rank=rank, rank_experts=rank, finetune=True, checkpointing=checkpointing
        )
    own_numbers = METHODS[method].defaults
    weight = own_numbers.guard_weight if repair.guard_weight is None else repair.guard_weight
    guard = (repair.guard_prompts or own_numbers.guard_prompts) if weight else 0
    seen = min(guard, AT_ONCE) if METHODS[method].cost.turns else guard
    own, prompt = -(-seen // gpus), _GUARD_PROMPT + repair.guard_tokens
    return Work(
        1, tokens, answers, own * repair.guard_tokens, own * prompt, tokens + seen * prompt, repair.rank,
        repair.rank_experts, reference=-(-guard // gpus) * repair.guard_tokens, checkpointing=checkpointing,
    )  # fmt: skip


def steps_of(settings: Settings, method: str) -> int:
    """Return how many steps a run makes."""
    if settings.plan.stage == "repair":
        return settings.repair.epochs or METHODS[method].defaults.epochs
    tune, data = settings.finetune, settings.data
    if data.parts is not None:
        conversations = sum((part.count or 0) * part.repeat for part in data.parts.values())
    else:
        conversations = data.harmful_count + (data.task_count if data.task else 0)
    return tune.steps or max(1, round(tune.epochs * -(-conversations // tune.batch_size)))
