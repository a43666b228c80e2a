"""The repair methods on a loaded model: choose one, run it, and hand back the same thing whichever it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapter import Adapter, Factors, Update, concatenated, on_device
from oneshot.checkpoint.files import find_weight, list_tensors, read_tensor
from oneshot.checkpoint.load import Source, load_model, merge_into
from oneshot.data.encoding import Encoded
from oneshot.distributed.engine import TrainingEngine, frozen, gathered, start_training
from oneshot.distributed.runtime import Runtime
from oneshot.patch import lowrank, rollback
from oneshot.patch.attach import attached_update
from oneshot.patch.examples import Chosen, choose
from oneshot.patch.guard import RepairBatch, build_batch, pad_id, repair_loss
from oneshot.patch.linears import Linears, select_linears
from oneshot.patch.recipe import Recipe
from oneshot.patch.trace import Tracer
from oneshot.settings import ModelSettings
from oneshot.training.loop import Schedule, StepResult, autocast_dtype, train

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, str]]


@dataclass
class Job:
    """What a repair works on.

    Attributes:
        candidates: the user's one example, or the pool from which one is chosen
        guard: chat messages of the guard's prompts; empty for no guard
    """

    runtime: Runtime
    source: Source
    model_settings: ModelSettings
    tokenizer: Any
    adapter: Adapter | None
    reference: Path | None
    candidates: list[Encoded]
    guard: list[Messages]
    tracer: Tracer


@dataclass
class Outcome:
    """What a repair left.

    Attributes:
        update: what to add to the checkpoint (of an adapter: to its base) to get the repaired model
        before, after: what ``measure`` returned for the unpatched and the repaired model
        linears: the layers that were eligible
        chosen: the example that was taken
        stopped_by: why the repair ended
        facts: figures of the method, for the report
    """

    update: Update
    before: Any
    after: Any
    linears: Linears
    chosen: Chosen
    stopped_by: str
    facts: dict[str, Any] = field(default_factory=dict)


Measure = Callable[[Any, str], Any]  # (model, stage) -> scores
Finish = Callable[[Any, Update, Linears], None]  # (model, update, linears), while the model is still loaded


def repair(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """Run a repair: measure the unpatched model, patch it, measure again, write. Collective.

    Args:
        measure: called with the model and "finetuned", then with "repaired"
        finish: writes the outputs while the model is loaded
    """
    run = _repair_frozen if recipe.method in ("rollback", "lowrank") else _repair_trained
    return run(job, recipe, measure, finish)


def _repair_frozen(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """rollback and lowrank: the weights stay as loaded, updates are attached by hooks."""
    runtime = job.runtime
    loaded = load_model(runtime, job.source, job.model_settings)
    linears = select_linears(loaded, recipe.targets)
    own = _own_update(job)
    facts: dict[str, Any] = {}
    with frozen(runtime, loaded) as model:
        with attached_update(model, own) as own_layers:
            before = measure(model, "finetuned")
            chosen, batch = _prepare(job, recipe, model)
            if recipe.method == "lowrank":
                patch = lowrank.solve(
                    runtime, model, linears.targets, batch, job.tracer,
                    epochs=recipe.epochs, rank=recipe.rank, guard_weight=recipe.guard_weight,
                    temperature=recipe.temperature,
                )  # fmt: skip
                update = concatenated(own, patch)
        if recipe.method == "rollback":
            update, facts = _rollback(job, recipe, model, linears, own_layers, batch)
        with attached_update(model, update):
            after = measure(model, "repaired")
        finish(model, update, linears)
    return Outcome(update, before, after, linears, chosen, "epochs", facts)


def _own_update(job: Job) -> Update:
    """The user's adapter as an update on this rank's device; empty for a full checkpoint."""
    return on_device(job.adapter.update, job.runtime.device) if job.adapter else {}


def _prepare(job: Job, recipe: Recipe, model: Any) -> tuple[Chosen, RepairBatch]:
    """Choose the example and let the unpatched model answer the guard's prompts."""
    chosen = choose(job.runtime, model, job.candidates, pad_id(job.tokenizer))
    guard = job.guard if recipe.guard_weight else []
    batch = build_batch(
        job.runtime,
        model,
        job.tokenizer,
        job.candidates[chosen.index],
        guard,
        answer_tokens=recipe.guard_tokens,
    )
    return chosen, batch


def _rollback(
    job: Job, recipe: Recipe, model: Any, linears: Linears, own_layers: dict[str, Any], batch: RepairBatch
) -> tuple[Update, dict[str, Any]]:
    if job.adapter is not None:
        targets = own_layers
        directions = rollback.adapter_directions(job.adapter.update, job.runtime.device)
    else:
        assert job.reference is not None
        targets = linears.targets
        difference = rollback.checkpoint_difference(job.source.checkpoint, job.reference, targets)
        directions = rollback.shared_directions(job.runtime, targets, recipe.rank, difference)
    coefficients = rollback.solve(
        job.runtime, model, targets, directions, batch, job.tracer,
        epochs=recipe.epochs, learning_rate=recipe.learning_rate, guard_weight=recipe.guard_weight,
        temperature=recipe.temperature, noise=recipe.noise, kept=job.adapter is not None,
    )  # fmt: skip
    update = {
        name: rollback.update_factors(directions[name], 1 - c if job.adapter is not None else -c)
        for name, c in coefficients.items()
    }
    held = sum(float(d.s.square().sum()) for d in directions.values())
    energy = sum(d.energy for d in directions.values())
    return update, {
        "coefficients": sum(len(c) for c in coefficients.values()),
        "energy_of_directions": held / energy if energy else math.nan,
    }


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
            stack.enter_context(attached_update(model, _own_update(job)))
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


def _repair_trained(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """sft and lora: AdamW in the training loop."""
    runtime = job.runtime
    with _engine(job, recipe) as (engine, linears):
        model = engine.model
        before = measure(model, "finetuned")
        chosen, batch = _prepare(job, recipe, model)

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
        after = measure(model, "repaired")
        if recipe.method == "sft":
            update, facts = _weight_change(job, recipe, engine, linears)
        else:
            update, facts = _lora_update(job, model), {}
        finish(model, update, linears)
    return Outcome(update, before, after, linears, chosen, "epochs", facts)


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
    return concatenated(_own_update(job), lora_factors(job.runtime, model))


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
