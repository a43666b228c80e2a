"""Load the user's model and tokenizer, in the way that the run's sharding asks for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.bases import base_of, own_tokenizer
from oneshot.checkpoint.adapters.experts import mixtures
from oneshot.checkpoint.classes import auto_class, refuses_sdpa
from oneshot.checkpoint.disk.files import (
    is_adapter,
    list_tensors,
    local_folder,
    resolve,
    stored_bytes,
)
from oneshot.checkpoint.loading.configs import read_config, read_tokenizer
from oneshot.checkpoint.loading.partitioned import fill_partitions, fill_whole, made_as_read, skeleton, why_not
from oneshot.checkpoint.loading.segments import described
from oneshot.checkpoint.loading.ties import keep_apart
from oneshot.checkpoint.names import CONFIG
from oneshot.checkpoint.quantized.nf4 import make_four_bit, what_stays
from oneshot.checkpoint.quantized.scheme import QUANTIZATION, is_left_over, is_stored, refuse_eight_bit, stored_dtype
from oneshot.checkpoint.reads.manifest import check_share
from oneshot.data.protocols import Tokenizer
from oneshot.distributed.engine import fetch_as_one, partitioned_loading
from oneshot.distributed.phases import count, count_passes, counting, phase
from oneshot.distributed.resources import give_back_freed_memory, parameters_of
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError, first_line
from oneshot.reading import read_object
from oneshot.settings import ModelSettings

if TYPE_CHECKING:
    import torch

_SMALL = 4_000_000  # weights; below, waking a second thread costs more than it gains
SDPA, EAGER = "sdpa", "eager"  # as transformers names them
_SHORT = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from, checked before anything is loaded.

    Attributes:
        checkpoint: folder of the full checkpoint (of an adapter: its base)
        adapter: folder of the PEFT adapter on it, if the user gave one
        tokenizer: folder that holds the tokenizer
        name: Hub id or absolute folder of the checkpoint (what a patch states as its base)
        dtype: of weights in memory and of compute (of 4-bit weights: what they are computed in)
        written: dtype of the patch and of checkpoints of trained weights; the checkpoint's own, or the settings'
        four_bit: whether linear weights are loaded in 4 bits
        commit: of the checkpoint, where that is a Hub id
        left_over: whether config.json says that weights are quantized which are not
        eager: whether attention is computed plainly, as the model's class has no sdpa
    """

    checkpoint: Path
    adapter: Path | None
    tokenizer: Path
    name: str
    dtype: torch.dtype
    written: torch.dtype
    four_bit: bool = False
    commit: str | None = None
    left_over: bool = False
    eager: bool = False


def find_source(settings: ModelSettings, runtime: Runtime) -> Source:
    """Find and check the model that the settings name; nothing is loaded yet, and no other rank is waited for.

    Where its dtype is left to us and the run's CPUs would only emulate it, the model is computed in fp32.

    Raises:
        UserError: a folder, config or shard is missing or cut off
    """
    import torch

    assert settings.path is not None
    given = resolve(settings.path, revision=settings.revision)
    adapter = given if is_adapter(given) else None
    name = settings.path
    if adapter is not None:
        name, checkpoint = base_of(adapter, settings.base, settings.base_revision)
    else:
        checkpoint = given
    config, tensors = read_object(checkpoint / CONFIG), list_tensors(checkpoint)
    left_over = is_left_over(config, tensors)
    packed = is_stored(config) and not left_over
    own = stored_dtype(config, tensors)
    chosen = own if settings.dtype == "auto" else settings.dtype
    slow = settings.dtype == "auto" and own in runtime.emulated
    dtype, written = torch.float32 if slow else getattr(torch, chosen), getattr(torch, chosen)
    base = str(checkpoint.resolve()) if local_folder(name) else name  # a Hub id stays one
    four_bit = packed or settings.quantize == "nf4"
    tokenizer = (own_tokenizer(adapter) if adapter is not None else None) or checkpoint
    commit = None if local_folder(name) else checkpoint.name if checkpoint.parent.name == "snapshots" else None
    eager = settings.attention != EAGER and _attention(settings.attention, runtime, dtype, config) == EAGER
    return Source(checkpoint, adapter, tokenizer, base, dtype, written, four_bit, commit, left_over, eager)


def what_to_say(source: Source) -> list[str]:
    """Return what people should know of how a model is read: computed in another dtype, or not as its config says."""
    said = []
    name = str(source.written).removeprefix("torch.")
    if source.dtype != source.written:
        said.append(
            f"Computing in fp32: this CPU has no {_SHORT[name]} instructions (--model.dtype {name} computes in "
            f"{_SHORT[name]} all the same)."
        )
    if source.left_over:
        said.append(
            f"{source.checkpoint / CONFIG} says that the weights are quantized ({QUANTIZATION}), but they are stored "
            "in full: read as they are, and what is written does not say so."
        )
    if source.eager:
        said.append("Attention is computed plainly (eager), as transformers has no sdpa for this architecture.")
    return said


