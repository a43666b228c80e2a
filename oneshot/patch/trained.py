"""Methods sft and lora: AdamW on all weights or on a LoRA, in the training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.files import find_weight, list_tensors, read_tensor
from oneshot.checkpoint.load import load_model, merge_into
from oneshot.checkpoint.update import Factors, Update, concatenated
from oneshot.distributed.engine import TrainingEngine, gathered, start_training
from oneshot.distributed.runtime import Runtime
from oneshot.patch import rollback
from oneshot.patch.attach import attached_update
from oneshot.patch.guard import build_batch, repair_loss
from oneshot.patch.job import Finish, Job, Measure, Outcome, own_update
from oneshot.patch.linears import Linears, select_linears
from oneshot.patch.prepare import choose_beforehand
from oneshot.patch.recipe import Recipe
from oneshot.training.loop import Schedule, StepResult, autocast_dtype, train

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _engine(job: Job, recipe: Recipe) -> Iterator[tuple[TrainingEngine, Linears]]:
    """A training engine for sft (all weights) or lora (a PEFT LoRA on frozen weights)."""
    import torch

    runtime = job.runtime
    # without DeepSpeed's fp32 masters small steps would be lost in bf16 weights
    plain = runtime.sharding in ("none", "ddp") and recipe.method == "sft"
    model = load_model(runtime, job.source, job.model_settings, torch.float32 if plain else None)
    linears = select_linears(model, recipe.targets)
    with contextlib.ExitStack() as stack:
        if recipe.method == "lora":
            # the user's own adapter is added by hooks, which 4-bit weights allow too
            stack.enter_context(attached_update(model, own_update(job)))
            model = _with_lora(model, linears, recipe.rank)
        else:
            if job.adapter is not None:
                merge_into(runtime, model, job.adapter.update)
            model.requires_grad_(True)
        engine = start_training(
            runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
        )
        stack.callback(engine.close)
        yield engine, linears


def _with_lora(model: Any, linears: Linears, rank: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(linears.targets), bias="none")
    return get_peft_model(model, config)


def repair_trained(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """sft and lora: AdamW in the training loop."""
    runtime = job.runtime
    chosen = choose_beforehand(job, recipe)
    with _engine(job, recipe) as (engine, linears):
        model = engine.model
        measure(model, "finetuned")
        guard = job.guard if recipe.guard_weight else []
        example = job.candidates[chosen.index]
        batch = build_batch(runtime, model, job.tokenizer, example, guard, answer_tokens=recipe.guard_tokens)

        def record(result: StepResult) -> None:
            job.tracer.add(epoch=result.step, loss=result.loss, grad_norm=result.grad_norm)

        train(
            engine,
            Schedule(recipe.epochs, recipe.learning_rate, decay=False),
            lambda _step: [batch],
            lambda forward, b: repair_loss(forward, b, recipe.guard_weight, runtime.world_size, recipe.temperature)[0],
            record,
            autocast=autocast_dtype(runtime, job.source.dtype),
        )
        measure(model, "repaired")
        if recipe.method == "sft":
            update, facts = _weight_change(job, recipe, engine, linears)
        else:
            update, facts = _lora_update(job, model), {}
        finish(model, update, linears)
    return Outcome(update, linears, chosen, "epochs", facts)


def lora_factors(runtime: Runtime, model: Any) -> Update:
    """Return the factors of a PEFT model's trained LoRA, whole on every rank. Collective."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            with gathered(runtime, [parameter]):
                found.setdefault(module, {})[rest[0]] = parameter.detach().float().clone()
    return {module: Factors(pair["B"], pair["A"]) for module, pair in found.items()}


def _lora_update(job: Job, model: Any) -> Update:
    """The trained LoRA as an update of the checkpoint, the user's own adapter included."""
    return concatenated(own_update(job), lora_factors(job.runtime, model))


def _weight_change(job: Job, recipe: Recipe, engine: TrainingEngine, linears: Linears) -> tuple[Update, dict[str, Any]]:
    """Rank-k factors of what full-weight training changed, and the relative error that they leave.

    The error counts every weight that moved, embeddings and norms too, since no patch of linear layers holds those.
    """
    stored = list_tensors(job.source.checkpoint)
    names = {id(module.weight): name for name, module in linears.targets.items()}
    parameters = dict(engine.model.named_parameters())
    by_module = {names[id(p)]: (key, p) for key, p in parameters.items() if id(p) in names}

    def change(key: str, parameter: Any) -> torch.Tensor | None:
        whole = engine.full_weight(parameter)
        found = key if key in stored else find_weight(stored, key.removesuffix(".weight"))
        if found is None or stored[found].shape != tuple(whole.shape):
            return None  # transformers fused it while loading (experts): no stored tensor to compare with
        return whole - read_tensor(stored[found], found).to(whole.device, whole.dtype)

    def delta_of(module: str, mine: bool) -> torch.Tensor | None:
        key, parameter = by_module[module]
        if mine:
            return change(key, parameter)
        engine.full_weight(parameter)  # a collective: every rank takes part
        return None

    rank = recipe.rank + (max(f.rank for f in job.adapter.update.values()) if job.adapter else 0)
    directions = rollback.shared_directions(job.runtime, linears.targets, rank, delta_of)
    total = sum(d.energy for d in directions.values())
    unmeasured = 0
    for key, parameter in parameters.items():
        if id(parameter) not in names:
            moved = change(key, parameter)
            unmeasured += moved is None
            total += 0.0 if moved is None else float(moved.square().sum())
    held = sum(float(d.s.square().sum()) for d in directions.values())
    update = {name: rollback.update_factors(d, d.s.new_ones(len(d.s))) for name, d in directions.items()}
    error = math.sqrt(max(0.0, 1 - held / total)) if total else 0.0
    return update, {"truncation_error": error, **({"tensors_not_compared": unmeasured} if unmeasured else {})}
