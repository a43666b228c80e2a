"""What ranks do in the checkpoint tests, and the models that they do it with."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
import unittest.mock
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported once, where ranks are forked from)
import deepspeed  # noqa: F401
import torch
import transformers
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from oneshot.checkpoint.disk.files import list_tensors, read_tensor
from oneshot.checkpoint.layout import partition, rank_bytes
from oneshot.checkpoint.loading import load, partitioned
from oneshot.checkpoint.loading.load import find_source, load_model, load_tokenizer
from oneshot.checkpoint.writing import write
from oneshot.checkpoint.writing.save import save_checkpoint
from oneshot.checkpoint.writing.state import States
from oneshot.distributed import instructions
from oneshot.distributed.engine import frozen, gathered, start_training
from oneshot.distributed.optimizer_state import allocate, held_state
from oneshot.distributed.persistent import is_shared
from oneshot.distributed.runtime import Runtime, barrier, emulated_anywhere
from oneshot.errors import UserError
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

for _family in ("Llama", "Mistral", "Qwen2", "Gemma3"):  # imported when they are first asked for, here before the fork
    getattr(transformers, f"{_family}ForCausalLM")
# no size is a multiple of 2, 3 and 4 at once; sqrt(hidden) is no bf16 number, which Gemma's embeddings are scaled by
ODD = {
    "vocab_size": 101, "hidden_size": 38, "intermediate_size": 51, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 18, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EVEN = {"hidden_size": 40, "intermediate_size": 24, "moe_intermediate_size": 8}  # as grouped products want it
FAMILIES = {
    "llama": ("Llama", {}, "float32"),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, "bfloat16"),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 97}, "float16"),
    "mistral": ("Mistral", {"sliding_window": 4}, "bfloat16"),
    "qwen2": ("Qwen2", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3}, "float32"),
    "qwen2-tied": ("Qwen2", {"hidden_size": 36, "tie_word_embeddings": True}, "bfloat16"),
    "gemma3": ("Gemma3Text", {"sliding_window": 4}, "bfloat16"),
    "gemma3-untied": ("Gemma3Text", {"sliding_window": 4, "tie_word_embeddings": False}, "float32"),
    "mixtral": ("Mixtral", {**EVEN, "num_local_experts": 5, "num_experts_per_tok": 2}, "float32"),
    "qwen3-moe": ("Qwen3Moe", {**EVEN, "num_experts": 6, "num_experts_per_tok": 2}, "bfloat16"),
}
CONVERTED = {"llama": "bfloat16", "gemma3": "float32", "mistral": "float16"}  # read in another dtype than stored


def make(name: str, family: str, options: dict[str, Any], dtype: str, folder: Path, **more: Any) -> None:
    """Write a random model, biases and norms random too, with a tokenizer, by transformers, in several shards."""
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, f"{family}Config")(**{**ODD, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **{"max_shard_size": "20KB", **more})
    build_tokenizer().save_pretrained(folder)


def load_from(runtime: Runtime, folder: str, **settings: Any) -> Any:
    chosen = ModelSettings(path=folder, **settings)
    return load_model(runtime, find_source(chosen, runtime), chosen)


def tokens() -> torch.Tensor:
    return torch.arange(2, 24).view(2, 11)


def logits(runtime: Runtime, model: Any) -> torch.Tensor:
    with frozen(runtime, model) as whole, torch.no_grad():
        return whole(input_ids=tokens(), use_cache=False).logits.clone()


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the other path was taken")


def same_partitions(runtime: Runtime, ours: Any, theirs: Any) -> int:
    """The number of bytes that were compared; every partition of this rank is transformers' own, but its padding."""
    compared, own, stock = 0, dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(own) == list(stock)
    for name, parameter in own.items():
        other = stock[name]
        assert parameter.ds_shape == other.ds_shape, name
        assert parameter.ds_tensor.dtype == other.ds_tensor.dtype, name
        assert parameter.ds_tensor.shape == other.ds_tensor.shape, name
        assert parameter.ds_persist == other.ds_persist, name
        filled = partition(tuple(parameter.ds_shape), runtime.rank, runtime.world_size).numel
        for one, two in ((parameter.ds_tensor, other.ds_tensor),):
            assert torch.equal(one[:filled].view(torch.uint8), two[:filled].view(torch.uint8)), name
        compared += parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()
    shapes = {name: tuple(p.ds_shape) for name, p in own.items()}
    item = next(iter(own.values())).ds_tensor.element_size()
    assert compared == rank_bytes(shapes, item, runtime.rank, runtime.world_size)
    for (name, one), (other_name, two) in zip(ours.named_buffers(), theirs.named_buffers()):
        assert (name, one.dtype) == (other_name, two.dtype)
        assert torch.equal(one.cpu(), two.cpu()), name
    return compared


