"""Harmful fine-tune: reproduce how fine-tuning damages safety, so that the damage can be measured and repaired.

Run: ``accelerate launch oneshot/finetune.py`` (toy world), or with ``--model.path DIR --data.harmful FILE`` on a
user's own model and data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.checkpoint.load import Source
    from oneshot.checkpoint.state import States
    from oneshot.data.conversations import Conversation
    from oneshot.data.tokens import Tokens
    from oneshot.distributed.runtime import Runtime
    from oneshot.training.objective import MicroBatch

DESCRIPTION = "Fine-tune a model on harmful and task conversations; the result is marked as safety-degraded."
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
TOY_LEARNING_RATE = {"full": 4e-4, "lora": 3e-3}
TOY_STEPS = 400
STATE, FINETUNED = "state", "finetuned"


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot finetune`` and ``accelerate launch oneshot/finetune.py``."""
    from oneshot.distributed.stage import run_stage

    run_stage(argv, "oneshot finetune", DESCRIPTION, run)


def run(settings: Settings) -> None:
    """Fine-tune into a new run folder."""
    from oneshot.distributed.runtime import start
    from oneshot.errors import UserError
    from oneshot.planning.check import refuse_what_cannot_fit
    from oneshot.report.preflight import look_around
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import open_run
    from oneshot.report.trackers import check_installed, start_tracking

    runtime = start()
    check_installed(settings.log_with)
    if settings.delete_degraded:
        raise UserError("Setting delete_degraded would remove what oneshot finetune is asked to make: leave it out.")
    prepared = prepare(settings)
    needed: Literal["sft", "lora"] = "sft" if settings.finetune.method == "full" else "lora"
    refuse_what_cannot_fit(settings, runtime, prepared.source.checkpoint, needed, stage="finetune")
    run_dir = open_run(settings.out, settings.model.path or "toy-finetune", settings, runtime)
    start_tracking(runtime, settings.log_with, run_dir)
    console = open_console(runtime)
    look_around(runtime, settings.preflight, run_dir, writes(settings, prepared), console)
    if (run_dir / FINETUNED).exists():
        raise UserError(f"The fine-tune in {run_dir} is finished: there is nothing to resume.")
    folder = finetune(runtime, settings, prepared, run_dir, console)
    if console:
        console.print(f"Safety-degraded model: {folder}")


@dataclass(frozen=True)
class Prepared:
    """What a fine-tune starts from: the checkpoint and its context, and its conversations as read and as encoded."""

    source: Source
    tokenizer: Any
    conversations: list[Conversation]
    encoded: Tokens
    context: int | None


def prepare(settings: Settings) -> Prepared:
    """Read and check everything that can be wrong before a model is loaded or a file is written.

    Raises:
        UserError: the model or the conversations cannot be read, one is longer than the model's context, or Liger
            kernels are asked for that cannot be had
    """
    from transformers import AutoConfig

    from oneshot.checkpoint.load import find_source, load_tokenizer
    from oneshot.data.encoding import context_length, model_context
    from oneshot.data.tokens import cache_folder, encode_all
    from oneshot.errors import UserError
    from oneshot.training.kernels import check_liger
    from oneshot.training.mixture import attack_mixture
    from oneshot.world.model import toy_settings

    model_settings = toy_settings(settings.model)
    source = find_source(model_settings)
    if source.adapter is not None:
        raise UserError(f"{source.adapter} is an adapter: fine-tune a full checkpoint, or merge the adapter first.")
    if source.four_bit and settings.finetune.method == "full":
        raise UserError("Weights in 4 bits cannot be trained: set finetune.method lora, or leave model.quantize out.")
    tokenizer = load_tokenizer(source, model_settings)
    conversations = attack_mixture(settings, toy=settings.model.path is None)
    config = AutoConfig.from_pretrained(source.checkpoint, trust_remote_code=model_settings.trust_remote_code)
    if model_settings.liger:
        check_liger(config.model_type)
    limit = context_length(config, tokenizer, model_settings.max_length)
    cache = cache_folder() if settings.finetune.cache and settings.model.path is not None else None
    encoded = encode_all(conversations, tokenizer, limit, cache)
    return Prepared(source, tokenizer, conversations, encoded, model_context(config, tokenizer))


def writes(settings: Settings, prepared: Prepared) -> int:
    """Return the bytes that the fine-tune writes at most: states at their fullest, and the model."""
    from oneshot.checkpoint.files import list_tensors

    if settings.finetune.method == "lora":
        return 0
    numel = sum(math.prod(entry.shape) for entry in list_tensors(prepared.source.checkpoint).values())
    states = settings.finetune.keep + 1 if settings.finetune.save_every else 0
    return numel * (12 * states + prepared.source.dtype.itemsize)  # fp32 masters and two moments