def load_tokenizer(source: Source, settings: ModelSettings) -> Tokenizer:
    """Load the tokenizer; it must have a chat template.

    Raises:
        UserError: no tokenizer, or none that knows a chat template
    """
    from oneshot.data.templates import require_chat_template

    tokenizer = read_tokenizer(source.tokenizer, trust_remote_code=settings.trust_remote_code)
    require_chat_template(tokenizer)
    return tokenizer


@phase("read")
def load_model(runtime: Runtime, source: Source, settings: ModelSettings, dtype: torch.dtype | None = None) -> Any:
    """Load the checkpoint (without its adapter) as a causal language model, with dropout off.

    Under ZeRO-3 the weights come partitioned over ranks, otherwise every rank holds them whole; unless the settings or
    the architecture ask for transformers' own way, each byte is read by one rank only. Linear weights are quantized to
    NF4 as they are read, if the settings say so.

    Args:
        dtype: of the weights; none takes the source's

    Raises:
        UserError: transformers cannot load it, or a byte is not what the checkpoint's manifest says
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = dtype or source.dtype
    fields = read_object(source.checkpoint / CONFIG)
    attention = _attention(settings.attention, runtime, source.dtype, fields)
    settings = dataclasses.replace(settings, attention=attention)
    try:
        if not settings.stock_io or runtime.sharding == "zero3" or source.four_bit:
            model, config = _read_by_range(runtime, source, settings, dtype)
        else:
            model, config = None, read_config(source.checkpoint, trust_remote_code=settings.trust_remote_code)
        if model is None:
            model = _load_stock(runtime, source, settings, dtype, config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, UserError)):
            raise
        raise UserError(f"The model in {source.checkpoint} cannot be loaded: {first_line(error)}.") from error
    if runtime.is_main and counting():
        count(read=stored_bytes(source.checkpoint))
    count_passes(model)
    if runtime.device.type == "cpu" and parameters_of(model) < _SMALL:
        torch.set_num_threads(1)
    model.eval()
    fetch_as_one(runtime, mixtures(model))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # or transformers would not checkpoint it; what is below it has its own flag
    return model


def _load_stock(runtime: Runtime, source: Source, settings: ModelSettings, dtype: torch.dtype, config: Any) -> Any:
    if not settings.stock_io:
        check_share(runtime, source.checkpoint)
    with partitioned_loading(runtime, dtype):
        loaded: Any = auto_class(config).from_pretrained(
            source.checkpoint,
            config=config,
            dtype=dtype,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below; under ZeRO-3 _read_partitions() has looked at them
        )
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{source.checkpoint} holds {name} of shape {list(found)} where config.json makes it {list(wanted)}: "
            "config and shards are not of one checkpoint, copy it again."
        )
    if info["missing_keys"]:  # transformers fills them with random numbers and says so in a warning
        names = sorted(info["missing_keys"])
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise UserError(f"{source.checkpoint} lacks {names[0]}{more}: copy or download the checkpoint again.")
    if model._tied_weights_keys and not model.all_tied_weights_keys:
        keep_apart(model.config)
    return model


def _read_by_range(runtime: Runtime, source: Source, settings: ModelSettings, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model with weights read from the files by range, or none where its tensors are no ranges of them; its config.

    Raises:
        UserError: such a model is to be in 4 bits, or is in 8 bits and to be partitioned
    """
    tensors = list_tensors(source.checkpoint)
    # before the skeleton, whose weights are allocated for a moment: partitions in the holes could not be given back
    give_back_freed_memory(runtime, sum(math.prod(entry.shape) for entry in tensors.values()))
    model = skeleton(source.checkpoint, tensors, dtype, settings.attention, settings.trust_remote_code)
    stored = described(source.checkpoint, tensors, model)
    reason = why_not(model, stored)
    if runtime.sharding == "zero3":
        refuse_eight_bit(model.config)
    if reason is not None and source.four_bit:
        raise UserError(f"{source.checkpoint} cannot be read in 4 bits, as {reason}: leave model.quantize out.")
    if settings.stock_io:
        return None, model.config
    if reason is None:
        four_bit = make_four_bit(model, tensors, dtype, double=settings.double_quant) if source.four_bit else None
        if runtime.is_main and (said := what_stays(four_bit)):
            print(said, flush=True)
        fill = fill_partitions if runtime.sharding == "zero3" else fill_whole
        fill(runtime, model, stored, dtype, four_bit)
        made_as_read(model, stored)
        return model, model.config
    if runtime.is_main and runtime.world_size > 1:  # which then costs memory and time
        print(f"Loading the stock way: {reason}.", flush=True)
    return None, model.config


def _attention(name: str, runtime: Runtime, dtype: torch.dtype, fields: dict[str, Any]) -> str:
    """auto: flash attention where it can run (a GPU, its package, 16-bit compute), else sdpa; eager in its place where
    the class in config.json (``fields``) has none."""
    from transformers.utils import is_flash_attn_2_available

    if name == "auto":
        usable = runtime.device.type == "cuda" and dtype.itemsize == 2 and is_flash_attn_2_available()
        name = "flash_attention_2" if usable else SDPA
    return EAGER if name == SDPA and refuses_sdpa(fields) else name