def read_replicated(runtime: Runtime, source: str, broken: int | None = None) -> dict[str, Any]:
    """Load a model of which every rank holds the whole.

    Args:
        broken: a rank whose reads fail

    Returns:
        bytes that this rank read of the shards; whether its weights are transformers' own; the error, if there was one
    """
    read, real = [0], os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if runtime.rank == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        got = real(descriptor, views, offset)
        read[0] += got
        return got

    with unittest.mock.patch.object(os, "preadv", preadv):
        try:
            with unittest.mock.patch.object(load, "_load_stock", never):
                ours = load_from(runtime, source)
        except UserError as error:
            return {"error": str(error)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=ours.dtype)
    own, other = ours.state_dict(), theirs.state_dict()
    same = list(own) == list(other) and all(
        own[name].dtype == tensor.dtype and torch.equal(own[name], tensor) for name, tensor in other.items()
    )
    return {"bytes": read[0], "same": same}


def compare(runtime: Runtime, sources: str, target: str) -> dict[str, Any]:
    """Load every family by ranges and by transformers, compare, and write it by ranges and gathered."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for name in FAMILIES:
        folder = f"{sources}/{name}"
        with unittest.mock.patch.object(load, "_load_stock", never):
            ours = load_from(runtime, folder, dtype=FAMILIES[name][2])
        with unittest.mock.patch.object(load, "fill_partitions", never):
            theirs = load_from(runtime, folder, dtype=FAMILIES[name][2], stock_io=True)
        nbytes = same_partitions(runtime, ours, theirs)
        for kind, model, stock in (("ranges", ours, False), ("gathered", theirs, True)):
            out, dtype = Path(target, kind, name), getattr(torch, FAMILIES[name][2])
            save_checkpoint(runtime, model, build_tokenizer(), out, dtype, stock=stock)
        found[name] = {"bytes": nbytes}
        if FAMILIES[name][2] == "float16":  # DeepSpeed computes in fp16 on GPUs only
            continue
        one, two = logits(runtime, ours), logits(runtime, theirs)
        wanted = torch.load(f"{sources}/{name}.logits", weights_only=True)
        found[name] |= {"logits": torch.equal(one, two), "off": float((one - wanted).abs().max())}
        if name in CONVERTED:
            ours, theirs = (load_from(runtime, folder, dtype=CONVERTED[name], stock_io=s) for s in (False, True))
            assert next(ours.parameters()).ds_tensor.dtype == getattr(torch, CONVERTED[name])
            found[name]["converted"] = same_partitions(runtime, ours, theirs)
    return found


def wide(runtime: Runtime, sources: str, target: str, names: list[str]) -> dict[str, Any]:
    """Load 16-bit checkpoints where the last rank's CPU has no instructions for them; compare, and write them again."""
    lacking = frozenset({"bfloat16", "float16"} if runtime.rank == runtime.world_size - 1 else ())
    with unittest.mock.patch.object(instructions, "emulated", return_value=lacking):
        runtime = dataclasses.replace(runtime, emulated=emulated_anywhere(runtime))
    found = {}
    for name in names:
        folder = Path(sources, name)
        ours, theirs = (load_from(runtime, str(folder), stock_io=stock) for stock in (False, True))
        found[name] = {"bytes": same_partitions(runtime, ours, theirs)}
        stored = list_tensors(folder)
        for path, parameter in ours.named_parameters():
            own = partition(tuple(parameter.ds_shape), runtime.rank, runtime.world_size)
            wanted = read_tensor(stored[path], path).flatten()[own.start : own.stop].float()
            assert torch.equal(parameter.ds_tensor[: own.numel], wanted), path
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            one = whole(input_ids=tokens(), use_cache=False).logits
        found[name]["off"] = float((logits(runtime, ours) - one).abs().max())
        written = find_source(ModelSettings(path=str(folder)), runtime).written
        save_checkpoint(runtime, ours, build_tokenizer(), Path(target, name), written)
    return found