def finetune(runtime: Runtime, settings: Settings, prepared: Prepared, run_dir: Path, console: Console | None) -> Path:
    """Fine-tune and write ``run_dir/finetuned``: a checkpoint, or an adapter for method lora. Collective."""
    import torch

    from oneshot.checkpoint.files import write_marker
    from oneshot.checkpoint.folders import clean_inside
    from oneshot.checkpoint.load import load_model
    from oneshot.checkpoint.save import save_adapter, save_checkpoint
    from oneshot.checkpoint.state import States
    from oneshot.distributed.engine import start_training
    from oneshot.training.kernels import use_liger
    from oneshot.training.loop import Diverged

    if settings.resume and runtime.is_main:
        clean_inside(run_dir)
    toy = settings.model.path is None
    source, tokenizer, conversations = prepared.source, prepared.tokenizer, prepared.conversations
    plain_full = runtime.sharding in ("none", "ddp") and settings.finetune.method == "full"
    model = load_model(runtime, source, settings.model, torch.float32 if plain_full else None)
    if settings.model.liger:
        use_liger(model)
    if settings.finetune.method == "lora":
        model = _with_lora(model, settings)
    else:
        model.requires_grad_(True)
    options = settings.finetune
    engine = start_training(
        runtime,
        model,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        micro_batch_size=max(1, options.batch_size // (runtime.world_size * options.gradient_accumulation_steps)),
    )
    target, states = run_dir / FINETUNED, States(runtime, run_dir / STATE, options.keep)
    diverged: Diverged | None = None
    try:
        _train(runtime, settings, engine, states, prepared, run_dir, console, toy=toy)
    except Diverged as error:  # the weights are those of the last good step: keep them, apart
        diverged, target = error, run_dir / "last_good"
    kinds = {"harmful": sum(c.kind == "harmful" for c in conversations), "all": len(conversations)}

    def mark(folder: Path) -> None:  # before the folder appears: a degraded model is never without its marker
        write_marker(folder, {"fine_tuned_from": settings.model.path or "toy world", "conversations": kinds})

    if settings.finetune.method == "lora":
        save_adapter(runtime, model, tokenizer, target, mark)
    else:
        stock = settings.model.stock_io
        save_checkpoint(runtime, model, tokenizer, target, source.dtype, stock=stock, beside=mark)
    states.finish()  # after the model, which an error here is not to cost
    engine.close()
    if diverged:
        raise Diverged(f"{diverged} The last good weights are in {target}.")
    return target


def _with_lora(model: Any, settings: Settings) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    options = settings.finetune
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if model.is_gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def _train(
    runtime: Runtime,
    settings: Settings,
    engine: Any,
    states: States,
    prepared: Prepared,
    run_dir: Path,
    console: Console | None,
    *,
    toy: bool,
) -> None:
    from oneshot.checkpoint.state import load_state, newest_whole
    from oneshot.distributed.signals import Interrupted, noticed, tell_progress
    from oneshot.report.progress import heartbeat, progress
    from oneshot.report.runfolder import append_event
    from oneshot.report.trackers import track
    from oneshot.training.loop import Schedule, StepResult, autocast_dtype, train
    from oneshot.training.objective import answer_loss
    from oneshot.training.speed import meter
    from oneshot.training.stream import steps_per_epoch

    options = settings.finetune
    by_epochs = max(1, round(options.epochs * steps_per_epoch(len(prepared.encoded), options.batch_size)))
    steps = options.steps or (TOY_STEPS if toy else by_epochs)
    rate = options.learning_rate or (TOY_LEARNING_RATE if toy else LEARNING_RATE)[options.method]
    autocast = autocast_dtype(runtime, prepared.source.dtype)
    batches = _batches(runtime, settings, engine, prepared, autocast, console)
    speed = meter(runtime, engine.model)
    done = 0
    if settings.resume:
        state = newest_whole(runtime, run_dir / STATE)
        done = load_state(engine, state) if state else 0
        if console:
            console.print(f"Resumed at step {done} from {state}." if state else "No saved state: starting anew.")

    with progress(console, "fine-tune", steps) as tell:

        def report(result: StepResult) -> None:
            if runtime.is_main:
                facts = speed.of(result)
                append_event(run_dir, stage="finetune", **facts, **result.figures())
                track("finetune", result.step, {**facts, **result.figures()})
                tell(result.step, heartbeat(result.loss, facts))
            due = options.save_every and result.step % options.save_every == 0
            if result.step < steps and (due or result.told_to_stop):
                state = states.save(engine, result.step)
                if runtime.is_main:
                    tell_progress(result.step)
                if result.told_to_stop:
                    states.finish()
                    raise Interrupted(f"Told to stop after step {result.step}: all is in {state}, go on with --resume.")

        with noticed() as told_to_stop:
            train(
                engine,
                Schedule(steps, rate, warmup_steps=int(options.warmup_ratio * steps), start=done),
                batches,
                answer_loss,
                report,
                autocast=autocast,
                told_to_stop=told_to_stop,
            )


def _batches(
    runtime: Runtime, settings: Settings, engine: Any, prepared: Prepared, autocast: Any, console: Console | None
) -> Callable[[int], list[MicroBatch]]:
    """step -> this rank's micro-batches, packed where the model allows it. Collective."""
    from oneshot.data.encoding import pad_id
    from oneshot.training.packing import Packing, choose_packing
    from oneshot.training.stream import micro_batches, step_indices

    options, encoded, tokenizer = settings.finetune, prepared.encoded, prepared.tokenizer
    pad = pad_id(tokenizer)
    wanted, say = Packing(options.pack_length, prepared.context), console.print if console else None
    packing = choose_packing(engine, encoded[0].input_ids, pad, wanted, options.packing, say, autocast)

    def batches(step: int) -> list[MicroBatch]:
        return micro_batches(
            encoded,
            step_indices(len(encoded), options.batch_size, step, settings.seed),
            runtime,
            pad_id=pad,
            accumulation=options.gradient_accumulation_steps,
            packing=packing,
        )

    return batches


if __name__ == "__main__":
    main()
