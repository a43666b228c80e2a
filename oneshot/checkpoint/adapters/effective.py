"""Adapters that are more than low-rank updates of linear layers (DoRA, saved modules, ...): what is in them, by kind.

Such an adapter is merged into its base, and the merged checkpoint is what is repaired: its difference from the base is
the effective update, magnitudes, saved modules and all.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier_read import uncarried
from oneshot.checkpoint.adapters.experts import PROJECTIONS
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import PICKLED_ADAPTER, read_header
from oneshot.checkpoint.disk.seal import ADAPTER, check_sealed
from oneshot.checkpoint.names import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.errors import UserError
from oneshot.reading import read_object, reading

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
# LoRA initializations under which PEFT also replaces the base's weights when it loads the adapter
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])\.weight")
# what else PEFT stores of a LoRA, by the end of the tensor's name; the last ones are of modules that it saves whole
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")  # of PEFT's own modules, around the model's
_PARAMETERS = ("weight", *PROJECTIONS)  # a layer's own weight is as good as the layer; fused experts are read, too
_ORIGINAL = re.compile(r".+\.original_module\..+")  # of a module that was saved: the base's, which PEFT adds at times
_ENDS = {
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"),
    "embedding": re.compile(r"(.+)\.lora_embedding_([AB])"),
    "lora_bias": re.compile(r"(.+)\.lora_B\.bias"),
    "tokens": re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta"),
    "whole": re.compile(r"(.+)\.(weight|bias)"),
}


@dataclass(frozen=True)
class Kinds:
    """What an adapter holds beside plain LoRA factors, in words.

    Attributes:
        merged: kinds that are merged tensor by tensor
        by_peft: kinds that PEFT alone can apply, with the model in memory
        never: kinds that no merged checkpoint is equal to
    """

    merged: list[str] = field(default_factory=list)
    by_peft: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)

    @property
    def every(self) -> list[str]:
        return [*self.never, *self.by_peft, *self.merged]


@dataclass(frozen=True)
class Effective:
    """What such an adapter makes of its base, by module as the model names it.

    Attributes:
        factors: of what is added to the weight, without ``scaling``; of embeddings, too
        magnitudes: (m,), the norm that every row of the weight has after that (DoRA)
        biases: (m,), what is added to the bias, without ``scaling``, too
        tokens: module -> (numbers of rows, the rows)
        whole: tensor's name -> what is in its place
    """

    config: dict[str, Any]
    scaling: dict[str, float]
    factors: dict[str, Factors] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def factor_of(key: str) -> tuple[str, str] | None:
    """Return which module a stored tensor is a factor of, and which one ("A" or "B"); none where it is no factor."""
    match = _FACTOR.fullmatch(key)
    return None if match is None else (match[1], match[2])


def kinds_of(folder: Path) -> Kinds:
    """Return what an adapter is beside a plain LoRA; no tensor is read.

    Raises:
        UserError: its config or its file of tensors is missing or damaged
    """
    config, path = read_object(folder / ADAPTER_CONFIG), folder / ADAPTER_TENSORS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds its factors as adapter_model.bin alone, a pickle, which can run code as it is read, so it "
            f"is not; where you trust its source, convert it once: {PICKLED_ADAPTER.format(folder=folder)}."
        )
    tensors = read_header(path)
    found = Kinds()
    if config.get("peft_type") != "LORA":
        found.by_peft.append(f"{config.get('peft_type')} adapter")
        return found
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        found.by_peft.append(f"init_lora_weights {init}")
    if config.get("alora_invocation_tokens"):
        found.never.append("alora_invocation_tokens")
    if config.get("layer_replication"):
        found.never.append("layer_replication")
    if _has_other_parameters(config, {factor[0] for factor in map(factor_of, tensors) if factor is not None}):
        found.by_peft.append("target_parameters")
    saved: list[str] = []
    held: set[str] = set()
    for key, entry in tensors.items():
        name = key.removeprefix(PREFIX)
        if factor_of(name):
            held |= {"convolutions"} if len(entry.shape) > 2 else set()
            continue
        if _ORIGINAL.fullmatch(name):
            continue
        kind = next((kind for kind, end in _ENDS.items() if end.fullmatch(name)), f"the tensor {key}")
        held.add(kind)
        if kind == "whole":
            saved.append(_WRAPPED.sub("", name))
        if kind == "magnitude" and (config.get("fan_in_fan_out") or "embed" in name or len(entry.shape) != 1):
            held.add(f"DoRA of {name.split('.lora_')[0]}")
    said = {
        "magnitude": "DoRA",
        "embedding": "LoRA of an embedding",
        "lora_bias": "lora_bias",
        "tokens": "new rows of tokens (trainable_token_indices)",
    }
    found.merged.extend(text for kind, text in said.items() if kind in held)
    if saved:
        found.merged.append(
            f"modules saved whole ({saved[0]}{f' and {len(saved) - 1} more' if len(saved) > 1 else ''})"
        )
    found.by_peft.extend(sorted(held - said.keys() - {"whole"}))
    return found


def _has_other_parameters(config: dict[str, Any], modules: set[str]) -> bool:
    """Whether factors are of a parameter that is read of no module; names without factors count for nothing.

    Args:
        modules: that have factors, as the file names them: a module as often as it is wrapped
    """
    fused, layers = config.get("target_parameters") or [], config.get("target_modules") or []
    if not isinstance(fused, list):
        return True
    names = [str(name) for name in fused]
    owners = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] not in _PARAMETERS}
    read = tuple(f".{name}" for name in names if name.rpartition(".")[2] in _PARAMETERS)
    ends = tuple(f".{name}" for name in layers) if isinstance(layers, list) else ()
    wrapped = Counter(re.sub(r"(\.base_layer)+$", "", module) for module in modules)
    for path, count in wrapped.items():
        held = {each for each in _PARAMETERS if f".{path}.{each}".endswith(read)}
        known = len(held - {"up_proj"} if "gate_up_proj" in held else held)  # a model has one of the two
        owned = any(f".{path}".endswith(f".{owner}") for owner in owners if owner) or "" in owners
        if owned and count > known + f".{path}".endswith(ends):
            return True
    return False


def refuse(folder: Path, kinds: list[str], base: str | None = None) -> UserError:
    """Return the error that names the kinds of an adapter and the command that makes a checkpoint of it."""
    if "alora_invocation_tokens" in kinds:
        return UserError(
            f"{folder / ADAPTER_CONFIG} has alora_invocation_tokens, so the adapter is active only after certain "
            "tokens, and no merged checkpoint is equal to it: train a plain LoRA."
        )
    if "layer_replication" in kinds:
        return UserError(
            f"{folder / ADAPTER_CONFIG} has layer_replication, so that the adapter is of a model with more layers than "
            "its base: build that model, save it, and train a plain LoRA on it."
        )
    return UserError(
        f"{folder} is more than a LoRA of linear layers ({', '.join(kinds)}): merge it first, with oneshot export "
        f"--model {base or 'BASE'} --adapter {folder} --out MERGED, and give MERGED in its place."
    )


def read_effective(folder: Path, swapped: bool | None = None) -> Effective:
    """Read such an adapter whose kinds can be merged tensor by tensor; factors are fp32, the rest as stored.

    Args:
        swapped: as of ``uncarried``

    Raises:
        UserError: a file is damaged, factors are missing, or rows of tokens that the config does not number
    """
    from safetensors.torch import load_file

    check_sealed(folder, ADAPTER)
    config, path = read_object(folder / ADAPTER_CONFIG), folder / ADAPTER_TENSORS
    with reading(path, "copy it again"):
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    found = Effective(config, {})
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"The adapter {folder} holds NaN or infinity in {name}: train or save it again.")
        if factor := factor_of(name):
            pairs.setdefault(factor[0], {})[factor[1]] = tensor.float()
        elif match := _ENDS["embedding"].fullmatch(name):  # the update of an embedding is (b @ a) transposed
            pairs.setdefault(match[1], {})["BA"["AB".index(match[2])]] = tensor.float().T
        elif match := _ENDS["magnitude"].fullmatch(name):
            found.magnitudes[match[1]] = tensor.float()
        elif match := _ENDS["lora_bias"].fullmatch(name):
            found.biases[match[1]] = tensor.float()
        elif match := _ENDS["tokens"].fullmatch(name):
            found.tokens[match[1]] = (_numbers(config, match[1], len(tensor), folder), tensor)
        elif not _ORIGINAL.fullmatch(name):
            found.whole[_WRAPPED.sub("", name)] = tensor
    for module, pair in pairs.items():
        if (
            set(pair) != {"A", "B"}
            or any(one.ndim != 2 for one in pair.values())
            or pair["A"].shape[0] != pair["B"].shape[1]
            or not pair["A"].shape[0]
        ):
            raise UserError(f"{path} holds only one factor of {module}, or two that do not fit: save it again.")
        found.factors[module] = Factors(pair["B"], pair["A"])
    lost = [module for module in (*found.magnitudes, *found.biases) if module not in found.factors]
    if lost:
        raise UserError(f"{path} holds no factors of {lost[0]}: the adapter is incomplete, save it again.")
    read = uncarried(found.factors, config, folder / ADAPTER_CONFIG, swapped)
    return replace(found, factors=read.stored, scaling=read.scaling)


def _numbers(config: dict[str, Any], module: str, rows: int, folder: Path) -> list[int]:
    """The tokens whose rows an adapter holds, as its config numbers them: for one embedding, or by module's name."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        ends = [name for name in given if module == name or module.endswith(f".{name}")]
        given = given[ends[0]] if ends else None
    if not isinstance(given, list) or len(given) != rows or any(type(number) is not int for number in given):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} does not number the {rows} rows of {module} in trainable_token_indices: "
            "restore it from its source."
        )
    return given