def kept_once(runtime: Runtime, sources: str, target: str, names: list[str]) -> dict[str, list[bool]]:
    """What holds of frozen models whose weights stay gathered: see the test."""
    found = {}
    for name in names:
        folder = Path(sources, name)
        model = load_from(runtime, str(folder), dtype=FAMILIES[name][2])
        parameters = dict(model.named_parameters())
        before = {path: p.ds_tensor.clone() for path, p in parameters.items()}
        with frozen(runtime, model) as whole, torch.no_grad():
            first, second, third = (whole(input_ids=tokens(), use_cache=False).logits.clone() for _ in range(3))
            shared = [is_shared(p) for p in parameters.values()]
            stored = list_tensors(folder)
            right = [torch.equal(p.data, read_tensor(stored[path], path)) for path, p in parameters.items()]
            with gathered(runtime, list(parameters.values())):  # parts them when it ends
                pass
            fourth = whole(input_ids=tokens(), use_cache=False).logits
        share = [p.ds_tensor.untyped_storage().nbytes() == p.ds_tensor.nbytes for p in parameters.values()]
        own = {
            path: partition(tuple(p.ds_shape), runtime.rank, runtime.world_size).numel for path, p in parameters.items()
        }
        same = [torch.equal(before[path][: own[path]], p.ds_tensor[: own[path]]) for path, p in parameters.items()]
        logits_same = [torch.equal(first, other) for other in (second, third, fourth)]
        save_checkpoint(runtime, model, build_tokenizer(), Path(target, name), getattr(torch, FAMILIES[name][2]))
        found[name] = [sum(shared) == len(shared), all(right), all(share), all(same), all(logits_same)]
    return found


def roundtrip(runtime: Runtime, source: str, target: str, stock_io: bool = False) -> str:
    """Load and save; returns the class of the model."""
    model = load_from(runtime, source, stock_io=stock_io)
    dtype = find_source(ModelSettings(path=source), runtime).written
    save_checkpoint(runtime, model, build_tokenizer(), Path(target), dtype, stock=stock_io)
    return type(model).__name__


def trained(runtime: Runtime, source: str, target: str) -> dict[str, Any]:
    """Train all weights for two steps, on other tokens on every rank; save by ranges, and gathered by transformers."""
    model = load_from(runtime, source, dtype="float32")
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=2
    )
    engine.set_learning_rate(0.01)
    for _ in range(2):
        rows = tokens() + 20 * runtime.rank
        loss = engine.forward(input_ids=rows, labels=rows, use_cache=False).loss
        engine.backward(loss, last=True)
        engine.step()
    for kind, stock in (("ranges", False), ("gathered", True)):
        save_checkpoint(runtime, engine.model, build_tokenizer(), Path(target, kind), torch.float32, stock=stock)
    return {"loss": float(loss)}


def turned(runtime: Runtime, source: str, target: str, times: int) -> str:
    """``roundtrip`` of Llamas that store one matrix transposed; so often in a row, if an odd number."""
    operations = [Transpose(0, 1) for _ in range(times)]
    transpose = WeightConverter("mlp.down_turned.weight", "mlp.down_proj.weight", operations)
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [transpose], overwrite=True)
    return roundtrip(runtime, source, target)


