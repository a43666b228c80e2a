"""A model's shape, asked of the model itself: transformers builds it on the meta device, where weights take no memory.

The class that is built is the one that loads a checkpoint: of a multimodal config it holds what a run holds. No name
of an architecture stands here.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier import APART, written_form
from oneshot.checkpoint.adapters.experts import fused_experts, is_one_expert, is_single
from oneshot.checkpoint.classes import auto_class, outside_language
from oneshot.errors import UserError, first_line
from oneshot.planning.shapes import Kind, ModelShape, Weight
from oneshot.versions import package_version

if TYPE_CHECKING:
    from torch import nn

# the names under which configs of transformers say how many experts a token is sent to, and out of how many
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts", "moe_topk", "moe_top_k",
    "moe_k",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class _Found:
    """A weight of the model.

    Attributes:
        module: name of the module that holds it
        owner: name of the module that holds it together with those that it works with, such as an MLP
        kind, shape: as in ``Weight``; of a transposed Conv1D (out, in), too
        multiplies: whether tokens are multiplied with it
        alone: as in ``Weight``
    """

    module: str
    owner: str
    kind: Kind
    shape: tuple[int, ...]
    multiplies: bool
    alone: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def shared(self) -> bool:
        """Whether every token passes through it, though it belongs to a mixture of experts."""
        return "shared" in self.module

    @property
    def routed(self) -> bool:
        """Whether a token meets a share of it, or it is one of several that a token may meet."""
        return self.kind in ("expert", "fused") and not self.shared


def built_shape(config: Mapping[str, Any], remote: Path | None = None) -> ModelShape:
    """Return the shape of the model that transformers builds from a config. Takes no memory, and no random numbers.

    Args:
        config: the fields of its config.json
        remote: the folder of a model that brings its own code, which is run; none: the model is transformers' own

    Raises:
        UserError: transformers cannot build a causal language model from it
    """
    import torch

    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            model = _built(config, remote)
            apart = bool(fused_experts(model)) and written_form(model) == APART
            return replace(_shape(model), apart=apart)
        except UserError:
            raise
        except Exception as error:  # what is wrong in a config shows as an error of any kind, in the model's own code
            reason = first_line(error).rstrip(" .:")
            raise UserError(
                f"transformers {package_version('transformers')} builds no causal language model from this config.json "
                f"of type {config.get('model_type')!r} ({reason}): correct it, or install what it asks for."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling of kernels and settings that no shape depends on."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)


def _built(config: Mapping[str, Any], remote: Path | None) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = config.get("model_type")
    if remote is not None:
        made = AutoConfig.from_pretrained(remote, trust_remote_code=True)
    elif kind in CONFIG_MAPPING:
        with tempfile.TemporaryDirectory() as folder:  # from a file, as a checkpoint's is read: not all is plain JSON
            Path(folder, "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
            made = AutoConfig.from_pretrained(folder)
    else:
        own_code = (
            ", or run the code that it brings with --model.trust_remote_code true" if "auto_map" in config else ""
        )
        raise UserError(
            f"Model type {kind!r} is not known to transformers {package_version('transformers')}, which is installed "
            f"here: correct the config.json, or install a version that knows it{own_code}."
        )
    with torch.device("meta"):
        model = auto_class(made).from_config(
            made, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=remote is not None
        )
    model.tie_weights()
    return model


def _shape(model: Any) -> ModelShape:
    config = model.config.get_text_config(decoder=True)
    found = list(_weights(model))
    counted = Counter((weight.kind, weight.shape, weight.alone) for weight in found)
    embedding = next(weight.shape for weight in found if weight.kind == "embedding")
    hidden = _number(config, "hidden_size", "d_model") or embedding[1]
    vocabulary = _number(config, "vocab_size") or embedding[0]
    heads = _number(config, "num_attention_heads", "num_heads") or 1
    routed = [weight for weight in found if weight.routed]
    _check_mixture(config, routed=bool(routed))
    mixture = _Mixture.of(config)
    inner = _number(config, "intermediate_size") or 0
    dense = _dense_width(found, hidden, inner)
    return ModelShape(
        weights=tuple(Weight(kind, shape, count, alone) for (kind, shape, alone), count in counted.items()),
        layers=_number(config, "num_hidden_layers") or 1,
        hidden=hidden,
        heads=heads,
        head_dim=max(_number(config, name) or 0 for name in _HEAD_DIMS) or hidden // heads,
        vocabulary=vocabulary,
        ffn=_sparse_width(found, mixture, hidden, inner) if routed else dense,
        gated=_gated(routed or found, hidden, dense),
        active=vocabulary * hidden + sum(mixture.met(weight) for weight in found if weight.multiplies),
        chosen=mixture.chosen if routed else 0,
    )


def _weights(model: Any) -> Iterator[_Found]:
    """Every parameter once, however often it is tied."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, seen, outside = model.get_output_embeddings(), set(), tuple(outside_language(model))
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = tuple(parameter.shape)
            kind: Kind = "other"
            if f"{name}.".startswith(outside):
                kind = "tower"
            elif own == "weight" and isinstance(module, nn.Embedding):
                kind = "embedding"
            elif own == "weight" and isinstance(module, nn.Linear):
                kind = "head" if module is head else "expert" if is_one_expert(f"{name}.") else "linear"
            elif len(shape) > 1 and not own.endswith("bias") and _holds_experts(name, module):
                kind = "fused"
            transposed = own == "weight" and isinstance(module, Conv1D)
            owner = name.rpartition(".")[0] if own == "weight" else name
            multiplies = transposed or kind in ("linear", "expert", "fused")
            alone = kind == "fused" and is_single(module)
            yield _Found(name, owner, kind, shape[::-1] if transposed else shape, multiplies, alone)


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module's matrices are those of experts; a convolution's or a router's beside them are not."""
    own_name = name.rpartition(".")[2]
    return own_name in ("experts", "shared_experts") or "Expert" in type(module).__name__


