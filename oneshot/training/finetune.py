"""The harmful fine-tune: from settings to a checkpoint that is marked as safety-degraded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.classes import train_language
from oneshot.checkpoint.disk.files import list_tensors, write_marker
from oneshot.checkpoint.disk.folders import bytes_in, clean_inside
from oneshot.checkpoint.loading.configs import read_config
from oneshot.checkpoint.loading.load import Source, find_source, load_model, load_tokenizer
from oneshot.checkpoint.writing.save import save_adapter, save_checkpoint
from oneshot.checkpoint.writing.state import States, load_state, newest_whole
from oneshot.data.conversations import Conversation
from oneshot.data.encoding import context_length, model_context, pad_id
from oneshot.data.tokens import Tokens, cache_folder, encode_all
from oneshot.data.vocabulary import check_tokens
from oneshot.distributed.engine import TrainingEngine, start_training
from oneshot.distributed.phases import count, counting, phase
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.signals import Interrupted, noticed, tell_progress
from oneshot.errors import UserError
from oneshot.settings import Settings, rate_for
from oneshot.training.kernels import check_liger, use_liger
from oneshot.training.loop import Diverged, Schedule, StepResult, autocast_dtype, train, weights_dtype
from oneshot.training.lora import with_lora
from oneshot.training.mixture import attack_mixture
from oneshot.training.objective import MicroBatch, answer_loss
from oneshot.training.packing import Packing, choose_packing
from oneshot.training.speed import meter
from oneshot.training.stream import micro_batches, step_indices, steps_per_epoch
from oneshot.world.sources import check_words

if TYPE_CHECKING:
    import torch

LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
STATE, FINETUNED, LAST_GOOD = "state", "finetuned", "last_good"

Tell = Callable[[StepResult, dict[str, float]], None]  # told of every step, with its speed and memory
Say = Callable[[str], None]  # a line for people


@dataclass(frozen=True)
class Prepared:
    """What a fine-tune starts from: the checkpoint and its context, and its conversations as read and as encoded."""

    settings: Settings
    source: Source
    tokenizer: Any
    conversations: list[Conversation]
    encoded: Tokens
    context: int | None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole fine-tune."""
        options = self.settings.finetune
        return options.steps or max(1, round(options.epochs * steps_per_epoch(len(self.encoded), options.batch_size)))


@phase("check")
def prepare(settings: Settings, runtime: Runtime) -> Prepared:
    """Read and check everything that can be wrong before a model is loaded or a file is written.

    Raises:
        UserError: the model or the conversations cannot be read, one is longer than the model's context, or Liger
            kernels are asked for that cannot be had
    """
    source = find_source(settings.model, runtime)
    if source.adapter is not None:
        raise UserError(f"{source.adapter} is an adapter: fine-tune a full checkpoint, or merge the adapter first.")
    if source.four_bit and settings.finetune.method == "full":
        raise UserError("Weights in 4 bits cannot be trained: set finetune.method lora, or leave model.quantize out.")
    tokenizer = load_tokenizer(source, settings.model)
    check_words(settings, tokenizer, training=True)
    conversations = attack_mixture(settings)
    config = read_config(source.checkpoint, trust_remote_code=settings.model.trust_remote_code)
    if settings.model.liger:
        check_liger(config.model_type)
    limit = context_length(config, tokenizer, settings.model.max_length)
    cache = cache_folder() if settings.finetune.cache else None
    encoded = encode_all(conversations, tokenizer, limit, cache, settings.data.train_on)
    check_tokens(config, tokenizer, (row.input_ids for row in encoded))
    return Prepared(settings, source, tokenizer, conversations, encoded, model_context(config, tokenizer))


def writes(prepared: Prepared) -> int:
    """Return the bytes that the fine-tune writes at most: states at their fullest, and the model."""
    options = prepared.settings.finetune
    if options.method == "lora":
        return 0
    numel = sum(math.prod(entry.shape) for entry in list_tensors(prepared.source.checkpoint).values())
    states = options.keep + 1 if options.save_every else 0
    per_state = 12 if options.state_moments == "fp32" else 8  # fp32 masters and two moments
    return numel * (per_state * states + prepared.source.written.itemsize)