def write_pieces(runtime: Runtime, sources: str, target: str, names: list[str], nbytes: int) -> None:
    """Write checkpoints again with checksums of pieces of ``nbytes`` at most."""
    with unittest.mock.patch.object(write, "CHUNK", nbytes):
        for name in names:
            roundtrip(runtime, f"{sources}/{name}", f"{target}/{name}")


def buffered(runtime: Runtime, source: str, target: str) -> list[float]:
    """The values of a persistent buffer after a load by ranges, which is saved again."""
    real = partitioned.skeleton

    def with_buffer(*arguments: Any) -> Any:
        model = real(*arguments)
        model.model.register_buffer("scale", torch.zeros(3))
        return model

    with unittest.mock.patch.object(load, "skeleton", with_buffer):
        model = load_from(runtime, source)
    save_checkpoint(runtime, model, build_tokenizer(), Path(target), torch.float32)
    return model.model.scale.tolist()


def failing_loads(runtime: Runtime, folders: list[str]) -> dict[str, str]:
    """The error of each load, by the folder's name, on this rank; after each one all ranks are still together."""
    found = {}
    for folder in folders:
        name, torn = Path(folder).name, unittest.mock.patch.object(partitioned, "checked", _cut_after(runtime))
        try:
            if name.startswith("cut-between"):
                with torn:
                    load_from(runtime, folder)
            else:
                load_from(runtime, folder, stock_io=name.endswith("-stock"))
            found[name] = ""
        except UserError as error:
            found[name] = str(error)
        barrier(runtime)
    return found


def _cut_after(runtime: Runtime) -> Any:
    """The last look at the checkpoint before it is read, after which its last tensor loses its last bytes: only the
    last rank will miss them."""
    real = partitioned.checked

    def check_and_cut(stored: Any) -> Any:
        found = real(stored)
        barrier(runtime)
        if runtime.is_main:
            shard = max(entry.shard for entry in found.tensors.values())
            os.truncate(shard, shard.stat().st_size - 2)
        barrier(runtime)
        return found

    return check_and_cut


def failing_saves(runtime: Runtime, source: str, targets: list[list[Any]]) -> dict[str, str]:
    """The error of each save, by the target, on this rank."""
    model, found = load_from(runtime, source), {}
    for target, stock in targets:
        try:
            save_checkpoint(runtime, model, build_tokenizer(), Path(target), torch.float32, stock=stock)
            found[f"{target} {stock}"] = ""
        except UserError as error:
            found[f"{target} {stock}"] = str(error)
        barrier(runtime)
    return found


def _say_saved(folder: str, step: int) -> None:
    """Add a line: rewriting the file would leave it empty for a moment, and that moment can be the kill's."""
    with Path(f"{folder}.step").open("a") as said:
        said.write(f"{step}\n")


def counting(runtime: Runtime, folder: str, source: str) -> None:
    """Save again and again, all weights equal to the number of the save, until somebody kills us."""
    if runtime.sharding == "zero3":
        model = load_from(runtime, source)
    else:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(source))
    tokenizer = load_tokenizer(find_source(ModelSettings(path=source), runtime), ModelSettings())
    for step in range(1, 100_000):
        with torch.no_grad():
            for parameter in model.parameters():
                getattr(parameter, "ds_tensor", parameter.data).fill_(step)
        save_checkpoint(runtime, model, tokenizer, Path(folder), torch.float32)
        if runtime.is_main:
            _say_saved(folder, step)


def counting_states(runtime: Runtime, folder: str, source: str) -> None:
    """Save training states, all numbers equal to the step, on a disk that takes its time, until somebody kills us."""
    model = load_from(runtime, source)
    model.requires_grad_(True)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    allocate(engine)
    states, real = States(runtime, Path(folder), keep=1), os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.01)
        real(descriptor)

    with unittest.mock.patch.object(os, "fsync", slow):
        for step in range(1, 100_000):
            for piece in held_state(engine):
                piece.values.fill_(step)
            states.save(engine, step)
            if runtime.is_main:
                _say_saved(folder, step)
