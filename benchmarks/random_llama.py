"""A Llama with random weights, for measurements that ask what a model takes and not what it says; directions alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# the name is the number of parameters; tiny is for trying a script out
SHAPES: dict[str, dict[str, int]] = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "0.45b": {"hidden_size": 1024, "intermediate_size": 3840, "num_hidden_layers": 24, "vocab_size": 32000},
    "0.1b": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000},
}


def random_llama(
    shape: dict[str, int], *, heads: int = 32, kv_heads: int = 4, dtype: str = "bfloat16", **config: Any
) -> Any:
    """Return a LlamaForCausalLM drawn with seed 0, its special tokens those of the toy world's tokenizer.

    Args:
        shape: one of SHAPES, or another with the same keys
        dtype: a name in torch, in which the weights are held
        config: further fields of LlamaConfig
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model: Any = LlamaForCausalLM(LlamaConfig(**{**shape, **heads_of, **special, **config}, dtype=dtype))
    return model.to(getattr(torch, dtype))


def write_random_llama(folder: Path, shape: dict[str, int], **options: Any) -> Any:
    """Write ``random_llama(shape, **options)`` in shards of 500 MB, with the toy world's tokenizer; returns it."""
    from oneshot.world.model import build_tokenizer

    model = random_llama(shape, **options)
    model.save_pretrained(folder, max_shard_size="500MB")
    build_tokenizer().save_pretrained(folder)
    return model


def computed_in(checkpoint: Path) -> str:
    """Return the name of the dtype that ``--model.dtype auto`` takes for a checkpoint on this machine."""
    from oneshot.checkpoint.loading.load import find_source
    from oneshot.distributed.runtime import start
    from oneshot.settings import ModelSettings

    return str(find_source(ModelSettings(path=str(checkpoint)), start()).dtype).removeprefix("torch.")


def random_directions(linears: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return random orthonormal directions of each layer, in place of a second model's.

    Args:
        linears: name -> layer of weight (m, n)
    """
    import torch

    from oneshot.patch.directions import Directions
    from oneshot.patch.linears import shape_of

    found = {}
    for name, module in linears.items():
        u, v = (torch.linalg.qr(torch.randn(size, rank))[0] for size in shape_of(module))
        found[name] = Directions(u, torch.linspace(0.1, 0.01, rank), v.T.contiguous(), 1.0)
    return found