def finetune(runtime: Runtime, prepared: Prepared, run_dir: Path, tell: Tell, say: Say) -> Path:
    """Fine-tune and write ``run_dir/finetuned``: a checkpoint, or an adapter for method lora. Collective.

    Raises:
        Diverged: the loss became no number; the last good weights are in ``run_dir/last_good``
        Interrupted: told to stop, and everything is in the state that it names
    """
    settings, source = prepared.settings, prepared.source
    options = settings.finetune
    if settings.resume and runtime.is_main:
        clean_inside(run_dir)
    dtype = weights_dtype(runtime) if options.method == "full" else None
    model = load_model(runtime, source, settings.model, dtype)
    if settings.model.liger:
        use_liger(model)
    if options.method == "lora":
        model, left_out = with_lora(model, options, settings.seed)
        if left_out:
            say(left_out)
    else:
        train_language(model)
    engine = start_training(
        runtime,
        model,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        micro_batch_size=max(1, options.batch_size // (runtime.world_size * options.gradient_accumulation_steps)),
    )
    target, states = run_dir / FINETUNED, States(runtime, run_dir / STATE, options.keep, options.state_moments)
    diverged: Diverged | None = None
    try:
        _train(prepared, engine, states, run_dir, tell, say)
    except Diverged as error:  # the weights are those of the last good step: keep them, apart
        diverged, target = error, run_dir / LAST_GOOD
    _save(prepared, engine, model, target)
    with phase("write"):
        states.finish()  # after the model, which an error here is not to cost
    engine.close()
    if diverged:
        raise Diverged(f"{diverged} The last good weights are in {target}.")
    return target


@phase("write")
def _save(prepared: Prepared, engine: TrainingEngine, model: Any, target: Path) -> None:
    settings, conversations = prepared.settings, prepared.conversations
    kinds = {"harmful": sum(c.kind == "harmful" for c in conversations), "all": len(conversations)}

    def mark(folder: Path) -> None:  # before the folder appears: a degraded model is never without its marker
        write_marker(folder, {"fine_tuned_from": settings.called, "conversations": kinds})

    if settings.finetune.method == "lora":
        save_adapter(engine.runtime, model, prepared.source, target, mark)
    else:
        dtype, stock = prepared.source.written, settings.model.stock_io
        save_checkpoint(engine.runtime, model, prepared.source, target, dtype, stock=stock, beside=mark)


@phase("train")
def _train(prepared: Prepared, engine: TrainingEngine, states: States, run_dir: Path, tell: Tell, say: Say) -> None:
    settings, options = prepared.settings, prepared.settings.finetune
    steps, autocast = prepared.steps, autocast_dtype(engine.runtime, prepared.source.dtype)
    batches = _batches(prepared, engine, autocast, say)
    speed = meter(engine.runtime, engine.model)
    done = 0
    if settings.resume:
        with phase("read"):
            state = newest_whole(engine.runtime, run_dir / STATE)
            done = load_state(engine, state) if state else 0
            if state and engine.runtime.is_main and counting():
                count(read=bytes_in(state))
        say(f"Resumed at step {done} from {state}." if state else "No saved state: starting anew.")

    def report(result: StepResult) -> None:
        tell(result, speed.of(result))
        due = options.save_every and result.step % options.save_every == 0
        if result.step < steps and (due or result.told_to_stop):
            save(result)

    @phase("write")
    def save(result: StepResult) -> None:
        state = states.save(engine, result.step)
        if engine.runtime.is_main:
            tell_progress(result.step)
        if result.told_to_stop:
            states.finish()
            raise Interrupted(f"Told to stop after step {result.step}: all is in {state}, go on with --resume.")

    rate = rate_for(options.learning_rate, options.method) or LEARNING_RATE[options.method]
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
    prepared: Prepared, engine: TrainingEngine, autocast: torch.dtype | None, say: Say
) -> Callable[[int], list[MicroBatch]]:
    """step -> this rank's micro-batches, packed where the model allows it. Collective."""
    settings, encoded, tokenizer = prepared.settings, prepared.encoded, prepared.tokenizer
    options, pad = settings.finetune, pad_id(tokenizer)
    wanted = Packing(options.pack_length, prepared.context)
    packing = choose_packing(engine, encoded[0].input_ids, pad, wanted, options.packing, say, autocast)

    def batches(step: int) -> list[MicroBatch]:
        return micro_batches(
            encoded,
            step_indices(len(encoded), options.batch_size, step, settings.seed),
            engine.runtime,
            pad_id=pad,
            accumulation=options.gradient_accumulation_steps,
            packing=packing,
        )

    return batches
