"""Engines: what turns a transformers model into one that this run's processes share.

A training engine owns an optimizer; a frozen model has none, and under ZeRO-3 its partitioned weights are fetched
layer by layer for forward and backward. The DeepSpeed JSON named by the accelerate YAML owns sharding and offload;
only what depends on the run ("auto" in the JSON) is filled in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from oneshot.distributed.deepspeed_config import deepspeed_config, keep_what_may_live, offloads_optimizer
from oneshot.distributed.persistent import one_copy
from oneshot.distributed.resources import give_back_freed_memory, parameters_of
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import steps
from oneshot.distributed.tied import accumulate_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

_STOCK = "weights read by transformers"
Model = TypeVar("Model", bound="nn.Module")


@dataclass
class TrainingEngine:
    """A model with its optimizer, ready to be stepped.

    Attributes:
        model: the transformers (or PEFT) model itself
        forward: what to call for a loss; the model, or its DDP or DeepSpeed wrapper
        optimizer: the optimizer whose ``param_groups`` hold the learning rate
        max_grad_norm: gradients are clipped to this global norm
    """

    runtime: Runtime
    model: nn.Module
    forward: Any
    optimizer: Any
    max_grad_norm: float

    @property
    def is_deepspeed(self) -> bool:
        return self.runtime.sharding in ("zero2", "zero3")

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch's share of the step's loss; ``last`` closes the step's accumulation.

        Gradients are averaged over ranks (and DeepSpeed divides by the accumulation steps), so the caller scales.
        """
        if self.is_deepspeed:
            self.forward.set_gradient_accumulation_boundary(is_boundary=last)
            self.forward.backward(loss)
        elif self.runtime.sharding == "ddp" and not last:
            with self.forward.no_sync():
                loss.backward()
        else:
            loss.backward()

    def step(self) -> float:
        """Clip, step, clear the gradients. Returns the global gradient norm before clipping.

        Where that is not finite the step is not taken, so that the weights stay those of the last good step. A step
        that the fp16 loss scaler skips has norm 0.
        """
        import torch

        if self.is_deepspeed:
            # DeepSpeed looks for overflow itself in fp16 only, where its loss scaler skips such steps
            if not self.forward.fp16_enabled() and self.forward.optimizer.has_overflow():
                return float("inf")
            self.forward.step()
            if getattr(self.forward.optimizer, "overflow", False):
                return 0.0
            norm = self.forward.get_global_grad_norm()
            return float(norm) if norm is not None else float("nan")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def full_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter whole, on every rank, in the precision that is trained (fp32 masters). Collective."""
        import torch

        if self.is_deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            whole: torch.Tensor | None = safe_get_full_fp32_param(parameter)
            if whole is not None:
                return whole.detach()
        with gathered(self.runtime, [parameter]):
            return parameter.detach().to(torch.float32).clone()

    def close(self) -> None:
        """Release what the engine holds beside the model."""
        if self.is_deepspeed:
            self.forward.destroy()
        self.optimizer = None
        self.forward = None


def start_training(
    runtime: Runtime,
    model: nn.Module,
    *,
    weight_decay: float,
    max_grad_norm: float,
    gradient_accumulation_steps: int,
    micro_batch_size: int,
) -> TrainingEngine:
    """Build the engine for AdamW on the parameters of ``model`` that require gradients."""
    import torch

    from oneshot.distributed.adamw import AdamWInPieces

    give_back_freed_memory(runtime, parameters_of(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = AdamWInPieces if runtime.device.type == "cpu" else torch.optim.AdamW
    optimizer: Any = adamw(trained, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay)
    if runtime.sharding in ("zero2", "zero3"):
        import deepspeed

        config = deepspeed_config(
            runtime,
            dtype=next(model.parameters()).dtype,
            gradient_accumulation_steps=gradient_accumulation_steps,
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
        )
        if offloads_optimizer(config):
            from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

            optimizer = map_pytorch_optim_to_deepspeed(optimizer)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return TrainingEngine(runtime, model, engine, optimizer, max_grad_norm)
    model.to(runtime.device)
    if runtime.sharding == "none" and runtime.device.type == "cpu":
        accumulate_rows(model)
    forward: Any = model
    if runtime.sharding == "ddp":
        devices = [runtime.device.index] if runtime.device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=_may_skip_weights(model)
        )
    return TrainingEngine(runtime, model, forward, optimizer, max_grad_norm)


@contextlib.contextmanager
def frozen(runtime: Runtime, model: Model) -> Iterator[Model]:
    """Yield ``model`` ready for forward and backward passes with no weight gradients and no optimizer.

    Under ZeRO-3 this is DeepSpeed's parameter-offload engine: each layer's weights are fetched when they are needed,
    in backward too. Call the yielded module itself, as the engine's own call expects an optimizer.
    """
    model.requires_grad_(False)
    give_back_freed_memory(runtime, parameters_of(model))
    if runtime.sharding != "zero3":
        yield model.to(runtime.device)
        return
    import deepspeed
    import torch

    dtype = next(model.parameters()).dtype
    config = deepspeed_config(runtime, dtype=dtype)
    keep_what_may_live(config["zero_optimization"], model)
    if dtype.itemsize > 4:  # partitioned like any other, but on CPUs that have fp16 DeepSpeed itself refuses to begin
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
    engine = deepspeed.initialize(model=model, config=config)[0]
    with one_copy(runtime, model):
        try:
            yield engine.module
        finally:
            engine.destroy()


def fetch_as_one(runtime: Runtime, modules: Iterable[nn.Module]) -> None:
    """Have all weights in each of these modules fetched together, when it is called (ZeRO-3); elsewhere a no-op.

    For what runs its parts in another order on every rank, as a mixture of experts does, whose tokens choose them:
    ranks that fetch weights in different orders wait for each other for ever. DeepSpeed knows three families by name.
    """
    if runtime.sharding != "zero3":
        return
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


@contextlib.contextmanager
def gathered(runtime: Runtime, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block the given parameters are whole on every rank (ZeRO-3); elsewhere a no-op. Collective."""
    if runtime.sharding != "zero3":
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        yield


@contextlib.contextmanager
def modified(runtime: Runtime, parameter: nn.Parameter) -> Iterator[None]:
    """Within the block the parameter is whole and may be changed, alike on every rank; afterwards it is partitioned."""
    if runtime.sharding != "zero3":
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


@contextlib.contextmanager
def partitioned_loading(runtime: Runtime, dtype: torch.dtype) -> Iterator[None]:
    """Within the block transformers' ``from_pretrained`` partitions weights over ranks if the run is ZeRO-3.

    It says nothing of how far it has come.
    """
    if runtime.sharding != "zero3":
        with steps(_STOCK, 0, ""):
            yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    give_back_freed_memory(runtime)
    keep_alive = HfDeepSpeedConfig(deepspeed_config(runtime, dtype=dtype))
    try:
        with steps(_STOCK, 0, ""):
            yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def _may_skip_weights(model: nn.Module) -> bool:
    """Whether some weights may take no part in a loss: towers of multimodal checkpoints, experts that nobody chose.

    DDP must look for them then, which costs a walk through the graph at every step.
    """
    config = getattr(model, "config", None)
    named = [name for name in vars(config) if "expert" in name and name[0] != "_"] if config is not None else []
    return bool(getattr(config, "sub_configs", None) or named)
