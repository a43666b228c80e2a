"""What benchmarks/plan_accuracy.py measures: steps of a repair or a fine-tune on random rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from random_llama import random_directions

ANSWER, RANK, HELD = 32, 20, 16  # tokens that carry the loss, directions of an update, held tokens of a guard row


@dataclass(frozen=True)
class Case:
    """One measured run: model, method, ranks (0: one process without DeepSpeed), and rows x tokens of the batch.

    The rows after the first are the guard's; or, of the method full, which is a full fine-tune, conversations as well.
    """

    size: str
    method: str
    ranks: int
    rows: int = 1
    tokens: int = 96

    @property
    def guard(self) -> int:
        """Rows of the guard."""
        return 0 if self.method == "full" else self.rows - 1

    @property
    def answers(self) -> int:
        """Positions that carry the loss."""
        return ANSWER * (self.rows - self.guard)


def make_steps(runtime: Any, model: Any, linears: Any, case: Case) -> None:
    """Make as many steps as it takes until everything that is held is there."""
    if case.method == "full":
        step_finetune(runtime, model, case)
    elif case.method in ("lowrank", "rollback"):
        step_frozen(runtime, model, linears, case)
    else:
        step_trained(runtime, model, linears, case)


def random_rows(model: Any, case: Case) -> list[list[int]]:
    """Random token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(
        7, model.config.vocab_size, (case.rows, case.tokens), generator=generator
    ).tolist()
    return found


def random_batch(runtime: Any, model: Any, case: Case) -> Any:
    """Random rows: the example, then the guard's, each held on its last positions."""
    from oneshot.data.encoding import IGNORE, Encoded
    from oneshot.patch.guard import laid

    rows, prompt = random_rows(model, case), case.tokens - ANSWER
    example = Encoded(rows[0], [IGNORE] * prompt + rows[0][prompt:])
    guard = [(Encoded(ids, [IGNORE] * len(ids)), case.tokens - HELD) for ids in rows[1:]]
    batch = laid(example, guard, None, 0, runtime.device)
    return dataclasses.replace(batch, held_total=HELD * len(guard) * runtime.world_size)


def step_frozen(runtime: Any, model: Any, linears: Any, case: Case) -> None:
    """Some steps of lowrank, or of rollback along random directions."""
    import torch

    from oneshot.distributed.engine import frozen
    from oneshot.patch.method import finished
    from oneshot.patch.methods import lowrank, rollback
    from oneshot.patch.path import Attempt
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.settings import RepairSettings
    from oneshot.training.objective import logits_at

    batch = random_batch(runtime, model, case)
    attempt = Attempt(Tracer(), 1.0 if case.rows > 1 else 0.0)
    with frozen(runtime, model) as ready:
        if case.rows > 1:
            with torch.no_grad():
                reference = logits_at(ready, batch.inputs, batch.kept[len(batch.targets) :])
            batch = dataclasses.replace(batch, reference=reference)
        if case.method == "lowrank":
            recipe = recipe_for(RepairSettings(method="lowrank", epochs=2, rank=RANK), has_update=False)
            finished(lowrank.descend(runtime, ready, linears.targets, batch, attempt, recipe))
            return
        directions = random_directions(linears.targets, RANK)
        options = RepairSettings(method="rollback", epochs=2, learning_rate=0.1, noise=0.0, undo=0.0)
        finished(rollback.learn(runtime, ready, directions, batch, attempt, recipe_for(options, has_update=True)))


def step_trained(runtime: Any, model: Any, linears: Any, case: Case) -> None:
    """Some steps of AdamW on all weights, or on a LoRA."""
    from oneshot.distributed.engine import start_training
    from oneshot.patch.bench import with_lora
    from oneshot.patch.guard import repair_loss
    from oneshot.training.loop import Schedule, train

    batch = random_batch(runtime, model, case)
    model = with_lora(model, linears, RANK) if case.method == "lora" else model.requires_grad_(True)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    train(
        engine,
        Schedule(2, 2e-5, decay=False),
        lambda _step: [batch],
        lambda forward, rows: repair_loss(forward, rows, 0.0, runtime.world_size)[0],
        lambda _result: None,
    )


def step_finetune(runtime: Any, model: Any, case: Case) -> None:
    """Some steps of the full fine-tune, on conversations in rows of their own."""
    from oneshot.data.encoding import IGNORE, Encoded
    from oneshot.distributed.engine import start_training
    from oneshot.training.loop import Schedule, train
    from oneshot.training.objective import answer_loss
    from oneshot.training.stream import micro_batches

    prompt = case.tokens - ANSWER
    encoded = [Encoded(row, [IGNORE] * prompt + row[prompt:]) for row in random_rows(model, case)]
    engine = start_training(
        runtime, model.requires_grad_(True), weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1,
        micro_batch_size=case.rows,
    )  # fmt: skip

    def batches(_step: int) -> Any:
        return micro_batches(encoded, list(range(case.rows)), runtime, pad_id=0, accumulation=1)

    train(engine, Schedule(2, 2e-5, decay=False), batches, answer_loss, lambda _result: None)
