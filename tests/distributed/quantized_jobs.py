"""What ranks do in the 4-bit tests, and the models that they do it with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (imported once, where ranks are forked from)
import deepspeed  # noqa: F401
import torch
import transformers

from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.distributed.engine import frozen, gathered
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

# rows of 52 and 130 weights, so that ranks and tensors end within a block of 64
SHAPES = {
    "vocab_size": 100, "hidden_size": 52, "intermediate_size": 130, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 26, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    # 26 x 51 weights fill no whole number of elements, of four packed weights each: these layers stay as they are
    "llama-uneven": ("Llama", {"intermediate_size": 51, "hidden_size": 26, "head_dim": 12, "vocab_size": 97}),
}
CASES = [
    (family, dtype, double) for family in FAMILIES for dtype in ("bfloat16", "float16") for double in (False, True)
]
CASES += [("llama", "float32", True)]


def make(family: str, dtype: str, folder: Path) -> None:
    """Write a random model, biases too, in several shards."""
    name, options = FAMILIES[family]
    torch.manual_seed(sum(family.encode()))
    config = getattr(transformers, f"{name}Config")(**{**SHAPES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB")
    build_tokenizer().save_pretrained(folder)


def tokens() -> torch.Tensor:
    return torch.arange(3, 25).view(2, 11)


def stock(
    folder: Path, double: bool, storage: str = "uint8", skip: list[str] | None = None, dtype: str | None = None
) -> Any:
    """The model as transformers and bitsandbytes load it, on one process; it computes as on a CPU without AVX512."""
    dtype = getattr(torch, dtype) if dtype else transformers.AutoConfig.from_pretrained(folder).dtype
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, storage),
        llm_int8_skip_modules=skip,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def digests(module: Any) -> dict[str, Any]:
    """Everything of a 4-bit layer: packed bytes, scales, and the second level of double quantization."""
    state = module.weight.quant_state
    found = {"packed": module.weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        found |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    sums: dict[str, Any] = {key: digest(value) for key, value in found.items()}
    return {**sums, "shape": list(state.shape), "dtype": str(state.dtype), "blocks": [state.blocksize, state.nested]}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def load(runtime: Runtime, folder: Path, **settings: Any) -> Any:
    chosen = ModelSettings(path=str(folder), **settings)
    return load_model(runtime, find_source(chosen, runtime), chosen)


def describe(runtime: Runtime, folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case: digests of every 4-bit layer gathered whole, of the logits, and bytes held of packed weights.

    No rank's CPU is taken to have bf16 instructions: cases that name no dtype are computed in fp32, on any machine.
    """
    runtime, found = dataclasses.replace(runtime, emulated=frozenset({"bfloat16"})), {}
    for name, settings in cases:
        model = load(runtime, Path(folder) / name, **settings)
        layers = {path: m for path, m in model.named_modules() if hasattr(m, "quant_state")}
        held = [getattr(m.weight, "ds_tensor", m.weight).nbytes for m in layers.values()]
        sums = {}
        for path, module in layers.items():
            with gathered(runtime, [module.weight]):
                sums[path] = digests(module)
        found[name + json.dumps(settings)] = {"layers": sums, "held": held}
        if model.dtype != torch.float16:  # no DeepSpeed engine computes in it on a CPU
            with frozen(runtime, model) as whole:
                found[name + json.dumps(settings)] |= run(whole)
    return found


def experts(runtime: Runtime, folder: str, double: bool) -> dict[str, Any]:
    """Digests of packed experts gathered whole, of logits and an input's gradient; bytes that this rank holds of them.

    The ranks' prompts are different, so that experts are chosen on some of them only; the digests are of the same ones.
    """
    model = load(runtime, Path(folder), quantize="nf4", double_quant=double, attention="eager")
    packed = {name: p for name, p in model.named_parameters() if hasattr(p, "unpacked_shape")}
    found: dict[str, Any] = {"held": {n: getattr(p, "ds_tensor", p).nbytes for n, p in packed.items()}, "packed": {}}
    for name, parameter in packed.items():
        with gathered(runtime, [parameter]):
            found["packed"][name] = [digest(parameter.data), digest(parameter.quant_state.absmax)]
    with frozen(runtime, model) as whole:
        whole(input_ids=tokens()[:, : 3 + runtime.rank] + 40 * runtime.rank, use_cache=False)
        return found | run(whole)


def run(model: Any) -> dict[str, str]:
    """Digests of the logits, without and with gradients (another path of bitsandbytes), and of an input gradient."""
    with torch.no_grad():
        logits = model(input_ids=tokens(), use_cache=False).logits
    inputs = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    again = model(inputs_embeds=inputs, use_cache=False).logits
    again.float().square().mean().backward()
    assert inputs.grad is not None
    return {"logits": digest(logits), "again": digest(again), "gradient": digest(inputs.grad)}


def fail(runtime: Runtime, folder: str, **settings: Any) -> str:
    """The error that loading gives."""
    try:
        load(runtime, Path(folder), **settings)
    except UserError as error:
        return str(error)
    return "loaded"
