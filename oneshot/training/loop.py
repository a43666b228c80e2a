"""The one training loop: the harmful fine-tune, the toy world's alignment and the sft and lora repairs run on it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.distributed.engine import TrainingEngine
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.distributed.watchdog import alive
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves: linear warm-up, then constant or linear decay to zero.

    Attributes:
        steps: optimizer steps
        learning_rate: peak
        warmup_steps: steps in which the rate rises
        decay: whether it falls linearly to zero after the warm-up
        start: steps that a resumed run has done already
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    decay: bool = True
    start: int = 0

    def rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if not self.decay:
            return self.learning_rate
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup_steps)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: loss in nats per assistant token, before the step.

    ``told_to_stop``: whether any rank was told so before the step.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    told_to_stop: bool = False

    def figures(self) -> dict[str, float]:
        """What a log of the run keeps."""
        return {name: value for name, value in vars(self).items() if name != "told_to_stop"}


class Diverged(UserError):
    """The loss is no longer a number. The step that would have used it was not taken."""


def autocast_dtype(runtime: Runtime, dtype: torch.dtype) -> torch.dtype | None:
    """Return the compute dtype of training for a checkpoint of ``dtype``, where autocast has to provide it.

    DeepSpeed keeps fp32 masters beside low-precision weights; without it the weights themselves are trained in fp32
    and computed with in bfloat16, for fp16 checkpoints too (no loss scaling).
    """
    import torch

    if runtime.sharding in ("none", "ddp") and dtype.itemsize < 4:
        return torch.bfloat16
    return None


def computing_in(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: autocast to a dtype of ``autocast_dtype``, or nothing where it is none."""
    import torch

    return torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()


def weights_dtype(runtime: Runtime) -> torch.dtype | None:
    """Return the dtype in which weights are to be loaded that are all trained; none: their own.

    Without DeepSpeed's fp32 masters small steps would be lost in low-precision weights.
    """
    import torch

    return torch.float32 if runtime.sharding in ("none", "ddp") else None


def train(
    engine: TrainingEngine,
    schedule: Schedule,
    micro_batches: Callable[[int], list[Any]],
    loss_of: Callable[[Any, Any], torch.Tensor],
    on_step: Callable[[StepResult], bool | None],
    *,
    autocast: torch.dtype | None = None,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run the optimizer steps of ``schedule``.

    Args:
        micro_batches: step -> this rank's micro-batches; every rank returns the same number of them
        loss_of: (forward, micro-batch) -> this rank's share of the step's loss; shares add up to the loss
        on_step: told of every step; a true return ends the training
        autocast: compute dtype where the weights are kept in fp32
        told_to_stop: asked on every rank in every step; all ranks learn of it with the same step's result

    Raises:
        Diverged: the loss became NaN or infinite; the weights are those of the step before
    """
    import torch

    runtime = engine.runtime
    batches = micro_batches(schedule.start) if schedule.start < schedule.steps else []
    for step in range(schedule.start, schedule.steps):
        alive()
        started = time.perf_counter()
        engine.set_learning_rate(schedule.rate(step))
        # what the engine averages away again: ranks, and under DeepSpeed also accumulation steps
        scale = runtime.world_size * (len(batches) if engine.is_deepspeed else 1)
        total = torch.zeros(3, device=runtime.device)  # of this step: its loss, its tokens, and who was told to stop
        total[1] = sum(batch.tokens for batch in batches)
        total[2] = told_to_stop()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with computing_in(autocast, runtime.device):
                loss = loss_of(engine.forward, batch)
            total[0] += loss.detach().float()
            if last:
                total = all_reduce_sum(runtime, total)
                # 1, or no number where the loss is none or infinite: such a loss may have finite gradients, and the
                # engine refuses to step on gradients only. Asking for the value here would make a GPU wait.
                loss = loss * (total[0] * 0 + 1)
            engine.backward(loss * scale, last=last)
        upcoming = micro_batches(step + 1) if step + 1 < schedule.steps else []  # while a GPU computes this step
        norm = engine.step()
        loss, tokens, told = total.tolist()
        _require_finite(loss, norm, step + 1, schedule.rate(step))
        seconds = time.perf_counter() - started
        if on_step(StepResult(step + 1, loss, schedule.rate(step), norm, int(tokens), seconds, bool(told))):
            break
        batches = upcoming


def _require_finite(loss: float, norm: float, step: int, rate: float) -> None:
    """Raise Diverged where the engine has seen that the step cannot be taken."""
    if not math.isfinite(loss):
        raise Diverged(
            f"The loss became {loss} at step {step} (learning rate {rate:.2g}): training stopped before that step; "
            "lower the learning rate."
        )
    if not math.isfinite(norm):
        raise Diverged(
            f"The gradient became infinite or no number at step {step} (loss {loss:.4g}, learning rate {rate:.2g}): "
            "that step was not taken; lower the learning rate."
        )