@dataclass(frozen=True)
class _Mixture:
    """How many experts a token is sent to, out of how many; 0 where the config does not say."""

    chosen: int
    experts: int

    @classmethod
    def of(cls, config: Any) -> _Mixture:
        parts = [config, getattr(config, "ffn_config", None)]
        chosen, experts = (
            next(filter(None, (_number(part, *names) for part in parts)), 0) for names in (CHOSEN, EXPERTS)
        )
        return cls(chosen, experts)

    def in_one(self, weight: _Found) -> int:
        """How many experts a weight holds."""
        return 1 if weight.kind == "expert" else weight.shape[0] if len(weight.shape) > 2 else max(self.experts, 1)

    def met(self, weight: _Found) -> int:
        """Elements of a weight that one token is multiplied with, on average over the weights of its kind."""
        among = self.experts if weight.kind == "expert" else self.in_one(weight)
        if not weight.routed or not 0 < self.chosen < among:
            return weight.numel
        return weight.numel * self.chosen // among


def _check_mixture(config: Any, *, routed: bool) -> None:
    """Raise UserError unless a mixture sends a token to some of its experts, and to no more than there are."""
    fields = config.to_dict()
    for part in (fields, fields.get("ffn_config")):
        known = {n: part[n] for n in (*EXPERTS, *CHOSEN) if isinstance(part, dict) and type(part.get(n)) is int}
        experts = next((known[name] for name in EXPERTS if name in known), None)
        for name, count in known.items():
            many = routed and name in CHOSEN and experts is not None and count > experts
            if many or count < routed:
                what = "sends a token to" if name in CHOSEN else "is of"
                of = f" of {experts}" if name in CHOSEN and experts is not None else ""
                raise UserError(f"The config.json has a mixture that {what} {count}{of} experts: correct it.")


_HEAD_DIMS = ("head_dim", "qk_head_dim", "v_head_dim")


def _sparse_width(found: list[_Found], mixture: _Mixture, hidden: int, inner: int) -> int:
    """Inner width that a token sees in a block with experts: chosen and shared ones, and an MLP beside them."""
    routed = [weight for weight in found if weight.routed]
    one = min(weight.numel // mixture.in_one(weight) for weight in routed) // hidden
    chosen = mixture.chosen or max(mixture.in_one(weight) for weight in routed)
    fused = [weight.numel // hidden for weight in found if weight.shared and weight.kind == "fused"]
    back = [
        weight.shape[1] for weight in found if weight.shared and weight.shape[:1] == (hidden,) and weight.multiplies
    ]
    blocks = {_block(weight.module) for weight in routed}
    beside = any(
        weight.kind == "linear" and weight.shape == (hidden, inner) and _block(weight.module) in blocks
        and not weight.shared and "att" not in weight.module
        for weight in found
    )  # fmt: skip
    return chosen * one + (min(fused) if fused else max(back, default=0)) + beside * inner


def _block(module: str) -> str:
    """Return the name of the block that a module is in, up to the first number."""
    match = re.match(r".*?\.\d+(?=\.|$)", module)
    return match[0] if match else module


def _dense_width(found: list[_Found], hidden: int, inner: int) -> int:
    """Inner width of the MLPs: the config's, if there is such a matrix; else the widest that leads back."""
    back = {weight.shape[1] for weight in found if weight.multiplies and weight.shape[0] == hidden}
    return inner if inner in back or not back else max(back)


def _gated(found: list[_Found], hidden: int, inner: int) -> bool:
    """Whether MLPs hold three times their last matrix (gate, up, down) and not twice (up, down)."""
    last = min((weight.numel for weight in found if weight.routed), default=hidden * inner)
    mlps = {weight.owner for weight in found if weight.routed or weight.shape == (hidden, inner)}
    return 2 * sum(weight.numel for weight in found if weight.owner in mlps and weight.multiplies) >= 5 * last * len(
        mlps
    )


def _number(config: Any, *names: str) -> int | None:
    """Return the first of the config's fields that holds a number; of one that differs between layers the largest."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # it differs between layers
            value = [getattr(layer, name, None) for layer in config.per_layer_config]
        if isinstance(value, (list, tuple)):
            value = max((one for one in value if isinstance(one, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool) and value:
            return value
    return None
