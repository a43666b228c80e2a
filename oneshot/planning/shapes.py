"""Every weight of a model, from its config.json: shapes and counts as transformers builds them, without building it.

Sources are the ``modeling_*.py`` files of transformers 5; each family below is compared with them, weight by weight, in
``tests/unit/test_plan.py``. A family that is not listed is read from the headers of its safetensors files.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from oneshot.checkpoint.files import TensorEntry
from oneshot.errors import UserError

Kind = Literal["linear", "head", "embedding", "expert", "other"]


@dataclass(frozen=True)
class Weight:
    """Weights of one shape.

    Attributes:
        kind: linear (a layer that a patch may change and NF4 quantizes), head, embedding, expert (fused experts, which
            neither a patch nor NF4 touches) or other (norms, biases, routers)
        shape: as the model holds it, (out, in) for a linear layer
        count: how many of them
    """

    kind: Kind
    shape: tuple[int, ...]
    count: int

    @property
    def numel(self) -> int:
        """Elements of one of them."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A model's weights, and what its activations depend on.

    Attributes:
        weights: grouped by kind and shape
        layers, hidden, heads, kv_heads, head_dim, vocabulary: as in its config
        ffn: inner width that one token sees; of a mixture of experts that of its chosen and shared experts together
        gated: whether the MLP is gate * up (3 matrices) or up (2)
        active: parameters of matrices that one token is multiplied with, output head included
        context: longest input in tokens, or none where the config names no limit
    """

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ffn: int
    gated: bool
    active: int
    context: int | None

    @property
    def parameters(self) -> int:
        return sum(weight.numel * weight.count for weight in self.weights)

    @property
    def largest(self) -> int:
        """Elements of the largest weight."""
        return max(weight.numel for weight in self.weights)

    def of(self, *kinds: Kind) -> int:
        """Elements of all weights of these kinds."""
        return sum(weight.numel * weight.count for weight in self.weights if weight.kind in kinds)

    def low_rank(self, rank: int) -> int:
        """Elements of rank-``rank`` factors of every linear layer that a patch may change."""
        targets = [weight for weight in self.weights if weight.kind == "linear"]
        return sum(min(rank, *weight.shape) * sum(weight.shape) * weight.count for weight in targets)


@dataclass(frozen=True)
class _Family:
    """How an architecture differs from a Llama.

    A bias is there always, never, or as the config's key of that name says; ``qk_norm`` is per head, or over the whole
    width of the projection. ``tied`` and ``head_dim`` are what holds where the config.json says nothing.
    """

    norms: int = 2
    norm_bias: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    key_default: bool = False  # of a bias named by key
    head_bias: bool = False
    gated: bool = True
    fused_qkv: bool = False
    fused_gate: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    tied: bool = False
    head_dim: int | None = None
    experts: str = ""  # the config's key


_OWN = _Family(qkv_bias="attention_bias", out_bias="attention_bias")
_LLAMA = replace(_OWN, mlp_bias="mlp_bias")
_GEMMA = replace(_OWN, tied=True, head_dim=256)
_FAMILIES = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": replace(_OWN, qk_norm="head", head_dim=128),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4),
    "gemma3_text": replace(_GEMMA, norms=4, qk_norm="head"),
    "olmo2": replace(_OWN, qk_norm="width"),
    "phi": _Family(1, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, gated=False),
    "phi3": _Family(fused_qkv=True, fused_gate=True),
    "gpt_neox": replace(_OWN, norm_bias=True, mlp_bias=True, key_default=True, gated=False, fused_qkv=True),
    "starcoder2": _Family(
        norm_bias=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", key_default=True, gated=False,
        tied=True,
    ),
    "mixtral": _Family(experts="num_local_experts"),
    "qwen2_moe": _Family(qkv_bias="qkv_bias", key_default=True, experts="num_experts"),
    "qwen3_moe": replace(_OWN, qk_norm="head", experts="num_experts"),
}  # fmt: skip


def shape_of(config: dict[str, Any], tensors: dict[str, TensorEntry] | None = None) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Args:
        config: its fields
        tensors: of the checkpoint's files, where they are there; they decide for a family that is not known

    Raises:
        UserError: an unknown family and no files, a field that is missing, or files with another number of parameters
    """
    text = config.get("text_config") if "hidden_size" not in config else None
    fields = text if isinstance(text, dict) else config
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None and tensors is None:
        raise UserError(
            f"Model type {config.get('model_type')!r} is not known from its config.json alone: give --model.path a "
            f"folder with its safetensors files, or a model of type {', '.join(_FAMILIES)}."
        )
    try:
        if family is None:
            assert tensors is not None
            return _from_tensors(fields, tensors)
        found = _from_config(fields, family)
    except KeyError as error:
        raise UserError(f"The config.json of the model lacks {error.args[0]}: restore it from its source.") from error
    if tensors is not None and not config.get("quantization_config"):
        # a tied head may be stored all the same, and some files hold buffers
        stored = sum(math.prod(e.shape) for name, e in tensors.items() if "rotary_emb" not in name)
        if stored not in (found.parameters, found.parameters + found.vocabulary * found.hidden):
            raise UserError(
                f"The config.json describes {found.parameters:,} parameters, the safetensors files hold {stored:,}: "
                "they are not of one checkpoint, copy it again."
            )
    return found


def _from_config(config: dict[str, Any], family: _Family) -> ModelShape:
    h, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or family.head_dim or h // heads
    found: Counter[tuple[Kind, tuple[int, ...]]] = Counter()

    def says(bias: bool | str) -> bool:
        value = config.get(bias, family.key_default) if isinstance(bias, str) else bias
        return bool(value)

    def add(kind: Kind, shape: tuple[int, ...], count: int = 1) -> None:
        found[kind, shape] += count

    def linear(out: int, inner: int, bias: bool, count: int = 1) -> None:
        add("linear", (out, inner), count)
        if bias:
            add("other", (out,), count)

    def norm(width: int, count: int) -> None:
        add("other", (width,), count * (2 if family.norm_bias else 1))

    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    query, key = heads * dim, kv * dim
    for out in [query + 2 * key] if family.fused_qkv else [query, key, key]:
        linear(out, h, says(family.qkv_bias), layers)
    linear(h, query, says(family.out_bias), layers)
    if family.qk_norm:
        whole = family.qk_norm == "width"
        add("other", (query if whole else dim,), layers)
        add("other", (key if whole else dim,), layers)
    norm(h, layers * family.norms + 1)
    sparse = _sparse_layers(config, layers) if family.experts else 0
    inner = _mlp(config, family, says(family.mlp_bias), layers - sparse, linear)
    chosen = 0
    if sparse:
        inner, chosen = _experts(config, family, sparse, add, linear)
    add("embedding", (vocabulary, h))
    if not config.get("tie_word_embeddings", family.tied):
        add("head", (vocabulary, h))
    if family.head_bias:
        add("other", (vocabulary,))
    weights = tuple(Weight(kind, shape, count) for (kind, shape), count in found.items())
    matrices = sum(w.numel * w.count for w in weights if w.kind == "linear") + vocabulary * h + chosen
    return ModelShape(
        weights, layers, h, heads, kv, dim, vocabulary, inner, family.gated, matrices,
        config.get("max_position_embeddings"),
    )  # fmt: skip


def _mlp(config: dict[str, Any], family: _Family, bias: bool, layers: int, linear: Any) -> int:
    """Add the dense MLPs; returns their inner width."""
    h, inner = config["hidden_size"], config["intermediate_size"]
    if layers:
        linear(2 * inner if family.fused_gate else inner, h, bias, layers)
        if family.gated and not family.fused_gate:
            linear(inner, h, bias, layers)
        linear(h, inner, bias, layers)
    return inner


def _sparse_layers(config: dict[str, Any], layers: int) -> int:
    """How many blocks are mixtures of experts (qwen's MoEs may leave some dense)."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _experts(config: dict[str, Any], family: _Family, layers: int, add: Any, linear: Any) -> tuple[int, int]:
    """Add experts, routers and shared experts of ``layers`` blocks.

    Returns:
        inner width that one token sees, and elements of the experts that it is sent to
    """
    h, count = config["hidden_size"], config.get(family.experts) or config["num_local_experts"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    chosen = config.get("num_experts_per_tok") or 2
    add("expert", (count, 2 * inner, h), layers)
    add("expert", (count, h, inner), layers)
    add("other", (count, h), layers)
    shared = config.get("shared_expert_intermediate_size") or 0
    if shared:
        for shape in ((shared, h), (shared, h), (h, shared), (1, h)):
            linear(*shape, False, layers)
    return chosen * inner + shared, layers * chosen * 3 * inner * h


def _from_tensors(config: dict[str, Any], tensors: dict[str, TensorEntry]) -> ModelShape:
    """The shape of an unknown family, by the names and shapes of its stored tensors."""
    found: Counter[tuple[Kind, tuple[int, ...]]] = Counter()
    for name, entry in tensors.items():
        found[_kind_of(name, entry.shape), entry.shape] += 1
    weights = tuple(Weight(kind, shape, count) for (kind, shape), count in found.items())
    h = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * h
    vocabulary = config["vocab_size"]
    matrices = sum(w.numel * w.count for w in weights if w.kind in ("linear", "expert")) + vocabulary * h
    dim = config.get("head_dim") or h // heads
    kv = config.get("num_key_value_heads") or heads
    context = config.get("max_position_embeddings")
    return ModelShape(weights, layers, h, heads, kv, dim, vocabulary, inner, True, matrices, context)


def _kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    if len(shape) < 2:
        return "other"
    if ".experts." in name or len(shape) > 2:
        return "expert"
    if "lm_head" in name or "embed_out" in name:
        return "head"
    return "embedding" if any(part in name for part in ("embed", "wte", "wpe")) else "linear"
